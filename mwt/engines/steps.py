"""One inner step of a SIREN, and the derivative of the step, as plain tensor code around `mwt.engines.sweeps`.

A step begins with theta, offsets, rates and head, and gives the error and new offsets; its derivative goes from these
back to those. What is done to whole weights (adding theta, multiplying by rates, summing over signals) is in here with
the products, so that torch.compile sees it together: with few points the weights are the larger tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mwt.engines import sweeps
from mwt.engines.sweeps import Layers, Network, States


class Mode(NamedTuple):
    """How a step is computed."""

    omega: float
    dtype: torch.dtype
    """Of the products between layers."""
    alike: bool
    """The same weights and the same coordinates [P, D] for every signal: the shared first step."""


class Start(NamedTuple):
    """The network that a step begins with, and how far its layers move."""

    base: Layers
    """theta, without a batch"""
    offsets: Layers | None
    """[B, ...]; None: zero"""
    rates: Layers
    """without a batch"""
    head: tuple[Tensor, Tensor, Tensor]
    """weight, bias and output scale"""

    @classmethod
    def of(cls, tensors: Sequence[Tensor], layers: int) -> Start:
        """From base, rates, head and offsets in one row, weights before biases."""
        groups = [Layers(tuple(tensors[i : i + layers]), tuple(tensors[i + layers : i + 2 * layers]))
                  for i in (0, 2 * layers, 4 * layers + 3)]  # fmt: skip
        head = tensors[4 * layers : 4 * layers + 3]
        return cls(groups[0], groups[2] if groups[2].weights else None, groups[1], (head[0], head[1], head[2]))

    def row(self) -> tuple[Tensor, ...]:
        """The inverse of `of`."""
        offsets = () if self.offsets is None else (*self.offsets.weights, *self.offsets.biases)
        return (*self.base.weights, *self.base.biases, *self.rates.weights, *self.rates.biases, *self.head, *offsets)

    @property
    def network(self) -> Network:
        """phi = theta + offsets, with the head."""
        layers = self.base if self.offsets is None else map_layers(torch.add, self.base, self.offsets)
        return Network(*layers, *self.head)


def map_layers(function: Callable[..., Tensor], *layers: Layers) -> Layers:
    """The function of each weight and each bias."""
    return Layers(*(tuple(map(function, *parts)) for parts in zip(*layers, strict=True)))


def gradient(mode: Mode, start: Start, coords: Tensor, values: Tensor) -> tuple[Tensor, Layers, States]:
    """Mean squared error [B], gradients of the summed error, states.

    The sweeps know sums only; the division by points and channels comes last, in full precision, forward and backward.
    """
    sweep = sweeps.shared_forward_sweep if mode.alike else sweeps.forward_sweep
    error, gradients, states = sweep(start.network, coords, values, mode.omega, mode.dtype)
    return error * (1 / values[0].numel()), gradients, states


def step(mode: Mode, start: Start, coords: Tensor, values: Tensor) -> tuple[Tensor, Layers, Layers, States]:
    """Mean squared error [B], offsets after the step, gradients of the summed error, states."""
    loss, gradients, states = gradient(mode, start, coords, values)
    return loss, moved(start.offsets, start.rates, gradients, 1 / values[0].numel()), gradients, states


def moved(offsets: Layers | None, rates: Layers, gradients: Layers, scale: float) -> Layers:
    """The offsets less rates times gradients times `scale`: gradients are of a sum, a step is that of the mean."""
    moves = map_layers(lambda rate, gradient: (-scale * rate) * gradient, rates, gradients)
    return moves if offsets is None else map_layers(torch.add, offsets, moves)


def step_backward(
    mode: Mode,
    start: Start,
    coords: Tensor,
    values: Tensor,
    gradients: Layers,
    states: States,
    error_bar: Tensor,
    bars: Layers,
) -> Start:
    """Derivatives by all that the step begins with, of a loss whose derivatives by error and new offsets are given."""
    sweep = sweeps.shared_backward_sweep if mode.alike else sweeps.backward_sweep
    scale = 1 / values[0].numel()
    given = map_layers(lambda rate, bar: -rate * bar, start.rates, bars)
    result = sweep(start.network, coords, values, mode.omega, mode.dtype, states, error_bar, given)
    rate_bars = map_layers(lambda gradient, bar: -scale * (gradient * bar).sum(0), gradients, bars)
    head = (result.head_weight * scale, result.head_bias * scale, result.out_scale * scale)
    layer_bars = map_layers(lambda bar: bar * scale, Layers(result.weights, result.biases))
    if start.offsets is None:
        return Start(layer_bars, None, rate_bars, head)
    base_bars = map_layers(lambda bar: bar.sum(0), layer_bars)
    return Start(base_bars, map_layers(torch.add, bars, layer_bars), rate_bars, head)


class Code(NamedTuple):
    """The computations of a fit, as they are or compiled. `gradient` alone: first order, and what was not kept."""

    gradient: Callable[..., tuple[Tensor, Layers, States]] = gradient
    step: Callable[..., tuple[Tensor, Layers, Layers, States]] = step
    step_backward: Callable[..., Start] = step_backward
    render: Callable[..., tuple[Tensor, States]] = sweeps.render_sweep
    render_backward: Callable[..., Network] = sweeps.render_backward_sweep


PLAIN = Code()


@cache
def compiled() -> Code:
    """The same, through torch.compile; once for the whole process."""
    functions: list[Callable[..., Any]] = [torch.compile(function, dynamic=False) for function in PLAIN]
    return Code(*functions)
