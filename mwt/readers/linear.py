"""A linear probe on all weights in one vector."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from mwt.config import ReaderConfig
from mwt.readers.interface import Reader
from mwt.weight_space import Layout, Weights


class LinearReader(Reader):
    """Logits that are linear in the weights: N K + K parameters. Not invariant to permutations of neurons."""

    def __init__(self, config: ReaderConfig, *, layout: Layout, classes: int) -> None:
        super().__init__(config, layout=layout, classes=classes)
        self.logits = nn.Linear(layout.count, classes)

    def forward(self, weights: Weights) -> Float[Tensor, "B K"]:
        """Class logits of a batch of networks, or of their offsets."""
        return self.logits(self.inputs(weights).flat())
