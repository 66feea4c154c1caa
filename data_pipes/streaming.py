"""A split whose shards are read one after the other, from URLs or files: for data that lies elsewhere."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipes.decode import decode_sample
from data_pipes.parallel import ordered_map
from data_pipes.remote import check_scheme, shown
from data_pipes.schema import DatasetInfo, check_shard
from data_pipes.shards import stream_shard
from data_pipes.split import Epoch, Row, Split
from mwt.config import SAFE_SCHEMES
from mwt.errors import InputError
from mwt.rng import derived_seed, permutation

SHUFFLE_BUFFER = 8192
"""Undecoded samples among which an epoch is shuffled beyond the order of its shards, in all lanes together."""
LANES = 32
"""The most streams that are read side by side; a power of two, so that usual numbers of processes divide it."""
CHUNK = 8
"""Samples that a decoding thread takes at once."""

_Undecoded = tuple[int, dict[str, Any] | None]  # position, sample


class StreamingSplit(Split):
    """A split that is read from its shards in every epoch.

    The order of an epoch is computed beforehand from the counts in dataset.json, so every process knows it without
    reading, and each sample has its place in it exactly once, however uneven the shards are. Shuffled, the shards are
    put in a random order and the samples of this sequence cut into lanes of equal length (a power of two, at most
    `LANES` and a quarter of the shards); lane l gives places l, l + lanes, … of the epoch, its samples drawn from a
    buffer of `SHUFFLE_BUFFER` / lanes. A process reads the lanes of its own places alone where `world` divides their
    number; otherwise it reads more, and passes over what belongs to others without decoding it.

    Limits: of `lanes` places in a row, each is of another lane, so samples of one lane (neighbours in a shard, say)
    share a batch less often than by chance, and never one of at most `lanes` samples that begins at a multiple of it.
    (If lanes took turns at random, a process would have to read those of others.) Samples that lie more than a buffer
    apart in a shard do not meet in an order other than theirs; data that is sorted by class should be shuffled when it
    is prepared (`data_pipes.prepare` does). A lane that begins or ends within a shard reads it from
    its beginning. Not shuffled, there is one lane, which every process reads. To begin in the middle of an epoch,
    shards before it are passed over, and the first one's samples before it are read again. All of this random access
    (`IndexedSplit`) does not have. A shard's SHA-256 is compared when it has been read to its end.
    """

    reader = "stream"

    def __init__(
        self, info: DatasetInfo, name: str, *, schemes: tuple[str, ...] = SAFE_SCHEMES, **options: Any
    ) -> None:
        super().__init__(info, name, **options)
        self._schemes = schemes
        self._sources = [info.source(shard) for shard in self._shards]
        for source, shard in zip(self._sources, self._shards, strict=True):
            if isinstance(source, str):
                check_scheme(source, schemes)
            elif self.bad.policy == "raise":
                check_shard(source, shard)

    def key(self, position: int) -> str:  # noqa: D102 inherited
        shard, number = self._place(position)
        samples = stream_shard(self._sources[shard], self._shards[shard], schemes=self._schemes)
        try:
            return str(next(islice(samples, number, None))["__key__"])
        except (InputError, StopIteration):
            return f"number {number}"

    def order(self, epoch: Epoch) -> Tensor:
        """The positions at all places of an epoch."""
        return self._plan(epoch)[0] if epoch.shuffle else super().order(epoch)

    def _plan(self, epoch: Epoch) -> tuple[Tensor, list[Tensor]]:
        """The order of an epoch, and for each lane its positions in the order in which they are read."""
        if not epoch.shuffle:
            everything = torch.arange(len(self))
            return everything, [everything]
        lanes = 1
        while 2 * lanes <= min(LANES, len(self._shards) // 4):
            lanes *= 2
        shards = permutation(len(self._shards), seed=epoch.seed, purpose="shuffle", epoch=epoch.number).tolist()
        sequence = torch.cat([self._first[shard] + torch.arange(self._used[shard]) for shard in shards])
        read = list(sequence.split([len(range(lane, len(self), lanes)) for lane in range(lanes)]))
        order = torch.empty_like(sequence)
        for lane, positions in enumerate(read):
            source = random.Random(derived_seed(epoch.seed, f"shuffle/{lane}", epoch.number))
            order[lane::lanes] = positions[_buffered(len(positions), max(1, SHUFFLE_BUFFER // lanes), source)]
        return order, read

    def _rows(self, shares: list[range], epoch: Epoch, *, workers: int) -> Iterator[Row | None]:
        undecoded = self._undecoded(shares, epoch)
        chunks = iter(lambda: list(islice(undecoded, CHUNK)), [])
        rows = chain.from_iterable(ordered_map(self._decode_all, chunks, workers=workers))
        return self._mended(rows, epoch) if epoch.whole_batches else rows

    def _undecoded(self, shares: list[range], epoch: Epoch) -> Iterator[_Undecoded]:
        order, read = self._plan(epoch)
        wanted = np.zeros(len(self), dtype=bool)
        for share in shares:
            wanted[order[share.start : share.stop : share.step].numpy()] = True
        lanes = [_Lane(self._read(positions, wanted)) for positions in read]
        for place in chain.from_iterable(shares):
            position = int(order[place])
            yield position, lanes[place % len(lanes)].take(position)

    def _read(self, positions: Tensor, wanted: np.ndarray) -> Iterator[_Undecoded]:
        """The wanted samples of a lane; `positions` are all of its samples, in the order in which they lie."""
        place = 0
        while place < len(positions):
            shard, begin = self._place(int(positions[place]))
            end = min(begin + len(positions) - place, self._used[shard])
            place += end - begin
            numbers = begin + np.flatnonzero(wanted[self._first[shard] + begin : self._first[shard] + end])
            if len(numbers):
                yield from self._read_shard(shard, numbers.tolist(), to_the_end=end == self._shards[shard].count)

    def _read_shard(self, shard: int, numbers: list[int], *, to_the_end: bool) -> Iterator[_Undecoded]:
        """The samples with these numbers of a shard; None for those that cannot be had."""
        source, recorded, first = self._sources[shard], self._shards[shard], self._first[shard]
        due = iter(numbers)
        number: int | None = next(due)
        found = 0
        try:
            for sample in stream_shard(source, recorded, schemes=self._schemes):
                if found == number:
                    yield first + found, {**sample, "__shard__": _name(source)}
                    number = next(due, None)
                found += 1
                if number is None and not to_the_end:
                    return
            if found != recorded.count:
                raise InputError(
                    f"Shard {_name(source)} holds {found} samples, not the {recorded.count} that dataset.json records."
                )
        except InputError as error:
            if number is None:  # all that is wanted was there
                self.bad.add_shard(error)
                return
            rest = [number, *due]
            self.bad.add_all([first + missing for missing in rest], error)
            for missing in rest:
                yield first + missing, None

    def _decode_all(self, chunk: list[_Undecoded]) -> list[Row | None]:
        return [self._decode(position, sample) for position, sample in chunk]

    def _decode(self, position: int, sample: dict[str, Any] | None) -> Row | None:
        if sample is None:
            return None
        where = f"Sample {sample['__key__']} of shard {sample['__shard__']}"
        try:
            signal, label = decode_sample(sample, self.facts, where)
            return Row(position=position, signal=signal, label=label, where=where)
        except InputError as error:
            self.bad.add(position, error)
            return None

    def _mended(self, rows: Iterator[Row | None], epoch: Epoch) -> Iterator[Row]:
        """The rows, with the next good one, or at the end the last, in the places of those that are missing."""
        missing, last = 0, None
        for row in rows:
            if row is None:
                missing += 1
                continue
            last = row
            yield from [row] * (missing + 1)
            missing = 0
        if missing and last is None:
            # An uninterrupted run would take the last good one, which one that goes on here has not read.
            raise InputError(
                f"Split {self.name!r} of {self.info.folder} has too few samples that can be used: none "
                f"of the {missing} left of epoch {epoch.number} for this process. Mend the data, or go on from "
                "an earlier checkpoint."
            )
        yield from [last] * missing if last is not None else []


class _Lane:
    """Samples that arrive in one order and are taken in another, not much different one."""

    def __init__(self, arriving: Iterator[_Undecoded]) -> None:
        self._arriving = arriving
        self._held: dict[int, dict[str, Any] | None] = {}

    def take(self, position: int) -> dict[str, Any] | None:
        """The sample at `position`."""
        while position not in self._held:
            arrived, sample = next(self._arriving)
            self._held[arrived] = sample
        return self._held.pop(position)


def _buffered(count: int, size: int, source: random.Random) -> Tensor:
    """The order in which a shuffle buffer of `size` gives out 0 … count - 1; up to `size` a random permutation."""
    buffer = list(range(min(count, size)))
    taken = []
    for new in range(len(buffer), count):
        place = int(source.random() * size)
        taken.append(buffer[place])
        buffer[place] = new
    source.shuffle(buffer)
    return torch.tensor([*taken, *buffer], dtype=torch.int64)


def _name(source: Path | str) -> str:
    return str(source) if isinstance(source, Path) else shown(source)
