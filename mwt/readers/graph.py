"""Networks as graphs: a node for every neuron, an edge for every weight; what the graph readers have in common.

A network's graph is layered and fully connected between neighbouring layers, so that there is nothing to gather or to
scatter: nodes are one tensor a layer, edges one tensor a weight matrix, and messages are dense operations on them.
"""

from __future__ import annotations

from collections.abc import Callable
from math import pi
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mwt.errors import InputError
from mwt.weight_space import Layout, Weights

EDGES_AT_ONCE = 1 << 16
"""Edges of all networks together that recomputation goes through in one piece: some hundred MB of activations."""

Parts = TypeVar("Parts", bound="Graph | Weights")


class Graph(NamedTuple):
    """The graphs of B networks. `forward[l]` lies between `nodes[l]` and `nodes[l + 1]`, as the weight matrix does."""

    nodes: tuple[Float[Tensor, "B _ d"], ...]
    forward: tuple[Float[Tensor, "B _ _ e"], ...]
    backward: tuple[Float[Tensor, "B _ _ e"], ...]
    """The reversed edges, in the same places: from out to in. Empty where there are none."""


def _split(parts: Parts, size: int) -> list[Parts]:
    pieces = [[tensor.split(size) for tensor in field] for field in parts]
    return [type(parts)(*(tuple(tensor[i] for tensor in field) for field in pieces)) for i in range(len(pieces[0][0]))]


def _join(pieces: list[Graph]) -> Graph:
    return Graph(*(tuple(map(torch.cat, zip(*field, strict=True))) for field in zip(*pieces, strict=True)))


def in_parts(
    function: Callable[[Parts], Graph], parts: Parts, layout: Layout, *, recompute: bool, random: bool
) -> Graph:
    """`function` of the networks; with `recompute`, of a few at a time, computed again in the backward pass.

    What is alive at once is then bounded by EDGES_AT_ONCE (but for one network at least), whatever the batch.

    Args:
        random: whether it draws random numbers (dropout), which must then be drawn again.
    """
    if not recompute:
        return function(parts)
    edges = sum(outputs * inputs for outputs, inputs in layout.shapes)
    pieces = _split(parts, max(1, EDGES_AT_ONCE // edges))
    if not torch.is_grad_enabled():
        return _join([function(piece) for piece in pieces])
    return _join([checkpoint(function, piece, use_reentrant=False, preserve_rng_state=random) for piece in pieces])


class GaussianEncoding(nn.Module):
    """cos(2 pi B x) and sin(2 pi B x) with B ~ N(0, scale^2), drawn once and kept (Tancik et al. 2020, equation 5)."""

    frequencies: Tensor

    def __init__(self, features: int, count: int, scale: float) -> None:
        super().__init__()
        self.register_buffer("frequencies", scale * torch.randn(count, features))

    def forward(self, x: Float[Tensor, "*shape features"]) -> Float[Tensor, "*shape encoded"]:
        """The encoding of x; always in full precision, for half precision has too few digits for many turns."""
        with torch.autocast(x.device.type, enabled=False):
            return self._waves(F.linear(x, self.frequencies))

    def along(self, x: Float[Tensor, "*shape"], direction: tuple[float, ...]) -> Float[Tensor, "*shape encoded"]:
        """The encoding of x times a fixed vector of features."""
        with torch.autocast(x.device.type, enabled=False):
            return self._waves(x[..., None] * (self.frequencies @ self.frequencies.new_tensor(direction)))

    @staticmethod
    def _waves(turns: Tensor) -> Tensor:
        angle = 2 * pi * turns
        return torch.cat([angle.cos(), angle.sin()], dim=-1)


class Positions(nn.Module):
    """A learned vector for every input and every output node, and one for all nodes of a hidden layer."""

    def __init__(self, layout: Layout, width: int) -> None:
        super().__init__()
        self.counts = [layout.sizes[0], *[1] * len(layout.hidden), layout.sizes[-1]]
        self.vectors = nn.Parameter(torch.randn(sum(self.counts), width))

    def forward(self) -> tuple[Float[Tensor, "_ d"], ...]:
        """One tensor a layer: [n, d] for inputs and outputs, [1, d] for hidden layers."""
        return self.vectors.split(self.counts)


class Probes(nn.Module):
    """What every neuron answers to learned inputs of its network, as node features."""

    def __init__(self, layout: Layout, count: int, width: int) -> None:
        super().__init__()
        self.layout = layout
        self.coords = nn.Parameter(2 * torch.rand(count, layout.sizes[0]) - 1)
        self.embed = nn.ModuleList(nn.Sequential(nn.Linear(count, width), nn.LayerNorm(width)) for _ in layout.sizes)
        self._checked = False

    def forward(self, weights: Weights) -> list[Float[Tensor, "B _ d"]]:
        """Features of the nodes of each layer, inputs first. Takes the networks' own weights, not their offsets.

        Raises:
            InputError: the networks are differences from a common base: they draw nothing.
        """
        if not self._checked:
            if self.layout.shared_output and not bool(weights.weights[-1].any()):
                raise InputError(
                    "reader.options.probes asks the networks for their values, but these are offsets from a common "
                    "base (their output layer is zero), which draw nothing. Use reader.options.probes=0, or "
                    "networks with their full weights."
                )
            self._checked = True
        answers = [self.coords.expand(len(weights.biases[0]), -1, -1)]
        with torch.autocast(self.coords.device.type, enabled=False):
            for i, (weight, bias) in enumerate(zip(*weights, strict=True)):
                hidden = answers[-1] @ weight.mT + bias[:, None]
                answers.append((self.layout.omegas[i] * hidden).sin() if i < len(self.layout.omegas) else hidden)
        return [embed(answer.mT) for embed, answer in zip(self.embed, answers, strict=True)]


class NeuralGraph(nn.Module):
    """Weights -> graph, as the neural graphs of Kofinas et al. 2024 have it (section 3 and appendix).

    A node's feature is its bias (inputs: 0), an edge's its weight. Gaussian encoding, two linear maps, and learned
    positions for the nodes; probe features join the nodes' between the maps. With `reversed_edges`, an edge's
    features are (own weight, weight the other way, their sum): (w, 0, w) forward and (0, w, w) backward.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        node_width: int,
        edge_width: int,
        frequencies: int,
        frequency_scale: float,
        reversed_edges: bool,
        probes: int,
    ) -> None:
        super().__init__()
        self.reversed_edges = reversed_edges
        features = 3 if reversed_edges else 1
        self.encode_bias = nn.Sequential(
            GaussianEncoding(1, frequencies, frequency_scale), nn.Linear(2 * frequencies, node_width)
        )
        self.encode_weight = nn.Sequential(
            GaussianEncoding(features, frequencies, frequency_scale), nn.Linear(2 * frequencies, edge_width)
        )
        self.node = nn.Linear(node_width, node_width)
        self.edge = nn.Linear(edge_width, edge_width)
        self.positions = Positions(layout, node_width)
        self.probes = Probes(layout, probes, node_width) if probes else None

    def no_edge(self) -> Float[Tensor, " e"]:
        """The feature of a weight that is 0, or that is not there."""
        features = self.node.weight.new_zeros(3 if self.reversed_edges else 1)
        return self.edge(self.encode_weight(features))

    def forward(self, weights: Weights, raw: Weights) -> Graph:
        """The graphs of a batch of networks.

        Args:
            weights: as they are to be read.
            raw: the same before scaling or standardising: what the probes are pushed through.
        """
        biases = (weights.biases[0].new_zeros(len(weights.biases[0]), weights.weights[0].shape[-1]), *weights.biases)
        nodes = [self.encode_bias(b[..., None]) for b in biases]
        if self.probes is not None:
            nodes = [node + probe for node, probe in zip(nodes, self.probes(raw), strict=True)]
        placed = tuple(self.node(node) + place for node, place in zip(nodes, self.positions(), strict=True))
        ways = ((1.0, 0.0, 1.0), (0.0, 1.0, 1.0)) if self.reversed_edges else ((1.0,),)
        edges = [tuple(self._edges(w, way) for w in weights.weights) for way in ways]
        return Graph(placed, edges[0], edges[1] if self.reversed_edges else ())

    def _edges(self, weight: Float[Tensor, "B out in"], way: tuple[float, ...]) -> Float[Tensor, "B out in e"]:
        """Features of edges, the two linear maps as one: there are many more edges than the maps have entries."""
        encoding, first = self.encode_weight
        assert isinstance(encoding, GaussianEncoding), "the first of the two"
        assert isinstance(first, nn.Linear), "the second"
        bias = F.linear(first.bias, self.edge.weight, self.edge.bias)
        return F.linear(encoding.along(weight, way), self.edge.weight @ first.weight, bias)
