"""Which parameters Muon gets, at which rates, and Muon as the outer optimizer."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mwt.config import InnerLoopConfig, LossConfig, ModelConfig, OptimConfig, ReaderConfig, SirenConfig
from mwt.errors import InputError
from mwt.model import MetaWeightTransformer
from mwt.muon_groups import MuonModule, default_lr, split_parameters
from mwt.optim import clip_gradients, make_optimizer, make_schedule, step_if_finite
from mwt.structs import SignalFacts


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(0.05 * torch.randn(shape))


# ---- roles -------------------------------------------------------------------------------------------------------


class Stack(nn.Module):
    """Independent networks in one, weights [N, in, out], with a table and a Fourier matrix that are matrices too."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(64, 16))
        self.fourier = nn.Parameter(torch.randn(16, 16))
        self.first = nn.Module()
        self.first.weight = parameter(5, 32, 16)
        self.hidden = nn.ParameterList(parameter(5, 16, 16) for _ in range(2))

    def muon_parameters(self) -> list[tuple[str, nn.Parameter, str]]:
        return [(f"hidden.{i}", weight, "in_out") for i, weight in enumerate(self.hidden)]


def test_roles_come_from_the_network() -> None:
    split = split_parameters(nn.ModuleDict({"inner": Stack()}))
    assert [(role.name, role.layout) for role in split.muon] == [
        ("inner.hidden.0", "in_out"),
        ("inner.hidden.1", "in_out"),
    ]
    assert [role.name for role in split.adam] == ["inner.table", "inner.fourier", "inner.first.weight"]
    split = split_parameters(Stack(), muon_first=True, exclude=["hidden.1"])
    assert [(role.name, role.why) for role in split.muon] == [
        ("first.weight", "first layer, by muon_first"), ("hidden.0", "hidden matrix, in_out"),
    ]  # fmt: skip
    report = split.report().splitlines()
    assert report[0].split() == ["parameter", "shape", "optimizer", "why"]
    assert any(
        line.split() == ["hidden.1", "5", "x", "16", "x", "16", "Adam", "excluded", "by", "hidden.1"] for line in report
    )
    assert report[-2:] == ["Muon: 3,840 numbers in 2 parameters", "Adam: 2,560 numbers in 3 parameters"]


def test_the_layers_of_a_sequence() -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(2, 9), nn.ReLU()), nn.Linear(9, 9), nn.Linear(9, 9), nn.Linear(9, 1))
    assert [role.name for role in split_parameters(net).muon] == ["1.weight", "2.weight"]
    assert [role.name for role in split_parameters(net, muon_first=True).muon] == ["0.0.weight", "1.weight", "2.weight"]
    groups = split_parameters(net).groups(lr=0.1, lr_adam=1e-4, weight_decay=0.2)
    assert [(g["use_muon"], g["lr"], len(g["params"])) for g in groups] == [(True, 0.1, 2), (False, 1e-4, 6)]
    assert groups[0]["weight_decay"] == 0.2


@pytest.mark.parametrize(
    ("net", "options", "message"),
    [(nn.Sequential(nn.Linear(2, 8), nn.Linear(8, 1)), {}, "no weight matrix between two hidden layers"),
     (nn.ModuleList([nn.Linear(8, 8) for _ in range(4)]), {}, "no weight matrix between two hidden layers"),
     (nn.Sequential(nn.Linear(2, 8), nn.Linear(8, 1)), {"muon_first": True}, "no weight matrix"),
     (nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))), {"exclude": ["blocks.*"]}, r"blocks\.\* matches none")],
)  # fmt: skip
def test_networks_in_which_nothing_qualifies(net: nn.Module, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        split_parameters(net, **options)


def test_a_network_that_names_what_it_does_not_have() -> None:
    net = Stack()
    net.muon_parameters = lambda: [("hidden.0", parameter(4, 4), "out_in")]  # type: ignore[method-assign]
    with pytest.raises(InputError, match="no parameter of it"):
        split_parameters(net)
    del net.muon_parameters
    net.first = nn.Identity()
    with pytest.raises(InputError, match="no layer `first`"):
        split_parameters(net, muon_first=True)


@pytest.mark.parametrize("relative", [0.03, 0.09])
def test_the_default_rate_follows_the_spectral_norm(relative: float) -> None:
    matrices = [torch.randn(3, 30, 30), 5 * torch.randn(40, 20)]
    norms = [np.linalg.norm(matrix.numpy(), 2) for matrix in (*matrices[0], matrices[1])]
    assert default_lr(matrices, relative=relative) == pytest.approx(relative * float(np.median(norms)), rel=1e-5)
    with pytest.raises(InputError, match="zero at the beginning"):
        default_lr([torch.zeros(4, 4)])


# ---- as outer optimizer ------------------------------------------------------------------------------------------


def classifier() -> MetaWeightTransformer:
    facts = SignalFacts(kind="image", channels=1, height=4, width=4, classes=("a", "b"))
    return MetaWeightTransformer(
        ModelConfig(
            siren=SirenConfig(hidden=64, hidden_layers=2), inner_loop=InnerLoopConfig(steps=1),
            reader=ReaderConfig(blocks=2), loss=LossConfig(), signal=facts,
        )
    )  # fmt: skip


OUTER = OptimConfig(name="muon", lr_siren=3e-3, lr_reader=2e-3, muon_factor=2.0, weight_decay=0.1)


def test_the_model_declares_its_matrices() -> None:
    model = classifier()
    assert isinstance(model.siren, MuonModule)
    assert [(role.name, role.layout) for role in split_parameters(model).muon] == [
        *((f"siren.layers.{i}.weight", "in_out") for i in (1, 2)),
        *((f"reader.blocks.{i}.{layer}.weight", "qkv" if layer == "attn.qkv" else "out_in")
          for i in (0, 1) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
    ]  # fmt: skip


def test_groups_of_the_outer_optimizer() -> None:
    model = classifier()
    optimizer = make_optimizer(model, OUTER)
    groups = [(g["name"], g["use_muon"], g.get("layout"), g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert groups == [
        ("siren", False, None, 3e-3, 0.1), ("alpha", False, None, 1e-2, 0.1), ("reader", False, None, 2e-3, 0.1),
        ("siren", True, "in_out", 6e-3, 0.1), ("reader", True, "qkv", 4e-3, 0.1), ("reader", True, "out_in", 4e-3, 0.1),
    ]  # fmt: skip
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_updates_are_as_large_as_adamws() -> None:
    """0.2 times the rate in root mean square (Liu et al. 2025), for matrices of any shape."""
    model = classifier()
    optimizer = make_optimizer(model, OptimConfig(name="muon", lr_reader=1e-2, weight_decay=0.0, muon_factor=1.0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for role in split_parameters(model).muon:
        change = (role.parameter.detach() - before[role.name]).square().mean().sqrt().item()
        rate = 1e-4 if role.name.startswith("siren") else 1e-2
        assert change == pytest.approx(0.2 * rate, rel=0.2), role.name


def test_the_parts_are_clipped_as_for_adamw() -> None:
    ours, theirs = classifier(), classifier()
    norms = []
    for model, config in ((ours, OUTER), (theirs, OptimConfig())):
        torch.manual_seed(1)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        norms.append(clip_gradients(make_optimizer(model, config), 1.0))
    torch.testing.assert_close(norms[0], norms[1])
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "constant"])
def test_schedules_move_the_rates_of_all_groups_alike(schedule: str) -> None:
    config = OptimConfig(name="muon", schedule=schedule)
    optimizer = make_optimizer(classifier(), config)
    top = [group["lr"] for group in optimizer.param_groups]
    walk = make_schedule(optimizer, config, total_steps=50)
    for _ in range(50):
        rates = [group["lr"] / rate for group, rate in zip(optimizer.param_groups, top, strict=True)]
        assert rates == pytest.approx([rates[0]] * 6)
        assert {group["momentum"] for group in optimizer.param_groups if group["use_muon"]} == {0.95}
        optimizer.step()
        walk.step()


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    model = classifier()
    optimizer = make_optimizer(model, OUTER)
    for value in (1.0, float("nan")):
        before = copy.deepcopy([*model.parameters(), *(v for s in optimizer.state.values() for v in s.values())])
        for p in model.parameters():
            p.grad = torch.full_like(p, value)
        step_if_finite(optimizer, clip_gradients(optimizer, 1.0))
    after = [*model.parameters(), *(v for s in optimizer.state.values() for v in s.values())]
    assert len(after) > len(list(model.parameters()))
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)
