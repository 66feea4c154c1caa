"""Interpolation between the vertices of regular grids, written as gathers and products.

`torch.nn.functional.grid_sample` has second derivatives of its bilinear form only in part, and none of its bicubic
one; these have all of them, in one, two and three dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

KEYS = -0.75
"""Parameter of the cubic convolution kernel (Keys 1981); PyTorch's bicubic has this value too."""

DERIVATIVES = {"linear": 1, "smoothstep": 2, "cubic": 2}
"""How many derivatives are right: linear has kinks at the vertices, the others have continuous first derivatives."""


def _cubic(t: Tensor) -> list[Tensor]:
    def near(x: Tensor) -> Tensor:  # distance below 1
        return ((KEYS + 2) * x - (KEYS + 3)) * x * x + 1

    def far(x: Tensor) -> Tensor:  # distance between 1 and 2
        return ((KEYS * x - 5 * KEYS) * x + 8 * KEYS) * x - 4 * KEYS

    return [far(1 + t), near(t), near(1 - t), far(2 - t)]


def taps(position: Tensor, cells: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The vertices that count along each axis, and how much.

    Args:
        position: in cells, 0 to `cells`, of any shape [...].
        cells: integers that broadcast to it; there are `cells + 1` vertices.
        kind: linear, smoothstep or cubic.

    Returns:
        vertex numbers and weights, both [..., k] with k = 2, or 4 for cubic, where the border's vertices stand in for
        those beyond.
    """
    cell = torch.minimum(position.detach().floor().long(), cells - 1).clamp(min=0)
    t = position - cell
    if kind == "cubic":
        weights, start = _cubic(t), -1
    else:
        t = t * t * (3 - 2 * t) if kind == "smoothstep" else t
        weights, start = [1 - t, t], 0
    vertices = cell[..., None] + torch.arange(start, start + len(weights), device=cell.device)
    vertices = torch.minimum(vertices.clamp(min=0), cells[..., None])
    return vertices, torch.stack(weights, dim=-1)


def outer(parts: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """All combinations of what belongs to the axes: [..., D, k] to [..., k^D]."""
    return reduce(lambda a, b: combine(a[..., :, None], b[..., None, :]).flatten(-2), parts.unbind(-2))


def rows(table: Tensor, index: Tensor, trailing: int) -> Tensor:
    """Rows of one table [R, F] at index [...], or of N tables [N, R, F], each at its own: [*N, ..., F].

    Args:
        index: with `trailing` axes, the same for all tables, or one more in front.
        trailing: number of axes of the index of one table.
    """
    if table.ndim == 2:
        return F.embedding(index, table)
    count, length = table.shape[:2]
    start = torch.arange(count, device=index.device).view(-1, *[1] * trailing) * length
    return F.embedding(index + start, table.flatten(0, 1))


def to_unit(coords: Tensor, low: float, high: float) -> Tensor:
    """Coordinates as numbers from 0 to 1; those beyond are moved to the border."""
    return ((coords - low) / (high - low)).clamp(0, 1)
