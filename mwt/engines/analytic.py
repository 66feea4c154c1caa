"""The analytic engine: the inner loop of a SIREN, with the gradient written down.

The inner gradient of a SIREN under the mean squared error is a short chain of matrix products. It is written out here
as ordinary forward code, so that one ordinary backward pass differentiates through all steps and nothing needs a
second-order graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mwt.config import InnerLoopConfig
from mwt.errors import InputError
from mwt.fields import Field
from mwt.meta_sgd import MetaSGD
from mwt.siren import LayerTensors, Siren
from mwt.structs import Fit, Observations


def loss_and_gradient(
    siren: Siren, layers: LayerTensors, coords: Tensor, values: Tensor
) -> tuple[Tensor, LayerTensors]:
    """Mean squared error of each signal and its gradient with respect to the sine layers (paper, equation 2).

    The residual is left undivided until the end: the gradient of a *sum* of squares does not underflow in half
    precision, that of a mean over 100,000 pixels does.

    Args:
        layers: weight [in, out] or [B, in, out] and bias of each sine layer.
        coords: [P, D] or [B, P, D].
        values: [B, P, C].

    Returns:
        loss [B]; gradients, weight [B, in, out] and bias [B, out] of each layer.
    """
    prediction, states = siren.activate(layers, coords)
    residual = prediction - values
    scale = 1 / (values.shape[-2] * values.shape[-1])
    loss = residual.square().sum((-2, -1)) * scale

    upstream = (residual * (2 * siren.out_scale)) @ siren.head.weight
    gradients: LayerTensors = []
    for i in range(len(layers) - 1, 0, -1):
        pre = upstream * states[i][1]
        weight_gradient = states[i - 1][0].mT @ pre
        # Out of half precision before the division, which would underflow there.
        gradients.append((weight_gradient.to(loss.dtype) * scale, pre.sum(-2, dtype=loss.dtype) * scale))
        upstream = pre @ layers[i][0].mT
    pre = upstream.to(coords.dtype) * states[0][1]
    scale *= siren.omega
    # In full precision as in the forward pass; an outer autocast would round the coordinates.
    with torch.autocast(coords.device.type, enabled=False):
        gradients.append(((coords.mT @ pre) * scale, pre.sum(-2) * scale))
    return loss, gradients[::-1]


def fit_analytic(field: Field, alpha: MetaSGD, observations: Observations, steps: int, options: InnerLoopConfig) -> Fit:
    """Fit a SIREN to every signal; see `mwt.inner_loop.fit`.

    Raises:
        InputError: the field is not a SIREN.
    """
    if not isinstance(field, Siren):
        raise InputError(
            f"inner_loop.engine=analytic is written for SIREN, not for {type(field).__name__}; use func or higher."
        )
    offsets: LayerTensors = []
    losses = []
    siren = field
    layers = siren.base()
    for step in range(steps):
        loss, gradients = loss_and_gradient(siren, layers, *observations.at(step))
        losses.append(loss)
        rates = siren.unflatten(alpha.rates(step)[0])
        updates = [(rw * gw, rb * gb) for (rw, rb), (gw, gb) in zip(rates, gradients, strict=True)]
        if step == 0:
            offsets = [(-uw, -ub) for uw, ub in updates]
        else:
            offsets = [(w - uw, b - ub) for (w, b), (uw, ub) in zip(offsets, updates, strict=True)]
        layers = siren.adapted(offsets)
    coords, values = observations.at(steps)
    prediction, _ = siren.activate(layers, coords)
    losses.append((prediction - values).square().mean((-2, -1)))
    return Fit(offsets=siren.flatten(offsets), prediction=prediction, losses=torch.stack(losses, dim=1))
