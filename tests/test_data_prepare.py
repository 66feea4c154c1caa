"""python -m data_pipes.prepare: tiny trees and files in, shards out; every refusal says what to do."""

from __future__ import annotations

import gzip
import hashlib
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets
from torchvision.datasets.utils import calculate_md5

from data_pipes.prepare import cifar10, mnist
from data_pipes.prepare.__main__ import main
from data_pipes.prepare.source import split_off
from data_pipes.read import open_split
from data_pipes.schema import read_info
from data_pipes.shards import iterate_shard
from mwt.errors import InputError
from mwt.structs import Batch

FASHION = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
ROOT = Path(__file__).parents[1]


def everything(folder: Path, split: str) -> Batch:
    opened = open_split(folder, split, device=torch.device("cpu"))
    return next(opened.batches(batch_size=len(opened)))


def image(path: Path, seed: int = 0, shape: tuple[int, ...] = (4, 6, 3)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).save(path)


def tree(src: Path, splits: tuple[str, ...], count: int = 3, shape: tuple[int, ...] = (4, 6, 3)) -> Path:
    for split in splits:
        for label, name in enumerate(("cat", "dog")):
            for i in range(count):
                image(src / split / name / f"{i}.png", seed=1000 * len(split) + 100 * label + i, shape=shape)
    return src


def run(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


def test_folder_with_splits_keeps_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = tree(tmp_path / "pets", ("train", "test"))
    image(src / "train" / "cat" / "deep" / "x.JPEG")
    image(src / "train" / "dog" / "9.bmp")
    (src / "train" / "cat" / "notes.txt").touch()
    (src / "readme.md").touch()
    run("folder", "--src", src, "--out", tmp_path / "out")
    info = read_info(tmp_path / "out")
    assert (info.name, info.classes, info.channels, info.height, info.width) == ("pets", ("cat", "dog"), 3, 4, 6)
    assert {name: split.count for name, split in info.splits.items()} == {"train": 8, "test": 6}
    samples = list(iterate_shard(tmp_path / "out" / "train-000000.tar"))
    stored = {data for sample in samples for extension, data in sample.items() if extension in ("png", "jpg")}
    kept = [path for path in (src / "train").rglob("*") if path.suffix in (".png", ".JPEG")]
    assert len(kept) == 7
    assert {path.read_bytes() for path in kept} < stored
    batch = everything(tmp_path / "out", "train")
    labels = batch.labels.tolist()
    assert sorted(labels) == [0] * 4 + [1] * 4
    assert labels != sorted(labels), "sorted by class"
    assert batch.images is not None
    bitmap = np.array(Image.open(src / "train" / "dog" / "9.bmp"))
    [place] = [i for i in range(8) if np.array_equal(batch.images[i].permute(1, 2, 0), bitmap)]
    assert labels[place] == 1
    output = capsys.readouterr().out
    assert "2 files that are no images were ignored." in output
    assert f"Next: python -m train.classify data.path={tmp_path / 'out'}" in output
    assert [line.split()[:3] for line in output.splitlines() if line.startswith("t")] == [
        ["train", "8", "1"],
        ["test", "6", "1"],
    ]


def test_folder_without_splits(tmp_path: Path) -> None:
    src = tree(tmp_path / "pets", (".",), count=10, shape=(4, 6))
    arguments = ("folder", "--src", src, "--val-fraction", 0.25, "--size", "5x3")
    run(*arguments, "--out", tmp_path / "out")
    run(*arguments, "--out", tmp_path / "again")
    run(*arguments, "--out", tmp_path / "other", "--seed", 1)
    info = read_info(tmp_path / "out")
    assert {name: split.count for name, split in info.splits.items()} == {"train": 12, "val": 4, "test": 4}
    assert (info.channels, info.height, info.width) == (1, 5, 3)
    for split, count in (("train", 6), ("val", 2), ("test", 2)):
        assert everything(tmp_path / "out", split).labels.bincount().tolist() == [count, count]
    assert read_info(tmp_path / "again").splits == info.splits
    assert read_info(tmp_path / "other").splits["test"] != info.splits["test"]


def test_folder_of_differing_sizes_and_given_channels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = tree(tmp_path / "pets", ("train",))
    image(src / "train" / "dog" / "x.png", shape=(9, 9))
    run("folder", "--src", src, "--out", tmp_path / "out", "--channels", 1)
    info = read_info(tmp_path / "out")
    assert (info.channels, info.height, info.width) == (1, None, None)
    assert "Training needs one size: prepare them with --size N" in capsys.readouterr().out


def test_turned_photographs_have_the_size_that_is_seen(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "src" / "a").mkdir(parents=True)
    for i in range(5):
        Image.new("RGB", (8, 4)).save(tmp_path / "src" / "a" / f"{i}.jpg", exif=exif)
    run("folder", "--src", tmp_path / "src", "--out", tmp_path / "out")
    info = read_info(tmp_path / "out")
    assert (info.height, info.width) == (8, 4)
    assert len(everything(tmp_path / "out", "train")) == 4


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for name in ("car", "train"):
        for i in range(5):
            image(tmp_path / "src" / name / f"{i}.png")
    run("folder", "--src", tmp_path / "src", "--out", tmp_path / "out")
    assert read_info(tmp_path / "out").classes == ("car", "train")


def test_folders_that_are_not_right(tmp_path: Path) -> None:
    src, out = tmp_path / "src", tmp_path / "out"

    def refused(message: str, *more: object) -> None:
        with pytest.raises(InputError, match=message):
            run("folder", "--src", src, "--out", out, *more)
        assert not out.exists()
        assert not list(tmp_path.glob(".out*"))

    refused(r"No folder at .*src \(--src\)")
    src.mkdir()
    refused(r"src \(--src\) holds no class folders with images; expected is SRC/\{train,val,test\}/CLASS/IMAGE")
    tree(src, ("train", "val"))
    refused(r"already; leave --val-fraction out", "--val-fraction", 0.5)
    refused(r"--val-fraction is 1\.5; it must lie between 0 and 1", "--val-fraction", 1.5)
    refused(r"--fit and --quality are for images that are resized; give --size too", "--fit", "crop")
    refused(r"--workers is -1; it cannot be negative", "--workers", -1)
    refused(r"--shard-mib is 0\.0; it must be positive", "--shard-mib", 0)
    refused(r"--size is '0'; give a number of pixels", "--size", 0)
    (src / "train" / "empty").mkdir()
    refused(r"Class folders of .*val differ from those of train: it lacks empty\.")
    (src / "val" / "empty").mkdir()
    (src / "val" / "extra").mkdir()
    refused(r"Class folders of .*val differ from those of train: it has extra more\.")
    (src / "val" / "extra").rmdir()
    refused(r"Class folder .*empty holds no image \(\.bmp, ")
    (src / "train" / "empty").rmdir()
    (src / "val" / "empty").rmdir()
    bad = src / "train" / "dog" / "bad.png"
    bad.write_text("hello")
    refused(r"train/dog/bad\.png cannot be read as an image: unknown or damaged")
    image(bad)
    bad.write_bytes(bad.read_bytes()[:-30])
    refused(r"train/dog/bad\.png cannot be decoded: ")
    (src / "more").mkdir()
    refused(r"has, beside train, val, the folders more; move them elsewhere")
    (src / "more").rmdir()
    (src / "train").rename(src / "training")
    refused(r"src has val, but no train with class folders")
    with pytest.raises(InputError, match=r"folder needs --src SRC"):
        run("folder", "--out", out)
    image(tmp_path / "one" / "a" / "0.png")
    with pytest.raises(InputError, match=r"Too few images in .*one for a test split"):
        run("folder", "--src", tmp_path / "one", "--out", out)
    out.mkdir()
    with pytest.raises(InputError, match=r"out exists already; choose another --out, or remove it first"):
        run("folder", "--src", src, "--out", out)


def test_split_off() -> None:
    """Same share of every class; the total as scikit-learn rounds it."""
    labels = torch.tensor([0] * 178 + [1] * 182 + [2] * 7 + [4])
    kept, taken = split_off(labels, 0.2, seed=0)
    assert sorted(kept.tolist() + taken.tolist()) == list(range(len(labels)))
    assert len(taken) == 74  # ceil(73.6)
    for label, count in ((0, 178), (1, 182), (2, 7)):
        assert abs((labels[taken] == label).sum() - 0.2 * count) < 1
    assert (labels[kept] == 4).sum() == 1, "a class keeps one"
    assert not torch.equal(taken, split_off(labels, 0.2, seed=1)[1])


def test_digits(tmp_path: Path) -> None:
    run("digits", "--out", tmp_path / "plain")
    assert read_info(tmp_path / "plain").splits == read_info("builtin:digits").splits
    run("digits", "--out", tmp_path / "more", "--val-fraction", 0.1, "--size", 16)
    info = read_info(tmp_path / "more")
    assert {name: split.count for name, split in info.splits.items()} == {"train": 1293, "val": 144, "test": 360}
    assert (info.height, info.width) == (16, 16)
    with pytest.raises(InputError, match="digits come with the package; leave --src out"):
        run("digits", "--out", tmp_path / "x", "--src", tmp_path)
    with pytest.raises(InputError, match="--channels has no meaning for digits"):
        run("digits", "--out", tmp_path / "x", "--channels", 1)


IMAGES = np.random.default_rng(0).integers(0, 256, (12, 5, 4), dtype=np.uint8)
LABELS = (np.arange(12) % 10).astype(np.uint8)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def write_idx(folder: Path, joint: str = "-", packed: bool = False) -> Path:
    folder.mkdir(parents=True)
    for part, count in (("train", 12), ("t10k", 3)):
        for what, array in (("images", IMAGES[:count]), ("labels", LABELS[:count])):
            name = f"{part}-{what}{joint}idx{array.ndim}-ubyte"
            data = idx(array)
            (folder / f"{name}.gz").write_bytes(gzip.compress(data)) if packed else (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize(
    ("place", "joint", "packed"),
    [(".", "-", False), (".", ".", True), ("below", "-", True), ("FashionMNIST/raw", "-", False)],
)
def test_idx_files(tmp_path: Path, place: str, joint: str, packed: bool) -> None:
    write_idx(tmp_path / "src" / place, joint, packed)
    run("fashion_mnist", "--src", tmp_path / "src", "--out", tmp_path / "out")
    info = read_info(tmp_path / "out")
    assert (info.name, info.channels, info.height, info.width) == ("fashion_mnist", 1, 5, 4)
    assert info.classes == tuple(datasets.FashionMNIST.classes)
    for split, count in (("train", 12), ("test", 3)):
        batch = everything(tmp_path / "out", split)
        assert batch.images is not None
        assert np.array_equal(batch.images[:, 0], IMAGES[:count])
        assert np.array_equal(batch.labels, LABELS[:count])


def test_idx_files_that_are_not_right(tmp_path: Path) -> None:
    src = write_idx(tmp_path / "src" / "one")

    def refused(message: str) -> None:
        with pytest.raises(InputError, match=message):
            run("mnist", "--src", tmp_path / "src", "--out", tmp_path / "out")

    write_idx(tmp_path / "src" / "two")
    refused(r"Several folders below .*src hold IDX files: .*one, .*two\. Give one of them as --src")
    (tmp_path / "src" / "two").rename(tmp_path / "elsewhere")
    file = src / "train-images-idx3-ubyte"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    refused(r"train-images-idx3-ubyte holds 239 bytes of data, its header says 240 \(12 x 5 x 4\)")
    file.write_bytes(whole + b"x")
    refused(r"holds more than 240 bytes of data, its header says 240")
    file.write_bytes(whole[:9])
    refused(r"ends within its header")
    file.write_bytes(idx(LABELS).ljust(40, b"\0"))
    refused(r"starts with 0x00000801, not 0x00000803; it is no IDX file of bytes with 3 dimensions")
    file.write_bytes(struct.pack(">4I", 0x803, 2**31, 2**31, 2))
    refused(r"which is too large to be true")
    file.write_bytes(idx(IMAGES[:11]))
    refused(r"train-images-idx3-ubyte holds 11 images, but .*train-labels-idx1-ubyte 12 labels")
    file.write_bytes(whole)
    (src / "train-labels-idx1-ubyte").write_bytes(idx(LABELS + 5))
    refused(r"train-labels-idx1-ubyte holds no labels, or some above 9")
    file.unlink()
    (src / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(whole)[:-20])
    refused(r"train-images-idx3-ubyte\.gz cannot be read: ")
    (src / "train-images-idx3-ubyte.gz").unlink()
    refused(r"does not hold all IDX files, nor do the folders in it; missing: train-images-idx3-ubyte\[\.gz\]\.")


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
def test_failed_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("urllib.request.urlopen", fail)
    message = rf"^{name} could not be downloaded \(.*prepare {name} --src FOLDER --out DIR$"
    with pytest.raises(InputError, match=message):
        run(name, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_downloads_go_through_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class MNIST:
        classes = datasets.MNIST.classes

        def __init__(self, root: str, download: bool) -> None:
            assert download
            write_idx(Path(root) / "MNIST" / "raw")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(mnist.READERS, "mnist", MNIST)
    run("mnist", "--out", tmp_path / "out")
    assert (tmp_path / "cache" / "meta-weight-transformer" / "mnist" / "MNIST" / "raw").is_dir()
    assert read_info(tmp_path / "out").splits["train"].count == 12


def fake_cifar(folder: Path, monkeypatch: pytest.MonkeyPatch, train: int = 3) -> np.ndarray:
    """Files in CIFAR-10's format with `train` images and one, and torchvision's reader with their md5 sums."""
    base = folder / "cifar-10-batches-py"
    base.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (train + 1, 3, 32, 32), dtype=np.uint8)
    for name, part in (("data_batch_1", pixels[:train]), ("test_batch", pixels[train:])):
        entry = {"data": part.reshape(-1, 3072), "labels": [index % 10 for index in range(len(part))]}
        (base / name).write_bytes(pickle.dumps(entry))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))

    def md5(name: str) -> str:
        return calculate_md5(str(base / name))

    class Reader(datasets.CIFAR10):
        train_list = [["data_batch_1", md5("data_batch_1")]]  # noqa: RUF012
        test_list = [["test_batch", md5("test_batch")]]  # noqa: RUF012
        meta = {"filename": "batches.meta", "key": "label_names", "md5": md5("batches.meta")}  # noqa: RUF012

    monkeypatch.setattr(cifar10, "READER", Reader)
    return pixels


def test_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = fake_cifar(tmp_path / "src", monkeypatch)
    base = tmp_path / "src" / "cifar-10-batches-py"
    archive = tmp_path / "packed" / "cifar-10-python.tar.gz"
    archive.parent.mkdir()
    subprocess.run(["tar", "czf", archive, "-C", base.parent, base.name], check=True)
    monkeypatch.setattr(cifar10.READER, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    for out, src in (("a", base.parent), ("b", base), ("c", archive.parent)):
        run("cifar10", "--src", src, "--out", tmp_path / out)
        info = read_info(tmp_path / out)
        assert (info.channels, info.height, info.width, info.classes) == (3, 32, 32, tuple("abcdefghij"))
        batch = everything(tmp_path / out, "train")
        assert batch.images is not None
        assert np.array_equal(batch.images, pixels[:3])
        assert batch.labels.tolist() == [0, 1, 2]
    assert sorted(path.name for path in archive.parent.iterdir()) == [archive.name]
    archive.write_bytes(b"x")
    with pytest.raises(InputError, match=r"cifar-10-python\.tar\.gz is damaged \(its md5 sum"):
        run("cifar10", "--src", archive.parent, "--out", tmp_path / "x")
    with pytest.raises(InputError, match=r"--quality has no meaning for cifar10; leave it out"):
        run("cifar10", "--src", base, "--out", tmp_path / "x", "--quality", 90)
    (base / "test_batch").write_bytes(b"x")
    with pytest.raises(InputError, match=r"The files in .*cifar-10-batches-py are damaged or not all there"):
        run("cifar10", "--src", base, "--out", tmp_path / "x")
    with pytest.raises(InputError, match=r"does not hold cifar-10-python\.tar\.gz \(or the folder cifar-10-batches-py"):
        run("cifar10", "--src", tmp_path, "--out", tmp_path / "x")


def test_cifar10_trainval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The split of the released code: the same images in the same order."""
    pixels = fake_cifar(tmp_path / "src", monkeypatch, train=57)
    run("cifar10_trainval", "--src", tmp_path / "src", "--out", tmp_path / "out")
    info = read_info(tmp_path / "out")
    assert info.name == "cifar10_trainval"
    assert {name: split.count for name, split in info.splits.items()} == {"train": 45, "val": 12, "test": 1}
    torch.manual_seed(8)
    order = torch.randperm(57).numpy()
    for split, indices in (("train", order[:45]), ("val", order[45:])):
        batch = everything(tmp_path / "out", split)
        assert batch.images is not None
        assert np.array_equal(batch.images, pixels[indices])
        assert np.array_equal(batch.labels, indices % 10)
    assert np.array_equal(everything(tmp_path / "out", "test").images, pixels[57:])
    for option in (("--val-fraction", 0.2), ("--seed", 1)):
        with pytest.raises(InputError, match=f"{option[0]} has no meaning for cifar10_trainval; leave it out"):
            run("cifar10_trainval", "--src", tmp_path / "src", "--out", tmp_path / "x", *option)


def test_the_papers_split_of_cifar10() -> None:
    """The order that the released code draws does not change with the version of torch."""
    order = torch.randperm(50_000, generator=torch.Generator().manual_seed(8))
    assert order[:5].tolist() == [723, 37103, 16883, 46836, 10797]
    assert order[40_000:40_005].tolist() == [33317, 45860, 36072, 11508, 25872]


def test_exit_status(tmp_path: Path) -> None:
    """As a program: bad input is one sentence on stderr and status 2; torchvision is imported for its readers alone."""
    command = ["-m", "data_pipes.prepare", "folder", "--src", "nowhere", "--out", str(tmp_path / "x")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert said == ["error: No folder at nowhere (--src)."]
    assert done.stdout == ""
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "torch" in imported
    assert "torchvision" not in imported


@pytest.mark.slow
@pytest.mark.skipif(not FASHION.is_dir(), reason="needs the Debian package dataset-fashion-mnist")
def test_fashion_mnist(tmp_path: Path) -> None:
    run("fashion_mnist", "--src", FASHION, "--out", tmp_path / "out")
    for split, part, count in (("train", "train", 60_000), ("test", "t10k", 10_000)):
        batch = everything(tmp_path / "out", split)
        assert batch.images is not None
        pixels = gzip.decompress((FASHION / f"{part}-images-idx3-ubyte.gz").read_bytes())[16:]
        assert batch.images.numpy().tobytes() == pixels
        assert batch.labels.bincount().tolist() == [count // 10] * 10
