"""Networks as data: the weights of a batch of SIRENs, what they have in common, and what they draw.

One form for all: the layers of a plain network, sine layers h -> sin(omega_i (W_i h + b_i)) and a linear output layer
h -> W h + b, with weights [out, in] as in `torch.nn.Linear`. A meta-learned SIREN says it through
`Siren.network_weights`, a set of fitted networks on disk through `data_pipes.weights`; readers take nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What the networks of a set have in common."""

    sizes: tuple[int, ...]
    """Neurons of each layer, inputs first: (2, 32, 32, 1) has the weights [32, 2], [32, 32], [1, 32]."""
    omegas: tuple[float, ...]
    """Frequency of each sine layer: sin(omega (W x + b)). One fewer than there are weight matrices."""
    shared_output: bool
    """Whether all networks have the same output layer, as meta-learned SIRENs have: it says nothing of a signal."""

    def __post_init__(self) -> None:
        if len(self.sizes) < 3 or len(self.omegas) != len(self.sizes) - 2:
            raise ValueError(
                f"layers of {self.sizes} neurons have {len(self.sizes) - 2} sine layers, not {self.omegas}"
            )

    @property
    def coordinate_dims(self) -> int:
        """D."""
        return self.sizes[0]

    @property
    def channels(self) -> int:
        """C."""
        return self.sizes[-1]

    @property
    def hidden(self) -> tuple[int, ...]:
        """Widths of the sine layers."""
        return self.sizes[1:-1]

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """[out, in] of each weight matrix, first to last."""
        return list(zip(self.sizes[1:], self.sizes[:-1], strict=True))

    @property
    def count(self) -> int:
        """Weights and biases of one network."""
        return sum(outputs * (inputs + 1) for outputs, inputs in self.shapes)

    def __str__(self) -> str:
        return f"[{', '.join(map(str, self.sizes))}]"


class Weights(NamedTuple):
    """The weights of B networks, layer by layer, the output layer included; or differences of weights, or moments."""

    weights: tuple[Float[Tensor, "B out in"], ...]
    biases: tuple[Float[Tensor, "B out"], ...]

    def map(self, function: Callable[[Tensor], Tensor]) -> Weights:
        """`function` of every tensor."""
        return Weights(tuple(map(function, self.weights)), tuple(map(function, self.biases)))

    def flat(self) -> Float[Tensor, "B N"]:
        """One vector a network: layer by layer the weight [out, in] row-major, then the bias."""
        return torch.cat([part for w, b in zip(*self, strict=True) for part in (w.flatten(-2), b)], dim=-1)

    @staticmethod
    def unflatten(flat: Float[Tensor, "B N"], layout: Layout) -> Weights:
        """The inverse of `flat`."""
        parts = iter(flat.split([count for out, inp in layout.shapes for count in (out * inp, out)], dim=-1))
        pairs = [(next(parts).unflatten(-1, shape), next(parts)) for shape in layout.shapes]
        return Weights(tuple(w for w, _ in pairs), tuple(b for _, b in pairs))


def render(
    layout: Layout, weights: Weights, coords: Float[Tensor, "P D"] | Float[Tensor, "B P D"]
) -> Float[Tensor, "B P C"]:
    """The values of each network at coordinates that all share, or at its own."""
    hidden = coords
    last = len(layout.omegas)
    for i, (weight, bias) in enumerate(zip(*weights, strict=True)):
        hidden = hidden @ weight.mT + bias[..., None, :]
        if i < last:
            hidden = (layout.omegas[i] * hidden).sin()
    return hidden
