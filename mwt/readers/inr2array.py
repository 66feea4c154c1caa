"""inr2array with a neural functional Transformer (Zhou et al., NeurIPS 2023): attention among the weights of a network.

A network's weights are features W_i [B, out, in, c] and b_i [B, out, c]. All maps act on c, or are attention, so that
permutations of hidden neurons permute the features of the encoder alike and leave its latents as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mwt.config import ReaderConfig
from mwt.errors import InputError
from mwt.readers.interface import pooled_standardiser
from mwt.readers.two_phase import TwoPhaseReader
from mwt.weight_space import Layout, Weights, render

HIDDEN_OMEGA = 30.0
"""Of the decoder's small SIRENs."""


class WeightEmbedding(nn.Module):
    """Each weight as a vector: Gaussian Fourier features, and a learned vector of its place.

    Places are the layers' weights and biases, and each input and each output of the network, which have meanings and
    so are not permuted.
    """

    frequencies: Tensor

    def __init__(self, layout: Layout, width: int, sigma: float) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(width // 2) * sigma * 2 * torch.pi)
        layers, ends = len(layout.shapes), layout.coordinate_dims + layout.channels
        self.layer = nn.Parameter(torch.randn(2, layers, width) * 0.02)
        self.ends = nn.Parameter(torch.randn(ends, width) * 0.02)
        self.dims = layout.coordinate_dims

    def forward(self, weights: Weights) -> Weights:
        """Features [B, out, in, c] and [B, out, c]."""

        def waves(x: Tensor) -> Tensor:
            angles = x[..., None] * self.frequencies
            return torch.cat([angles.sin(), angles.cos()], dim=-1)

        ws = [waves(w) + place for w, place in zip(weights.weights, self.layer[0], strict=True)]
        bs = [waves(b) + place for b, place in zip(weights.biases, self.layer[1], strict=True)]
        inputs, outputs = self.ends[: self.dims], self.ends[self.dims :]
        ws[0] = ws[0] + inputs
        ws[-1], bs[-1] = ws[-1] + outputs[:, None], bs[-1] + outputs
        return Weights(tuple(ws), tuple(bs))


class NPAttention(nn.Module):
    """Self-attention of weights that permutations of neurons commute with (Zhou et al. 2023, equation 4).

    Every layer of neurons i has tokens that are vectors over its neurons: the columns of W_i, its bias b_i, the rows of
    W_{i+1}. They attend to each other; so each weight gets the sum of what it is given as part of a column and of a
    row. Beside that every weight by itself attends to the means over each W and each b, which stand for all others.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: Weights) -> Weights:
        """Features as they came in."""
        qkv = x.map(self.qkv)
        among, count = self._layers(qkv), len(x.weights)
        means = torch.stack([w.mean((1, 2)) for w in qkv.weights] + [b.mean(1) for b in qkv.biases], dim=1)
        ws, bs = [], []
        for i in range(count):
            outputs, inputs = x.weights[i].shape[1:3]
            above = among[i + 1]  # tokens over this matrix's outputs: its columns, its bias, the rows of the next
            below = among[i]  # tokens over its inputs: those of the previous, of which the last are its rows
            w = above[:, :inputs].transpose(1, 2) + below[:, -outputs:]
            ws.append(self.out(w + self._global(qkv.weights[i].flatten(1, 2), means).unflatten(1, (outputs, inputs))))
            bs.append(self.out(above[:, inputs] + self._global(qkv.biases[i], means)))
        return Weights(tuple(ws), tuple(bs))

    def _layers(self, qkv: Weights) -> list[Float[Tensor, "B T n c"]]:
        """Attention among the tokens of each layer of neurons, inputs and outputs too."""
        results = []
        for i in range(len(qkv.weights) + 1):
            parts = []
            if i > 0:
                parts += [qkv.weights[i - 1].transpose(1, 2), qkv.biases[i - 1][:, None]]
            if i < len(qkv.weights):
                parts.append(qkv.weights[i])
            tokens = torch.cat(parts, dim=1)  # [B, T, n, 3 c]
            neurons = tokens.shape[2]
            q, k, v = (self._split(part.flatten(2), neurons) for part in tokens.chunk(3, dim=-1))
            results.append(self._merge(F.scaled_dot_product_attention(q, k, v), neurons))
        return results

    def _split(self, x: Float[Tensor, "B T nc"], neurons: int) -> Float[Tensor, "B heads T nc_head"]:
        count, tokens, _ = x.shape
        return x.view(count, tokens, neurons, self.heads, -1).permute(0, 3, 1, 2, 4).flatten(3)

    def _merge(self, x: Float[Tensor, "B heads T nc_head"], neurons: int) -> Float[Tensor, "B T n c"]:
        return x.unflatten(3, (neurons, -1)).permute(0, 2, 3, 1, 4).flatten(3)

    def _global(self, qkv: Float[Tensor, "B T c3"], means: Float[Tensor, "B M c3"]) -> Float[Tensor, "B T c"]:
        q = self._split(qkv.chunk(3, dim=-1)[0], 1)
        _, k, v = (self._split(part, 1) for part in means.chunk(3, dim=-1))
        return self._merge(F.scaled_dot_product_attention(q, k, v), 1)[:, :, 0]


def add(x: Weights, y: Weights) -> Weights:
    """The sum of two sets of features."""
    return Weights(*(tuple(a + b for a, b in zip(*parts, strict=True)) for parts in zip(x, y, strict=True)))


class NFTBlock(nn.Module):
    """Pre-norm residual block: attention, then a perceptron four times as wide on every weight."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = NPAttention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Weights) -> Weights:
        """Features as they came in."""
        x = add(x, self.attention(x.map(self.norms[0])))
        return add(x, x.map(lambda part: self.mlp(self.norms[1](part))))


class NFTEncoder(nn.Module):
    """Latents of a network: embedding, `blocks` blocks, and attention of learned queries to all its weights."""

    def __init__(self, layout: Layout, *, width: int, sigma: float, blocks: int, heads: int, latents: int) -> None:
        super().__init__()
        self.embedding = WeightEmbedding(layout, width, sigma)
        self.blocks = nn.ModuleList(NFTBlock(width, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.queries = nn.Parameter(torch.randn(latents, width))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, weights: Weights) -> Float[Tensor, "B M c"]:
        """Latents of a batch of networks."""
        x = self.embedding(weights)
        for block in self.blocks:
            x = block(x)
        tokens = self.norm(torch.cat([part.flatten(1, -2) for part in (*x.weights, *x.biases)], dim=1))
        queries = self.queries.expand(len(tokens), -1, -1)
        return self.attention(queries, tokens, tokens, need_weights=False)[0]


class PatchDecoder(nn.Module):
    """Each latent makes, by a linear hypernetwork, a small SIREN that draws one patch of the field.

    The cube [-1, 1]^D is cut into `patches` equal parts along every axis; a patch's SIREN sees coordinates within it,
    scaled to [-1, 1]. It has two sine layers `field_width` wide.
    """

    def __init__(self, layout: Layout, width: int, patches: int, field_width: int) -> None:
        super().__init__()
        self.patches, dims = patches, layout.coordinate_dims
        self.field = Layout(
            sizes=(dims, field_width, field_width, layout.channels), omegas=(HIDDEN_OMEGA,) * 2, shared_output=False
        )
        self.make = nn.Linear(width, self.field.count)
        with torch.no_grad():  # the bias is a SIREN, initialised as such; what a latent adds starts a tenth as large
            spread = torch.cat([torch.full((out * (inp + 1),), _bound(i, inp)) for i, (out, inp) in enumerate(
                self.field.shapes
            )])  # fmt: skip
            self.make.bias.uniform_(-1, 1).mul_(spread)
            self.make.weight.mul_(0.1 * spread[:, None])

    def forward(self, latents: Float[Tensor, "B M c"], coords: Float[Tensor, "P D"]) -> Float[Tensor, "B P C"]:
        """What the latents draw at coordinates that all share."""
        cell = ((coords + 1) / 2 * self.patches).floor().clamp(0, self.patches - 1)
        within = (coords + 1) * self.patches - 2 * cell - 1
        strides = self.patches ** torch.arange(coords.shape[1] - 1, -1, -1, device=coords.device)
        patch = (cell.long() * strides).sum(-1)
        made = self.make(latents).to(coords.dtype)
        order = patch.argsort(stable=True)
        drawn = []
        # Coordinates times omega needs more digits than bf16 has, as in `Siren.render`.
        with torch.autocast(coords.device.type, enabled=False):
            for m, points in enumerate(within[order].split(patch.bincount(minlength=latents.shape[1]).tolist())):
                if len(points):
                    drawn.append(render(self.field, Weights.unflatten(made[:, m], self.field), points))
        return torch.cat(drawn, dim=1)[:, order.argsort()]


def _bound(layer: int, inputs: int) -> float:
    """SIREN's uniform initialisation (Sitzmann et al. 2020)."""
    return 1 / inputs if layer == 0 else (6 / inputs) ** 0.5 / HIDDEN_OMEGA


class LatentClassifier(nn.Module):
    """A pre-norm Transformer over a class token and the latents; a perceptron on what becomes of the first token."""

    def __init__(
        self, *, inputs: int, latents: int, width: int, blocks: int, heads: int, dropout: float, standardise: bool,
        classes: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.standardise = pooled_standardiser(latents * inputs, standardise)
        self.embed = nn.Linear(inputs, width)
        self.first = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(torch.randn(latents, width) * 0.02)
        layers = [
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(blocks)
        ]
        self.blocks = nn.Sequential(*layers, nn.LayerNorm(width))
        self.logits = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, classes))

    def forward(self, latents: Float[Tensor, "B M c"]) -> Float[Tensor, "B K"]:
        """Class logits."""
        x = self.standardise(latents.flatten(1)).view_as(latents)
        x = self.embed(x) + self.places
        return self.logits(self.blocks(torch.cat([self.first.expand(len(x), -1, -1), x], dim=1))[:, 0])


class Inr2ArrayReader(TwoPhaseReader):
    """inr2array: an auto-encoder of networks through an array of latents, then a Transformer on the frozen latents.

    The defaults are the published sizes where they are known (encoder, latents, classifier); the small SIRENs of the
    decoder are `field_width` wide here. The latents do not change under permutations of hidden neurons.

    Parameters, with c = width, M = patches^D latents, n layers, D coordinates, C channels, v = classifier_width:
    encoder 2 n c + (D + C) c + blocks (12 c^2 + 10 c) + 2 c + M c + 4 c^2 + 4 c; decoder (c + 1) F for F weights of a
    small SIREN; classifier (c v + v) + v + M v + classifier_blocks (12 v^2 + 13 v) + 2 v + (v^2 + v) + v K + K.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Sizes."""

        width: int = 256
        sigma: float = 3.0
        """Standard deviation of the Fourier features' frequencies."""
        blocks: int = 6
        heads: int = 4
        patches: int = 4
        """Along every axis; there are patches^D latents."""
        field_width: int = 16
        classifier_width: int = 512
        classifier_blocks: int = 12
        classifier_heads: int = 4
        dropout: float = 0.1
        """In the classifier."""
        standardise_latents: bool = False
        """Whether each number of the latents is standardised over the networks of a batch before the classifier: most
        of it is what all have in common. Not in the release."""

    def __init__(self, config: ReaderConfig, *, layout: Layout, classes: int) -> None:
        super().__init__(config, layout=layout, classes=classes)
        options = self.options
        for width, heads in (("width", "heads"), ("classifier_width", "classifier_heads")):
            size, parts = getattr(options, width), getattr(options, heads)
            if size % (2 * parts):
                raise InputError(
                    f"reader.options.{width} is {size}; it must be a multiple of twice the reader.options.{heads}, "
                    f"which is {parts}."
                )
        latents = options.patches**layout.coordinate_dims
        self.encoder = NFTEncoder(
            layout, width=options.width, sigma=options.sigma, blocks=options.blocks, heads=options.heads,
            latents=latents,
        )  # fmt: skip
        self.decoder = PatchDecoder(layout, options.width, options.patches, options.field_width)
        self.classifier = LatentClassifier(
            inputs=options.width, latents=latents, width=options.classifier_width, blocks=options.classifier_blocks,
            heads=options.classifier_heads, dropout=options.dropout, standardise=options.standardise_latents,
            classes=classes,
        )  # fmt: skip
