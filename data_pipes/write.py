"""Samples -> a folder of shards with `dataset.json`, complete or not there at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from webdataset import TarWriter

from data_pipes.decode import IMAGE_FORMATS
from data_pipes.index import begin_index
from data_pipes.schema import DatasetInfo, ShardInfo, SplitInfo, save_info
from mwt.errors import InputError
from mwt.runtime import sync, write_json
from mwt.structs import SignalFacts

SHARD_BYTES = 128 * 2**20
"""A shard is closed when it has grown to this size."""
EXTENSIONS = frozenset({*IMAGE_FORMATS, "npy"} - {"jpeg"})
_JOURNAL, _LOCK, _DATA, _OPEN_SHARD = "progress.json", "lock", "data", "unfinished.tar"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One stored sample: encoded bytes, the extension that says how, and the class number."""

    extension: str
    data: bytes
    label: int


Samples = Iterable[Sample] | Callable[[int], Iterable[Sample]]
"""The samples of a split, or a function that gives them from a position on: then none is made twice after a restart."""


def write_dataset(
    out: str | Path,
    *,
    name: str,
    facts: SignalFacts,
    licence: str,
    splits: Mapping[str, Samples],
    shard_bytes: int = SHARD_BYTES,
    arguments: Mapping[str, Any] | None = None,
) -> DatasetInfo:
    """Writes all samples of all splits to the new folder `out`; equal samples give equal bytes.

    Everything goes to a hidden folder beside `out` first, which takes its name only when complete and flushed.
    Without `arguments` that folder is removed if anything fails (Ctrl-C too). `arguments` are whatever the samples
    depend on, as JSON can hold it: given, finished shards outlive every failure, kill -9 and a power cut too, and the
    next call with equal arguments goes on after the last of them, to the same bytes.

    Raises:
        InputError: `out` exists, its disk is full or not writable, a sample is malformed, another process is at it,
            or what lies there was begun with other arguments.
    """
    out = Path(os.path.abspath(Path(out).expanduser()))
    check_new(out)
    begun_with = {
        "name": name, "facts": asdict(facts), "licence": licence, "shard_bytes": shard_bytes,
        "splits": list(splits), **(arguments or {}),
    }  # fmt: skip
    partial = partial_folder(out) if arguments is not None else out.parent / f".{out.name}.partial-{os.getpid()}"
    work = _Work(partial, json.loads(json.dumps(begun_with)), shard_bytes, keep=arguments is not None)
    with _clear_errors(out, work), work:
        written = {split: work.write_split(split, samples, facts) for split, samples in splits.items()}
        info = DatasetInfo(
            name=name, signal=facts.kind, channels=facts.channels, height=facts.height, width=facts.width,
            classes=facts.classes, licence=licence, splits=written, folder=partial / _DATA,
        )  # fmt: skip
        save_info(info)
        sync(partial / _DATA)
        check_new(out)  # somebody may have made it meanwhile
        (partial / _DATA).rename(out)
        sync(out.parent)
        shutil.rmtree(partial, ignore_errors=True)
    return replace(info, folder=out)


def check_new(out: Path) -> None:
    """Raises InputError if there is anything at `out`: prepared data is never overwritten."""
    if out.exists() or out.is_symlink():
        raise InputError(f"{out} exists already; choose another --out, or remove it first.")


def partial_folder(out: Path) -> Path:
    """Where the shards of an unfinished `out` lie."""
    out = Path(os.path.abspath(out))
    return out.parent / f".{out.name}.partial"


def finished_shards(partial: Path) -> dict[str, list[ShardInfo]]:
    """Finished shards of an unfinished folder, by split; empty if there is none.

    Raises:
        InputError: its journal cannot be read.
    """
    return _read_journal(partial)[1]


def _read_journal(partial: Path) -> tuple[Any, dict[str, list[ShardInfo]]]:
    try:
        content = json.loads((partial / _JOURNAL).read_text(encoding="utf-8"))
        shards = {split: [ShardInfo(**entry) for entry in part] for split, part in content["shards"].items()}
        return content["begun_with"], shards
    except FileNotFoundError:
        return None, {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{partial / _JOURNAL} cannot be read; remove {partial} to begin anew.") from error


class _Work:
    """The hidden folder: finished shards in `data`, a journal of them, and a lock while somebody is at it."""

    def __init__(self, folder: Path, begun_with: dict[str, Any], shard_bytes: int, *, keep: bool) -> None:
        self.folder = folder
        self.shards: dict[str, list[ShardInfo]] = {}
        self.keep = keep
        self._begun_with = begun_with
        self._shard_bytes = shard_bytes
        self._lock: int | None = None

    @property
    def finished(self) -> int:
        """How many shards are finished."""
        return sum(len(part) for part in self.shards.values())

    def __enter__(self) -> _Work:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not try_lock(self._lock):
                raise InputError(f"Another process is writing to {self.folder}; wait for it, or choose another --out.")
            self._take_up()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def _take_up(self) -> None:
        before, shards = _read_journal(self.folder)
        if any(shards.values()) and before != self._begun_with:
            names = sorted(key for key in {*before, *self._begun_with} if before.get(key) != self._begun_with.get(key))
            raise InputError(
                f"{self.folder} holds an unfinished preparation that was begun with other arguments or files "
                f"({', '.join(names)}). Give those again to go on with it, remove it to begin anew, or choose another "
                "--out."
            )
        for shard in (shard for part in shards.values() for shard in part):
            path = self.folder / _DATA / shard.file
            if not path.is_file() or path.stat().st_size != shard.bytes:
                raise InputError(f"{path} is not as it was finished; remove {self.folder} to begin anew.")
        self.shards = shards
        (self.folder / _DATA).mkdir(exist_ok=True)
        for half in (self.folder / _DATA).glob(".*"):  # an index that was being written
            half.unlink()
        self._note()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            (self.folder / _OPEN_SHARD).unlink(missing_ok=True)
            if not (self.keep and self.finished):
                shutil.rmtree(self.folder, ignore_errors=True)
        assert self._lock is not None
        os.close(self._lock)

    def _note(self) -> None:
        shards = {split: [asdict(shard) for shard in part] for split, part in self.shards.items()}
        write_json(self.folder / _JOURNAL, {"begun_with": self._begun_with, "shards": shards})
        sync(self.folder)

    def write_split(self, split: str, samples: Samples, facts: SignalFacts) -> SplitInfo:
        """Writes what is not yet written of a split. A shard counts as finished when it is on the disk as a whole."""
        shards = self.shards.setdefault(split, [])
        position = sum(shard.count for shard in shards)
        stream = iter(samples(position) if callable(samples) else islice(samples, position, None))
        sample = next(stream, None)
        unfinished = self.folder / _OPEN_SHARD
        while sample is not None:
            first = position
            with open(unfinished, "wb") as file:
                # USTAR with fixed owner, mode and time: the bytes depend on the samples only
                with TarWriter(
                    file, user="mwt", group="mwt", mode=0o444, mtime=0, encoder=False, compress=False
                ) as tar:
                    while sample is not None and (position == first or tar.tarstream.offset < self._shard_bytes):
                        tar.write(_content(sample, position, split, facts))
                        position += 1
                        sample = next(stream, None)
                file.flush()
                os.fsync(file.fileno())
            path = self.folder / _DATA / f"{split}-{len(shards):06d}.tar"
            digest = begin_index(unfinished, path)
            size = unfinished.stat().st_size
            os.replace(unfinished, path)
            sync(path.parent)
            shards.append(ShardInfo(file=path.name, count=position - first, bytes=size, sha256=digest))
            self._note()
        return SplitInfo(count=position, shards=tuple(shards))


def try_lock(handle: int) -> bool:
    """Locks an open file until it is closed or the process ends, however it ends. False: another process has it."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _clear_errors(out: Path, work: _Work) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            kept = work.finished if work.keep else 0
            what = f"{kept} finished shards were kept in {work.folder}: make room and run the same command again, or"
            kept_or_not = f"{what} choose another --out." if kept else "nothing was kept. Choose another --out."
            raise InputError(f"The disk of {out} is full; {kept_or_not}") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise InputError(f"No permission to write to {out.parent}; choose another --out.") from error
        raise InputError(f"{out} cannot be written: {error}.") from error


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
