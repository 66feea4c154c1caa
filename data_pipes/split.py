"""What every split of a data set is, however its samples are fetched: places of an epoch dealt out to processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, islice

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from data_pipes.decode import POINT_DIMS
from data_pipes.faults import BadSamples, Policy
from data_pipes.parallel import copied_ahead, prefetch
from data_pipes.schema import DatasetInfo, ShardInfo
from mwt.errors import InputError
from mwt.rng import permutation, uniform
from mwt.structs import Batch, SignalFacts

_DRAWS = 64  # tries to replace a bad sample


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One pass over a split: what its order is a function of, and how it is cut into batches."""

    number: int = 0
    seed: int = 0
    shuffle: bool = False
    whole_batches: bool = False
    """Every batch has its full size, whatever samples are bad (`drop_last`)."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One sample, decoded. `signal` is uint8 [C, h, w], or float32 [N, D + C]; `where` names it in messages."""

    position: int
    signal: Tensor
    label: int
    where: str


class Split(ABC):
    """One split of a data set. Positions count its samples from 0, in the order of the shards.

    The order of an epoch is a function of (seed, epoch) alone. Global batch g is places g * batch_size * world up to
    (g + 1) * batch_size * world of it, and rank r takes every `world`-th of them from the r-th on, so that all
    processes together see what one would. `resident` says whether the whole split lies on the device; `reader` which
    way of reading this is (`data.reader`); `bad` what could not be used so far.
    """

    resident = False
    reader: str

    def __init__(
        self, info: DatasetInfo, name: str, *, device: torch.device, workers: int = 0, limit: int | None = None,
        on_bad_sample: Policy = "raise", max_bad: float = 0.01,
    ) -> None:  # fmt: skip
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1, not {limit}")
        recorded = info.split(name)
        self.info = info
        self.name = name
        self.device = device
        self._count = recorded.count if limit is None else min(limit, recorded.count)
        self.bad = BadSamples(name, self._count, on_bad_sample, max_bad)
        self.workers = workers
        first = list(accumulate((shard.count for shard in recorded.shards), initial=0))
        used = [(shard, begin) for shard, begin in zip(recorded.shards, first, strict=False) if begin < self._count]
        self._shards: list[ShardInfo] = [shard for shard, _ in used]
        self._first: list[int] = [begin for _, begin in used]
        self._used: list[int] = [min(shard.count, self._count - begin) for shard, begin in used]

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

    def dropped(self, batch_size: int, world: int = 1) -> int:
        """Samples at the end of an epoch's order that `drop_last` leaves out; others in each epoch."""
        return len(self) % (batch_size * world)

    def sample_bytes(self) -> int:
        """The size of the first good sample, decoded.

        Raises:
            InputError: there is none.
        """
        for row in self._rows([range(min(len(self), self.bad.limit + 1))], Epoch(), workers=0):
            if row is not None:
                return row.signal.nbytes
        raise InputError(f"Split {self.name!r} of {self.info.folder} has no samples that can be used.")

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
        prepare: Callable[[Batch], Batch] | None = None,
    ) -> Iterator[Batch]:
        """This rank's batches of one epoch, `batch_size` samples each, from global batch `start` on.

        With `drop_last`, an incomplete last global batch is left out: `dropped()` samples, others in each epoch.
        Without, it is dealt out to the ranks like the others, as evenly as it goes; a rank whose share is empty gets
        no batch for it. What is done about bad samples is said in `data_pipes.faults`.

        Args:
            prepare: what makes of every batch that which is used. It is called in order, in a thread of its own and
                one batch ahead: while the batch before is used.

        Raises:
            InputError: a sample that cannot be used; the message names shard and key.
        """
        if batch_size < 1 or not 0 <= rank < world or start < 0:
            raise ValueError(f"batch_size {batch_size}, rank {rank} of {world}, start {start} make no sense")
        asked = Epoch(number=epoch, seed=seed, shuffle=shuffle, whole_batches=drop_last)
        whole = batch_size * world
        end = self.steps(batch_size, drop_last, world) * whole
        shares = [
            range(begin + rank, min(begin + whole, len(self)), world) for begin in range(start * whole, end, whole)
        ]
        batches = self._walk([share for share in shares if share], asked)
        return batches if prepare is None else prefetch(map(prepare, batches), depth=1)

    def _walk(self, shares: list[range], epoch: Epoch) -> Iterator[Batch]:
        """One batch for each share, of the samples at its places in the order of the epoch."""
        rows = self._rows(shares, epoch, workers=self.workers)
        return copied_ahead(_collated(rows, shares), self.device)

    @abstractmethod
    def _rows(self, shares: list[range], epoch: Epoch, *, workers: int) -> Iterator[Row | None]:
        """The samples at these places of an epoch, in this order; None for a bad one that nothing replaces."""

    def stored_rows(self) -> Iterator[Row | None]:
        """All samples in the order of their positions, as they are stored; None for those that cannot be used."""
        return self._rows([range(len(self))], Epoch(), workers=self.workers)

    def order(self, epoch: Epoch) -> Int[Tensor, " n"]:
        """The positions at all places of an epoch."""
        if not epoch.shuffle:
            return torch.arange(len(self))
        return permutation(len(self), seed=epoch.seed, purpose="shuffle", epoch=epoch.number)

    def locate(self, position: int) -> dict[str, str | int]:
        """Where a sample is, for messages: its shard, its number inside it, and its key where that costs no reading."""
        shard, number = self._place(position)
        return {"shard": str(self.info.source(self._shards[shard])), "number": number}

    def _place(self, position: int) -> tuple[int, int]:
        """The shard of a sample, and its number inside it."""
        if not 0 <= position < len(self):
            raise IndexError(position)
        shard = bisect_right(self._first, position) - 1
        return shard, position - self._first[shard]


def replacements(position: int, epoch: Epoch, count: int) -> Iterator[int]:
    """Positions to be tried in place of a bad one's, drawn from (seed, epoch, position)."""
    numbers = uniform(torch.tensor([position]), _DRAWS, seed=epoch.seed, purpose="replace", epoch=epoch.number)
    yield from (numbers[0].double() * count).long().tolist()


def _collated(rows: Iterable[Row | None], shares: list[range]) -> Iterator[Batch]:
    stream = iter(rows)
    for share in shares:
        group = [row for row in islice(stream, len(share)) if row is not None]
        if group:
            yield batch_of(group)


def batch_of(rows: list[Row]) -> Batch:
    """Rows as a batch on the CPU.

    Raises:
        InputError: signals of different sizes.
    """
    for row in rows:
        check_one_size(rows[0].signal, row)
    stored = _stacked([in_row(row.signal) for row in rows])
    labels, positions = torch.tensor([row.label for row in rows]), torch.tensor([row.position for row in rows])
    return as_batch(stored, labels, positions)


def _stacked(signals: list[Tensor]) -> Tensor:
    """`torch.stack`, by NumPy: in one thread, as torch's own would wait busily for more work beside those that decode,
    and into memory that is used again (`mwt.runtime.keep_freed_memory`), which torch's alignment often prevents."""
    return torch.from_numpy(np.stack([signal.numpy() for signal in signals]))


def in_row(signal: Tensor) -> Tensor:
    """A signal as batches hold it in memory: the channels of a pixel together, as decoders give them."""
    return signal.permute(1, 2, 0) if signal.dtype == torch.uint8 else signal


def as_batch(stored: Tensor, labels: Tensor, positions: Tensor) -> Batch:
    """A batch of images uint8 [B, h, w, C], or of point sets float32 [B, N, D + C], of surfaces [B, N, D]."""
    if stored.dtype == torch.uint8:
        return Batch(labels=labels, positions=positions, images=stored.permute(0, 3, 1, 2))
    values = stored[..., POINT_DIMS:] if stored.shape[-1] > POINT_DIMS else None  # None: points on a surface
    return Batch(labels=labels, positions=positions, coords=stored[..., :POINT_DIMS], values=values)


def check_one_size(first: Tensor, row: Row) -> None:
    """Raises InputError unless a row's signal is as large as `first`, on which no skipping helps."""
    signal, where = row.signal, row.where
    if signal.shape == first.shape:
        return
    if signal.dtype == torch.uint8:
        raise InputError(
            f"{where} has {signal.shape[1]} x {signal.shape[2]} pixels, others have {first.shape[1]} x "
            f"{first.shape[2]}; a batch needs one size. Prepare the data with one: "
            "python -m data_pipes.prepare folder --size N."
        )
    if signal.shape[1] != first.shape[1]:
        raise InputError(
            f"{where} has {signal.shape[1]} numbers for each point, others have {first.shape[1]}; surfaces (x, y, z) "
            "and points with values do not go together. Prepare them as data sets of their own."
        )
    raise InputError(f"{where} has {signal.shape[0]} points, others have {first.shape[0]}; a batch needs equally many.")
