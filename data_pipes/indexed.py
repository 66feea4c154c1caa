"""A split with random access to its local shards: each process reads its own samples, and no others."""

from __future__ import annotations

import os
import threading
import weakref
import zlib
from collections.abc import Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from data_pipes.decode import decode_label, decode_signal
from data_pipes.index import ShardIndex, open_index
from data_pipes.parallel import ordered_map
from data_pipes.schema import DatasetInfo, check_shard
from data_pipes.split import Epoch, Row, Split, replacements
from mwt.errors import InputError

CHUNK = 8
"""Samples that a decoding thread takes at once."""
_OPEN_FILES = 256  # kept open; a split of more shards opens the others for each sample


class IndexedSplit(Split):
    """A split whose samples are read one by one, in a permutation of all of them, by an index beside each shard.

    The index is made when the split is first opened (`data_pipes.index`). A sample costs one read; starting in the
    middle of an epoch costs nothing.
    """

    reader = "indexed"

    def __init__(self, info: DatasetInfo, name: str, **options: Any) -> None:
        super().__init__(info, name, **options)
        self._paths = [Path(info.source(shard)) for shard in self._shards]
        self._files = _Files()
        self._indices = list(ordered_map(self._open, range(len(self._shards)), workers=self.workers))

    def _open(self, number: int) -> ShardIndex | None:
        path, shard = self._paths[number], self._shards[number]
        first = self._first[number]
        positions = range(first, first + self._used[number])
        try:
            if self.bad.policy == "raise" or not path.is_file():
                check_shard(path, shard)  # at once, before gigabytes are read
            index = open_index(path, shard, keep=not self.info.is_builtin)
        except InputError as error:
            self.bad.add_all(positions, error)
            return None
        fault = index.fault
        if fault is None and len(index) != shard.count:
            fault = f"Shard {path} holds {len(index)} samples, not the {shard.count} that dataset.json records."
        if fault is not None:
            self.bad.add_shard(InputError(fault))
            self.bad.add_all(positions[len(index) :], InputError(fault))
        return index

    def key(self, position: int) -> str:  # noqa: D102 inherited
        shard, row = self._place(position)
        index = self._indices[shard]
        return index.name(row) if index is not None and row < len(index) else f"number {row}"

    def locate(self, position: int) -> dict[str, str | int]:  # noqa: D102 inherited
        index = self._indices[self._place(position)[0]]
        return super().locate(position) | ({} if index is None else {"key": self.key(position)})

    def _rows(self, shares: list[range], epoch: Epoch, *, workers: int) -> Iterator[Row | None]:
        order = self.order(epoch)
        positions = chain.from_iterable(order[share.start : share.stop : share.step].tolist() for share in shares)
        chunks = iter(lambda: list(islice(positions, CHUNK)), [])
        return chain.from_iterable(ordered_map(partial(self._load_all, epoch=epoch), chunks, workers=workers))

    def _load_all(self, positions: list[int], epoch: Epoch) -> list[Row | None]:
        return [self._load(position, epoch) for position in positions]

    def _load(self, position: int, epoch: Epoch) -> Row | None:
        row = self._try(position)
        if row is not None or not epoch.whole_batches:
            return row
        for other in replacements(position, epoch, len(self)):
            row = self._try(other)
            if row is not None:
                return row
        raise InputError(f"Split {self.name!r} of {self.info.folder} has too few samples that can be used.")

    def _try(self, position: int) -> Row | None:
        if position in self.bad:
            return None
        try:
            return self._read(position)
        except InputError as error:
            self.bad.add(position, error)
            return None

    def _read(self, position: int) -> Row:
        shard, row = self._place(position)
        index, path = self._indices[shard], self._paths[shard]
        assert index is not None, "all samples of a shard without an index are bad"
        where = f"Sample {index.name(row)} of shard {path}"
        written = bytes(index.label[row])
        if not written:
            raise InputError(f"{where} has no label (KEY.cls).")
        label = decode_label(written, len(self.facts.classes), where)
        data = self._files.read(path, int(index.offset[row]), int(index.size[row]), where)
        if zlib.crc32(data) != index.crc[row]:
            raise InputError(f"{where} has changed since it was written (CRC-32). Copy or prepare the data again.")
        signal = decode_signal(data, index.extension(row), self.facts, where)
        return Row(position=position, signal=signal, label=label, where=where)


class _Files:
    """Local files, kept open and read at any place, by several threads at once."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()
        weakref.finalize(self, _close_all, self._open)

    def read(self, path: Path, offset: int, size: int, where: str) -> bytes:
        """`size` bytes from `offset` on, or fewer at the end of the file.

        Raises:
            InputError: the file cannot be read; names `where`.
        """
        try:
            file = self._open.get(path)
            if file is not None or (file := self._keep(path)) is not None:
                return os.pread(file, size, offset)
            with open(path, "rb", buffering=0) as once:
                return os.pread(once.fileno(), size, offset)
        except OSError as error:
            raise InputError(f"{where} cannot be read: {error.strerror or error}.") from error

    def _keep(self, path: Path) -> int | None:
        with self._lock:
            if path not in self._open:
                if len(self._open) >= _OPEN_FILES:
                    return None
                self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return self._open[path]


def _close_all(files: dict[Path, int]) -> None:
    for file in files.values():
        os.close(file)
