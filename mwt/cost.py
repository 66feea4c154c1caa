"""What a field costs: multiply-adds (MACs) for a point, parameters, time. `Field.macs_per_point` has the formulas.

What counts as a MAC: an entry of a matrix times an entry of a vector, and a vertex of an interpolation times its
weight. A complex product is four real ones (two, where only the real part is used); publications that count it as one
or two have smaller numbers for WIRE. Biases, activations, encodings of sines, and products of two activations (in
multiplicative filter networks) are not counted. `counted_macs` is torch's own count of the same: it knows no
interpolation, counts a complex product as one, and counts places that a padded batch leaves empty.

ASMR (Li et al., ICLR 2024) shares activations between the samples of a grid, so that its cost is the mean over all
samples. `asmr_macs` is the paper's, which rounds to its tables; `asmr_angle_macs` and `asmr_sines` are of the
evaluation by angle addition.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch.utils.flop_counter import FlopCounterMode

Bases = Sequence[Sequence[int]]
"""For each axis the bases of the levels, coarsest first. Level i divides axis a into C = B_0 ... B_i cells."""


def counted_macs(run: Callable[[], object]) -> int:
    """Multiply-adds of the matrix products of a call, counted by torch as it runs, without a graph."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops() // 2


def latency(run: Callable[[], object], device: torch.device, *, runs: int = 10) -> float:
    """Median seconds of a call, after one that is not counted."""
    times = []
    for _ in range(runs + 1):
        _wait(device)
        began = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- SIREN and ASMR --------------------------------------------------------------------------------------------------


def siren_sizes(dims: int, width: int, layers: int, channels: int) -> list[tuple[int, int]]:
    """Inputs and outputs of each of `layers` linear layers."""
    sizes = [dims, *[width] * (layers - 1), channels]
    return list(pairwise(sizes))


def siren_macs(dims: int, width: int, layers: int, channels: int) -> int:
    """Of `layers` linear layers, the head among them, for one point."""
    return sum(inputs * outputs for inputs, outputs in siren_sizes(dims, width, layers, channels))


def siren_parameters(dims: int, width: int, layers: int, channels: int) -> int:
    """Weights and biases."""
    return sum((inputs + 1) * outputs for inputs, outputs in siren_sizes(dims, width, layers, channels))


def asmr_parameters(bases: Bases, width: int, channels: int) -> int:
    """Those of a SIREN of as many layers as there are levels, and a matrix [D, H] for each level but the first."""
    dims, levels = len(bases), len(bases[0])
    return siren_parameters(dims, width, levels, channels) + (levels - 1) * dims * width


def cells(bases: Bases) -> list[int]:
    """Cells of the whole grid at each level; the last number is that of the samples."""
    levels = len(bases[0])
    return [math.prod(math.prod(axis[: level + 1]) for axis in bases) for level in range(levels)]


def positions(bases: Bases) -> list[int]:
    """Positions within a cell of the level before, for each level: the product of its bases."""
    return [math.prod(level) for level in zip(*bases, strict=True)]


def asmr_macs(bases: Bases, width: int, channels: int, *, with_adds: bool = False) -> float:
    """For a sample, the mean over the grid, as published: layer i is computed once for each cell of level i.

        (sum_i in_i out_i prod_a C_(a,i)  +  sum_(i >= 1) D H prod_a B_(a,i)) / prod_a N_a

    Args:
        bases: for each axis; D axes, as many levels as linear layers.
        with_adds: count the biases' additions, and those of the modulations, too, as the released profiler does.
    """
    dims, grid = len(bases), cells(bases)
    sizes = siren_sizes(dims, width, len(grid), channels)
    total = sum(inputs * outputs * count for (inputs, outputs), count in zip(sizes, grid, strict=True))
    total += sum(dims * width * count for count in positions(bases)[1:])
    if with_adds:
        total += sum(outputs * count for (_, outputs), count in zip(sizes, grid, strict=True))
        total += sum(width * count for count in grid[:-1])
    return total / grid[-1]


def asmr_angle_macs(bases: Bases, width: int, channels: int) -> float:
    """For a sample, where the last sines are evaluated by angle addition.

    The last sines are sin(a + b), a being a cell's of the level before the last and b a position's of the last level.
    With the head's weights w

        sum_h w_h sin(a_h + b_h) = sum_h (w_h sin a_h) cos b_h + (w_h cos a_h) sin b_h,

    one matrix product [cells, 2 H] [2 H, positions] for each channel: 2 H C for a sample instead of the head's H C.
    All else is shared as before. There are more MACs by H C, and hardly any sines (`asmr_sines`), which are what takes
    the time.
    """
    return asmr_macs(bases, width, channels) + width * channels


def asmr_sines(bases: Bases, width: int, *, angle_addition: bool = False) -> float:
    """Sines (and cosines) for a sample: H for each cell of every level but the first; SIREN has (L - 1) H.

    With angle addition the last level's are 2 H for each cell of the level before, and for each position of the last.
    """
    grid = cells(bases)
    total = width * sum(grid[1:-1])
    total += 2 * width * (grid[-2] + positions(bases)[-1]) if angle_addition else width * grid[-1]
    return total / grid[-1]
