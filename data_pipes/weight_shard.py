"""One shard of a weight set while it is being filled, and files that are whole or not there."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from data_pipes.weight_manifest import Description, layer_tensors
from data_pipes.weights import row_checksums
from mwt.errors import InputError
from mwt.runtime import sync
from mwt.weight_space import Weights


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """One shard to be written: the signals at positions start … stop - 1 of a split, each 1 + copies times."""

    split: str
    number: int
    start: int
    stop: int
    copies: int
    batch: int
    """Signals to be fitted together: `start` is a multiple of it."""

    @property
    def name(self) -> str:
        """The name of its file, without what follows the point."""
        return f"{self.split}-{self.number:05d}"

    @property
    def count(self) -> int:
        """How many networks it holds, unless some signals cannot be used."""
        return (self.stop - self.start) * (1 + self.copies)


FEW = 8
"""So many networks of a shard may diverge without a question; of more of them, no more than half."""


class OpenShard:
    """The networks of one shard, collected in memory. `WeightSetWriter.shard` makes it."""

    def __init__(self, description: Description, task: ShardTask) -> None:
        self.description, self.task = description, task
        self.skipped = 0
        """Signals of it that could not be used; whoever writes counts them here."""
        self.diverged: list[tuple[int, int]] = []
        """Signal and copy of the networks that are not finite, and so are not in the shard."""
        self._columns: dict[str, list[Tensor]] = {}
        self._keys: list[bytes] = []
        self._seen: set[tuple[int, int]] = set()

    def add(
        self, weights: Weights, *, labels: Tensor, index: Tensor, psnr: Tensor, losses: Tensor, copy: int = 0,
        keys: Sequence[str] | None = None, steps: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Append B networks, those left out that are not finite in the precision of the set.

        Args:
            weights: [B, …], phi or delta as `description.values` says; a shared output layer may be left out or not.
            labels: [B]
            index: [B], positions in the split.
            psnr: [B] in dB, of the networks as they are stored (`WeightSetWriter.stored`).
            losses: [B, S + 1], before each inner step and after the last.
            copy: 0 for signals as they are, else the number of the augmented copy.
            keys: names of the signals in their shards, if known.
            steps: [B], how many each took; for networks that were fitted independently.

        Raises:
            InputError: more than half of the shard's networks are not finite.
            ValueError: signals that do not belong to this shard, or twice; other shapes than described.
        """
        places = index.tolist()
        where = {(place, copy) for place in places}
        if len(where) < len(places) or where & self._seen:
            raise ValueError(f"shard {self.task.name} has some of these networks already")
        if not all(self.task.start <= place < self.task.stop for place in places) or copy > self.task.copies:
            raise ValueError(f"shard {self.task.name} is for positions {self.task.start} … {self.task.stop - 1}")
        self._seen |= where
        rows = {
            "label": labels, "index": index, "copy": torch.full_like(index, copy), "psnr": psnr, "loss": losses,
        }  # fmt: skip
        if steps is not None:
            rows["steps"] = steps
        stored = self.description.stored_layers
        rows |= layer_tensors(Weights(weights.weights[:stored], weights.biases[:stored]))
        ready, good = {}, torch.ones(len(places), dtype=torch.bool)
        for name, tensor in rows.items():
            kind, shape = self.description.columns[name]
            if tensor.shape != (len(places), *shape):
                raise ValueError(f"{name} is {list(tensor.shape)}, not {[len(places), *shape]}")
            ready[name] = tensor.detach().to("cpu", kind).contiguous()
            if name not in self.description.unmeasured and name != "psnr":
                good &= ready[name].reshape(len(places), -1).isfinite().all(1)
        for name, column in ready.items():
            self._columns.setdefault(name, []).append(column[good])
        names = [key.encode() for key in keys] if keys is not None else [b""] * len(places)
        self._keys += [name for name, fine in zip(names, good.tolist(), strict=True) if fine]
        self.diverged += [(place, copy) for place, fine in zip(places, good.tolist(), strict=True) if not fine]
        if len(self.diverged) > max(FEW, self.task.count // 2):
            raise diverged(self.description, self.task.split, self.diverged, self.task.count)

    def tensors(self) -> dict[str, Tensor]:
        """All that was added, as the shard holds it.

        Raises:
            ValueError: networks are missing.
        """
        found = len(self._keys) + len(self.diverged)
        if found + self.skipped * (1 + self.task.copies) != self.task.count:
            raise ValueError(f"shard {self.task.name} has {found} networks of {self.task.count}")
        empty = {name: torch.empty(0, *[size or 1 for size in shape], dtype=kind)
                 for name, (kind, shape) in self.description.columns.items()}  # fmt: skip
        joined = {name: torch.cat(parts) for name, parts in self._columns.items()}
        width = max([1, *map(len, self._keys)])
        keys = torch.zeros(len(self._keys), width, dtype=torch.uint8)
        for row, key in zip(keys, self._keys, strict=True):
            row[: len(key)] = torch.tensor(list(key), dtype=torch.uint8)
        tensors = {**empty, **joined, "key": keys}
        return {**tensors, "crc32": row_checksums(tensors)}


def diverged(description: Description, split: str, lost: Sequence[Sequence[int]], count: int) -> InputError:
    """What is said where there are too few networks left to be a set."""
    place, copy = lost[0]
    return InputError(
        f"{len(lost)} of {count} networks of {split!r} (the first one fitted to sample {place}, copy {copy}) are not "
        f"finite in {description.dtype}: the fits diverged, or their numbers are too large for it. Fit with a smaller "
        "rate, or store them in fp32."
    )


def save_whole(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Writes a file so that it is whole or not there; its size and checksum."""
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    half = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(half, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(half, path)
        sync(path.parent)
    finally:
        half.unlink(missing_ok=True)
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
