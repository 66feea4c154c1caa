"""Runs of the paper's formulation, recorded in float64 by an independent implementation (design of the vectors: the
metadata of each file says everything that the test needs; `MWT_GOLDEN` names another folder of them). Every engine
must reproduce them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from mwt.config import InnerLoopConfig, LossConfig, ModelConfig, OptimConfig, ReaderConfig, SirenConfig
from mwt.engines import list_engines
from mwt.losses import outer_losses
from mwt.metrics import psnr
from mwt.model import MetaWeightTransformer
from mwt.observe import grid, points_per_step
from mwt.optim import clip_gradients, make_optimizer, make_schedule
from mwt.structs import Observations, SignalFacts

FOLDER = Path(os.environ.get("MWT_GOLDEN", Path(__file__).parent / "golden"))
FILES = sorted(FOLDER.glob("*.safetensors"))
TOLERANCE = 1e-9


def load(path: Path) -> tuple[dict, dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["config"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def inner_loop(config: dict, engine: str = "analytic") -> InnerLoopConfig:
    """How the vector was fitted; `fraction` or `points` may be null."""
    return InnerLoopConfig(
        steps=config["trained_steps"],
        shared_alpha=config["shared_alpha"],
        fraction=1.0 if config["fraction"] is None else float(config["fraction"]),
        points=config["points"],
        engine=engine,
    )


def build(config: dict, vector: dict[str, Tensor], engine: str) -> MetaWeightTransformer:
    image = vector.get("image")
    model = MetaWeightTransformer(
        ModelConfig(
            siren=SirenConfig(
                hidden=config["hidden"], hidden_layers=config["hidden_layers"], omega=float(config["omega"])
            ),
            inner_loop=inner_loop(config, engine),
            reader=ReaderConfig(
                token_scale=float(config["token_scale"]),
                blocks=config["blocks"],
                mlp_ratio=float(config["mlp_ratio"]),
            ),
            loss=LossConfig(classification_weight=float(config["classification_weight"])),
            signal=SignalFacts(
                kind="image" if config["coordinate_dims"] == 2 else "points",
                channels=config["channels"],
                height=None if image is None else image.shape[2],
                width=None if image is None else image.shape[3],
                classes=tuple(str(k) for k in range(config["classes"])),
            ),
        )
    ).double()
    state = {ours(key.removeprefix("param.")): v for key, v in vector.items() if key.startswith("param.")}
    model.load_state_dict(state)  # strict: every parameter of the vector is one of the model's and the reverse
    return model


def ours(name: str) -> str:
    return f"{name}.gamma" if name.endswith((".ls1", ".ls2")) else name


def observations(config: dict, vector: dict[str, Tensor], *, shared_grid: bool = False) -> Observations:
    draws = (config["batch"], config["inner_steps"] + 1)
    if "coords" in vector:
        points = config["points"] or vector["coords"].shape[2]
        assert vector["coords"].shape == (*draws, points, config["coordinate_dims"])
        assert vector["values"].shape == (*draws, points, config["channels"])
        return Observations(coords=vector["coords"], values=vector["values"])
    image = vector["image"]
    assert image.shape[:2] == (config["batch"], config["channels"])
    values = image.flatten(2).mT
    coords = grid(*image.shape[-2:], dtype=torch.float64)
    if shared_grid:
        return Observations(coords=coords, values=values)
    assert vector["index"].shape == (*draws, points_per_step(inner_loop(config), len(coords)))
    return Observations(coords=coords, values=values, index=vector["index"])


def assert_equal(name: str, actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    error, size = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert error <= TOLERANCE * size, f"{name}: differs by {error:.2e}, largest value {size:.2e}"


def test_there_are_vectors() -> None:
    assert FILES, f"no golden vectors in {FOLDER}"


@pytest.mark.parametrize("engine", list_engines())
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden(path: Path, engine: str) -> None:
    config, vector = load(path)
    model = build(config, vector, engine)
    seen = observations(config, vector)

    output = model(seen, steps=config["inner_steps"])
    losses = outer_losses(output, vector["labels"])
    assert_equal("losses_per_step", output.fit.losses, vector["out.losses_per_step"])
    assert_equal("offset", output.fit.offsets, vector["out.offset"])
    assert_equal("prediction", output.fit.prediction, vector["out.prediction"])
    assert_equal("logits", output.logits, vector["out.logits"])
    assert_equal("classification_loss", losses.classification, vector["out.classification_loss"])
    assert_equal("reconstruction_loss", losses.reconstruction, vector["out.reconstruction_loss"])
    if "out.psnr" in vector:
        _, values = seen.at(config["inner_steps"])
        assert_equal("psnr", psnr(output.fit.prediction, values), vector["out.psnr"])

    gradients = {key.removeprefix("grad."): v for key, v in vector.items() if key.startswith("grad.")}
    if config["inner_steps"] == config["trained_steps"]:
        assert gradients, "the vector lacks its gradients"
        losses.total.backward()
        assert {ours(key) for key in gradients} == {name for name, _ in model.named_parameters()}
        for name, expected in gradients.items():
            assert_equal(f"grad.{name}", model.get_parameter(ours(name)).grad, expected)

    after = {key.removeprefix("after."): v for key, v in vector.items() if key.startswith("after.")}
    if config["optimizer_steps"]:
        assert after, "the vector lacks its parameters after the optimizer steps"
        run_optimizer(model, seen, vector["labels"], config["optimizer_steps"])
        for name, expected in after.items():
            start = vector[f"param.{name}"]
            assert_equal(f"after.{name}", model.get_parameter(ours(name)).detach() - start, expected - start)


def run_optimizer(model: MetaWeightTransformer, seen: Observations, labels: Tensor, steps: int) -> None:
    optim = OptimConfig()
    optimizer = make_optimizer(model, optim)
    schedule = make_schedule(optimizer, optim, total_steps=100)
    for _ in range(steps):
        optimizer.zero_grad()
        outer_losses(model(seen), labels).total.backward()
        clip_gradients(optimizer, optim.clip_norm)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("engine", list_engines())
@pytest.mark.parametrize("path", [f for f in FILES if load(f)[0]["fraction"] == 1.0], ids=lambda path: path.stem)
def test_shared_grid_gives_the_same_fit_as_permuted_points(path: Path, engine: str) -> None:
    config, vector = load(path)
    model = build(config, vector, engine)
    output = model(observations(config, vector, shared_grid=True), steps=config["inner_steps"])
    assert_equal("offset", output.fit.offsets, vector["out.offset"])
    assert_equal("logits", output.logits, vector["out.logits"])
    assert_equal("losses_per_step", output.fit.losses, vector["out.losses_per_step"])
