"""inr2vec (De Luigi et al., ICLR 2023): rows of the hidden layers, a perceptron on each, the maximum over all."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mwt.config import ReaderConfig
from mwt.errors import InputError
from mwt.readers.two_phase import TwoPhaseReader
from mwt.weight_space import Layout, Weights


class RowEncoder(nn.Module):
    """Code of a network: `Linear, batch norm, ReLU` four times and a `Linear` on every row, maximum over rows."""

    def __init__(self, inputs: int, width: int, code: int) -> None:
        super().__init__()
        sizes = (inputs, width, width, 2 * width, 2 * width)
        self.linears = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.norms = nn.ModuleList(nn.BatchNorm1d(size) for size in sizes[1:])
        self.code = nn.Linear(2 * width, code)

    def forward(self, weights: Weights) -> Float[Tensor, "B code"]:
        """Codes of a batch of networks."""
        x = rows(weights)
        count = x.shape[1]
        x = x.flatten(0, 1)  # batch norm over the rows of all networks together
        for linear, norm in zip(self.linears, self.norms, strict=True):
            x = F.relu(norm(linear(x)))
        return self.code(x).unflatten(0, (-1, count)).amax(1)


def rows(weights: Weights) -> Float[Tensor, "B R H"]:
    """The rows of each hidden matrix, and its bias as one more: R = (H + 1) per layer. First and last are left out."""
    hidden = [
        torch.cat([weight, bias[:, None]], dim=1)
        for weight, bias in zip(weights.weights[1:-1], weights.biases[1:-1], strict=True)
    ]
    return torch.cat(hidden, dim=1)


class FieldDecoder(nn.Module):
    """Values of a field from its code and encoded coordinates: two and two hidden layers, the input added between."""

    def __init__(self, layout: Layout, code: int, width: int, frequencies: int) -> None:
        super().__init__()
        self.frequencies = frequencies
        inputs = code + layout.coordinate_dims * (1 + 2 * frequencies)
        self.first, self.skip = nn.Linear(inputs, width), nn.Linear(inputs, width)
        self.before, self.after = (nn.ModuleList(nn.Linear(width, width) for _ in range(2)) for _ in range(2))
        self.values = nn.Linear(width, layout.channels)

    def forward(self, code: Float[Tensor, "B code"], coords: Float[Tensor, "P D"]) -> Float[Tensor, "B P C"]:
        """What each code draws at coordinates that all share."""
        places = positional_encoding(coords, self.frequencies)
        count, points = len(code), len(places)
        inputs = torch.cat([code[:, None].expand(-1, points, -1), places.expand(count, -1, -1)], dim=-1)
        x = F.relu(self.first(inputs))
        for layer in self.before:
            x = F.relu(layer(x))
        x = x + F.relu(self.skip(inputs))
        for layer in self.after:
            x = F.relu(layer(x))
        return self.values(x)


def positional_encoding(coords: Float[Tensor, "P D"], frequencies: int) -> Float[Tensor, "P D_encoded"]:
    """x, then sin(2^k x) and cos(2^k x) for k below `frequencies` (Mildenhall et al. 2020, without the factor pi)."""
    angles = coords[..., None] * 2.0 ** torch.arange(frequencies, device=coords.device, dtype=coords.dtype)
    return torch.cat([coords, angles.sin().flatten(-2), angles.cos().flatten(-2)], dim=-1)


class Inr2VecReader(TwoPhaseReader):
    """inr2vec: an auto-encoder of fields whose encoder sees weights, then a classifier on its frozen codes.

    The defaults are the published sizes. The decoder's loss is the mean squared error of the field's values; the paper
    has losses for distance, occupancy and radiance. Hidden layers only, all equally wide.

    The rows of all layers are one set: the code does not change under any permutation of rows, which does change the
    network, but does under the permutations of neurons that do not change it, as these also permute columns. It is
    meant for networks that share their initialisation.

    Parameters, with H the hidden width, w = width, c = code, d = decoder_width, e = D (1 + 2 frequencies), C channels:
    encoder (H w + w) + (w^2 + w) + (2 w^2 + 2 w) + (4 w^2 + 2 w) + 12 w + 2 w c + c; decoder
    2 ((c + e) d + d) + 4 (d^2 + d) + d C + C; classifier c c/2 + c c/8 + K c/4 + 9 c/4 + K.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Sizes."""

        width: int = 512
        """Of the first two layers on each row; the next two are twice as wide."""
        code: int = 1024
        decoder_width: int = 512
        frequencies: int = 10
        dropout: float = 0.5
        """In the classifier."""

    def __init__(self, config: ReaderConfig, *, layout: Layout, classes: int) -> None:
        super().__init__(config, layout=layout, classes=classes)
        if len(layout.hidden) < 2 or len(set(layout.hidden)) > 1:
            raise InputError(
                f"reader.name=inr2vec stacks the rows of hidden layers of one width; these networks are {layout}. It "
                "takes two sine layers or more, all equally wide."
            )
        options, code = self.options, self.options.code
        if code % 4:
            raise InputError(f"reader.options.code is {code}; it must be a multiple of 4.")
        self.encoder = RowEncoder(layout.hidden[0], options.width, code)
        self.decoder = FieldDecoder(layout, code, options.decoder_width, options.frequencies)
        self.classifier = nn.Sequential(
            nn.Linear(code, code // 2), nn.BatchNorm1d(code // 2), nn.ReLU(), nn.Dropout(options.dropout),
            nn.Linear(code // 2, code // 4), nn.BatchNorm1d(code // 4), nn.ReLU(), nn.Dropout(options.dropout),
            nn.Linear(code // 4, classes),
        )  # fmt: skip
