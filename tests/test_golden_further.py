"""Further vectors of the same format, written by the paper's formulation, go through the golden test as they are.

The recorded ones leave fields of the metadata at one value; these take the others: layer-norm tokens, shared rates
with more steps than trained, no classification weight, an MLP ratio of 4, four heads, image vectors with a count of
points.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks import paper
from mwt.config import InnerLoopConfig, LossConfig, ModelConfig, ReaderConfig, SirenConfig
from mwt.engines import list_engines
from mwt.model import MetaWeightTransformer
from mwt.structs import SignalFacts

SPEC = importlib.util.spec_from_file_location("golden", Path(__file__).with_name("test_golden.py"))
assert SPEC is not None
assert SPEC.loader is not None
golden = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(golden)

PLAIN = {
    "seed": 7, "hidden": 64, "hidden_layers": 1, "inner_steps": 2, "trained_steps": 2, "channels": 1, "classes": 3,
    "blocks": 1, "omega": 10.0, "classification_weight": 0.01, "token_scale": 500.0, "mlp_ratio": 1,
    "shared_alpha": False, "coordinate_dims": 2, "batch": 2, "fraction": 1.0, "points": None, "optimizer_steps": 0,
}  # fmt: skip
CASES = {
    "layer_norm_tokens": {"token_scale": 0, "optimizer_steps": 2},
    "shared_rates_more_steps": {"shared_alpha": True, "inner_steps": 4},
    "shared_rates": {"shared_alpha": True, "optimizer_steps": 2},
    "no_classification_weight": {"classification_weight": 0, "optimizer_steps": 2},
    "mlp_ratio_4": {"mlp_ratio": 4, "fraction": 0.3},
    "four_heads": {"hidden": 256},
    "image_with_a_count_of_points": {"fraction": None, "points": 11},
    "points_layer_norm": {"coordinate_dims": 3, "fraction": None, "points": 13, "token_scale": 0, "channels": 2},
}


def theirs(name: str) -> str:
    return name.removesuffix(".gamma")


def parameters_of(config: dict) -> dict[str, Tensor]:
    """Random parameters of a model's shapes, none of them at a special value such as zero."""
    torch.manual_seed(config["seed"])
    model = MetaWeightTransformer(
        ModelConfig(
            siren=SirenConfig(hidden=config["hidden"], hidden_layers=config["hidden_layers"]),
            inner_loop=InnerLoopConfig(steps=config["trained_steps"], shared_alpha=config["shared_alpha"]),
            reader=ReaderConfig(blocks=config["blocks"], mlp_ratio=float(config["mlp_ratio"])),
            loss=LossConfig(),
            signal=SignalFacts(
                kind="image" if config["coordinate_dims"] == 2 else "points",
                channels=config["channels"], height=None, width=None, classes=("a", "b", "c"),
            ),
        )
    )  # fmt: skip
    noise = 0.01 if config["token_scale"] else 0.1
    return {theirs(k): v.detach().double() + noise * torch.randn(v.shape).double() for k, v in model.named_parameters()}


def signals(config: dict) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """What the file holds of the signals, and the coordinates and values of each step."""
    draws = (config["batch"], config["inner_steps"] + 1)
    if config["coordinate_dims"] == 3:
        coords = torch.rand(*draws, config["points"], 3).double() * 2 - 1
        values = torch.rand(*draws, config["points"], config["channels"]).double()
        return {"coords": coords, "values": values}, coords, values
    height, width = 5, 6
    image = torch.rand(config["batch"], config["channels"], height, width).double() * 2 - 1
    count = height * width
    points = config["points"] or max(1, int(config["fraction"] * count))
    index = torch.stack([torch.randperm(count)[:points] for _ in range(draws[0] * draws[1])]).view(*draws, points)
    axes = torch.linspace(-1, 1, height, dtype=torch.float64), torch.linspace(-1, 1, width, dtype=torch.float64)
    coords = torch.stack([axes[0][index // width], axes[1][index % width]], -1)
    flat = image.flatten(2).mT
    values = torch.stack([flat[b][index[b]] for b in range(draws[0])])
    return {"image": image, "index": index}, coords, values


def after_steps(
    config: dict, parameters: dict, coords: Tensor, values: Tensor, labels: Tensor, settings: object
) -> dict:
    """The parameters after the optimizer's steps, by torch's own unfused AdamW."""
    moving = {name: torch.nn.Parameter(value.clone()) for name, value in parameters.items()}
    rates = {"siren": 1e-4, "alpha": 1e-2, "reader": 1e-4}
    groups = [
        {"params": [p for name, p in moving.items() if name.startswith(part)], "lr": rate}
        for part, rate in rates.items()
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-4, fused=False, foreach=False)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=list(rates.values()), total_steps=100, pct_start=0.05
    )
    for _ in range(config["optimizer_steps"]):
        now = {name: p.detach().clone() for name, p in moving.items()}
        gradients = paper.training_gradients(now, coords, values, labels, settings).gradients
        for name, parameter in moving.items():
            parameter.grad = gradients[name].clone()
        for group in groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()
        schedule.step()
    return {f"after.{name}": p.detach() for name, p in moving.items()}


@pytest.mark.parametrize("engine", list_engines())
@pytest.mark.parametrize("name", list(CASES))
def test_a_further_vector_holds(name: str, engine: str, tmp_path: Path) -> None:
    config = {**PLAIN, **CASES[name]}
    parameters = parameters_of(config)
    stored, coords, values = signals(config)
    labels = torch.tensor([0, 2])
    settings = paper.Settings(
        omega=config["omega"], steps=config["inner_steps"], token_scale=float(config["token_scale"]),
        classification_weight=float(config["classification_weight"]),
    )  # fmt: skip
    result = paper.training_gradients(dict(parameters), coords, values, labels, settings)
    vector = {
        **stored, "labels": labels, "out.offset": result.offsets, "out.losses_per_step": result.losses,
        "out.prediction": result.prediction, "out.logits": result.logits,
        "out.classification_loss": result.classification_loss, "out.reconstruction_loss": result.reconstruction_loss,
        **{f"param.{key}": value for key, value in parameters.items()},
    }  # fmt: skip
    if config["coordinate_dims"] == 2:
        error = ((result.prediction.clamp(-1, 1) - values[:, -1]) / 2).square().mean((1, 2))
        vector["out.psnr"] = -10 * torch.log10(error)
    if config["inner_steps"] == config["trained_steps"]:
        vector |= {f"grad.{key}": value for key, value in result.gradients.items()}
    if config["optimizer_steps"]:
        vector |= after_steps(config, parameters, coords, values, labels, settings)
    path = tmp_path / f"{name}.safetensors"
    whole = {key: value.detach().clone().contiguous() for key, value in vector.items()}
    save_file(whole, path, metadata={"config": json.dumps(config)})

    golden.test_golden(path, engine)
    broken = {**whole, "out.logits": whole["out.logits"] * (1 + 1e-6)}
    save_file(broken, path, metadata={"config": json.dumps(config)})
    with pytest.raises(AssertionError, match="logits"):
        golden.test_golden(path, engine)
