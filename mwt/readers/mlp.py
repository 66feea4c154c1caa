"""A plain perceptron on all weights in one vector: what knows nothing of networks."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from mwt.config import ReaderConfig
from mwt.readers.interface import Reader
from mwt.weight_space import Layout, Weights


class MLPReader(Reader):
    """All N weights and biases in one vector, `depth` layers of Linear, ReLU (batch norm, dropout), linear logits.

    The baseline of Navon et al. 2023 (DWSNets) by default; that of Zhou et al. 2023 (NFN) with width=1000, depth=3,
    dropout=0.5. Not invariant to permutations of neurons.

    Parameters: N w + w + (depth - 1) (w^2 + w) + w K + K, and 2 w depth with batch norm, for w = width.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Sizes."""

        width: int = 32
        depth: int = 4
        """Hidden layers."""
        batch_norm: bool = False
        """Between each linear layer and its ReLU."""
        dropout: float = 0.0

    def __init__(self, config: ReaderConfig, *, layout: Layout, classes: int) -> None:
        super().__init__(config, layout=layout, classes=classes)
        options, inputs = self.options, layout.count
        layers: list[nn.Module] = []
        for _ in range(options.depth):
            layers.append(nn.Linear(inputs, options.width))
            if options.batch_norm:
                layers.append(nn.BatchNorm1d(options.width))
            layers.append(nn.ReLU())
            if options.dropout:
                layers.append(nn.Dropout(options.dropout))
            inputs = options.width
        self.layers = nn.Sequential(*layers, nn.Linear(inputs, classes))

    def forward(self, weights: Weights) -> Float[Tensor, "B K"]:
        """Class logits of a batch of networks, or of their offsets."""
        return self.layers(self.inputs(weights).flat())
