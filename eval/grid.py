"""Run a grid of programs over overrides and seeds, and make one table of what comes out, beside the paper's figures.

    python -m eval.grid --config configs/grids/table4.yaml                                 as the paper did
    python -m eval.grid --config configs/grids/table4.yaml --scale tiny --jobs 2           small, on a CPU
    python -m eval.grid --config F.yaml seeds=0,1,2 data.path=DIR run.precision=fp32       for every row
    python -m eval.grid --config F.yaml --dry-run                                          what it would start
    python -m eval.grid --config F.yaml --only 'inner_loop.*'                              some rows alone
    python -m eval.grid --config F.yaml --tables                                           the table of what is there

The same command again goes on: what is done is skipped, an interrupted training is resumed, what failed or ran out of
memory or time is tried again; what is not defined or has diverged would be so again, and stays. Writes OUT/table.md,
.csv and .json, the plots that the grid names, cells.json, which says what job belongs to which row, and OUT/jobs/ with
a run directory, a log and a record of each job. Exit status 1 where something failed or ran out of memory or time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mwt.errors import InputError
from mwt.grids.config import GridConfig, load_grid
from mwt.grids.jobs import Child, Runner, own_folder
from mwt.grids.plan import Cell, Job, expand, select
from mwt.grids.table import (
    OUTCOMES,
    RESULTS,
    Row,
    as_csv,
    as_markdown,
    as_text,
    collect,
    finished,
    points,
    read_record,
    records,
    settled,
)
from mwt.runtime import StopRequested, environment, run_program, write_json, write_text


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(prog="eval.grid", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="the grid's YAML file, see configs/grids")
    parser.add_argument("--scale", help="one of the grid's scales; by default its first")
    parser.add_argument("--jobs", type=int, default=1, help="programs at a time; they share the CPU's cores")
    parser.add_argument("--out", type=Path, help="by default runs/grids/NAME_SCALE")
    parser.add_argument("--only", default="*", metavar="GLOB", help="run these rows alone, by name (see --dry-run)")
    parser.add_argument("--dry-run", action="store_true", help="show what would be started and leave")
    parser.add_argument("--tables", action="store_true", help="start nothing, write the tables of what is there")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="of every row; seeds=0,1,2 are the grid's own"
    )
    arguments = parser.parse_intermixed_args(argv)
    if arguments.jobs < 1:
        raise InputError(f"--jobs is {arguments.jobs}; it must be at least 1.")
    for item in arguments.overrides:
        if "=" not in item:
            raise InputError(f"{item!r} is not of the form key=value.")
    return arguments


def take_seeds(overrides: list[str]) -> tuple[list[int] | None, list[str]]:
    """`seeds=` out of the overrides, and the others."""
    own = [item.partition("=")[2] for item in overrides if item.startswith("seeds=")]
    others = [item for item in overrides if not item.startswith("seeds=")]
    if not own:
        return None, others
    try:
        seeds = [int(word) for word in own[-1].strip("[]").split(",")]
    except ValueError as error:
        raise InputError(f"seeds={own[-1]} is not a list of whole numbers such as seeds=0,1,2.") from error
    if len(set(seeds)) < len(seeds):
        raise InputError(f"seeds={own[-1]} names a seed twice.")
    return seeds, others


# ---- the programs that run -----------------------------------------------------------------------------------------


def run_jobs(runner: Runner, durations: dict[str, list[float]], after: Callable[[], object]) -> int:
    """Run everything that waits. Returns the exit status; `after` is called when a job has ended.

    The first Ctrl-C (or SIGTERM) ends the programs as they can be resumed, a second one kills them.
    """
    total, ended, asked, tables_due = len(runner.waiting), 0, None, 0.0
    with tqdm(total=total, unit="job", dynamic_ncols=True, disable=None) as bar, StopRequested() as stop:
        try:
            while runner.children or (runner.waiting and not stop.signal):
                if not stop.signal:
                    runner.fill()
                else:
                    if asked is None:
                        bar.write("Stopping: the programs save and end; Ctrl-C again kills them.", file=sys.stderr)
                    asked = runner.stop(asked)
                for child in runner.reap(stopping=bool(stop.signal)):
                    if child.record["status"] == "done":
                        durations.setdefault(child.job.stage, []).append(child.record["seconds"])
                    ended += child.record["status"] != "interrupted"
                    bar.update(ended - bar.n)
                    bar.write(told_of(child, ended, total, runner.seconds_left(durations), runner.folder))
                    if (began := time.monotonic()) >= tables_due:  # a twentieth of the time at most, however many rows
                        after()
                        tables_due = time.monotonic() + 20 * (time.monotonic() - began)
                bar.set_postfix_str(", ".join(child.job.label for child in runner.children)[:60])
                time.sleep(0.05)
        finally:
            runner.kill()  # nobody is left where all went well
        bad = any(runner.counts[outcome] for outcome in OUTCOMES if outcome not in RESULTS)
        return stop.exit_status if stop.signal else 1 if bad else 0


def told_of(child: Child, number: int, total: int, left: float | None, folder: Path) -> str:
    """A line about a job that has ended."""
    record = child.record
    line = f"[{number}/{total}] {child.job.label}: {record['status']} after {record['seconds']:.0f} s"
    if record["status"] in OUTCOMES:
        status = f" with status {record['exit']}" if record["status"] == "failed" else ""
        line += f"{status}: {record['said'][:200]} (all of it in {folder / f'{child.job.id}.log'})"
    return line + (f"; about {duration(left)} left" if left else "")


def duration(seconds: float) -> str:
    """Seconds for people: 40 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# ---- tables ------------------------------------------------------------------------------------------------------


def write_tables(grid: GridConfig, cells: list[Cell], out: Path, heading: str, command: str) -> str:
    """Markdown, CSV, JSON and plots of what is there. Returns the table for a terminal."""
    jobs = out / "jobs"
    rows = collect(grid, cells, jobs)
    known = {job.id: job for cell in cells for chain in cell.jobs.values() for job in chain.values()}
    done = [read_record(jobs, job) for job in known.values() if finished(jobs, job)]
    spent = sum(record["seconds"] for record in done)
    machine = json.loads((out / "env.json").read_text()) if (out / "env.json").is_file() else {}
    remarks = [f"`{command}`: {len(done)} of {len(known)} jobs done, {duration(spent)} of their time."]
    if machine:
        commits = dict.fromkeys(record["commit"] for record in done if record.get("commit"))  # of all of the runs
        remarks.append(
            f"Commit {' and '.join(commits) or commit_of(machine)}; {', '.join(machine['gpus']) or machine['cpu']}; "
            f"torch {machine['versions']['torch']}."
        )
    for plot in grid.plots:
        titles = [column.title for column in (grid.columns[plot.x], grid.columns[plot.y])]
        panels = [(pattern, [pair for pair in points(rows, plot, pattern) if pair[1]]) for pattern in plot.panels]
        panels = [(pattern.rstrip("*").rstrip(" ,:"), curves) for pattern, curves in panels if curves]
        if panels:
            from mwt.plots import family_figure, figure_png, tradeoff_figure  # matplotlib, for grids with plots alone

            if plot.group in grid.groups() and not plot.kinds:
                [(_, curves)] = panels
                figure = tradeoff_figure(curves, xlabel=titles[0], ylabel=titles[1], line=plot.line, log_x=plot.log_x)
            else:
                figure = family_figure(panels, xlabel=titles[0], ylabel=titles[1], log_x=plot.log_x)
            (out / f"{plot.name}.png").write_bytes(figure_png(figure))
            remarks.append(f"![{plot.group}: {titles[1]} against {titles[0]}]({plot.name}.png)")
    if outcomes := summary(rows):
        remarks.insert(0, outcomes)
    table = records(grid, rows)
    write_text(out / "table.md", as_markdown(grid, rows, heading=heading, remarks=remarks))
    write_text(out / "table.csv", as_csv(table))
    write_json(out / "table.json", table)
    return as_text(grid, rows)


def commit_of(machine: dict[str, Any]) -> str:
    """The commit of an environment, and whether files were changed since."""
    return f"{machine['commit']}{', modified' if machine['modified'] else ''}"


def summary(rows: list[Row]) -> str:
    """How many rows came to what; empty where all are done."""
    counts = {how: sum(how in row.outcomes.values() for row in rows) for how in OUTCOMES}
    counts["open"] = sum(bool(row.open) for row in rows)
    if not any(counts.values()):
        return ""
    done = sum(not row.outcomes and not row.open for row in rows)
    others = ", ".join(f"{count} {how}" for how, count in counts.items() if count)
    return f"{len(rows)} rows: {done} done, {others}."


def write_cells(grid: GridConfig, cells: list[Cell], out: Path, scale: str) -> None:
    """cells.json: the rows with what makes them and the jobs of each seed, for programs that look into those."""
    rows = [
        {"name": cell.name, "group": cell.group, "label": cell.label, "axes": cell.axes,
         "jobs": {seed: {stage: job.id for stage, job in chain.items()} for seed, chain in cell.jobs.items()}}
        for cell in cells
    ]  # fmt: skip
    columns = {name: dataclasses.asdict(column) for name, column in grid.columns.items()}
    claims = [dataclasses.asdict(claim) for claim in grid.claims]
    head = {"title": grid.title, "scale": scale, "notes": grid.notes, "columns": columns, "claims": claims}
    write_json(out / "cells.json", {**head, "rows": rows})


def unfinished(jobs: list[Job], folder: Path) -> list[Job]:
    """Jobs that are not settled, and those that need one of them; `jobs` has what is needed before what needs it.

    What needs a job that has come to nothing is not among them.
    """
    to_do: dict[str, Job] = {}
    never: set[str] = set()
    for job in jobs:
        if never & set(job.needs):
            never.add(job.id)
        elif not settled(folder, job) or any(name in to_do for name in job.needs):
            to_do[job.id] = job
        elif not finished(folder, job):
            never.add(job.id)
    return list(to_do.values())


def show_plan(cells: list[Cell], jobs: list[Job], folder: Path) -> None:
    """What would be started."""
    for cell in cells:
        print(f"{cell.name}  [{cell.group}: {cell.label}]")
        for seed, chain in cell.jobs.items():
            for job in chain.values():
                state = "done" if finished(folder, job) else read_record(folder, job).get("status", "to do")
                shared = "" if job.label.startswith(f"{cell.name}, seed {seed}:") else f", the same as {job.label}"
                print(f"    seed {seed} {job.stage:<12} {state:<12} python -m {job.program} "
                      f"{shlex.join(job.arguments(folder))}{shared}")  # fmt: skip
    print(f"\n{len(cells)} rows, {len(jobs)} jobs to do")


# ---- the program -------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Run the grid; see the module's text. Returns the exit status."""
    arguments = parse(argv)
    grid = load_grid(arguments.config)
    scale = arguments.scale or next(iter(grid.scales))
    seeds, overrides = take_seeds(arguments.overrides)
    cells = expand(grid, arguments.config, scale, seeds=seeds, overrides=overrides)
    chosen = select(cells, arguments.only)
    out = arguments.out or Path("runs/grids") / f"{arguments.config.stem}_{scale}"
    folder = out / "jobs"
    # All rows with one seed before the next seed: an unfinished table is then complete as far as it goes.
    order = {job.id: job for seed in chosen[0].jobs for cell in chosen for job in cell.jobs[seed].values()}
    to_do = unfinished(list(order.values()), folder)
    if arguments.dry_run:
        show_plan(chosen, to_do, folder)
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    heading, status = f"{grid.title} (scale {scale})", 0
    command = shlex.join(["python", "-m", "eval.grid", *(argv if argv is not None else sys.argv[1:])])
    if arguments.tables:
        write_cells(grid, cells, out, scale)
    else:
        with own_folder(out) as lock:
            shutil.copyfile(arguments.config, out / "grid.yaml")
            write_cells(grid, cells, out, scale)
            machine = environment()
            if to_do:
                write_json(out / "env.json", machine)
            runner = Runner(folder=folder, slots=arguments.jobs, lock=lock, waiting=to_do, commit=commit_of(machine))
            print(f"{len(chosen)} rows, {len(order)} jobs: {len(order) - len(to_do)} done before, {len(to_do)} to do")
            durations: dict[str, list[float]] = {}
            for job in order.values():
                if finished(folder, job):
                    durations.setdefault(job.stage, []).append(read_record(folder, job)["seconds"])
            status = run_jobs(runner, durations, lambda: write_tables(grid, cells, out, heading, command))
    print(f"\n{heading}\n\n{write_tables(grid, cells, out, heading, command)}")
    print(summary(collect(grid, cells, folder)))
    print(f"\nWritten: {out / 'table.md'}, table.csv and table.json" + "".join(f", {p.name}.png" for p in grid.plots))
    if status in (130, 143):
        print("Stopped; the same command goes on.", file=sys.stderr)
    elif status:
        print(
            "Some jobs failed, or ran out of memory or time; the table names them. The same command tries them again.",
            file=sys.stderr,
        )
    return status


if __name__ == "__main__":
    run_program(main)
