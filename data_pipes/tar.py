"""Tar files that nobody vouches for: where their members lie, found in bounded memory and time."""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

MAX_MEMBER_BYTES = 2**28
"""A member of a shard is one encoded signal; a larger one is refused."""
MAX_NAME_BYTES = 1024
"""A longer name of a member is refused."""
MAX_HEADER_BYTES = 2**20
"""All headers before one member (long names and the like have headers of their own) are at most so large."""
_BLOCK = tarfile.BLOCKSIZE
_AHEAD = 2**20
_OCTAL = re.compile(rb" *([0-7]*)[ \0]*")
# RecursionError: headers that follow on each other; OverflowError: places beyond any file
_ERRORS = (tarfile.TarError, ValueError, EOFError, RecursionError, OverflowError)


class DamagedTarError(Exception):
    """Nothing after this place can be read."""


class HashedFile:
    """A file that is read once, on the whole forwards; the SHA-256 of all its bytes comes with it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._place, self._hashed = file, 0, 0
        self._digest = hashlib.sha256()
        file.seek(0)

    def seek(self, place: int) -> int:
        """As of any file."""
        self._place = self._file.seek(place)
        return place

    def tell(self) -> int:
        """As of any file."""
        return self._place

    def read(self, size: int) -> bytes:
        """As of any file. What was passed over is read now, for its hash."""
        if self._place > self._hashed:
            wanted = self._place
            self._read_up_to(wanted)
            self.seek(wanted)
        data = self._file.read(size)
        self._place += len(data)
        if (fresh := self._place - self._hashed) > 0 and data:
            self._digest.update(memoryview(data)[-fresh:])
            self._hashed = self._place
        return data

    def hexdigest(self) -> str:
        """SHA-256 of the whole file, whose rest is read for it."""
        self._read_up_to(None)
        return self._digest.hexdigest()

    def _read_up_to(self, end: int | None) -> None:
        self._file.seek(self._hashed)
        while data := self._file.read(_AHEAD if end is None else min(_AHEAD, end - self._hashed)):
            self._digest.update(data)
            self._hashed += len(data)


def checked_name(name: str) -> str:
    """The name of a member as UTF-8 can hold it.

    Raises:
        DamagedTarError: it leads out of the folder, or is too long.
    """
    encoded = name.encode("utf-8", "replace")  # tarfile keeps other bytes as surrogates
    if len(encoded) > MAX_NAME_BYTES:
        raise DamagedTarError(f"it holds a name of {len(encoded)} bytes; at most {MAX_NAME_BYTES} are taken")
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        raise DamagedTarError(f"it holds {name!r}, which leads out of the folder")
    return encoded.decode("utf-8")


def check_length(length: int) -> None:
    """Raises DamagedTarError for a member of an impossible size."""
    if not 0 <= length <= MAX_MEMBER_BYTES:
        raise DamagedTarError(f"it holds a member of {length} bytes; at most {MAX_MEMBER_BYTES} are taken")


def members(file: HashedFile, size: int) -> Iterator[tuple[str, int, int]]:
    """Name, place and length of every regular file in a tar of `size` bytes; links and other kinds are passed over.

    Plain headers, which is what `data_pipes.write` makes, are read here: the standard library takes five times as long
    for them. From the first header of another kind on, that does it.

    Raises:
        DamagedTarError: no tar file, one that is cut off, or one with a name or a size that is refused.
    """
    place = 0
    while True:
        file.seek(place)
        header = file.read(_BLOCK)
        if not header and place <= size:
            return
        if len(header) < _BLOCK:
            raise DamagedTarError("it ends within a header; it is cut off, or not fully copied")
        if header.count(0) == _BLOCK:
            return
        if header[156:157] not in (b"0", b"\0", b"5") or header[124:125] >= b"\x80":
            break
        length, checked = _octal(header[124:136]), _octal(header[148:156])
        if length is None or checked is None:
            raise DamagedTarError("a header that is no tar header")
        if checked != sum(header) - sum(header[148:156]) + 8 * 32:
            raise DamagedTarError("a header with a wrong checksum")
        _check_extent(place + _BLOCK, length, size)
        name = header[:100].split(b"\0", 1)[0]
        prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
        if header[156:157] != b"5":
            whole = (prefix + b"/" + name if prefix else name).decode("utf-8", "replace")
            yield checked_name(whole), place + _BLOCK, length
        place += _BLOCK + -(-length // _BLOCK) * _BLOCK
    yield from _other_members(file, place, size)


def _octal(field: bytes) -> int | None:
    """The number in a field of a header; int() alone would take signs and underscores, too."""
    found = _OCTAL.fullmatch(field)
    return int(found[1] or b"0", 8) if found else None


def _check_extent(place: int, length: int, size: int) -> None:
    check_length(length)
    if place + length > size:
        raise DamagedTarError("it ends within a sample; it is cut off, or not fully copied")


class _Headers:
    """What tarfile sees of a file: headers, so much of them between two members and no more."""

    def __init__(self, file: HashedFile) -> None:
        self._file = file
        self.left = MAX_HEADER_BYTES
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self.left:
            raise DamagedTarError(f"headers of more than {MAX_HEADER_BYTES} bytes, or of a negative size")
        self.left -= size
        return self._file.read(size)


def _other_members(file: HashedFile, place: int, size: int) -> Iterator[tuple[str, int, int]]:
    file.seek(place)
    headers = _Headers(file)
    try:
        with tarfile.open(fileobj=cast(BinaryIO, headers), mode="r:") as tar:
            for member in tar:
                if member.offset_data <= place:  # a negative size leads back
                    raise DamagedTarError("a header of a negative size")
                place = member.offset_data
                check_length(member.size)
                if member.isreg() and not member.issparse():
                    _check_extent(place, member.size, size)
                    yield checked_name(member.name), place, member.size
                headers.left = MAX_HEADER_BYTES
                tar.members = []  # type: ignore[attr-defined]  # the list would hold every member
            # tarfile takes a bad header for the end
            file.seek(tar.offset)
            rest = file.read(_BLOCK)
            if tar.offset < place or rest.count(0) != len(rest):
                raise DamagedTarError("a header that is no tar header")
    except _ERRORS as error:
        raise DamagedTarError(str(error) or "a header that is no tar header") from error


def streamed_files(stream: Any) -> Iterator[dict[str, Any]]:
    """The regular files of a tar that arrives, as webdataset's stages pass them on: `fname` and `data`.

    Uncompressed tar files only: others could hide any size. `stream` has `read`, and `mark`, which is called at the
    end of every member: what it gives out between two marks is at most a member and its headers.

    Raises:
        DamagedTarError: as `members`.
    """
    try:
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                check_length(member.size)
                if member.isreg() and not member.issparse():
                    opened = tar.extractfile(member)
                    assert opened is not None, "a regular file"
                    yield {"fname": checked_name(member.name), "data": opened.read()}
                stream.mark()
                tar.members = []  # type: ignore[attr-defined]  # as above
    except _ERRORS as error:
        raise DamagedTarError(str(error) or "a header that is no tar header") from error
