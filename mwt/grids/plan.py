"""Grids: which programs to start for a table of results.

A grid has rows; a row is a set of overrides, and for each seed its stages are run one after another: `train.classify`,
then `eval.classify`, say. Jobs that would do the same (the default row of every ablation) are one job.
"""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import json
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mwt.config import ClassifyConfig
from mwt.config_files import flat, load_config
from mwt.errors import InputError
from mwt.fit_config import FitConfig
from mwt.fit_set_config import FitSetConfig
from mwt.grids.config import GridConfig, RowsConfig, SettingConfig, StageConfig
from mwt.weights_config import WeightsConfig

SCHEMAS: dict[str, type] = {
    "train.classify": ClassifyConfig,
    "train.fit": FitConfig,
    "train.fit_set": FitSetConfig,
    "train.weights": WeightsConfig,
}
"""Programs that take a configuration: their jobs are checked before any is started."""
JOBS, OWN = "ALL-JOBS", "OWN-JOB"
"""What stands for the folder of all run directories, and for a job's own, before it is known where they are."""
NOT_THE_RESULT = ("run.dir", "run.out")
"""Keys of such a configuration in which two jobs may differ and still be the same."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One program to start."""

    id: str
    """Stage and digest of what decides about the result. Also the name of its run directory."""
    label: str
    stage: str
    program: str
    words: tuple[str, ...]
    """Its arguments; JOBS stands for the folder of all run directories."""
    needs: tuple[str, ...]
    """Jobs that must be done before."""
    resume: tuple[str, ...]
    resume_file: str
    preload: tuple[str, ...]
    limit: float | None

    def arguments(self, jobs: Path) -> list[str]:
        """Its words where the run directories are in `jobs`."""
        return [word.replace(JOBS, str(jobs)) for word in self.words]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A row of the table: its jobs for each seed."""

    name: str
    """For `--only`, and unique."""
    group: str
    label: str
    paper: dict[str, tuple[float, float | None] | None]
    """What the paper says for each column, with its deviation where it gives one."""
    names: dict[str, str]
    """What its placeholders stand for, in the files of columns too."""
    axes: dict[str, str]
    """Those of them that make it one of several rows: the axes of a product, or the `value` of a sweep."""
    jobs: dict[int, dict[str, Job]]
    """By seed and stage."""


def text(value: Any) -> str:
    """A value as it stands in an override."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def published(value: Any, where: str) -> tuple[float, float | None] | None:
    """`12.3` or `"12.3 ± 0.4"` as a mean and, if given, a deviation; None stays None."""
    if value is None:
        return None
    match = re.fullmatch(r"\s*([-+.\de]+)\s*(?:±\s*([-+.\de]+)\s*)?", str(value))
    if match is None:
        raise InputError(f"{where}: {value!r} is not a number, nor two with ± between them.")
    return float(match[1]), None if match[2] is None else float(match[2])


def _fill(template: str, names: dict[str, str], where: str) -> str:
    """The template with its placeholders filled in."""
    try:
        return template.format_map(names)
    except (KeyError, IndexError) as error:
        raise InputError(
            f"{where}: {template!r} has a placeholder {error} that nothing fills; there are "
            f"{', '.join('{' + name + '}' for name in names)}."
        ) from error
    except ValueError as error:
        raise InputError(
            f"{where}: {template!r} is not a template ({error}); a brace itself is written twice."
        ) from error


def _each(value: Any, count: int, where: str) -> list[Any]:
    """An entry for each of `count` rows."""
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise InputError(f"{where} has {len(value)} entries for {count} rows.")
    return value


def _variants(block: RowsConfig, scale: str) -> list[dict[str, Any] | None]:
    """Placeholders of each row of a block; None for one that is left out at this scale."""
    where = f"rows, {block.group!r}"
    if block.product:
        return [dict(zip(block.product, values, strict=True)) for values in itertools.product(*block.product.values())]
    if block.sweep is None:
        return [{}]
    values = block.values.get(scale) if isinstance(block.values, dict) else block.values
    lists = block.values.values() if isinstance(block.values, dict) else [values]
    if not values or any(not isinstance(one, list) or len(one) != len(values) for one in lists):
        raise InputError(f"{where}: sweep needs `values`: a list, or one for each scale ({scale!r}, …), equally long.")
    return [None if value is None else {"value": value} for value in values]


def _labels(block: RowsConfig, variants: list[dict[str, Any] | None]) -> list[str]:
    """What each row is called in the table. Where a scale has another value than the paper, both are named."""
    where = f"rows, {block.group!r}: labels"
    name = "{value}" if block.sweep else " · ".join(f"{{{axis}}}" for axis in block.product)
    named = block.labels or (name if block.row is None else block.row)
    rows = []
    first = next(iter(block.values.values())) if isinstance(block.values, dict) else None
    for i, (name, here) in enumerate(zip(_each(named, len(variants), where), variants, strict=True)):
        value = first[i] if first else (here or {}).get("value")
        label = _fill(name, {key: text(x) for key, x in {**(here or {}), "value": value}.items()}, where)
        another = here is not None and "value" in here and here["value"] != value
        rows.append(f"{label} (here {text(here['value'])})" if here and another else label)
    return rows


def _last_wins(overrides: list[str]) -> list[str]:
    """Overrides without those that a later one of the same key replaces."""
    rows: dict[str, str] = {}
    for item in overrides:
        key = item.partition("=")[0]
        rows.pop(key, None)
        rows[key] = item
    return list(rows.values())


def _taken(overrides: list[str], patterns: list[str]) -> list[str]:
    def takes(key: str) -> bool:
        answer = False
        for pattern in patterns:
            if fnmatch.fnmatchcase(key, pattern.removeprefix("!")):
                answer = not pattern.startswith("!")
        return answer

    return [item for item in overrides if takes(item.partition("=")[0])]


@cache
def _default_settings(schema: type[Any]) -> dict[str, Any]:
    return flat(schema())


def _identity(program: str, words: list[str], overrides: list[str], config: Path | None) -> Any:
    """What decides about the result of a job: of a known program the settings that differ from its defaults."""
    if program not in SCHEMAS:
        return {"words": words, "overrides": overrides, "config": config.read_text() if config else None}
    schema = SCHEMAS[program]
    settings, defaults = flat(load_config(schema, config, overrides)), _default_settings(schema)
    others = [word for word in words if config is None or word not in ("--config", str(config))]
    differ = {key: value for key, value in settings.items() if value != defaults.get(key) and key not in NOT_THE_RESULT}
    return {"words": others, "settings": differ}


def _job(
    stage: str, options: StageConfig, names: dict[str, str], overrides: list[str], config: Path | None, label: str,
    earlier: dict[str, Job],
) -> Job:  # fmt: skip
    where = f"stages.{stage}"
    places = {**names, **{name: f"{JOBS}/{job.id}" for name, job in earlier.items()}, "dir": OWN}
    words = [_fill(word, places, where) for word in options.arguments]
    own = [_fill(item, places, where) for item in options.overrides]
    taken = [_fill(item, places, where) for item in _taken(overrides, options.takes)]
    given = _last_wins([*taken, *own])
    if "--config" in words[:-1]:  # its own, not the scale's
        config = Path(words[words.index("--config") + 1])
    content = {"program": options.program, **_identity(options.program, words, given, config)}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]
    job_id = f"{stage}-{digest}"
    filled = tuple(word.replace(OWN, f"{JOBS}/{job_id}") for word in (*words, *given))
    needs = tuple(job.id for job in earlier.values() if any(job.id in word for word in filled))
    return Job(
        id=job_id, label=f"{label}: {stage}", stage=stage, program=options.program, words=filled, needs=needs,
        resume=tuple(options.resume), resume_file=options.resume_file, preload=tuple(options.preload),
        limit=options.limit,
    )  # fmt: skip


def _fits(where: dict[str, Any], names: dict[str, str]) -> bool:
    """Whether a row with these placeholders is meant."""
    return all(
        key in names and any(fnmatch.fnmatchcase(names[key], text(one)) for one in _as_list(wanted))
        for key, wanted in where.items()
    )


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _check_rules(rules: list[SettingConfig], rows: list[dict[str, str]], path: Path) -> None:
    """Refuse settings that no row fits: a wrong name would else go unseen."""
    for rule in rules:
        if not any(_fits(rule.where, names) for names in rows):
            raise InputError(f"{path}: settings, where {json.dumps(rule.where)}: no row fits.")


def expand(
    grid: GridConfig, path: Path, scale: str, *, seeds: list[int] | None = None, overrides: list[str] | None = None
) -> list[Cell]:
    """All rows of a grid with their jobs; equal jobs are one.

    Args:
        path: the grid's file, to which its configs are relative.
        seeds: other than the scale's.
        overrides: further ones for every row, stronger than the scale's and weaker than what makes the row.

    Raises:
        InputError: a scale that is not there, a placeholder that nothing fills, a configuration that a known program
            would refuse, two rows of one name.
    """
    if scale not in grid.scales:
        raise InputError(f"--scale is {scale!r}; {path} has {', '.join(grid.scales)}.")
    size = grid.scales[scale]
    config = None if size.config is None else Path(os.path.normpath(path.parent / size.config))
    shared: dict[str, Job] = {}
    cells: list[Cell] = []
    rules = grid.settings + size.settings
    for block in grid.rows:
        where = f"{path}: rows, {block.group!r}"
        variants = _variants(block, scale)
        papers = {key: _each(value, len(variants), f"{where}: paper.{key}") for key, value in block.paper.items()}
        extras = {key: _each(value, len(variants), f"{where}: with.{key}") for key, value in block.with_.items()}
        for i, (variant, label) in enumerate(zip(variants, _labels(block, variants), strict=True)):
            if variant is None:
                continue
            names = {key: text(value) for key, value in (size.with_ | variant).items()}
            names |= {key: text(values[i]) for key, values in extras.items()}
            names |= {"config": str(config), "here": os.path.normpath(path.parent)}
            swept = [f"{block.sweep}={{value}}"] if block.sweep else []
            name = f"{block.group}: {label}" if label else block.group
            jobs: dict[int, dict[str, Job]] = {}
            for seed in size.seeds if seeds is None else seeds:
                mine = {**names, "seed": str(seed)}
                given = list(size.overrides)
                given += [item for rule in rules if _fits(rule.where, names) for item in rule.overrides]
                given += [item.replace("{", "{{").replace("}", "}}") for item in overrides or ()]  # no templates
                given += [*block.overrides, *swept]
                chain: dict[str, Job] = {}
                for stage, options in grid.stages.items():
                    if (block.stages and stage not in block.stages) or not _fits(options.where, names):
                        continue
                    try:
                        job = _job(stage, options, mine, given, config, f"{name}, seed {seed}", chain)
                    except InputError as error:
                        raise InputError(f"{path}, row {name!r}, stage {stage!r}: {error}") from error
                    chain[stage] = shared.setdefault(job.id, job)  # named after the first row that needs it
                jobs[seed] = chain
            for key, column in grid.columns.items():
                _fill(column.file, names, f"{path}: columns.{key}.file")
            paper = {key: published(values[i], f"{where}: paper.{key}") for key, values in papers.items()}
            axes = {key: text(value) for key, value in variant.items()}
            cells.append(
                Cell(name=name, group=block.group, label=label, paper=paper, names=names, axes=axes, jobs=jobs)
            )
    if grid.base is None:  # a base may have settings for rows that are not here
        _check_rules(rules, [cell.names for cell in cells], path)
    doubled = {cell.name for cell in cells if sum(other.name == cell.name for other in cells) > 1}
    if doubled:
        raise InputError(f"{path}: two rows are called {doubled.pop()!r}.")
    return cells


def select(cells: list[Cell], pattern: str) -> list[Cell]:
    """The rows whose names a pattern fits.

    Raises:
        InputError: none; says what there is.
    """
    chosen = [cell for cell in cells if fnmatch.fnmatchcase(cell.name, pattern)]
    if not chosen:
        raise InputError(f"--only {pattern!r} fits no row; there are {', '.join(cell.name for cell in cells)}.")
    return chosen
