"""What every preparation gives: splits of encoded samples, with the facts about them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from data_pipes.decode import encode_png, resize
from data_pipes.processes import ordered_processes
from data_pipes.write import Sample
from mwt.errors import InputError
from mwt.rng import permutation
from mwt.structs import SignalFacts

DEFAULT_TEST_FRACTION = 0.2


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asks for. `size` is (height, width); fractions are of the samples they are taken from."""

    src: Path | None = None
    size: tuple[int, int] | None = None
    fit: str = "squash"
    quality: int | None = None
    channels: int | None = None
    val_fraction: float | None = None
    test_fraction: float | None = None
    seed: int = 0

    def only(self, name: str, *allowed: str) -> None:
        """Raises InputError if anything is asked for that data set `name` does not know; `allowed` are field names."""
        for option in ("size", "fit", "quality", "channels", "val_fraction", "test_fraction", "seed"):
            if option not in allowed and getattr(self, option) != getattr(Request(), option):
                raise InputError(f"--{option.replace('_', '-')} has no meaning for {name}; leave it out.")


@dataclass(frozen=True)
class Part:
    """The samples of one split: `make` turns each of `items` into a sample, in any process."""

    items: Sequence[Any]
    make: Callable[[Any], Sample]

    def __len__(self) -> int:
        return len(self.items)

    def samples(self, start: int = 0, workers: int = 0) -> Iterator[Sample]:
        """The samples from place `start` on, in order, made in `workers` processes (0: in this one)."""
        return ordered_processes(self.make, self.items[start:], workers=workers)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data set ready to be written.

    `content` is a checksum of the list of samples: work that was begun goes on only with the same one. `notes` are
    remarks for the person, one line each.
    """

    name: str
    facts: SignalFacts
    licence: str
    splits: dict[str, Part]
    content: str
    notes: list[str] = field(default_factory=list)


def checksum(entries: Iterable[Any]) -> str:
    """A checksum of a list of things, by what `repr` says of them (bytes: as they are)."""
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(entry if isinstance(entry, bytes) else repr(entry).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def other_counts(name: str, splits: Mapping[str, Sized], official: Mapping[str, int]) -> list[str]:
    """A note if splits are not as large as those of the published data set: files are missing, or there are more."""
    found = {split: len(part) for split, part in splits.items()}
    if found == official:
        return []
    lists = [" and ".join(f"{count:,} {split}" for split, count in part.items()) for part in (found, official)]
    return [f"Note: these are {lists[0]} samples; {name} has {lists[1]}."]


def stored_order(items: Sequence[Any], split: str) -> list[Any]:
    """The items in a fixed random order, the same every time.

    Sorted by class, a part of a split (`data.limit`, one shard) would hold a few classes only.
    """
    order = permutation(len(items), seed=0, purpose=f"stored order of {split}")
    return [items[index] for index in order.tolist()]


def split_off(labels: Int[Tensor, " N"], fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of those kept and those taken, both ascending: `fraction` of all, rounded up, the same share per class.

    Shares that are no whole numbers are rounded so that the total holds (largest remainders first). Every class
    keeps at least one.
    """
    order = permutation(len(labels), seed=seed, purpose="split")
    members = [order[labels[order] == label] for label in range(int(labels.max()) + 1)]
    shares = torch.tensor([fraction * len(member) for member in members], dtype=torch.float64)
    counts = shares.floor().long()
    by_remainder = (shares - counts).argsort(descending=True, stable=True)
    counts[by_remainder[: math.ceil(fraction * len(labels) - 1e-9) - int(counts.sum())]] += 1
    taken = torch.cat([m[: min(int(n), max(len(m) - 1, 0))] for m, n in zip(members, counts, strict=True)])
    kept = torch.ones(len(labels), dtype=torch.bool)
    kept[taken] = False
    return kept.nonzero().flatten(), taken.sort().values


def check_fraction(name: str, fraction: float | None) -> None:
    """Raises InputError unless `fraction` is None or lies in (0, 1)."""
    if fraction is not None and not 0 < fraction < 1:
        raise InputError(f"--{name} is {fraction}; it must lie between 0 and 1.")


@dataclass(frozen=True)
class FromArrays:
    """Makes the sample of a (split, index) out of images that are in memory."""

    images: dict[str, np.ndarray]  # not tensors: torch would send them to other processes through /dev/shm
    labels: dict[str, np.ndarray]
    size: tuple[int, int]

    def __call__(self, place: tuple[str, int]) -> Sample:
        """One image, resized and encoded as PNG."""
        split, index = place
        image = resize(torch.from_numpy(self.images[split][index]), *self.size)
        return Sample(extension="png", data=encode_png(image), label=int(self.labels[split][index]))


def from_arrays(
    name: str,
    images: dict[str, UInt8[Tensor, "_ C _h _w"]],
    labels: dict[str, Int[Tensor, " _"]],
    *,
    classes: tuple[str, ...],
    licence: str,
    request: Request,
) -> Source:
    """A source of images that are in memory, stored as PNG; `request` may resize them and split `val` off `train`."""
    request.only(name, "size", "val_fraction", "seed")
    places = {split: [(split, index) for index in range(len(label))] for split, label in labels.items()}
    if request.val_fraction is not None:
        kept, taken = split_off(labels["train"], request.val_fraction, request.seed)
        train = places.pop("train")
        places = {"train": [train[i] for i in kept.tolist()], "val": [train[i] for i in taken.tolist()], **places}
    return arrays_source(name, images, labels, places, classes=classes, licence=licence, size=request.size)


def arrays_source(
    name: str,
    images: dict[str, UInt8[Tensor, "_ C _h _w"]],
    labels: dict[str, Int[Tensor, " _"]],
    places: dict[str, list[tuple[str, int]]],
    *,
    classes: tuple[str, ...],
    licence: str,
    size: tuple[int, int] | None,
) -> Source:
    """A source whose splits hold the images at `places`: (key of `images`, index)."""
    channels, height, width = images["train"].shape[1:]
    height, width = size or (height, width)
    pixels, numbers = ({key: value.numpy() for key, value in part.items()} for part in (images, labels))
    make = FromArrays(pixels, numbers, (height, width))
    facts = SignalFacts(kind="image", channels=channels, height=height, width=width, classes=classes)
    arrays = [array.tobytes() for array in (*pixels.values(), *numbers.values())]
    splits = {split: Part(part, make) for split, part in places.items()}
    content = checksum([*arrays, *places.values()])
    return Source(name=name, facts=facts, licence=licence, splits=splits, content=content)
