"""The analytic engine: the inner loop of a SIREN with its gradient, and the gradient of that, written down.

The inner gradient of a SIREN under the mean squared error is a short chain of matrix products, and so is the
derivative of that chain. `mwt.engines.sweeps` writes both out; here they become one autograd function, so that one
ordinary backward pass of the outer loop goes through all inner steps, nothing needs a graph of a graph, sin and cos
are computed once, and torch.compile sees plain code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mwt.config import InnerLoopConfig
from mwt.engines import sweeps
from mwt.engines.sweeps import Gradients, Network, States
from mwt.errors import InputError
from mwt.fields import Field
from mwt.meta_sgd import MetaSGD
from mwt.siren import LayerTensors, Siren
from mwt.structs import Fit, Observations


class Sweeps(NamedTuple):
    """A forward sweep and the backward sweep that belongs to it."""

    forward: Callable[..., tuple[Tensor, Gradients, States]]
    backward: Callable[..., Network]


SHARED = Sweeps(sweeps.shared_forward_sweep, sweeps.shared_backward_sweep)
"""For the same weights at the same points for every signal."""
OWN = Sweeps(sweeps.forward_sweep, sweeps.backward_sweep)


@cache
def compiled(pair: Sweeps) -> Sweeps:
    """The same, through torch.compile; once for the whole process."""
    return Sweeps(torch.compile(pair.forward, dynamic=False), torch.compile(pair.backward, dynamic=False))


@cache
def compiled_render() -> Callable[..., Tensor]:
    """`Siren.render`, through torch.compile."""
    return torch.compile(Siren.render, dynamic=False)


class _ErrorAndGradient(torch.autograd.Function):
    """Mean squared error of each signal and its gradient by the sine layers; differentiable once, by all parameters.

    The sweeps know sums only; the division by points and channels comes last, in full precision, forward and backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        pair: Sweeps,
        omega: float,
        dtype: torch.dtype,
        keep: bool,
        coords: Tensor,
        values: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        net = _network(tensors)
        with torch.autocast(coords.device.type, enabled=False):  # `dtype` says what autocast would
            error, gradients, states = pair.forward(net, coords, values, omega, dtype)
        ctx.pair, ctx.omega, ctx.dtype, ctx.count = pair, omega, dtype, len(tensors)
        kept = (*states.sin, *states.cos, *states.upstream) if keep else ()
        ctx.save_for_backward(coords, values, *tensors, *kept)
        scale = 1 / values[0].numel()
        return tuple(x * scale for x in (error, *gradients.weights, *gradients.biases))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, error_bar: Tensor, *bars: Tensor) -> tuple[Tensor | None, ...]:
        coords, values, *rest = ctx.saved_tensors
        net, kept = _network(rest[: ctx.count]), rest[ctx.count :]
        layers = len(net.weights)
        given = Gradients(bars[:layers], bars[layers:])
        with torch.autocast(coords.device.type, enabled=False):
            if kept:
                states = States(*(tuple(kept[i : i + layers]) for i in range(0, 3 * layers, layers)))
            else:
                _, _, states = ctx.pair.forward(net, coords, values, ctx.omega, ctx.dtype)
            result = ctx.pair.backward(net, coords, values, ctx.omega, ctx.dtype, states, error_bar, given)
        scale = 1 / values[0].numel()
        flat = (*result.weights, *result.biases, result.head_weight, result.head_bias, result.out_scale)
        return None, None, None, None, None, None, *(x * scale for x in flat)


def _network(tensors: Sequence[Tensor]) -> Network:
    """From weights, biases, head weight, head bias and output scale in one row."""
    layers = (len(tensors) - 3) // 2
    return Network(tuple(tensors[:layers]), tuple(tensors[layers : 2 * layers]), *tensors[2 * layers :])


def loss_and_gradient(
    siren: Siren, layers: LayerTensors, coords: Tensor, values: Tensor, *, keep: bool = True, fast: bool = False
) -> tuple[Tensor, LayerTensors]:
    """Mean squared error of each signal and its gradient with respect to the sine layers (paper, equation 2).

    Differentiable once with respect to `layers` and the parameters of `siren`; not by coordinates and values. Products
    between layers are in the dtype of autocast, if it is on.

    Args:
        layers: weight [in, out] or [B, in, out] and bias [out] or [B, out] of each sine layer.
        coords: [P, D] or [B, P, D].
        values: [B, P, C].
        keep: keep what the backward pass needs, else compute it again there.
        fast: through torch.compile.

    Returns:
        loss [B]; gradients, weight [B, in, out] and bias [B, out] of each layer.
    """
    device = coords.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else coords.dtype
    batch, _, channels = values.shape
    alike = coords.ndim == 2 and layers[0][0].ndim == 2
    if alike and batch < channels:  # the shared sweep costs a chain of products for each channel
        coords, alike = coords.expand(batch, -1, -1), False
    pair = SHARED if alike else OWN
    weights, biases = zip(*layers, strict=True)
    shared = (siren.head.weight, siren.head.bias, siren.out_scale)
    loss, *gradients = _ErrorAndGradient.apply(
        compiled(pair) if fast else pair, siren.omega, dtype, keep, coords, values, *weights, *biases, *shared
    )
    return loss, list(zip(gradients[: len(layers)], gradients[len(layers) :], strict=True))


def fit_analytic(field: Field, alpha: MetaSGD, observations: Observations, steps: int, options: InnerLoopConfig) -> Fit:
    """Fit a SIREN to every signal; see `mwt.inner_loop.fit`.

    Raises:
        InputError: the field is not a SIREN, or the inner optimizer not gradient descent.
    """
    if not isinstance(field, Siren):
        raise InputError(
            f"inner_loop.engine=analytic is written for SIREN, not for {type(field).__name__}; use func or higher."
        )
    if options.optimizer != "sgd":
        raise InputError(f"inner_loop.optimizer={options.optimizer} needs inner_loop.engine=higher, not analytic.")
    siren = field
    fast = siren.compiled and torch.is_grad_enabled()
    offsets: LayerTensors = []
    losses = []
    layers = siren.base()
    for step in range(steps):
        with torch.set_grad_enabled(torch.is_grad_enabled() and not options.first_order):
            loss, gradients = loss_and_gradient(
                siren, layers, *observations.at(step), keep=not options.checkpoint, fast=fast
            )
        losses.append(loss)
        rates = siren.unflatten(alpha.rates(step)[0])
        updates = [(rw * gw, rb * gb) for (rw, rb), (gw, gb) in zip(rates, gradients, strict=True)]
        if step == 0:
            offsets = [(-uw, -ub) for uw, ub in updates]
        else:
            offsets = [(w - uw, b - ub) for (w, b), (uw, ub) in zip(offsets, updates, strict=True)]
        layers = siren.adapted(offsets)
    coords, values = observations.at(steps)
    prediction = (compiled_render() if fast else Siren.render)(siren, layers, coords)
    losses.append((prediction - values).square().mean((-2, -1)))
    return Fit(offsets=siren.flatten(offsets), prediction=prediction, losses=torch.stack(losses, dim=1))
