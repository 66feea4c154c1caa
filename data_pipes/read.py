"""A split of a data set, as batches on the device: kept there whole, or streamed from its shards."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import webdataset.filters
from torch import Tensor

from data_pipes.decode import POINT_DIMS, decode_sample
from data_pipes.parallel import copied_ahead, ordered_map
from data_pipes.schema import DatasetInfo, read_info
from data_pipes.shards import iterate_shard
from mwt.config import DataConfig
from mwt.errors import InputError
from mwt.rng import derived_seed, permutation
from mwt.structs import Batch, SignalFacts

SHUFFLE_BUFFER = 4096
"""Undecoded samples among which a streamed split is shuffled, beyond the order of its shards."""

_Entry = tuple[int, Path, dict[str, Any]]  # position in the split, shard, undecoded sample


class Split(ABC):
    """One split of a data set. Positions count its samples from 0, in the order of the shards.

    The order of an epoch is a function of (seed, epoch) alone. Global batch g is places g * batch_size * world up to
    (g + 1) * batch_size * world of it, and rank r takes the r-th slice of `batch_size`, so that all processes together
    see what one would. `resident` says whether the whole split lies on the device.
    """

    resident: bool

    def __init__(self, info: DatasetInfo, name: str, *, device: torch.device, limit: int | None = None) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1, not {limit}")
        recorded = info.split(name).count
        self.info = info
        self.name = name
        self.device = device
        self._count = recorded if limit is None else min(limit, recorded)
        self._shards: list[tuple[Path, int, int]] = []  # path, position of its first sample, samples used
        first = 0
        for path, shard in zip(info.shard_paths(name), info.split(name).shards, strict=True):
            used = min(shard.count, self._count - first)
            if used > 0:
                self._shards.append((path, first, used))
            first += shard.count

    @property
    def facts(self) -> SignalFacts:
        """What the data says about its signals."""
        return self.info.facts

    def __len__(self) -> int:
        return self._count

    def steps(self, batch_size: int, drop_last: bool = False, world: int = 1) -> int:
        """Global batches of an epoch, with `batch_size` samples per process."""
        whole, rest = divmod(len(self), batch_size * world)
        return whole + (1 if rest and not drop_last else 0)

    @abstractmethod
    def key(self, position: int) -> str:
        """The name of a sample inside its shard."""

    def batches(
        self,
        *,
        batch_size: int,
        epoch: int = 0,
        seed: int = 0,
        shuffle: bool = False,
        drop_last: bool = False,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
    ) -> Iterator[Batch]:
        """This rank's batches of one epoch, `batch_size` samples each, from global batch `start` on.

        Without `drop_last`, an incomplete last global batch is dealt out to the ranks in order and as evenly as it
        goes; a rank whose share is empty gets no batch for it.

        Raises:
            InputError: a sample that cannot be used; the message names shard and key.
        """
        shares = list(self._shares(batch_size, drop_last, rank, world, start))
        return self._walk(shares, epoch=epoch, seed=seed, shuffle=shuffle)

    @abstractmethod
    def _walk(self, shares: list[tuple[int, int]], *, epoch: int, seed: int, shuffle: bool) -> Iterator[Batch]:
        """One batch for each share: the samples at its places [begin, end) in the order of the epoch."""

    def _shares(self, batch_size: int, drop_last: bool, rank: int, world: int, start: int) -> Iterator[tuple[int, int]]:
        """This rank's places [begin, end) in the order of the epoch, one pair for each of its batches."""
        if batch_size < 1 or not 0 <= rank < world or start < 0:
            raise ValueError(f"batch_size {batch_size}, rank {rank} of {world}, start {start} make no sense")
        for step in range(start, self.steps(batch_size, drop_last, world)):
            first = step * batch_size * world
            size = min(batch_size * world, len(self) - first)
            begin, end = first + size * rank // world, first + size * (rank + 1) // world
            if end > begin:
                yield begin, end

    def _entries(self, shards: list[tuple[Path, int, int]]) -> Iterator[_Entry]:
        for path, first, used in shards:
            for offset, sample in enumerate(iterate_shard(path, used)):
                yield first + offset, path, sample

    def _decode(self, entry: _Entry) -> tuple[int, str, Tensor, int]:
        position, path, sample = entry
        where = f"Sample {sample['__key__']} of shard {path}"
        signal, label = decode_sample(sample, self.facts, where)
        return position, where, signal, label


def _one_size(first: Tensor, signal: Tensor, where: str) -> None:
    if signal.shape == first.shape:
        return
    if signal.dtype == torch.uint8:
        raise InputError(
            f"{where} has {signal.shape[1]} x {signal.shape[2]} pixels, others have {first.shape[1]} x "
            f"{first.shape[2]}; a batch needs one size. Prepare the data with one: "
            "python -m data_pipes.prepare folder --size N."
        )
    raise InputError(f"{where} has {signal.shape[0]} points, others have {first.shape[0]}; a batch needs equally many.")


def _batch(signals: Tensor, labels: Tensor, positions: Tensor) -> Batch:
    if signals.dtype == torch.uint8:
        return Batch(labels=labels, positions=positions, images=signals)
    values = signals[..., POINT_DIMS:] if signals.shape[-1] > POINT_DIMS else None  # None: points on a surface
    return Batch(labels=labels, positions=positions, coords=signals[..., :POINT_DIMS], values=values)


class ResidentSplit(Split):
    """A split that is decoded once and lies on the device; a batch is a choice of rows."""

    resident = True

    def __init__(
        self, info: DatasetInfo, name: str, *, device: torch.device, workers: int = 0, limit: int | None = None
    ) -> None:
        super().__init__(info, name, device=device, limit=limit)
        self._keys: list[str] = []
        labels: list[int] = []
        first: Tensor | None = None
        for position, where, signal, label in ordered_map(self._decode, self._named(), workers=workers):
            if first is None:
                first, signals = signal, signal.new_empty(len(self), *signal.shape)
            _one_size(first, signal, where)
            signals[position] = signal
            labels.append(label)
        self._signals = signals.to(device)
        self._labels = torch.tensor(labels, device=device)

    def _named(self) -> Iterator[_Entry]:
        for entry in self._entries(self._shards):
            self._keys.append(entry[2]["__key__"])
            yield entry

    def key(self, position: int) -> str:  # noqa: D102 inherited
        return self._keys[position]

    def _walk(self, shares: list[tuple[int, int]], *, epoch: int, seed: int, shuffle: bool) -> Iterator[Batch]:
        count = len(self)
        order = permutation(count, seed=seed, purpose="shuffle", epoch=epoch) if shuffle else torch.arange(count)
        order = order.to(self.device)
        for begin, end in shares:
            positions = order[begin:end]
            signals, labels = self._signals.index_select(0, positions), self._labels.index_select(0, positions)
            yield _batch(signals, labels, positions)


class StreamingSplit(Split):
    """A split that is read from its shards in every epoch and decoded in `workers` threads, a few batches ahead.

    Shuffled, the shards come in a random order and their samples through a shuffle buffer, both drawn from
    (seed, epoch): every process walks the same stream of undecoded samples and decodes its own share of it.
    """

    resident = False

    def __init__(
        self, info: DatasetInfo, name: str, *, device: torch.device, workers: int = 0, limit: int | None = None
    ) -> None:
        super().__init__(info, name, device=device, limit=limit)
        self._workers = workers
        self._shard_keys = lru_cache(maxsize=2)(self._read_keys)

    def _read_keys(self, index: int) -> list[str]:
        path, _, used = self._shards[index]
        return [sample["__key__"] for sample in iterate_shard(path, used)]

    def key(self, position: int) -> str:  # noqa: D102 inherited
        for index, (_, first, used) in enumerate(self._shards):
            if first <= position < first + used:
                return self._shard_keys(index)[position - first]
        raise IndexError(position)

    def _order(self, epoch: int, seed: int, shuffle: bool) -> Iterator[_Entry]:
        if not shuffle:
            return self._entries(self._shards)
        shard_order = permutation(len(self._shards), seed=seed, purpose="shuffle", epoch=epoch)
        stream = self._entries([self._shards[index] for index in shard_order.tolist()])
        source = random.Random(derived_seed(seed, "shuffle", epoch))
        return webdataset.filters.shuffle(SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER, rng=source)(stream)

    def _collate(self, rows: list[tuple[int, str, Tensor, int]]) -> Batch:
        for _, where, signal, _ in rows:
            _one_size(rows[0][2], signal, where)
        signals, labels = torch.stack([row[2] for row in rows]), torch.tensor([row[3] for row in rows])
        return _batch(signals, labels, torch.tensor([row[0] for row in rows]))

    def _walk(self, shares: list[tuple[int, int]], *, epoch: int, seed: int, shuffle: bool) -> Iterator[Batch]:
        def own() -> Iterator[_Entry]:
            place, stream = 0, self._order(epoch, seed, shuffle)
            for begin, end in shares:
                yield from islice(stream, begin - place, end - place)
                place = end

        def collated() -> Iterator[Batch]:
            rows = ordered_map(self._decode, own(), workers=self._workers)
            for begin, end in shares:
                yield self._collate(list(islice(rows, end - begin)))

        return copied_ahead(collated(), self.device)


def open_split(
    path: str | Path,
    split: str,
    *,
    device: torch.device,
    resident_mb: int = 4096,
    workers: int = 0,
    limit: int | None = None,
) -> Split:
    """Opens split `split` of the folder `path` (or `builtin:NAME`), for batches on `device`.

    Up to `resident_mb` MiB (decoded) it is read at once and kept on the device, above that it streams. `workers` are
    decoding threads, 0 decodes in the calling one; `limit` uses only the first so many samples.

    Raises:
        InputError: a folder, split, shard or sample that cannot be used; the message says which.
    """
    info = read_info(path)
    streaming = StreamingSplit(info, split, device=device, workers=workers, limit=limit)
    if len(streaming) == 0:
        raise InputError(f"Split {split!r} of {info.folder} has no samples.")
    _, _, first, _ = streaming._decode(next(streaming._entries(streaming._shards)))
    if len(streaming) * first.nbytes > resident_mb * 2**20:
        return streaming
    return ResidentSplit(info, split, device=device, workers=workers, limit=limit)


def open_configured(data: DataConfig, split: str, device: torch.device) -> Split:
    """`open_split` with everything that a configuration says about reading."""
    return open_split(
        data.path, split, device=device, resident_mb=data.resident_mb, workers=data.workers, limit=data.limit
    )
