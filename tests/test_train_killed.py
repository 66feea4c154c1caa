"""Killed at any moment, out of disk, told to stop: a run loses minutes and nothing else."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.fork_server import Server
from tests.runs import last_step, rows

ROOT = Path(__file__).parents[1]
# 40 steps in 4 epochs, an evaluation after each, a checkpoint after every step.
ARGUMENTS = (
    "--debug", "data.limit=80", "optim.epochs=4", "run.checkpoint_minutes=1e-9",
    "data.augment=crop", "data.crop_padding=1", "optim.ema=0.9", "run.eval_batch_size=16",
)  # fmt: skip


@dataclass(frozen=True)
class Undisturbed:
    """A run that nobody kills, and its pace."""

    run: Path
    arguments: tuple[str, ...]
    start: float
    """Seconds until the first checkpoint."""
    step: float
    """Seconds for each step after it."""


KINDS = {"at any time": "", "folder": ".step-", "pointer": ".last.json.", "best": ".best.json."}
"""Of kills: what is being written at the moment."""


def validated(folder: Path) -> str:
    """The digits with their test images as validation split too, on which `best` is chosen."""
    made = folder / "digits"
    shutil.copytree(ROOT / "data_pipes" / "builtin" / "digits", made)
    info = json.loads((made / "dataset.json").read_text())
    info["splits"]["val"] = info["splits"]["test"]
    (made / "dataset.json").write_text(json.dumps(info))
    return f"data.path={made}"


def pointed_at(run: Path, name: str) -> str:
    return str(json.loads((run / "checkpoints" / f"{name}.json").read_text())["folder"])


def leave_alone(server: Server, run: Path, arguments: tuple[str, ...]) -> Undisturbed:
    began = time.monotonic()
    server.start(*arguments, f"run.dir={run}")
    while not (run / "checkpoints" / "last.json").is_file() and time.monotonic() < began + 60:
        time.sleep(0.01)
    first = time.monotonic()
    assert server.status() == 0, server.said()[-3000:]
    steps = rows(run)[-1]["step"]
    return Undisturbed(run, arguments, start=first - began, step=(time.monotonic() - first) / steps)


def checkpoint(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of the last checkpoint, every file of it read."""
    folder = run / "checkpoints" / json.loads((run / "checkpoints" / "last.json").read_text())["folder"]
    for file in ("state.json", "config.json"):
        json.loads((folder / file).read_text())
    files = ("model", "raw", "optimizer")
    return {f"{file}|{k}": v for file in files for k, v in load_file(folder / f"{file}.safetensors").items()}


def check_unharmed(run: Path) -> int:
    """What a killed run has left is readable, all of it; returns the step of the checkpoint, 0 if there is none."""
    if not (run / "checkpoints" / "last.json").is_file():
        return 0
    checkpoint(run)
    state = json.loads((run / "checkpoints" / "last.json").read_text())["folder"]
    for line in (run / "metrics.jsonl").read_text().splitlines():
        json.loads(line)
    return int(state.removeprefix("step-"))


def kill_when_writing(run: Path, child: int, prefix: str, patience: float) -> bool:
    """Kill the process the moment a file or folder `prefix`… is in the making among its checkpoints."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        try:
            if any(name.startswith(prefix) for name in os.listdir(run / "checkpoints")):
                os.kill(child, signal.SIGKILL)
                return True
        except FileNotFoundError:
            pass
    os.kill(child, signal.SIGKILL)
    return False


def kill_often(server: Server, run: Path, plain: Undisturbed, *, kills: int, seed: int) -> dict[str, int]:
    """Start, kill, resume, … until it has been killed `kills` times; then let it finish. Counts the kinds of kills."""
    draw, counts = random.Random(seed), dict.fromkeys((*KINDS, "before any checkpoint"), 0)
    killed = 0
    while killed < kills:
        begun = (run / "config.yaml").is_file()
        child = server.start(*(("--resume",) if begun else plain.arguments), f"run.dir={run}")
        kind = list(KINDS)[killed % len(KINDS)]
        if kind == "at any time":
            time.sleep(draw.uniform(0, plain.start + 4 * plain.step))
            os.kill(child, signal.SIGKILL)
            hit = True
        else:
            time.sleep(plain.start + draw.uniform(0, 2) * plain.step)
            hit = kill_when_writing(run, child, KINDS[kind], (12 if kind == "best" else 4) * plain.step)
        status = server.status()
        assert status in (-signal.SIGKILL, 0), server.said()[-3000:]
        if status == 0:
            break
        killed += 1
        counts[kind] += hit
        counts["before any checkpoint"] += check_unharmed(run) == 0
    server.start("--resume", f"run.dir={run}")
    assert server.status() == 0, server.said()[-3000:]
    assert killed == kills, f"the run was over after {killed} kills"
    assert rows(run) == rows(plain.run)
    places = [(row["step"], row["split"]) for row in rows(run)]
    assert len(places) == len(set(places)), "a step was logged twice"
    ours, theirs = checkpoint(run), checkpoint(plain.run)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    assert pointed_at(run, "best") == pointed_at(plain.run, "best")
    assert [p.name for p in (run / "checkpoints").iterdir() if p.name.startswith(".")] == []
    return counts


def test_killed_and_resumed_a_run_ends_like_an_undisturbed_one(tmp_path: Path, server: Server) -> None:
    plain = leave_alone(server, tmp_path / "undisturbed", (*ARGUMENTS, validated(tmp_path)))
    assert len(rows(plain.run)) == 44
    kill_often(server, tmp_path / "run", plain, kills=1, seed=1)


@pytest.mark.slow
def test_killed_two_dozen_times_a_run_ends_like_an_undisturbed_one(tmp_path: Path, server: Server) -> None:
    """At random moments, and at the very moment a checkpoint or the pointer to it is being written."""
    plain = leave_alone(server, tmp_path / "undisturbed", (*ARGUMENTS, validated(tmp_path), "optim.epochs=10"))
    counts = kill_often(server, tmp_path / "run", plain, kills=24, seed=2)
    assert min(counts["folder"], counts["pointer"], counts["best"]) >= 2, counts


@pytest.mark.slow
def test_killed_before_anything_is_there_it_can_be_started_or_resumed(tmp_path: Path, server: Server) -> None:
    """A directory that was being made, and a run without a checkpoint."""
    run = tmp_path / "run"
    run.mkdir()
    for name in ("overrides.txt", "env.json", ".config.yaml.123"):  # the configuration comes last
        (run / name).write_text("{")
    server.start("--debug", f"run.dir={run}", "optim.epochs=2")
    assert server.status() == 0, server.said()[-3000:]
    finished = rows(run)
    for path in (run / "checkpoints").rglob("*"):
        path.unlink() if path.is_file() else None
    server.start("--resume", f"run.dir={run}")
    assert server.status() == 0, server.said()[-3000:]
    assert rows(run) == finished


# ---- no room ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_file_size_limit_is_met_with_a_sentence_and_the_last_checkpoint_is_kept(
    tmp_path: Path, server: Server
) -> None:
    """As `ulimit -f` and quotas have it: the model fits, the optimizer's moments, which come at step 1, do not."""
    run = tmp_path / "run"
    pid = server.start(*ARGUMENTS, "optim.ema=null", f"run.dir={run}")
    while not (run / "checkpoints" / "last.json").is_file():
        time.sleep(0.01)
    os.kill(pid, signal.SIGTERM)
    assert server.status() == 143
    before, step = checkpoint_files(run), last_step(run)
    limit = max(size for _, size in before.values()) - 1000
    code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    server.start("--resume", f"run.dir={run}", code=code)
    assert server.status() == 2, server.said()[-3000:]
    [said] = [line for line in server.said().splitlines() if line.startswith("error: ")]
    assert "could not be written" in said
    assert "File too large" in said
    assert f"the last one, step-{step:08d}, is untouched, and --resume goes on from there" in said
    assert str(run / "checkpoints") in said
    assert "Traceback" not in server.said()
    assert checkpoint_files(run) == before
    server.start("--resume", f"run.dir={run}", "run.checkpoint_minutes=5")
    assert server.status() == 0, server.said()[-3000:]


def checkpoint_files(run: Path) -> dict[str, tuple[bytes, int]]:
    """Content and size of all that lies among the checkpoints."""
    files = sorted(p for p in (run / "checkpoints").rglob("*") if p.is_file())
    return {str(p.relative_to(run)): (p.read_bytes(), p.stat().st_size) for p in files}


def test_a_full_file_system_is_met_with_a_sentence_and_the_last_checkpoint_is_kept(
    tmp_path: Path, server: Server
) -> None:
    """A real one that has room for one checkpoint of 2.3 MB and not for two, where this process may make one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("this process may not mount a file system")
    try:
        run = disk / "run"
        server.start("--debug", f"run.dir={run}", "data.limit=40", "optim.epochs=3", "run.log_every=1000")
        assert server.status() == 2, server.said()[-3000:]
        assert "No space left on device" in server.said()
        assert "the last one, step-00000005, is untouched" in server.said()
        assert "Traceback" not in server.said()
        assert last_step(run) == 5
        folder = run / "checkpoints" / "step-00000005"
        assert len(load_file(folder / "model.safetensors")) > 0
        assert len(load_file(folder / "optimizer.safetensors")) > 0
        assert [p.name for p in (run / "checkpoints").iterdir() if p.name.startswith(".")] == []
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


# ---- told to stop within an evaluation -----------------------------------------------------------------------------


@pytest.mark.slow
def test_sigterm_within_a_long_evaluation_is_not_waited_for(tmp_path: Path, server: Server) -> None:
    """The epoch is saved already; the resumed run makes the evaluation."""
    run = tmp_path / "run"
    # One image at a time: some seconds, of which the first must do.
    child = server.start(
        "--debug", f"run.dir={run}", "data.limit=160", "data.train_split=test", "data.monitor_split=train",
        "data.batch_size=80", "run.eval_batch_size=1", "inner_loop.points=null", "inner_loop.steps=8",
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (run / "checkpoints" / "last.json").is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child, signal.SIGTERM)
    assert server.status() == 143  # although all steps are made
    assert [row["split"] for row in rows(run)] == ["test", "test"]
    assert last_step(run) == 2
    server.start("--resume", f"run.dir={run}", "run.eval_batch_size=256")
    assert server.status() == 0, server.said()[-3000:]
    assert [row["split"] for row in rows(run)] == ["test", "test", "train"]
