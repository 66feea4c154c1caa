"""A tiny SIREN for each tile of the coordinates' range (Reiser et al., ICCV 2021, KiloNeRF), for images too.

The tile of a point is floor(x T) along each axis, x being its coordinate as a number from 0 to 1 and T the tiles along
that axis; tiles are numbered in row-major order. Points are sorted by tile and multiplied tile by tile as one batch
(`mwt.fields.packing`), so that any points will do and memory is bounded. All layers start from SIREN's rule for hidden
layers, as in ASMR's code (Li et al., ICLR 2024), whose encoding saw whole numbers and so only zeros; here it sees
coordinates.

Within a tile the field is as smooth as a SIREN; across borders of tiles it jumps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor, nn

from mwt.fields.config import EncodingConfig, per_axis
from mwt.fields.config_tiled import TiledConfig
from mwt.fields.encoding import Encoding, make_encoding
from mwt.fields.field import Field
from mwt.fields.layers import Initializer, Spread, weight_spread
from mwt.fields.packing import Packing, pack_tiles, tile_along


def nerf_or_identity(frequencies: int, coordinate_dims: int, draws: Initializer) -> Encoding:
    """NeRF's encoding of so many frequencies, or none."""
    config = EncodingConfig(name="nerf", frequencies=frequencies) if frequencies else EncodingConfig()
    return make_encoding(config, coordinate_dims, draws)


class TileLinear(nn.Module):
    """x W_t + b_t, with weight [*N, T, in, out] and bias [*N, T, 1, out]; no bias at all with `bias=False`."""

    def __init__(
        self, draws: Initializer, tiles: int, inputs: int, outputs: int, *, weight: Spread, bias: bool = True
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(draws.draw(weight, tiles, inputs, outputs))
        torch_default = Spread("uniform", inputs**-0.5)
        self.bias = nn.Parameter(draws.draw(torch_default, tiles, 1, outputs)) if bias else None

    @property
    def macs(self) -> int:
        """Multiply-adds for one point: in x out."""
        inputs, outputs = self.weight.shape[-2:]
        return inputs * outputs

    def forward(self, blocks: Tensor, packing: Packing) -> Tensor:
        """[blocks, capacity, in] to [blocks, capacity, out]."""
        weight = packing.choose(self.weight)
        return blocks @ weight if self.bias is None else torch.baddbmm(packing.choose(self.bias), blocks, weight)


def networks(coords: Tensor, parameters: Iterable[tuple[Tensor, int]]) -> int | None:
    """N, from coordinates [N, P, D] or a parameter with more axes than one network's has; None: one network."""
    if coords.ndim == 3:
        return len(coords)
    return next((len(values) for values, dims in parameters if values.ndim > dims), None)


class Tiled(Field):
    """tile, encoding -> first -> sine -> L times (hidden -> sine) -> last, each linear map being the tile's own."""

    def __init__(self, config: TiledConfig, *, coordinate_dims: int, channels: int, draws: Initializer) -> None:
        """A fresh field, or `draws.copies` of them.

        Raises:
            InputError: tiles that do not fit the number of axes.
        """
        super().__init__(coordinate_dims=coordinate_dims, channels=channels, copies=draws.copies, derivatives=2)
        cells = per_axis(config.tiles, coordinate_dims, "tiled.tiles")
        self.tiles = math.prod(cells)
        self.omega = config.omega
        self.local = config.coordinates == "tile"
        self.low, self.high = config.coordinate_range
        self.encoding = nerf_or_identity(config.frequencies, coordinate_dims, draws)
        sizes = [self.encoding.outputs, *[config.width] * (config.hidden_layers + 1), channels]
        self.layers = nn.ModuleList(
            TileLinear(
                draws, self.tiles, inputs, outputs, weight=weight_spread("siren", inputs, outputs, omega=config.omega)
            )
            for inputs, outputs in pairwise(sizes)
        )
        strides = [math.prod(cells[axis + 1 :]) for axis in range(coordinate_dims)]
        self.cells: Tensor
        self.strides: Tensor
        self.register_buffer("cells", torch.tensor(cells), persistent=False)
        self.register_buffer("strides", torch.tensor(strides), persistent=False)

    def values(self, coords: Tensor) -> Tensor:
        """[*N, P, D] to [*N, P, C]."""
        count, points = networks(coords, ((value, 3) for value in self.layers.parameters())), coords.shape[-2]
        with torch.autocast(coords.device.type, enabled=False):  # omega x needs more digits than bf16 has
            unit = (coords - self.low) / (self.high - self.low)
            cell = tile_along(unit, self.cells)
            seen = 2 * (unit * self.cells - cell) - 1 if self.local else coords
            tile = (cell * self.strides).sum(-1)
            if count is not None:
                tile = tile.expand(count, points) + self.tiles * torch.arange(count, device=tile.device)[:, None]
                seen = seen.expand(count, points, -1).flatten(0, 1)
            packing = pack_tiles(tile.flatten(), self.tiles * (count or 1))
            hidden = self.layers[0](packing.pack(self.encoding(seen)), packing)
        for layer in self.layers[1:]:
            hidden = layer((self.omega * hidden).sin(), packing)
        values = packing.unpack(hidden)
        return values if count is None else values.unflatten(0, (count, points))

    def macs_per_point(self) -> float:
        """Of one tile's linear layers; places of blocks that stay empty are not counted."""
        return float(sum(layer.macs for layer in self.layers if isinstance(layer, TileLinear)))
