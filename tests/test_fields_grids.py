"""Hash grids and plain grids against SciPy, torch's grid_sample and closed forms; total variation against NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.interpolate import RegularGridInterpolator
from torch import Tensor

from mwt.errors import InputError
from mwt.fields import Field, FieldConfig, HashGridConfig, InterpolatedGridConfig, build_field, total_variation
from mwt.fields.hash_grid import level_cells


def grid(sizes: tuple[int, ...], *, channels: int = 2, dims: int | None = None, **settings: Any) -> Field:
    config = FieldConfig(name="grid", grid=InterpolatedGridConfig(size=sizes, **settings))
    field = build_field(config, coordinate_dims=dims or len(sizes), channels=channels, seed=0).double()
    with torch.no_grad():
        field.vertices.copy_(torch.randn(field.vertices.shape, dtype=torch.float64))
    return field


def hashed(dims: int, *, channels: int = 1, **settings: Any) -> Field:
    """With entries of a size that matters."""
    config = FieldConfig(name="hash_grid", hash_grid=HashGridConfig(**settings))
    field = build_field(config, coordinate_dims=dims, channels=channels, seed=0).double()
    with torch.no_grad():
        field.table.copy_(torch.randn(field.table.shape, dtype=torch.float64))
    return field


def places(dims: int, count: int = 40, *, beyond: bool = False) -> Tensor:
    return (torch.rand(count, dims, dtype=torch.float64) * 2 - 1) * (1.3 if beyond else 1.0)


# ---- plain grids -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(7,), (5, 8), (4, 6, 3)])
def test_linear_interpolation_is_scipys(sizes: tuple[int, ...]) -> None:
    field = grid(sizes)
    axes = [np.linspace(-1, 1, n) for n in sizes]
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * len(sizes)).reshape(
        -1, len(sizes)
    )
    coords = torch.cat([places(len(sizes)), corners])
    expected = RegularGridInterpolator(axes, field.vertices.detach().numpy())(coords.numpy())
    np.testing.assert_allclose(field(coords).detach().numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kind", "torchs"), [("linear", "bilinear"), ("cubic", "bicubic")])
def test_values_and_first_gradients_are_grid_samples(kind: Any, torchs: str) -> None:
    field, coords = grid((6, 9), interpolation=kind), places(2, beyond=True).requires_grad_()
    pixels = field.vertices.detach().permute(2, 0, 1)[None]
    expected = F.grid_sample(
        pixels, coords.flip(-1)[None, None], mode=torchs, padding_mode="border", align_corners=True
    )[0, :, 0].T
    # Beyond the border grid_sample moves the taps, and not the place, of its bicubic form; linear is the same there.
    inside = (coords.abs() <= 1).all(-1) if kind == "cubic" else torch.ones(len(coords), dtype=torch.bool)
    torch.testing.assert_close(field(coords)[inside], expected[inside], rtol=0, atol=1e-12)
    (ours,) = torch.autograd.grad(field(coords)[inside].square().sum(), coords)
    (theirs,) = torch.autograd.grad(expected[inside].square().sum(), coords)
    torch.testing.assert_close(ours[inside], theirs[inside], rtol=0, atol=1e-10)


def test_constant_beyond_the_border() -> None:
    field = grid((5, 6), interpolation="cubic")
    inside, beyond = torch.tensor([[1.0, 0.3], [-1.0, -1.0]]), torch.tensor([[1.7, 0.3], [-4.0, -1.2]])
    assert torch.equal(field(inside.double()), field(beyond.double()))


@pytest.mark.parametrize("sizes", [(6,), (4, 5), (3, 4, 3)])
@pytest.mark.parametrize("kind", ["linear", "smoothstep", "cubic"])
def test_gradients_of_grids(sizes: tuple[int, ...], kind: Any) -> None:
    field = grid(sizes, channels=1, interpolation=kind)
    assert field.derivatives == (1 if kind == "linear" else 2)

    def call(coords: Tensor, vertices: Tensor) -> Tensor:
        return torch.func.functional_call(field, {"vertices": vertices}, (coords,))

    given = places(len(sizes), 3).requires_grad_(), field.vertices
    assert torch.autograd.gradcheck(call, given)
    assert torch.autograd.gradgradcheck(call, given)


def test_a_fresh_grid() -> None:
    config = FieldConfig(name="grid", grid=InterpolatedGridConfig(size=(4, 5), init=0.25))
    field = build_field(config, coordinate_dims=2, channels=3, seed=0)
    assert field.num_parameters == 4 * 5 * 3
    torch.testing.assert_close(field(places(2).float()), torch.full((40, 3), 0.25))


@pytest.mark.parametrize("shape", [(7, 1), (4, 6, 1), (4, 6, 3), (3, 4, 5, 2)])
def test_total_variation_against_numpy(shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).normal(size=shape)
    dims = len(shape) - 1
    inner = tuple(slice(0, n - 1) for n in shape[:-1])
    squares = np.zeros([n - 1 for n in shape[:-1]] + [shape[-1]])
    for axis in range(dims):
        shifted = list(inner)
        shifted[axis] = slice(1, None)
        squares += (values[tuple(shifted)] - values[inner]) ** 2
    expected = np.sqrt(squares).mean()
    both = torch.from_numpy(np.stack([values, 2 * values]))
    np.testing.assert_allclose(total_variation(both, dims), [expected, 2 * expected], rtol=1e-9)
    field = grid(shape[:-1], channels=shape[-1])
    with torch.no_grad():
        field.vertices.copy_(both[0])
    torch.testing.assert_close(field.total_variation().item(), expected, rtol=1e-9, atol=0)


def test_total_variation_has_gradients_where_nothing_varies() -> None:
    flat = torch.ones(3, 4, 1, requires_grad=True)
    total_variation(flat, 2).backward()
    assert flat.grad is not None
    assert torch.equal(flat.grad, torch.zeros_like(flat))
    with pytest.raises(InputError, match="at least 2 values"):
        total_variation(torch.ones(3, 1, 1), 2)


# ---- hash grids --------------------------------------------------------------------------------------------------


def test_size_of_the_published_configuration() -> None:
    """Instant-NGP for Pluto in the ASMR paper: 1.229 million."""
    config = HashGridConfig(levels=16, log2_table=16, base_resolution=(16,), finest_resolution=(4096,))
    field = build_field(FieldConfig(name="hash_grid", hash_grid=config), coordinate_dims=2, channels=3, seed=0)
    assert field.num_parameters == 1_229_323
    assert sum(p.numel() for p in field.decoder.parameters()) == 6_467
    assert field.table.detach().abs().max() <= 1e-4
    assert field.table.detach().std() > 0.5e-4


def test_resolutions_of_levels() -> None:
    def cells(levels: int, base: tuple[int, ...], finest: tuple[int, ...], dims: int) -> list[list[int]]:
        config = HashGridConfig(levels=levels, base_resolution=base, finest_resolution=finest)
        return level_cells(config, dims)

    assert cells(9, (16,), (4096,), 1) == [[16 * 2**i] for i in range(9)]
    for finest in (512, 1000, 2048, 4096, 524288):  # the last one is exact for any growth
        assert cells(16, (16,), (finest,), 2)[-1] == [finest, finest]
    assert cells(3, (4, 8), (16, 128), 2) == [[4, 8], [8, 32], [16, 128]]
    assert cells(1, (16,), (512,), 1) == [[16]]
    with pytest.raises(InputError, match="finest_resolution is 8, below"):
        cells(4, (16,), (8,), 2)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_dense_levels_are_scipys_interpolation(dims: int) -> None:
    base, finest = (2, 3, 4)[:dims], (5, 7, 6)[:dims]
    field = hashed(dims, levels=3, features=2, log2_table=14, base_resolution=base, finest_resolution=finest)
    assert field.dense.all()
    coords = torch.cat(
        [places(dims), torch.ones(1, dims, dtype=torch.float64), -torch.ones(1, dims, dtype=torch.float64)]
    )
    expected, start = [], 0
    for cells in field.cells.tolist():
        shape = [n + 1 for n in cells]
        stop = start + int(np.prod(shape))
        values = field.table[start:stop].detach().numpy().reshape(*shape, 2)
        axes = [np.linspace(-1, 1, n) for n in shape]
        expected.append(RegularGridInterpolator(axes, values)(coords.numpy()))
        start = stop
    assert start == len(field.table)
    np.testing.assert_allclose(field.features(coords).detach().numpy(), np.concatenate(expected, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_hashed_levels_against_a_loop(dims: int) -> None:
    """The paper's equation 4, in Python's integers, at one point after the other."""
    cells, size = 37, 2**5
    field = hashed(dims, levels=1, features=1, log2_table=5, base_resolution=(cells,), finest_resolution=(cells,))
    assert not field.dense.any()
    assert len(field.table) == size
    table, primes = field.table.detach().numpy()[:, 0], (1, 2654435761, 805459861)
    coords = places(dims, 10)
    for coordinate, found in zip(coords.numpy(), field.features(coords).detach().numpy()[:, 0], strict=True):
        position = (coordinate + 1) / 2 * cells
        corner, fraction = np.floor(position).astype(int), position - np.floor(position)
        total = 0.0
        for number in range(2**dims):
            bits = [(number >> axis) & 1 for axis in range(dims)]
            weight, slot = 1.0, 0
            for axis, bit in enumerate(bits):
                weight *= fraction[axis] if bit else 1 - fraction[axis]
                slot ^= int(corner[axis] + bit) * primes[axis]
            total += weight * table[slot % size]
        assert found == pytest.approx(total, abs=1e-12)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_gradients_of_hash_grids(dims: int) -> None:
    """Of coordinates and tables, through the decoder too, with levels that are hashed and levels that are not."""
    field = hashed(
        dims,
        levels=2,
        features=1,
        log2_table=3,
        base_resolution=(2 if dims < 3 else 1,),
        finest_resolution=(9,),
        interpolation="smoothstep",
    )
    assert not field.dense.all()

    def call(coords: Tensor, table: Tensor) -> Tensor:
        return torch.func.functional_call(field, {"table": table}, (coords,))

    given = places(dims, 2).requires_grad_(), field.table
    assert torch.autograd.gradcheck(call, given)
    assert torch.autograd.gradgradcheck(call, given)


def test_smoothstep_has_continuous_derivatives() -> None:
    for kind, orders in (("linear", 1), ("smoothstep", 2)):
        field = hashed(
            1,
            levels=1,
            features=1,
            base_resolution=(4,),
            finest_resolution=(4,),
            interpolation=kind,  # type: ignore[arg-type]
        )
        edges = torch.tensor([[-1e-9], [1e-9]], dtype=torch.float64, requires_grad=True)  # both sides of a vertex
        (slope,) = torch.autograd.grad(field.features(edges).sum(), edges)
        jump = (slope[0] - slope[1]).abs().item()
        assert jump > 0.1 if kind == "linear" else jump < 1e-6
        assert field.derivatives == min(orders, 1)  # the decoder is a ReLU network


def test_more_dimensions_are_refused() -> None:
    with pytest.raises(InputError, match="takes 1 to 3 coordinates, not 4"):
        hashed(4)
