"""The generic engine: the inner loop of any field, its gradient taken by torch.func.

Each signal's loss is a function of its own offsets alone, so that the gradient of their sum is every signal's own;
`grad_and_value` differentiates it. An outer backward pass goes through it, so the result is exact to second order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call, grad_and_value

from mwt.config import InnerLoopConfig
from mwt.errors import InputError
from mwt.fields import AdaptedField
from mwt.meta_sgd import MetaSGD
from mwt.structs import Fit, Observations

Parameters = dict[str, Tensor]


def loss_and_gradient(
    field: nn.Module, parameters: Parameters, offsets: Tensor, coords: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean squared error of each signal and its gradient with respect to the signal's offsets.

    The gradient is of the *sum* of squares and divided afterwards: that of a mean over 100,000 pixels would underflow
    in half precision.

    Args:
        parameters: what stands in for the field's own parameters, by name.
        offsets: [B, W].
        coords: [P, D], or [B, P, D] where signals differ.
        values: [B, P, C].

    Returns:
        loss [B]; gradient [B, W].
    """

    def squares(offsets: Tensor) -> tuple[Tensor, Tensor]:
        each = (functional_call(field, parameters, (offsets, coords)) - values).square().sum((-1, -2))
        return each.sum(), each

    gradient, (_, loss) = grad_and_value(squares, has_aux=True)(offsets)
    scale = 1 / (values.shape[-2] * values.shape[-1])
    return loss * scale, gradient * scale


class _Recomputed(torch.autograd.Function):
    """A function of tensors that keeps its inputs only, and is computed again in the backward pass.

    In place of `torch.utils.checkpoint`, whose hooks on saved tensors torch.func refuses. Fields draw no random
    numbers, so no generator's state is kept.
    """

    @staticmethod
    def forward(function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
        return function(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.function = inputs[0]
        ctx.save_for_backward(*inputs[1:])
        kind = inputs[1].device.type
        # The backward pass runs outside the caller's autocast, and is to round as the forward pass did.
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))

    @staticmethod
    @once_differentiable  # it runs once more without a graph: a second derivative of the outer loss would be wrong
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        leaves = [t.detach().requires_grad_(need) for t, need in zip(ctx.saved_tensors, needed, strict=True)]
        with torch.enable_grad(), torch.autocast(*ctx.autocast):
            outputs = ctx.function(*leaves)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        live = [pair for pair in zip(outputs, upstream, strict=True) if pair[0].requires_grad]  # the first loss may not
        outputs, upstream = zip(*live, strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, upstream, allow_unused=True))
        return None, *(next(found) if need else None for need in needed)


@torch.compiler.disable(reason="a gradient taken within a backward pass is not traced; what surrounds it compiles")
def recomputed(function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """`function(*tensors)`, of which only `tensors` are kept for the backward pass."""
    return _Recomputed.apply(function, *tensors)


def fit_func(
    field: AdaptedField, alpha: MetaSGD, observations: Observations, steps: int, options: InnerLoopConfig
) -> Fit:
    """Fit any field to every signal; see `mwt.inner_loop.fit`.

    With `options.first_order` the inner gradients are constants to the outer loss: the rates' gradient is what they
    are multiplied with, and the field's parameters have theirs through the final evaluation. The losses before the
    last are then numbers without a graph.

    Raises:
        InputError: an inner optimizer other than gradient descent.
    """
    if options.optimizer != "sgd":
        raise InputError(
            f"inner_loop.optimizer is {options.optimizer}, and inner_loop.engine=func has gradient descent (sgd) "
            "only; use inner_loop.engine=higher."
        )
    module = cast(nn.Module, field)
    names = [name for name, _ in module.named_parameters()]

    def step(offsets: Tensor, rates: Tensor, coords: Tensor, values: Tensor, *own: Tensor) -> tuple[Tensor, Tensor]:
        if options.first_order:
            constants = {name: tensor.detach() for name, tensor in zip(names, own, strict=True)}
            loss, gradient = loss_and_gradient(module, constants, offsets.detach(), coords, values)
        else:
            loss, gradient = loss_and_gradient(module, dict(zip(names, own, strict=True)), offsets, coords, values)
        return offsets - rates * gradient, loss

    offsets = field.init_offsets(observations.values.shape[0])
    losses = []
    # With first order no step leaves anything behind that could be computed again.
    recompute = options.checkpoint and not options.first_order and torch.is_grad_enabled()
    for number in range(steps):
        inputs = (offsets, alpha.rates(number), *observations.at(number), *module.parameters())
        if recompute:
            offsets, loss = recomputed(step, *inputs)
        else:
            offsets, loss = step(*inputs)
        losses.append(loss)
    coords, values = observations.at(steps)
    prediction = field(offsets, coords)
    losses.append((prediction - values).square().mean((-2, -1)))
    return Fit(offsets=offsets, prediction=prediction, losses=torch.stack(losses, dim=1))
