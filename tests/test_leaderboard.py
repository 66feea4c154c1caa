"""eval.leaderboard on a grid of toy models: ranks and correlations beside what was counted by hand; the page."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval import grid, leaderboard
from mwt.errors import InputError
from mwt.grids.leaderboard import Board, Entry, load_board, overview_lines, shown, task_lines

# A model's score on a task and seed; beta diverges on sound.
TOY = """
import json, pathlib, sys
options = dict(word.split("=", 1) for word in sys.argv[1:])
run, model, seed = pathlib.Path(options["run.dir"]), options["model"], int(options["seed"])
run.mkdir()
if (model, options["task"]) == ("beta", "sound"):
    print("not finite"); sys.exit(4)
score = {"alpha": [30, 5], "beta": [20, 0], "gamma": [10, 9], "delta": [15, 7]}[model][options["task"] == "sound"]
name = "snr" if options["task"] == "sound" else "psnr"
(run / "result.json").write_text(json.dumps({
    "final": {name: score + seed}, "parameters": 1000 * len(model), "baselines": {"nothing": {name: 1.5}}}))
with (run / "metrics.jsonl").open("w") as file:
    for step in (1, 10, 100):
        file.write(json.dumps({"step": step, name: score * step / 100}) + "\\n")
"""
GRID = """
title: Toys <all>
source: nobody
scales: {adam: {seeds: [0, 1]}, slow: {seeds: [0]}}
stages: {fit: {program: toyfit, overrides: ["run.dir={dir}", "seed={seed}"]}}
rows:
  - group: Net
    product: {task: [picture, sound], model: [alpha, beta, gamma]}
    overrides: ["task={task}", "model={model}"]
  - {group: Other, product: {task: [picture, sound], model: [delta]}, overrides: ["task={task}", "model={model}"]}
columns:
  metric: {title: metric, stage: fit, file: result.json, path: final.snr|final.psnr}
  parameters: {title: parameters, stage: fit, file: result.json, path: parameters, decimals: 0, average: false}
claims:
  - title: Somebody's order
    task: sound
    models: {C: "Net: gamma", A: "Net: alpha", B: "Net: beta", D: "Other: delta"}
"""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("leaderboard")
    (folder / "toyfit.py").write_text(TOY)
    (folder / "toys.yaml").write_text(GRID)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        assert grid.main(["--config", str(folder / "toys.yaml"), "--out", str(folder / "out"), "--jobs", "2"]) == 0
    for cell in json.loads((folder / "out" / "cells.json").read_text())["rows"]:
        for chain in cell["jobs"].values():
            place = folder / "out" / "jobs" / chain["fit"] / "reconstruction"
            place.mkdir()
            for name in ("a.png", "a.truth.png", "a.error.png"):
                Image.fromarray(np.full((9, 12, 3), 90, np.uint8)).save(place / name)
    assert leaderboard.main(["--grid", str(folder / "out")]) == 0
    return folder / "out"


def test_ranks_means_and_what_has_no_number(out: Path) -> None:
    with (out / "leaderboard.csv").open(newline="") as file:
        rows = {(row["task"], row["model"]): row for row in csv.DictReader(file)}
    ranks = {place: row["rank"] for place, row in rows.items()}
    assert [ranks["picture", name] for name in ("Net: alpha", "Net: beta", "Other: delta", "Net: gamma")] == list(
        "1234"
    )
    assert [ranks["sound", name] for name in ("Net: gamma", "Other: delta", "Net: alpha")] == list("123")
    assert (ranks["sound", "Net: beta"], rows["sound", "Net: beta"]["outcome"]) == ("", "diverged")
    alpha = rows["picture", "Net: alpha"]
    assert (float(alpha["metric"]), float(alpha["metric_sd"])) == (30.5, pytest.approx(0.5**0.5))  # seeds 30 and 31
    assert (alpha["parameters"], alpha["seeds"], alpha["group"]) == ("5000.0", "2", "Net")
    board = load_board(out)
    assert board.mean_rank("Net: alpha") == 2  # 1 and 3
    assert board.mean_rank("Net: beta") == 3  # 2, and 4 for having diverged
    assert [board.metric_name(task) for task in board.tasks] == ["PSNR, dB", "SNR, dB"]


def test_the_correlation_is_of_the_models_that_both_tasks_have(out: Path) -> None:
    board = load_board(out)
    # alpha, delta, gamma rank 1, 2, 3 on pictures and 3, 2, 1 on sounds: 1 - 6 (4 + 0 + 4) / (3 (9 - 1)) = -1
    assert board.correlation("picture", "sound") == pytest.approx(-1)
    assert board.correlation("picture", "picture") == pytest.approx(1)
    assert board.correlation("sound", "picture") == board.correlation("picture", "sound")


def test_equal_models_share_places_and_what_came_to_nothing_is_last() -> None:
    scores: dict[str, dict[int, float]] = {"a": {0: 5.0}, "b": {0: 7.0, 1: 7.0}, "c": {0: 5.0}, "d": {0: 1.0}}
    ends = {"b": "diverged", "e": "diverged", "f": "out of memory", "g": "not defined", "h": "open"}
    entries = [
        Entry(model=model, group="", task=task, numbers={"x": scores.get(model, {})}, seeds=2 if model == "b" else 1,
              outcome=ends.get(model, "done"), runs=())
        for task in ("one", "two") for model in "abcdefgh"
    ]  # fmt: skip
    entries[1] = replace(entries[1], seeds=3)
    columns = {"x": {"title": "x", "path": "x", "decimals": 1, "average": True}}
    board = Board(title="", scale="", notes="", columns=columns, entries=tuple(entries), claimed=())
    numbers = np.array([5.0, 5.0, 1.0])  # b has lost a seed: what the others reached is not its rank
    by_hand = [1 + (numbers > own).sum() + ((numbers == own).sum() - 1) / 2 for own in numbers]
    assert [board.ranks[model, "one"] for model in "acd"] == by_hand == [1.5, 1.5, 3]
    assert [board.mean_rank(model) for model in "abcdefgh"] == [1.5, 5, 1.5, 3, 5, 5, None, None]
    assert board.score("b", "one") is None
    shown = {line[1]: (line[0], line[2]) for line in task_lines(board, "one")[1:]}
    assert (shown["a"], shown["b"]) == (("1.5", "5.0"), ("", "7.0 ± 0.0 (2 of 3 seeds, diverged)"))
    assert [shown[model] for model in "efgh"] == [("", ends[model]) for model in "efgh"]
    assert [line[0] for line in overview_lines(board)[1:]] == list("acdbefgh")
    assert [line[2] for line in overview_lines(board)[1:]] == ["2 of 2"] * 6 + ["0 of 2"] * 2


def test_a_mean_rank_over_fewer_tasks_is_told_and_comes_after() -> None:
    """a is first where it is defined; b and c have both tasks."""
    scores = {("a", "one"): 9.0, ("b", "one"): 5.0, ("c", "one"): 4.0, ("b", "two"): 1.0, ("c", "two"): 3.0}
    scores |= {("d", "two"): 2.0}
    entries = [
        Entry(model=model, group="", task=task, numbers={"x": {0: found}} if found is not None else {}, seeds=1,
              outcome={"a": "not defined", "d": "open"}[model] if found is None else "done", runs=())
        for task in ("one", "two") for model in "abcd" for found in [scores.get((model, task))]
    ]  # fmt: skip
    columns = {"x": {"title": "x", "path": "x", "decimals": 1, "average": True}}
    board = Board(title="", scale="", notes="", columns=columns, entries=tuple(entries), claimed=())
    rows = [line[:3] for line in overview_lines(board)]
    assert rows == [
        ["model", "mean rank", "of tasks"],
        ["c", "2.0", "2 of 2"],  # 3 and 1
        ["b", "2.5", "2 of 2"],  # 2 and 3
        ["a", "1.0", "1 of 2"],
        ["d", "2.0", "1 of 2"],
    ]
    html = leaderboard.page(board, None)
    assert "means over other tasks cannot be compared with theirs" in html
    assert '<td data-v="1">1 of 2</td>' in html


def test_a_stated_order_is_counted(out: Path) -> None:
    (claim,) = load_board(out).claims()
    assert [score for _, _, score in claim.rows] == [9.5, 5.5, None, 7.5]
    assert claim.neighbours == (1, 1)  # C > A holds; those of B have no number
    assert claim.pairs == (2, 3)  # C > A and C > D hold, A > D does not
    board = load_board(out)
    others = {"title": "Another", "task": "sound", "models": {"C": "Net: gamma", "X": "Net: of another grid"}}
    assert replace(board, claimed=(*board.claimed, others)).claims() == [claim]
    text = (out / "leaderboard.md").read_text()
    assert "Here: C (9.50) > D (7.50) > A (5.50)." in text
    assert "1 of 1 neighbouring pairs and 2 of 3 pairs have the stated order; 1 models have no number." in text


def test_the_page_loads_nothing_and_is_well_formed(out: Path) -> None:
    html = (out / "leaderboard.html").read_text()
    assert all(source.startswith(("data:", "#")) for source in re.findall(r'(?:src|href)="([^"]{0,20})', html))
    assert "Toys &lt;all&gt;" in html
    assert html.count("<img") == 4 + 3 + 2  # reconstructions of the models that have a number, and the truths
    assert html.count("<polyline") == 4 + 3
    assert "nothing 1.50" in html  # a simple method
    assert html.count(">diverged<") == 3  # of the numbers, on its task's table, in the heat map
    assert re.findall(r'style="--v:(\d+)"', html)[:4].count("100") >= 1

    class Balance(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []

        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in ("meta", "img", "path", "br"):
                self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            if tag not in ("path", "br"):
                assert self.open.pop() == tag

    parser = Balance()
    parser.feed(html)
    assert parser.open == []


def test_a_second_grid_is_a_further_column(out: Path) -> None:
    folder = out.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        arguments = ["--config", str(folder / "toys.yaml"), "--out", str(folder / "other"), "--scale", "slow"]
        assert grid.main([*arguments, "--only", "Net: picture*alpha"]) == 0
    assert leaderboard.main(["--grid", str(out), "--beside", str(folder / "other")]) == 0
    html, text = ((out / f"leaderboard.{ending}").read_text() for ending in ("html", "md"))
    assert "<th>PSNR, dB, slow</th>" in html
    assert 'data-v="30.0">30.00</td>' in html
    assert "| 1 | Net: alpha | 30.50 ± 0.71 | 5000 | 30.00 |" in text.replace("5,000", "5000")
    assert "| 2 | Net: beta | 20.50 ± 0.71 | 4000 | open |" in text.replace("4,000", "4000")
    with (out / "leaderboard.csv").open(newline="") as file:
        beside = {(row["task"], row["model"]): row["metric_slow"] for row in csv.DictReader(file)}
    assert (beside["picture", "Net: alpha"], beside["picture", "Net: beta"]) == ("30.0", "")


def test_what_is_no_grid_is_refused(out: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no folder of eval\.grid"):
        load_board(tmp_path)
    with pytest.raises(InputError, match="no row has an axis 'colour'"):
        load_board(out, axis="colour")
    assert [shown(None), shown(1234.5), shown(1.25, 0.5, 1)] == ["–", "1,234.50", "1.2 ± 0.5"]
