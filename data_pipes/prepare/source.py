"""What every preparation gives: splits of encoded samples, with the facts about them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from data_pipes.decode import encode_png, resize
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
    channels: int | None = None
    val_fraction: float | None = None
    test_fraction: float | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data set ready to be written: `splits` maps names to (count, maker of the samples, in their final order).

    `notes` are remarks for the person, one line each.
    """

    name: str
    facts: SignalFacts
    licence: str
    splits: dict[str, tuple[int, Callable[[], Iterator[Sample]]]]
    notes: list[str] = field(default_factory=list)


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
    if request.channels is not None or request.test_fraction is not None:
        raise InputError("--channels and --test-fraction are for `folder` only.")
    indices = {split: torch.arange(len(label)) for split, label in labels.items()}
    origin = {split: split for split in labels}
    if request.val_fraction is not None:
        kept, taken = split_off(labels["train"], request.val_fraction, request.seed)
        indices = {"train": kept, "val": taken, **{key: value for key, value in indices.items() if key != "train"}}
        origin["val"] = "train"
    channels, height, width = images["train"].shape[1:]
    if request.size is not None:
        height, width = request.size

    def samples(split: str) -> Iterator[Sample]:
        for index in indices[split].tolist():
            image = resize(images[origin[split]][index], height, width)
            yield Sample(extension="png", data=encode_png(image), label=int(labels[origin[split]][index]))

    facts = SignalFacts(kind="image", channels=channels, height=height, width=width, classes=classes)
    splits: dict[str, tuple[int, Callable[[], Iterator[Sample]]]] = {
        split: (len(index), partial(samples, split)) for split, index in indices.items()
    }
    return Source(name=name, facts=facts, licence=licence, splits=splits)
