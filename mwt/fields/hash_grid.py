"""Multi-resolution hash grid (Mueller, Evans, Schied and Keller 2022, Instant-NGP) in plain PyTorch.

Level l has floor(base * b^l) cells along an axis, with b = (finest / base)^(1 / (levels - 1)) for each axis, so that
the last level has exactly `finest` (rounding is guarded: 4096 does not become 4095). It has one vertex more than cells;
where the vertices of all axes fit into the table, each has an entry of its own, in row-major order, else they share
entries by the paper's hash (xor of vertex number times prime, modulo the table's size). Entries start from U(+-1e-4).
tiny-cuda-nn pads levels to multiples of 8 entries, which the paper does not mention; there is none of that here.

Everything is a gather or a product: gradients of gradients are exact, on any device, in float32 and float64.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mwt.errors import InputError
from mwt.fields.config import HashGridConfig, per_axis
from mwt.fields.field import Field, MuonParameter
from mwt.fields.interpolation import DERIVATIVES, outer, rows, taps, to_unit
from mwt.fields.layers import Initializer
from mwt.fields.mlp import CoordinateMLP

PRIMES = (1, 2654435761, 805459861)


def level_cells(config: HashGridConfig, coordinate_dims: int) -> list[list[int]]:
    """Cells of each level along each axis, coarsest level first.

    Raises:
        InputError: the finest level is coarser than the coarsest one.
    """
    base = per_axis(config.base_resolution, coordinate_dims, "hash_grid.base_resolution")
    finest = per_axis(config.finest_resolution, coordinate_dims, "hash_grid.finest_resolution")
    for low, high in zip(base, finest, strict=True):
        if high < low:
            raise InputError(f"hash_grid.finest_resolution is {high}, below hash_grid.base_resolution {low}.")
    steps = max(config.levels - 1, 1)  # one level: no growth, and no division by zero
    return [
        [int(low * (high / low) ** (level / steps) + 1e-9 * high) for low, high in zip(base, finest, strict=True)]
        for level in range(config.levels)
    ]


class HashGrid(Field):
    """Features of all levels, interpolated and concatenated, then an MLP."""

    def __init__(self, config: HashGridConfig, *, coordinate_dims: int, channels: int, draws: Initializer) -> None:
        """A fresh field, or `draws.copies` of them.

        Raises:
            InputError: more than three dimensions, or resolutions that do not fit the number of axes.
        """
        if not 1 <= coordinate_dims <= len(PRIMES):
            raise InputError(f"hash_grid takes 1 to {len(PRIMES)} coordinates, not {coordinate_dims}.")
        super().__init__(coordinate_dims=coordinate_dims, channels=channels, copies=draws.copies, derivatives=0)
        self.low, self.high = config.coordinate_range
        self.interpolation = config.interpolation
        self.slots = 2**config.log2_table
        cells = torch.tensor(level_cells(config, coordinate_dims))  # [levels, D]
        vertices = (cells + 1).double().prod(-1)  # exact: a level beyond 2^53 vertices is hashed in any case
        sizes = vertices.clamp(max=self.slots).long()
        strides = torch.ones_like(cells)
        for axis in reversed(range(coordinate_dims - 1)):
            strides[:, axis] = strides[:, axis + 1] * (cells[:, axis + 1] + 1)
        self.cells: Tensor
        self.starts: Tensor
        self.strides: Tensor
        self.dense: Tensor
        self.primes: Tensor
        for name, buffer in (
            ("cells", cells),
            ("starts", sizes.cumsum(0) - sizes),
            ("strides", strides),
            ("dense", vertices <= self.slots),
            ("primes", torch.tensor(PRIMES[:coordinate_dims])),
        ):
            self.register_buffer(name, buffer, persistent=False)
        self.table = nn.Parameter(draws.uniform(int(sizes.sum()), config.features, low=-1e-4, high=1e-4))
        self.decoder = CoordinateMLP(
            config.decoder, coordinate_dims=config.levels * config.features, channels=channels, draws=draws
        )
        self.derivatives = min(DERIVATIVES[config.interpolation], self.decoder.derivatives)

    def features(self, coords: Tensor) -> Tensor:
        """The features of all levels: [*N, P, D] to [*N, P, levels * F], coarsest level first."""
        position = to_unit(coords, self.low, self.high)[..., None, :] * self.cells  # [*N, P, levels, D]
        vertices, weights = taps(position, self.cells, self.interpolation)  # [*N, P, levels, D, 2]
        in_order = outer(vertices * self.strides[..., None], torch.add)
        hashed = outer(vertices * self.primes[:, None], torch.bitwise_xor) % self.slots
        index = torch.where(self.dense[:, None], in_order, hashed) + self.starts[:, None]
        found = rows(self.table, index, trailing=3)  # [*N, P, levels, 2^D, F]
        return (found * outer(weights, torch.mul)[..., None]).sum(-2).flatten(-2)

    def values(self, coords: Tensor) -> Tensor:
        """[*N, P, D] to [*N, P, C]."""
        with torch.autocast(coords.device.type, enabled=False):
            features = self.features(coords)
        return self.decoder.values(features)

    def macs_per_point(self) -> float:
        """Of the interpolation (2^D entries of F features a level) and the decoder."""
        levels, dims = self.cells.shape
        return levels * 2**dims * self.table.shape[-1] + self.decoder.macs_per_point()

    def muon_parameters(self) -> list[MuonParameter]:
        """The decoder's hidden-to-hidden matrices [*N, in, out]."""
        return [(f"decoder.{name}", matrix, layout) for name, matrix, layout in self.decoder.muon_parameters()]
