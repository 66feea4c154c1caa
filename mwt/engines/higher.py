"""The engine for other inner optimizers: any field, by the `higher` library (Grefenstette et al. 2019).

Its optimizers act on each number apart, so one of them over the offsets [B, W] of a batch, with the sum of the losses,
is the same as one for each signal.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from mwt.config import InnerLoopConfig
from mwt.errors import InputError
from mwt.fields import AdaptedField
from mwt.meta_sgd import MetaSGD
from mwt.structs import Fit, Observations

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Python, where it compiles it: its source has `is 1` and stray backslashes
    import higher

MOMENTUM = 0.9
ADAM_BETAS, ADAM_EPSILON = (0.9, 0.999), 1e-8  # torch's own


def make_optimizer(name: str, *, differentiable: bool) -> higher.optim.DifferentiableOptimizer:
    """`higher`'s form of a torch optimizer of one tensor, which is given to it at each step with loss and rates.

    Args:
        name: sgd, momentum or adam.
        differentiable: whether a gradient is to flow through its steps.
    """
    place = [torch.empty(0, requires_grad=True)]
    optimizer: torch.optim.Optimizer
    if name == "adam":
        optimizer = torch.optim.Adam(place, betas=ADAM_BETAS, eps=ADAM_EPSILON)
    else:
        optimizer = torch.optim.SGD(place, momentum=MOMENTUM if name == "momentum" else 0.0)
    return higher.optim.get_diff_optim(optimizer, place, track_higher_grads=differentiable)


def settings(name: str, rates: Tensor, step: int) -> dict[str, list[Any]]:
    """What inner step `step`, counted from 0, sets in the optimizer: its rates [1, W] in place of a learning rate."""
    if name != "adam":
        return {"lr": [rates]}
    # higher adds epsilon before it corrects the second moment, torch afterwards; with this epsilon both are the same.
    correction = 1 - ADAM_BETAS[1] ** (step + 1)
    return {"lr": [rates], "eps": [ADAM_EPSILON * math.sqrt(correction)]}


@torch.compiler.disable(reason="compiled functions have no second derivative; what surrounds the fit compiles")
def fit_higher(
    field: AdaptedField, alpha: MetaSGD, observations: Observations, steps: int, options: InnerLoopConfig
) -> Fit:
    """Fit any field to every signal with `options.optimizer`; see `mwt.inner_loop.fit`.

    The rates of a step stand where the optimizer has its learning rate. First order as in the engine `func`: the inner
    gradients are constants to the outer loss, and the losses before the last have no graph.

    Raises:
        InputError: recomputation is asked for.
    """
    if options.checkpoint:
        raise InputError(
            "inner_loop.checkpoint is not possible with inner_loop.engine=higher; use inner_loop.engine=func, or "
            "analytic for SIREN."
        )
    differentiable = torch.is_grad_enabled()
    optimizer = make_optimizer(options.optimizer, differentiable=differentiable)
    with torch.enable_grad():  # the inner gradient is needed in an evaluation too
        offsets = field.init_offsets(observations.values.shape[0])
        if not offsets.requires_grad:
            offsets = offsets.detach().requires_grad_()
        losses = []
        for step in range(steps):
            coords, values = observations.at(step)
            scale = 1 / (values.shape[-2] * values.shape[-1])

            def divide(gradients: tuple[Tensor], scale: float = scale) -> list[Tensor]:
                return [(g.detach() if options.first_order else g) * scale for g in gradients]

            # The sum of squares, divided afterwards: the gradient of a mean would underflow in half precision.
            squares = (field(offsets, coords) - values).square().sum((-2, -1))
            chosen = settings(options.optimizer, alpha.rates(step), step)
            (offsets,) = optimizer.step(squares.sum(), params=[offsets], override=chosen, grad_callback=divide)
            losses.append((squares if differentiable and not options.first_order else squares.detach()) * scale)
    if not differentiable:
        offsets = offsets.detach()
    coords, values = observations.at(steps)
    prediction = field(offsets, coords)
    losses.append((prediction - values).square().mean((-2, -1)))
    return Fit(offsets=offsets, prediction=prediction, losses=torch.stack(losses, dim=1))
