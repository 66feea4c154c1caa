"""Leaderboards of a grid of models and tasks: CSV, Markdown, and one HTML page that holds everything in itself.

    python -m eval.leaderboard --grid runs/grids/inr_bench_mini_adam
    python -m eval.leaderboard --grid runs/grids/inr_bench_mini_adam --beside runs/grids/inr_bench_mini_muon

Reads what `eval.grid` has left there, finished or not. Writes leaderboard.csv, leaderboard.md and leaderboard.html into
the grid's folder: a sortable table for each task, a heat map of models and tasks, the rank correlation of tasks,
reconstructions side by side and convergence curves, and how orders that others state hold here.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
from html import escape
from pathlib import Path

from PIL import Image

from mwt.errors import InputError
from mwt.grids.leaderboard import (
    MEAN_RANK,
    Board,
    Entry,
    as_markdown,
    as_records,
    claim_lines,
    correlation_lines,
    load_board,
    overview_lines,
    read_result,
    shown,
    task_lines,
)
from mwt.grids.table import as_csv
from mwt.page import STYLE, section
from mwt.runtime import run_program, write_text
from mwt.tracking import read_metrics

COLOURS = ("#2a78c8", "#d9702b", "#2f9e58", "#a04fc0", "#c7962a", "#c8405a", "#3aa6a6", "#8a919c")
"""Of curves: seen on white and on dark."""
LONGEST = 300
"""Pixels of the longer side of a picture on the page."""
PICTURES = 6
"""Models of a task whose reconstructions are shown."""
NOT_THE_PICTURE = (".error", ".truth", ".measured", ".sinogram", ".fbp", ".bicubic")
SCRIPT = """
for (const table of document.querySelectorAll('table.sortable'))
  table.querySelectorAll('th').forEach((head, column) => head.addEventListener('click', () => {
    const body = table.tBodies[0], down = head.dataset.order !== 'down';
    table.querySelectorAll('th').forEach(other => delete other.dataset.order);
    head.dataset.order = down ? 'down' : 'up';
    const key = row => row.cells[column].dataset.v ?? row.cells[column].textContent;
    const number = text => text === '' ? NaN : Number(text);
    [...body.rows].sort((a, b) => {
      const [x, y] = [number(key(a)), number(key(b))];
      if (isNaN(x) && isNaN(y)) return key(a).localeCompare(key(b)) * (down ? 1 : -1);
      if (isNaN(x) || isNaN(y)) return isNaN(x) ? 1 : -1;
      return down ? y - x : x - y;
    }).forEach(row => body.append(row));
  }));
"""
POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-"
    + base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    + "'"
)
"""A browser then loads nothing, and runs this script alone."""
EXTRA = """
body { max-width: 1280px; } nav { margin: 14px 0 0; } nav a { margin-right: 12px; color: var(--accent); }
table.sortable th { cursor: pointer; user-select: none; position: sticky; top: 0; background: var(--card); }
table.sortable th:hover { color: var(--accent); }
th[data-order=down]::after { content: " \\2193"; } th[data-order=up]::after { content: " \\2191"; }
table.words td:nth-child(2), table.words th:nth-child(2) { text-align: left; }
.tall { max-height: 460px; overflow: auto; } td.none { color: var(--soft); }
.heat td { border: 0; padding: 2px 8px; } .heat th { padding: 3px 8px; vertical-align: bottom; }
.heat th:first-child, .heat td:first-child { position: sticky; left: 0; background: var(--card); z-index: 1; }
.heat td[style] { background: color-mix(in srgb, var(--accent) calc(var(--v) * 0.5%), transparent); }
.heat tr.g td { border-top: 1px solid var(--line); }
.shots { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); margin: 8px 0 18px; }
.shots.wide { grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); }
.shots img { width: 100%; image-rendering: auto; border-radius: 4px; }
h3 { font-size: 1rem; margin: 14px 0 4px; }
.plots { display: grid; gap: 18px; grid-template-columns: repeat(auto-fill, minmax(310px, 1fr)); }
svg { width: 100%; height: auto; color: var(--ink); } svg text { font: 11px system-ui, sans-serif; fill: var(--soft); }
.key { font-size: .78rem; color: var(--soft); line-height: 1.5; } .key span { white-space: nowrap; margin-right: 10px; }
.key i { display: inline-block; width: 12px; height: 3px; vertical-align: middle; margin-right: 4px; }
"""


# ---- tables ----------------------------------------------------------------------------------------------------------


def task_table(board: Board, task: str, beside: Board | None) -> str:
    """The leaderboard of a task; a click on a column's head sorts by it."""
    head, *lines = task_lines(board, task, beside)
    rows = []
    for entry, (rank, model, *words) in zip(board.ranked(task), lines, strict=True):
        values = [entry.mean(name) if name != board.metric or not entry.lost else None for name in board.columns]
        values += [beside.score(entry.model, task)] if beside else []
        cells = [cell(rank, board.ranks.get((entry.model, task))), cell(model)]
        cells += [cell(word, value, number=True) for word, value in zip(words, values, strict=True)]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    return (
        f'<div class="tall"><table class="sortable words"><thead><tr>{titles}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def cell(words: str, value: float | None = None, *, number: bool = False, share: float | None = None) -> str:
    """A cell of a sortable table, with the number by which it is sorted, and of a heat map how deep its colour is."""
    order = f' data-v="{"" if value is None else value}"' if number or value is not None else ""
    colour = "" if share is None else f' style="--v:{100 * share:.0f}"'
    missing = ' class="none"' if number and value is None else ""
    return f"<td{order}{colour}{missing}>{escape(words)}</td>"


def heat_map(board: Board) -> str:
    """Models by tasks: the metric, and as the colour's depth the share of the task's models that are not better."""
    counts = {task: sum(place[1] == task for place in board.ranks) for task in board.tasks}
    head, *lines = overview_lines(board)
    titles = [*head[:3], *(f"{task.replace('_', ' ')}, {board.metric_name(task)}" for task in board.tasks)]
    rows = []
    for model, mean_rank, count, *words in lines:
        cells = [cell(model), cell(mean_rank, board.mean_rank(model), number=True)]
        cells.append(cell(count, len(board.places(model)), number=True))
        for task, word in zip(board.tasks, words, strict=True):
            rank = board.ranks.get((model, task))
            share = None if rank is None else 1 - (rank - 1) / max(1, counts[task] - 1)
            cells.append(cell(word, board.score(model, task), number=True, share=share))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    top = "".join(f"<th>{escape(title)}</th>" for title in titles)
    return (
        f'<div class="tall"><table class="sortable heat"><thead><tr>{top}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def correlations(board: Board) -> str:
    """Spearman's rank correlation of every two tasks, the deeper the colour the more alike."""
    head, *lines = correlation_lines(board)
    top = "".join(f"<th>{escape(title.replace('_', ' '))}</th>" for title in head)
    rows = []
    for task, *_ in lines:
        cells = [cell(task.replace("_", " "))]
        for other in board.tasks:
            value = board.correlation(task, other)
            cells.append(cell(shown(value), value, number=True, share=None if value is None else max(0.0, value)))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    body = f"<thead><tr>{top}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="scroll"><table class="heat">{body}</table></div>'


# ---- pictures --------------------------------------------------------------------------------------------------------


def chosen(board: Board, task: str, count: int) -> list[Entry]:
    """Entries from the best to the worst: the best, the best of every other group, and some evenly between."""
    done = [entry for entry in board.ranked(task) if entry.mean(board.metric) is not None and entry.runs]
    best = list({entry.group: entry for entry in reversed(done)}.values())
    rest = [entry for entry in done if entry not in best]
    missing = min(max(0, count - len(best)), len(rest))
    between = [rest[i * (len(rest) - 1) // max(1, missing - 1)] for i in range(missing)]
    wanted = {id(entry) for entry in (*best, *between)}
    return [entry for entry in done if id(entry) in wanted]


def picture_of(run: Path) -> Path | None:
    """The picture that shows a run's reconstruction."""
    found = sorted((run / "reconstruction").glob("*.png"))
    return next((path for path in found if not path.stem.endswith(NOT_THE_PICTURE)), None)


def inline(path: Path) -> tuple[str, bool]:
    """A picture within the page, made small; and whether it is a wide one."""
    with Image.open(path) as image:
        small = image.convert("RGB")
        small.thumbnail((LONGEST, LONGEST))
        stream = io.BytesIO()
        small.save(stream, "WEBP", quality=80)
    data = base64.b64encode(stream.getvalue()).decode()
    wide = small.width > 1.4 * small.height
    return f'<img loading="lazy" alt="{escape(path.stem)}" src="data:image/webp;base64,{data}">', wide


def reconstructions(board: Board, task: str) -> str:
    """What some models of a task show, best first, and the truth where there is a picture of it alone."""
    figures: list[str] = []
    any_wide = False
    entries = chosen(board, task, PICTURES)
    for entry in entries:
        path = picture_of(entry.runs[0])
        if path is None:
            continue
        if not figures:
            for truth in sorted(path.parent.glob("*.truth.png"))[:1]:
                figures.append(f"<figure>{inline(truth)[0]}<figcaption>truth</figcaption></figure>")
        image, wide = inline(path)
        any_wide |= wide
        score = shown(entry.mean(board.metric))
        figures.append(
            f"<figure>{image}<figcaption>{board.place(entry)}. {escape(entry.model)}<br>{score}</figcaption></figure>"
        )
    if not figures:
        return ""
    kind = "shots wide" if any_wide else "shots"
    return f'<h3>{escape(task.replace("_", " "))}</h3><div class="{kind}">{"".join(figures)}</div>'


def curves(board: Board, task: str) -> str:
    """The metric over the steps of some models of a task, as a drawing."""
    lines = []
    for entry in chosen(board, task, len(COLOURS)):
        rows = read_metrics(entry.runs[0] / "metrics.jsonl")
        paths = [path.removeprefix("final.") for path in board.columns[board.metric]["path"].split("|")]
        name = next((path for path in paths if rows and path in rows[0]), None)
        if name is not None:
            lines.append((entry.model, [(row["step"], row[name]) for row in rows]))
    if not lines:
        return ""
    width, height, left, right, top, bottom = 360, 220, 40, 8, 8, 24
    steps = [step for _, points in lines for step, _ in points]
    values = sorted(value for _, points in lines for _, value in points)
    low, high, last = values[len(values) // 20], values[-1], max(steps)  # a model far below all is cut off
    span = (high - low) or 1.0

    def place(step: float, value: float) -> str:
        x = left + (width - left - right) * step / last
        y = top + (height - top - bottom) * (1 - (max(low, value) - low) / span)
        return f"{x:.1f},{y:.1f}"

    parts = []
    for i in range(4):
        value = low + span * i / 3
        y = top + (height - top - bottom) * (1 - i / 3)
        parts.append(f'<path d="M{left} {y:.1f}H{width - right}" stroke="currentColor" stroke-opacity=".15"/>')
        parts.append(f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    parts.append(f'<text x="{width - right}" y="{height - 6}" text-anchor="end">{last:,} steps</text>')
    key = []
    for (model, points), colour in zip(lines, COLOURS, strict=False):
        dots = " ".join(place(step, value) for step, value in points)
        parts.append(f'<polyline points="{dots}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        key.append(f'<span><i style="background:{colour}"></i>{escape(model)}</span>')
    title = f"{task.replace('_', ' ')}: {board.metric_name(task)}"
    return (
        f'<div><h3>{escape(title)}</h3><svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
        f'{"".join(parts)}</svg><div class="key">{"".join(key)}</div></div>'
    )


# ---- the page --------------------------------------------------------------------------------------------------------


def simple_methods(board: Board, task: str) -> str:
    """What simple methods reach on the same data, as a sentence; empty where there are none."""
    run = next((entry.runs[0] for entry in board.ranked(task) if entry.runs), None)
    found = {} if run is None else read_result(run).get("baselines", {})
    words = [f"{name} {metrics[key]:.2f}" for name, metrics in found.items() for key in ("snr", "psnr", "iou")
             if key in metrics]  # fmt: skip
    return f"On the same data without a network: {', '.join(words)}." if words else ""


def page(board: Board, beside: Board | None) -> str:
    """The whole page."""
    counts = {"models": len(board.models), "tasks": len(board.tasks)}
    for entry in board.entries:
        counts[entry.outcome] = counts.get(entry.outcome, 0) + 1
    numbers = "".join(f"<div><b>{count:,}</b><span>{escape(name)}</span></div>" for name, count in counts.items())
    parts = [
        section(claim.title, "", *(f"<p>{escape(line)}</p>" for line in claim_lines(claim)[1:]))
        for claim in board.claims()
    ]
    parts.append(section(
        "Models and tasks", "The metric of every model on every task, sorted by mean rank; the deeper the colour, the "
        f"better the rank within the task. {MEAN_RANK} A click on a column's head sorts by it.",
        heat_map(board)))  # fmt: skip
    parts.append(section(
        "Rank correlation between tasks", "Spearman's, over the models that have a number in both: 1, where both rank "
        "alike; 0, where the rank in one says nothing of the rank in the other.", correlations(board)))  # fmt: skip
    linked = {
        task: section(f"Task: {task.replace('_', ' ')}", simple_methods(board, task), task_table(board, task, beside))
        for task in board.tasks
    }
    if shots := "".join(reconstructions(board, task) for task in board.tasks):
        linked["reconstructions"] = section("Reconstructions", "From the best to the worst of some models.", shots)
    if plots := "".join(curves(board, task) for task in board.tasks):
        text = "The metric over the steps, of models from the best to the worst."
        linked["convergence"] = section("Convergence", text, f'<div class="plots">{plots}</div>')
    parts += [part.replace("<section>", f'<section id="{escape(name)}">', 1) for name, part in linked.items()]
    links = "".join(f'<a href="#{escape(name)}">{escape(name.replace("_", " "))}</a>' for name in linked)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(board.title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}{EXTRA}</style></head>'
        f'<body><h1>{escape(board.title)}</h1><p class="soft">Scale {escape(board.scale)}. {escape(board.notes)}</p>'
        f'<div class="numbers">{numbers}</div><nav>{links}</nav>{"".join(parts)}'
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def main(argv: list[str] | None = None) -> int:
    """Write the leaderboards; see the module's text. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="eval.leaderboard", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--grid", type=Path, required=True, help="a folder of eval.grid")
    parser.add_argument("--beside", type=Path, help="another such folder, whose metric is a further column")
    parser.add_argument("--axis", default="task", help="which axis of the rows is the task")
    arguments = parser.parse_args(argv)
    board = load_board(arguments.grid, axis=arguments.axis)
    beside = load_board(arguments.beside, axis=arguments.axis) if arguments.beside else None
    if beside and not set(beside.by_place) & set(board.by_place):
        raise InputError(f"{arguments.beside} and {arguments.grid} have no model and task in common.")
    out = arguments.grid
    write_text(out / "leaderboard.csv", as_csv(as_records(board, beside)))
    write_text(out / "leaderboard.md", as_markdown(board, beside))
    write_text(out / "leaderboard.html", page(board, beside))
    for task in board.tasks:
        best = board.ranked(task)[0]
        score = best.mean(board.metric)
        model = "nothing yet" if score is None else best.model
        print(f"{task:<18} {board.metric_name(task):<10} {shown(score):>8}  {model}")
    for claim in board.claims():
        print("\n" + "\n".join(claim_lines(claim)))
    size = (out / "leaderboard.html").stat().st_size / 2**20
    print(f"\nWritten: {out}/leaderboard.html ({size:.1f} MiB), leaderboard.md and leaderboard.csv")
    return 0


if __name__ == "__main__":
    run_program(main)
