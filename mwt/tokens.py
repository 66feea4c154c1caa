"""Offsets to tokens (paper, section 3.2): one token per output neuron of each hidden layer."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mwt.siren import Siren


def tokens(siren: Siren, offsets: Float[Tensor, "B W"]) -> Float[Tensor, "B T F"]:
    """Tokens [B, L * H, H + 1]: a neuron's incoming weight offsets, then its bias offset; without the first layer."""
    hidden = siren.unflatten(offsets)[1:]
    return torch.cat([torch.cat([weight.mT, bias[..., None]], dim=-1) for weight, bias in hidden], dim=-2)
