"""Weights to tokens (Gielisse and van Gemert, section 3.2): one token per output neuron of each hidden layer."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mwt.weight_space import Weights


def tokens(weights: Weights) -> Float[Tensor, "B T F"]:
    """Tokens [B, L * H, H + 1]: a neuron's incoming weights, then its bias; first and output layer left out."""
    hidden = [
        torch.cat([weight, bias[..., None]], dim=-1)
        for weight, bias in zip(weights.weights[1:-1], weights.biases[1:-1], strict=True)
    ]
    return torch.cat(hidden, dim=1)
