"""The analytic engine: the inner loop of a SIREN with its gradient, and the gradient of that, written down.

The inner gradient of a SIREN under the mean squared error is a short chain of matrix products, and so is the
derivative of that chain. `mwt.engines.sweeps` writes both out, `mwt.engines.steps` makes inner steps of them; here a
step becomes one autograd function, so that one ordinary backward pass of the outer loop goes through all of them,
nothing needs a graph of a graph, sin and cos are computed once, and torch.compile sees plain code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mwt.config import InnerLoopConfig
from mwt.engines import steps as plain
from mwt.engines.steps import Code, Mode, Start
from mwt.engines.sweeps import Layers, Network, States
from mwt.errors import InputError
from mwt.fields import AdaptedField
from mwt.meta_sgd import MetaSGD
from mwt.siren import LayerTensors, Siren
from mwt.structs import Fit, Observations

PART_BYTES = 2**21
"""On a CPU the signals of a batch are fitted in parts whose larger tensors have about this size, so that they are still
in the cache when the next operation reads them."""
MOST_PARTS = 16
"""Each part calls everything once more, which takes its time too."""


class _InnerStep(torch.autograd.Function):
    """`steps.step`; differentiable once, by everything that it begins with. With `keep` False the backward pass
    computes what it needs again."""

    @staticmethod
    def forward(
        ctx: Any, code: Code, keep: bool, mode: Mode, layers: int, coords: Tensor, values: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        with torch.autocast(values.device.type, enabled=False):  # `mode.dtype` says what autocast would
            loss, moved, gradients, states = code.step(mode, Start.of(tensors, layers), coords, values)
        ctx.code, ctx.mode, ctx.layers, ctx.count = code, mode, layers, len(tensors)
        kept = (*gradients.weights, *gradients.biases, *(t for part in states for t in part)) if keep else ()
        ctx.save_for_backward(coords, values, *tensors, *kept)
        return loss, *moved.weights, *moved.biases

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_bar: Tensor, *bars: Tensor) -> tuple[Tensor | None, ...]:
        code, mode, layers = ctx.code, ctx.mode, ctx.layers
        coords, values, *rest = ctx.saved_tensors
        start, kept = Start.of(rest[: ctx.count], layers), rest[ctx.count :]
        with torch.autocast(values.device.type, enabled=False):
            if kept:
                groups = [tuple(kept[i : i + layers]) for i in range(0, len(kept), layers)]
                gradients, states = Layers(*groups[:2]), States(*groups[2:])
            else:
                _, gradients, states = code.gradient(mode, start, coords, values)
            given = Layers(bars[:layers], bars[layers:])
            result = code.step_backward(mode, start, coords, values, gradients, states, loss_bar, given)
        return None, None, None, None, None, None, *result.row()


class _Render(torch.autograd.Function):
    """`sweeps.render_sweep` of networks in one row; differentiable once, by all their tensors."""

    @staticmethod
    def forward(ctx: Any, code: Code, keep: bool, mode: Mode, layers: int, coords: Tensor, *tensors: Tensor) -> Tensor:
        ctx.code, ctx.mode, ctx.layers, ctx.count = code, mode, layers, len(tensors)
        with torch.autocast(coords.device.type, enabled=False):
            prediction, states = code.render(_network(tensors, layers), coords, mode.omega, mode.dtype)
        ctx.save_for_backward(coords, *tensors, *(states.sin + states.cos if keep else ()))
        return prediction

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, bar: Tensor) -> tuple[Tensor | None, ...]:
        code, (omega, dtype, _), layers = ctx.code, ctx.mode, ctx.layers
        coords, *rest = ctx.saved_tensors
        tensors, kept = tuple(rest[: ctx.count]), rest[ctx.count :]
        net = _network(tensors, layers)
        with torch.autocast(coords.device.type, enabled=False):
            if kept:
                states = States(tuple(kept[:layers]), tuple(kept[layers:]), ())
            else:
                _, states = code.render(net, coords, omega, dtype)
            result = code.render_backward(net, coords, omega, dtype, states, bar)
        return None, None, None, None, None, *result.weights, *result.biases, *result[2:]


def _network(tensors: tuple[Tensor, ...], layers: int) -> Network:
    return Network(tensors[:layers], tensors[layers : 2 * layers], *tensors[2 * layers :])


def _layers(tensors: LayerTensors) -> Layers:
    weights, biases = zip(*tensors, strict=True)
    return Layers(weights, biases)


def _dtype(coords: Tensor) -> torch.dtype:
    """That of autocast, if it is on."""
    device = coords.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else coords.dtype


def _head(siren: Siren) -> tuple[Tensor, Tensor, Tensor]:
    return siren.head.weight, siren.head.bias, siren.out_scale


def inner_step(
    siren: Siren,
    base: Layers,
    offsets: Layers | None,
    rates: Layers,
    coords: Tensor,
    values: Tensor,
    *,
    options: InnerLoopConfig | None = None,
) -> tuple[Tensor, Layers]:
    """One step of gradient descent on the mean squared error of each signal (paper, equation 2).

    Differentiable once with respect to base, offsets, rates and the head of `siren`; not by coordinates and values.
    Products between layers are in the dtype of autocast, if it is on.

    Args:
        base: theta, weight [in, out] and bias [out] of each sine layer.
        offsets: how far each signal is from it, [B, in, out] and [B, out]; None where no signal has moved.
        rates: as base; the rate of each number.
        coords: [P, D] or [B, P, D].
        values: [B, P, C].
        options: whether to keep what the backward pass needs, and whether the gradient is differentiated.

    Returns:
        loss [B] before the step; the new offsets.
    """
    options = InnerLoopConfig() if options is None else options
    alike = offsets is None and coords.ndim == 2
    batch, _, channels = values.shape
    if alike and batch < channels:  # the shared sweep costs a chain of products for each channel
        alike = False
    if offsets is None and not alike and coords.ndim == 2:
        coords = coords.expand(batch, -1, -1)  # the sweeps want a batch in the layers or in the coordinates
    code = _code(siren)
    start = Start(base, offsets, rates, _head(siren))
    mode = Mode(siren.omega, _dtype(coords), alike)
    if options.first_order:
        with torch.no_grad(), torch.autocast(coords.device.type, enabled=False):
            loss, gradients, _ = code.gradient(mode, start, coords, values)
        return loss, plain.moved(offsets, rates, gradients, 1 / values[0].numel())
    count = len(base.weights)
    loss, *moved = _InnerStep.apply(code, not options.checkpoint, mode, count, coords, values, *start.row())
    return loss, Layers(tuple(moved[:count]), tuple(moved[count:]))


def _code(siren: Siren) -> Code:
    return plain.compiled() if siren.compiled and siren.training else plain.PLAIN


def _sizes(siren: Siren, observations: Observations) -> list[int]:
    """How many signals are fitted together; equal numbers if possible, for each other one is compiled for itself."""
    batch, coords, index = len(observations.values), observations.coords, observations.index
    if coords.device.type != "cpu":
        return [batch]
    points = coords.shape[-2] if index is None else index.shape[-1]
    largest = points * siren.hidden * _dtype(coords).itemsize
    parts = min(batch, -(-batch * largest // PART_BYTES), MOST_PARTS)
    return [batch * (i + 1) // parts - batch * i // parts for i in range(parts)]


def fit_analytic(
    field: AdaptedField, alpha: MetaSGD, observations: Observations, steps: int, options: InnerLoopConfig
) -> Fit:
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
    siren, base = field, _layers(field.base())
    rates = [_layers(siren.unflatten(alpha.rates(step)[0])) for step in range(steps)]
    sizes = _sizes(siren, observations)
    begun: list[Layers] | None = None
    losses = []
    if observations.coords.ndim == 2 and observations.index is None:  # the one step that is cheaper for all at once
        loss, offsets = inner_step(siren, base, None, rates[0], *observations.at(0), options=options)
        losses.append(loss[:, None])
        begun = _split(offsets, sizes)
    parts, last = [], 0
    for i, size in enumerate(sizes):
        first, last = last, last + size
        mine = observations.signals(first, last)
        parts.append(_fit_part(siren, base, begun[i] if begun else None, rates, mine, options))
    flat, predictions, rest = zip(*parts, strict=True)
    return Fit(
        offsets=torch.cat(flat),
        prediction=torch.cat(predictions),
        losses=torch.cat([*losses, torch.cat(rest)], dim=1),
    )


def _split(layers: Layers, sizes: list[int]) -> list[Layers]:
    """The signals' own layers, in parts of the batch."""
    weights, biases = (list(zip(*(t.split(sizes) for t in tensors), strict=True)) for tensors in layers)
    return [Layers(*pair) for pair in zip(weights, biases, strict=True)]


def _fit_part(
    siren: Siren,
    base: Layers,
    offsets: Layers | None,
    rates: list[Layers],
    observations: Observations,
    options: InnerLoopConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """All steps, or all but the first where offsets are given: offsets [B, W], prediction [B, P, C], losses."""
    losses = []
    for step in range(0 if offsets is None else 1, len(rates)):
        seen = observations.at(step)
        loss, offsets = inner_step(siren, base, offsets, rates[step], *seen, options=options)
        losses.append(loss)
    assert offsets is not None
    coords, values = observations.at(len(rates))
    network = plain.map_layers(torch.add, base, offsets)
    mode = Mode(siren.omega, _dtype(coords), alike=False)
    tensors = (*network.weights, *network.biases, *_head(siren))
    prediction = _Render.apply(_code(siren), not options.checkpoint, mode, len(base.weights), coords, *tensors)
    losses.append((prediction - values).square().mean((-2, -1)))
    flat = siren.flatten(list(zip(offsets.weights, offsets.biases, strict=True)))
    return flat, prediction, torch.stack(losses, dim=1)
