"""CIFAR-10, through torchvision's reader, which checks the files' md5 sums before it unpickles them."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.utils import check_integrity, extract_archive

from data_pipes.prepare.download import cache_folder, download_failed
from data_pipes.prepare.source import Request, Source, arrays_source, from_arrays
from mwt.errors import InputError

LICENCE = "none stated (A. Krizhevsky: Learning Multiple Layers of Features from Tiny Images, 2009)"
READER = datasets.CIFAR10


_PAPERS_SEED, _PAPERS_SHARE = 8, 0.8


def load(request: Request) -> Source:
    """32 x 32 RGB images of ten classes, 50,000 for training and 10,000 for testing.

    Raises:
        InputError: the files are not there and cannot be downloaded, or are damaged.
    """
    return _with_parts("cifar10", request, lambda images, labels, classes: from_arrays(
        "cifar10", images, labels, classes=classes, licence=LICENCE, request=request
    ))  # fmt: skip


def load_trainval(request: Request) -> Source:
    """The paper's split for choosing hyper-parameters (Tables 4 to 8): of the training images 40,000 train, 10,000 val.

    The released code draws it with `torch.manual_seed(8); torch.randperm(50000)`: the first 80 % are train, the rest
    val, whatever their classes. `test` is CIFAR-10's own.

    Raises:
        InputError: as `load`, or options that would make another split.
    """
    request.only("cifar10_trainval", "size")

    def split(images: dict[str, Tensor], labels: dict[str, Tensor], classes: tuple[str, ...]) -> Source:
        count = len(labels["train"])
        order = torch.randperm(count, generator=torch.Generator().manual_seed(_PAPERS_SEED)).tolist()
        kept = int(_PAPERS_SHARE * count)
        places = {
            "train": [("train", index) for index in order[:kept]],
            "val": [("train", index) for index in order[kept:]],
            "test": [("test", index) for index in range(len(labels["test"]))],
        }
        return arrays_source(
            "cifar10_trainval", images, labels, places, classes=classes, licence=LICENCE, size=request.size
        )

    return _with_parts("cifar10_trainval", request, split)


_Maker = Callable[[dict[str, Tensor], dict[str, Tensor], tuple[str, ...]], Source]


def _with_parts(name: str, request: Request, make: _Maker) -> Source:
    files = f"{READER.filename} (or the folder {READER.base_folder} from it)"
    if request.src is None:
        folder = cache_folder("cifar10")
        try:
            READER(str(folder), download=True)
        except (RuntimeError, URLError, OSError) as error:
            raise download_failed(name, files, error) from error
        return make(*_read(folder))
    folder = request.src.parent if request.src.name == READER.base_folder else request.src
    archive = folder / READER.filename
    if not (folder / READER.base_folder).is_dir() and archive.is_file():
        if not check_integrity(str(archive), READER.tgz_md5):
            raise InputError(f"{archive} is damaged (its md5 sum is not that of CIFAR-10); get it again.")
        with tempfile.TemporaryDirectory() as temporary:  # the source may not be writable
            extract_archive(str(archive), temporary)
            return make(*_read(Path(temporary)))
    if not (folder / READER.base_folder).is_dir():
        raise InputError(f"{request.src} (--src) does not hold {files}.")
    return make(*_read(folder))


def _read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], tuple[str, ...]]:
    parts: dict[str, Any] = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the old pickles use a form of dtype that new numpy warns of
            for split in ("train", "test"):
                parts[split] = READER(str(folder), train=split == "train")
    except RuntimeError as error:
        raise InputError(f"The files in {folder / READER.base_folder} are damaged or not all there: {error}") from error
    images = {split: torch.from_numpy(part.data).permute(0, 3, 1, 2) for split, part in parts.items()}
    labels = {split: torch.tensor(part.targets) for split, part in parts.items()}
    return images, labels, tuple(parts["train"].classes)
