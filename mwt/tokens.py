"""Fits to tokens: one for each neuron of the hidden layers (Gielisse and van Gemert, section 3.2), or equal pieces."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from mwt.weight_space import Weights


def tokens(weights: Weights) -> Float[Tensor, "B T F"]:
    """Tokens [B, L * H, H + 1]: a neuron's incoming weights, then its bias; first and output layer left out."""
    hidden = [
        torch.cat([weight, bias[..., None]], dim=-1)
        for weight, bias in zip(weights.weights[1:-1], weights.biases[1:-1], strict=True)
    ]
    return torch.cat(hidden, dim=1)


def chunks(vectors: Float[Tensor, "B W"], size: int) -> Float[Tensor, "B T F"]:
    """Vectors in pieces of `size` numbers, in order; the last one is filled up with zeros."""
    return F.pad(vectors, (0, -vectors.shape[1] % size)).unflatten(1, (-1, size))
