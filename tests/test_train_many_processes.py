"""Several processes, on one machine and on two 'nodes', do what one does: real launchers, gloo, CPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mwt.tracking import read_metrics
from tests.fork_server import Server, free_port
from tests.runs import check_alike, last_step, rows, tensors

ROOT = Path(__file__).parents[1]
TWENTY = ("--debug", "data.limit=80", "optim.epochs=2", "data.monitor_split=test")
"""20 steps of 8 signals, each step of the inner loop on 16 of 64 points."""
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
# accelerate's --cpu starts one process whatever --num_processes says; --multi_gpu starts as many as it is told.
ACCELERATE = (
    "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
)  # fmt: skip


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def start(launcher: tuple[str, ...], run: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "train.classify", *arguments, f"run.dir={run}"],
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def finish(*started: subprocess.Popen[str], status: int | None = 0, seconds: float = 200) -> str:
    said = ""
    try:
        for process in started:
            said += process.communicate(timeout=seconds)[0]
            assert status is None or process.returncode == status, said[-4000:]
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return said


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Any:
    """Runs of one process, made once for each set of arguments."""
    made: dict[tuple[str, ...], Path] = {}

    def make(*arguments: str) -> Path:
        if arguments not in made:
            made[arguments] = tmp_path_factory.mktemp("alone") / "run"
            server.run(*arguments, f"run.dir={made[arguments]}")
        return made[arguments]

    return make


AUGMENTED = (*TWENTY, "data.augment=crop", "data.crop_padding=1", "optim.ema=0.9")


def test_two_processes_of_torchrun_do_what_one_does(tmp_path: Path, alone: Any) -> None:
    """Only the order in which sums over a batch are added differs. Augmented, on subsets of points, averaged."""
    two = tmp_path / "two"
    finish(start(TORCHRUN, two, *AUGMENTED))
    assert rows(two)[-1]["step"] == 20
    check_alike(alone(*AUGMENTED), two)
    assert tensors(two).keys() == tensors(two, "raw.safetensors").keys()


@pytest.mark.slow
def test_two_nodes_do_what_one_process_does(tmp_path: Path, alone: Any) -> None:
    """Two agents on one machine that find each other through a rendezvous, as on a cluster."""
    run, port = tmp_path / "run", free_port()
    nodes = [
        start(
            ("-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--rdzv_id", "test",
             "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--local_addr", "127.0.0.1"),
            run, *AUGMENTED, "optim.accumulate=2",
        )
        for _ in range(2)
    ]  # fmt: skip
    said = finish(*nodes)
    assert said.count("Evaluate with:") == 1, "more than one process takes itself for the main one"
    check_alike(alone(*AUGMENTED), run)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate launch"])
@pytest.mark.parametrize(
    ("arguments", "tolerance"),
    [
        pytest.param((), 1e-6, id="all points"),
        pytest.param(("data.augment=coords", "optim.schedule=cosine", "optim.accumulate=2"), 1e-6, id="accumulated"),
        pytest.param(
            ("run.compile=always", "inner_loop.checkpoint=true", "reader.checkpoint=true", "data.augment=crop",
             "data.crop_padding=1"), 1e-6, id="compiled, all recomputed",
        ),
        pytest.param(("run.precision=bf16",), 2e-2, id="bf16"),
    ],
)  # fmt: skip
def test_two_processes_do_what_one_does_however_it_is_computed(
    tmp_path: Path, alone: Any, launcher: tuple[str, ...], arguments: tuple[str, ...], tolerance: float
) -> None:
    points = ("inner_loop.points=null",) if not arguments else ()
    single = tuple(word for word in arguments if "accumulate" not in word)
    two = tmp_path / "two"
    finish(start(launcher, two, *TWENTY, *points, *arguments), seconds=600)
    check_alike(alone(*TWENTY, *points, *single), two, tolerance)


def wait_for_rows(run: Path, process: subprocess.Popen[str], count: int = 1) -> None:
    deadline = time.monotonic() + 120
    while len(read_metrics(run / "metrics.jsonl")) < count and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)


@pytest.mark.slow
def test_a_launcher_of_several_processes_passes_sigterm_on_and_the_run_is_saved(tmp_path: Path) -> None:
    """torchrun, and accelerate's launcher for several processes, which is the same: forwarded, saved, resumed."""
    run = tmp_path / "run"
    process = start(TORCHRUN, run, *TWENTY, "optim.epochs=2000", "run.log_every=8")
    wait_for_rows(run, process)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    said = finish(process, status=None)
    assert time.monotonic() - asked < 20
    assert "saved. Go on with:" in said
    assert last_step(run) >= rows(run)[-1]["step"] > 0
    assert len(tensors(run)) > 0


@pytest.mark.slow
def test_accelerate_passes_no_sigterm_on_to_a_single_process_but_that_ends_with_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    launcher = ("-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1", "--mixed_precision",
                "no", "--dynamo_backend", "no")  # fmt: skip
    process = start(launcher, run, *TWENTY, "optim.epochs=2000", "run.log_every=1")
    wait_for_rows(run, process)
    process.send_signal(signal.SIGTERM)
    said = finish(process, status=-signal.SIGTERM)  # waits for the end of all output, so for the end of the run
    assert "saved. Go on with:" in said
    assert rows(run)[-1]["step"] <= last_step(run) < 20000
