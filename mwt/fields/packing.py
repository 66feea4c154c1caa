"""Points that each belong to a tile, sorted into blocks of one tile each: products with a matrix per tile are batched.

A block holds at most `capacity` points, the mean over the tiles that have any; a fuller tile has several blocks. So
there are at most twice as many blocks as tiles in use, and at most twice as many places as points, however unevenly
the points lie. On a whole grid all tiles have equally many points, and no place is empty.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where each of M points lies in the blocks."""

    owner: Int[Tensor, " blocks"]
    """The tile of each block."""
    place: Int[Tensor, " M"]
    """Block times capacity, plus the place in it."""
    capacity: int

    def pack(self, points: Float[Tensor, "M F"]) -> Float[Tensor, "blocks capacity F"]:
        """Points in blocks; zeros where a block has none."""
        empty = points.new_zeros(len(self.owner) * self.capacity, points.shape[-1])
        return empty.index_copy(0, self.place, points).unflatten(0, (-1, self.capacity))

    def unpack(self, blocks: Float[Tensor, "blocks capacity F"]) -> Float[Tensor, "M F"]:
        """The inverse of `pack`."""
        return blocks.flatten(0, 1)[self.place]

    def choose(self, matrices: Float[Tensor, "*N T a b"]) -> Float[Tensor, "blocks a b"]:
        """The matrix of each block's tile. With N networks, or one that all share, tile t of network n is n T + t."""
        if matrices.ndim == 4:
            return matrices.flatten(0, 1)[self.owner]
        return matrices[self.owner % len(matrices)]


def pack_tiles(tile: Int[Tensor, " M"], tiles: int) -> Packing:
    """The packing of points by their tiles, numbered 0 to `tiles` - 1. Waits for the device: sizes depend on data."""
    counts = tile.bincount(minlength=tiles)
    used = max(1, int((counts > 0).sum()))
    capacity = max(1, -(-len(tile) // used))
    blocks = (counts + capacity - 1) // capacity
    order = tile.argsort(stable=True)
    in_order = torch.arange(len(tile), device=tile.device)
    within = torch.empty_like(order)  # the number of a point among those of its tile
    within[order] = in_order - (counts.cumsum(0) - counts)[tile[order]]
    first = blocks.cumsum(0) - blocks
    place = (first[tile] + within // capacity) * capacity + within % capacity
    owner = torch.arange(tiles, device=tile.device).repeat_interleave(blocks)
    return Packing(owner=owner, place=place, capacity=capacity)


def tile_along(unit: Float[Tensor, "... D"], cells: Int[Tensor, " D"]) -> Int[Tensor, "... D"]:
    """The cell along each axis of coordinates from 0 to 1, both of which lie inside.

    Samples of a grid without its end point lie on the borders of cells: the error of float32 is added, so that they
    belong to the cell that begins there.
    """
    position = unit.detach() * cells + cells * 2.0**-22
    return torch.minimum(position.floor().long(), cells - 1).clamp(min=0)
