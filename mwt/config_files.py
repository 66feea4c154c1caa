"""Configuration files: YAML and `key=value` into the dataclasses of `mwt.config`, and back.

Order of precedence: the defaults, then the file's `base:`, then the file, then the command line. `variant` sets the
values that make a published model (`VARIANTS`) at the level where it is named; keys beside it override it.
"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from mwt.config import VARIANTS
from mwt.errors import InputError

ConfigT = TypeVar("ConfigT")


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _told(error: OmegaConfBaseException) -> str:
    """Its first line; of a key that is like none there is, also which there are."""
    line, block = _one_line(error), getattr(error, "object_type", None)
    if isinstance(error, ConfigKeyError) and "Did you mean" not in line and dataclasses.is_dataclass(block):
        line += f"; there are {', '.join(entry.name for entry in dataclasses.fields(block))}"
    return line


def _variant_overrides(name: object, where: str) -> DictConfig:
    if name not in VARIANTS:
        raise InputError(f"{where}: variant {name!r} is not known; choose one of {', '.join(VARIANTS)}.")
    return OmegaConf.from_dotlist([f"{key}={value}" for key, value in VARIANTS[str(name)].items()])


def _read_yaml(path: Path) -> DictConfig:
    if not path.is_file():
        raise InputError(f"No config file at {path}; --list shows those that come with the project.")
    try:
        loaded = OmegaConf.load(path)
    except Exception as error:  # PyYAML raises many kinds
        raise InputError(f"{path} is not valid YAML: {_one_line(error)}.") from error
    if not isinstance(loaded, DictConfig):
        raise InputError(f"{path} must hold `key: value` lines, not a {type(loaded).__name__}.")
    return loaded


def _levels(path: Path, *, may_have_base: bool = True) -> list[tuple[str, DictConfig]]:
    """The file, and before it the one that its `base:` names (one level only, relative to the file)."""
    own = _read_yaml(path)
    base = own.pop("base", None)
    levels = [(str(path), own)]
    if base is not None:
        if not may_have_base:
            raise InputError(f"{path} is used as a base and has a base itself; only one level is allowed.")
        levels = _levels(path.parent / str(base), may_have_base=False) + levels
    return levels


@cache
def _defaults(schema: Any) -> bytes:
    """A schema as OmegaConf has it, which takes as long to make as all else, pickled: a tenth of the time of a deep
    copy, and a grid has hundreds of configs."""
    return pickle.dumps(OmegaConf.structured(schema))


def load_config(schema: type[ConfigT], path: str | Path | None, overrides: list[str] | tuple[str, ...] = ()) -> ConfigT:
    """`schema` filled from the YAML file at `path` and `key=value` overrides.

    Raises:
        InputError: a missing file, an unknown key (with a suggestion), a wrong type or a value out of range.
    """
    for item in overrides:
        if "=" not in item:
            raise InputError(f"{item!r} is not of the form key=value.")
    levels = [] if path is None else _levels(Path(path))
    if overrides:
        levels.append(("command line", OmegaConf.from_dotlist(list(overrides))))
    known: Any = schema  # hashable, as all classes are
    merged, where = pickle.loads(_defaults(known)), "defaults"  # noqa: S301 - of this process, never from disk
    try:
        for where, level in levels:
            if "variant" in level:
                merged = OmegaConf.unsafe_merge(merged, _variant_overrides(level["variant"], where))
            merged = OmegaConf.unsafe_merge(merged, level)  # copies nothing: both are this function's own
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        key = f" (at {error.full_key})" if getattr(error, "full_key", None) else ""
        raise InputError(f"{where}: {_told(error)}{key}") from error


def read_options(schema: type[ConfigT], options: Mapping[str, Any], where: str) -> ConfigT:
    """A `dict` of options, as a config holds for a part that it only names, as the part's own dataclass.

    Raises:
        InputError: an option that the part does not have (with a suggestion), or one of a wrong type.
    """
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), dict(options)))  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise InputError(f"{where}: {_told(error)}") from error


def config_yaml(config: object) -> str:
    """The configuration as YAML, complete: `load_config` on it gives an equal object."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def flat(config: Any) -> dict[str, Any]:
    """Any program's configuration as `block.key: value`, for trackers and comparisons."""
    rows: dict[str, Any] = {}
    for block, values in dataclasses.asdict(config).items():
        for key, value in values.items() if isinstance(values, dict) else [("", values)]:
            name = f"{block}.{key}" if key else block
            rows[name] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return rows


def list_configs(folder: Path) -> list[tuple[str, str]]:
    """Config files below a folder, each with the first line of its header comment."""
    rows = []
    for path in sorted(folder.glob("**/*.yaml")):
        first = path.read_text().splitlines()[:1]
        rows.append((path.stem, first[0].lstrip("# ") if first and first[0].startswith("#") else ""))
    return rows
