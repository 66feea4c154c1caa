"""A grid of models and tasks as leaderboards: ranks in tasks, how alike tasks rank, and orders that others state."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mwt.errors import InputError
from mwt.grids.table import OUTCOMES

METRICS = {"snr": "SNR, dB", "psnr": "PSNR, dB", "iou": "IoU"}
"""What the task's own metric is called; larger is better in all."""
LOST = tuple(outcome for outcome in OUTCOMES if outcome != "not defined")
"""Outcomes without a number that count as worse than any number; what is not defined cannot be compared."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A model on a task."""

    model: str
    group: str
    task: str
    numbers: dict[str, dict[int, float]]
    """By column of the grid and seed."""
    outcome: str
    """done, open, or what became of it instead."""
    seeds: int
    """How many it is to have."""
    runs: tuple[Path, ...]
    """Run directories of its seeds that have a result."""

    @property
    def lost(self) -> bool:
        """Whether it, or one of its seeds, has come to nothing: what the others reached is no result of the model."""
        return self.outcome in LOST

    def mean(self, column: str) -> float | None:
        """Over seeds; None without any."""
        return statistics.fmean(found) if (found := self.numbers.get(column, {}).values()) else None

    def deviation(self, column: str) -> float | None:
        """The sample's; None for fewer than two seeds."""
        return statistics.stdev(found) if len(found := self.numbers.get(column, {}).values()) > 1 else None


@dataclass(frozen=True, kw_only=True)
class Claim:
    """An order that somebody states, beside what was measured."""

    title: str
    task: str
    rows: tuple[tuple[str, str, float | None], ...]
    """What the source calls it, the model, its metric here; best first as stated."""

    @property
    def neighbours(self) -> tuple[int, int]:
        """How many of the neighbouring pairs that were measured have the stated order, and how many there are."""
        return self._count(pairwise(self.rows))

    @property
    def pairs(self) -> tuple[int, int]:
        """The same of all pairs."""
        return self._count(combinations(self.rows, 2))

    def _count(self, pairs: Any) -> tuple[int, int]:
        known = [(first[2], second[2]) for first, second in pairs if first[2] is not None and second[2] is not None]
        return sum(better > worse for better, worse in known), len(known)


@dataclass(frozen=True, kw_only=True)
class Board:
    """All entries of a grid."""

    title: str
    scale: str
    notes: str
    columns: dict[str, dict[str, Any]]
    """Of the grid; the first is the metric by which is ranked."""
    entries: tuple[Entry, ...]
    claimed: tuple[dict[str, Any], ...]

    @property
    def metric(self) -> str:
        """The column by which is ranked."""
        return next(iter(self.columns))

    @cached_property
    def tasks(self) -> list[str]:
        """In the order of the grid."""
        return list(dict.fromkeys(entry.task for entry in self.entries))

    @cached_property
    def models(self) -> dict[str, str]:
        """Each model's group, in the order of the grid."""
        return {entry.model: entry.group for entry in self.entries}

    @cached_property
    def by_place(self) -> dict[tuple[str, str], Entry]:
        """By model and task."""
        return {(entry.model, entry.task): entry for entry in self.entries}

    def score(self, model: str, task: str) -> float | None:
        """The metric's mean over seeds; None where there is none, or a seed has come to nothing."""
        entry = self.by_place.get((model, task))
        return None if entry is None or entry.lost else entry.mean(self.metric)

    def ranked(self, task: str) -> list[Entry]:
        """The task's entries, best first; those without a number at the end."""
        own = {entry.model: entry for entry in self.entries if entry.task == task}
        scores = {model: self.score(model, task) for model in own}
        return sorted(own.values(), key=lambda entry: np.inf if (score := scores[entry.model]) is None else -score)

    @cached_property
    def ranks(self) -> dict[tuple[str, str], float]:
        """By model and task, from 1, only where there is a number; equal ones share the mean of their places."""
        from scipy.stats import rankdata

        found: dict[tuple[str, str], float] = {}
        for task in self.tasks:
            scores = {
                entry.model: score
                for entry in self.ranked(task)
                if (score := self.score(entry.model, task)) is not None
            }
            places = rankdata([-score for score in scores.values()])
            found |= {(model, task): float(place) for model, place in zip(scores, places, strict=True)}
        return found

    def place(self, entry: Entry) -> str:
        """Its rank in words, 3 or 3.5; empty without one."""
        rank = self.ranks.get((entry.model, entry.task))
        return "" if rank is None else f"{rank:g}"

    @cached_property
    def lost(self) -> dict[tuple[str, str], float]:
        """The same of those that have come to nothing (LOST): on each task they share the places after the last."""
        found: dict[tuple[str, str], float] = {}
        for task in self.tasks:
            own = [entry for entry in self.ranked(task) if entry.lost]
            last = sum(place[1] == task for place in self.ranks)
            found |= {(entry.model, task): last + (len(own) + 1) / 2 for entry in own}
        return found

    def places(self, model: str) -> list[float]:
        """Its ranks on the tasks that it has a number in, or has come to nothing in."""
        places = self.lost | self.ranks
        return [places[model, task] for task in self.tasks if (model, task) in places]

    def mean_rank(self, model: str) -> float | None:
        """Over the tasks that it has a rank in; None without any."""
        found = self.places(model)
        return statistics.fmean(found) if found else None

    def by_mean_rank(self) -> list[str]:
        """The models with a rank in every task, best first, and then those with fewer: their means are of others."""

        def key(model: str) -> tuple[bool, float]:
            found = self.places(model)
            return len(found) < len(self.tasks), statistics.fmean(found) if found else np.inf

        return sorted(self.models, key=key)

    def correlation(self, first: str, second: str) -> float | None:
        """Spearman's, over the models that have a number in both tasks; None for fewer than three of them."""
        from scipy.stats import spearmanr

        pairs = [(self.score(model, first), self.score(model, second)) for model in self.models]
        known = np.array([pair for pair in pairs if None not in pair], dtype=float)
        if len(known) < 3 or (known == known[0]).all(0).any():
            return None
        return float(spearmanr(known[:, 0], known[:, 1]).statistic)

    def claims(self) -> list[Claim]:
        """The orders that the grid names, of which at least two models are here."""
        return [
            Claim(
                title=claim["title"],
                task=claim["task"],
                rows=tuple((name, model, self.score(model, claim["task"])) for name, model in claim["models"].items()),
            )
            for claim in self.claimed
            if sum((model, claim["task"]) in self.by_place for model in claim["models"].values()) > 1
        ]

    def metric_name(self, task: str) -> str:
        """SNR, PSNR or IoU, as the task's runs have it; else the column's title."""
        for entry in self.ranked(task):
            for run in entry.runs:
                final = read_result(run).get("final", {})
                for path in self.columns[self.metric]["path"].split("|"):
                    name = path.removeprefix("final.")
                    if name in final:
                        return METRICS.get(name, name)
        return str(self.columns[self.metric]["title"])


def read_result(run: Path) -> dict[str, Any]:
    """result.json of a run; empty where it is not there or not readable."""
    try:
        content: dict[str, Any] = json.loads((run / "result.json").read_text())
    except (OSError, ValueError):
        return {}
    return content


def load_board(out: Path, *, axis: str = "task", stage: str = "fit") -> Board:
    """What `eval.grid` has left in its folder.

    Args:
        axis: which axis of the rows is the task; what else makes a row is the model.
        stage: whose run directories have pictures and curves.

    Raises:
        InputError: no such folder, no tables in it, or no row that has the axis.
    """
    paths = [out / name for name in ("cells.json", "table.json")]
    if not all(path.is_file() for path in paths):
        raise InputError(f"{out} is no folder of eval.grid with tables (it has no {paths[0].name} or {paths[1].name}).")
    try:
        cells, table = (json.loads(path.read_text()) for path in paths)
    except ValueError as error:
        raise InputError(f"{out}: cells.json or table.json is not readable as JSON ({error}).") from error
    records = {record["name"]: record for record in table}
    entries = []
    for row in cells["rows"]:
        if axis not in row["axes"] or row["name"] not in records:
            continue
        record = records[row["name"]]
        own = {column: _of_seeds(record, column) for column in cells["columns"]}
        others = [value for key, value in row["axes"].items() if key != axis]
        jobs = [chain[stage] for chain in row["jobs"].values() if stage in chain]
        runs = [out / "jobs" / job for job in jobs]
        entries.append(
            Entry(
                model=": ".join(filter(None, [row["group"], " · ".join(others)])), group=row["group"],
                task=row["axes"][axis], numbers=own, outcome=record["outcome"], seeds=len(row["jobs"]),
                runs=tuple(run for run in runs if (run / "result.json").is_file()),
            )
        )  # fmt: skip
    if not entries:
        raise InputError(f"{out}: no row has an axis {axis!r}.")
    return Board(
        title=cells["title"], scale=cells["scale"], notes=cells["notes"], columns=cells["columns"],
        entries=tuple(entries), claimed=tuple(cells["claims"]),
    )  # fmt: skip


def _of_seeds(record: dict[str, Any], column: str) -> dict[int, float]:
    prefix = f"{column}_seed"
    return {
        int(key.removeprefix(prefix)): value
        for key, value in record.items()
        if key.startswith(prefix) and value is not None
    }


# ---- as text ---------------------------------------------------------------------------------------------------------


def shown(value: float | None, deviation: float | None = None, decimals: int = 2) -> str:
    """12.34 ± 0.56, 12.34, 17,234, or a dash."""
    if value is None:
        return "–"
    return f"{value:,.{decimals}f}" + ("" if deviation is None else f" ± {deviation:.{decimals}f}")


def told(entry: Entry | None, metric: str, decimals: int = 2, *, deviation: bool = False) -> str:
    """The metric in words, with how many seeds it is of where some have none, or what became of it; a dash for none."""
    if entry is None:
        return "–"
    score, count = entry.mean(metric), len(entry.numbers.get(metric, {}))
    if score is None:
        return entry.outcome
    words = shown(score, entry.deviation(metric) if deviation else None, decimals)
    if count == entry.seeds:
        return words
    return f"{words} ({count} of {entry.seeds} seeds{', ' + entry.outcome if entry.outcome in OUTCOMES else ''})"


def task_lines(board: Board, task: str, beside: Board | None = None) -> list[list[str]]:
    """The leaderboard of a task as words, its head first; the metric of another board in a further column."""
    head = ["", "model", board.metric_name(task), *(c["title"] for c in list(board.columns.values())[1:])]
    lines = [[*head, f"{head[2]}, {beside.scale}"] if beside else head]
    decimals = board.columns[board.metric]["decimals"]
    for entry in board.ranked(task):
        words = [board.place(entry), entry.model]
        for name, column in board.columns.items():
            deviation = entry.deviation(name) if column["average"] else None
            words.append(shown(entry.mean(name), deviation, column["decimals"]))
        words[2] = told(entry, board.metric, decimals, deviation=True)
        if beside:
            words.append(told(beside.by_place.get((entry.model, task)), beside.metric, decimals, deviation=True))
        lines.append(words)
    return lines


def claim_lines(claim: Claim) -> list[str]:
    """A stated order beside the measured one, in sentences."""
    (near, nears), (right, pairs) = claim.neighbours, claim.pairs
    order = " > ".join(f"{name} ({shown(score)})" for name, _, score in claim.rows)
    measured = sorted((row for row in claim.rows if row[2] is not None), key=lambda row: -(row[2] or 0.0))
    return [
        f"{claim.title}, {claim.task}.",
        f"Stated: {order}.",
        f"Here: {' > '.join(f'{name} ({shown(score)})' for name, _, score in measured) or 'nothing yet'}.",
        f"{near} of {nears} neighbouring pairs and {right} of {pairs} pairs have the stated order"
        + (f"; {len(claim.rows) - len(measured)} models have no number." if len(measured) < len(claim.rows) else "."),
    ]


def markdown_table(lines: Sequence[Sequence[str]], words: int = 2) -> str:
    """Lines, the head first, as Markdown; the first `words` columns to the left."""
    rule = ["---"] * words + ["--:"] * (len(lines[0]) - words)
    rows = [lines[0], rule, *lines[1:]]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


MEAN_RANK = (
    "Models with equal numbers share the mean of their places. What has diverged or failed, or ran out of memory or "
    "time, with any of its seeds, shares the last places of its task; what is not defined on a task, or still open, "
    "has no rank there. A mean rank is over the tasks that a model has a rank in, whose number stands beside it: "
    "models with all of them come first, and means over other tasks cannot be compared with theirs."
)


def overview_lines(board: Board) -> list[list[str]]:
    """Models by mean rank, with the metric of every task."""
    lines = [["model", "mean rank", "of tasks", *board.tasks]]
    for model in board.by_mean_rank():
        words = [model, shown(board.mean_rank(model), decimals=1), f"{len(board.places(model))} of {len(board.tasks)}"]
        for task in board.tasks:
            words.append(told(board.by_place.get((model, task)), board.metric))
        lines.append(words)
    return lines


def correlation_lines(board: Board) -> list[list[str]]:
    """Spearman's rank correlation of every two tasks."""
    lines = [["", *board.tasks]]
    for first in board.tasks:
        lines.append([first, *(shown(board.correlation(first, second)) for second in board.tasks)])
    return lines


def as_markdown(board: Board, beside: Board | None = None) -> str:
    """Everything but the pictures."""
    parts = [f"# {board.title} (scale {board.scale})", board.notes.strip()]
    for claim in board.claims():
        parts += ["## A stated order", "\n".join(f"- {line}" for line in claim_lines(claim))]
    parts += ["## Models by mean rank", MEAN_RANK, markdown_table(overview_lines(board))]
    parts += ["## Rank correlation between tasks (Spearman)", markdown_table(correlation_lines(board), words=1)]
    for task in board.tasks:
        parts += [f"## {task}", markdown_table(task_lines(board, task, beside))]
    return "\n\n".join(part for part in parts if part) + "\n"


def as_records(board: Board, beside: Board | None = None) -> list[dict[str, Any]]:
    """One flat record for each model and task, by task and rank; the metric of another board beside it."""
    rows = []
    for task in board.tasks:
        for entry in board.ranked(task):
            row: dict[str, Any] = {"task": task, "rank": board.place(entry), "model": entry.model}
            row |= {"group": entry.group, "outcome": entry.outcome, "seeds": len(entry.numbers[board.metric])}
            for name in board.columns:
                row |= {name: entry.mean(name), f"{name}_sd": entry.deviation(name)}
            if beside:
                row[f"{board.metric}_{beside.scale}"] = beside.score(entry.model, task)
            rows.append(row)
    return rows
