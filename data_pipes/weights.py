"""Sets of fitted networks on disk, in the native format (docs/weight_sets.md): reading them.

    weights = load_weight_set("sets/fashion_mnist", "train", values="delta")
    batch = weights.batch([3, 17, 4])                 WeightBatch: weights, labels, index, psnr, copies
    mean, std = weights.statistics()                  of the training split

Shards are mapped into memory: only what is asked for is read. `weights.resident(device)` keeps a split in memory,
`weights.mapped(device)` reads it as asked for and brings that to a device.
Writing them: `data_pipes.weight_write.WeightSetWriter`.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from data_pipes.schema import ShardInfo
from data_pipes.weight_manifest import (
    BASE_FILE,
    MANIFEST_FILE,
    STATISTICS_FILE,
    Manifest,
    Values,
    networks,
    read_manifest,
    read_networks,
)
from mwt.errors import InputError
from mwt.weight_space import Layout, Weights

_OPEN_SHARDS = 256  # mapped at a time
_AT_ONCE = 256  # networks whose bytes are checked together
_AGAIN = "Copy or export the networks again."


@dataclass(frozen=True, kw_only=True)
class WeightBatch:
    """Some networks of a set."""

    weights: Weights
    """fp32, the output layer included."""
    labels: Int[Tensor, " B"]
    index: Int[Tensor, " B"]
    """Positions of the signals in their split of the source data."""
    psnr: Float[Tensor, " B"]
    """PSNR of each network, as it is stored, over all pixels of what it was fitted to; dB. NaN for point sets."""
    copies: Int[Tensor, " B"]
    """0: fitted to the signal as it is; k: to its k-th augmented copy."""


class WeightSet(Dataset[tuple[Weights, int]]):
    """One split of a set. `weights[i]` is one network, without batch axis, and its label."""

    def __init__(self, manifest: Manifest, split: str, values: Values, *, check: bool = True) -> None:
        """What `load_weight_set` makes."""
        self.manifest, self.split, self.values, self.check = manifest, split, values, check
        self.base = read_networks(manifest.folder / BASE_FILE, manifest.layout) if manifest.has_base else None
        """theta, or the shared initialisation, as [1, …]; with the output layer."""
        self._shards = manifest.split(split).shards
        self._first = torch.tensor(list(accumulate((shard.count for shard in self._shards), initial=0)))
        self._open: dict[int, dict[str, Tensor]] = {}
        self._resident: dict[str, Tensor] | None = None
        self._device = torch.device("cpu")
        for shard in self._shards:
            _check_size(manifest.folder / shard.file, shard)

    @property
    def path(self) -> Path:
        """The folder of the set."""
        return self.manifest.folder

    @property
    def layout(self) -> Layout:
        """What all networks have in common."""
        return self.manifest.layout

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels."""
        return self.manifest.classes

    @property
    def base_checksum(self) -> str | None:
        """SHA-256 of the base's numbers; None where there is no base. Offsets from one base alone go together."""
        return None if self.base is None else hashlib.sha256(self.base.flat().cpu().numpy().tobytes()).hexdigest()

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, i: int) -> tuple[Weights, int]:
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        batch = self.batch([i % len(self)])
        return batch.weights.map(lambda x: x[0]), int(batch.labels[0])

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": {}}  # a process of a DataLoader maps the shards anew

    def batch(self, indices: Sequence[int] | Int[Tensor, " B"]) -> WeightBatch:
        """The networks at these places of the split, in this order, on the device of the set.

        Raises:
            InputError: a shard is missing, damaged or of another layout; names it.
            IndexError: no such place.
        """
        wanted = torch.as_tensor(indices, dtype=torch.int64)
        if len(wanted) and not 0 <= int(wanted.min()) <= int(wanted.max()) < len(self):
            raise IndexError(f"places {int(wanted.min())} … {int(wanted.max())} of {len(self)} networks")
        rows = self._rows(wanted)
        layers = [(rows[f"layers.{i}.weight"], rows[f"layers.{i}.bias"]) for i in range(self.manifest.stored_layers)]
        return WeightBatch(
            weights=networks(self.manifest, self.base, layers, self.values),
            labels=rows["label"], index=rows["index"], psnr=rows["psnr"], copies=rows["copy"],
        )  # fmt: skip

    def batches(self, batch_size: int) -> Iterator[WeightBatch]:
        """All networks, in order."""
        for places in torch.arange(len(self)).split(batch_size):
            yield self.batch(places)

    def column(self, name: str) -> Tensor:
        """`label`, `index`, `copy`, `psnr`, `steps` (of independent fits) [n] or `loss` [n, S + 1] of the split."""
        if name not in ("label", "index", "copy", "psnr", "loss", "steps") or name not in self.manifest.columns:
            raise KeyError(name)
        if self._resident is not None:
            return self._resident[name]
        parts = [self._mapped(number)[name].clone() for number in range(len(self._shards))]
        return torch.cat(parts).to(self._device)

    def keys(self) -> list[str]:
        """The names of the signals in the shards of the source data, in order; empty where they were not known."""
        columns = [self._mapped(number)["key"] for number in range(len(self._shards))]
        return [bytes(row.numpy()).rstrip(b"\0").decode("utf-8", "replace") for rows in columns for row in rows]

    def statistics(self) -> tuple[Weights, Weights]:
        """Mean and standard deviation (1 / n) of every weight over the training split, each [1, …], on the device.

        The deviation is as it is: 0 for what all networks share. Readers guard against small ones.

        Raises:
            InputError: the file is missing, damaged, or of another layout.
        """
        file = self.path / STATISTICS_FILE
        mean, std = (read_networks(file, self.layout, suffix) for suffix in (".mean", ".std"))
        mean, std = (x.map(lambda part: part.to(self._device)) for x in (mean, std))
        if self.values != self.manifest.values:
            stored = list(zip(*mean, strict=True))[: self.manifest.stored_layers]
            mean = networks(self.manifest, self.base, stored, self.values)
        return mean, std

    @property
    def resident_bytes(self) -> int:
        """What `resident` takes of a device, about."""
        return len(self) * self.manifest.network_bytes

    def resident(self, device: torch.device | str = "cpu") -> WeightSet:
        """The same split, read whole, checked once and kept on `device` in the precision in which it is stored."""
        copy, kept = self.mapped(device), dict[str, Tensor]()
        for places in torch.arange(len(self)).split(_AT_ONCE):
            for name, rows in self._rows(places).items():
                if name not in kept:  # the whole at once: parts that are joined at the end would take twice as much
                    kept[name] = torch.empty(len(self), *rows.shape[1:], dtype=rows.dtype, device=device)
                kept[name][places[0] : places[-1] + 1] = rows
        copy._resident = kept or {name: rows.to(device) for name, rows in self._rows(torch.arange(0)).items()}
        return copy

    def mapped(self, device: torch.device | str = "cpu") -> WeightSet:
        """The same split, read from its shards as it is asked for, and that brought to `device`."""
        copy = WeightSet(self.manifest, self.split, self.values, check=self.check)
        copy._device = torch.device(device)
        if copy.base is not None:
            copy.base = copy.base.map(lambda x: x.to(device))
        return copy

    def _rows(self, wanted: Tensor) -> dict[str, Tensor]:
        """The tensors of the shards at these places, keys excepted."""
        if self._resident is not None:
            wanted = wanted.to(self._device)
            return {name: tensor.index_select(0, wanted) for name, tensor in self._resident.items()}
        wanted, names = wanted.cpu(), [name for name in self.manifest.columns if name not in ("key", "crc32")]
        shards = torch.searchsorted(self._first, wanted, right=True) - 1
        rows: dict[str, Tensor] = {}
        for number in shards.unique().tolist():
            places = (shards == number).nonzero().flatten()
            numbers = wanted[places] - self._first[number]
            mapped = self._mapped(number)
            found = {name: tensor.index_select(0, numbers) for name, tensor in mapped.items()}
            if self.check:
                self._check(number, numbers, found)
            for name in names:
                if name not in rows:
                    rows[name] = found[name].new_empty(len(wanted), *found[name].shape[1:])
                rows[name][places] = found[name]
        if not rows:
            rows = {name: torch.empty(0, *shape, dtype=kind)  # type: ignore[arg-type]
                    for name, (kind, shape) in self.manifest.columns.items() if name in names}  # fmt: skip
        return {name: tensor.to(self._device) for name, tensor in rows.items()}

    def _check(self, shard: int, numbers: Tensor, rows: dict[str, Tensor]) -> None:
        wrong = (row_checksums(rows) != rows["crc32"]).nonzero().flatten().tolist()
        if wrong:
            raise InputError(
                f"Network {int(numbers[wrong[0]])} of shard {self.path / self._shards[shard].file} has changed since "
                f"it was written (CRC-32). {_AGAIN}"
            )

    def _mapped(self, number: int) -> dict[str, Tensor]:
        """The tensors of a shard, as they lie in the file."""
        if number not in self._open:
            if len(self._open) >= _OPEN_SHARDS:
                self._open.pop(next(iter(self._open)))
            self._open[number] = open_shard(self.manifest, self._shards[number])
        return self._open[number]


def load_weight_set(
    path: str | Path, split: str = "train", values: Values | None = None, *, check: bool = True
) -> WeightSet:
    """A split of the weight set in the folder `path`.

    Args:
        values: phi, the weights; delta, their differences from the base; None: what is stored. Converted as read.
        check: compare the CRC-32 of every network that is read (about 1 GB/s).

    Raises:
        InputError: a missing folder, split, shard or base; a shard of another size than recorded; another schema.
    """
    manifest = read_manifest(path)
    if values not in (None, "phi", "delta"):
        raise InputError(f"values={values} is not known; choose phi or delta.")
    wanted = values or manifest.values
    if wanted != manifest.values and not manifest.has_base:
        raise InputError(
            f"{manifest.folder} holds {manifest.values} and no base, so that there is no {wanted}: its networks were "
            "not fitted from a common beginning."
        )
    return WeightSet(manifest, split, wanted, check=check)


def _check_size(path: Path, shard: ShardInfo) -> None:
    if not path.is_file():
        raise InputError(f"Shard {path}, listed in {MANIFEST_FILE}, is missing. {_AGAIN}")
    if (size := path.stat().st_size) != shard.bytes:
        raise InputError(
            f"Shard {path} has {size} bytes, but {MANIFEST_FILE} records {shard.bytes}; it is damaged or not fully "
            f"copied. {_AGAIN}"
        )


def open_shard(manifest: Manifest, shard: ShardInfo) -> dict[str, Tensor]:
    """The tensors of a shard, mapped: nothing is read before it is used.

    Raises:
        InputError: the file is damaged, or does not hold what the manifest says.
    """
    path = manifest.folder / shard.file
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 no dict
    except (OSError, SafetensorError) as error:
        raise InputError(f"Shard {path} is damaged ({error}). {_AGAIN}") from error
    for name, (kind, shape) in manifest.columns.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise InputError(f"Shard {path} has no tensor {name}. {_AGAIN}")
        wanted = (shard.count, *(tensor.shape[-1] if size is None else size for size in shape))
        if tensor.shape != wanted or tensor.dtype != kind:
            raise InputError(
                f"Shard {path}: {name} is {list(tensor.shape)} of {tensor.dtype}, not {list(wanted)} of {kind} as "
                f"{MANIFEST_FILE} says. {_AGAIN}"
            )
    return {name: tensors[name] for name in manifest.columns}


def row_checksums(tensors: dict[str, Tensor]) -> Int[Tensor, " n"]:
    """CRC-32 of each row: of the bytes of all its tensors but `crc32`, in the order of their names."""
    columns = [tensors[name].contiguous() for name in sorted(tensors) if name != "crc32"]
    sums = [0] * len(columns[0])
    for column in columns:
        raw = (column.flatten(1) if column.ndim > 1 else column[:, None]).view(torch.uint8).numpy()
        for row in range(len(sums)):
            sums[row] = zlib.crc32(raw[row].data, sums[row])
    return torch.tensor(sums, dtype=torch.int64)
