"""Multiply-adds: the formulas against torch's counter, and the published tables to the digit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mwt import cost
from mwt.fields import (
    ActivationConfig,
    EncodingConfig,
    ExpertsConfig,
    Field,
    FieldConfig,
    HashGridConfig,
    InterpolatedGridConfig,
    KANConfig,
    MFNConfig,
    MLPConfig,
    TiledConfig,
    build_field,
)

VIDEO = (
    [5, 1, 1, 5, 1, 1, 3, 1, 1, 2],
    [5, 1, 3, 1, 3, 1, 3, 1, 2, 1],
    [5, 3, 2, 2, 1, 2, 1, 2, 1, 2],
)
# Bases, width, channels; parameters, MACs without and with additions, and the SIREN of equal depth: parameters, MACs.
TABLE: dict[str, tuple[Any, int, int, int, float, float, int, int]] = {
    "cameraman 3": ([[8, 8, 8]] * 2, 256, 1, 67_841, 1280.4, 1289.5, 66_817, 66_304),
    "cameraman 4": ([[4, 4, 4, 8]] * 2, 256, 1, 134_145, 1344.2, 1353.8, 132_609, 131_840),
    "cameraman 5": ([[8, 2, 2, 2, 8]] * 2, 256, 1, 200_449, 1600.3, 1611.9, 198_401, 197_376),
    "cameraman 6": ([[4, 2, 2, 2, 2, 8]] * 2, 256, 1, 266_753, 1616.2, 1627.8, 264_193, 262_912),
    "cameraman 7": ([[2, 2, 2, 2, 2, 2, 8]] * 2, 256, 1, 333_057, 1620.2, 1631.8, 329_985, 328_448),
    "Kodak": ([[4, 4, 4, 8], [4, 4, 6, 8]], 256, 3, 134_659, 1834.8, 1846.2, 133_123, 132_352),
    "audio": ([[10, 10, 16, 20]], 128, 1, 33_793, 998.6, 1013.3, 33_409, 33_024),
    "Pluto": ([[4, 4, 4, 4, 4, 8]] * 2, 512, 3, 1_058_819, 5905.0, 5925.1, 1_053_699, 1_051_136),
    "Pluto, big": ([[4, 4, 4, 4, 2, 16]] * 2, 1024, 3, 4_214_787, 8260.0, 8273.1, 4_204_547, 4_199_424),
    "video": (VIDEO, 512, 3, 2_118_659, 119_293.5, 119_756.5, 2_104_835, 2_100_224),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_published_table_to_the_digit(name: str) -> None:
    bases, width, channels, parameters, macs, with_adds, siren_parameters, siren_macs = TABLE[name]
    dims, layers = len(bases), len(bases[0])
    assert cost.asmr_parameters(bases, width, channels) == parameters
    assert round(cost.asmr_macs(bases, width, channels), 1) == macs
    assert round(cost.asmr_macs(bases, width, channels, with_adds=True), 1) == with_adds
    assert cost.siren_parameters(dims, width, layers, channels) == siren_parameters
    assert cost.siren_macs(dims, width, layers, channels) == siren_macs
    siren = MLPConfig(width=width, hidden_layers=layers - 2)
    field = build_field(FieldConfig(mlp=siren), coordinate_dims=dims, channels=channels, seed=0)
    assert (field.num_parameters, field.macs_per_point()) == (siren_parameters, siren_macs)


@pytest.mark.parametrize("bases", [[[2, 3, 4]], [[2, 3, 2], [3, 1, 4]]])
def test_asmr_by_hand_and_by_angle_addition(bases: Any) -> None:
    """Both ways of evaluation written down with matrices of these sizes; torch counts, and the values agree."""
    torch.manual_seed(0)
    dims, width, channels = len(bases), 5, 2
    samples, cells, positions = cost.cells(bases)[-1], cost.cells(bases), cost.positions(bases)
    weights = [torch.randn(*size, dtype=torch.float64) for size in cost.siren_sizes(dims, width, 3, channels)]
    modulators = [torch.randn(dims, width, dtype=torch.float64) for _ in range(2)]
    digits = [torch.randn(count, dims, dtype=torch.float64) for count in positions]
    sines = [0]

    def sine(angles: torch.Tensor) -> torch.Tensor:
        sines[0] += angles.numel()
        return angles.sin()

    def angles(level: int, before: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return before @ weights[level], digits[level + 1] @ modulators[level]

    def up_to_the_last() -> tuple[torch.Tensor, torch.Tensor]:
        cell, position = angles(0, digits[0])
        shared = sine(cell[:, None] + position).reshape(cells[1], width)
        return angles(1, shared)

    def plain() -> torch.Tensor:
        cell, position = up_to_the_last()
        return sine(cell[:, None] + position).reshape(samples, width) @ weights[2]

    def by_angles() -> torch.Tensor:
        cell, position = up_to_the_last()
        waves = torch.cat([sine(position + math.pi / 2), sine(position)], dim=1)
        own = sine(cell), sine(cell + math.pi / 2)
        products = [torch.cat([own[0] * head, own[1] * head], dim=1) @ waves.T for head in weights[2].T]
        return torch.stack([product.reshape(-1) for product in products], dim=1)

    torch.testing.assert_close(plain(), by_angles(), rtol=0, atol=1e-12)
    for run, macs, angle_addition in (
        (plain, cost.asmr_macs(bases, width, channels), False),
        (by_angles, cost.asmr_angle_macs(bases, width, channels), True),
    ):
        sines[0] = 0
        assert cost.counted_macs(run) / samples == pytest.approx(macs, rel=1e-12)
        expected = cost.asmr_sines(bases, width, angle_addition=angle_addition)
        assert sines[0] / samples == pytest.approx(expected, rel=1e-12)


def mlp(activation: str = "sine", encoding: str = "identity", **settings: Any) -> FieldConfig:
    return FieldConfig(
        mlp=MLPConfig(
            width=12, activation=ActivationConfig(name=activation), encoding=EncodingConfig(name=encoding), **settings
        )
    )


# Fields for which torch's counter sees all that the formula counts.
ALIKE = {
    "siren": mlp(),
    "no biases, no hidden layer": mlp(bias=False, hidden_layers=0),
    "nerf": mlp("relu", "nerf"),
    "fourier": mlp("relu", "fourier"),
    "fourier_kan": mlp("sine", "fourier_kan"),
    "mfn": FieldConfig(name="mfn", mfn=MFNConfig(width=12)),
    "fourier mfn": FieldConfig(name="mfn", mfn=MFNConfig(width=12, filter="fourier")),
    "tiled": FieldConfig(name="tiled", tiled=TiledConfig(tiles=(2,), width=12, hidden_layers=2)),
    "experts": FieldConfig(name="experts", experts=ExpertsConfig(bases=((2, 2, 2),))),
}


@pytest.mark.parametrize("name", ALIKE)
@pytest.mark.parametrize("copies", [None, 2])
def test_formulas_are_torchs_count(name: str, copies: int | None) -> None:
    field = build_field(ALIKE[name], coordinate_dims=2, channels=3, seed=0, copies=copies)
    coords = torch.cartesian_prod(*[torch.linspace(-1, 1, 8)] * 2)  # a whole grid: no tile has more points than others
    counted = cost.counted_macs(lambda: field(coords)) / 64 / (copies or 1)
    assert field.macs_per_point() == counted > 0


@pytest.mark.parametrize(
    ("basis", "each"),
    [("bspline", 5 + 3 + 1), ("fourier", 2 * 8), ("rbf", 8 + 1), ("legendre", 4), ("dog", 2), ("fcn", 4)],
)
def test_kolmogorov_arnold_networks_count_pairs(basis: str, each: int) -> None:
    """For a pair: its coefficients but of constants, and SiLU's; a wavelet's u and weight; fcn's three features and
    weight. In parts or not."""
    config = FieldConfig(name="kan", kan=KANConfig(basis=basis, width=8, hidden_layers=1))
    field = build_field(config, coordinate_dims=2, channels=3, seed=0)
    assert field.macs_per_point() == each * (2 * 8 + 8 * 8 + 8 * 3)


def test_complex_products_are_four_real_ones() -> None:
    field = build_field(mlp("wire", hidden_layers=2), coordinate_dims=2, channels=3, seed=0)
    units = int(12 / math.sqrt(2))
    assert field.macs_per_point() == 2 * units + 2 * 4 * units**2 + 2 * units * 3
    torchs = 2 * units + 2 * units**2 + units * 3  # one for each complex product
    assert cost.counted_macs(lambda: field(torch.zeros(1, 2))) == torchs


@pytest.mark.parametrize(
    ("dims", "kind", "taps"), [(1, "linear", 2), (2, "linear", 4), (2, "cubic", 16), (3, "smoothstep", 8)]
)
def test_grids_count_vertices(dims: int, kind: Any, taps: int) -> None:
    grid = FieldConfig(name="grid", grid=InterpolatedGridConfig(size=(5,), interpolation=kind))
    assert build_field(grid, coordinate_dims=dims, channels=3, seed=0).macs_per_point() == taps * 3
    if kind == "cubic":
        return
    hashed = HashGridConfig(levels=3, features=2, base_resolution=(2,), finest_resolution=(8,), interpolation=kind)
    field = build_field(FieldConfig(name="hash_grid", hash_grid=hashed), coordinate_dims=dims, channels=3, seed=0)
    coords = torch.zeros(1, dims)
    assert field.macs_per_point() == 3 * 2 * taps + cost.counted_macs(lambda: field(coords))


@pytest.mark.parametrize(
    ("config", "dims", "channels", "published"),
    [
        # what the paper has less a bias for each output, which it counts: 977, 2,065, 6,467
        (FieldConfig(name="tiled", tiled=TiledConfig(width=16)), 2, 1, 977 - 33),
        (FieldConfig(name="experts"), 2, 1, 2065 - 73),
        (FieldConfig(name="mfn", mfn=MFNConfig(filter="fourier", hidden_layers=2)), 2, 3, 133_376),
    ],
    ids=["KiloNeRF", "levels of experts", "MFN"],
)
def test_published_counts(config: FieldConfig, dims: int, channels: int, published: int) -> None:
    assert build_field(config, coordinate_dims=dims, channels=channels, seed=0).macs_per_point() == published


def test_a_field_without_a_formula_is_counted() -> None:
    class Bilinear(Field):
        def __init__(self) -> None:
            super().__init__(coordinate_dims=2, channels=3, copies=None, derivatives=2)
            self.matrix = torch.nn.Parameter(torch.zeros(2, 3))

        def values(self, coords: torch.Tensor) -> torch.Tensor:
            return coords @ self.matrix + (coords**2) @ self.matrix

    assert Bilinear().macs_per_point() == 2 * 2 * 3


def test_latency_is_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 100.0, 200.0, 201.0, 300.0, 305.0, 400.0, 402.0])  # the first call takes 100, and does not count
    monkeypatch.setattr(cost.time, "perf_counter", lambda: next(clock))
    calls = []
    assert cost.latency(lambda: calls.append(0), torch.device("cpu"), runs=3) == 2.0
    assert len(calls) == 4
