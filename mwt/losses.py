"""The outer losses, and how the classification gradient is weighted where it enters the fit."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from mwt.structs import Losses, Output


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.weight = inputs[1]  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.weight, None  # type: ignore[attr-defined]


def scale_gradient(x: Float[Tensor, "B W"], weight: float) -> Float[Tensor, "B W"]:
    """`x`, whose gradient is multiplied by `weight` on the way back; 0 detaches.

    At the boundary between fit and reader this gives the SIREN and the learned rates w_cls times the classification
    gradient and the reader the plain one (paper, equations 3 to 6), with one backward pass instead of two.
    """
    if weight == 0:
        return x.detach()
    return _ScaleGradient.apply(x, weight)


def outer_losses(output: Output, labels: Int[Tensor, " B"]) -> Losses:
    """Cross entropy of the logits and mean squared error after the last inner step, both means over the batch."""
    logits = output.logits
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return Losses(
        classification=F.cross_entropy(logits, labels),
        reconstruction=output.fit.losses[:, -1].mean(),
    )
