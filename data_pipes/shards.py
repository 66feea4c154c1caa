"""Samples of one tar file, in order, undecoded."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from webdataset.tariterators import group_by_keys, tar_file_expander

from mwt.errors import InputError


def iterate_shard(path: Path, count: int | None) -> Iterator[dict[str, Any]]:
    """The first `count` samples of a shard (None: all) as webdataset gives them: `{"__key__": str, EXTENSION: bytes}`.

    Raises:
        InputError: the file is no whole tar file, or holds fewer than `count` samples.
    """
    found = 0
    with open(path, "rb") as file:
        samples = group_by_keys(tar_file_expander([{"url": str(path), "stream": file}], eof_value=None))
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
