"""Every command of the README, typed as it stands there: programs with `--debug`, data sets as tiny trees of the same
format. The unabridged quickstart is `make test-slow`'s."""

from __future__ import annotations

import gzip
import importlib
import json
import os
import re
import shlex
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^    ((?:python -m|accelerate launch -m) (?:train|eval|data_pipes)\.[^#\n]*)", README, re.M)
COMMANDS += re.findall(r"`((?:python -m|accelerate launch -m) (?:train|eval|data_pipes)\.[^`]*)`", README)
CONFIGS = "configs/classify"
FASHION = Path("/usr/share/datasets/fashion-mnist")
IDX_SOURCES = {"mnist", "fashion_mnist"}


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a clone to somebody who types commands: configs, tiny data, a picture."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "configs").symlink_to(ROOT / "configs")
    rng = np.random.default_rng(0)
    idx = folder / "idx"
    idx.mkdir()
    for part, count in (("train", 24), ("t10k", 12)):
        write_idx(idx / f"{part}-images-idx3-ubyte.gz", rng.integers(0, 256, (count, 28, 28)))
        write_idx(idx / f"{part}-labels-idx1-ubyte.gz", np.arange(count) % 10)
    for name in ("cat", "dog"):
        (folder / "PICTURES" / name).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(folder / f"PICTURES/{name}/{i}.png")
    Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / "IMAGE.png")
    Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / "digit.png")
    (folder / "photos").mkdir()
    for name in ("photo.png", "photos/a.png", "photos/b.png"):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(folder / name)
    return folder


EVAL = ("classify", "predict", "reconstruct", "report", "export", "grid", "leaderboard", "spectrum", "cost")
TRAIN = ("classify", "weights", "fit_set", "fit")


def adapt(words: list[str]) -> list[str]:
    """What a command needs to run here in seconds: `--debug`, data at hand. The command itself stays."""
    module, arguments = words[0], words[1:]
    if module == "train.classify" and not {"--list", "--print-config", "--resume"} & set(arguments):
        arguments += [] if "--debug" in arguments else ["--debug"]
        arguments += ["data.path=builtin:digits"]
    if module in ("train.weights", "train.fit_set", "train.fit") and "--list" not in arguments:
        arguments += ["--debug"]
        if module == "train.fit":
            arguments += ["run.dir=runs/fit/" + ("many" if any("*" in word for word in arguments) else "image")]
    if module == "data_pipes.prepare" and arguments[0] in IDX_SOURCES:
        arguments = [*(word for word in arguments if "datasets" not in word and word != "--src"), "--src", "idx"]
    if module == "eval.grid":
        arguments += ["--dry-run"]
    if module == "eval.spectrum":
        arguments += ["optim.steps=2", "signal.size=96", "field.mlp.width=8", "run.looks=1"]
    if module == "eval.reconstruct":
        arguments += ["--count", "2"]
    return [module, *arguments]


def run_here(words: list[str]) -> int:
    module = importlib.import_module(f"{words[0]}.__main__" if words[0] == "data_pipes.prepare" else words[0])
    return module.main(words[1:]) or 0


def test_the_readme_has_commands_for_every_program() -> None:
    programs = {re.search(r"-m (\S+)", command)[1] for command in COMMANDS}
    assert {*(f"train.{name}" for name in TRAIN), *(f"eval.{name}" for name in EVAL)} <= programs
    assert {"data_pipes.prepare", "data_pipes.verify"} <= programs


def test_every_command(workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(workplace)
    done = set()
    for command in COMMANDS:
        words = shlex.split(command)
        words = words[words.index("-m") + 1 :]
        if {"cifar10", "imagenette", "imagenet1k", "modelnet40"} & set(words):  # see tests of prepare
            continue
        if any("inr_bench" in word for word in words) or "mosaic" in words:  # see tests of grids, leaderboards, prepare
            continue
        if words[0] == "train.classify" and f"{words}" in done:
            continue
        done.add(f"{words}")
        assert run_here(adapt(words)) == 0, command
    capsys.readouterr()
    assert json.loads(Path("runs/first/eval/classify.json").read_text())["count"] == 16
    assert Path("runs/first/report.html").is_file()
    assert Path("data/mine/dataset.json").is_file()
    names: dict[str, Any] = {}
    exec(compile(re.findall(r"```python\n(.*?)```", README, re.S)[1], "README.md", "exec"), names)
    assert names["picture"].shape == (1024 * 1024, 3)


def test_the_python_example(workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(workplace)
    example, _ = re.findall(r"```python\n(.*?)```", README, re.S)  # the other one is test_every_command's
    exec(compile(example, "README.md", "exec"), {})
    label, probability, psnr = capsys.readouterr().out.split()
    assert label in "0123456789"
    assert 0.1 <= float(probability) <= 1
    assert float(psnr) > 5


def test_paths_in_the_readme_exist() -> None:
    for path in set(re.findall(r"`((?:mwt|train|eval|data_pipes|configs|benchmarks)/[\w./]+)`", README)):
        assert path == "eval/classify.json" or (ROOT / path).exists(), path  # that one lies in a run directory
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).is_file(), path


@pytest.mark.slow
def test_accelerate_launch(workplace: Path) -> None:
    """The launcher itself, in a process of its own, as the README has it."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    program = ["-m", "train.classify", "--config", "configs/classify/digits.yaml", "--debug", "run.dir=launched"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*launch, *program], cwd=workplace, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (workplace / "launched" / "checkpoints" / "last.json").is_file()


def run_unabridged(steps: list[list[str]]) -> None:
    """Programs as a person starts them: with all cores, which conftest takes away from the other tests."""
    environment = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    for step in steps:
        subprocess.run([sys.executable, "-m", *step], cwd=ROOT, env=environment, check=True)


@pytest.mark.slow
@pytest.mark.skipif(not FASHION.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_fashion_mnist_on_two_cores_unabridged(tmp_path: Path) -> None:
    """A quarter of an hour: what RESULTS.md says of `fashion_mnist_cpu.yaml`."""
    data, run = tmp_path / "data", tmp_path / "run"
    steps = [
        ["data_pipes.prepare", "fashion_mnist", "--src", str(FASHION), "--out", str(data)],
        [
            "train.classify",
            "--config",
            "configs/classify/fashion_mnist_cpu.yaml",
            f"data.path={data}",
            f"run.dir={run}",
        ],
        ["eval.classify", "--run", str(run)],
    ]
    run_unabridged(steps)
    numbers = json.loads((run / "eval" / "classify.json").read_text())
    assert numbers["count"] == 10000
    assert numbers["accuracy"] >= 0.86


@pytest.mark.slow
def test_quickstart_unabridged(tmp_path: Path) -> None:
    """What `make quickstart` runs after installing: reaches what the README says."""
    run = tmp_path / "run"
    steps = [
        ["train.classify", "--config", f"{CONFIGS}/digits.yaml", f"run.dir={run}"],
        ["eval.classify", "--run", str(run)],
        ["eval.reconstruct", "--run", str(run)],
        ["eval.report", "--run", str(run)],
    ]
    run_unabridged(steps)
    numbers = json.loads((run / "eval" / "classify.json").read_text())
    assert numbers["accuracy"] >= 0.97
    assert numbers["psnr"] >= 30
    assert (run / "report.html").is_file()
