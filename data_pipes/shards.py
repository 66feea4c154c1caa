"""Samples of one tar file, in order, undecoded; from a local file or from a URL."""

from __future__ import annotations

import hashlib
import tarfile
import time
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPException
from pathlib import Path
from typing import Any

from webdataset.tariterators import group_by_keys

from data_pipes.remote import ByteStream, open_url, shown
from data_pipes.schema import ShardInfo
from data_pipes.tar import MAX_HEADER_BYTES, MAX_MEMBER_BYTES, DamagedTarError, streamed_files
from mwt.config import SAFE_SCHEMES
from mwt.errors import InputError

RETRIES = 4
"""How often a broken connection is opened again, after 1, 2, 4, … seconds."""
_BETWEEN_MARKS = MAX_MEMBER_BYTES + MAX_HEADER_BYTES
_MAX_EMPTY = 100  # reads at the end; tarfile goes on for ever where a header says that a file is 10^26 bytes long
_DAMAGE = (DamagedTarError, tarfile.TarError, OSError, ValueError, EOFError, AssertionError, HTTPException)
_BROKEN = (TimeoutError, ConnectionError, HTTPException)


def iterate_shard(path: Path) -> Iterator[dict[str, Any]]:
    """The samples of a shard as webdataset gives them: `{"__key__": str, EXTENSION: bytes}`.

    Raises:
        InputError: the file is no whole tar file, or holds a name that leads out of it.
    """
    found = 0
    with open(path, "rb") as file:
        samples = _samples(str(path), _Counted(file, None))
        while True:
            try:
                sample = next(samples, None)
            except _DAMAGE as error:
                raise _damaged(str(path), found, error) from error
            if sample is None:
                return
            found += 1
            yield sample


def stream_shard(
    source: Path | str, shard: ShardInfo, *, schemes: tuple[str, ...] = SAFE_SCHEMES
) -> Iterator[dict[str, Any]]:
    """The samples of a shard as they arrive. Read to its end, its bytes are compared with what dataset.json records.

    A connection that breaks is opened again, and what has been yielded already is passed over.

    Raises:
        InputError: the shard is missing, damaged or another than recorded; after the samples that could be read.
    """
    name = str(source) if isinstance(source, Path) else shown(source)
    found, tries = 0, 0
    while True:
        try:
            with closing(_open(source, schemes)) as opened:
                counted = _Counted(opened, shard.bytes)
                try:
                    for number, sample in enumerate(_samples(name, counted)):
                        if number == found:
                            found, tries = found + 1, 0
                            yield sample
                    _check_end(name, counted, shard)
                    return
                except _DAMAGE as error:
                    if isinstance(error, InputError):
                        raise
                    cut_off = counted.count < shard.bytes and not isinstance(source, Path)
                    if not (cut_off or isinstance(error, _BROKEN)):
                        raise _damaged(name, found, error) from error
                    broken: Exception = error
        except OSError as error:
            if isinstance(source, Path):
                raise InputError(f"Shard {name} cannot be read: {error.strerror or error}.") from error
            broken = error
        if tries == RETRIES:
            raise InputError(
                f"Shard {name} cannot be read beyond sample {found}: {broken}. Tried {1 + RETRIES} times."
            ) from broken
        time.sleep(2**tries)
        tries += 1


def _open(source: Path | str, schemes: tuple[str, ...]) -> ByteStream:
    return open(source, "rb") if isinstance(source, Path) else open_url(source, schemes)


class _Counted:
    """A stream that counts and hashes what is read from it, ends where it should, and gives no endless members."""

    def __init__(self, stream: ByteStream, limit: int | None) -> None:
        self._stream, self._limit = stream, limit
        self._digest = hashlib.sha256()
        self.count = self._marked = self._empty = 0

    def read(self, size: int = -1) -> bytes:
        """As of any stream."""
        data = self._stream.read(size)
        self.count += len(data)
        self._empty += not data
        if self._empty > _MAX_EMPTY:
            raise tarfile.ReadError("it ends within a sample; it is cut off")
        if self._limit is not None and self.count > self._limit:
            raise tarfile.ReadError(f"it has more than the {self._limit} bytes that dataset.json records")
        if self.count > self._marked + _BETWEEN_MARKS:
            raise tarfile.ReadError(f"it has a member or headers of more than {_BETWEEN_MARKS} bytes")
        if self._limit is not None:
            self._digest.update(data)
        return data

    def mark(self) -> None:
        """A member is over."""
        self._marked = self.count

    def hexdigest(self) -> str:
        """SHA-256 of what has been read."""
        return self._digest.hexdigest()


def _samples(name: str, stream: _Counted) -> Iterator[dict[str, Any]]:
    files = ({**file, "__url__": name} for file in streamed_files(stream))
    samples: Iterator[dict[str, Any]] = group_by_keys(files)
    return samples


def _check_end(name: str, stream: _Counted, shard: ShardInfo) -> None:
    while stream.read(2**20):  # the padding of a tar
        stream.mark()
    if stream.count < shard.bytes:
        raise tarfile.ReadError(f"it has {stream.count} bytes, not the {shard.bytes} that dataset.json records")
    if stream.hexdigest() != shard.sha256:
        raise InputError(f"Shard {name} has another sha256 than dataset.json records. Copy or prepare the data again.")


def _damaged(name: str, found: int, error: Exception) -> InputError:
    return InputError(f"Shard {name} is damaged after {found} samples: {error.args[0] if error.args else error}.")
