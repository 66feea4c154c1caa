"""A plain grid of values with interpolation, and total variation: the baseline for every coordinate network.

Grids with total variation fit many dense signals better than networks of the same size ("Grids Often Outperform
Implicit Neural Representations at Compressing Dense Signals"); a comparison without them says little.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mwt.errors import InputError
from mwt.fields.config import InterpolatedGridConfig, per_axis
from mwt.fields.field import Field
from mwt.fields.interpolation import DERIVATIVES, outer, rows, taps, to_unit
from mwt.fields.layers import Initializer

EPSILON = 1e-12
"""Added to the squared differences in total variation, whose root then has a derivative at 0."""


def total_variation(values: Tensor, dims: int) -> Tensor:
    """Isotropic total variation: the mean of sqrt(sum over axes of squared forward differences).

    Args:
        values: [..., n_1, ..., n_D, C]; the mean is over channels and over the (n_1 - 1) ... (n_D - 1) places
            that have a difference along every axis.
        dims: D.

    Returns:
        [...], one number for each grid.

    Raises:
        InputError: fewer than two values along an axis.
    """
    shape = values.shape[-dims - 1 : -1]
    if min(shape) < 2:
        raise InputError(f"Total variation needs at least 2 values along each axis; the grid has {list(shape)}.")
    squares = torch.zeros((), dtype=values.dtype, device=values.device)
    for axis in range(-dims - 1, -1):
        difference = values.diff(dim=axis)
        for other in range(-dims - 1, -1):
            if other != axis:
                difference = difference.narrow(other, 0, difference.shape[other] - 1)
        squares = squares + difference.square()
    return (squares + EPSILON).sqrt().mean(dim=tuple(range(-dims - 1, 0)))


class Grid(Field):
    """Values at the vertices of a regular grid, learned; between them interpolated, beyond them constant."""

    def __init__(
        self, config: InterpolatedGridConfig, *, coordinate_dims: int, channels: int, draws: Initializer
    ) -> None:
        """A fresh grid, or `draws.copies` of them.

        Raises:
            InputError: sizes that do not fit the number of axes.
        """
        super().__init__(
            coordinate_dims=coordinate_dims,
            channels=channels,
            copies=draws.copies,
            derivatives=DERIVATIVES[config.interpolation],
        )
        sizes = per_axis(config.size, coordinate_dims, "grid.size")
        self.low, self.high = config.coordinate_range
        self.interpolation = config.interpolation
        self.vertices = nn.Parameter(draws.full(config.init, *sizes, channels))
        """[*N, n_1, ..., n_D, C]."""
        cells = torch.tensor(sizes) - 1
        strides = torch.ones_like(cells)
        for axis in reversed(range(coordinate_dims - 1)):
            strides[axis] = strides[axis + 1] * sizes[axis + 1]
        self.register_buffer("cells", cells, persistent=False)
        self.register_buffer("strides", strides, persistent=False)
        self.cells: Tensor
        self.strides: Tensor

    def values(self, coords: Tensor) -> Tensor:
        """[*N, P, D] to [*N, P, C]."""
        with torch.autocast(coords.device.type, enabled=False):
            position = to_unit(coords, self.low, self.high) * self.cells
            numbers, weights = taps(position, self.cells, self.interpolation)
            index = outer(numbers * self.strides[:, None], torch.add)
            table = self.vertices.flatten(-self.coordinate_dims - 1, -2)
            return (rows(table, index, trailing=2) * outer(weights, torch.mul)[..., None]).sum(-2)

    def macs_per_point(self) -> float:
        """Of the interpolation: 2^D vertices, 4^D with cubic."""
        taps_per_axis = 4 if self.interpolation == "cubic" else 2
        return float(taps_per_axis**self.coordinate_dims * self.channels)

    def total_variation(self) -> Tensor:
        """Of the vertices: [*N], one number for each grid. Multiply by a weight and add it to the loss."""
        return total_variation(self.vertices, self.coordinate_dims)
