"""Fitted networks -> a folder of shards with `manifest.json` (docs/weight_sets.md), complete or not there at all.

    with WeightSetWriter(out, description, {"train": 60000, "test": 10000}, base=base, main=rank == 0) as writer:
        wait for the other processes                          # the folder is there now
        tasks = writer.missing(rank=rank, world=world)
        wait for the other processes                          # all have asked before anybody writes
        for task in tasks:
            with writer.shard(task) as shard:
                shard.add(weights, labels=…, index=…, psnr=…, losses=…)
        wait for the other processes
        if rank == 0: writer.finish()

What a shard holds does not depend on who writes it: positions of its split from `task.start` to `task.stop`, all copies
of them. Whatever is killed at any time, the same lines go on with the shards that are missing.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

import mwt
from data_pipes.schema import ShardInfo, SplitInfo
from data_pipes.weight_manifest import (
    BASE_FILE,
    DTYPES,
    MANIFEST_FILE,
    STATISTICS_FILE,
    Description,
    Manifest,
    layer_tensors,
    networks,
    read_manifest,
    whole_statistics,
)
from data_pipes.weight_moments import Moments, layer_scalars
from data_pipes.weight_shard import OpenShard, ShardTask, diverged, save_whole
from data_pipes.write import partial_folder, try_lock
from mwt.errors import InputError
from mwt.memory import readable
from mwt.runtime import environment, sync, write_json
from mwt.weight_space import Weights

SHARD_BYTES = 128 * 2**20
"""About the size of a shard."""
_BEGUN, _LOCK, _DATA, _NOTES = "begun.json", "lock", "data", "notes"


class WeightSetWriter:
    """Writes a set to the new folder `out`; see the module's text. A context manager."""

    def __init__(
        self, out: str | Path, description: Description, counts: Mapping[str, int], *, base: Weights | None,
        batch: int = 1, shard_bytes: int = SHARD_BYTES, main: bool = True,
    ) -> None:  # fmt: skip
        """A writer that has touched nothing yet.

        Args:
            counts: signals of each split.
            base: one network [1, …], the output layer included, in fp32; None if `description.has_base` is False.
            batch: signals that are fitted together; shards hold whole batches where they hold one at least.
            main: whether this process makes and finishes the folder; of several, one does.
        """
        self.out = Path(os.path.abspath(Path(out).expanduser()))
        self.description, self.main = description, main
        self.base = None if base is None else base.map(lambda x: x.detach().float().cpu())
        self.train_split = description.train_split if description.train_split in counts else next(iter(counts))
        self.tasks: list[ShardTask] = []
        for split, count in counts.items():
            copies = description.copies if split == description.train_split else 0
            size = max(1, shard_bytes // (description.network_bytes * (1 + copies)))
            size = size // batch * batch or size
            for number, start in enumerate(range(0, count, size)):
                stop = min(start + size, count)
                self.tasks.append(
                    ShardTask(split=split, number=number, start=start, stop=stop, copies=copies, batch=min(batch, size))
                )
        if not counts or min(counts.values()) < 1:
            raise ValueError(f"every split needs a signal at least, not {dict(counts)}")
        tasks = [asdict(task) for task in self.tasks]
        # The configuration also says things on which nothing here depends: threads, where the data lies.
        what = {key: value for key, value in description.as_json().items() if key != "config"}
        self._begun_with = {**what, "base_sha256": _digest(self.base), "tasks": tasks}
        self._partial = partial_folder(self.out)
        self._lock: int | None = None
        self.complete = False
        """Whether the very set is there already, as a whole; then nothing is missing and nothing to be finished."""

    @property
    def bytes_needed(self) -> int:
        """Room on the disk that the shards take which are not there yet."""
        return sum(task.count * self.description.network_bytes for task in self.tasks if self._note(task) is None)

    @property
    def room(self) -> str:
        """What is needed on the disk, and what there is."""
        return f"{readable(self.bytes_needed)} needed, {readable(shutil.disk_usage(self.out.parent).free)} free"

    def __enter__(self) -> WeightSetWriter:
        if self.out.exists() or self.out.is_symlink():
            self._check_complete()
            return self
        if not self.main:
            return self
        try:
            self._partial.mkdir(parents=True, exist_ok=True)
            handle = os.open(self._partial / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            if not try_lock(handle):
                os.close(handle)  # not ours, and so is the folder: it stays
                raise InputError(
                    f"Another process is writing to {self._partial}; wait for it, or choose another --out."
                )
            self._lock = handle
            self._take_up()
            self._check_room()
        except BaseException as error:
            self._leave()
            if isinstance(error, OSError):
                raise _unwritable(self.out, error) from error
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()

    def _leave(self) -> None:
        if self._lock is not None:
            if not any((self._partial / _NOTES).glob("*.json")):  # nothing that would be worth keeping
                shutil.rmtree(self._partial, ignore_errors=True)
            os.close(self._lock)
            self._lock = None

    def _check_complete(self) -> None:
        with suppress(InputError):
            manifest = read_manifest(self.out)
            self.complete = json.loads((self.out / MANIFEST_FILE).read_text())["fingerprint"] == _fingerprint(
                self._begun_with
            )
            self.complete &= manifest.splits.keys() == {task.split for task in self.tasks}
        if not self.complete:
            raise InputError(
                f"{self.out} exists already and holds something else than this set; choose another --out, or remove it."
            )

    def _take_up(self) -> None:
        (self._partial / _DATA).mkdir(exist_ok=True)
        (self._partial / _NOTES).mkdir(exist_ok=True)
        for half in (*(self._partial / _DATA).glob(".*"), *(self._partial / _NOTES).glob(".*")):
            half.unlink()
        begun = self._partial / _BEGUN
        try:
            before = json.loads(begun.read_text()) if begun.is_file() else None
        except ValueError as error:
            raise InputError(f"{begun} cannot be read; remove {self._partial} to begin anew.") from error
        if before not in (None, self._begun_with) and any((self._partial / _NOTES).glob("*.json")):
            keys = {*before, *self._begun_with}
            names = sorted(key for key in keys if before.get(key) != self._begun_with.get(key))
            raise InputError(
                f"{self._partial} holds an unfinished set that was begun otherwise ({', '.join(names)}). Give the same "
                "arguments again to go on with it, remove it to begin anew, or choose another --out."
            )
        write_json(begun, self._begun_with)
        sync(self._partial)

    def _check_room(self) -> None:
        free, need = shutil.disk_usage(self._partial).free, self.bytes_needed
        if need > free:
            raise InputError(
                f"{self.out} needs {readable(need)}, but its disk has only {readable(free)} free. Choose another "
                "place, fewer copies or splits, or fp16."
            )

    def missing(self, *, rank: int = 0, world: int = 1) -> list[ShardTask]:
        """This process's share of the shards that are still to be written."""
        return [] if self.complete else [task for task in self.tasks if self._note(task) is None][rank::world]

    def stored(self, weights: Weights) -> Weights:
        """What readers of the set will get as phi for these networks: rounded to its precision, in fp32."""
        layers = list(zip(*weights, strict=True))[: self.description.stored_layers]
        kind = DTYPES[self.description.dtype]
        rounded = [(w.to(kind), b.to(kind)) for w, b in layers]
        base = None if self.base is None else self.base.map(lambda x: x.to(weights.weights[0].device))
        return networks(self.description, base, rounded, "phi")

    @contextmanager
    def shard(self, task: ShardTask) -> Iterator[OpenShard]:
        """Collects the networks of a shard, and writes it at the end, unless something is raised."""
        shard = OpenShard(self.description, task)
        yield shard
        try:
            self._write(task, shard)
        except OSError as error:
            raise _unwritable(self.out, error, kept=self._partial) from error

    def _write(self, task: ShardTask, shard: OpenShard) -> None:
        tensors = shard.tensors()
        path = self._partial / _DATA / f"{task.name}.safetensors"
        lost = {"skipped": shard.skipped, "diverged": shard.diverged}
        info = {**lost, "psnr": float(tensors["psnr"].double().sum()), **save_whole(path, tensors)}
        if task.split == self.train_split:
            layers = [tensor.flatten(1) for name, tensor in tensors.items() if name in self._flat_names]
            moments = Moments.of(torch.cat(layers, dim=1))
            kept = {"mean": moments.mean, "squares": moments.squares}
            save_whole(self._partial / _NOTES / f"{task.name}.moments.safetensors", kept)
        # Last: with it, the shard counts as written.
        write_json(self._partial / _NOTES / f"{task.name}.json", {**info, "count": len(tensors["label"])})
        sync(self._partial / _NOTES)

    @property
    def _flat_names(self) -> list[str]:
        """The layers of a shard, in the order of `Weights.flat`."""
        return [name for name in self.description.columns if name.startswith("layers.")]

    def _note(self, task: ShardTask) -> dict[str, Any] | None:
        """What is known of a shard that is written; None if it is not."""
        try:
            note: dict[str, Any] = json.loads((self._partial / _NOTES / f"{task.name}.json").read_text())
            size = (self._partial / _DATA / f"{task.name}.safetensors").stat().st_size
        except (OSError, ValueError):
            return None
        return note if size == note["bytes"] else None

    def finish(self) -> Manifest:
        """Statistics and manifest; then the folder takes its name.

        Raises:
            InputError: shards are missing, more than half of a split diverged (nothing is kept then), `out` was made by
                somebody else meanwhile, the disk is full.
        """
        if self.complete:
            return read_manifest(self.out)
        noted = [(task, self._note(task)) for task in self.tasks]
        if lost := [task.name for task, note in noted if note is None]:
            raise InputError(
                f"{len(lost)} shards of {self.out} are missing ({lost[0]} first); run the same command again."
            )
        notes = [(task, note) for task, note in noted if note is not None]
        self._check_enough(notes)
        data = self._partial / _DATA
        try:
            for stray in set(data.iterdir()) - {data / f"{task.name}.safetensors" for task in self.tasks}:
                stray.unlink()
            if self.base is not None:
                save_whole(data / BASE_FILE, {name: tensor[0] for name, tensor in layer_tensors(self.base).items()})
            results = {"statistics": self._statistics(notes), **_results(notes, self.description)}
            here = environment()
            package = {"version": mwt.__version__, "commit": here["commit"], "modified": here["modified"]}
            content = {**self.description.as_json(), **results, "package": package}
            write_json(data / MANIFEST_FILE, {**content, "fingerprint": _fingerprint(self._begun_with)})
            sync(data)
            if self.out.exists():
                raise InputError(f"{self.out} was made meanwhile; the set is whole in {data}: rename that yourself.")
            data.rename(self.out)
            sync(self.out.parent)
        except (OSError, SafetensorError) as error:
            raise _unwritable(self.out, error, kept=self._partial) from error
        shutil.rmtree(self._partial, ignore_errors=True)
        return read_manifest(self.out)

    def _check_enough(self, notes: list[tuple[ShardTask, dict[str, Any]]]) -> None:
        for split in {task.split for task in self.tasks}:
            part = [note for task, note in notes if task.split == split]
            lost = [pair for note in part for pair in note["diverged"]]
            count = len(lost) + sum(note["count"] for note in part)
            if len(lost) > count // 2:
                shutil.rmtree(self._partial / _NOTES)  # it would be the same again
                raise diverged(self.description, split, lost, count)

    def _statistics(self, notes: list[tuple[ShardTask, dict[str, Any]]]) -> dict[str, Any]:
        total: Moments | None = None
        for task, note in notes:
            if task.split == self.train_split:
                with safe_open(self._partial / _NOTES / f"{task.name}.moments.safetensors", framework="pt") as file:
                    mean, squares = file.get_tensor("mean"), file.get_tensor("squares")
                part = Moments(count=note["count"], mean=mean, squares=squares)
                total = part if total is None else total + part
        assert total is not None, "a split has a shard at least"
        mean, std = whole_statistics(self.description, self.base, total.mean, total.std)
        content = {f"{name}.mean": tensor[0].float() for name, tensor in layer_tensors(mean).items()}
        content |= {f"{name}.std": tensor[0].float() for name, tensor in layer_tensors(std).items()}
        save_whole(self._partial / _DATA / STATISTICS_FILE, content)
        layers = layer_scalars(self.description.layout, mean, std)
        return {"file": STATISTICS_FILE, "split": self.train_split, "count": total.count, "layers": layers}


def _fingerprint(begun_with: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(begun_with, sort_keys=True).encode()).hexdigest()


def _digest(base: Weights | None) -> str | None:
    return None if base is None else hashlib.sha256(base.flat().numpy().tobytes()).hexdigest()


def _results(notes: list[tuple[ShardTask, dict[str, Any]]], description: Description) -> dict[str, Any]:
    splits: dict[str, Any] = {}
    psnr: dict[str, float | None] = {}
    skipped: dict[str, int] = {}
    lost: dict[str, list[list[int]]] = {}
    for split in dict.fromkeys(task.split for task, _ in notes):
        part = [(task, note) for task, note in notes if task.split == split]
        shards = tuple(
            ShardInfo(file=f"{task.name}.safetensors", **{key: note[key] for key in ("count", "bytes", "sha256")})
            for task, note in part
        )
        count = sum(shard.count for shard in shards)
        splits[split] = asdict(SplitInfo(count=count, shards=shards))
        mean = sum(note["psnr"] for _, note in part) / max(1, count)
        psnr[split] = None if "psnr" in description.unmeasured else mean
        skipped[split] = sum(note["skipped"] for _, note in part)
        if pairs := [pair for _, note in part for pair in note["diverged"]]:
            lost[split] = pairs
    return {"splits": splits, "psnr": psnr, "skipped": skipped, "diverged": lost}


def _unwritable(out: Path, error: OSError | SafetensorError, kept: Path | None = None) -> InputError:
    number = error.errno if isinstance(error, OSError) else None
    again = f" What is finished stays in {kept}: run the same command again." if kept is not None else ""
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return InputError(f"The disk of {out} is full.{again}")
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return InputError(f"No permission to write to {out.parent}; choose another --out.")
    return InputError(f"{out} cannot be written: {error}.{again}")
