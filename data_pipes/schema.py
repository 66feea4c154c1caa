"""`dataset.json`: what a folder of shards says about itself."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

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
    """One tar file of a split: its name inside the folder, its samples, its size in bytes and its checksum."""

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
    """The content of `dataset.json`, and its folder. `height` and `width` are None where sizes differ."""

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

    def shard_paths(self, name: str) -> list[Path]:
        """Paths of the shards of split `name`, each present and as large as recorded.

        Raises:
            InputError: an unknown split, a missing shard, or one of another size.
        """
        paths = []
        for shard in self.split(name).shards:
            path = self.folder / shard.file
            if not path.is_file():
                raise InputError(f"Shard {path}, listed in {INFO_FILE}, is missing; copy or prepare the data again.")
            size = path.stat().st_size
            if size != shard.bytes:
                raise InputError(
                    f"Shard {path} has {size} bytes, but {INFO_FILE} records {shard.bytes}; "
                    "it is damaged or not fully copied. Copy or prepare the data again."
                )
            paths.append(path)
        return paths


def list_builtin() -> list[str]:
    """Names of the data sets that come with the package, to be read as `builtin:NAME`."""
    return sorted(path.parent.name for path in _BUILTIN_FOLDER.glob(f"*/{INFO_FILE}"))


def save_info(info: DatasetInfo) -> None:
    """Writes `dataset.json` into `info.folder` and flushes it to the disk."""
    content = asdict(info)
    del content["folder"]
    content = {"schema": content.pop("schema"), **content}
    with open(info.folder / INFO_FILE, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_info(path: str | Path) -> DatasetInfo:
    """Reads `dataset.json` of a folder, or of a data set that comes with the package (`builtin:NAME`).

    Raises:
        InputError: no such folder or name, no `dataset.json` in it, or one that cannot be used.
    """
    text = str(path)
    if text.startswith(BUILTIN_PREFIX):
        name = text.removeprefix(BUILTIN_PREFIX)
        if name not in list_builtin():
            raise InputError(f"No built-in data set {name!r}; there is {', '.join(list_builtin()) or 'none'}.")
        folder = _BUILTIN_FOLDER / name
    else:
        folder = Path(path).expanduser()
    file = folder / INFO_FILE
    if not file.is_file():
        raise InputError(_why_no_info(folder))
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read as JSON: {error}.") from error
    return _parse(content, file)


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
        if Path(name).name != name:  # a list from elsewhere must not lead out of the folder
            raise InputError(f"{file}: shard name {name!r} is not a plain file name.")
        return ShardInfo(
            file=name,
            count=need(entry, "count", int),
            bytes=need(entry, "bytes", int),
            sha256=need(entry, "sha256", str),
        )

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
    none = type(None)
    return DatasetInfo(
        schema=schema, name=need(content, "name", str), signal=cast(Literal["image", "points"], signal),
        channels=need(content, "channels", int), height=need(content, "height", int, none),
        width=need(content, "width", int, none), classes=tuple(str(item) for item in need(content, "classes", list)),
        licence=need(content, "licence", str), splits=splits, folder=file.parent,
    )  # fmt: skip
