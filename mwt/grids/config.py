"""A grid's YAML file: scales, stages, rows, settings, columns and plots. `mwt.grids.plan` makes jobs of it.

`base: FILE` takes over the blocks of another grid, relative to this one; a block that stands here too replaces it,
and so does a scale.

In words and overrides, `{name}` stands for: `config` (the scale's), `here` (the folder of the grid's file), `seed`,
`value` (of a sweep), an axis of a `product`, a key of `with`, `dir` (the job's own run directory), or the name of an
earlier stage (its run directory).
"""

from __future__ import annotations

import dataclasses
import fnmatch
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mwt.errors import InputError


@dataclass(frozen=True, kw_only=True)
class SettingConfig:
    """Overrides of some rows, by what makes them: those of a task, say, or of an activation on a task."""

    where: dict[str, Any] = field(default_factory=dict)
    """Placeholders and their value, or a list of values (`*` stands for anything): rows that have all of them."""
    overrides: list[str] = field(default_factory=list)
    """After the scale's own, before those of the command line; of two settings that fit, the later one counts."""


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """A program that is started once for every row and seed."""

    program: str
    """Started as `python -m PROGRAM`."""
    arguments: list[str] = field(default_factory=list)
    takes: list[str] = field(default_factory=lambda: ["*"])
    """Patterns of the keys of a row's overrides that it is given; `!PATTERN` takes some out again."""
    overrides: list[str] = field(default_factory=list)
    """`key=value` of its own, which come last."""
    resume: list[str] = field(default_factory=list)
    """Words that make it go on with an interrupted run. Without them it starts anew."""
    resume_file: str = "checkpoints/last.json"
    """A file of its run directory without which there is nothing to go on with."""
    where: dict[str, Any] = field(default_factory=dict)
    """Only rows that fit have this stage (`SettingConfig.where`)."""
    preload: list[str] = field(default_factory=list)
    """Modules that one process imports, which then forks the program for every job (`mwt.grids.fork`). Without any, or
    where there is no fork to rely on, each job is a process that imports everything itself."""
    limit: float | None = None
    """Seconds after which it is ended and recorded as out of time; null: none."""


@dataclass(frozen=True, kw_only=True)
class ScaleConfig:
    """A size at which the whole grid can be run."""

    config: str | None = None
    """The programs' configuration, relative to the grid's file."""
    overrides: list[str] = field(default_factory=list)
    """Of every row; what the command line says and the row's own come after them."""
    settings: list[SettingConfig] = field(default_factory=list)
    """Of some rows at this scale; after the grid's."""
    seeds: list[int] = field(default_factory=lambda: [0])
    with_: dict[str, Any] = field(default_factory=dict)
    """Placeholders that stand for something else at each scale; `with` in the file."""


@dataclass(frozen=True, kw_only=True)
class RowsConfig:
    """Some rows of the table: one, or one for each value of a key (`sweep`), or for each combination (`product`)."""

    group: str
    """What they have in common, as the table's first column says it."""
    row: str | None = None
    """The row's name in the second column; may hold `{value}` or axes, which it consists of unless it is given."""
    labels: list[str] = field(default_factory=list)
    """Names for the rows one by one, where `row` does not say it well."""
    sweep: str | None = None
    """A key that is set to each of `values`."""
    values: Any = None
    """A list, or one for each scale, the paper's first. `null` leaves the row out at that scale."""
    product: dict[str, list[Any]] = field(default_factory=dict)
    """Axes: every combination is a row, the last axis runs fastest."""
    stages: list[str] = field(default_factory=list)
    """The stages of these rows, where they have not all of them; in the order of the grid's."""
    overrides: list[str] = field(default_factory=list)
    with_: dict[str, Any] = field(default_factory=dict)
    """Further placeholders; `with` in the file. A list has an entry for each row."""
    paper: dict[str, Any] = field(default_factory=dict)
    """For each column what the paper says: a number, "a ± b" or null, or a list of them with an entry for each row."""


@dataclass(frozen=True, kw_only=True)
class ColumnConfig:
    """A number that every row and seed has."""

    title: str
    stage: str
    """The stage in whose run directory the file is; `a|b`: of those that a row has the first one. Blank without any."""
    file: str = ""
    """A JSON file (may hold placeholders), or JSON lines, of which the last one that has the number counts. Empty:
    what the grid itself knows of the job (`seconds`)."""
    path: str
    """Where the number is in it: keys and list positions with dots between them; `a|b`: at the first place of those
    that has one."""
    per: str = ""
    """Where the number is, likewise, that it is divided by."""
    over: str = ""
    """A kind of row, such as SIREN: the number is divided by that of the row of this kind in the group, the one that is
    called the same otherwise ("SIREN, 3 layers" for "ASMR, 3 layers"), else the first. Blank where there is none."""
    factor: float = 1.0
    decimals: int = 2
    optional: bool = False
    """Blank, and no failure, for runs that do not have the number."""
    average: bool = True
    """Show mean ± sd over seeds; else the mean alone (times, memory)."""


@dataclass(frozen=True, kw_only=True)
class PlotConfig:
    """A figure of two columns against each other over the rows of one group, the paper's beside ours; or of several
    groups, a curve for each."""

    name: str
    group: str
    """Its name, or a pattern of the names of several; several patterns, with ` | ` between them, have a panel each."""
    x: str
    y: str
    line: bool = True
    """One group: join the rows in their order."""
    log_x: bool = False
    kinds: bool = False
    """One group: a curve for each kind of row, its name up to a comma, the paper's beside ours."""

    @property
    def panels(self) -> list[str]:
        """The patterns, one for each panel."""
        return self.group.split(" | ")


@dataclass(frozen=True, kw_only=True)
class ClaimConfig:
    """An order of models on a task that somebody states, for `eval.leaderboard` to compare with."""

    title: str
    task: str
    models: dict[str, str]
    """Best first: what the source calls it, and the model's name in the leaderboard."""


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """A grid's YAML file."""

    base: str | None = None
    """A grid whose blocks count where this one has none, relative to this one."""
    title: str
    source: str
    """Where the figures under `paper` are from."""
    notes: str = ""
    """Printed below the table."""
    scales: dict[str, ScaleConfig]
    stages: dict[str, StageConfig]
    rows: list[RowsConfig]
    settings: list[SettingConfig] = field(default_factory=list)
    """Of some rows, at every scale."""
    columns: dict[str, ColumnConfig]
    plots: list[PlotConfig] = field(default_factory=list)
    claims: list[ClaimConfig] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, column in self.columns.items():
            if unknown := set(column.stage.split("|")) - set(self.stages):
                raise InputError(
                    f"columns.{name}.stage: no {unknown.pop()!r}; the stages are {', '.join(self.stages)}."
                )
        for block in self.rows:
            if unknown := set(block.stages) - set(self.stages):
                raise InputError(f"rows, {block.group!r}: there is no stage {unknown.pop()!r}.")
            for name in block.paper:
                if name not in self.columns:
                    raise InputError(f"rows, {block.group!r}: paper has {name!r}, but no column is called so.")
            if block.sweep and block.product:
                raise InputError(f"rows, {block.group!r}: give a sweep or a product, not both.")
        for plot in self.plots:
            shown = [(pattern, self.groups()) for pattern in plot.panels]
            for what, names in ((plot.x, self.columns), (plot.y, self.columns), *shown):
                if what not in names and not (names != self.columns and fnmatch.filter(names, what)):
                    raise InputError(f"plots, {plot.name!r}: there is no {what!r}; there are {', '.join(names)}.")

    def groups(self) -> list[str]:
        """The groups in the order of the file, each once."""
        return list(dict.fromkeys(block.group for block in self.rows))


def load_grid(path: Path) -> GridConfig:
    """A grid's YAML file, with what it takes from its `base`.

    Raises:
        InputError: no such file, no YAML, an unknown key (with a suggestion) or a wrong type.
    """
    content = _with_base(path)
    try:
        for block in (*(content.get("rows") or ()), *(content.get("scales") or {}).values()):
            if "with" in block:  # a word that Python keeps for itself
                block["with_"] = block.pop("with")
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(GridConfig), content))  # type: ignore[return-value]
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except Exception as error:  # OmegaConf's, which are of many kinds
        key = getattr(error, "full_key", None)
        where = f" (at {key})" if key else ""
        raise InputError(f"{path}: {str(error).splitlines()[0]}{where}") from error


def _with_base(path: Path, *above: Path) -> DictConfig:
    """A grid's file over its base, which may have one itself."""
    if path in above:
        raise InputError(f"{path} is its own base.")
    content = _read(path)
    if "base" not in content:
        return content
    base = _with_base(path.parent / str(content["base"]), path, *above)
    scales = {**(base.get("scales") or {}), **(content.get("scales") or {})}
    return DictConfig({**base, **content, "scales": scales})


def _read(path: Path) -> DictConfig:
    if not path.is_file():
        raise InputError(f"No grid at {path}; those that come with the project are in configs/grids.")
    try:
        content = OmegaConf.load(path)
    except Exception as error:  # PyYAML raises many kinds
        raise InputError(f"{path} is not valid YAML: {str(error).splitlines()[0]}.") from error
    known = {item.name.rstrip("_") for item in dataclasses.fields(GridConfig)}
    if not isinstance(content, DictConfig) or not known & set(content):
        raise InputError(f"{path} is not a grid: it has none of the keys {', '.join(sorted(known))}.")
    return content
