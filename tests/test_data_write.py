"""data_pipes.write, .schema, .shards and .verify: folders of shards, and what is said when one is not right."""

from __future__ import annotations

import errno
import hashlib
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from data_pipes import index as indices
from data_pipes import write
from data_pipes.decode import encode_png
from data_pipes.read import open_split
from data_pipes.schema import DatasetInfo, list_builtin, read_info
from data_pipes.shards import iterate_shard
from data_pipes.write import Sample, write_dataset
from mwt.errors import InputError
from mwt.structs import SignalFacts

FACTS = SignalFacts(kind="image", channels=1, height=2, width=3, classes=("a", "b"))


TWICE = {"count": 1, "shards": [{"file": "x.tar", "count": 1, "bytes": 1, "sha256": ""}]}


def picture(value: int) -> bytes:
    return encode_png(torch.full((1, 2, 3), value, dtype=torch.uint8))


def samples(count: int) -> Iterator[Sample]:
    for index in range(count):
        yield Sample(extension="png", data=picture(index), label=index % 2)


def make(out: Path, count: int = 5, shard_bytes: int = 4096) -> DatasetInfo:
    splits = {"train": samples(count), "test": samples(2)}
    return write_dataset(out, name="tiny", facts=FACTS, licence="none", splits=splits, shard_bytes=shard_bytes)


def test_folder_is_as_the_format_says(tmp_path: Path) -> None:
    info = make(tmp_path / "data")
    content = json.loads((tmp_path / "data" / "dataset.json").read_text())
    assert list(content) == [
        "schema", "name", "signal", "channels", "height", "width", "classes", "licence", "splits"
    ]  # fmt: skip
    assert content["splits"]["train"]["count"] == 5
    shards = content["splits"]["train"]["shards"]
    assert [shard["file"] for shard in shards] == [f"train-{i:06d}.tar" for i in range(len(shards))]
    assert len(shards) == 3
    names = []
    for shard in shards:
        data = (tmp_path / "data" / shard["file"]).read_bytes()
        assert shard["sha256"] == hashlib.sha256(data).hexdigest()
        assert shard["bytes"] == len(data)
        with tarfile.open(tmp_path / "data" / shard["file"]) as tar:
            members = tar.getmembers()
            assert len(members) == 2 * shard["count"]
            names += [member.name for member in members]
            assert {(m.uname, m.gname, m.mode, m.mtime, m.uid) for m in members} == {("mwt", "mwt", 0o444, 0, 0)}
    assert names == [f"{i:08d}.{extension}" for i in range(5) for extension in ("cls", "png")]
    assert read_info(tmp_path / "data") == info
    assert info.facts == FACTS


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    assert make(tmp_path / "one").splits == make(tmp_path / "two").splits


def test_a_shard_comes_with_its_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same that opening would make; so that nothing is gone through when it is first opened."""
    info = make(tmp_path / "data")
    paths = list((tmp_path / "data").glob("*.index"))
    assert len(paths) == 4

    def arrays() -> list[bytes]:
        return [path.read_bytes()[8 + int.from_bytes(path.read_bytes()[:8], "little") :] for path in paths]

    made = arrays()
    with monkeypatch.context() as patch:
        patch.setattr(indices, "_scan", lambda *_: pytest.fail("the tar was gone through again"))
        for shard in info.split("train").shards:
            indices.open_index(tmp_path / "data" / shard.file, shard)
    for path in paths:
        path.unlink()
    for split in info.splits.values():
        for shard in split.shards:
            indices.open_index(tmp_path / "data" / shard.file, shard)
    assert arrays() == made


def test_existing_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(InputError, match=r"data exists already; choose another --out"):
        make(tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_writing_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def broken() -> Iterator[Sample]:
        yield from samples(3)
        assert any(tmp_path.glob(".data.partial-*/unfinished.tar")), "nothing was being written"
        raise error

    with pytest.raises(error):
        write_dataset(tmp_path / "data", name="x", facts=FACTS, licence="", splits={"train": broken()})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, r"The disk of .*data is full; nothing was kept"),
        (errno.EACCES, r"No permission to write to "),
        (errno.EIO, r"data cannot be written: "),
    ],
)
def test_failing_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(write.TarWriter, "write", fail)
    with pytest.raises(InputError, match=message):
        make(tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (Sample(extension="gif", data=b"", label=0), r"Sample 0 of 'train': \.gif cannot be stored; what can is jpg,"),
        (Sample(extension="png", data=b"", label=2), r"Sample 0 of 'train': label 2 is not in 0 … 1\."),
    ],
)
def test_malformed_samples(tmp_path: Path, sample: Sample, message: str) -> None:
    with pytest.raises(InputError, match=message):
        write_dataset(tmp_path / "data", name="x", facts=FACTS, licence="", splits={"train": [sample]})
    assert list(tmp_path.iterdir()) == []


def test_missing_and_foreign_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"No data folder at .*nowhere\. .*python -m data_pipes\.prepare NAME"):
        read_info(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r" is empty\. .*python -m data_pipes\.prepare"):
        read_info(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"file is a file; give the folder"):
        read_info(tmp_path / "file")
    with pytest.raises(InputError, match=r"not a folder of shards\. .*python -m data_pipes\.prepare"):
        read_info(tmp_path)
    with pytest.raises(InputError, match=r"No built-in data set 'numbers'; there is .*digits"):
        read_info("builtin:numbers")
    assert "digits" in list_builtin()


@pytest.mark.parametrize("place", ["cat/one.PNG", "train/cat/one.jpeg"])
def test_folder_of_images_gets_the_command(tmp_path: Path, place: str) -> None:
    path = tmp_path / "pets" / place
    path.parent.mkdir(parents=True)
    path.touch()
    command = f"python -m data_pipes.prepare folder --src {tmp_path / 'pets'} --out pets-shards"
    with pytest.raises(InputError, match=f"looks like images in class folders. Make shards of them: {command}$"):
        read_info(tmp_path / "pets")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 7}, r"is of schema version 7, this program reads version 1; prepare the data again"),
        ({"signal": "video"}, r"signal 'video' is not known"),
        ({"channels": "three"}, r"'channels' is 'three', not of type int"),
        ({"splits": {"train": {}}}, r"lacks the key 'shards'"),
        ({"splits": {"train": {"count": 2, "shards": []}}}, r"count of split 'train' is not the sum"),
        (
            {"splits": {"t": {"count": 1, "shards": [{"file": "../x", "count": 1, "bytes": 1, "sha256": ""}]}}},
            r"shard name '\.\./x' is neither a plain file name nor a URL",
        ),
        (
            {"splits": {"a": {"count": 2 * TWICE["count"], "shards": 2 * TWICE["shards"]}}},
            r"lists x\.tar twice in split 'a'; its samples would count twice",
        ),
        ({"classes": []}, r"'classes' is empty; there must be one at least"),
        ({"channels": 0}, r"'channels' is 0; it must be positive"),
        ({"height": -3}, r"'height' is -3; it must be positive"),
    ],
)
def test_unusable_dataset_json(tmp_path: Path, change: dict[str, object], message: str) -> None:
    make(tmp_path / "data")
    file = tmp_path / "data" / "dataset.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(InputError, match=message):
        read_info(tmp_path / "data")
    for text in ("{", "[" * 100_000):
        file.write_text(text)
        with pytest.raises(InputError, match=r"dataset\.json cannot be read as JSON"):
            read_info(tmp_path / "data")


def test_unknown_split_and_damaged_shards(tmp_path: Path) -> None:
    make(tmp_path / "data")
    with pytest.raises(InputError, match=r"has no split 'val'; it has train, test\."):
        open_split(tmp_path / "data", "val", device=torch.device("cpu"))
    shard = tmp_path / "data" / "train-000001.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(InputError, match=rf"train-000001\.tar has {len(data) - 1} bytes, but .* records {len(data)}"):
        open_split(tmp_path / "data", "train", device=torch.device("cpu"))
    shard.unlink()
    with pytest.raises(InputError, match=r"train-000001\.tar, listed in dataset\.json, is missing"):
        open_split(tmp_path / "data", "train", device=torch.device("cpu"))


def test_cut_shard(tmp_path: Path) -> None:
    make(tmp_path / "data", shard_bytes=2**20)
    shard = tmp_path / "data" / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[: 4 * 1024 + 600])  # two samples, and a part of the third's label
    with pytest.raises(InputError, match=r"train-000000\.tar is damaged after 2 samples: "):
        list(iterate_shard(shard))


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_files_of_others(tmp_path: Path, tar_format: int) -> None:
    """Whatever tarfile can write is read: long names, folders and non-ASCII names lead away from the quick path."""
    keys = ["a", "long/" * 25 + "name", "ü", "b"]
    with tarfile.open(tmp_path / "x.tar", "w", format=tar_format) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for index, key in enumerate(keys):
            for extension, data in (("png", picture(index)), ("cls", b"1\n")):
                (tmp_path / "member").write_bytes(data)
                tar.add(tmp_path / "member", f"{key}.{extension}")
    found = list(iterate_shard(tmp_path / "x.tar"))
    assert [sample["__key__"] for sample in found] == keys
    assert [sample["png"] for sample in found] == [picture(index) for index in range(4)]


def test_builtin_digits_are_those_of_sklearn(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    from data_pipes.builtin.make_digits import main

    main(["--out", str(tmp_path / "digits")])
    committed, again = read_info("builtin:digits"), read_info(tmp_path / "digits")
    assert {name: split.count for name, split in committed.splits.items()} == {"train": 1437, "test": 360}
    seen = []
    for split in ("train", "test"):
        both = [
            next(open_split(info.folder, split, device=torch.device("cpu")).batches(batch_size=2000))
            for info in (committed, again)
        ]
        assert both[0].images is not None
        assert both[1].images is not None
        assert torch.equal(both[0].images, both[1].images)
        assert torch.equal(both[0].labels, both[1].labels)
        assert both[0].labels.bincount().min() >= (34 if split == "test" else 139)  # 174 eights
        seen += [(int(y), bytes(x.flatten().tolist())) for x, y in zip(both[0].images, both[0].labels, strict=True)]
    digits = load_digits()
    expected = [
        (int(y), bytes(round(v * 255 / 16) for v in x.flatten().tolist()))
        for x, y in zip(digits.images, digits.target, strict=True)
    ]
    assert sorted(seen) == sorted(expected)
    assert sum(path.stat().st_size for path in committed.folder.iterdir()) < 4 * 2**20
    assert "CC BY 4.0" in committed.licence
    assert "Alpaydin" in (committed.folder / "LICENSE").read_text()
    with tarfile.open(committed.folder / "test-000000.tar") as tar:
        member = tar.extractfile("00000000.png")
        assert member is not None
        assert Image.open(member).mode == "L"
