"""MNIST and Fashion-MNIST, from their IDX files."""

from __future__ import annotations

from urllib.error import URLError

from torchvision import datasets

from data_pipes.prepare.download import cache_folder, download_failed
from data_pipes.prepare.idx import find_idx, read_idx
from data_pipes.prepare.source import Request, Source, from_arrays
from mwt.errors import InputError

LICENCES = {
    "mnist": "CC BY-SA 3.0 as commonly stated (Y. LeCun, C. Cortes, C. J. C. Burges)",
    "fashion_mnist": "MIT (Zalando SE, https://github.com/zalandoresearch/fashion-mnist)",
}
READERS = {"mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST}
_SPLITS = {"train": "train", "test": "t10k"}


def load(name: str, request: Request) -> Source:
    """28 x 28 grey images of ten classes, 60,000 for training and 10,000 for testing.

    Raises:
        InputError: the files are not there and cannot be downloaded, or are damaged.
    """
    reader = READERS[name]
    src = request.src
    if src is None:
        src = cache_folder(name)
        try:
            reader(str(src), download=True)
        except (RuntimeError, URLError, OSError) as error:
            files = "its four IDX files (train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-…)"
            raise download_failed(name, files, error) from error
    paths = find_idx(src, reader.__name__)
    images, labels = {}, {}
    for split, part in _SPLITS.items():
        images[split] = read_idx(paths[part, "images"], 3)[:, None]
        labels[split] = read_idx(paths[part, "labels"], 1).long()
        if len(images[split]) != len(labels[split]):
            raise InputError(
                f"{paths[part, 'images']} holds {len(images[split])} images, "
                f"but {paths[part, 'labels']} {len(labels[split])} labels."
            )
        if len(labels[split]) == 0 or int(labels[split].max()) >= len(reader.classes):
            raise InputError(f"{paths[part, 'labels']} holds no labels, or some above {len(reader.classes) - 1}.")
    return from_arrays(name, images, labels, classes=tuple(reader.classes), licence=LICENCES[name], request=request)
