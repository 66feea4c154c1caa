"""Bad samples under `on_bad_sample`, in all three readers: what is said, what is skipped, and what takes its place."""

from __future__ import annotations

import io
import json
import logging
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipes.decode import encode_png
from data_pipes.index import INDEX_SUFFIX, open_index
from data_pipes.read import Split, open_split
from data_pipes.schema import read_info
from data_pipes.write import Sample, write_dataset
from mwt.errors import InputError
from mwt.structs import SignalFacts

CPU = torch.device("cpu")
READERS = ("resident", "indexed", "stream")
FACTS = SignalFacts(kind="image", channels=1, height=1, width=2, classes=tuple("abcde"))
COUNT = 24


def picture(value: int) -> bytes:
    return encode_png(torch.full((1, 1, 2), value, dtype=torch.uint8))


def make(folder: Path, bad: dict[int, bytes] | None = None) -> Path:
    """24 images whose value is their position, in shards of three; `bad` are other contents of some."""
    samples = [Sample(extension="png", data=(bad or {}).get(i, picture(i)), label=i % 5) for i in range(COUNT)]
    write_dataset(folder, name="t", facts=FACTS, licence="", splits={"train": samples}, shard_bytes=6000)
    return folder


def opened(folder: Path, reader: str, max_bad: float = 0.5) -> Split:
    return open_split(folder, "train", device=CPU, reader=reader, on_bad_sample="skip", max_bad=max_bad, workers=2)  # type: ignore[arg-type]


def seen(split: Split, size: int = 4, **options: bool) -> list[list[int]]:
    result = []
    for batch in split.batches(batch_size=size, **options):  # type: ignore[arg-type]
        assert batch.images is not None
        assert batch.images[:, 0, 0, 0].tolist() == batch.positions.tolist()
        assert batch.labels.tolist() == [position % 5 for position in batch.positions.tolist()]
        result.append(batch.positions.tolist())
    return result


def check_skipping(split: Split, bad: set[int]) -> None:
    """Evaluation has all others once; training has whole batches, and in place of bad ones good ones."""
    good = sorted(set(range(COUNT)) - bad)
    assert sorted(p for batch in seen(split) for p in batch) == good
    assert len(split.bad) == len(bad)
    assert all(seen(split, size=1))  # no empty batch
    batches = seen(split, size=5, drop_last=True, shuffle=True)
    assert [len(batch) for batch in batches] == [5] * (COUNT // 5)
    whole = Counter(p for batch in seen(split, drop_last=True, shuffle=True) for p in batch)
    assert set(whole) == set(good)
    assert whole.total() == COUNT
    assert len(split.bad) == len(bad)  # counted once, in whatever epoch


@pytest.mark.parametrize("reader", READERS)
def test_undecodable_images(tmp_path: Path, reader: str, caplog: pytest.LogCaptureFixture) -> None:
    split = opened(make(tmp_path / "data", {5: b"no image", 23: picture(3)[:40]}), reader)
    check_skipping(split, {5, 23})
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(messages) == 2
    assert all(message.startswith("skipped: Sample 000000") for message in messages)
    assert any(
        "Sample 00000005 of shard " in m and "train-000001.tar cannot be read as an image" in m for m in messages
    )
    report = split.bad.report()
    assert report.startswith("2 bad samples of the 24 of split 'train' were skipped:\n")
    assert report.count("\n") == 2


@pytest.mark.parametrize("reader", READERS)
def test_labels_out_of_range(tmp_path: Path, reader: str) -> None:
    folder = make(tmp_path / "data")
    content = json.loads((folder / "dataset.json").read_text())
    content["classes"] = content["classes"][:4]
    (folder / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"^Sample 00000004 of shard .*tar: label '4' is not a class number in 0 … 3"):
        list(open_split(folder, "train", device=CPU, reader=reader).batches(batch_size=3))  # type: ignore[arg-type]
    check_skipping(opened(folder, reader), {4, 9, 14, 19})


@pytest.mark.parametrize("reader", READERS)
def test_a_missing_shard(tmp_path: Path, reader: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = make(tmp_path / "data")
    shard = read_info(folder).split("train").shards[2]
    (folder / shard.file).unlink()
    with pytest.raises(InputError, match=r"train-000002\.tar, listed in dataset\.json, is missing"):
        open_split(folder, "train", device=CPU, reader=reader)  # type: ignore[arg-type]
    check_skipping(opened(folder, reader), {6, 7, 8})
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert "skipped 3 samples: Shard " in messages[0]


@pytest.mark.parametrize("reader", READERS)
def test_a_truncated_shard(tmp_path: Path, reader: str) -> None:
    folder = make(tmp_path / "data")
    path = folder / "train-000002.tar"
    with tarfile.open(path) as tar:
        second = next(member.offset for member in tar if member.name.endswith("7.png"))
    path.write_bytes(path.read_bytes()[: second + 512 + 30])
    with pytest.raises(InputError, match=r"train-000002\.tar has \d+ bytes, but dataset\.json records \d+"):
        open_split(folder, "train", device=CPU, reader=reader)  # type: ignore[arg-type]
    check_skipping(opened(folder, reader), {7, 8})


def flip(path: Path, position: int) -> None:
    """Change one byte of a stored point set, which decodes as well afterwards."""
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        member = tar.getmember(f"{position:08d}.npy")
    data[member.offset_data + member.size - 2] ^= 1
    path.write_bytes(data)


def points(folder: Path) -> Path:
    samples = []
    for i in range(8):
        stream = io.BytesIO()
        np.save(stream, np.full((4, 4), i, np.float32))
        samples.append(Sample(extension="npy", data=stream.getvalue(), label=0))
    facts = SignalFacts(kind="points", channels=1, height=None, width=None, classes=("a",))
    write_dataset(folder, name="t", facts=facts, licence="", splits={"train": samples}, shard_bytes=6000)
    return folder


@pytest.mark.parametrize("reader", READERS)
def test_a_flipped_byte_that_decodes(tmp_path: Path, reader: str) -> None:
    """SHA-256 of the shard: when it is opened, or, streamed, when it has been read to its end."""
    folder = points(tmp_path / "data")
    flip(folder / "train-000000.tar", 1)
    with pytest.raises(InputError, match=r"train-000000\.tar has another sha256 than dataset\.json records"):
        list(open_split(folder, "train", device=CPU, reader=reader).batches(batch_size=2))  # type: ignore[arg-type]


@pytest.mark.parametrize("reader", READERS)
def test_shards_at_fault_are_counted_and_reported(
    tmp_path: Path, reader: str, caplog: pytest.LogCaptureFixture
) -> None:
    """No sample of it is skipped, but its sums are wrong: said once, in whatever epoch, and at the end."""
    folder = points(tmp_path / "data")
    flip(folder / "train-000000.tar", 1)
    (folder / f"train-000000.tar{INDEX_SUFFIX}").unlink()
    split = opened(folder, reader)
    for epoch in range(2):
        assert sum(len(batch) for batch in split.batches(batch_size=4, epoch=epoch)) == 8
    report = split.bad.report().splitlines()
    assert report[0] == "1 shards of split 'train' are at fault; their samples were used as far as they could be:"
    assert "train-000000.tar has another sha256 than dataset.json records" in report[1]
    assert len(report) == 2
    assert len([record for record in caplog.records if "another sha256" in record.getMessage()]) == 1
    assert len(split.bad) == 0


def test_going_on_where_a_stream_has_only_bad_samples_left(tmp_path: Path) -> None:
    """An uninterrupted run takes the last good one; one that goes on has not read it, and says so."""
    folder = make(tmp_path / "data", {22: b"?", 23: b"?"})
    options = {"batch_size": 2, "drop_last": True}
    assert [batch.positions.tolist() for batch in opened(folder, "stream").batches(**options)][-1] == [21, 21]  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"none of the 2 left of epoch 0 for this process\. Mend the data, or"):
        list(opened(folder, "stream").batches(**options, start=11))  # type: ignore[arg-type]
    assert next(opened(folder, "stream").batches(**options, start=10)).positions.tolist() == [20, 21]  # type: ignore[arg-type]


def test_a_flipped_byte_is_one_bad_sample_where_the_index_knew_it_sound(tmp_path: Path) -> None:
    """Before the split is opened, and, unseen by the size and time of the file, while it is open."""
    folder = points(tmp_path / "data")
    shard = read_info(folder).split("train").shards[0]
    open_index(folder / shard.file, shard)
    flip(folder / shard.file, 1)
    split = opened(folder, "indexed")
    assert [batch.positions.tolist() for batch in split.batches(batch_size=8)] == [[0, 2, 3, 4, 5, 6, 7]]
    assert "Sample 00000001 of shard " in split.bad.report()
    assert "has changed since it was written (CRC-32)" in split.bad.report()
    flip(folder / shard.file, 2)
    assert [batch.positions.tolist() for batch in split.batches(batch_size=8)] == [[0, 3, 4, 5, 6, 7]]
    assert len(split.bad) == 2


@pytest.mark.parametrize("reader", READERS)
def test_too_many_end_the_run(tmp_path: Path, reader: str) -> None:
    folder = make(tmp_path / "data", {1: b"?", 2: b"?", 10: b"?"})
    message = (
        r"Too many bad samples: 3 of the 24 of split 'train', more than data\.max_bad=0\.1 allows \(2\); the last: .*"
    )
    with pytest.raises(InputError, match=message + r"data_pipes\.verify"):
        list(opened(folder, reader, max_bad=0.1).batches(batch_size=2))
    split = opened(folder, reader, max_bad=0.125)
    assert sum(map(len, seen(split))) == COUNT - 3


@pytest.mark.parametrize("reader", ["resident", "indexed"])
def test_what_takes_a_place_does_not_depend_on_processes_and_workers(tmp_path: Path, reader: str) -> None:
    folder = make(tmp_path / "data", {3: b"?", 11: b"?"})
    orders = []
    for world, workers in ((1, 0), (1, 3), (2, 1), (3, 0)):
        split = open_split(
            folder, "train", device=CPU, reader=reader, on_bad_sample="skip", max_bad=0.5, workers=workers
        )  # type: ignore[arg-type]
        places = [0] * COUNT
        for rank in range(world):
            batches = split.batches(batch_size=12 // world, drop_last=True, shuffle=True, rank=rank, world=world)
            for number, batch in enumerate(batches):
                for place, position in zip(
                    range(12 * number + rank, COUNT, world), batch.positions.tolist(), strict=False
                ):
                    places[place] = position
        orders.append(places)
    assert all(order == orders[0] for order in orders)
    assert not {3, 11} & set(orders[0])
    sound = open_split(make(tmp_path / "sound"), "train", device=CPU)
    before = next(sound.batches(batch_size=COUNT, shuffle=True)).positions.tolist()
    assert [now for now, was in zip(orders[0], before, strict=True) if was not in (3, 11)] == [
        was for was in before if was not in (3, 11)
    ]


@pytest.mark.parametrize("reader", READERS)
def test_a_split_without_a_good_sample(tmp_path: Path, reader: str) -> None:
    folder = make(tmp_path / "data", dict.fromkeys(range(COUNT), b"?"))
    with pytest.raises(InputError, match=r"has (no|too few) samples that can be used"):
        list(opened(folder, reader, max_bad=1.0).batches(batch_size=2, drop_last=True))


def test_a_shard_with_more_samples_than_recorded(tmp_path: Path) -> None:
    folder = make(tmp_path / "data")
    content = json.loads((folder / "dataset.json").read_text())
    content["splits"]["train"]["shards"][0]["count"] -= 1
    content["splits"]["train"]["count"] -= 1
    (folder / "dataset.json").write_text(json.dumps(content))
    for reader in READERS:
        with pytest.raises(
            InputError, match=r"train-000000\.tar holds 3 samples, not the 2 that dataset\.json records"
        ):
            list(open_split(folder, "train", device=CPU, reader=reader).batches(batch_size=2))  # type: ignore[arg-type]
        split = opened(folder, reader)
        assert sum(len(batch) for batch in split.batches(batch_size=2)) == COUNT - 1
    assert (folder / f"train-000000.tar{INDEX_SUFFIX}").exists()
