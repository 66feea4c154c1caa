"""The table of a grid: numbers from the run directories, beside those of the paper, as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import fnmatch
import io
import json
import math
import statistics
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mwt.errors import InputError
from mwt.grids.config import ColumnConfig, GridConfig, PlotConfig
from mwt.grids.plan import JOBS, Cell, Job
from mwt.tracking import read_metrics

Record = dict[str, Any]
"""What is known of a job: `status` (done, interrupted, or one of OUTCOMES), `seconds`, `exit`, …; empty before it is
started."""
RESULTS = ("not defined", "diverged")
"""Outcomes that say something of the row, and that another attempt would not change."""
OUTCOMES = ("failed", "out of memory", "out of time", *RESULTS)
"""How a job can have ended without being done, worst first."""


def read_record(jobs: Path, job: Job) -> Record:
    """What is known of a job.

    Raises:
        InputError: its file is damaged.
    """
    path = jobs / f"{job.id}.json"
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise InputError(f"{path} is not readable as JSON ({error}); remove it, and the job is done again.") from error


def finished(jobs: Path, job: Job) -> bool:
    """Whether a job is done and what it has made is still there."""
    folder = jobs / job.id
    makes_a_folder = any(f"{JOBS}/{job.id}" in word for word in job.words)
    return read_record(jobs, job).get("status") == "done" and (folder.is_dir() or not makes_a_folder)


def settled(jobs: Path, job: Job) -> bool:
    """Whether nothing is left to do for a job: it is done, or another attempt would come to the same."""
    return finished(jobs, job) or read_record(jobs, job).get("status") in RESULTS


def look_up(content: Any, path: str) -> float | None:
    """The number at a dotted path in what JSON brought; None where there is none, or none that is finite."""
    for key in path.split("."):
        if isinstance(content, dict) and key in content:
            content = content[key]
        elif isinstance(content, list) and key.lstrip("-").isdigit() and -len(content) <= int(key) < len(content):
            content = content[int(key)]
        else:
            return None
    return float(content) if isinstance(content, (int, float)) and math.isfinite(content) else None


def measure(column: ColumnConfig, file: str, job: Job, jobs: Path) -> float | None:
    """The number of a column for a job whose stage it names; None where the file or the number is not there."""
    path = jobs / job.id / file
    if not file:
        contents: list[Any] = [read_record(jobs, job)]
    elif file.endswith(".jsonl"):
        contents = list(reversed(read_metrics(path)))
    else:
        try:
            contents = [json.loads(path.read_text())]
        except (OSError, ValueError):
            contents = []
    for content in contents:
        found = (look_up(content, path) for path in column.path.split("|"))
        value = next((number for number in found if number is not None), None)
        divisor = look_up(content, column.per) if column.per else 1.0
        if value is not None and divisor:
            return value / divisor * column.factor
    return None


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table as far as its jobs are done."""

    cell: Cell
    values: dict[str, dict[int, float]]
    """By column and seed; only of seeds whose stages are all done."""
    problems: tuple[str, ...]
    """What was not done, or is missing, in words."""
    outcomes: dict[int, str]
    """Of seeds that are not done, which of OUTCOMES it was."""
    open: tuple[int, ...]
    """Seeds of which nothing is known yet."""

    def mean(self, column: str) -> float | None:
        """Over seeds; None without any."""
        return statistics.fmean(numbers) if (numbers := self.values[column].values()) else None

    def deviation(self, column: str) -> float | None:
        """The sample's (n - 1); None for fewer than two seeds."""
        return statistics.stdev(numbers) if len(numbers := self.values[column].values()) > 1 else None


def collect(grid: GridConfig, cells: list[Cell], jobs: Path) -> list[Row]:
    """The rows, from the records and run directories in `jobs`."""
    rows = [_row(grid, cell, jobs) for cell in cells]
    return [replace(row, values={name: _compared(grid, name, row, rows) for name in grid.columns}) for row in rows]


def _compared(grid: GridConfig, name: str, row: Row, rows: list[Row]) -> dict[int, float]:
    """The numbers of a column; where it is relative, over those of the row that it names."""
    own, over = row.values[name], grid.columns[name].over
    if not over:
        return own
    others = [other for other in rows if other.cell.group == row.cell.group and kind(other) == over]
    alike = [other for other in others if other.cell.label.partition(",")[2] == row.cell.label.partition(",")[2]]
    base = next((other.values[name] for other in [*alike, *others]), {})
    return {seed: value / base[seed] for seed, value in own.items() if base.get(seed)}


def kind(row: Row) -> str:
    """What rows that differ in a number alone have in common: ASMR, of "ASMR, 3 layers"."""
    return row.cell.label.partition(",")[0]


def _row(grid: GridConfig, cell: Cell, jobs: Path) -> Row:
    values: dict[str, dict[int, float]] = {name: {} for name in grid.columns}
    problems, pending = [], []
    outcomes: dict[int, str] = {}
    for seed, chain in cell.jobs.items():
        found = [(job, read_record(jobs, job)) for job in chain.values()]
        undone = [(job, record) for job, record in found if record.get("status") in OUTCOMES]
        if undone:
            job, record = undone[0]
            outcomes[seed] = record["status"]
            how = f"failed with status {record['exit']}" if record["status"] == "failed" else record["status"]
            problems.append(f"seed {seed}: {job.stage} {how}, see jobs/{job.id}.log")
        elif not all(finished(jobs, job) for job in chain.values()):
            pending.append(seed)
        else:
            for name, column in grid.columns.items():
                file = column.file.format_map(cell.names)
                stage = next((stage for stage in column.stage.split("|") if stage in chain), None)
                if stage is None:
                    continue
                number = measure(column, file, chain[stage], jobs)
                if number is None and column.optional:
                    continue
                if number is None:
                    problems.append(f"seed {seed}: no {column.path} in {chain[stage].id}/{file}")
                    outcomes[seed] = "failed"
                else:
                    values[name][seed] = number
    return Row(cell=cell, values=values, problems=tuple(problems), outcomes=outcomes, open=tuple(pending))


def points(rows: list[Row], plot: PlotConfig, pattern: str) -> list[tuple[str, list[tuple[str, float, float]]]]:
    """The paper's curve and ours for a plot, or ours of each group that fits: label, x and y of each row."""
    paper: list[tuple[str, float, float]] = []
    ours: dict[str, list[tuple[str, float, float]]] = {}
    kinds: dict[str, list[tuple[str, float, float]]] = {}
    for row in (row for row in rows if fnmatch.fnmatchcase(row.cell.group, pattern)):
        theirs = [row.cell.paper.get(name) for name in (plot.x, plot.y)]
        if theirs[0] and theirs[1]:
            paper.append((row.cell.label, theirs[0][0], theirs[1][0]))
            kinds.setdefault(f"{kind(row)}, paper", []).append(paper[-1])
        x, y = row.mean(plot.x), row.mean(plot.y)
        if x is not None and y is not None:
            ours.setdefault(row.cell.group, []).append((row.cell.label, x, y))
            kinds.setdefault(kind(row), []).append((row.cell.label, x, y))
    if plot.kinds:
        return sorted(kinds.items())
    if (pattern in ours and len(plot.panels) == 1) or not ours:
        return [("paper", paper), ("ours", ours.get(pattern, []))]
    return list(ours.items())


# ---- as files ----------------------------------------------------------------------------------------------------


def records(grid: GridConfig, rows: list[Row]) -> list[dict[str, Any]]:
    """The table as flat records: for each column the paper's mean and sd, ours, and every seed's number."""
    seeds = sorted({seed for row in rows for seed in row.cell.jobs})
    table = []
    for row in rows:
        record: dict[str, Any] = {"group": row.cell.group, "row": row.cell.label, "name": row.cell.name}
        for column in grid.columns:
            paper = row.cell.paper.get(column) or (None, None)
            record |= {f"{column}_paper": paper[0], f"{column}_paper_sd": paper[1]}
            record |= {f"{column}_mean": row.mean(column), f"{column}_sd": row.deviation(column)}
            record |= {f"{column}_seed{seed}": row.values[column].get(seed) for seed in seeds}
        record["problems"] = "; ".join(row.problems)
        record["outcome"] = min(row.outcomes.values(), key=OUTCOMES.index, default="open" if row.open else "done")
        record["open"] = " ".join(map(str, row.open))
        table.append(record)
    return table


def as_csv(table: list[dict[str, Any]]) -> str:
    """Records as CSV; empty where there is no number."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=list(table[0]) if table else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return stream.getvalue()


def number(mean: float | None, deviation: float | None, decimals: int) -> str:
    """12.34 ± 0.56, 12.34, or a dash."""
    if mean is None:
        return "–"
    return f"{mean:.{decimals}f}" + ("" if deviation is None else f" ± {deviation:.{decimals}f}")


def as_lines(grid: GridConfig, rows: list[Row]) -> list[list[str]]:
    """The table as words, its head first. A column has the paper's figures beside it where the paper has any."""
    with_paper = {name for name in grid.columns if any(row.cell.paper.get(name) for row in rows)}
    head = ["", ""]
    for name, column in grid.columns.items():
        head += [f"{column.title}: paper", f"{column.title}: ours"] if name in with_paper else [column.title]
    lines = [[*head, "seeds"]]
    for row in rows:
        line = [row.cell.group, row.cell.label]
        for name, column in grid.columns.items():
            if name in with_paper:
                mean, deviation = row.cell.paper.get(name) or (None, None)
                line.append(number(mean, deviation, column.decimals))
            line.append(number(row.mean(name), row.deviation(name) if column.average else None, column.decimals))
        counts, total = Counter(row.outcomes.values()), len(row.cell.jobs)  # seeds
        done = total - len(row.outcomes) - len(row.open)
        state = str(done) if done == total else f"{done} of {total}"
        shown = (f", {counts[how]} {how.upper() if how == 'failed' else how}" for how in OUTCOMES if counts[how])
        lines.append([*line, state + "".join(shown)])
    return lines


def as_markdown(grid: GridConfig, rows: list[Row], *, heading: str, remarks: list[str]) -> str:
    """The table with its source, what failed, and remarks."""
    head, *lines = as_lines(grid, rows)
    alignment = ["---", "---", *["--:"] * (len(head) - 3), "---"]
    shown = "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in (head, alignment, *lines)
    )
    parts = [f"# {heading}", f"Paper: {grid.source}. Ours: mean ± sample standard deviation over seeds.", shown]
    if problems := [f"- {row.cell.name}, {problem}" for row in rows for problem in row.problems]:
        parts.append("Not done:\n\n" + "\n".join(problems))
    parts += [grid.notes.strip()] if grid.notes.strip() else []
    return "\n\n".join([*parts, *remarks]) + "\n"


def as_text(grid: GridConfig, rows: list[Row]) -> str:
    """The table for a terminal."""
    lines = as_lines(grid, rows)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]

    def padded(line: list[str]) -> str:
        names, numbers = zip(line[:2], widths, strict=False), zip(line[2:], widths[2:], strict=True)
        return "  ".join(
            [*(word.ljust(width) for word, width in names), *(word.rjust(width) for word, width in numbers)]
        )

    return "\n".join(padded(line).rstrip() for line in lines)
