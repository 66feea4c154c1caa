"""The training program: what it leaves behind, what it refuses, and that interrupted runs end like undisturbed ones."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import train.classify as program
from data_pipes.read import open_split
from mwt.config import ClassifyConfig
from mwt.config_files import load_config
from mwt.errors import InputError, TrainingError
from mwt.runtime import run_program
from mwt.tracking import read_metrics
from tests.fork_server import Server
from tests.process_state import reset

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "data_pipes" / "builtin" / "digits"
MACHINE = {"images_per_second", "seconds", "peak_memory_gb"}
"""Of a line of metrics.jsonl, what depends on the machine and not on the run."""
# 5 steps an epoch, two epochs; random subsets of 16 points; the test split stands in for a monitored one.
LONGER = ("data.limit=40", "optim.epochs=2", "data.monitor_split=test")


def debug(run: Path, *arguments: str) -> int:
    return program.main(["--debug", f"run.dir={run}", *arguments])


def parameters(run: Path, name: str = "last") -> dict[str, torch.Tensor]:
    folder = json.loads((run / "checkpoints" / f"{name}.json").read_text())["folder"]
    return load_file(run / "checkpoints" / folder / "model.safetensors")


def rows(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in MACHINE} for row in read_metrics(run / "metrics.jsonl")]


def check_same_run(one: Path, other: Path) -> None:
    assert rows(one) == rows(other)
    ours, theirs = parameters(one), parameters(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


# ---- what it leaves behind ---------------------------------------------------------------------------------------


def test_debug_goes_through_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "a" / "run"
    assert debug(run) == 0
    assert {p.name for p in run.iterdir()} >= {
        "config.yaml",
        "overrides.txt",
        "env.json",
        "metrics.jsonl",
        "checkpoints",
    }
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["last.json", "step-00000002"]
    assert [row["step"] for row in rows(run)] == [1, 2]
    assert {"epoch", "split", "classification_loss", "reconstruction_loss", "accuracy"} <= rows(run)[0].keys()
    config = load_config(ClassifyConfig, run / "config.yaml")
    assert (config.data.limit, config.run.dir) == (16, str(run))
    assert "versions" in json.loads((run / "env.json").read_text())
    assert f"python -m eval.classify --run {run}" in capsys.readouterr().out
    assert debug(run) == 0  # a debugging run may be repeated


def test_it_says_what_a_step_needs_and_logs_what_was_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert debug(run, "data.monitor_split=test") == 0
    said = capsys.readouterr()
    assert re.search(
        r"^memory    about \d+ MB a step \(\d+ MB for the backward pass\), \S+ GB available$", said.out, re.M
    )
    assert "warning" not in said.err
    logged = {row["split"]: row.get("peak_memory_gb") for row in read_metrics(run / "metrics.jsonl")}
    assert logged["test"] is None
    assert 0.1 < logged["train"] < 100  # a Python process with torch, and no more than this machine


def test_a_step_that_will_not_fit_is_announced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program.memory, "available", lambda device, processes: 10**6)
    assert debug(tmp_path / "run") == 0  # it is the user's to decide
    warning = re.search(
        r"^warning: A step needs about ([\d.]+) MB, but 1.0 MB are left\..*$", capsys.readouterr().err, re.M
    )
    assert warning is not None
    assert float(warning[1]) > 1
    for remedy in ("data.batch_size", "inner_loop.checkpoint=true", "reader.checkpoint=true", "run.precision=bf16"):
        assert remedy in warning[0]


def test_a_step_whose_needs_are_not_known_is_trained_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program.memory, "estimate", lambda *_, **__: None)
    assert debug(tmp_path / "run") == 0
    assert "memory    not known beforehand" in capsys.readouterr().out
    assert len(rows(tmp_path / "run")) == 2


def test_list_and_print_config_train_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert program.main(["--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == sorted(
        p.stem for p in (ROOT / "configs" / "classify").glob("*.yaml")
    )
    config = ROOT / "configs" / "classify" / "digits.yaml"
    assert program.main(["--config", str(config), "--print-config", "optim.epochs=7"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load_config(ClassifyConfig, printed) == load_config(ClassifyConfig, config, ["optim.epochs=7"])
    assert list(tmp_path.iterdir()) == [printed]


def test_two_runs_with_one_seed_are_equal_and_another_seed_is_not(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert debug(tmp_path / name, f"run.seed={seed}", "data.augment=crop", "data.crop_padding=1") == 0
    check_same_run(tmp_path / "a", tmp_path / "b")
    assert rows(tmp_path / "a") != rows(tmp_path / "c")


# ---- what it refuses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("optim.epoch=3", r"'epoch'.*'epochs'"),
        ("optim.epochs=many", r"many.*optim\.epochs"),
        ("data.path=/nothing/here", "/nothing/here"),
        ("data.path=builtin:nothing", "'nothing'; there is digits"),
        ("data.train_split=training", "training"),
        ("data.monitor_split=validation", "validation"),
        ("data.batch_size=17", r"16 samples, fewer than one batch of 17.*data\.batch_size"),
        ("inner_loop.points=65", r"inner_loop\.points is 65, .*only 64 points"),
        ("data.augment=affine_flip", "8 x 8 are too small"),
        ("data.augment=points", "points"),
        ("siren.hidden=100", "not a multiple of the attention's head dimension"),
        ("run.precision=fp16", "fp16 needs a CUDA device"),
    ],
)
def test_refusals_are_a_sentence_and_leave_no_run_behind(tmp_path: Path, argument: str, message: str) -> None:
    run = tmp_path / "run"
    with pytest.raises(InputError, match=message):
        debug(run, argument)
    assert not run.exists(), "the corrected command would be refused, because the run directory exists"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_asked_for_and_absent(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"run\.device is cuda, but torch sees no CUDA device"):
        debug(tmp_path / "run", "run.device=cuda")


def test_an_empty_data_folder(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(InputError, match=r"Data folder .*data is empty.*data_pipes\.prepare"):
        debug(tmp_path / "run", f"data.path={tmp_path / 'data'}")


def test_an_existing_run_is_neither_overwritten_nor_touched(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match=r"run exists already.*--resume"):
        debug(run)
    assert [p.name for p in run.iterdir()] == ["thesis.txt"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        debug(tmp_path / "file" / "run")


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run directory"):
        program.main(["--resume", f"run.dir={tmp_path / 'nothing'}"])


def test_a_launcher_that_contradicts_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(InputError, match=r"mixed precision 'bf16', but run\.precision is 'fp32'"):
        debug(tmp_path / "run")


# ---- losses that are not finite ----------------------------------------------------------------------------------


def poison(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """In these steps of the second epoch, counted from 6, images are not numbers."""
    import mwt.training
    from mwt.observe import observe

    calls: list[int] = []

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        seen = observe(*args, **kwargs)
        calls.extend([1] * (kwargs["epoch"] == 1))
        if calls and 5 + len(calls) in steps:
            seen.values[:] = float("nan")
        return seen

    monkeypatch.setattr(mwt.training, "observe", poisoned)


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From step 7 on, in the second epoch, images are not numbers any more."""
    run = tmp_path / "run"
    poison(monkeypatch, 7, 8, 9, 10)
    with pytest.raises(TrainingError, match=r"not finite at step 7; .*nonfinite.step-00000007\.json"):
        debug(run, *LONGER, "run.log_every=4")
    monkeypatch.undo()
    assert json.loads((run / "checkpoints" / "last.json").read_text())["folder"] == "step-00000005"
    assert all(value.isfinite().all() for value in parameters(run).values())
    reset()
    assert program.main(["--resume", f"run.dir={run}"]) == 0
    assert rows(run)[-1]["step"] == 10


def test_the_report_of_a_step_names_the_samples_of_that_very_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    poison(monkeypatch, 8)
    with pytest.warns(UserWarning, match=r"Step 8 was skipped"):
        assert debug(run, *LONGER, "run.log_every=1", "run.on_nonfinite=skip") == 0
    [file] = (run / "nonfinite").iterdir()
    report = json.loads(file.read_text())
    assert (report["step"], report["epoch"]) == (8, 1)
    split = open_split("builtin:digits", "train", device=torch.device("cpu"), limit=40)
    batch = next(iter(split.batches(batch_size=8, epoch=1, seed=0, shuffle=True, drop_last=True, start=2)))
    assert [sample["position"] for sample in report["samples"]] == batch.positions.tolist()
    for sample in report["samples"]:
        with tarfile.open(sample["shard"]) as shard:
            names = [name for name in shard.getnames() if name.endswith(".png")]
        assert names[sample["position"]].removesuffix(".png").endswith(sample["key"])
    logged = {row["step"]: row for row in rows(run) if row["split"] == "train"}
    assert [logged[step]["skipped"] for step in (7, 8, 9, 10)] == [0, 1, 1, 1]
    assert logged[9]["classification_loss"] > 0


def test_an_interrupted_and_resumed_run_that_skips_steps_equals_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (*LONGER, "run.log_every=2", "run.on_nonfinite=skip", "run.max_skipped=2")
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    with monkeypatch.context() as patch:
        poison(patch, 7, 9)
        with pytest.warns(UserWarning, match="skipped"):
            assert debug(one, *options) == 0
    reset()
    with monkeypatch.context() as patch:
        poison(patch, 7)
        stop_at(patch, 7)
        with pytest.warns(UserWarning, match="Step 7 was skipped"):
            assert debug(two, *options) == 143
    reset()
    with monkeypatch.context() as patch:
        poison(patch, 7)  # it begins at step 8: the second of this process is number 9
        with pytest.warns(UserWarning, match="Step 9 was skipped"):
            assert program.main(["--resume", f"run.dir={two}"]) == 0
    check_same_run(one, two)
    reset()
    poison(monkeypatch, 7, 8, 9)
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(TrainingError, match=r"3 steps were not finite, of which run\.max_skipped allows 2"),
    ):
        debug(three, *options)


def test_a_loss_that_is_not_finite_ends_with_status_1(tmp_path: Path, server: Server) -> None:
    server.start("--debug", f"run.dir={tmp_path / 'run'}", "inner_loop.alpha_max=1e38", "inner_loop.alpha_min=1e37")
    assert server.status() == 1, server.said()
    assert "not finite at step 1" in server.said()
    assert "Traceback" not in server.said()


# ---- interrupted and resumed -------------------------------------------------------------------------------------


def stop_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def vote(stop: Any, step: int, device: Any, *, save: bool = False) -> tuple[bool, bool]:
        if step == number:
            stop.signal = signal.SIGTERM
        return stop.signal is not None, save

    monkeypatch.setattr(program.StopRequested, "vote", vote)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """One run that nothing disturbs, for each interval of logging."""
    runs = {}
    for every in (1, 2):
        runs[every] = tmp_path_factory.mktemp("undisturbed") / "run"
        assert debug(runs[every], *LONGER, f"run.log_every={every}") == 0
        reset()
    return runs


@pytest.mark.parametrize(
    ("step", "every"),
    [pytest.param(3, 1, id="within an epoch"), pytest.param(5, 1, id="at the end of an epoch"),
     pytest.param(3, 2, id="between two lines of the log")],
)  # fmt: skip
def test_an_interrupted_and_resumed_run_equals_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], undisturbed: dict[int, Path],
    step: int, every: int,
) -> None:  # fmt: skip
    run = tmp_path / "run"
    stop_at(monkeypatch, step)
    assert debug(run, *LONGER, f"run.log_every={every}") == 143
    said = capsys.readouterr().err
    assert f"Stopped at step {step} of 10" in said
    assert f"python -m train.classify --resume run.dir={run}" in said
    assert json.loads((run / "checkpoints" / "last.json").read_text())["folder"] == f"step-{step:08d}"
    monkeypatch.undo()
    reset()
    assert program.main(["--resume", f"run.dir={run}"]) == 0
    check_same_run(run, undisturbed[every])


@pytest.mark.slow
def test_a_run_with_muon_is_resumed_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = (*LONGER, "run.log_every=1", "optim.name=muon")
    assert debug(tmp_path / "undisturbed", *options) == 0
    stop_at(monkeypatch, 3)
    assert debug(tmp_path / "run", *options) == 143
    monkeypatch.undo()
    assert program.main(["--resume", f"run.dir={tmp_path / 'run'}"]) == 0
    check_same_run(tmp_path / "run", tmp_path / "undisturbed")


def test_a_finished_run_can_be_resumed_and_stays_as_it_is(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert debug(run) == 0
    before, log = parameters(run), (run / "metrics.jsonl").read_text()
    assert program.main(["--resume", f"run.dir={run}"]) == 0
    assert (run / "metrics.jsonl").read_text() == log
    assert all(torch.equal(before[name], value) for name, value in parameters(run).items())


def test_a_run_may_be_resumed_on_another_way_of_computing_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[int, Path]
) -> None:
    """Another engine, and recomputation to save memory: equal up to the rounding of float32."""
    run = tmp_path / "run"
    stop_at(monkeypatch, 3)
    assert debug(run, *LONGER, "run.log_every=1") == 143
    monkeypatch.undo()
    reset()
    ways = ["inner_loop.engine=func", "inner_loop.checkpoint=true", "reader.checkpoint=true"]
    assert program.main(["--resume", f"run.dir={run}", *ways]) == 0
    assert [row["step"] for row in rows(run)] == [row["step"] for row in rows(undisturbed[1])]
    ours, theirs = parameters(run), parameters(undisturbed[1])
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5, msg=name)
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours), "the other way was not taken"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert debug(run) == 0
    return run


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, stopped after the first."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 1)
        assert debug(run) == 143
    return run


@pytest.mark.parametrize(
    ("override", "key"),
    [("siren.hidden_layers=2", r"siren\.hidden_layers"), ("inner_loop.shared_alpha=true", r"inner_loop\.shared_alpha"),
     ("inner_loop.first_order=true", r"inner_loop\.first_order"),
     ("inner_loop.optimizer=momentum", r"inner_loop\.optimizer")],
)  # fmt: skip
def test_resuming_with_another_architecture_is_refused(tmp_path: Path, finished: Path, override: str, key: str) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    with pytest.raises(InputError, match=key):
        program.main(["--resume", f"run.dir={run}", override])
    assert len(rows(run)) == 2


@pytest.mark.parametrize(
    "override", ["optim.epochs=3", "data.batch_size=4", "optim.lr_siren=1e-6", "run.seed=9", "data.limit=32"]
)
def test_a_resume_with_other_settings_takes_them_or_refuses_them(tmp_path: Path, stopped: Path, override: str) -> None:
    """Never the silent mixture of a schedule, an order of the data and a config that do not belong together."""
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    key = override.split("=")[0]
    with pytest.raises(InputError, match=f"{key}|the data".replace(".", r"\.")):
        program.main(["--resume", f"run.dir={run}", override])


def with_validation_split(folder: Path) -> Path:
    """The digits with their test images as validation split too."""
    shutil.copytree(DIGITS, folder)
    info = json.loads((folder / "dataset.json").read_text())
    info["splits"]["val"] = info["splits"]["test"]
    (folder / "dataset.json").write_text(json.dumps(info))
    return folder


@pytest.mark.parametrize("minutes", [5.0, 1e-9], ids=["at ends of epochs", "after every step"])
def test_best_is_the_best_of_the_validation_split_and_the_state_knows_it(tmp_path: Path, minutes: float) -> None:
    data, run = with_validation_split(tmp_path / "data"), tmp_path / "run"
    assert debug(run, f"data.path={data}", "data.limit=40", "optim.epochs=3", f"run.checkpoint_minutes={minutes}") == 0
    validated = {row["step"]: row["accuracy"] for row in rows(run) if row["split"] == "val"}
    assert list(validated) == [5, 10, 15]
    top = max(validated.values())
    first = min(step for step, accuracy in validated.items() if accuracy == top)
    assert json.loads((run / "checkpoints" / "best.json").read_text())["folder"] == f"step-{first:08d}"
    state = json.loads((run / "checkpoints" / "step-00000015" / "state.json").read_text())
    assert state["best"] == top
    assert state["metrics_position"] == (run / "metrics.jsonl").stat().st_size


def test_best_is_never_chosen_on_the_split_that_is_reported(tmp_path: Path) -> None:
    data, run = with_validation_split(tmp_path / "data"), tmp_path / "run"
    assert debug(run, f"data.path={data}", "data.test_split=val") == 0
    assert [row["split"] for row in rows(run)] == ["train", "train", "val"]
    assert not (run / "checkpoints" / "best.json").exists()


def test_the_training_split_can_be_monitored(tmp_path: Path) -> None:
    assert debug(tmp_path / "run", "data.monitor_split=train") == 0
    assert len(rows(tmp_path / "run")) == 3


@pytest.mark.parametrize(
    ("number", "status"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)]
)
def test_a_signal_to_a_real_process(tmp_path: Path, server: Server, number: int, status: int) -> None:
    run = tmp_path / "run"
    process = server.start("--debug", f"run.dir={run}", "data.limit=null", "optim.epochs=1000")
    deadline = time.monotonic() + 120
    while not rows(run) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process, number)
    ended, said = server.status(), server.said()
    assert ended == status, said
    assert f"python -m train.classify --resume run.dir={run}" in said
    assert "Traceback" not in said
    state_of = json.loads((run / "checkpoints" / "last.json").read_text())["folder"]
    assert rows(run)[-1]["step"] == int(state_of.removeprefix("step-"))


def test_tensorboard_is_written_beside_metrics_jsonl(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    assert debug(run, "run.trackers=[tensorboard]") == 0
    assert len(rows(run)) == 2
    assert list(run.glob("**/events.out.tfevents.*"))


def test_an_unknown_tracker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"run.trackers: clearml not known; there are tensorboard"):
        debug(tmp_path / "run", "run.trackers=[clearml]")


def test_a_tracker_that_is_not_installed_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[wandb\]'"):
        debug(tmp_path / "run", "run.trackers=[wandb]")
    assert not (tmp_path / "run").exists()


def test_no_permission_is_one_sentence_and_exit_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(SystemExit) as left:
        run_program(program.main, ["--debug", f"run.dir={tmp_path / 'run'}"])
    assert left.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: The run directory")
    assert message.endswith("cannot be written: Permission denied.")


@pytest.mark.parametrize("override", ["siren.hiden=3", "run.device=tpu", "data.path=no/such/folder", "siren.hidden=65"])
def test_bad_input_leaves_with_status_2(tmp_path: Path, override: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as left:
        run_program(program.main, ["--debug", f"run.dir={run}", override])
    assert left.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert not run.exists()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("choice", ["never", "always"])
def test_on_a_gpu(tmp_path: Path, precision: str, choice: str) -> None:
    """In a process of its own: the shape-checking hook and torch.compile do not go together."""
    run = tmp_path / "run"
    words = [
        "-m",
        "train.classify",
        "--debug",
        "run.device=cuda",
        f"run.precision={precision}",
        f"run.compile={choice}",
    ]
    subprocess.run([sys.executable, *words, f"run.dir={run}"], cwd=ROOT, check=True)
    assert all(math.isfinite(row["classification_loss"]) for row in rows(run))
