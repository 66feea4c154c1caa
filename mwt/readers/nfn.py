"""Neural functional networks: NFN_NP and NFN_HNP (Zhou et al. 2023, Permutation Equivariant Neural Functionals).

Layers that map features of every weight [B, C, out, in] and bias [B, C, out] to features of the same, linearly, and
commute with permutations of neurons; then means over what may be permuted, and an MLP. NP lets input and output
coordinates be permuted as well, as their image classifiers do unless the coordinates are encoded (`io_encoding`);
HNP permutes hidden neurons only. A layer costs a few products of the channels with each tensor; no pair of weights
meets.

Presets:
    The head that MWT compares with (its table 5): the defaults, with reader.input=scale (times 500). On
    [2, 128 x 5, 3] with ten classes it has 1,774,346 (NP) and 3,566,154 (HNP) parameters, as the paper's 1.8M and 3.6M.
    The authors' SIREN classifier: reader.options.fourier=128 fourier_scale=3 (10 for CIFAR-10) io_encoding=true
    channels=512 head=1000 dropout=0.5, with reader.input=standardise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mwt.config import ReaderConfig
from mwt.errors import InputError
from mwt.readers.interface import Reader, pooled_standardiser
from mwt.weight_space import Layout, Weights

Shapes = list[tuple[int, int]]


class Mix(nn.Linear):
    """A linear map of the channels: [B, C, ...] to [B, C', ...]."""

    def forward(self, x: Float[Tensor, "B C ..."]) -> Float[Tensor, "B C2 ..."]:
        """The same map at every place."""
        if x.ndim == 2:
            return super().forward(x)
        mixed = self.weight @ x.flatten(2) + self.bias[:, None]
        return mixed.unflatten(2, x.shape[2:])


def start_alike(*maps: Mix) -> None:
    """Initial weights and biases of maps whose results are added: U(+-1 / sqrt(all their inputs together))."""
    bound = 1 / math.sqrt(sum(m.in_features for m in maps))
    for m in maps:
        for parameter in m.parameters():
            nn.init.uniform_(parameter, -bound, bound)


class Inner(nn.Module):
    """One weight matrix with permutable rows and columns, and its bias.

    A weight gets a term of itself, one of its column (what is known of the neuron it comes from), one of its row (the
    neuron it goes to), and one of the whole network; a bias gets those of its neuron and of the network.
    """

    def __init__(self, channels: int, columns: int, rows: int, whole: int, out: int) -> None:
        super().__init__()
        self.itself, self.column = Mix(channels, out), Mix(columns, out)
        self.row, self.whole = Mix(rows, out), Mix(whole, out)
        self.bias_row, self.bias_whole = Mix(rows, out), Mix(whole, out)
        start_alike(self.itself, self.whole, self.column, self.row)
        start_alike(self.bias_row, self.bias_whole)

    def forward(self, weight: Tensor, columns: Tensor, rows: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
        """New features of the weight [B, C', out, in] and of the bias [B, C', out]."""
        of_row = self.row(rows) + self.whole(whole)[..., None]
        new = self.itself(weight) + self.column(columns)[..., None, :] + of_row[..., None]
        return new, self.bias_row(rows) + self.bias_whole(whole)[..., None]


def means(weights: Weights) -> tuple[list[Tensor], list[Tensor]]:
    """Of every weight feature [B, C, out, in]: the mean over inputs [B, C, out] and over outputs [B, C, in]."""
    return [w.mean(-1) for w in weights.weights], [w.mean(-2) for w in weights.weights]


class NPLinear(nn.Module):
    """The linear layer that commutes with permutations of all neurons, inputs and outputs too."""

    def __init__(self, shapes: Shapes, channels: int, out: int) -> None:
        super().__init__()
        last = len(shapes) - 1
        self.layers = nn.ModuleList(
            Inner(
                channels,
                columns=channels * (1 if i == 0 else 3),
                rows=channels * (2 if i == last else 3),
                whole=channels * 2 * len(shapes),
                out=out,
            )
            for i in range(len(shapes))
        )

    def forward(self, features: Weights) -> Weights:
        """Features [B, C, ...] to features [B, C', ...]."""
        weights, biases = features
        over_in, over_out = means(features)
        whole = torch.cat([m.mean(-1) for m in over_in] + [b.mean(-1) for b in biases], dim=1)
        new_weights, new_biases = [], []
        for i, layer in enumerate(self.layers):
            columns, rows = [over_out[i]], [over_in[i], biases[i]]
            if i > 0:
                columns += [over_in[i - 1], biases[i - 1]]
            if i < len(weights) - 1:
                rows += [over_out[i + 1]]
            weight, bias = layer(weights[i], torch.cat(columns, 1), torch.cat(rows, 1), whole)
            new_weights.append(weight)
            new_biases.append(bias)
        return Weights(tuple(new_weights), tuple(new_biases))


class HNPLinear(nn.Module):
    """The linear layer that commutes with permutations of hidden neurons only.

    The input axis of the first matrix and the output axis of the last are channels: [B, C, out, in] is [B, C in, out]
    there, and a bias of the output is [B, C out]. As in the authors' code, the last matrix sees the bias before it
    through the network's mean only.
    """

    def __init__(self, shapes: Shapes, channels: int, out: int) -> None:
        super().__init__()
        self.inputs, self.outputs = shapes[0][1], shapes[-1][0]
        matrices = len(shapes)
        first, last = self.inputs * channels, self.outputs * channels
        whole = 2 * matrices * channels + first + 2 * last
        alone = matrices == 2  # one hidden layer: both end matrices meet in it
        after_first = first + 2 * channels + (last if alone else 0)
        before_last = last + channels + (first if alone else 0)
        self.first, self.first_whole = Mix(after_first, self.inputs * out), Mix(whole, self.inputs * out)
        self.first_bias, self.first_bias_whole = Mix(after_first, out), Mix(whole, out)
        self.inner = nn.ModuleList(
            Inner(
                channels,
                columns=3 * channels + (first if i == 1 else 0),
                rows=3 * channels + (last if i == matrices - 2 else 0),
                whole=whole,
                out=out,
            )
            for i in range(1, matrices - 1)
        )
        self.last, self.last_whole = Mix(before_last, self.outputs * out), Mix(whole, self.outputs * out)
        self.last_bias = Mix(whole, self.outputs * out)
        start_alike(self.first, self.first_whole)
        start_alike(self.first_bias, self.first_bias_whole)
        start_alike(self.last, self.last_whole)
        start_alike(self.last_bias)

    def forward(self, features: Weights) -> Weights:
        """Features [B, C, ...] to features [B, C', ...]."""
        weights, biases = features
        over_in, over_out = means(features)
        first = weights[0].mT.flatten(1, 2)
        last = weights[-1].flatten(1, 2)
        ends = [over_out[0].flatten(1), over_in[-1].flatten(1), biases[-1].flatten(1)]
        whole = torch.cat([m.mean(-1) for m in over_in] + [b.mean(-1) for b in biases] + ends, dim=1)
        alone = len(weights) == 2

        near = torch.cat([first, over_out[1], biases[0], *([last] if alone else [])], dim=1)
        weight = self.first(near) + self.first_whole(whole)[..., None]
        new_weights = [weight.unflatten(1, (-1, self.inputs)).mT]
        new_biases = [self.first_bias(near) + self.first_bias_whole(whole)[..., None]]
        for i, layer in enumerate(self.inner, start=1):
            columns = [over_out[i], over_in[i - 1], biases[i - 1], *([first] if i == 1 else [])]
            rows = [over_in[i], biases[i], over_out[i + 1], *([last] if i == len(weights) - 2 else [])]
            weight, bias = layer(weights[i], torch.cat(columns, 1), torch.cat(rows, 1), whole)
            new_weights.append(weight)
            new_biases.append(bias)
        near = torch.cat([last, over_in[-2], *([first] if alone else [])], dim=1)
        weight = self.last(near) + self.last_whole(whole)[..., None]
        new_weights.append(weight.unflatten(1, (-1, self.outputs)))
        new_biases.append(self.last_bias(whole).unflatten(1, (-1, self.outputs)))
        return Weights(tuple(new_weights), tuple(new_biases))


def np_pool(features: Weights) -> Float[Tensor, "B C M"]:
    """The mean of every weight and of every bias: M = 2 x matrices."""
    return torch.stack([m for w, b in zip(*features, strict=True) for m in (w.mean((-2, -1)), b.mean(-1))], dim=-1)


def hnp_pool(features: Weights) -> Float[Tensor, "B C M"]:
    """Means over hidden neurons only: one value an input of the first matrix and an output of the last and its bias."""
    weights, biases = features
    inner = zip(weights[1:-1], biases[1:-1], strict=True)
    parts = [weights[0].mean(-2), biases[0].mean(-1, keepdim=True)]
    parts += [m[..., None] for w, b in inner for m in (w.mean((-2, -1)), b.mean(-1))]
    return torch.cat([*parts, weights[-1].mean(-1), biases[-1]], dim=-1)


class FourierFeatures(nn.Module):
    """Random Fourier features of the channels (Tancik et al. 2020): sin and cos of 2 pi B x, B ~ N(0, scale^2)."""

    frequencies: Tensor

    def __init__(self, channels: int, count: int, scale: float) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(count, channels) * scale)

    def forward(self, features: Weights) -> Weights:
        """[B, C, ...] to [B, 2 count, ...]; always in full precision, for half has too few digits for many turns."""

        def encode(x: Tensor) -> Tensor:
            with torch.autocast(x.device.type, enabled=False):
                angles = 2 * math.pi * (self.frequencies @ x.flatten(2))
                return torch.cat([angles.sin(), angles.cos()], dim=1).unflatten(2, x.shape[2:])

        return features.map(encode)


class IOEncoding(nn.Module):
    """Appends to each feature sinusoids that say of which layer it is, and of which input or output coordinate."""

    BANDS = 6
    HIGHEST = 10
    CHANNELS = 2 * BANDS + 1

    layer_codes: Tensor
    input_codes: Tensor
    output_codes: Tensor

    def _code(self, count: int) -> Float[Tensor, "E count"]:
        place = torch.linspace(-1, 1, count, dtype=torch.float64)
        angles = place * torch.linspace(1, self.HIGHEST / 2, self.BANDS, dtype=torch.float64)[:, None] * math.pi
        return torch.cat([angles.sin(), angles.cos(), place[None]]).to(torch.get_default_dtype())

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        for name, count in (("layer", len(shapes)), ("input", shapes[0][1]), ("output", shapes[-1][0])):
            self.register_buffer(f"{name}_codes", self._code(count), persistent=False)

    def forward(self, features: Weights) -> Weights:
        """[B, C, ...] to [B, C + CHANNELS, ...]."""
        layer, inputs, outputs = self.layer_codes, self.input_codes, self.output_codes
        new_weights, new_biases = [], []
        last = len(features.weights) - 1
        for i, (w, b) in enumerate(zip(*features, strict=True)):
            weight_code, bias_code = layer[:, i, None, None], layer[:, i, None]
            if i == 0:
                weight_code = weight_code + inputs[:, None, :]
            if i == last:
                weight_code, bias_code = weight_code + outputs[:, :, None], bias_code + outputs
            new_weights.append(torch.cat([w, weight_code.expand(len(w), -1, *w.shape[2:])], dim=1))
            new_biases.append(torch.cat([b, bias_code.expand(len(b), -1, *b.shape[2:])], dim=1))
        return Weights(tuple(new_weights), tuple(new_biases))


class NFNReader(Reader):
    """Encodings, linear layers with ReLU, means, and an MLP of three linear layers."""

    LINEAR: type[NPLinear] | type[HNPLinear]

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """`reader.options` of nfn_np and nfn_hnp."""

        channels: int = 64
        layers: int = 3
        head: int = 0
        """Width of the MLP's two hidden layers; 0 takes that of the networks' first hidden layer."""
        dropout: float = 0.0
        """After each hidden layer of the MLP."""
        fourier: int = 0
        """Number of random Fourier frequencies of each weight; 0 for none."""
        fourier_scale: float = 3.0
        """Standard deviation of the frequencies."""
        io_encoding: bool = False
        """Whether features say of which layer, input and output they are."""
        standardise_pooled: bool = False
        """Whether what is pooled is standardised over the networks of a batch before the MLP: of networks that began
        alike most of it is what all have in common. Not in the release."""

    def __init__(self, config: ReaderConfig, *, layout: Layout, classes: int) -> None:
        super().__init__(config, layout=layout, classes=classes)
        options = self.options
        for name, least in (("channels", 1), ("layers", 1), ("head", 0), ("fourier", 0)):
            if getattr(options, name) < least:
                raise InputError(f"reader.options.{name} is {getattr(options, name)}; it must be at least {least}.")
        channels = 1
        self.encodings = nn.ModuleList()
        if options.fourier:
            self.encodings.append(FourierFeatures(channels, options.fourier, options.fourier_scale))
            channels = 2 * options.fourier
        if options.io_encoding:
            self.encodings.append(IOEncoding(layout.shapes))
            channels += IOEncoding.CHANNELS
        sizes = [channels, *[options.channels] * options.layers]
        self.layers = nn.ModuleList(self.LINEAR(layout.shapes, *pair) for pair in pairwise(sizes))
        width = options.head or layout.hidden[0]
        self.head = nn.Sequential(
            pooled_standardiser(options.channels * self.pooled(layout), options.standardise_pooled),
            nn.Linear(options.channels * self.pooled(layout), width),
            nn.ReLU(),
            nn.Dropout(options.dropout),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Dropout(options.dropout),
            nn.Linear(width, classes),
        )

    @staticmethod
    def pool(features: Weights) -> Float[Tensor, "B C M"]:
        """What the permutations leave unchanged."""
        raise NotImplementedError

    @staticmethod
    def pooled(layout: Layout) -> int:
        """M, how many values the pool gives of each channel."""
        raise NotImplementedError

    def forward(self, weights: Weights) -> Float[Tensor, "B K"]:
        """Class logits of a batch of networks, or of their offsets."""
        features = self.inputs(weights).map(lambda x: x[:, None])
        for encoding in self.encodings:
            features = encoding(features)
        for layer in self.layers:
            features = layer(features).map(F.relu)
        return self.head(self.pool(features).flatten(1))


class NPReader(NFNReader):
    """nfn_np: inputs and outputs may be permuted too."""

    LINEAR = NPLinear
    pool = staticmethod(np_pool)

    @staticmethod
    def pooled(layout: Layout) -> int:
        """Two values a layer."""
        return 2 * len(layout.shapes)


class HNPReader(NFNReader):
    """nfn_hnp: only hidden neurons may be permuted."""

    LINEAR = HNPLinear
    pool = staticmethod(hnp_pool)

    @staticmethod
    def pooled(layout: Layout) -> int:
        """Two values a layer, but D and 1 of the first, C and C of the last."""
        return 2 * (len(layout.shapes) - 2) + layout.coordinate_dims + 1 + 2 * layout.channels
