"""ASMR: a SIREN whose activations are shared between the samples of a grid (Li et al. 2024, arXiv 2405.12398).

A sample's number along each axis is written with L digits d_0 ... d_(L-1) (`mwt.fields.asmr_bases`), and u_i =
d_i / (B_i - 1) in [0, 1], or 0 where B_i is 1. The network has L linear layers, and all hidden ones are modulated by
the next digit:

    z_0 = sin(omega (W_0 u_0     + b_0 + omega M_0 u_1))
    z_i = sin(omega (W_i z_(i-1) + b_i + omega M_i u_(i+1)))      i = 1 ... L - 2
    out = W_(L-1) z_(L-2) + b_(L-1)

z_i depends on d_0 ... d_(i+1) alone, so W_i z_(i-1) is computed once for all samples that share d_0 ... d_i, a cell of
level i; the work of a sample is dominated by the last hidden layer's share, H^2 over the samples of a tile (a cell of
level L - 2). The network has no coordinates: what lies between samples, and gradients, are not defined.

The last sine is of a number of the tile plus one of the position within it, a_t + b_p. With sin(a + b) = sin a cos b +
cos a sin b, its linear map becomes two products of matrices, [T, H] and [H, Q C] for T tiles of Q samples, and the
T Q H sines, most of the time otherwise, become 2 (T + Q) H. It is the same number, to 3e-15 in float64.

Beyond the published network: one batch may hold any samples, and shares what its size allows.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.func import debug_unwrap
from torch.nn import functional as F

from mwt.cost import asmr_macs
from mwt.errors import InputError, NotDefinedError
from mwt.fields.asmr_bases import bases_for
from mwt.fields.config import per_axis
from mwt.fields.config_asmr import ASMRConfig
from mwt.fields.field import Field, MuonParameter, hidden_matrices
from mwt.fields.frame import Frame
from mwt.fields.layers import Initializer, Linear, Spread, add_product, affine, weight_spread

DENSE = 8
"""Samples are computed by tiles where they are one in so many of those tiles' samples, or more: a sine takes the time
of several multiply-adds."""
UNIT = (-1.0, 1.0)


@dataclass(frozen=True)
class Tiles:
    """Samples that fill tiles well enough to compute these."""

    cells: Tensor | None
    """[T, D] of level L - 2; None: all."""
    where: Tensor | None
    """[P]: the samples among the T Q of the tiles; None: these, in order."""


Plan = Tensor | Tiles | None
"""How samples are computed: one by one (their numbers [*N, P, D]), by tiles, or the whole grid in order (None)."""


class ASMR(Field):
    """The network of this module, on the grid of a frame or of its own configuration."""

    tile: tuple[int, ...]

    def __init__(
        self,
        config: ASMRConfig,
        *,
        coordinate_dims: int,
        channels: int,
        draws: Initializer,
        frame: Frame | None = None,
    ) -> None:
        """A fresh network, or `draws.copies` of them; initial values as released (SIREN's, biases from the same ranges,
        modulators U(+-1/sqrt(D))).

        Raises:
            InputError: bases or a size that will not do.
            NotDefinedError: a signal that is no grid of samples.
        """
        super().__init__(coordinate_dims=coordinate_dims, channels=channels, copies=draws.copies, derivatives=0)
        self.size, self.ranges = _grid(config, coordinate_dims, frame)
        self.endpoint = frame is None or frame.endpoint
        self.bases = bases_for(self.size, config.bases, config.layers)
        """[D][L]."""
        self.layers = len(self.bases[0])
        self.padded = tuple(math.prod(axis) for axis in self.bases)
        """Samples along each axis that the bases count to; those beyond `size` are never seen."""
        self.tile = tuple(axis[-1] for axis in self.bases)
        self.cells = [[math.prod(axis[: i + 1]) for axis in self.bases] for i in range(self.layers)]
        """Cells of each level along each axis [L][D]."""
        self.width, self.omega = config.width, config.omega
        for i in range(self.layers):
            sides = [axis[i] for axis in self.bases]
            self.register_buffer(f"digits_{i}", _numbers(sides), persistent=False)
            self.register_buffer(f"sides_{i}", torch.tensor(sides), persistent=False)

        def linear(inputs: int, outputs: int, *, first: bool = False) -> Linear:
            spread = weight_spread("siren", inputs, outputs, omega=config.omega, first=first)
            return Linear(draws, inputs, outputs, weight=spread, bias=spread)

        def modulator() -> Linear:
            spread = Spread("uniform", coordinate_dims**-0.5)
            return Linear(draws, coordinate_dims, config.width, weight=spread, bias=None)

        self.first = linear(coordinate_dims, config.width, first=True)
        self.hidden = nn.ModuleList(linear(config.width, config.width) for _ in range(self.layers - 2))
        self.last = linear(config.width, channels)
        self.modulators = nn.ModuleList(modulator() for _ in range(self.layers - 1))
        self._whole: tuple[weakref.ref[Tensor], int] | None = None
        """The coordinates last found to be the whole grid: a fit brings the same tensor at every step."""

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without the coordinates last seen, which are not the copy's."""
        return {**self.__dict__, "_whole": None}

    # ---- all samples of a level, or some -----------------------------------------------------------------------------

    def _inputs(self, level: int) -> Tensor:
        """u of every digit [Q, D], Q = the product of the bases of a level."""
        digits, sides = self.get_buffer(f"digits_{level}"), self.get_buffer(f"sides_{level}")
        return digits.to(self.first.weight.dtype) / (sides - 1).clamp_min(1)

    def _modulation(self, layer: int) -> Tensor:
        """omega^2 M u of every digit of the layer's next level [*N, Q, H]."""
        with torch.autocast(self.first.weight.device.type, enabled=False):
            modulation: Tensor = self.modulators[layer](self._inputs(layer + 1))
            return self.omega**2 * modulation

    def _start(self) -> Tensor:
        """omega (W_0 u_0 + b_0) in the cells of level 0 [*N, T, H]."""
        with torch.autocast(self.first.weight.device.type, enabled=False):
            phase: Tensor = self.first(self._inputs(0))
            return self.omega * phase

    def _spread(self, phase: Tensor, modulation: Tensor, layer: int) -> Tensor:
        """phase of each cell plus modulation of each digit below it: [*N, T, H] and [*N, Q, H] to [*N, T Q, H]."""
        outer, inner = self.cells[layer], [axis[layer + 1] for axis in self.bases]
        coarse = [side for n in outer for side in (n, 1)]
        fine = [side for n in inner for side in (1, n)]
        total = phase.unflatten(-2, coarse) + modulation.unflatten(-2, fine)
        return total.flatten(-1 - 2 * len(outer), -2)

    def _shared(self, level: int) -> Tensor:
        """omega (W_i z_(i-1) + b_i), i = level, in all cells of the level [*N, T, H]."""
        phase = self._start()
        for i in range(level):
            phase = self.omega * self.hidden[i](self._spread(phase, self._modulation(i), i).sin())
        return phase

    def _some(self, cells: Tensor, level: int, *, shared: bool) -> Tensor:
        """`_shared` in some cells [*N, P, D], sharing the levels that have no more cells than are asked for."""
        known = 0
        if shared:
            known = max((i for i in range(level + 1) if math.prod(self.cells[i]) <= cells.shape[-2]), default=0)
        phase = _rows(self._shared(known), self._number(self._cells_of(cells, level, known), known))
        for i in range(known, level):
            digit = self._digit(cells, level, i + 1)
            phase = self.omega * self.hidden[i]((phase + _rows(self._modulation(i), digit)).sin())
        return phase

    def _cells_of(self, cells: Tensor, level: int, wanted: int) -> Tensor:
        """The cells of the coarser level `wanted` that cells of `level` lie in."""
        if level == wanted:
            return cells
        steps = [math.prod(axis[wanted + 1 : level + 1]) for axis in self.bases]
        return cells.div(cells.new_tensor(steps), rounding_mode="floor")

    def _digit(self, cells: Tensor, level: int, wanted: int) -> Tensor:
        """The digits `wanted` of all axes as one number, an entry of `_inputs(wanted)`."""
        sides = self.get_buffer(f"sides_{wanted}")
        return _ravel(self._cells_of(cells, level, wanted) % sides, [axis[wanted] for axis in self.bases])

    def _number(self, cells: Tensor, level: int) -> Tensor:
        """Cells [..., D] as entries of `_shared(level)`."""
        return _ravel(cells, self.cells[level])

    def _by_tiles(self, phase: Tensor) -> Tensor:
        """Values of the samples of tiles, by angle addition: [*N, T, H] to [*N, T, Q C]."""
        modulation, weight, bias = self._modulation(self.layers - 2), self.last.weight, self.last.bias
        assert bias is not None
        places = modulation.shape[-2]

        def weighted(factors: Tensor) -> Tensor:
            return (factors.mT[..., None] * weight[..., None, :]).flatten(-2)

        repeated = bias[..., None, :].expand(*bias.shape[:-1], places, -1).flatten(-2)
        values = affine(phase.sin(), weighted(modulation.cos()), repeated)
        return add_product(values, phase.cos(), weighted(modulation.sin()))

    # ---- the three ways ----------------------------------------------------------------------------------------------

    def whole(self, *, angle_addition: bool = True) -> Tensor:
        """The values of all samples of the grid, the last axis fastest [*N, P, C].

        Args:
            angle_addition: false: the last sine as published, one for every sample and unit.
        """
        before = self.layers - 2
        phase = self._shared(before)
        if angle_addition:
            dims = self.coordinate_dims
            tiles = self._by_tiles(phase).unflatten(-1, (-1, self.channels))
            tiles = tiles.unflatten(-2, self.tile).unflatten(-2 - dims, self.cells[before])
            start = tiles.ndim - 1 - 2 * dims
            order = [place for axis in range(dims) for place in (start + axis, start + dims + axis)]
            values = tiles.permute(*range(start), *order, tiles.ndim - 1).flatten(start, -2)
        else:
            values = self.last(self._spread(phase, self._modulation(before), before).sin())
        if self.padded != self.size:
            values = values.unflatten(-2, self.padded)
            for axis, count in enumerate(self.size):
                values = values.narrow(axis - self.coordinate_dims - 1, 0, count)
            values = values.flatten(-1 - self.coordinate_dims, -2)
        return values

    def samples(self, numbers: Tensor, *, shared: bool = True) -> Tensor:
        """The values of any samples, one by one: numbers [P, D] or [N, P, D] along the axes to [*N, P, C].

        Args:
            shared: false: share nothing, as the published network is trained on batches.
        """
        before = self.layers - 2
        phase = self._some(self._cells_of(numbers, self.layers - 1, before), before, shared=shared)
        digit = self._digit(numbers, self.layers - 1, self.layers - 1)
        values: Tensor = self.last((phase + _rows(self._modulation(before), digit)).sin())
        return values

    def values(self, coords: Tensor) -> Tensor:
        """[*N, P, D] to [*N, P, C], in whichever way is the cheapest.

        Raises:
            NotDefinedError: coordinates between samples, or beyond them, or that want a gradient.
        """
        plan = self._plan(coords)
        if plan is None:
            return self.whole()
        if isinstance(plan, Tensor):
            return self.samples(plan)
        before = self.layers - 2
        phase = self._shared(before) if plan.cells is None else self._some(plan.cells, before, shared=True)
        values = self._by_tiles(phase).unflatten(-1, (-1, self.channels)).flatten(-3, -2)
        return values if plan.where is None else _rows(values, plan.where)

    # ---- which samples coordinates are -------------------------------------------------------------------------------

    def _plan(self, coords: Tensor) -> Plan:
        if coords.requires_grad or unpack_dual(coords).tangent is not None:
            raise NotDefinedError(
                "A field of name=asmr has no gradient with respect to coordinates: it knows the numbers of samples, "
                "and nothing between them."
            )
        if self._whole is not None and self._whole[0]() is coords and self._whole[1] == coords._version:
            return None
        numbers = self._numbers(coords)
        if coords.ndim > 2 or _hidden_axes(coords):
            return numbers
        number = _ravel(numbers, self.size)
        if len(number) == math.prod(self.size) and bool((number[1:] - number[:-1] == 1).all()):
            if not coords.is_inference():
                self._whole = (weakref.ref(coords), coords._version)
            return None
        return self._tiles_of(numbers)

    def _numbers(self, coords: Tensor) -> Tensor:
        """The samples' numbers along the axes [*N, P, D], integers.

        Raises:
            NotDefinedError: a coordinate is no sample's. (Not under vmap over coordinates, which forbids looking.)
        """
        steps = [max(n - 1, 1) if self.endpoint else n for n in self.size]
        low, high = (coords.new_tensor(ends) for ends in zip(*self.ranges, strict=True))
        place = (coords - low) / (high - low) * coords.new_tensor(steps)
        nearest = place.round()
        if not _hidden_axes(coords):
            rounding = 4 * torch.finfo(coords.dtype).eps * max(self.size)
            last = coords.new_tensor([n - 1 for n in self.size])
            right = ((place - nearest).abs() <= min(0.25, max(1e-3, rounding))) & (nearest >= 0) & (nearest <= last)
            if not bool(right.all()):
                wrong = coords[~right.all(-1)][0].tolist()
                raise NotDefinedError(
                    f"A field of name=asmr is defined on its {' x '.join(map(str, self.size))} samples alone, and "
                    f"({', '.join(f'{x:.6g}' for x in wrong)}) is none of their coordinates: it can be drawn at its "
                    "own size only. Choose another field."
                )
        return nearest.long()

    def _tiles_of(self, numbers: Tensor) -> Tensor | Tiles:
        """By tiles where the samples fill them, else one by one."""
        before, places = self.layers - 2, math.prod(self.tile)
        cells = self._cells_of(numbers, self.layers - 1, before)
        number, total = self._number(cells, before), math.prod(self.cells[before])
        present = torch.zeros(total, dtype=torch.bool, device=numbers.device)
        present[number] = True
        chosen = present.nonzero()[:, 0]
        if len(numbers) * DENSE < len(chosen) * places:
            return numbers
        rank = present.cumsum(0) - 1
        where = rank[number] * places + self._digit(numbers, self.layers - 1, self.layers - 1)
        ordered = len(where) == len(chosen) * places and bool((where[1:] - where[:-1] == 1).all())
        own = None if len(chosen) == total else torch.stack(torch.unravel_index(chosen, self.cells[before]), -1)
        return Tiles(own, None if ordered else where)

    # ---- what others ask of a field ----------------------------------------------------------------------------------

    def split(self, coords: Tensor, at_once: int) -> tuple[Tensor, ...]:
        """The whole grid in rows of tiles, as many as have `at_once` tiles in all; else `at_once` points at a time."""
        if coords.ndim > 2 or len(coords) != math.prod(self.size):
            return super().split(coords, at_once)
        row = self.tile[0] * math.prod(self.size[1:])
        return coords.split(max(1, at_once * math.prod(self.tile) // row) * row)

    def macs_per_point(self) -> float:
        """As published, on the whole grid, padding included; `mwt.cost.asmr_angle_macs` counts the last sine layer as
        it is computed."""
        padding = math.prod(self.padded) / math.prod(self.size)
        return asmr_macs(self.bases, self.width, self.channels) * padding

    @property
    def detail(self) -> str:
        """The bases, and whether the grid is padded."""
        bases = " and ".join(" x ".join(map(str, axis)) for axis in dict.fromkeys(self.bases))
        own, padded = (" x ".join(map(str, size)) for size in (self.size, self.padded))
        return f"bases {bases}" + (f", {own} samples padded to {padded}" if own != padded else "")

    def muon_parameters(self) -> list[MuonParameter]:
        """The hidden-to-hidden matrices [*N, in, out]."""
        return hidden_matrices(self.hidden, "hidden")


def _grid(
    config: ASMRConfig, dims: int, frame: Frame | None
) -> tuple[tuple[int, ...], tuple[tuple[float, float], ...]]:
    """Samples and ends of each axis."""
    given = None if config.size is None else tuple(per_axis(config.size, dims, "asmr.size"))
    if frame is None:
        if given is None:
            raise InputError("asmr.size is null: give the samples along each axis, or the frame of a signal.")
        return given, (config.coordinate_range,) * dims
    if frame.size is None:
        raise NotDefinedError(
            f"A field of name=asmr is defined on the samples of a grid, and a signal of kind {frame.kind} has none."
        )
    if frame.coordinate_dims != dims:
        raise InputError(f"The frame has {frame.coordinate_dims} axes and the field {dims}.")
    if given not in (None, frame.size):
        found = f"asmr.size is {list(given or ())}, and the signal has {list(frame.size)}"
        raise InputError(f"{found}: leave out asmr.size.")
    return frame.size, frame.coordinate_range


def _hidden_axes(tensor: Tensor) -> bool:
    """Whether torch.func.vmap works on it: it then has axes that its shape does not show, and forbids looking at it."""
    return debug_unwrap(tensor).ndim > tensor.ndim


def _numbers(sides: list[int]) -> Tensor:
    """All entries of a grid, the last axis fastest [Q, D], integers."""
    return torch.cartesian_prod(*(torch.arange(side) for side in sides)).reshape(-1, len(sides))


def _ravel(numbers: Tensor, sides: list[int] | tuple[int, ...]) -> Tensor:
    """Places [..., D] in a grid, the last axis fastest, as one number each [...]."""
    flat = numbers[..., 0]
    for axis, side in enumerate(sides[1:], start=1):
        flat = flat * side + numbers[..., axis]
    return flat


def _rows(table: Tensor, index: Tensor) -> Tensor:
    """Rows of [*N, T, H] by [P] or [N, P], to [*N, P, H]; its backward pass is a fast one, unlike `table[index]`'s."""
    if table.ndim == 2:
        return F.embedding(index, table)
    count, length = table.shape[:2]
    offset = torch.arange(count, device=index.device)[:, None] * length
    return F.embedding(index + offset, table.flatten(0, 1))
