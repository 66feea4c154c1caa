"""A weight set -> the same networks in the format of another code base: a folder, complete or not there at all.

    plans = plan(native, "nfn", out)                     one for the networks, one for each augmented copy
    for p in plans:
        with ForeignWriter(p) as writer:
            for count in writer.write(workers=4): progress by so many networks
            writer.finish()

Networks are written in pieces. A piece that is finished is noted, and survives whatever ends the program.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

import mwt
from data_pipes import foreign_files
from data_pipes.foreign import OMEGA, to_foreign
from data_pipes.foreign_plan import Piece, Plan
from data_pipes.processes import ordered_processes
from data_pipes.weight_manifest import MANIFEST_FILE, read_manifest
from data_pipes.weight_moments import Moments
from data_pipes.weights import load_weight_set
from data_pipes.write import partial_folder, try_lock
from mwt.errors import InputError
from mwt.runtime import sync, write_json
from mwt.weight_space import Weights

ABOUT_FILE = "converted.json"
"""What a converted set says about itself; no loader looks at it."""
_BEGUN, _LOCK, _NOTES = "begun.json", "lock", "notes"


class ForeignWriter:
    """Writes one plan. A context manager."""

    def __init__(self, planned: Plan) -> None:
        """A writer that has touched nothing yet."""
        self.plan = planned
        self.complete = False
        """Whether the very set is there already."""
        self._partial = partial_folder(planned.out)
        self._lock: int | None = None
        self._done: set[int] = set()
        content = hashlib.sha256((planned.native / MANIFEST_FILE).read_bytes()).hexdigest()
        numbers = {name: [part.first, len(part.places)] for name, part in planned.parts.items()}
        self._begun_with = {
            "format": planned.format, "values": planned.values, "convention": planned.convention, "copy": planned.copy,
            "splits": numbers, "native_sha256": content,
        }  # fmt: skip
        self.need = foreign_files.need(planned)
        """Room and files that the whole set takes."""

    def __enter__(self) -> ForeignWriter:
        out = self.plan.out
        if out.exists() or out.is_symlink():
            try:
                about = json.loads((out / ABOUT_FILE).read_text(encoding="utf-8"))
                self.complete = about["begun_with"] == self._begun_with
            except (OSError, ValueError, KeyError, TypeError):
                self.complete = False
            if not self.complete:
                raise InputError(f"{out} exists already and is something else; choose another --out, or remove it.")
            return self
        try:
            (self._partial / _NOTES).mkdir(parents=True, exist_ok=True)
            handle = os.open(self._partial / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            if not try_lock(handle):
                os.close(handle)  # not ours, and so is the folder: it stays
                raise InputError(
                    f"Another process is writing to {self._partial}; wait for it, or choose another --out."
                )
            self._lock = handle
            self._take_up()
        except BaseException as error:
            self._leave()
            if isinstance(error, OSError):
                raise InputError(f"{out} cannot be written: {error}.") from error
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()

    def _leave(self) -> None:
        if self._lock is not None:
            if self._partial.is_dir() and not any((self._partial / _NOTES).glob("*.json")):
                shutil.rmtree(self._partial, ignore_errors=True)
            os.close(self._lock)
            self._lock = None

    def _take_up(self) -> None:
        begun = self._partial / _BEGUN
        try:
            before = json.loads(begun.read_text()) if begun.is_file() else None
        except ValueError as error:
            raise InputError(f"{begun} cannot be read; remove {self._partial} to begin anew.") from error
        if before not in (None, self._begun_with):
            if any((self._partial / _NOTES).glob("*.json")):
                raise InputError(
                    f"{self._partial} holds an unfinished set that was begun otherwise. Give the same arguments again "
                    "to go on with it, remove it to begin anew, or choose another --out."
                )
            shutil.rmtree(self.plan.data, ignore_errors=True)
        if before != self._begun_with:
            write_json(begun, self._begun_with)
        self.plan.data.mkdir(exist_ok=True)
        pieces = self.plan.pieces
        self._done = {piece.number for piece in pieces if self._noted(piece)}
        done = sum(len(piece.places) for piece in pieces if piece.number in self._done)
        left = self.need.scaled(1 - done / self.plan.count)
        left.check(self._partial, self.plan.out)
        foreign_files.begin(self.plan)

    def missing(self) -> list[Piece]:
        """What is not there yet."""
        return [] if self.complete else [piece for piece in self.plan.pieces if piece.number not in self._done]

    def _note(self, piece: Piece) -> Path:
        return self._partial / _NOTES / f"{piece.number:06d}.json"

    def _noted(self, piece: Piece) -> bool:
        try:
            files: dict[str, int] = json.loads(self._note(piece).read_text())
            # After a power cut a file may be there and empty.
            return all((self.plan.data / name).stat().st_size == size for name, size in files.items())
        except (OSError, ValueError):
            return False

    def write(self, *, workers: int = 0) -> Iterator[int]:
        """Writes what is missing, in `workers` processes (0: in this one); yields how many networks each piece had."""
        pieces = self.missing()
        try:
            done = ordered_processes(partial(write_piece, self.plan), pieces, workers=workers, piece=1)
            for piece, files in zip(pieces, done, strict=True):
                write_json(self._note(piece), files)
                self._done.add(piece.number)
                yield len(piece.places)
        except OSError as error:
            raise InputError(
                f"{self.plan.out} cannot be written: {error}. What is finished stays in {self._partial}: run the same "
                "command again."
            ) from error

    def finish(self) -> None:
        """Lists of the splits and statistics; then the folder takes its name.

        Raises:
            InputError: networks are missing, `out` was made meanwhile, the disk is full.
        """
        if self.complete:
            return
        if self.missing():
            raise InputError(f"Networks of {self.plan.out} are missing; run the same command again.")
        try:
            mean, std = statistics(self.plan)
            foreign_files.finish(self.plan, mean, std)
            write_json(self.plan.data / ABOUT_FILE, {**about(self.plan), "begun_with": self._begun_with})
            sync(self.plan.data)
            if self.plan.out.exists():
                raise InputError(f"{self.plan.out} was made meanwhile; the set is whole in {self.plan.data}.")
            self.plan.data.rename(self.plan.out)
            sync(self.plan.out.parent)
        except OSError as error:
            raise InputError(f"{self.plan.out} cannot be written: {error}; run the same command again.") from error
        shutil.rmtree(self._partial, ignore_errors=True)


def write_piece(planned: Plan, piece: Piece) -> dict[str, int]:
    """Writes some networks; names and sizes of the files that hold them alone."""
    source = planned.parts[piece.split].source
    batch = load_weight_set(planned.native, source, planned.values).batch(piece.places)
    weights = to_foreign(batch.weights, planned.layout, planned.convention)
    return foreign_files.write(planned, piece, weights, batch)


def statistics(planned: Plan) -> tuple[Weights, Weights]:
    """Mean and deviation of the converted training networks [1, …]."""
    manifest = read_manifest(planned.native)
    source = load_weight_set(planned.native, str(manifest.statistics["split"]), planned.values)
    mean, std = source.statistics()
    if planned.averaged is not None:
        total: Moments | None = None
        for places in torch.tensor(planned.averaged).split(256):
            part = Moments.of(source.batch(places).weights.flat())
            total = part if total is None else total + part
        assert total is not None, "val leaves a network at least"
        mean, std = (Weights.unflatten(x[None].float(), planned.layout) for x in (total.mean, total.std))
    mean, std = (to_foreign(x, planned.layout, planned.convention) for x in (mean, std))
    return mean, std


def about(planned: Plan) -> dict[str, Any]:
    """What the set says about itself."""
    manifest = read_manifest(planned.native)
    dws = planned.convention == "dws"
    return {
        "format": planned.format, "name": planned.name, "classes": list(planned.classes),
        "architecture": {"sizes": list(planned.layout.sizes), "omega": OMEGA},
        "values": planned.values, "convention": planned.convention,
        "coordinates": ["x", "y"] if dws else (["y", "x"] if planned.layout.coordinate_dims == 2 else ["x", "y", "z"]),
        "drawn": "output + 0.5 in [0, 1]" if dws else "output in [-1, 1]",
        "copy": planned.copy, "split_points": planned.split_points,
        "splits": {name: len(part.places) for name, part in planned.parts.items()},
        "fit": manifest.fit, "source": manifest.source, "augment": manifest.augment if planned.copy else None,
        "omegas_as_fitted": list(planned.layout.omegas), "version": mwt.__version__,
    }  # fmt: skip
