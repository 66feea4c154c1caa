"""Samples -> a folder of shards with `dataset.json`, complete or not there at all."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from webdataset import TarWriter

from data_pipes.decode import IMAGE_FORMATS
from data_pipes.schema import DatasetInfo, ShardInfo, SplitInfo, save_info
from mwt.errors import InputError
from mwt.runtime import sync
from mwt.structs import SignalFacts

SHARD_BYTES = 128 * 2**20
"""A shard is closed when it has grown to this size."""
EXTENSIONS = frozenset({*IMAGE_FORMATS, "npy"} - {"jpeg"})


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One stored sample: encoded bytes, the extension that says how, and the class number."""

    extension: str
    data: bytes
    label: int


def write_dataset(
    out: str | Path,
    *,
    name: str,
    facts: SignalFacts,
    licence: str,
    splits: Mapping[str, Iterable[Sample]],
    shard_bytes: int = SHARD_BYTES,
) -> DatasetInfo:
    """Writes all samples of all splits to the new folder `out`; equal samples give equal bytes.

    Everything goes to a hidden folder beside `out` first, which takes its name only when complete and flushed, and is
    removed if anything fails (Ctrl-C too).

    Raises:
        InputError: `out` exists, its disk is full or not writable, or a sample is malformed.
    """
    out = Path(os.path.abspath(Path(out).expanduser()))
    check_new(out)
    hidden = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:
        with _clear_errors(out):
            hidden.mkdir(parents=True)
            written = {split: _write_split(hidden, split, part, facts, shard_bytes) for split, part in splits.items()}
            info = DatasetInfo(
                name=name, signal=facts.kind, channels=facts.channels, height=facts.height, width=facts.width,
                classes=facts.classes, licence=licence, splits=written, folder=hidden,
            )  # fmt: skip
            save_info(info)
            sync(hidden)
            check_new(out)  # somebody may have made it meanwhile
            hidden.rename(out)
            sync(out.parent)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    return replace(info, folder=out)


def check_new(out: Path) -> None:
    """Raises InputError if there is anything at `out`: prepared data is never overwritten."""
    if out.exists() or out.is_symlink():
        raise InputError(f"{out} exists already; choose another --out, or remove it first.")


@contextmanager
def _clear_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"The disk of {out} is full; nothing was kept. Choose another --out.") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise InputError(f"No permission to write to {out.parent}; choose another --out.") from error
        raise InputError(f"{out} cannot be written: {error}.") from error


def _write_split(
    folder: Path, split: str, samples: Iterable[Sample], facts: SignalFacts, shard_bytes: int
) -> SplitInfo:
    shards: list[ShardInfo] = []
    position = 0
    stream = iter(samples)
    sample = next(stream, None)
    while sample is not None:
        path, first = folder / f"{split}-{len(shards):06d}.tar", position
        with open(path, "wb") as file:
            # USTAR with fixed owner, mode and time: the bytes depend on the samples only
            with TarWriter(file, user="mwt", group="mwt", mode=0o444, mtime=0, encoder=False, compress=False) as tar:
                while sample is not None and (position == first or tar.tarstream.offset < shard_bytes):
                    tar.write(_content(sample, position, split, facts))
                    position += 1
                    sample = next(stream, None)
            file.flush()
            os.fsync(file.fileno())
        with open(path, "rb") as finished:
            digest = hashlib.file_digest(finished, "sha256").hexdigest()
        shards.append(ShardInfo(file=path.name, count=position - first, bytes=path.stat().st_size, sha256=digest))
    return SplitInfo(count=position, shards=tuple(shards))


def _content(sample: Sample, position: int, split: str, facts: SignalFacts) -> dict[str, bytes | str]:
    if sample.extension not in EXTENSIONS:
        raise InputError(
            f"Sample {position} of {split!r}: .{sample.extension} cannot be stored; "
            f"what can is {', '.join(sorted(EXTENSIONS))}."
        )
    if not 0 <= sample.label < len(facts.classes):
        last = len(facts.classes) - 1
        raise InputError(f"Sample {position} of {split!r}: label {sample.label} is not in 0 … {last}.")
    return {"__key__": f"{position:08d}", sample.extension: sample.data, "cls": str(sample.label).encode()}
