"""`dataset.json`: what a folder of shards says about itself."""

from __future__ import annotations

import json
import os
import shlex
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from data_pipes.remote import fetch, joined, scheme_of, shown
from mwt.config import SAFE_SCHEMES
from mwt.errors import InputError
from mwt.structs import SignalFacts

SCHEMA_VERSION = 1
INFO_FILE = "dataset.json"
BUILTIN_PREFIX = "builtin:"
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
"""Image files that `data_pipes.prepare folder` takes."""

_BUILTIN_FOLDER = Path(__file__).parent / "builtin"


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """One tar file of a split: its samples, its size in bytes and its checksum.

    `file` is its name inside the folder, or a URL.
    """

    file: str
    count: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """One split: the number of its samples and its shards, in order."""

    count: int
    shards: tuple[ShardInfo, ...]


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """The content of `dataset.json`, and where it lies. `height` and `width` are None where sizes differ.

    `url` is the address of the folder where that is not on this machine; `folder` then only serves to name it.
    """

    name: str
    signal: Literal["image", "points"]
    channels: int
    height: int | None
    width: int | None
    classes: tuple[str, ...]
    licence: str
    splits: dict[str, SplitInfo]
    folder: Path
    schema: int = SCHEMA_VERSION
    url: str | None = None

    @property
    def facts(self) -> SignalFacts:
        """What a model has to know about the signals."""
        return SignalFacts(
            kind=self.signal, channels=self.channels, height=self.height, width=self.width, classes=self.classes
        )

    def split(self, name: str) -> SplitInfo:
        """The split `name`.

        Raises:
            InputError: there is none of that name; the message lists those there are.
        """
        if name not in self.splits:
            raise InputError(f"{self.folder} has no split {name!r}; it has {', '.join(self.splits) or 'none'}.")
        return self.splits[name]

    @property
    def is_builtin(self) -> bool:
        """Whether it comes with the package."""
        return self.url is None and self.folder.is_relative_to(_BUILTIN_FOLDER)

    def source(self, shard: ShardInfo) -> Path | str:
        """Where a shard lies: the path of a file, or a URL."""
        if scheme_of(shard.file) is not None:
            return shard.file
        return self.folder / shard.file if self.url is None else joined(self.url, shard.file)


def check_shard(path: Path, shard: ShardInfo) -> None:
    """Raises InputError unless the shard is there and as large as recorded."""
    if not path.is_file():
        raise InputError(f"Shard {path}, listed in {INFO_FILE}, is missing; copy or prepare the data again.")
    size = path.stat().st_size
    if size != shard.bytes:
        raise InputError(
            f"Shard {path} has {size} bytes, but {INFO_FILE} records {shard.bytes}; "
            "it is damaged or not fully copied. Copy or prepare the data again."
        )


def list_builtin() -> list[str]:
    """Names of the data sets that come with the package, to be read as `builtin:NAME`."""
    return sorted(path.parent.name for path in _BUILTIN_FOLDER.glob(f"*/{INFO_FILE}"))


def save_info(info: DatasetInfo) -> None:
    """Writes `dataset.json` into `info.folder` and flushes it to the disk."""
    content = asdict(info)
    del content["folder"], content["url"]
    content = {"schema": content.pop("schema"), **content}
    with open(info.folder / INFO_FILE, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_info(path: str | Path, *, schemes: tuple[str, ...] = SAFE_SCHEMES) -> DatasetInfo:
    """Reads `dataset.json` of a folder, of one at a URL, or of a data set that comes with the package (`builtin:NAME`).

    Raises:
        InputError: no such folder or name, no `dataset.json` in it, or one that cannot be used.
    """
    text = str(path)
    if text.startswith(BUILTIN_PREFIX):
        name = text.removeprefix(BUILTIN_PREFIX)
        if name not in list_builtin():
            raise InputError(f"No built-in data set {name!r}; there is {', '.join(list_builtin()) or 'none'}.")
        folder = _BUILTIN_FOLDER / name
    elif isinstance(path, str) and scheme_of(path) is not None:
        return _read_remote(path, schemes)
    else:
        folder = Path(path).expanduser()
    file = folder / INFO_FILE
    if not file.is_file():
        raise InputError(_why_no_info(folder))
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read as JSON: {error}.") from error
    return _parse(content, file)


def _read_remote(url: str, schemes: tuple[str, ...]) -> DatasetInfo:
    file = joined(url, INFO_FILE)
    try:
        content = json.loads(fetch(file, schemes))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{shown(file)} cannot be read as JSON: {error}.") from error
    return replace(_parse(content, Path(shown(file))), url=url)


def _why_no_info(folder: Path) -> str:
    prepare = "Make one with `python -m data_pipes.prepare NAME --out DIR` (`--help` lists the names)."
    if folder.is_file():
        return f"{folder} is a file; give the folder that holds {INFO_FILE} and the shards."
    if not folder.is_dir():
        return f"No data folder at {folder}. {prepare}"
    if not any(folder.iterdir()):
        return f"Data folder {folder} is empty. {prepare}"
    if _looks_like_images(folder):
        out = f"{folder.absolute().name}-shards"
        command = f"python -m data_pipes.prepare folder --src {shlex.quote(str(folder))} --out {shlex.quote(out)}"
        return f"{folder} has no {INFO_FILE}; it looks like images in class folders. Make shards of them: {command}"
    return f"{folder} has no {INFO_FILE}, so it is not a folder of shards. {prepare}"


def _looks_like_images(folder: Path) -> bool:
    """Whether an image lies in CLASS/ or SPLIT/CLASS/; looks at a few entries of each folder only."""
    for depth in ("*/*", "*/*/*"):
        for count, path in enumerate(folder.glob(depth)):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                return True
            if count > 1000:
                break
    return False


def _parse(content: Any, file: Path) -> DatasetInfo:
    def need(mapping: Any, key: str, *kinds: type) -> Any:
        if not isinstance(mapping, dict) or key not in mapping:
            raise InputError(f"{file} lacks the key {key!r}; prepare the data again.")
        value = mapping[key]
        if not isinstance(value, kinds) or isinstance(value, bool):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise InputError(f"{file}: {key!r} is {value!r}, not of type {wanted}.")
        return value

    def shard(entry: Any) -> ShardInfo:
        name = need(entry, "file", str)
        if scheme_of(name) is None and (
            Path(name).name != name or name in ("", ".", "..")
        ):  # a list from elsewhere must not lead out of the folder
            raise InputError(f"{file}: shard name {name!r} is neither a plain file name nor a URL.")
        count, size = need(entry, "count", int), need(entry, "bytes", int)
        if count < 0 or size < 0:
            raise InputError(f"{file}: shard {name} has a negative count or size.")
        return ShardInfo(file=name, count=count, bytes=size, sha256=need(entry, "sha256", str))

    schema = need(content, "schema", int)
    if schema != SCHEMA_VERSION:
        raise InputError(
            f"{file} is of schema version {schema}, this program reads version {SCHEMA_VERSION}; "
            "prepare the data again, or update the program."
        )
    signal = need(content, "signal", str)
    if signal not in ("image", "points"):
        raise InputError(f"{file}: signal {signal!r} is not known; it must be image or points.")
    splits = {}
    for name, entry in need(content, "splits", dict).items():
        shards = tuple(shard(item) for item in need(entry, "shards", list))
        splits[name] = SplitInfo(count=need(entry, "count", int), shards=shards)
        if splits[name].count != sum(item.count for item in shards):
            raise InputError(f"{file}: the count of split {name!r} is not the sum of its shards' counts.")
        counted = Counter(item.file for item in shards)
        if twice := [name for name, number in counted.items() if number > 1]:
            raise InputError(f"{file} lists {shown(twice[0])} twice in split {name!r}; its samples would count twice.")
    if not need(content, "classes", list):
        raise InputError(f"{file}: 'classes' is empty; there must be one at least.")
    for key in ("channels", "height", "width"):
        if (value := content.get(key)) is not None and isinstance(value, int) and value < 1:
            raise InputError(f"{file}: {key!r} is {value}; it must be positive.")
    none = type(None)
    return DatasetInfo(
        schema=schema, name=need(content, "name", str), signal=cast(Literal["image", "points"], signal),
        channels=need(content, "channels", int), height=need(content, "height", int, none),
        width=need(content, "width", int, none), classes=tuple(str(item) for item in need(content, "classes", list)),
        licence=need(content, "licence", str), splits=splits, folder=file.parent,
    )  # fmt: skip
