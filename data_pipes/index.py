"""Where the samples of a local shard lie: an index beside the tar, so that any sample is one read.

The index of `NAME.tar` is `NAME.tar.index`, a safetensors file: for each sample its key, the kind, place, length and
CRC-32 of its signal, and its label as it is written. `data_pipes.prepare` makes it with the shard. For a shard without
one it is made when that is first opened, in one pass over the whole file (SHA-256 and CRC-32 of what is read once:
about a second per gigabyte and thread, or as fast as the disk), written beside it under another name first and then
renamed, or kept in memory where the folder cannot be written to.

It is used only where it was made of the bytes that dataset.json records (SHA-256), for a file of this size and this
time of modification (a copy that does not keep it is gone through again), and is itself unchanged (its own SHA-256);
otherwise the shard is gone through again. So changed bytes are noticed when a shard is opened, and
those that change unseen (a failing disk) when they are read, by their CRC-32: about 1 per cent of decoding a JPEG.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from data_pipes.decode import EXTENSIONS, MAX_LABEL_BYTES
from data_pipes.schema import ShardInfo
from data_pipes.tar import DamagedTarError, HashedFile, members
from mwt.errors import InputError

INDEX_SUFFIX = ".index"
_VERSION = "2"
_BUFFER = 2**18
_KINDS = ("", *EXTENSIONS)  # "" is a sample without exactly one signal
_ARRAYS = {"key": "S", "kind": "u1", "offset": "i8", "size": "i8", "crc": "u4", "label": f"S{MAX_LABEL_BYTES}"}
_AGAIN = "Copy or prepare the data again."


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """The samples of one shard, in order. `fault` says what is wrong with the shard as a whole, if anything is."""

    path: Path
    key: np.ndarray
    """S [n]: the name of the sample."""
    kind: np.ndarray
    """u1 [n]: number of the signal's extension in `_KINDS`."""
    offset: np.ndarray
    """i8 [n]: first byte of the signal in the tar."""
    size: np.ndarray
    """i8 [n]: its length in bytes."""
    crc: np.ndarray
    """u4 [n]: CRC-32 of the signal's bytes."""
    label: np.ndarray
    """S8 [n]: what the sample's `.cls` holds; empty where there is none or it is longer."""
    fault: str | None = None

    def __len__(self) -> int:
        return len(self.key)

    def name(self, row: int) -> str:
        """The name of a sample."""
        return bytes(self.key[row]).decode("utf-8", "replace")

    def extension(self, row: int) -> str:
        """The extension of a sample's signal; "" where it has none, or several."""
        return _KINDS[self.kind[row]]


def open_index(path: Path, shard: ShardInfo, *, keep: bool = True) -> ShardIndex:
    """The index of a shard: read if there is a valid one, made (and kept beside the shard, with `keep`) otherwise.

    Several processes that open a shard at once make it one after the other; all but the first find it there.

    Raises:
        InputError: the shard cannot be read at all. Whatever else is wrong with it stands in `fault`.
    """
    try:
        with open(path, "rb", buffering=_BUFFER) as file, _alone(file):
            state = os.fstat(file.fileno())
            proof = _proof(shard.sha256, state)
            if (found := _read(path, proof)) is not None:
                return found
            hashed = HashedFile(file)
            columns, damage = _scan(hashed, path, state.st_size)
            digest = hashed.hexdigest()
            if digest != shard.sha256:
                why = f" and {state.st_size} bytes, not {shard.bytes}" if state.st_size != shard.bytes else ""
                fault = f"Shard {path} has another sha256 than dataset.json records{why}"
                # An index of the bytes as they were recorded tells by its CRC-32s which samples have changed.
                found = _read(path, {key: proof[key] for key in ("version", "kinds", "sha256")})
                if found is not None:
                    return replace(found, fault=f"{fault}. {_AGAIN}")
    except OSError as error:
        raise InputError(f"Shard {path} cannot be read ({error.strerror or error}). {_AGAIN}") from error
    faults = [*([fault] if digest != shard.sha256 else []), *([damage] if damage else [])]
    index = ShardIndex(path=path, fault=f"{'; '.join(faults)}. {_AGAIN}" if faults else None, **columns)
    if keep and not faults:
        _write(index, proof)
    return index


def begin_index(finished: Path, path: Path) -> str:
    """Goes through a shard that was just written, and writes the index of it for when it is called `path`.

    Returns:
        Its SHA-256, which comes with it.
    """
    with open(finished, "rb", buffering=_BUFFER) as file:
        state = os.fstat(file.fileno())
        hashed = HashedFile(file)
        columns, damage = _scan(hashed, finished, state.st_size)
        digest = hashed.hexdigest()
    if damage is None:
        _write(ShardIndex(path=path, **columns), _proof(digest, state))
    return digest


def _proof(sha256: str, state: os.stat_result) -> dict[str, str]:
    return {
        "version": _VERSION, "kinds": ",".join(_KINDS), "sha256": sha256,
        "bytes": str(state.st_size), "mtime": str(state.st_mtime_ns),
    }  # fmt: skip


# ---- through the tar, once ---------------------------------------------------------------------------------------


def _scan(file: HashedFile, path: Path, size: int) -> tuple[dict[str, Any], str | None]:
    """Every sample of a tar: the arrays of its index, and what is wrong with it."""
    columns: dict[str, list[Any]] = {name: [] for name in _ARRAYS}
    fault = None
    last = None
    try:
        for name, offset, length in members(file, size):
            stem, _, extension = PurePosixPath(name).name.partition(".")  # as webdataset parts them
            if not stem or not extension:
                continue
            key, extension = name[: len(name) - len(extension) - 1], extension.lower()
            file.seek(offset)
            data = file.read(length)
            if key != last:
                last = key
                for column, empty in (
                    ("key", key.encode()),
                    ("kind", 0),
                    ("offset", 0),
                    ("size", 0),
                    ("crc", 0),
                    ("label", b""),
                ):
                    columns[column].append(empty)
            if extension == "cls":
                columns["label"][-1] = data if len(data) <= MAX_LABEL_BYTES else b"too long"
            elif extension in EXTENSIONS:
                several = columns["size"][-1] > 0
                columns["kind"][-1] = 0 if several else _KINDS.index(extension)
                columns["offset"][-1], columns["size"][-1], columns["crc"][-1] = offset, length, zlib.crc32(data)
    except DamagedTarError as error:
        fault = f"Shard {path} is damaged after {len(columns['key'])} samples: {error.args[0]}"
    return {name: np.array(column, _ARRAYS[name]) for name, column in columns.items()}, fault


# ---- the file beside it ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _alone(file: BinaryIO) -> Iterator[None]:
    """While one process makes an index, others wait; where a file system has no locks, they do it all at once."""
    with contextlib.suppress(OSError, ImportError):  # no such locks on Windows
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)  # ends when the file is closed
    yield


def _write(index: ShardIndex, proof: dict[str, str]) -> None:
    arrays = {name: getattr(index, name) for name in _ARRAYS}
    for name in ("key", "label"):  # safetensors has no strings
        arrays[name] = arrays[name].view("u1").reshape(len(index), arrays[name].itemsize)
    target = index.path.with_name(index.path.name + INDEX_SUFFIX)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            file.write(save(arrays, metadata={**proof, "digest": _digest(arrays)}))
            file.flush()
            os.fsync(file.fileno())  # else a power cut could leave the name without the bytes
        partial.replace(target)
    except OSError:  # a folder that cannot be written to, a full disk: the index in memory does
        with contextlib.suppress(OSError):
            partial.unlink()


def _digest(arrays: dict[str, np.ndarray]) -> str:
    """SHA-256 of the arrays as they are stored."""
    digest = hashlib.sha256()
    for name in _ARRAYS:
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def _read(path: Path, proof: dict[str, str]) -> ShardIndex | None:
    """The index that is there, if it says all of `proof` of itself and is whole."""
    try:
        with safe_open(path.with_name(path.name + INDEX_SUFFIX), framework="numpy") as file:
            said = file.metadata() or {}
            if any(said.get(key) != value for key, value in proof.items()):
                return None
            arrays = {name: file.get_tensor(name) for name in _ARRAYS}
        if said["digest"] != _digest(arrays):  # of labels and places nothing else would notice a change
            return None
        size = int(said["bytes"])
        for name in ("key", "label"):
            arrays[name] = np.ascontiguousarray(arrays[name]).view(f"S{arrays[name].shape[1]}")[:, 0]
    except (OSError, ValueError, KeyError, IndexError, SafetensorError):
        return None
    index, count = ShardIndex(path=path, **arrays), len(arrays["key"])
    good = (
        all(array.shape == (count,) for array in arrays.values())
        and all(arrays[name].dtype == kind for name, kind in _ARRAYS.items() if name != "key")
        and bool((index.kind < len(_KINDS)).all())
        and bool(((index.offset >= 0) & (index.size >= 0) & (index.offset + index.size <= size)).all())
    )
    return index if good else None
