"""The gradient that an inner step of the analytic engine takes, by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from mwt.config import InnerLoopConfig
from mwt.engines.analytic import inner_step
from mwt.engines.steps import map_layers
from mwt.engines.sweeps import Layers
from mwt.siren import LayerTensors, Siren


def loss_and_gradient(
    siren: Siren, layers: LayerTensors, coords: Tensor, values: Tensor, *, keep: bool = True
) -> tuple[Tensor, LayerTensors]:
    """Mean squared error [B] and its gradient by sine layers, with or without a batch: a step at rate 1 from nought."""
    given = Layers(*(tuple(tensors) for tensors in zip(*layers, strict=True)))
    own = map_layers(torch.zeros_like, given)
    rates = Layers(*(tuple(torch.ones_like(p) for p in tensors) for tensors in zip(*siren.base(), strict=True)))
    if layers[0][0].ndim == 2:
        base, offsets = given, None
    else:
        base, offsets = map_layers(torch.zeros_like, rates), given
    loss, moved = inner_step(siren, base, offsets, rates, coords, values, options=InnerLoopConfig(checkpoint=not keep))
    gradient = map_layers(torch.sub, own if offsets is None else offsets, moved)
    return loss, list(zip(*gradient, strict=True))
