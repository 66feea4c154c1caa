"""Levels of experts (Hao et al., NeurIPS 2022): layers whose weight matrix depends on where the point lies.

Layer i has a grid of matrices, B_i along an axis, of which a point has number floor(x C_i) mod B_i: x is its coordinate
as a number from 0 to 1, and C_i the product of the bases B up to i. So the pattern of matrices repeats itself in space,
finer from layer to layer. Biases, and the linear layer at the end, are the same everywhere. (ASMR's code, after which
the settings are named, takes x from -1 to 1 for numbers from 0 to 1, and the pattern wraps around in the wrong places.)

leaky_relu: slope 0.2, Kaiming's uniform weights for it; sine: SIREN's. Biases are torch's U(+-1/sqrt(in)). Within a
cell of the last layer the field is as smooth as its activation; across borders of cells it jumps.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mwt.fields.config import per_axis
from mwt.fields.config_tiled import ExpertsConfig
from mwt.fields.field import Field
from mwt.fields.layers import Initializer, Linear, Spread, weight_spread
from mwt.fields.packing import pack_tiles, tile_along
from mwt.fields.tiled import TileLinear, nerf_or_identity, networks

SLOPE = 0.2


class LevelsOfExperts(Field):
    """encoding -> for each level (its matrix -> + bias -> activation) -> last."""

    def __init__(self, config: ExpertsConfig, *, coordinate_dims: int, channels: int, draws: Initializer) -> None:
        """A fresh field, or `draws.copies` of them.

        Raises:
            InputError: bases that do not fit the number of axes.
        """
        derivatives = 2 if config.activation == "sine" else 1
        super().__init__(
            coordinate_dims=coordinate_dims, channels=channels, copies=draws.copies, derivatives=derivatives
        )
        self.omega = config.omega if config.activation == "sine" else None
        self.low, self.high = config.coordinate_range
        along = per_axis(config.bases, coordinate_dims, "experts.bases")
        bases = torch.tensor(along).T.contiguous()  # [levels, D]
        strides = torch.ones_like(bases)
        for axis in reversed(range(coordinate_dims - 1)):
            strides[:, axis] = strides[:, axis + 1] * bases[:, axis + 1]
        self.numbers = bases.prod(-1).tolist()
        self.bases: Tensor
        self.cells: Tensor
        self.strides: Tensor
        for name, buffer in (("bases", bases), ("cells", bases.cumprod(0)), ("strides", strides)):
            self.register_buffer(name, buffer, persistent=False)
        self.encoding = nerf_or_identity(config.frequencies, coordinate_dims, draws)
        self.matrices, self.biases = nn.ModuleList(), nn.ParameterList()
        inputs = self.encoding.outputs
        for level, tiles in enumerate(self.numbers):
            spread = self._spread(inputs, config.width, first=level == 0)
            self.matrices.append(TileLinear(draws, tiles, inputs, config.width, weight=spread, bias=False))
            self.biases.append(nn.Parameter(draws.draw(Spread("uniform", inputs**-0.5), config.width)))
            inputs = config.width
        last = self._spread(inputs, channels)
        self.last = Linear(draws, inputs, channels, weight=last, bias=Spread("uniform", inputs**-0.5))

    def _spread(self, inputs: int, outputs: int, *, first: bool = False) -> Spread:
        if self.omega is not None:
            return weight_spread("siren", inputs, outputs, omega=self.omega, first=first)
        return Spread("uniform", math.sqrt(6 / ((1 + SLOPE**2) * inputs)))

    def tiles(self, unit: Tensor) -> list[Tensor]:
        """The matrix of each level for coordinates from 0 to 1: [..., P, D] to [..., P] for each level."""
        found = []
        for bases, cells, strides in zip(self.bases, self.cells, self.strides, strict=True):
            found.append(((tile_along(unit, cells) % bases) * strides).sum(-1))
        return found

    def values(self, coords: Tensor) -> Tensor:
        """[*N, P, D] to [*N, P, C]."""
        own = [(layer.weight, 3) for layer in self.matrices] + [(bias, 1) for bias in self.biases]
        count = networks(coords, own)
        with torch.autocast(coords.device.type, enabled=False):  # omega x needs more digits than bf16 has
            tiles = self.tiles((coords - self.low) / (self.high - self.low))
            hidden = self._level(0, self.encoding(coords), tiles[0], count)
        for level in range(1, len(tiles)):
            hidden = self._level(level, self._activate(hidden), tiles[level], count)
        return self.last(self._activate(hidden))

    def _activate(self, z: Tensor) -> Tensor:
        return F.leaky_relu(z, SLOPE) if self.omega is None else (self.omega * z).sin()

    def _level(self, level: int, hidden: Tensor, tile: Tensor, count: int | None) -> Tensor:
        """[*N, P, in] to [*N, P, out], before the activation."""
        number, points = self.numbers[level], tile.shape[-1]
        if count is not None:
            hidden = hidden.expand(count, points, -1).flatten(0, 1)
            tile = tile.expand(count, points) + number * torch.arange(count, device=tile.device)[:, None]
        packing = pack_tiles(tile.flatten(), number * (count or 1))
        found = packing.unpack(self.matrices[level](packing.pack(hidden), packing))
        found = found if count is None else found.unflatten(0, (count, points))
        return found + self.biases[level][..., None, :]

    def macs_per_point(self) -> float:
        """Of one matrix of each level, and of the last layer; places of blocks that stay empty are not counted."""
        return float(sum(layer.macs for layer in (*self.matrices, self.last)))
