"""What is to be written of a weight set in another format, and in which order: splits, numbers, pieces."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from data_pipes.foreign import FORMATS, Convention, check_format
from data_pipes.weight_manifest import Values, read_manifest
from data_pipes.weights import WeightSet, load_weight_set
from data_pipes.write import partial_folder
from mwt.errors import InputError
from mwt.weight_space import Layout

SPLITS = ("train", "val", "test")
DATA = "data"
"""Folder within the unfinished one that becomes the set."""
_PIECE_BYTES, _PIECE = 64 * 2**20, 1000


@dataclass(frozen=True, kw_only=True)
class Part:
    """One split as it is to be written: these places of a split of the native set, in this order; maybe none."""

    source: str
    """Name of the split in the native set."""
    places: tuple[int, ...]
    first: int
    """Number of its first network: they are counted over train, val and test."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Networks of one split that are written together."""

    split: str
    number: int
    start: int
    """Number of its first network in the whole set."""
    places: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One folder to be written."""

    format: str
    out: Path
    native: Path
    values: Values
    convention: Convention
    copy: int
    """0: networks fitted to signals as they are; k: to their k-th augmented copies."""
    layout: Layout
    classes: tuple[str, ...]
    name: str
    parts: dict[str, Part]
    averaged: tuple[int, ...] | None
    """Places of the native training split that means and deviations are of; None: all of it, as it records them."""

    @property
    def count(self) -> int:
        """Networks."""
        return sum(len(part.places) for part in self.parts.values())

    @property
    def split_points(self) -> list[int]:
        """Numbers of the first networks of val and test."""
        return [self.parts[name].first for name in SPLITS[1:]]

    @property
    def data(self) -> Path:
        """Where the files lie until all are there."""
        return partial_folder(self.out) / DATA

    @property
    def pieces(self) -> list[Piece]:
        """All of them, in order."""
        size = max(1, min(_PIECE, _PIECE_BYTES // (4 * self.layout.count)))
        cut: list[Piece] = []
        for name, part in self.parts.items():
            for start in range(0, len(part.places), size):
                places = part.places[start : start + size]
                cut.append(Piece(split=name, number=len(cut), start=part.first + start, places=places))
        return cut


def plan(
    native: str | Path, name: str, out: str | Path, *, values: Values = "phi", convention: Convention | None = None,
    val: int = 0,
) -> list[Plan]:  # fmt: skip
    """What is to be written: the set itself, then a folder `OUT-copyK` for each augmented copy of its training split.

    Args:
        val: so many of the last networks of the training split become the val split.

    Raises:
        InputError: the set cannot be read, or the format cannot hold it.
    """
    manifest = read_manifest(native)
    out = Path(os.path.abspath(Path(out).expanduser()))
    check_format(name, out, len(manifest.classes))
    points = manifest.signal.kind != "image"
    if points and convention == "dws":
        raise InputError(
            "--convention dws is about pictures: it swaps rows and columns, and these networks are of points."
        )
    chosen: Convention = convention or ("nfn" if points else FORMATS[name].convention)
    sources = {"train": manifest.train_split, "val": "val", "test": "test"}
    if strange := [split for split in manifest.splits if split not in sources.values()]:
        raise InputError(
            f"{manifest.folder} has the split {strange[0]!r}, and other formats know {manifest.train_split!r} (as "
            "train), val and test alone; export the others by themselves."
        )
    sets = {
        split: load_weight_set(manifest.folder, source, values)
        for split, source in sources.items()
        if source in manifest.splits
    }
    held_out, averaged = _hold_out(sets, val)
    plans = []
    for copy in range(1 + (manifest.copies if "train" in sets else 0)):
        place = out if not copy else out.with_name(f"{out.name}-copy{copy}")
        parts: dict[str, Part] = {}
        first = 0
        for split in SPLITS:
            origin = "train" if split == "val" and val else split
            places = _places(sets[origin], copy, held_out, split == "val") if origin in sets else ()
            parts[split] = Part(source=sources[origin], places=places, first=first)
            first += len(places)
        if first:
            plans.append(
                Plan(
                    format=name, out=place, native=manifest.folder, values=values, convention=chosen, copy=copy,
                    layout=manifest.layout, classes=manifest.classes, name=manifest.name, parts=parts,
                    averaged=averaged,
                )
            )  # fmt: skip
    return plans


def check_val(val: int, counts: Mapping[str, int], train_split: str) -> None:
    """Whether `val` of so many signals of the training split can become the val split; 0: none are to.

    Raises:
        InputError: there is a val split, or there are not so many.
    """
    if not val:
        return
    if "val" in counts:
        raise InputError(f"--val {val} makes a val split of the training split, but the set has one already.")
    if not 0 < val < (count := counts.get(train_split, 0)):
        raise InputError(f"--val is {val}; it must be positive and less than the {count} training signals.")


def _hold_out(sets: dict[str, WeightSet], val: int) -> tuple[set[int], tuple[int, ...] | None]:
    """Positions of the training signals that become val, and places of the networks of all others (None: of all)."""
    if not val:
        return set(), None
    index = sets["train"].column("index").tolist() if "train" in sets else []
    check_val(val, {name: len(set(index)) if name == "train" else 0 for name in sets}, "train")
    held_out = set(sorted(set(index))[-val:])
    return held_out, tuple(place for place, position in enumerate(index) if position not in held_out)


def _places(source: WeightSet, copy: int, held_out: set[int], wanted: bool) -> tuple[int, ...]:
    """Places of the networks of one copy, in the order of their signals; `wanted` are those held out, or the others."""
    index, copies = source.column("index").tolist(), source.column("copy").tolist()
    is_train = bool(held_out) and source.split == source.manifest.train_split
    found = [
        (position, place)
        for place, (position, number) in enumerate(zip(index, copies, strict=True))
        if number == copy and (not is_train or (position in held_out) == wanted)
    ]
    return tuple(place for _, place in sorted(found))
