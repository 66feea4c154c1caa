"""Functions of points, computed a few points at a time, with memory that does not grow with what happens in between.

Nothing but the inputs is kept for the backward pass, which computes every part anew. It is bounded itself, and so are
derivatives of derivatives: the derivative of such a function is another one. torch.func's transformations are welcome,
but for those of forward mode (jvp). On a CPU small parts are fast, too: what happens in between stays in the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp

Function = Callable[..., tuple[Tensor, ...]]
"""Called with tensors that have points in their axis -2, then with those that all points share. Returns tensors over
the points first, then sums over the points."""

CACHED = 2**17
"""Numbers of an intermediate result on a CPU: half a megabyte in float32."""
ON_DEVICE = 2**24
"""Elsewhere, where many small kernels are slow."""


def bounded(function: Function, over_points: list[Tensor], shared: list[Tensor], *, numbers: int) -> Tensor:
    """`function(*over_points, *shared)`, which returns one tensor over the points, in parts.

    Args:
        function: differentiable, without operations in place, which torch.func.vmap refuses; may have an attribute
            `vjp`, a function of the same kind, called with (*over_points, gradient of the result, *shared), that
            returns the derivatives by all tensors.
        numbers: size of the largest intermediate result at one point. The parts have as many points as
            keep it below `CACHED`, and at least one.
    """
    tensors = [*over_points, *shared]
    limit = CACHED if tensors[0].device.type == "cpu" else ON_DEVICE
    result: Tensor = _Bounded.apply(function, max(1, limit // numbers), len(over_points), 1, *tensors)[0]
    return result


class _Bounded(torch.autograd.Function):
    """The first `inputs` tensors are over the points, as are the first `outputs` results."""

    generate_vmap_rule = True

    @staticmethod
    def forward(function: Function, chunk: int, inputs: int, outputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        pieces: list[tuple[Tensor, ...]] = []
        sums: list[Tensor] = []
        for part in zip(*(tensor.split(chunk, dim=-2) for tensor in tensors[:inputs]), strict=True):
            results = function(*part, *tensors[inputs:])
            pieces.append(results[:outputs])
            rest = list(results[outputs:])
            sums = [total + one for total, one in zip(sums, rest, strict=True)] if sums else rest
        return (*(torch.cat(several, dim=-2) for several in zip(*pieces, strict=True)), *sums)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.function, ctx.chunk, ctx.inputs, ctx.outputs = inputs[:4]
        ctx.save_for_backward(*inputs[4:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        tensors, inputs, outputs = ctx.saved_tensors, ctx.inputs, ctx.outputs
        function = getattr(ctx.function, "vjp", None) or _Derivative(ctx.function, inputs, outputs, len(tensors))
        arranged = (*tensors[:inputs], *gradients[:outputs], *tensors[inputs:], *gradients[outputs:])
        found = _Bounded.apply(function, ctx.chunk, inputs + outputs, inputs, *arranged)
        return (None, None, None, None, *found)


class _Derivative:
    """Derivatives of `function` by all its tensors, as a function of the same kind."""

    def __init__(self, function: Function, inputs: int, outputs: int, count: int) -> None:
        self.function, self.inputs, self.outputs, self.count = function, inputs, outputs, count

    def __call__(self, *arranged: Tensor) -> tuple[Tensor, ...]:
        split = self.inputs + self.outputs
        shared = split + self.count - self.inputs
        _, pull = vjp(self.function, *arranged[: self.inputs], *arranged[split:shared])  # type: ignore[misc]
        found: tuple[Tensor, ...] = pull((*arranged[self.inputs : split], *arranged[shared:]))
        return found
