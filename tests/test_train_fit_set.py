"""`train.fit_set` as a user calls it: the set says what is in it, and nothing that happens meanwhile changes it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from data_pipes import verify
from data_pipes.read import open_split
from data_pipes.weights import WeightSet, load_weight_set
from mwt.config_files import list_configs, load_config
from mwt.errors import InputError
from mwt.fit_many import Fits, fit_many
from mwt.fit_set_config import FitSetConfig
from mwt.weight_space import Weights
from tests.fork_server import Server
from train.fit_set import CONFIGS, main

ROOT = Path(__file__).parents[1]
SMALL = ("--debug", "network.hidden=[8,8]", "network.omega=10")


def fit(out: Path, *overrides: str) -> WeightSet:
    assert main([*SMALL, *overrides, f"run.out={out}"]) == 0
    return load_weight_set(out, "train")


def rendered(networks: WeightSet) -> Tensor:
    """Values [N, 64] of 8 x 8 images, by another way than the project's: complex arithmetic, one pixel at a time."""
    pixels = []
    weights = networks.batch(range(len(networks))).weights
    for row in range(8):
        for column in range(8):
            hidden = torch.tensor([-1 + 2 * row / 7, -1 + 2 * column / 7]).expand(len(networks), 2)
            for i, omega in enumerate(networks.layout.omegas):
                angle = torch.einsum("noi,ni->no", weights.weights[i], hidden) + weights.biases[i]
                hidden = torch.exp(1j * omega * angle).imag
            pixels.append((torch.einsum("noi,ni->no", weights.weights[-1], hidden) + weights.biases[-1])[:, 0])
    return torch.stack(pixels, dim=1)


def images(count: int) -> Tensor:
    split = open_split("builtin:digits", "train", device=torch.device("cpu"), limit=count)
    (batch,) = split.batches(batch_size=count)
    assert batch.images is not None
    return batch.images.flatten(1) / 255 * 2 - 1


@pytest.mark.parametrize("convention", ["nfn", "dws"])
def test_the_networks_show_the_images_as_well_as_the_set_says(tmp_path: Path, convention: str) -> None:
    networks = fit(tmp_path / "set", f"network.convention={convention}", "fit.steps=60", "fit.lr=5e-3")
    shown, true = rendered(networks), images(8)
    psnr = -10 * ((shown.clamp(-1, 1) - true) / 2).square().mean(1).log10()
    torch.testing.assert_close(networks.column("psnr"), psnr, rtol=1e-4, atol=1e-3)
    assert psnr.min() > 10
    losses = networks.column("loss")
    torch.testing.assert_close(losses[:, 1], (shown - true).square().mean(1), rtol=1e-3, atol=1e-6)
    assert (losses[:, 0] > 3 * losses[:, 1]).all()
    assert networks.column("steps").tolist() == [60] * 8
    assert networks.column("label").tolist() == [
        int(label) for label in next(
            open_split("builtin:digits", "train", device=torch.device("cpu"), limit=8).batches(batch_size=8)
        ).labels
    ]  # fmt: skip


def test_networks_that_reach_the_target_stop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    networks = fit(tmp_path / "set", "fit.target_psnr=17", "fit.steps=200", "fit.lr=3e-3", "fit.check_every=1")
    psnr, steps = networks.column("psnr"), networks.column("steps")
    assert len(set(steps.tolist())) > 2
    assert ((psnr >= 17) == (steps < 200)).all()
    share = float((psnr >= 17).float().mean())
    assert f"{share:.1%}" in capsys.readouterr().out


def test_beginnings_are_shared_or_not(tmp_path: Path) -> None:
    own = fit(tmp_path / "own", "fit.steps=1", "fit.lr=1e-6")
    shared = fit(tmp_path / "shared", "fit.steps=1", "fit.lr=1e-6", "network.init=shared")
    spread = [networks.batch(range(8)).weights.weights[1].std(0).max() for networks in (own, shared)]
    assert spread[0] > 0.05
    assert spread[1] < 1e-5
    delta = load_weight_set(tmp_path / "shared", "train", values="delta").batch(range(8)).weights.flat()
    assert 0 < delta.abs().max() < 1e-5
    with pytest.raises(InputError, match="no base"):
        load_weight_set(tmp_path / "own", "train", values="delta")
    other = load_weight_set(tmp_path / "own", "test").batch(range(8)).weights
    assert not torch.allclose(other.weights[1], own.batch(range(8)).weights.weights[1], atol=1e-2)


def test_copies_are_of_changed_images_from_other_weights(tmp_path: Path) -> None:
    networks = fit(tmp_path / "set", "run.copies=2", "data.augment=crop", "data.crop_padding=2", "fit.steps=2")
    assert networks.column("copy").tolist().count(0) == 8
    assert len(networks) == 24
    assert len(load_weight_set(tmp_path / "set", "test")) == 8
    assert len(networks.batch(range(24)).weights.flat().unique(dim=0)) == 24
    plain = fit(tmp_path / "plain", "fit.steps=2")
    first = (networks.column("copy") == 0).nonzero().flatten()
    torch.testing.assert_close(
        networks.batch(first).weights.flat(), plain.batch(range(8)).weights.flat(), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run.copies=1", "network.init=shared"], "all be alike"),
        (["data.augment=coords"], "data.augment=coords"),
        (["run.splits=[val]"], "val"),
        (["fit.points=65"], "65"),
        (["fit.lr=0"], "fit.lr"),
        (["fit.optimiser=adam"], "optimiser"),
        (["fit.lr=1e20", "fit.steps=50"], "diverged"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit(tmp_path / "set", *overrides)
    assert not (tmp_path / "set").exists()


def test_a_fit_that_diverges_is_left_out_of_the_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def one_lost(*arguments: Any, **options: Any) -> Fits:
        fits = fit_many(*arguments, **options)
        fits.weights.weights[1][3] = torch.nan
        return replace(fits, error=fits.error.index_fill(0, torch.tensor([3]), torch.nan))

    monkeypatch.setattr("train.fit_set.fit_many", one_lost)
    networks = fit(tmp_path / "set")
    assert networks.column("index").tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert networks.manifest.diverged == {"train": [[3, 0]], "test": [[3, 0]]}
    said = capsys.readouterr()
    assert "warning: Fits that diverged are not in the set: 1 of 'train', 1 of 'test'" in said.err
    assert re.search(r"^disk      \d+ kB needed, \S+ GB free$", said.out, re.M)
    verify.main([str(tmp_path / "set")])


def test_configs_parse_and_name_their_own_command() -> None:
    names = [name for name, summary in list_configs(CONFIGS) if summary]
    assert {"digits", "digits_shared", "mnist", "fashion_mnist", "cifar10"} <= set(names)
    for name in names:
        config = load_config(FitSetConfig, CONFIGS / f"{name}.yaml")
        assert f"--config configs/fit_set/{name}.yaml" in (CONFIGS / f"{name}.yaml").read_text()
        assert config.run.out == f"sets/{name}"
        assert config.network.init == ("shared" if name.endswith("shared") else "random")


def command(out: Path, *launcher: str) -> list[str]:
    module = ["-m", "train.fit_set", *SMALL, "data.limit=30", "run.shard_networks=5", "fit.steps=150", f"run.out={out}"]
    return [sys.executable, *launcher, *module]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}


@pytest.mark.slow
def test_killed_and_started_again_it_makes_the_same_set(tmp_path: Path, server: Server) -> None:
    whole, out = tmp_path / "whole", tmp_path / "killed"
    extra = ["data.limit=30", "run.shard_networks=5", "fit.steps=150"]
    expected = fit(whole, *extra)
    notes = tmp_path / ".killed.partial" / "notes"
    process = server.start(*SMALL, *extra, f"run.out={out}", program="train.fit_set")
    deadline = time.monotonic() + 120
    while len(list(notes.glob("*-*.json"))) < 2:
        assert not out.exists(), "it was over before it could be killed"
        assert time.monotonic() < deadline, server.said()
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    assert server.status() == -signal.SIGKILL, server.said()
    assert not out.exists()
    begun = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".killed.partial" / "data").glob("*-*")}
    networks = fit(out, *extra)
    assert len(networks) == 30
    assert networks.column("index").tolist() == list(range(30))
    for name in ("train-00000", "train-00003", "test-00005"):
        one, other = (load_file(folder / f"{name}.safetensors") for folder in (whole, out))
        assert all(torch.equal(one[key], other[key]) for key in one)
    kept = [path for path in out.glob("*-*") if begun.get(path.name) == path.stat().st_mtime_ns]
    assert len(kept) >= 2  # not fitted again
    assert len(expected) == 30


@pytest.mark.slow
def test_two_processes_make_the_same_set(tmp_path: Path) -> None:
    expected = fit(tmp_path / "one", "data.limit=30", "run.shard_networks=5", "fit.steps=150")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    subprocess.run(command(tmp_path / "two", *launcher), cwd=ROOT, env=environment(), check=True, capture_output=True)
    networks = load_weight_set(tmp_path / "two", "train")
    assert torch.equal(networks.batch(range(30)).weights.flat(), expected.batch(range(30)).weights.flat())


def test_colour_images_of_a_folder(tmp_path: Path) -> None:
    from data_pipes.prepare.__main__ import main as prepare

    for number, name in enumerate(("sea", "wood")):
        (tmp_path / "images" / "train" / name).mkdir(parents=True)
        picture = torch.zeros(6, 6, 3, dtype=torch.uint8)
        picture[..., 2 - number] = 40 * torch.arange(6, dtype=torch.uint8)[:, None]
        Image.fromarray(picture.numpy()).save(tmp_path / "images" / "train" / name / "0.png")
    assert not prepare(["folder", "--src", str(tmp_path / "images"), "--out", str(tmp_path / "data")])
    networks = fit(tmp_path / "set", f"data.path={tmp_path / 'data'}", "fit.steps=400", "fit.lr=5e-3")
    assert networks.layout.channels == 3
    assert networks.column("psnr").min() > 25
    weights = networks.batch([0, 1]).weights
    assert isinstance(weights, Weights)
    assert weights.weights[-1].shape == (2, 3, 8)
