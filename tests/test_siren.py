"""The field: layout of offset vectors, initial values, and what it computes, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from mwt.config import SirenConfig
from mwt.siren import Siren


def make(hidden: int = 16, layers: int = 2, dims: int = 2, channels: int = 3, omega: float = 10.0) -> Siren:
    return Siren(SirenConfig(hidden=hidden, hidden_layers=layers, omega=omega), coordinate_dims=dims, channels=channels)


def test_flat_vectors_lie_layer_by_layer_weight_then_bias_row_major() -> None:
    siren = make(hidden=3, layers=1)
    assert siren.adapted_shapes == [
        ("layers.0.weight", (2, 3)),
        ("layers.0.bias", (3,)),
        ("layers.1.weight", (3, 3)),
        ("layers.1.bias", (3,)),
    ]
    assert siren.adapted_size == 21
    (w0, b0), (w1, b1) = siren.unflatten(torch.arange(21.0))
    assert w0.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert b0.tolist() == [6, 7, 8]
    assert w1.tolist() == [[9, 10, 11], [12, 13, 14], [15, 16, 17]]
    assert b1.tolist() == [18, 19, 20]


@pytest.mark.parametrize("batch", [(), (1,), (4,)])
def test_flatten_undoes_unflatten(batch: tuple[int, ...]) -> None:
    siren = make()
    flat = torch.randn(*batch, siren.adapted_size)
    assert torch.equal(siren.flatten(siren.unflatten(flat)), flat)


def test_unflatten_gives_views() -> None:
    """Nothing of W numbers a signal is copied."""
    siren = make()
    flat = torch.randn(2, siren.adapted_size)
    parts = [part for pair in siren.unflatten(flat) for part in pair]
    assert {part.untyped_storage().data_ptr() for part in parts} == {flat.untyped_storage().data_ptr()}


def test_offsets_start_at_zero_and_then_give_the_base() -> None:
    siren = make()
    offsets = siren.init_offsets(3)
    assert offsets.shape == (3, siren.adapted_size)
    assert not offsets.any()
    coords = torch.rand(5, 2)
    base = siren.render(siren.base(), coords)
    torch.testing.assert_close(siren(offsets, coords), base.expand(3, -1, -1))


@pytest.mark.parametrize(("dims", "width"), [(2, 128), (3, 64)])
def test_initial_values_are_those_of_the_released_code(dims: int, width: int) -> None:
    """First layer U(+-1/in), hidden ones U(+-sqrt(6/in)) without omega, biases 0, default linear head, scale 0.1."""
    siren = make(hidden=width, layers=3, dims=dims, omega=30.0)
    bounds = [1 / dims] + [(6 / width) ** 0.5] * 3
    for layer, bound in zip(siren.layers, bounds, strict=True):
        weights = layer.weight.detach().double().flatten().numpy()
        assert np.abs(weights).max() <= bound * (1 + 1e-6)
        # Kolmogorov-Smirnov with a fixed seed: a wrong bound or distribution gives p < 1e-6 with so many weights.
        assert stats.kstest(weights, stats.uniform(-bound, 2 * bound).cdf).pvalue > 1e-3
        assert not layer.bias.any()
    head = siren.head.weight.detach().abs().max().item()
    assert 0.8 / width**0.5 < head <= 1 / width**0.5
    assert siren.head.bias is not None
    assert torch.equal(siren.out_scale.detach(), torch.full((3,), 0.1))


@pytest.mark.parametrize(("dims", "channels", "omega"), [(2, 3, 10.0), (2, 1, 30.0), (3, 1, 10.0)])
def test_the_field_against_numpy(dims: int, channels: int, omega: float) -> None:
    siren = make(hidden=5, layers=2, dims=dims, channels=channels, omega=omega).double()
    offsets = torch.randn(2, siren.adapted_size, dtype=torch.float64) * 0.1
    coords = torch.rand(2, 4, dims, dtype=torch.float64) * 2 - 1
    state = {name: value.detach().numpy() for name, value in siren.named_parameters()}
    for b in range(2):
        x, start = coords[b].numpy(), 0
        for i in range(3):
            weight, bias = state[f"layers.{i}.weight"], state[f"layers.{i}.bias"]
            part = offsets[b, start : start + weight.size + bias.size].numpy()
            start += len(part)
            before = x @ (weight + part[: weight.size].reshape(weight.shape)) + bias + part[weight.size :]
            x = np.sin(omega * before) if i == 0 else np.sin(before)
        expected = (x @ state["head.weight"].T + state["head.bias"]) * state["out_scale"]
        np.testing.assert_allclose(siren(offsets, coords)[b].detach().numpy(), expected, rtol=0, atol=1e-13)


def test_shared_and_own_coordinates_agree() -> None:
    siren = make().double()
    offsets, coords = torch.randn(3, siren.adapted_size).double() * 0.1, torch.rand(7, 2).double()
    own = siren(offsets, coords.expand(3, 7, 2))
    torch.testing.assert_close(siren(offsets, coords), own, rtol=0, atol=1e-13)


def test_the_first_layer_keeps_full_precision_under_autocast() -> None:
    """bf16 has 8 bits: two neighbours of 320 columns would become one."""
    siren = make(omega=30.0)
    coords = torch.tensor([[0.0, 0.5], [0.0, 0.5 + 1e-3]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        left, right = siren.render(siren.base(), coords)
    exact = siren.render(siren.base(), coords)
    assert not torch.equal(left, right)
    assert (torch.stack([left, right]) - exact).abs().max() < 0.01 * exact.abs().max()
