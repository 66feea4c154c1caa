"""The tangent kernel against closed forms, finite differences and itself; frequencies against NumPy and Parseval."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mwt import ntk
from mwt.errors import InputError, TrainingError
from mwt.fields import Field, FieldConfig, build_field, list_activations, list_encodings
from mwt.fields.activations import Finer
from mwt.fields.config import ActivationConfig, EncodingConfig, MFNConfig, MLPConfig
from mwt.fields.config_kan import KANConfig
from mwt.fields.config_tiled import ExpertsConfig, TiledConfig


def small(name: str) -> EncodingConfig:
    """Few features: each is a column of finite differences."""
    few = {
        "nerf": {"frequencies": 3},
        "fourier": {"frequencies": 3, "sigma": 1.0},
        "fourier_kan": {"frequencies": 3, "outputs": 4},
    }
    return EncodingConfig(name=name, **few.get(name, {}))


def mlp(activation: str = "sine", encoding: str = "identity", *, dims: int = 2, channels: int = 1, **settings) -> Field:
    block = MLPConfig(
        activation=ActivationConfig(name=activation),
        encoding=small(encoding),
        **{"width": 6, **settings},
    )
    return build_field(FieldConfig(mlp=block), coordinate_dims=dims, channels=channels, seed=1)


def points(count: int = 7, dims: int = 2) -> Tensor:
    return torch.rand(count, dims, generator=torch.Generator().manual_seed(5)) * 2 - 1


class Affine(torch.nn.Module):
    """A linear field: f(x) = x W + b."""

    def __new__(cls, dims: int, channels: int) -> Field:
        field = Field(coordinate_dims=dims, channels=channels, copies=None, derivatives=2)
        field.weight = torch.nn.Parameter(torch.randn(dims, channels))
        field.bias = torch.nn.Parameter(torch.randn(channels))
        field.values = lambda x: x @ field.weight + field.bias  # type: ignore[method-assign]
        return field


@pytest.mark.parametrize("channels", [1, 3])
def test_of_a_linear_field(channels: int) -> None:
    x = points(9, 3).double()
    wanted = channels * (x @ x.T + 1)
    torch.testing.assert_close(ntk.kernel(Affine(3, channels), x), wanted, rtol=1e-13, atol=0)


def relu_by_hand(field: Field, x: Tensor) -> Tensor:
    """One hidden layer written out: h = relu(x A + a), f = h B + b."""
    state = {name: value.detach().double() for name, value in field.named_parameters()}
    z = x @ state["first.weight"] + state["first.bias"]
    on, hidden, out = (z > 0).double(), z.relu(), state["last.weight"]
    through = (on * out.square().sum(1)) @ on.T  # sum over outputs and units of B^2 [z > 0] [z' > 0]
    return (hidden @ hidden.T + 1) * out.shape[1] + through * (x @ x.T + 1)


def test_of_a_relu_network_by_hand() -> None:
    field, x = mlp("relu", hidden_layers=0, width=11, channels=2), points().double()
    torch.testing.assert_close(ntk.kernel(field, x), relu_by_hand(field, x), rtol=1e-12, atol=1e-12)


def test_of_a_wide_relu_network_is_the_arc_cosine_kernel() -> None:
    """f = B relu(A x), A and B from N(0, 2/in), as the width grows: Cho and Saul 2009.

    With a hidden layer of H units and entries A ~ N(0, 2/D), B ~ N(0, 2/H): the part of B is H E[relu relu]
    = H (2/D) |x||x'| (sin t + (pi - t) cos t) / (2 pi), that of A is (2/H) H x.x' (pi - t) / (2 pi). Sums over H
    independent units, each with a standard deviation of at most sqrt(5) of its mean on the diagonal (fourth moments of
    a normal are three times the squared second): five deviations are 11.2 / sqrt(H), relative to sqrt(K_ii K_jj).
    """
    width, dims = 40000, 3
    field = mlp("relu", dims=dims, hidden_layers=0, width=width, bias=False)
    x = points(6, dims).double()
    norms = x.norm(dim=1)
    cosine = (x @ x.T / norms[:, None] / norms).clamp(-1, 1)
    angle = cosine.arccos()
    k1 = norms[:, None] * norms * (angle.sin() + (math.pi - angle) * cosine) / (2 * math.pi)
    k0 = (math.pi - angle) / (2 * math.pi)
    parts = ntk.jacobian(field, x)[:, 0]
    found = {"first": parts[:, : dims * width], "last": parts[:, dims * width :]}
    limits = {"first": 2 * (x @ x.T) * k0, "last": width * (2 / dims) * k1}
    for layer, rows in found.items():  # the last layer's part is larger by far and would hide the first's
        size = limits[layer].diagonal().sqrt()
        off = (rows @ rows.T - limits[layer]).abs() / (size[:, None] * size)
        assert float(off.max()) < 11.2 / math.sqrt(width), layer
    torch.testing.assert_close(ntk.kernel(field, x), parts @ parts.T)


@pytest.mark.parametrize(
    ("activation", "encoding"),
    [*((name, "identity") for name in list_activations()), *(("sine", name) for name in list_encodings())],
)
def test_finite_differences(activation: str, encoding: str) -> None:
    """In float64, by central differences of every parameter in turn."""
    field, x = mlp(activation, encoding, hidden_layers=1, channels=2, width=4), points(4).double()
    ours = ntk.jacobian(field, x)
    field = field.double()
    columns = []
    with torch.no_grad():
        for parameter in field.parameters():
            flat = parameter.view(-1)
            for i in range(len(flat)):
                before = float(flat[i])
                flat[i] = before + 1e-6
                above = field(x)
                flat[i] = before - 1e-6
                columns.append((above - field(x)) / 2e-6)
                flat[i] = before
    wanted = torch.stack(columns, dim=-1)
    assert ours.shape == (4, 2, field.num_parameters)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=2e-5 * float(wanted.abs().max()))
    assert all(module.detach for module in field.modules() if isinstance(module, Finer))  # training is as before


def test_a_kernel_of_several_outputs_is_the_sum_over_them() -> None:
    x, field = points(), mlp(channels=3)
    parts = ntk.jacobian(field, x)
    wanted = sum(parts[:, c] @ parts[:, c].T for c in range(3))
    torch.testing.assert_close(ntk.kernel(field, x), wanted)


@pytest.mark.parametrize("field", [mlp(channels=3), mlp("wire"), mlp("gaussian", "fourier")])
def test_chunks_change_nothing(field: Field) -> None:
    x = points(11)
    whole = ntk.kernel(field, x)
    assert torch.equal(whole, whole.T)
    for share in (1, 3, 4):
        size = share * 4 * 8 * field.channels * field.num_parameters
        torch.testing.assert_close(ntk.kernel(field, x, memory=size), whole, rtol=1e-12, atol=1e-12)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    field, seen = mlp(width=16), []
    real = ntk.jacobian
    monkeypatch.setattr(ntk, "jacobian", lambda f, x, **k: (seen.append(k["rows"]), real(f, x, **k))[1])
    ntk.kernel(field, points(10), memory=4 * 8 * 3 * field.num_parameters)
    assert {rows.stop - rows.start for rows in seen} == {3}
    assert len(seen) == 4 + 3 + 2 + 1  # each block of rows, and those before it


def test_complex_weights_are_two_reals() -> None:
    """WIRE's kernel from Wirtinger derivatives: |d f / d w|^2 over real and imaginary parts."""
    field, x = mlp("wire", hidden_layers=1), points(5).double()
    parts = ntk.jacobian(field, x)
    assert parts.shape[2] == field.num_parameters
    assert field.num_parameters == sum(p.numel() for p in field.parameters())
    weight = field.hidden[0].weight
    assert weight.shape[-1] == 2
    # the last layer is Re(h w): d/d Re w = Re h, d/d Im w = -Im h
    double = field.double()
    z = double.activations[0](double.first(x))
    hidden = double.activations[1](double.hidden[0](z))
    place = sum(p.numel() for name, p in field.named_parameters() if not name.startswith("last"))
    count = field.last.weight.numel()
    last = parts[:, 0, place : place + count].unflatten(1, (-1, 2))
    torch.testing.assert_close(last[..., 0], hidden.real)
    torch.testing.assert_close(last[..., 1], -hidden.imag)


def test_batch_normalisation_couples_the_points() -> None:
    """Against autograd through the whole set, a value at a time; the field's running statistics stay."""
    field, x = mlp(batch_norm=True, channels=2), points(6)
    before = {name: value.clone() for name, value in field.state_dict().items()}
    found = ntk.kernel(field, x)
    torch.testing.assert_close(ntk.kernel(field, x, memory=1), found, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(value, before[name]) for name, value in field.state_dict().items())
    field = field.double()
    values = field(x.double())
    rows = []
    for value in values.flatten():
        gradients = torch.autograd.grad(value, list(field.parameters()), retain_graph=True)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    matrix = torch.stack(rows).unflatten(0, (6, 2)).flatten(1)
    torch.testing.assert_close(found, matrix @ matrix.T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("basis", ["fourier", "bspline", "morlet", "fcn"])
def test_kolmogorov_arnold_networks(basis: str) -> None:
    """Against autograd; wavelets have batch normalisation between layers."""
    config = FieldConfig(name="kan", kan=KANConfig(basis=basis, width=4, hidden_layers=1))
    field, x = build_field(config, coordinate_dims=2, channels=1, seed=0), points(5)
    found = ntk.kernel(field, x)
    values = field.double()(x.double())
    rows = []
    for value in values.flatten():
        gradients = torch.autograd.grad(value, list(field.parameters()), retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    matrix = torch.stack(rows)
    torch.testing.assert_close(found, matrix @ matrix.T, rtol=1e-8, atol=1e-8)


def test_other_architectures_have_kernels() -> None:
    for config in (
        FieldConfig(name="mfn", mfn=MFNConfig(width=5)),
        FieldConfig(name="hash_grid"),
        FieldConfig(name="grid"),
        FieldConfig(name="tiled", tiled=TiledConfig(tiles=(2,), width=4, frequencies=2)),
        FieldConfig(name="experts", experts=ExpertsConfig(bases=((2, 3),), width=4, frequencies=2)),
    ):
        field = build_field(config, coordinate_dims=2, channels=1, seed=0)
        x = points(3)
        found = ntk.kernel(field, x)
        torch.testing.assert_close(ntk.kernel(field, x, memory=1), found, rtol=1e-9, atol=1e-9)
        gradients = []
        for point in x:
            field.zero_grad()
            field(point[None]).sum().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in field.parameters()]))
        rows = torch.stack(gradients).double()
        torch.testing.assert_close(found, rows @ rows.T, rtol=1e-4, atol=1e-5)


def test_fields_without_a_kernel() -> None:
    several = build_field(FieldConfig(), coordinate_dims=2, channels=1, seed=0, copies=2)
    with pytest.raises(InputError, match="2 copies"):
        ntk.kernel(several, points())
    with pytest.raises(TrainingError, match="not finite"):
        ntk.spectrum(torch.full((2, 2), math.nan))


# ---- spectra ---------------------------------------------------------------------------------------------------------


def test_a_spectrum_that_is_known() -> None:
    values = torch.tensor([8.0, 4.0, 4.0, 0.08, 1e-7, 0.0])
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    found = ntk.spectrum(turn @ torch.diag(values.double()) @ turn.T)
    torch.testing.assert_close(found.values, values.double(), rtol=1e-7, atol=1e-14)
    assert found.effective_rank == pytest.approx(16.08**2 / (64 + 32 + 0.0064), rel=1e-6)
    assert found.fraction_above(1e-1) == 0.5
    assert found.fraction_above(5e-3) == pytest.approx(4 / 6)
    shares = found.energy((turn[:, :1] * 3 + turn[:, 3:4] * 4).double())
    torch.testing.assert_close(shares, torch.tensor([9, 0, 0, 16, 0, 0]).double() / 25, rtol=1e-6, atol=1e-9)
    assert found.energy_below(turn[:, :1] + 3 * turn[:, 3:4], 0.1) == pytest.approx(0.9)


def test_equal_eigenvalues_have_full_rank_and_a_power_law_its_power() -> None:
    assert ntk.spectrum(torch.eye(12)).effective_rank == pytest.approx(12)
    falling = torch.diag(torch.arange(1, 40).double() ** -2.5)
    assert ntk.spectrum(falling).decay == pytest.approx(2.5)
    nothing = ntk.spectrum(torch.zeros(4, 4))
    assert (nothing.effective_rank, nothing.fraction_above(1e-6)) == (0.0, 0.0)


def test_shares_of_energy_sum_to_one() -> None:
    residual = torch.randn(60, 2, dtype=torch.float64)
    found = ntk.spectrum(ntk.kernel(mlp(), points(60)))
    assert float(found.energy(residual).sum()) == pytest.approx(1, abs=1e-12)
    for size in ((60,), (6, 10), (3, 4, 5), (61,)):
        values = residual[:1].expand(math.prod(size), 2) * torch.rand(math.prod(size), 1)
        assert float(ntk.energy_by_frequency(values, size).sum()) == pytest.approx(1, abs=1e-12)
        power = ntk.power_by_frequency(values, size)
        torch.testing.assert_close(power.sum(0), values.square().sum(0))
    assert float(ntk.energy_by_frequency(torch.zeros(8, 1), (8,)).sum()) == 0
    with pytest.raises(InputError, match="3 x 3"):
        ntk.power_by_frequency(residual, (3, 3))


@pytest.mark.parametrize("count", [16, 17])
def test_frequencies_are_numpys(count: int) -> None:
    values = torch.randn(count, 1, dtype=torch.float64)
    wanted = np.abs(np.fft.rfft(values[:, 0].numpy())) ** 2 / count
    wanted[1 : (count + 1) // 2] *= 2  # k and -k
    np.testing.assert_allclose(ntk.power_by_frequency(values, (count,))[:, 0].numpy(), wanted, rtol=1e-10, atol=1e-12)


def test_a_wave_of_a_picture_lies_at_its_length() -> None:
    y, x = np.mgrid[0:16, 0:12]
    wave = torch.from_numpy(np.cos(2 * np.pi * (3 * y / 16 - 4 * x / 12) + 0.3)).reshape(-1, 1)
    shares = ntk.energy_by_frequency(wave, (16, 12))
    assert int(shares.argmax()) == 5
    assert float(shares[5]) == pytest.approx(1)
