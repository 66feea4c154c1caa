"""Tiles and levels of experts against plain NumPy, point by point; published numbers of parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mwt.config import InnerLoopConfig
from mwt.errors import InputError
from mwt.fields import ExpertsConfig, Field, FieldConfig, TiledConfig, WithOffsets, build_field, load_field, save_field
from mwt.fields.frame import Frame
from mwt.fields.packing import pack_tiles
from mwt.inner_loop import fit
from mwt.meta_sgd import MetaSGD
from mwt.structs import Observations


def tiled(dims: int, *, channels: int = 2, copies: int | None = None, **settings: Any) -> Field:
    config = FieldConfig(name="tiled", tiled=TiledConfig(**{"width": 5, "frequencies": 2, **settings}))
    return build_field(config, coordinate_dims=dims, channels=channels, seed=3, copies=copies).double()


def experts(dims: int, *, channels: int = 2, copies: int | None = None, **settings: Any) -> Field:
    config = FieldConfig(name="experts", experts=ExpertsConfig(**{"width": 5, "frequencies": 2, **settings}))
    return build_field(config, coordinate_dims=dims, channels=channels, seed=3, copies=copies).double()


def places(dims: int, count: int = 60) -> Tensor:
    """Points in the range and a little beyond it, and all its corners."""
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * dims).reshape(-1, dims)
    return torch.cat([torch.rand(count, dims) * 2.2 - 1.1, corners]).double()


# ---- NumPy ---------------------------------------------------------------------------------------------------------


def encoded(x: np.ndarray, frequencies: int) -> np.ndarray:
    angles = [2**i * math.pi * value for i in range(frequencies) for value in x]
    return np.array([*x, *[wave for angle in angles for wave in (math.sin(angle), math.cos(angle))]])


def row_major(cell: list[int], cells: list[int]) -> int:
    number = 0
    for own, count in zip(cell, cells, strict=True):
        number = number * count + own
    return number


def cell_of(value: float, cells: int) -> int:
    return min(max(math.floor((value + 1) / 2 * cells), 0), cells - 1)


def tiled_values(field: Field, x: np.ndarray, cells: list[int], settings: TiledConfig) -> np.ndarray:
    cell = [cell_of(value, count) for value, count in zip(x, cells, strict=True)]
    tile = row_major(cell, cells)
    if settings.coordinates == "tile":
        borders = [(-1 + 2 * own / n, -1 + 2 * (own + 1) / n) for own, n in zip(cell, cells, strict=True)]
        x = np.array([2 * (value - low) / (high - low) - 1 for value, (low, high) in zip(x, borders, strict=True)])
    hidden = encoded(x, settings.frequencies)
    for number, layer in enumerate(field.layers):
        hidden = hidden if number == 0 else np.sin(settings.omega * hidden)
        hidden = hidden @ layer.weight.detach().numpy()[tile] + layer.bias.detach().numpy()[tile, 0]
    return hidden


def experts_values(field: Field, x: np.ndarray, bases: list[list[int]], settings: ExpertsConfig) -> np.ndarray:
    hidden = encoded(x, settings.frequencies)
    for level, (layer, bias) in enumerate(zip(field.matrices, field.biases, strict=True)):
        own = [axis[level] for axis in bases]
        cell = [
            cell_of(value, math.prod(axis[: level + 1])) % axis[level] for value, axis in zip(x, bases, strict=True)
        ]
        hidden = hidden @ layer.weight.detach().numpy()[row_major(cell, own)] + bias.detach().numpy()
        if settings.activation == "sine":
            hidden = np.sin(settings.omega * hidden)
        else:
            hidden = np.where(hidden > 0, hidden, 0.2 * hidden)
    return hidden @ field.last.weight.detach().numpy() + field.last.bias.detach().numpy()


@pytest.mark.parametrize("cells", [[6], [3, 5], [2, 3, 4]])
@pytest.mark.parametrize("coordinates", ["tile", "frame"])
def test_tiles_are_numpys_point_by_point(cells: list[int], coordinates: Any) -> None:
    field, coords = tiled(len(cells), tiles=tuple(cells), coordinates=coordinates), places(len(cells))
    expected = [tiled_values(field, x, cells, field.config.tiled) for x in coords.numpy()]
    np.testing.assert_allclose(field(coords).detach().numpy(), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("bases", [[[3, 4, 2]], [[2, 3], [4, 5]], [[2, 3], [3, 2], [1, 4]]])
@pytest.mark.parametrize("activation", ["leaky_relu", "sine"])
def test_experts_are_numpys_point_by_point(bases: list[list[int]], activation: Any) -> None:
    dims = len(bases)
    field, coords = experts(dims, bases=tuple(map(tuple, bases)), activation=activation), places(dims)
    expected = [experts_values(field, x, bases, field.config.experts) for x in coords.numpy()]
    np.testing.assert_allclose(field(coords).detach().numpy(), expected, rtol=0, atol=1e-11)


# ---- published sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "dims", "channels", "published"),
    [
        (FieldConfig(name="tiled", tiled=TiledConfig(tiles=(16,), width=16, hidden_layers=1)), 2, 1, 250_112),
        (FieldConfig(name="tiled", tiled=TiledConfig(tiles=(16,), width=32, hidden_layers=4)), 2, 3, 1_458_944),
        (FieldConfig(name="tiled", tiled=TiledConfig(tiles=(4,), width=80, hidden_layers=1)), 1, 1, 33_284),
        (FieldConfig(name="experts", experts=ExpertsConfig(bases=((8, 8, 8),), width=24)), 2, 1, 126_049),
    ],
    ids=["KiloNeRF: cameraman", "KiloNeRF: Pluto", "KiloNeRF: audio", "levels of experts: cameraman"],
)
def test_numbers_of_parameters(config: FieldConfig, dims: int, channels: int, published: int) -> None:
    assert build_field(config, coordinate_dims=dims, channels=channels, seed=0).num_parameters == published


# ---- tiles of samples ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("endpoint", [True, False])
def test_the_samples_of_a_grid_are_shared_out_evenly(endpoint: bool) -> None:
    """A picture that is not square: sample i of n belongs to tile floor(i T / n), whether -1 and 1 are both samples."""
    size, cells = (48, 90), (6, 9)
    frame = Frame(kind="image", axes=("y", "x"), coordinate_range=((-1.0, 1.0),) * 2, size=size, endpoint=endpoint)
    field = tiled(2, channels=1, tiles=cells, frequencies=0, hidden_layers=0).float()
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.zero_()
        field.layers[-1].bias.copy_(torch.arange(54.0).view(54, 1, 1))
    shown = field(frame.grid()).detach().view(size)
    expected = np.arange(48)[:, None] // 8 * 9 + np.arange(90) // 10
    np.testing.assert_array_equal(shown.numpy(), expected)


def test_levels_repeat_the_pattern_of_matrices() -> None:
    """Each pixel of 8 x 12 has a matrix of its own combination, the last level's coming again in each cell above."""
    field = experts(2, bases=((2, 4), (3, 4)))
    coords = torch.cartesian_prod(torch.linspace(0, 1, 8), torch.linspace(0, 1, 12))
    first, second = (tile.view(8, 12).numpy() for tile in field.tiles(coords))
    rows, columns = np.arange(8)[:, None], np.arange(12)
    np.testing.assert_array_equal(first, rows // 4 * 3 + columns // 4)
    np.testing.assert_array_equal(second, rows % 4 * 4 + columns % 4)


@pytest.mark.parametrize("lopsided", [False, True])
def test_blocks_hold_every_point_once_and_are_few(lopsided: bool) -> None:
    tiles, points = 50, 3000
    tile = torch.randint(0, tiles, (points,), generator=torch.Generator().manual_seed(0))
    if lopsided:
        tile[: points - 40] = 7
    packing, values = pack_tiles(tile, tiles), torch.randn(points, 3)
    blocks = packing.pack(values)
    assert torch.equal(packing.unpack(blocks), values)
    assert len(blocks) <= 2 * len(tile.unique())
    assert blocks.shape[0] * blocks.shape[1] <= 2 * points
    owners = packing.owner.repeat_interleave(packing.capacity)
    assert torch.equal(owners[packing.place], tile)


def test_no_points_at_all() -> None:
    for field in (tiled(2), experts(2, bases=((2, 2),))):
        assert field(torch.zeros(0, 2, dtype=torch.float64)).shape == (0, 2)


# ---- what every field has ------------------------------------------------------------------------------------------

MAKERS: list[tuple[Callable[..., Field], dict[str, Any]]] = [
    (tiled, {"tiles": (2, 3)}),
    (experts, {"bases": ((2, 2), (3, 2))}),
    (experts, {"bases": ((2, 2), (3, 2)), "activation": "sine", "omega": 3.0}),
]


@pytest.mark.parametrize(("make", "settings"), MAKERS)
def test_copies_are_single_fields_on_shared_and_on_own_points(make: Callable[..., Field], settings: Any) -> None:
    several, coords = make(2, copies=3, **settings), torch.stack([places(2, 20) for _ in range(3)])
    shared, own = several(coords[0]), several(coords)
    for i in range(3):
        single = build_field(several.config, coordinate_dims=2, channels=2, seed=3, position=i).double()
        torch.testing.assert_close(shared[i], single(coords[0]), rtol=0, atol=1e-12)
        torch.testing.assert_close(own[i], single(coords[i]), rtol=0, atol=1e-12)
        torch.testing.assert_close(single(coords)[i], single(coords[i]), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("maker", "adapted"),
    [(0, ""), (0, "layers.1"), (0, "layers.0.bias"), (1, ""), (1, "matrices.1"), (1, "biases"), (1, "last"), (2, "")],
)
def test_offsets_of_all_parameters_or_of_some(maker: int, adapted: str) -> None:
    """Offsets to some parameters only: the others are shared by all signals."""
    make, settings = MAKERS[maker]
    field = make(2, **settings)
    wrapped, coords = WithOffsets(field, (adapted,)), places(2, 12)
    offsets = 0.1 * torch.randn(2, wrapped.adapted_size, dtype=torch.float64)
    found = wrapped(offsets, coords)
    own = dict(field.named_parameters())
    for i in range(2):
        before = {name: value.detach().clone() for name, value in own.items()}
        with torch.no_grad():
            start = 0
            for name in wrapped.names:
                own[name] += offsets[i, start : start + own[name].numel()].view_as(own[name])
                start += own[name].numel()
            torch.testing.assert_close(found[i].detach(), field(coords), rtol=0, atol=1e-12)
            for name, value in before.items():
                own[name].copy_(value)


@pytest.mark.parametrize("subsets", [False, True])
@pytest.mark.parametrize(("make", "settings"), MAKERS)
def test_in_the_inner_loop(make: Callable[..., Field], settings: Any, subsets: bool) -> None:
    """The two engines for any field agree; with subsets, signals differ in the tiles that their points lie in."""
    field, coords = WithOffsets(make(2, **settings)), places(2, 28)
    values = torch.rand(2, 32, 2, dtype=torch.float64)
    index = torch.stack([torch.randperm(32)[:27].view(3, 9) for _ in range(2)]) if subsets else None
    seen = Observations(coords=coords, values=values, index=index)
    found = []
    for engine in ("func", "higher"):
        options = InnerLoopConfig(steps=2, engine=engine)
        torch.manual_seed(0)
        found.append(fit(field, MetaSGD(options, field.adapted_size).double(), seen, steps=2, options=options))
    torch.testing.assert_close(found[0].offsets, found[1].offsets, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found[0].prediction, found[1].prediction, rtol=1e-9, atol=1e-12)
    assert found[0].offsets.abs().max() > 1e-6


@pytest.mark.parametrize(("make", "settings"), MAKERS)
def test_gradients_within_a_tile(make: Callable[..., Field], settings: Any) -> None:
    field = make(2, **{"omega": 3.0, "width": 3, **settings})
    coords = (torch.rand(3, 2, dtype=torch.float64) * 0.2 + torch.tensor([0.1, -0.2])).requires_grad_()
    assert torch.autograd.gradcheck(field, (coords,))
    if field.derivatives == 2:
        assert torch.autograd.gradgradcheck(field, (coords,), fast_mode=True)
    weight = next(field.parameters())

    def by_weight(values: Tensor) -> Tensor:
        return torch.func.functional_call(field, {next(iter(dict(field.named_parameters()))): values}, (coords,))

    assert torch.autograd.gradcheck(by_weight, (weight.detach().clone().requires_grad_(),), fast_mode=True)


def test_order_of_derivatives() -> None:
    orders = [make(2, **settings).derivatives for make, settings in MAKERS]
    assert orders == [2, 1, 2]


def test_initial_values() -> None:
    kilo = build_field(FieldConfig(name="tiled"), coordinate_dims=2, channels=1, seed=0)
    for layer, inputs in zip(kilo.layers, (42, 16, 16), strict=True):  # the first one too is a hidden layer's
        assert float(layer.weight.detach().abs().max()) == pytest.approx(math.sqrt(6 / inputs) / 30, rel=1e-2)
        assert float(layer.bias.detach().abs().max()) == pytest.approx(inputs**-0.5, rel=1e-2)
    levels = build_field(
        FieldConfig(name="experts", experts=ExpertsConfig(bases=((8, 8),))), coordinate_dims=2, channels=1, seed=0
    )
    for layer, inputs in zip(levels.matrices, (34, 24), strict=True):
        gain = torch.nn.init.calculate_gain("leaky_relu", 0.2)
        assert float(layer.weight.detach().std()) == pytest.approx(gain / math.sqrt(inputs), rel=2e-2)


@pytest.mark.parametrize(("make", "settings"), MAKERS)
def test_saved_and_loaded(make: Callable[..., Field], settings: Any, tmp_path: Any) -> None:
    field, coords = make(2, **settings).float(), places(2).float()
    frame = Frame(kind="image", axes=("y", "x"), coordinate_range=((-1.0, 1.0),) * 2)
    save_field(field, frame, tmp_path)
    loaded, _ = load_field(tmp_path)
    assert loaded.config == field.config
    assert torch.equal(loaded(coords), field(coords))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: tiled(2, tiles=(2, 3, 4)), "tiled.tiles has 3 numbers"),
        (lambda: experts(1, bases=((2, 2), (3, 2))), "experts.bases has 2 numbers"),
        (lambda: ExpertsConfig(bases=((2, 2), (3,))), "experts.bases must be lists of equal length"),
        (lambda: ExpertsConfig(bases=((2, 0),)), "experts.bases and experts.width must be at least 1"),
        (lambda: TiledConfig(tiles=(0,)), "tiled.tiles and tiled.width must be at least 1"),
        (lambda: TiledConfig(coordinate_range=(1.0, 1.0)), "tiled.coordinate_range must rise"),
    ],
)
def test_refusals(build: Callable[[], Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        build()
