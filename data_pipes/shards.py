"""Samples of one tar file, in order, undecoded."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from webdataset.tariterators import group_by_keys, tar_file_expander

from mwt.errors import InputError

_BLOCK = 512


def iterate_shard(path: Path, count: int | None) -> Iterator[dict[str, Any]]:
    """The first `count` samples of a shard (None: all) as webdataset gives them: `{"__key__": str, EXTENSION: bytes}`.

    Raises:
        InputError: the file is no whole tar file, or holds fewer than `count` samples.
    """
    found = 0
    with open(path, "rb") as file:
        samples = group_by_keys(_members(file, str(path)))
        while count is None or found < count:
            try:
                sample = next(samples, None)
            except (tarfile.TarError, OSError, ValueError, EOFError, AssertionError) as error:
                raise InputError(f"Shard {path} is damaged after {found} samples: {error.args[0]}.") from error
            if sample is None:
                if count is None:
                    return
                raise InputError(f"Shard {path} holds {found} samples, not the {count} that dataset.json records.")
            found += 1
            yield sample


def _members(file: BinaryIO, url: str) -> Iterator[dict[str, Any]]:
    """Files of a tar as `group_by_keys` wants them.

    Plain ustar members, all that `data_pipes.write` makes, are read here: tarfile takes 50 microseconds for each, which
    is most of the time for tens of thousands of small images. From the first other member on (long names, folders, GNU
    or pax headers) tarfile reads the rest, through webdataset; a tar file cut at a member is a tar file.
    """
    while header := file.read(_BLOCK):
        plain = (
            len(header) == _BLOCK
            and header[257:263] == b"ustar\0"
            and header[156] in b"0\0"
            and header[345] == 0  # no prefix to the name
            and header[124] in b"01234567"
            and not header.startswith(b"__")  # webdataset's own notes
        )
        if not plain:
            file.seek(-len(header), 1)
            yield from tar_file_expander([{"url": url, "stream": file}], eof_value=None)
            return
        size = int(header[124:135], 8)
        padded = size + -size % _BLOCK
        data = file.read(padded)
        if len(data) < padded:
            raise tarfile.ReadError("unexpected end of data")
        yield {"fname": header[:100].partition(b"\0")[0].decode(), "data": data[:size], "__url__": url}
