"""Killed at any moment, out of disk, told to stop: a run loses minutes and nothing else."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mwt.tracking import read_metrics

ROOT = Path(__file__).parents[1]
MACHINE = {"images_per_second", "seconds", "peak_memory_gb"}
# 40 steps in 4 epochs, an evaluation after each, a checkpoint after every step.
ARGUMENTS = (
    "--debug", "data.limit=80", "optim.epochs=4", "run.checkpoint_minutes=1e-9",
    "data.augment=crop", "data.crop_padding=1", "optim.ema=0.9", "run.eval_batch_size=16",
)  # fmt: skip

SERVER = """
import json, os, sys
from train.classify import main
from mwt.runtime import run_program

print("ready 0", flush=True)
for line in sys.stdin:
    if line.strip() == "wait":
        _, status = os.waitpid(child, 0)
        print("status", os.waitstatus_to_exitcode(status), flush=True)
        continue
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        run_program(main, json.loads(line))
    print("started", child, flush=True)
"""


class Server:
    """A process that has imported everything and forks one that trains for each line: starting takes no seconds."""

    def __init__(self, errors: Path) -> None:
        self._errors = errors.open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SERVER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._errors, text=True, env={**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"},
        )  # fmt: skip
        self._answer("ready")

    def start(self, *arguments: str) -> int:
        """The process id of one that trains; it stays valid until `status`."""
        return self._ask(json.dumps(arguments), "started")

    def status(self) -> int:
        """Wait for it: its exit status, negative if a signal ended it."""
        return self._ask("wait", "status")

    def errors(self) -> str:
        self._errors.seek(0)
        return self._errors.read()

    def _ask(self, line: str, what: str) -> int:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._answer(what)

    def _answer(self, what: str) -> int:
        assert self._process.stdout is not None
        kind, number = self._process.stdout.readline().split()
        assert kind == what, self.errors()[-3000:]
        return int(number)

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()
        self._errors.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("server") / "stderr")
    yield made
    made.close()


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
    assert server.status() == 0, server.errors()[-3000:]
    steps = lines(run)[-1]["step"]
    return Undisturbed(run, arguments, start=first - began, step=(time.monotonic() - first) / steps)


def lines(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in MACHINE} for row in read_metrics(run / "metrics.jsonl")]


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
        assert status in (-signal.SIGKILL, 0), server.errors()[-3000:]
        if status == 0:
            break
        killed += 1
        counts[kind] += hit
        counts["before any checkpoint"] += check_unharmed(run) == 0
    server.start("--resume", f"run.dir={run}")
    assert server.status() == 0, server.errors()[-3000:]
    assert killed == kills, f"the run was over after {killed} kills"
    assert lines(run) == lines(plain.run)
    places = [(row["step"], row["split"]) for row in lines(run)]
    assert len(places) == len(set(places)), "a step was logged twice"
    ours, theirs = checkpoint(run), checkpoint(plain.run)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    assert pointed_at(run, "best") == pointed_at(plain.run, "best")
    assert [p.name for p in (run / "checkpoints").iterdir() if p.name.startswith(".")] == []
    return counts


def test_killed_thrice_and_resumed_a_run_ends_like_an_undisturbed_one(tmp_path: Path, server: Server) -> None:
    plain = leave_alone(server, tmp_path / "undisturbed", (*ARGUMENTS, validated(tmp_path)))
    assert len(lines(plain.run)) == 44
    kill_often(server, tmp_path / "run", plain, kills=3, seed=1)


@pytest.mark.slow
def test_killed_two_dozen_times_a_run_ends_like_an_undisturbed_one(tmp_path: Path, server: Server) -> None:
    """At random moments, and at the very moment a checkpoint or the pointer to it is being written."""
    plain = leave_alone(server, tmp_path / "undisturbed", (*ARGUMENTS, validated(tmp_path), "optim.epochs=10"))
    counts = kill_often(server, tmp_path / "run", plain, kills=24, seed=2)
    assert min(counts["folder"], counts["pointer"], counts["best"]) >= 2, counts


def test_killed_before_anything_is_there_it_can_be_started_or_resumed(tmp_path: Path, server: Server) -> None:
    """A directory that was being made, and a run without a checkpoint."""
    run = tmp_path / "run"
    run.mkdir()
    for name in ("overrides.txt", "env.json", ".config.yaml.123"):  # the configuration comes last
        (run / name).write_text("{")
    server.start("--debug", f"run.dir={run}", "optim.epochs=2")
    assert server.status() == 0, server.errors()[-3000:]
    finished = lines(run)
    for path in (run / "checkpoints").rglob("*"):
        path.unlink() if path.is_file() else None
    server.start("--resume", f"run.dir={run}")
    assert server.status() == 0, server.errors()[-3000:]
    assert lines(run) == finished


# ---- no room ------------------------------------------------------------------------------------------------------


def in_process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "train.classify", *arguments], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}, timeout=200, **options,
    )  # fmt: skip


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
    before, step = checkpoint_files(run), check_step(run)
    limit = max(size for _, size in before.values()) - 1000
    done = in_process(
        "--resume", f"run.dir={run}", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    assert done.returncode == 2, done.stderr[-3000:]
    [said] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "could not be written" in said
    assert "File too large" in said
    assert f"the last one, step-{step:08d}, is untouched, and --resume goes on from there" in said
    assert str(run / "checkpoints") in said
    assert "Traceback" not in done.stderr
    assert checkpoint_files(run) == before
    server.start("--resume", f"run.dir={run}", "run.checkpoint_minutes=5")
    assert server.status() == 0, server.errors()[-3000:]


def check_step(run: Path) -> int:
    return int(json.loads((run / "checkpoints" / "last.json").read_text())["folder"].removeprefix("step-"))


def checkpoint_files(run: Path) -> dict[str, tuple[bytes, int]]:
    """Content and size of all that lies among the checkpoints."""
    files = sorted(p for p in (run / "checkpoints").rglob("*") if p.is_file())
    return {str(p.relative_to(run)): (p.read_bytes(), p.stat().st_size) for p in files}


def test_a_full_file_system_is_met_with_a_sentence_and_the_last_checkpoint_is_kept(tmp_path: Path) -> None:
    """A real one that has room for one checkpoint of 2.3 MB and not for two, where this process may make one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("this process may not mount a file system")
    try:
        run = disk / "run"
        done = in_process("--debug", f"run.dir={run}", "data.limit=40", "optim.epochs=3", "run.log_every=1000")
        assert done.returncode == 2, done.stderr[-3000:]
        assert "No space left on device" in done.stderr
        assert "the last one, step-00000005, is untouched" in done.stderr
        assert "Traceback" not in done.stderr
        assert check_step(run) == 5
        folder = run / "checkpoints" / "step-00000005"
        assert len(load_file(folder / "model.safetensors")) > 0
        assert len(load_file(folder / "optimizer.safetensors")) > 0
        assert [p.name for p in (run / "checkpoints").iterdir() if p.name.startswith(".")] == []
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


# ---- told to stop within an evaluation -----------------------------------------------------------------------------


def test_sigterm_within_a_long_evaluation_is_not_waited_for(tmp_path: Path, server: Server) -> None:
    """The epoch is saved already; the resumed run makes the evaluation."""
    run = tmp_path / "run"
    # One image at a time: some seconds, of which the first must do.
    child = server.start(
        "--debug", f"run.dir={run}", "data.limit=300", "data.train_split=test", "data.monitor_split=train",
        "data.batch_size=150", "run.eval_batch_size=1", "inner_loop.points=null", "inner_loop.steps=16",
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (run / "checkpoints" / "last.json").is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child, signal.SIGTERM)
    assert server.status() == 143  # although all steps are made
    assert [row["split"] for row in lines(run)] == ["test", "test"]
    assert check_step(run) == 2
    server.start("--resume", f"run.dir={run}", "run.eval_batch_size=256")
    assert server.status() == 0, server.errors()[-3000:]
    assert [row["split"] for row in lines(run)] == ["test", "test", "train"]
