"""Coordinate MLPs, multiplicative filter networks, encodings, the registry, and many networks at once."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from mwt.config_files import config_yaml, load_config
from mwt.errors import InputError
from mwt.fields import (
    ActivationConfig,
    EncodingConfig,
    Field,
    FieldConfig,
    HashGridConfig,
    InterpolatedGridConfig,
    MFNConfig,
    MLPConfig,
    build_field,
    list_encodings,
    list_fields,
)

RELU = ActivationConfig(name="relu")
SMALL = MLPConfig(width=6, hidden_layers=2)


def build(config: MLPConfig | MFNConfig, dims: int = 2, channels: int = 3, **options: Any) -> Field:
    block = {"mlp": config} if isinstance(config, MLPConfig) else {"mfn": config}
    full = FieldConfig(name=next(iter(block)), **block)  # type: ignore[arg-type]
    return build_field(full, coordinate_dims=dims, channels=channels, **{"seed": 0, **options})


# Every kind of parameter and buffer: learned settings, complex matrices, batch norm, random and learned encodings.
CASES: dict[str, FieldConfig] = {
    "siren": FieldConfig(mlp=SMALL),
    "wire": FieldConfig(mlp=replace(SMALL, activation=ActivationConfig(name="wire", trainable=True))),
    "incode": FieldConfig(mlp=replace(SMALL, activation=ActivationConfig(name="incode"))),
    "prelu, norm": FieldConfig(mlp=replace(SMALL, activation=ActivationConfig(name="prelu"), batch_norm=True)),
    "relu, no bias": FieldConfig(mlp=replace(SMALL, activation=RELU, bias=False, output="tanh")),
    "finer": FieldConfig(mlp=replace(SMALL, activation=ActivationConfig(name="finer"), first_bias_scale=3.0)),
    "nerf": FieldConfig(mlp=replace(SMALL, activation=RELU, encoding=EncodingConfig(name="nerf"))),
    "fourier": FieldConfig(mlp=replace(SMALL, encoding=EncodingConfig(name="fourier", frequencies=5, sigma=1.0))),
    "fourier_kan": FieldConfig(
        mlp=replace(SMALL, encoding=EncodingConfig(name="fourier_kan", frequencies=5, outputs=7))
    ),
    "mfn_fourier": FieldConfig(name="mfn", mfn=MFNConfig(filter="fourier", width=6, input_scale=5.0)),
    "mfn_gabor": FieldConfig(name="mfn", mfn=MFNConfig(filter="gabor", width=6, input_scale=5.0)),
    "hash_grid": FieldConfig(
        name="hash_grid",
        hash_grid=HashGridConfig(levels=3, log2_table=6, base_resolution=(4,), finest_resolution=(16,)),
    ),
    "grid": FieldConfig(name="grid", grid=InterpolatedGridConfig(size=(5, 4), interpolation="cubic")),
}


@pytest.mark.parametrize("case", list(CASES))
def test_copies_are_the_networks_alone(case: str) -> None:
    """Initial values, values at shared and own coordinates, and gradients of N at once and of N single ones."""
    options = {"coordinate_dims": 2, "channels": 3, "seed": 5}
    together = build_field(CASES[case], copies=3, position=4, **options).double()
    alone = [build_field(CASES[case], position=4 + i, **options).double() for i in range(3)]
    own = torch.rand(3, 9, 2, dtype=torch.float64) * 2 - 1
    for coords in (own, own[0]):
        together.zero_grad()
        values = together(coords)
        assert values.shape == (3, 9, 3)
        values.square().sum().backward()
        for i, field in enumerate(alone):
            field.zero_grad()
            expected = field(coords if coords.ndim == 2 else coords[i])
            torch.testing.assert_close(values[i], expected, rtol=0, atol=1e-12)
            expected.square().sum().backward()
            many = dict(together.named_parameters())
            for name, parameter in field.named_parameters():
                assert torch.equal(many[name][i], parameter)
                torch.testing.assert_close(many[name].grad[i], parameter.grad, rtol=1e-9, atol=1e-9)
    assert together.num_parameters == alone[0].num_parameters
    if case != "grid":  # which starts the same everywhere
        name, parameter = next(iter(alone[0].named_parameters()))
        assert not torch.equal(parameter, dict(alone[1].named_parameters())[name])


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("prelu, norm", "hash_grid", "finer")])
def test_second_order_gradients(case: str) -> None:
    """Activations have a test of their own; here the encodings and the other architectures."""
    config = CASES[case]
    field = build_field(config, coordinate_dims=2, channels=1, seed=0).double()
    names = [name for name, _ in field.named_parameters()]
    coords = (torch.rand(2, 2, dtype=torch.float64) * 1.6 - 0.8).requires_grad_()

    def call(places: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(field, dict(zip(names, values, strict=True)), (places,))

    assert torch.autograd.gradcheck(call, (coords, *field.parameters()))
    assert torch.autograd.gradgradcheck(call, (coords, *field.parameters()))


# ---- sizes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoding", "count"),
    [
        (EncodingConfig(), 263_937),
        (EncodingConfig(name="nerf", frequencies=4), 265_985),
        (EncodingConfig(name="fourier", frequencies=32), 280_065),
    ],
)
def test_sizes_of_inr_bench(encoding: EncodingConfig, count: int) -> None:
    """1 -> 256, four times 256 -> 256, -> 1."""
    field = build(MLPConfig(width=256, hidden_layers=4, activation=RELU, encoding=encoding), dims=1, channels=1)
    assert field.num_parameters == count


@pytest.mark.parametrize(
    ("layers", "width", "dims", "channels", "count"),
    [
        (3, 256, 2, 1, 66_817),
        (4, 256, 2, 1, 132_609),
        (5, 256, 2, 1, 198_401),
        (6, 256, 2, 1, 264_193),
        (7, 256, 2, 1, 329_985),
        (4, 256, 2, 3, 133_123),
        (4, 128, 1, 1, 33_409),
        (6, 512, 2, 3, 1_053_699),
        (10, 512, 3, 3, 2_104_835),
    ],
)
def test_sizes_of_asmrs_sirens(layers: int, width: int, dims: int, channels: int, count: int) -> None:
    """Their layers are linear layers: two more than hidden-to-hidden ones."""
    field = build(MLPConfig(width=width, hidden_layers=layers - 2), dims=dims, channels=channels)
    assert field.num_parameters == count


def test_other_sizes() -> None:
    # 2 -> 256, three filters and two hidden matrices, -> 3: the 134.7 thousand of ASMR's table
    assert build(MFNConfig(filter="fourier", hidden_layers=2)).num_parameters == 3 * 768 + 2 * 65_792 + 771 == 134_659
    assert build(MFNConfig(filter="gabor", hidden_layers=2)).num_parameters == 134_659 + 3 * 256 * (2 + 1)
    # width 256 / sqrt 2 = 181: first layer real, complex numbers count as two
    wire = build(MLPConfig(hidden_layers=2, activation=ActivationConfig(name="wire")))
    assert wire.num_parameters == 3 * 181 + 2 * 2 * 181 * 182 + 2 * 182 * 3
    assert abs(wire.num_parameters / build(MLPConfig(hidden_layers=2)).num_parameters - 1) < 0.02
    norm = build(MLPConfig(hidden_layers=2, activation=RELU, batch_norm=True))
    assert norm.num_parameters == build(MLPConfig(hidden_layers=2)).num_parameters + 3 * 2 * 256


# ---- what they compute -------------------------------------------------------------------------------------------


def test_a_siren_against_numpy() -> None:
    field = build(
        MLPConfig(width=5, hidden_layers=2, activation=ActivationConfig(first_omega=12.0, omega=7.0))
    ).double()
    assert [name for name, _ in field.named_children() if name in ("first", "hidden", "last")] == [
        "first",
        "hidden",
        "last",
    ]
    state = {name: value.detach().numpy() for name, value in field.named_parameters()}
    coords = np.random.default_rng(0).uniform(-1, 1, (4, 2))
    x = np.sin(12 * (coords @ state["first.weight"] + state["first.bias"]))
    for i in range(2):
        x = np.sin(7 * (x @ state[f"hidden.{i}.weight"] + state[f"hidden.{i}.bias"]))
    expected = x @ state["last.weight"] + state["last.bias"]
    np.testing.assert_allclose(field(torch.from_numpy(coords)).detach().numpy(), expected, rtol=0, atol=1e-13)


def test_wire_against_numpy() -> None:
    field = build(MLPConfig(width=6, hidden_layers=1, activation=ActivationConfig(name="wire"))).double()
    state = {name: value.detach().numpy() for name, value in field.named_parameters()}
    coords = np.random.default_rng(0).uniform(-1, 1, (4, 2))

    def gabor(z: np.ndarray) -> np.ndarray:
        return np.exp(20j * z - np.abs(10 * z) ** 2)

    def number(name: str) -> np.ndarray:
        return state[name][..., 0] + 1j * state[name][..., 1]

    x = gabor(coords @ state["first.weight"] + state["first.bias"])
    x = gabor(x @ number("hidden.0.weight") + number("hidden.0.bias"))
    expected = (x @ number("last.weight") + number("last.bias")).real
    np.testing.assert_allclose(field(torch.from_numpy(coords)).detach().numpy(), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", ["fourier", "gabor"])
def test_filter_networks_against_numpy(kind: Any) -> None:
    field = build(MFNConfig(filter=kind, width=5, hidden_layers=2, input_scale=6.0)).double()
    state = {name: value.detach().numpy() for name, value in field.named_parameters()}
    coords = np.random.default_rng(0).uniform(-1, 1, (4, 2))

    def g(i: int) -> np.ndarray:
        own = {
            name: state[f"filters.{i}.{name}"]
            for name in ("omega", "phi", "mu", "gamma")
            if kind == "gabor" or name in ("omega", "phi")
        }
        wave = np.sin(coords @ own["omega"] + own["phi"])
        if kind == "fourier":
            return wave
        return wave * np.exp(-own["gamma"] / 2 * ((coords[:, None] - own["mu"]) ** 2).sum(-1))

    z = g(0)
    for i in range(2):
        z = (z @ state[f"hidden.{i}.weight"] + state[f"hidden.{i}.bias"]) * g(i + 1)
    expected = z @ state["last.weight"] + state["last.bias"]
    np.testing.assert_allclose(field(torch.from_numpy(coords)).detach().numpy(), expected, rtol=0, atol=1e-12)


def test_initial_values_of_filter_networks() -> None:
    config = MFNConfig(filter="gabor", width=2000, hidden_layers=1, input_scale=40.0, alpha=6.0, beta=2.0)
    field = build(config, channels=1)
    first = {name: value.detach().double().numpy() for name, value in field.filters[0].named_parameters()}
    assert stats.kstest(first["gamma"], stats.gamma(3.0, scale=0.5).cdf).pvalue > 1e-3
    scale = 40 / 2**0.5 * 2**-0.5  # input_scale / sqrt(L + 1), nn.Linear's 1 / sqrt(D)
    omega = first["omega"] / np.sqrt(first["gamma"])
    assert stats.kstest(omega.ravel(), stats.uniform(-scale, 2 * scale).cdf).pvalue > 1e-3
    assert stats.kstest(first["phi"], stats.uniform(-math.pi, 2 * math.pi).cdf).pvalue > 1e-3
    assert stats.kstest(first["mu"].ravel(), stats.uniform(-1, 2).cdf).pvalue > 1e-3
    hidden = field.hidden[0].weight.detach()
    assert 0.99 < hidden.abs().max() * 2000**0.5 <= 1 + 1e-6


def test_batch_norm_is_torchs() -> None:
    field = build(MLPConfig(width=6, hidden_layers=0, activation=RELU, batch_norm=True))
    norm, ours = nn.BatchNorm1d(6), field.norms[0]
    for _ in range(3):
        x = torch.randn(10, 6) * 3 + 1
        torch.testing.assert_close(ours(x), norm(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.variance, norm.running_var)
    x = torch.randn(4, 6)
    torch.testing.assert_close(ours.eval()(x), norm.eval()(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="at least 2 points"):
        field.train()(torch.rand(1, 2))


def test_output_ranges() -> None:
    coords = torch.rand(200, 2) * 2 - 1
    wide = replace(SMALL, activation=RELU, first_bias_scale=30.0)
    raw = build(wide)(coords)
    assert raw.abs().max() > 1.5
    torch.testing.assert_close(build(replace(wide, output="sigmoid"))(coords), 1 / (1 + (-raw).exp()))
    torch.testing.assert_close(build(replace(wide, output="tanh"))(coords), raw.tanh())
    clamped = build(replace(wide, output="clamp", clamp=(-0.5, 1.0)))
    assert torch.equal(clamped(coords), raw)  # in training
    assert torch.equal(clamped.eval()(coords), raw.clamp(-0.5, 1.0))


# ---- registry, Muon, configuration -------------------------------------------------------------------------------


def test_names() -> None:
    assert list_fields() == ["mlp", "mfn", "hash_grid", "grid", "kan", "tiled", "experts", "asmr", "harmonized"]
    assert list_encodings() == ["identity", "nerf", "fourier", "fourier_kan"]


def test_seed_and_position_make_the_network() -> None:
    def weights(**options: Any) -> Tensor:
        return build(SMALL, **options).hidden[0].weight

    assert torch.equal(weights(seed=1, position=2), weights(seed=1, position=2))
    assert not torch.equal(weights(seed=1, position=2), weights(seed=2, position=1))
    assert not torch.equal(weights(seed=1), weights(seed=1, position=1))
    state = torch.random.get_rng_state()
    build(SMALL)
    assert torch.equal(torch.random.get_rng_state(), state)  # the process's generator is not touched


@pytest.mark.parametrize("copies", [None, 3])
def test_muon_trains_the_hidden_matrices(copies: int | None) -> None:
    lead = () if copies is None else (copies,)
    field = build(MLPConfig(width=8, hidden_layers=3), copies=copies)
    found = field.muon_parameters()
    assert [(name, layout) for name, _, layout in found] == [(f"hidden.{i}.weight", "in_out") for i in range(3)]
    for name, matrix, _ in found:
        assert matrix is dict(field.named_parameters())[name]
        assert matrix.shape == (*lead, 8, 8)
    mfn = build(MFNConfig(width=8, hidden_layers=2), copies=copies)
    assert [name for name, _, _ in mfn.muon_parameters()] == ["hidden.0.weight", "hidden.1.weight"]
    hashed = build_field(CASES["hash_grid"], coordinate_dims=2, channels=1, seed=0, copies=copies)
    [(name, matrix, _)] = hashed.muon_parameters()
    assert matrix is dict(hashed.named_parameters())[name]
    wire = build(MLPConfig(width=8, hidden_layers=1, activation=ActivationConfig(name="wire")), copies=copies)
    [(name, matrix, layout)] = wire.muon_parameters()
    assert (name, tuple(matrix.shape), layout) == ("hidden.0.weight", (*lead, 5, 5, 2), "complex_in_out")


def test_configuration_through_yaml(tmp_path: Any) -> None:
    overrides = ["name=hash_grid", "hash_grid.base_resolution=[4,8]", "mlp.activation.name=wire", "mlp.clamp=[0,1]"]
    config = load_config(FieldConfig, None, overrides)
    assert config.hash_grid.base_resolution == (4, 8)
    path = tmp_path / "field.yaml"
    path.write_text(config_yaml(config))
    assert load_config(FieldConfig, path) == config
    with pytest.raises(InputError, match="widht"):
        load_config(FieldConfig, None, ["mlp.widht=3"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (FieldConfig(name="hashgrid"), "field.name is 'hashgrid', which is not known; did you mean 'hash_grid'"),
        (FieldConfig(mlp=MLPConfig(encoding=EncodingConfig(name="nrf"))), "encoding.name is 'nrf'.*'nerf'"),
        (FieldConfig(mlp=MLPConfig(encoding=EncodingConfig(frequencies=3))), "encoding.frequencies.*identity"),
        (FieldConfig(mlp=MLPConfig(encoding=EncodingConfig(name="fourier", samples=9))), "samples.*fourier"),
        (
            FieldConfig(mlp=MLPConfig(activation=ActivationConfig(name="wire"), batch_norm=True)),
            "batch_norm.*complex.*wire_real",
        ),
        (
            FieldConfig(name="grid", grid=InterpolatedGridConfig(size=(3, 4, 5))),
            "grid.size has 3 numbers; give 1, or 2",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(config: FieldConfig, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_field(config, coordinate_dims=2, channels=1, seed=0)


def test_wrong_coordinates_are_refused() -> None:
    with pytest.raises(InputError, match=r"takes coordinates \[P, 2\], not \[5, 3\]"):
        build(SMALL)(torch.rand(5, 3))
    with pytest.raises(InputError, match=r"\[P, 2\] or \[3, P, D\], not \[4, 5, 2\]"):
        build(SMALL, copies=3)(torch.rand(4, 5, 2))
    with pytest.raises(InputError, match="copies is 0"):
        build(SMALL, copies=0)


def test_tasks_can_ask_for_derivatives() -> None:
    build(SMALL).require_derivatives(2, "Poisson reconstruction")
    with pytest.raises(InputError, match=r"Poisson reconstruction needs derivatives of order 2.*up to order 1"):
        build(replace(SMALL, activation=RELU)).require_derivatives(2, "Poisson reconstruction")
    with pytest.raises(InputError, match="detach_scale=false"):
        build(replace(SMALL, activation=ActivationConfig(name="finer"))).require_derivatives(1, "Poisson")
    with pytest.raises(InputError, match=r"mlp\.batch_norm=false"):  # a value depends on other points
        build(replace(SMALL, batch_norm=True)).require_derivatives(1, "Poisson")


def test_the_first_layer_keeps_full_precision_under_autocast() -> None:
    field = build(MLPConfig(width=32, hidden_layers=1))
    coords = torch.tensor([[0.5, 0.5], [0.5, 0.5 + 1e-3]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        left, right = field(coords).float()
    assert not torch.equal(left, right)


@pytest.mark.gpu
@pytest.mark.parametrize("case", list(CASES))
def test_the_same_on_a_gpu(case: str) -> None:
    field = build_field(CASES[case], coordinate_dims=2, channels=3, seed=0, copies=2).double()
    coords = torch.rand(9, 2, dtype=torch.float64) * 2 - 1
    found = []
    for device in ("cpu", "cuda"):
        field.to(device).zero_grad()
        here = coords.to(device).requires_grad_()
        values = field(here)
        (slope,) = torch.autograd.grad(values.sin().sum(), here, create_graph=True)
        slope.square().sum().backward()
        found.append([tensor.detach().cpu() for tensor in (values, slope, next(field.parameters()).grad)])
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)
