"""Offsets to tokens (paper, section 3.2): one token per output neuron of each hidden layer."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from mwt.siren import Siren


def tokens(siren: Siren, offsets: Float[Tensor, "B W"]) -> Float[Tensor, "B T F"]:
    """Tokens [B, L * H, H + 1]: a neuron's incoming weight offsets, then its bias offset; without the first layer."""
    hidden = siren.hidden
    rows = offsets[:, -siren.hidden_layers * (hidden + 1) * hidden :]  # of each layer the weight [in, out], the bias
    return rows.unflatten(1, (-1, hidden + 1, hidden)).mT.flatten(1, 2)
