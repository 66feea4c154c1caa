"""Kolmogorov-Arnold networks: layers against plain sums, derivatives, memory, sizes, beginnings, fits."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mwt.config_files import config_yaml, load_config
from mwt.errors import InputError, NotDefinedError
from mwt.fields import Field, FieldConfig, Frame, KANConfig, build_field, list_kan_bases, load_field, save_field
from mwt.fields import bounded as bounded_module
from mwt.fields import kan_bases as bases
from mwt.fields.kan import FixedFunctions, SmallNetworks, Wavelets

ALL = list_kan_bases()
PAIRED = [name for name in ALL if bases.BASES[name].curve is not None]
SMALL = {"width": 5, "hidden_layers": 1}


def build(dims: int = 2, channels: int = 3, *, seed: int = 0, copies: int | None = None, **options: Any) -> Field:
    config = FieldConfig(name="kan", kan=KANConfig(**options))
    return build_field(config, coordinate_dims=dims, channels=channels, seed=seed, copies=copies)


# ---- layers ------------------------------------------------------------------------------------------------------


def curve(name: str, u: np.ndarray) -> np.ndarray:
    """Which has tests of its own."""
    found = bases.BASES[name].curve
    assert found is not None
    return found(torch.from_numpy(u))[0].numpy()


def expected_layer(layer: Any, name: str, x: np.ndarray) -> np.ndarray:
    """The sum over pairs, one pair after the other: [P, out]."""
    own = {key: value.detach().numpy() for key, value in layer.named_parameters()}
    inputs = x.shape[1]
    outputs = own["bias"].shape[0] if isinstance(layer, SmallNetworks) else own["weight"].shape[1]
    y = np.zeros((len(x), outputs))
    for i, o in itertools.product(range(inputs), range(outputs)):
        column = x[:, i]
        if isinstance(layer, Wavelets):
            y[:, o] += own["weight"][i, o] * curve(name, (column - own["shift"][i, o]) / own["scale"][i, o])
        elif isinstance(layer, SmallNetworks):
            features = np.stack([column, np.sin(column), np.cos(column), np.sin(2 * column), np.cos(2 * column)], 1)
            units = slice(2 * o, 2 * o + 2)
            hidden = curve("fcn", features @ own["first"][i][:, units] + own["first_bias"][i, units])
            y[:, o] += hidden @ own["weight"][i, units]
        else:
            squash = np.tanh if bases.BASES[name].family == "polynomial" else np.asarray
            values = layer.functions(torch.from_numpy(squash(column)), *layer.arguments)
            scale = own["scale"][i, o] if "scale" in own else 1
            for g, value in enumerate(values):
                y[:, o] += scale * own["weight"].reshape(-1, inputs, outputs)[g, i, o] * np.asarray(value)
            if "base" in own:
                y[:, o] += own["base"][i, o] * curve("fcn", column)
    return y + own.get("bias", 0)


@pytest.mark.parametrize("name", ALL)
def test_a_layer_is_a_sum_over_pairs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_module, "CACHED", 30)  # several parts
    options: dict[str, Any] = {"size": 2, "frequencies": 2} if name == "fcn" else {}
    layer = build(dims=3, channels=4, basis=name, hidden_layers=0, width=4, norm="none", **options).double().last
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    x = np.random.default_rng(0).uniform(-1.2, 1.2, (7, 4))
    found = layer(torch.from_numpy(x), torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(found, expected_layer(layer, name, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_derivatives_of_the_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_module, "CACHED", 20)
    norm = "layer" if bases.BASES[name].norm == "batch" else "auto"
    field = build(channels=1, basis=name, norm=norm, width=3, hidden_layers=0).double()
    names = [key for key, _ in field.named_parameters()]
    coords = torch.tensor([[-0.63, 0.27], [0.41, 0.88], [0.15, -0.36]], dtype=torch.float64, requires_grad=True)

    def call(places: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(field, dict(zip(names, values, strict=True)), (places,))

    assert torch.autograd.gradcheck(call, (coords, *field.parameters()), fast_mode=True)
    if field.derivatives == 2:
        assert torch.autograd.gradgradcheck(call, (coords, *field.parameters()), fast_mode=True)


@pytest.mark.parametrize("name", ["morlet", "fcn"])
def test_parts_are_the_whole_in_every_order(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of a squared Laplacian, in small parts and by plain autograd; and through torch.func."""
    field = build(channels=1, basis=name, norm="none", **SMALL).double()
    coords = torch.rand(6, 2, dtype=torch.float64).requires_grad_()

    def gradients() -> tuple[Tensor, ...]:
        [first] = torch.autograd.grad(field(coords).sum(), coords, create_graph=True)
        laplacian = sum(
            torch.autograd.grad(first[:, axis].sum(), coords, create_graph=True)[0][:, axis] for axis in range(2)
        )
        return torch.autograd.grad(laplacian.square().sum(), list(field.parameters()), materialize_grads=True)  # type: ignore[union-attr]

    monkeypatch.setattr(bounded_module, "CACHED", 60)
    parts = gradients()
    jacobian = torch.func.vmap(torch.func.jacrev(lambda place: field(place[None])[0, 0]))(coords)
    torch.testing.assert_close(jacobian, torch.autograd.grad(field(coords).sum(), coords)[0])
    hessian = torch.func.vmap(torch.func.jacrev(torch.func.grad(lambda place: field(place[None])[0, 0])))
    found_hessian = hessian(coords)
    monkeypatch.setattr(
        "mwt.fields.kan.bounded", lambda function, points, shared, numbers: function(*points, *shared)[0]
    )
    for found, expected in zip(parts, gradients(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found_hessian, hessian(coords), rtol=1e-9, atol=1e-9)


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that any operation makes."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        views = {"expand", "view", "unsqueeze", "transpose", "select", "slice", "alias", "detach", "split", "unbind"}
        if func.overloadpacket.__name__ not in views:
            sizes = [one.numel() for one in tree_leaves(result) if isinstance(one, Tensor)]
            self.size = max([self.size, *sizes])
        return result


@pytest.mark.parametrize("name", ALL)
def test_memory_does_not_grow_with_pairs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_module, "CACHED", 2048)
    points, width = 300, 16
    field = build(basis=name, width=width, hidden_layers=1)
    coords = torch.rand(points, 2, requires_grad=True)
    with Largest() as seen:
        field(coords).square().mean().backward()
    weights = max(parameter.numel() for parameter in field.parameters())
    # features of pairs: (x, 1), or (x, sin x, cos x, 1)
    features = {"wavelet": 2, "network": 4}.get(bases.BASES[name].family, 1)
    assert points * width <= seen.size <= max(points * width * features, 2048, weights)


@pytest.mark.parametrize("name", ALL)
def test_copies_are_the_networks_alone(name: str) -> None:
    together = build(basis=name, copies=2, seed=5, **SMALL).double()
    config = FieldConfig(name="kan", kan=KANConfig(basis=name, **SMALL))
    alone = [build_field(config, coordinate_dims=2, channels=3, seed=5, position=i).double() for i in range(2)]
    own = torch.rand(2, 9, 2, dtype=torch.float64) * 2 - 1
    for coords in (own, own[0]):
        together.zero_grad()
        values = together(coords)
        values.square().sum().backward()
        many = dict(together.named_parameters())
        for i, field in enumerate(alone):
            field.zero_grad()
            expected = field(coords if coords.ndim == 2 else coords[i])
            torch.testing.assert_close(values[i], expected, rtol=0, atol=1e-12)
            expected.square().sum().backward()
            for key, parameter in field.named_parameters():
                assert torch.equal(many[key][i], parameter)
                torch.testing.assert_close(many[key].grad[i], parameter.grad, rtol=1e-9, atol=1e-9)
    assert together.num_parameters == alone[0].num_parameters
    assert not torch.equal(alone[0].first.weight, alone[1].first.weight)


# ---- sizes, beginnings, and the rest -----------------------------------------------------------------------------

PAIRS, WIDTH, LAYERS, VALUES = 16_704, 64, 6, 3  # 2 -> 64, four times 64 -> 64, -> 3
UNITS = 5 * WIDTH + VALUES  # outputs of all layers
POLY4, POLY3 = 84_166, 67_462
RELEASED = {
    **dict.fromkeys(("chebyshev1", "chebyshev2", "hermite", "gegenbauer", "legendre", "fibonacci"), POLY4),
    **dict.fromkeys(("jacobi", "laguerre", "bessel", "lucas"), POLY3),
    **{name: 67_462 for name in PAIRED if name != "fcn"},
    "bspline": 167_040,
    "fourier": 267_587,
    "rbf": 150_659,
    "grbf": 150_659 + 2 * (2 + 5 * WIDTH),
    "fcn_interpolation": 133_632,
    "fcn": 6 * PAIRS,
}
"""Numbers of parameters of the released code at INR-Bench's size."""


def difference(name: str) -> int:
    """What the documentation of the bases says is left out or added."""
    family = bases.BASES[name].family
    changes = {"grbf": -2 * 2, "fcn": -PAIRS + UNITS, "fibonacci": -PAIRS - 2 * VALUES}
    by_family = {"polynomial": -2 * VALUES, "wavelet": -PAIRS - 2 * VALUES + VALUES}
    return changes.get(name, by_family.get(family, 0))


@pytest.mark.parametrize("name", ALL)
def test_sizes_of_inr_bench(name: str) -> None:
    field = build(basis=name)
    assert PAIRS == 2 * 64 + 4 * 64 * 64 + 64 * 3
    assert field.num_parameters == RELEASED[name] + difference(name)
    unused = dict(field.named_parameters())
    field(torch.rand(8, 2) * 2 - 1).square().sum().backward()
    assert [key for key, parameter in unused.items() if parameter.grad is None or not parameter.grad.any()] == []


def test_further_sizes() -> None:
    assert build(basis="fourier", size=5).num_parameters == 167_363
    assert build(basis="legendre", size=3).num_parameters == POLY3 - 2 * VALUES
    assert build(basis="bspline", size=3, order=2).num_parameters == PAIRS * (5 + 2)
    assert build(basis="chebyshev1", norm="none").num_parameters == PAIRS * 5


@pytest.mark.parametrize("name", ALL)
def test_beginnings(name: str) -> None:
    """What enters every layer is finite, and neither vanishes nor explodes."""
    field = build(basis=name)
    seen: list[Tensor] = []
    for layer in [*field.hidden, field.last]:  # type: ignore[operator]
        layer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1].detach()))
    values = field(torch.rand(256, 2) * 2 - 1)
    assert values.isfinite().all()
    assert len(seen) == 5
    for entering in seen:
        assert entering.isfinite().all()
        assert 1e-3 < entering.std() < 30


def test_splines_begin_near_small_noise() -> None:
    layer = build(basis="bspline").hidden[0]  # type: ignore[index]
    assert isinstance(layer, FixedFunctions)
    knots = torch.linspace(-1, 1, 6)
    values = torch.stack(layer.functions(knots, *layer.arguments))  # type: ignore[arg-type]
    curves = torch.einsum("gp,gio->pio", values, layer.weight.detach().unflatten(0, (8, 64)))
    assert 0.0099 < curves.abs().max() <= 0.0100001  # U(+-0.05 / 5)
    assert curves.std().item() == pytest.approx(0.01 / 3**0.5, rel=0.02)


@pytest.mark.parametrize("name", ALL)
def test_a_fit(name: str) -> None:
    torch.manual_seed(0)
    field = build(channels=1, basis=name, width=8, hidden_layers=1)
    coords = torch.rand(64, 2) * 2 - 1
    target = (3 * coords[:, :1]).sin() * coords[:, 1:]
    optimizer = torch.optim.Adam(field.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (field(coords) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * min(losses[0], target.var().item())


@pytest.mark.parametrize("name", ["bspline", "legendre", "dog", "fcn"])
def test_on_disk(name: str, tmp_path: Path) -> None:
    field = build(basis=name, **SMALL)
    field(torch.rand(50, 2))  # batch normalisation has seen something
    frame = Frame(kind="image", axes=("y", "x"), coordinate_range=((-1.0, 1.0),) * 2)
    save_field(field, frame, tmp_path / "field")
    loaded = load_field(tmp_path / "field")[0]
    coords = torch.rand(9, 2)
    assert torch.equal(loaded.eval()(coords), field.eval()(coords))


@pytest.mark.parametrize("copies", [None, 2])
def test_what_muon_trains(copies: int | None) -> None:
    lead = () if copies is None else (copies,)
    spline = build(basis="bspline", copies=copies, width=4, hidden_layers=2)
    found = {name: tuple(matrix.shape) for name, matrix, layout in spline.muon_parameters() if layout == "in_out"}
    parts = (("weight", (32, 4)), ("base", (4, 4)))
    assert found == {f"hidden.{i}.{part}": (*lead, *shape) for i in range(2) for part, shape in parts}
    assert all(dict(spline.named_parameters())[name] is matrix for name, matrix, _ in spline.muon_parameters())
    assert [name for name, _, _ in build(basis="dog", copies=copies, **SMALL).muon_parameters()] == ["hidden.0.weight"]
    assert build(basis="fcn", copies=copies, **SMALL).muon_parameters() == []


@pytest.mark.parametrize("name", ["bspline", "fourier", "legendre"])
def test_in_half_precision(name: str) -> None:
    """Each layer of waves multiplies an error by about 5 at the beginning: these are computed in full precision."""
    field, coords = build(basis=name), torch.rand(500, 2) * 2 - 1
    with torch.no_grad():
        expected = field(coords)
        with torch.autocast("cpu", torch.bfloat16):
            found = field(coords)
    assert (found.dtype == torch.float32) == (name == "fourier")
    assert float((found - expected).std() / expected.std()) < 0.1


def test_orders_of_derivatives() -> None:
    assert {name for name in ALL if build(basis=name, norm="layer", **SMALL).derivatives < 2} == {
        "fcn_interpolation",
        "meyer",
    }
    assert build(basis="bspline", order=1, **SMALL).derivatives == 1
    with pytest.raises(NotDefinedError, match=r"order 1 .*kan\.norm=layer"):
        build(basis="dog", **SMALL).require_derivatives(1, "task=poisson")


def test_configuration(tmp_path: Path) -> None:
    config = load_config(FieldConfig, None, ["name=kan", "kan.basis=rbf", "kan.grid_range=[-1,2]", "kan.size=5"])
    assert config.kan == KANConfig(basis="rbf", grid_range=(-1.0, 2.0), size=5)
    (tmp_path / "field.yaml").write_text(config_yaml(config))
    assert load_config(FieldConfig, tmp_path / "field.yaml") == config
    assert replace(config.kan, grid_range=None).grid_range is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"basis": "fourrier"}, "kan.basis is 'fourrier', which is not known; did you mean 'fourier'"),
        ({"basis": "dog", "size": 3}, "kan.size is set, but kan.basis is dog"),
        ({"basis": "fourier", "grid_range": (0.0, 1.0)}, "kan.grid_range is set, but kan.basis is fourier"),
        ({"basis": "rbf", "order": 2}, "kan.order is set"),
        ({"basis": "rbf", "frequencies": 2}, "kan.frequencies is set"),
        ({"basis": "rbf", "size": 1}, "rbf needs at least 2 centres"),
        ({"basis": "fibonacci", "size": 1}, "fibonacci needs at least 2"),
        ({"grid_range": (1.0, 0.0)}, "kan.grid_range must be two numbers"),
        ({"width": 1}, "kan.width is 1; it must be at least 2"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(**options)
