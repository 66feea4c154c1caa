"""CIFAR-10, through torchvision's reader, which checks the files' md5 sums before it unpickles them."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torchvision import datasets
from torchvision.datasets.utils import check_integrity, extract_archive

from data_pipes.prepare.download import cache_folder, download_failed
from data_pipes.prepare.source import Request, Source, from_arrays
from mwt.errors import InputError

LICENCE = "none stated (A. Krizhevsky: Learning Multiple Layers of Features from Tiny Images, 2009)"
READER = datasets.CIFAR10


def load(request: Request) -> Source:
    """32 x 32 RGB images of ten classes, 50,000 for training and 10,000 for testing.

    Raises:
        InputError: the files are not there and cannot be downloaded, or are damaged.
    """
    files = f"{READER.filename} (or the folder {READER.base_folder} from it)"
    if request.src is None:
        folder = cache_folder("cifar10")
        try:
            READER(str(folder), download=True)
        except (RuntimeError, URLError, OSError) as error:
            raise download_failed("cifar10", files, error) from error
        return _read(folder, request)
    folder = request.src.parent if request.src.name == READER.base_folder else request.src
    archive = folder / READER.filename
    if not (folder / READER.base_folder).is_dir() and archive.is_file():
        if not check_integrity(str(archive), READER.tgz_md5):
            raise InputError(f"{archive} is damaged (its md5 sum is not that of CIFAR-10); get it again.")
        with tempfile.TemporaryDirectory() as temporary:  # the source may not be writable
            extract_archive(str(archive), temporary)
            return _read(Path(temporary), request)
    if not (folder / READER.base_folder).is_dir():
        raise InputError(f"{request.src} (--src) does not hold {files}.")
    return _read(folder, request)


def _read(folder: Path, request: Request) -> Source:
    parts: dict[str, Any] = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the old pickles use a form of dtype that new numpy warns of
            for split in ("train", "test"):
                parts[split] = READER(str(folder), train=split == "train")
    except RuntimeError as error:
        raise InputError(f"The files in {folder / READER.base_folder} are damaged or not all there: {error}") from error
    return from_arrays(
        "cifar10",
        {split: torch.from_numpy(part.data).permute(0, 3, 1, 2) for split, part in parts.items()},
        {split: torch.tensor(part.targets) for split, part in parts.items()},
        classes=tuple(parts["train"].classes),
        licence=LICENCE,
        request=request,
    )
