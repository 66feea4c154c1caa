"""The built-in digits as a folder of their own, resized or with a `val` split if asked for."""

from __future__ import annotations

import torch

from data_pipes.prepare.source import Request, Source, from_arrays
from data_pipes.read import open_split
from data_pipes.schema import read_info
from mwt.errors import InputError


def load(request: Request) -> Source:
    """scikit-learn's 8 x 8 digits, from the copy that comes with the package."""
    if request.src is not None:
        raise InputError("digits come with the package; leave --src out.")
    info = read_info("builtin:digits")
    images, labels = {}, {}
    for split in info.splits:
        stored = open_split("builtin:digits", split, device=torch.device("cpu"))
        batch = next(stored.batches(batch_size=len(stored)))
        assert batch.images is not None
        images[split], labels[split] = batch.images, batch.labels
    return from_arrays("digits", images, labels, classes=info.classes, licence=info.licence, request=request)
