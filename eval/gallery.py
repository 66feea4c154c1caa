"""One HTML page of fits: pictures, players and numbers of the runs of `train.fit`, side by side.

    python -m eval.gallery --runs runs/fit/* --out runs/fit/index.html
    python -m eval.gallery --runs runs/fit/* --out page.html --title "My fits" --floor image.psnr=30 audio.snr=25

The page holds everything in itself. `--floor TASK.METRIC=NUMBER` marks what lies below, and the exit status is then 1,
as it is where no finished run is of this task. A floor `TASK.METRIC=BASELINE+NUMBER` is so much above the baseline of
that name.
"""

from __future__ import annotations

import argparse
import base64
import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from mwt.errors import InputError
from mwt.fit_run import FitRun, is_finished, read_fit_run
from mwt.page import STYLE, folded, table
from mwt.runtime import run_program, write_text

WAYS_TO_SHOW = {
    ".png": '<img loading="lazy" alt="{name}" src="data:image/png;base64,{data}">',
    ".gif": '<img loading="lazy" alt="{name}" src="data:image/gif;base64,{data}">',
    ".wav": '<audio controls preload="none" src="data:audio/wav;base64,{data}"></audio>',
    ".flac": '<audio controls preload="none" src="data:audio/flac;base64,{data}"></audio>',
}
POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"
"""A browser then loads nothing at all."""
LARGEST_FILE = 8_000_000
"""Bytes above which a file is named and not shown."""
SHOWN = 8
"""Files of a run that are shown; of many signals the first."""
EXTRA = """
.files { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); margin-top: 12px; }
.files img { width: 100%; } .files .wide { grid-column: span 2; }
audio { width: 100%; } .low { color: #c0392b; font-weight: 600; }
nav a { margin-right: 12px; color: var(--accent); }
"""


@dataclass(frozen=True, kw_only=True)
class Floor:
    """What a metric of a task should reach at least."""

    task: str
    metric: str
    baseline: str | None
    number: float

    def wanted(self, result: dict[str, Any]) -> float:
        """The number for a run, whose baselines may raise it.

        Raises:
            InputError: the run has no such baseline.
        """
        if self.baseline is None:
            return self.number
        found = result["baselines"].get(self.baseline, {}).get(self.metric)
        if found is None:
            raise InputError(f"--floor {self.task}: there is no baseline {self.baseline!r} with {self.metric}.")
        return float(found) + self.number


def read_floor(text: str) -> Floor:
    """`TASK.METRIC=NUMBER` or `TASK.METRIC=BASELINE+NUMBER`.

    Raises:
        InputError: neither.
    """
    key, _, value = text.partition("=")
    task, _, metric = key.partition(".")
    baseline, plus, number = value.rpartition("+")
    try:
        return Floor(task=task, metric=metric, baseline=baseline if plus else None, number=float(number))
    except ValueError as error:
        raise InputError(f"--floor {text!r} is not TASK.METRIC=NUMBER or TASK.METRIC=BASELINE+NUMBER.") from error


def title_of(run: FitRun) -> str:
    """Task, and what was fitted."""
    names = list(run.result["signals"])
    return f"{run.config.task.replace('_', ' ')}: {names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)}"


def shown(path: Path) -> str:
    """A file within the page, with its name."""
    name = escape(path.name)
    if path.stat().st_size > LARGEST_FILE:
        return f"<figure><figcaption>{name}: {path.stat().st_size / 1e6:.0f} MB, not shown</figcaption></figure>"
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    body = WAYS_TO_SHOW[path.suffix.lower()].format(name=name, data=data)
    wide = ' class="wide"' if path.name == "curves.png" else ""
    return f"<figure{wide}>{body}<figcaption>{name}</figcaption></figure>"


def files_of(run: FitRun) -> list[Path]:
    """What a person looks at first: reconstructions, what moves before single frames; then the film, curves."""
    inside = [path for path in sorted((run.folder / "reconstruction").glob("*")) if path.suffix.lower() in WAYS_TO_SHOW]
    films = sorted(
        (path for path in inside if path.suffix.lower() == ".gif"), key=lambda path: path.stem.endswith(".error")
    )
    # Of a video there are as many frames as it has; before them come its film, that of its error, and the frames' PSNR.
    first = [*films, *(path for path in inside if films and path.name == "psnr.png")]
    inside = [*first, *(path for path in inside if path not in first)]
    others = [run.folder / name for name in ("progress.gif", "curves.png")]
    return inside[:SHOWN] + [path for path in others if path.is_file()]


def numbers(run: FitRun, floors: list[Floor]) -> tuple[str, list[str]]:
    """The table of a run's metrics, and what lies below its floor, in words."""
    result = run.result
    rows = [("final", result["final"]), (f"best, step {result['best']['step']}", result["best"])]
    rows += list(result["baselines"].items())
    names = list(result["final"])
    cells = [
        [title, *(f"{metrics[name]:.4g}" if name in metrics else "–" for name in names)] for title, metrics in rows
    ]
    low = []
    for floor in floors:
        if floor.task == run.config.task:
            got, wanted = result["final"].get(floor.metric), floor.wanted(result)
            if got is None or not got >= wanted:  # nor is NaN
                low.append(
                    f"{floor.metric} is {got if got is None else f'{got:.2f}'}; at least {wanted:.2f} was wanted"
                )
    return table(["", *names], cells), low


def section(number: int, run: FitRun, floors: list[Floor]) -> tuple[str, list[str]]:
    """A run as a part of the page."""
    result = run.result
    body, low = numbers(run, floors)
    facts = (
        f"{run.config.field.name}, {result['parameters']:,} parameters, {result['macs_per_point']:,.0f} multiply-adds "
        f"a point; {result['steps']:,} steps of {result['optimizer']} in {result['seconds']:.0f} s"
    )
    marks = "".join(f'<p class="low">{escape(line)}</p>' for line in low)
    figures = "".join(map(shown, files_of(run)))
    ranks = run.folder / "ranks.png"
    inner = folded("Ranks and norms of the weight matrices", shown(ranks)) if ranks.is_file() else ""
    settings = inner + folded("Settings", f"<pre>{escape((run.folder / 'config.yaml').read_text())}</pre>")
    return (
        f'<section id="r{number}"><h2>{escape(title_of(run))}</h2><p class="soft">{escape(facts)}</p>{marks}{body}'
        f'<div class="files">{figures}</div>{settings}</section>',
        low,
    )


def page(title: str, runs: list[FitRun], floors: list[Floor]) -> tuple[str, dict[str, list[str]]]:
    """The whole page, and what lies below its floor, by run."""
    parts = [section(i, run, floors) for i, run in enumerate(runs)]
    links = "".join(f'<a href="#r{i}">{escape(title_of(run))}</a>' for i, run in enumerate(runs))
    html = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}{EXTRA}</style></head>'
        f"<body><h1>{escape(title)}</h1><nav>{links}</nav>{''.join(body for body, _ in parts)}</body></html>\n"
    )
    return html, {str(run.folder): low for run, (_, low) in zip(runs, parts, strict=True) if low}


def main(argv: list[str] | None = None) -> int:
    """Write the page; see the module's text. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="eval.gallery", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="run directories of train.fit")
    parser.add_argument("--out", type=Path, required=True, help="the HTML file")
    parser.add_argument("--title", default="Fits")
    parser.add_argument("--floor", nargs="+", default=[], metavar="TASK.METRIC=NUMBER", help="what is to be reached")
    arguments = parser.parse_args(argv)
    floors = [read_floor(text) for text in arguments.floor]
    finished = {folder: is_finished(folder) for folder in arguments.runs if folder.is_dir()}
    runs = [read_fit_run(folder) for folder, done in finished.items() if done]
    if not runs:
        raise InputError("None of --runs is a finished run of train.fit.")
    for folder, done in finished.items():
        if not done:
            print(f"warning: {folder} is not finished; it is left out.", file=sys.stderr)
    html, low = page(arguments.title, runs, floors)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(arguments.out, html)
    metrics = {run.config.task: next(iter(run.result["final"])) for run in runs}
    for run in runs:
        name = metrics[run.config.task]
        print(f"{title_of(run):<44} {name} {run.result['final'][name]:8.2f}   {run.result['seconds']:6.0f} s")
    print(f"\nWritten: {arguments.out} ({arguments.out.stat().st_size / 2**20:.1f} MiB); open it in a browser.")
    for folder, lines in low.items():
        print(f"below its floor: {folder}: {'; '.join(lines)}", file=sys.stderr)
    without = [text for text, floor in zip(arguments.floor, floors, strict=True) if floor.task not in metrics]
    if without:
        tasks = ", ".join(sorted(metrics))
        print(f"floors without a finished run: {', '.join(without)}; the runs are of {tasks}.", file=sys.stderr)
    return 1 if low or without else 0


if __name__ == "__main__":
    run_program(main)
