"""The outer optimizer: three groups, AdamW and OneCycle written out by hand, clipping group by group."""

from __future__ import annotations

import json
import math
import warnings

import pytest
import torch
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, SequentialLR

from mwt.config import InnerLoopConfig, LossConfig, ModelConfig, OptimConfig, ReaderConfig, SirenConfig
from mwt.model import MetaWeightTransformer
from mwt.optim import clip_gradients, make_optimizer, make_schedule
from mwt.structs import SignalFacts

RATES = {"siren": 1e-4, "alpha": 1e-2, "reader": 1e-4}


def model() -> MetaWeightTransformer:
    facts = SignalFacts(kind="image", channels=1, height=4, width=4, classes=("a", "b"))
    return MetaWeightTransformer(
        ModelConfig(
            siren=SirenConfig(hidden=64, hidden_layers=1), inner_loop=InnerLoopConfig(steps=1),
            reader=ReaderConfig(blocks=1), loss=LossConfig(), signal=facts,
        )
    ).double()  # fmt: skip


def test_every_parameter_is_in_one_group_with_its_rate() -> None:
    net = model()
    optimizer = make_optimizer(net, OptimConfig())
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == RATES
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in net.parameters())
    assert all(group["weight_decay"] == 1e-4 for group in optimizer.param_groups)  # biases and norms too
    assert all(group["betas"] == (0.9, 0.999) and group["eps"] == 1e-8 for group in optimizer.param_groups)


def cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))


def one_cycle(step: int, total: int, start: float, top: float, end: float, warmup: float = 0.05) -> float:
    """Up along a cosine until step warmup * total - 1, then down to the last (Smith and Topin; as in torch)."""
    turn = warmup * total - 1
    if step <= turn:
        return cosine(start, top, step / turn)
    return cosine(top, end, (step - turn) / (total - 1 - turn))


def test_three_steps_by_hand() -> None:
    """AdamW (Loshchilov and Hutter 2019, algorithm 2): decay on every tensor, then the bias-corrected step."""
    net, config, total = model(), OptimConfig(), 100
    optimizer = make_optimizer(net, config)
    schedule = make_schedule(optimizer, config, total_steps=total)
    expected = {name: p.detach().clone() for name, p in net.named_parameters()}
    first = {name: torch.zeros_like(p) for name, p in expected.items()}
    second = {name: torch.zeros_like(p) for name, p in expected.items()}
    for step in range(3):
        grads = {name: torch.randn_like(p) for name, p in expected.items()}
        for name, parameter in net.named_parameters():
            parameter.grad = grads[name].clone()
        optimizer.step()
        schedule.step()
        beta1 = one_cycle(step, total, 0.95, 0.85, 0.95)  # the momentum cycles the other way
        for name, grad in grads.items():
            top = RATES[name.split(".")[0]]
            rate = one_cycle(step, total, top / 25, top, top / 25 / 1e4)
            first[name] = beta1 * first[name] + (1 - beta1) * grad
            second[name] = 0.999 * second[name] + 0.001 * grad**2
            corrected = first[name] / (1 - beta1 ** (step + 1)), second[name] / (1 - 0.999 ** (step + 1))
            expected[name] = expected[name] * (1 - rate * 1e-4) - rate * corrected[0] / (corrected[1].sqrt() + 1e-8)
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=0, atol=1e-13)


def test_the_schedule_over_a_whole_run() -> None:
    optimizer = make_optimizer(model(), OptimConfig())
    schedule = make_schedule(optimizer, OptimConfig(), total_steps=200)
    rates = []
    for _ in range(200):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert rates[9] == pytest.approx(list(RATES.values()))  # the top, after 5 %
    for group, top in enumerate(RATES.values()):
        expected = [one_cycle(step, 200, top / 25, top, top / 25e4) for step in range(200)]
        assert [row[group] for row in rates] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("total", "warmup"), [(1, 0.05), (2, 0.05), (19, 0.05), (20, 0.05), (21, 0.05), (10, 0.1), (8, 0.0)]
)
def test_a_schedule_of_any_length_can_be_walked(total: int, warmup: float) -> None:
    """warmup * total = 1 leaves the rising phase without a step; torch's OneCycleLR then divides by zero."""
    config = OptimConfig(warmup=warmup)
    optimizer = make_optimizer(model(), config)
    schedule = make_schedule(optimizer, config, total_steps=total)
    for _ in range(total):
        optimizer.step()
        schedule.step()
    assert all(math.isfinite(rate) for rate in schedule.get_last_lr())


@pytest.mark.parametrize(("warmup", "total"), [(0.1, 40), (0.0, 40), (0.05, 7), (0.5, 1)])
@pytest.mark.parametrize("name", ["cosine", "constant"])
def test_the_other_schedules_against_torchs_own(name: str, warmup: float, total: int) -> None:
    config = OptimConfig(schedule=name, warmup=warmup)
    ours, theirs = (make_optimizer(model(), config) for _ in range(2))
    schedule = make_schedule(ours, config, total_steps=total)
    rise = round(warmup * total)
    level = (
        CosineAnnealingLR(theirs, T_max=max(1, total - rise)) if name == "cosine" else ConstantLR(theirs, factor=1.0)
    )
    reference = level
    if rise:
        up = LinearLR(theirs, start_factor=1 / (rise + 1), total_iters=rise)
        with warnings.catch_warnings():  # torch's own call of a form that torch deprecates
            warnings.simplefilter("ignore")
            reference = SequentialLR(theirs, [up, level], milestones=[rise])
    for _ in range(total):
        assert schedule.get_last_lr() == pytest.approx([g["lr"] for g in theirs.param_groups], rel=1e-9, abs=1e-20)
        assert all(group["betas"][0] == 0.9 for group in ours.param_groups)  # the momentum does not cycle
        for optimizer in (ours, theirs):
            optimizer.step()
        schedule.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reference.step()
    top = max(RATES.values())
    assert max(schedule.get_last_lr()) == pytest.approx(0.0 if name == "cosine" else top, abs=1e-12 * top)


@pytest.mark.parametrize("name", ["onecycle", "cosine", "constant"])
def test_the_state_of_a_schedule_is_json_and_goes_on(name: str) -> None:
    config = OptimConfig(schedule=name, warmup=0.3)
    rates: list[list[float]] = []
    for stop in (20, 7):
        optimizer = make_optimizer(model(), config)
        schedule = make_schedule(optimizer, config, total_steps=20)
        walked = []
        for step in range(20):
            if step == stop:
                stored = json.loads(json.dumps(schedule.state_dict()))
                optimizer = make_optimizer(model(), config)
                schedule = make_schedule(optimizer, config, total_steps=20)
                schedule.load_state_dict(stored)
            walked.append(schedule.get_last_lr())
            optimizer.step()
            schedule.step()
        rates.append([rate for row in walked for rate in row])
    assert rates[0] == rates[1]


@pytest.mark.parametrize("limit", [1.0, 0.1, None])
def test_each_group_is_clipped_by_itself(limit: float | None) -> None:
    net = model()
    optimizer = make_optimizer(net, OptimConfig())
    sizes = {"siren": 5.0, "alpha": 0.01, "reader": 300.0}
    before = {}
    for name, parameter in net.named_parameters():
        parameter.grad = torch.randn_like(parameter) * sizes[name.split(".")[0]]
        before[name] = parameter.grad.clone()
    norms = clip_gradients(optimizer, limit)
    for group, norm in zip(sizes, norms, strict=True):
        own = {name: grad for name, grad in before.items() if name.startswith(f"{group}.")}
        expected = math.sqrt(sum(float((grad**2).sum()) for grad in own.values()))
        assert norm.item() == pytest.approx(expected, rel=1e-12)
        factor = 1.0 if limit is None else min(1.0, limit / (expected + 1e-6))
        for name, grad in own.items():
            torch.testing.assert_close(net.get_parameter(name).grad, grad * factor, rtol=1e-9, atol=0)
