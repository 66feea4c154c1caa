"""DWSNets (Navon et al. 2023, Equivariant Architectures for Learning in Deep Weight Spaces).

A layer maps features of every weight and bias to new features of every weight and bias; it is the sum of one map for
each pair of a source and a target tensor, each of which commutes with permutations of hidden neurons. One rule gives
all of them (their tables 5 to 8). A tensor has one axis for each hidden layer that it touches; the inputs of the
first matrix and the outputs of the last matrix and bias have an order and are folded into the features. Then
    source = target, two axes:   mean of four linear maps: the entry, its row's, its column's and the whole pool
    one axis in common:          pool the source over its other axis, a set layer, repeat along the target's other axis
    none:                        pool the source wholly, a linear map, repeat everywhere
so that the cost of a layer is linear in the weights but for the set layers' attention among one layer's neurons.

On [2, 32, 32, 1] the defaults are the published classifier's and have its 552,650 parameters. With
several outputs the released code does not unfold them in the map to the last matrix from the one before, and so has
fewer. Networks of two matrices, which it refuses, are read by the same rule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mwt.config import ReaderConfig
from mwt.errors import InputError
from mwt.readers.interface import Reader, pooled_standardiser
from mwt.weight_space import Layout, Weights


@dataclass(frozen=True)
class Place:
    """A weight matrix or a bias: which hidden layers index it, and how many values are folded into one feature."""

    axes: tuple[int, ...]
    folded: int


def places(layout: Layout) -> list[Place]:
    """Of all weights, then of all biases. Hidden layers are numbered from 1; a matrix has the axes (to, from)."""
    count = len(layout.shapes)
    weights = [Place((1,), layout.coordinate_dims)]
    weights += [Place((i + 1, i), 1) for i in range(1, count - 1)]
    weights += [Place((count - 1,), layout.channels)]
    return [*weights, *(Place((i + 1,), 1) for i in range(count - 1)), Place((), layout.channels)]


def fold(weights: Weights) -> list[Tensor]:
    """[B, axes ..., folded] of every place, with one feature each."""
    first, *inner, last = weights.weights
    *biases, output = weights.biases
    return [first, *(w[..., None] for w in inner), last.mT, *(b[..., None] for b in biases), output]


class AttentionSet(nn.Module):
    """Set attention block (Lee et al. 2019, Set Transformer) without layer norm: [B, n, F] to [B, n, F']."""

    def __init__(self, features: int, out: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(features, out) for _ in range(3))
        self.out = nn.Linear(out, out)

    def forward(self, x: Float[Tensor, "B n F"]) -> Float[Tensor, "B n F2"]:
        """Every element attends to all."""
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        scale = 1 / math.sqrt(self.out.in_features)  # of all heads together, as in Lee et al.
        x = (q + F.scaled_dot_product_attention(q, k, v, scale=scale)).transpose(1, 2).flatten(2)
        return x + F.relu(self.out(x))


class DeepSets(nn.Module):
    """Zaheer et al. 2017: a linear map of each element, less one of the pool. [B, n, F] to [B, n, F']."""

    def __init__(self, features: int, out: int, reduction: str) -> None:
        super().__init__()
        self.each, self.pooled = nn.Linear(features, out), nn.Linear(features, out, bias=False)
        self.reduction = reduction

    def forward(self, x: Float[Tensor, "B n F"]) -> Float[Tensor, "B n F2"]:
        """Every element sees the pool of all."""
        return self.each(x) - self.pooled(pool(x, (1,), self.reduction))


def pool(x: Tensor, dims: tuple[int, ...], reduction: str) -> Tensor:
    """Maximum or mean over some axes, which stay with length 1."""
    if not dims:
        return x
    return x.amax(dims, keepdim=True) if reduction == "max" else x.mean(dims, keepdim=True)


class DWSLayer(nn.Module):
    """Features of all places to features of all places; equivariant to permutations of hidden neurons."""

    def __init__(
        self, where: list[Place], features: int, out: int, *, set_layer: str, heads: int, reduction: str
    ) -> None:
        super().__init__()
        self.where, self.reduction = where, reduction

        def between(source: Place, target: Place) -> nn.Module:
            inputs, outputs = features * source.folded, out * target.folded
            shared = set(source.axes) & set(target.axes)
            if len(shared) == 2:
                return nn.ModuleList(nn.Linear(inputs, outputs) for _ in range(4))
            if not shared:
                return nn.Linear(inputs, outputs)
            return AttentionSet(inputs, outputs, heads) if set_layer == "sab" else DeepSets(inputs, outputs, reduction)

        self.maps = nn.ModuleList(nn.ModuleList(between(source, target) for source in where) for target in where)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                # Xavier's standard deviation times sqrt(2 in / out), as in the authors' code.
                nn.init.xavier_normal_(module.weight, gain=math.sqrt(2 * module.in_features / module.out_features))
                if module.bias is not None:
                    nn.init.uniform_(module.bias, -1e-4, 1e-4)

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        """[B, axes ..., F folded] of every place, in and out."""
        pools = []
        for x, source in zip(tensors, self.where, strict=True):
            dims = tuple(range(1, len(source.axes) + 1))
            kept = {a: pool(x, tuple({*dims} - {d}), self.reduction) for a, d in zip(source.axes, dims, strict=True)}
            pools.append((kept, pool(x, dims, self.reduction)))
        return [self._target(target, maps, tensors, pools) for target, maps in zip(self.where, self.maps, strict=True)]

    def _target(
        self, target: Place, maps: Any, tensors: list[Tensor], pools: list[tuple[dict[int, Tensor], Tensor]]
    ) -> Tensor:
        """The sum of all maps to one place. What is repeated along an axis is added up before it is repeated."""
        shape = [1] * len(target.axes)
        sums: dict[tuple[int, ...], Tensor] = {}

        def add(axes: tuple[int, ...], term: Tensor) -> None:
            sums[axes] = sums[axes] + term if axes in sums else term

        for source, module, x, (kept, whole) in zip(self.where, maps, tensors, pools, strict=True):
            shared = [axis for axis in target.axes if axis in source.axes]
            if len(shared) == 2:
                terms = (x, kept[shared[0]], kept[shared[1]], whole)
                for axes, linear, term in zip(
                    (target.axes, (shared[0],), (shared[1],), ()), module, terms, strict=True
                ):
                    add(axes, linear(term) / 4)
            elif shared:
                axis = shared[0]
                seen = module(kept[axis].flatten(1, -2))
                size = list(shape)
                size[target.axes.index(axis)] = seen.shape[1]
                add((axis,), seen.unflatten(1, size))
            else:
                seen = module(whole.flatten(1, -2)[:, 0] if whole.ndim > 2 else whole)
                add((), seen[(slice(None), *(None for _ in shape))])
        total = sum(sums[axes] for axes in sorted(sums, key=len))
        return total / len(self.where)  # type: ignore[return-value]


class BatchNorms(nn.Module):
    """Batch norm of each place's features over networks, neurons and folded values."""

    def __init__(self, where: list[Place], features: int) -> None:
        super().__init__()
        self.features = features
        self.norms = nn.ModuleList(nn.BatchNorm1d(features) for _ in where)

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        """The same shapes."""
        rows = [x.reshape(x.numel() // self.features, self.features) for x in tensors]
        return [norm(row).view(x.shape) for x, row, norm in zip(tensors, rows, self.norms, strict=True)]


class DWSReader(Reader):
    """DWS layers with batch norm and ReLU, the pool of every place, and a linear map to the logits."""

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """`reader.options` of dws. Defaults: Navon et al.'s SIREN classifier."""

        hidden: int = 32
        """Features of each weight and bias."""
        n_hidden: int = 4
        """Layers after the first."""
        set_layer: str = "sab"
        """sab (attention) or deepsets."""
        heads: int = 8
        last_heads: int = 1
        """Heads of the last layer's attention."""
        reduction: str = "max"
        """max or mean."""
        batch_norm: bool = True
        dropout: float = 0.0
        standardise_pooled: bool = False
        """Whether what is pooled is standardised over the networks of a batch before the linear map: of networks that
        began alike most of it is what all have in common. Not in the release."""

    def __init__(self, config: ReaderConfig, *, layout: Layout, classes: int) -> None:
        super().__init__(config, layout=layout, classes=classes)
        options = self.options
        for name, known in (("set_layer", ("sab", "deepsets")), ("reduction", ("max", "mean"))):
            if getattr(options, name) not in known:
                raise InputError(f"reader.options.{name} is {getattr(options, name)!r}; it is {' or '.join(known)}.")
        for name in ("hidden", "n_hidden", "heads", "last_heads"):
            if getattr(options, name) < 1:
                raise InputError(f"reader.options.{name} is {getattr(options, name)}; it must be at least 1.")
        for name in ("heads", "last_heads"):
            if options.set_layer == "sab" and options.hidden % getattr(options, name):
                raise InputError(
                    f"reader.options.hidden is {options.hidden}, not a multiple of reader.options.{name}, "
                    f"{getattr(options, name)}; choose a multiple."
                )
        where = places(layout)
        sizes = [1, *[options.hidden] * (options.n_hidden + 1)]
        self.layers = nn.ModuleList(
            DWSLayer(
                where,
                *pair,
                set_layer=options.set_layer,
                heads=options.heads if i < options.n_hidden else options.last_heads,
                reduction=options.reduction,
            )
            for i, pair in enumerate(pairwise(sizes))
        )
        self.norms = nn.ModuleList(
            BatchNorms(where, options.hidden) if options.batch_norm else nn.Identity() for _ in range(options.n_hidden)
        )
        self.dropout = nn.Dropout(options.dropout)
        ends = options.hidden * sum(place.folded for place in where)
        self.logits = nn.Sequential(pooled_standardiser(ends, options.standardise_pooled), nn.Linear(ends, classes))

    def forward(self, weights: Weights) -> Float[Tensor, "B K"]:
        """Class logits of a batch of networks, or of their offsets."""
        tensors = fold(self.inputs(weights))
        for i, layer in enumerate(self.layers):
            if i:
                tensors = [self.dropout(x.relu()) for x in self.norms[i - 1](tensors)]
            tensors = layer(tensors)
        reduction = self.options.reduction
        ends = [self.dropout(x.relu()) for x in tensors]
        pooled = [pool(x, tuple(range(1, x.ndim - 1)), reduction).flatten(1) for x in ends]
        return self.logits(torch.cat(pooled, dim=1))
