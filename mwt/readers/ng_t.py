"""NG-T: a relational Transformer over the graph of a network's weights.

Kofinas et al., "Graph Neural Networks for Learning Equivariant Representations of Neural Networks", ICLR 2024, after
Diao and Loynd, "Relational Attention", ICLR 2023.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mwt.config import ReaderConfig
from mwt.errors import InputError
from mwt.readers.graph import Graph, NeuralGraph, in_parts
from mwt.readers.interface import Reader, pooled_standardiser
from mwt.weight_space import Layout, Weights


def linear(inputs: int, outputs: int, *, bias: bool = True) -> nn.Linear:
    """A linear map with Glorot's initialisation and no bias at first."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class RelationalAttention(nn.Module):
    """Attention of every node to every node, in which what lies between the two takes part.

    q_ij = Q x_i + Q' e_ij, k_ij = K x_j + K' e_ij, v_ij = (V x_j) * S e_ij + T e_ij; node i receives
    O sum_j softmax_j(q_ij . k_ij / sqrt(width)) v_ij, in heads. Where the network has a weight from i to j, e_ij is its
    edge, and e_ji the reversed one; for all other pairs e_ij is one vector, the feature of a weight of 0. So only
    neighbouring layers cost vectors for every pair; the others cost products.
    """

    def __init__(self, node_width: int, edge_width: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = width**-0.5
        self.node = linear(node_width, 3 * width, bias=False)
        self.edge = linear(edge_width, 4 * width, bias=False)
        self.out = linear(width, node_width)

    def forward(
        self, graph: Graph, no_edge: Float[Tensor, " e"], *, only_outputs: bool = False
    ) -> list[Float[Tensor, "B _ d"]]:
        """What the nodes of each layer receive, or those of the last one alone. Without `graph.backward` pairs that a
        weight joins the other way are as those that none joins."""
        plain_q, plain_k, plain_s, plain_t = self.edge(no_edge).chunk(4)
        nodes = [self.node(x).chunk(3, dim=-1) for x in graph.nodes]
        plain = [(self._heads(k + plain_k), self._heads(v * plain_s + plain_t)) for _, k, v in nodes]
        received = []
        for i, (query, _, _) in list(enumerate(nodes))[-1 if only_outputs else 0 :]:
            plain_query = self._heads(query + plain_q)
            edges = self._edges_from(graph, i)
            logits = [
                self._related_logits(edges[j], query, nodes[j][1]) if j in edges else plain_query @ plain[j][0].mT
                for j in range(len(nodes))
            ]
            attention = (self.scale * torch.cat(logits, dim=-1)).softmax(dim=-1)
            parts = attention.split([x.shape[1] for x in graph.nodes], dim=-1)
            values = [
                self._related_values(edges[j], part, nodes[j][2])
                if j in edges
                else (part @ plain[j][1]).transpose(1, 2).flatten(2)
                for j, part in enumerate(parts)
            ]
            received.append(self.out(sum(values[1:], start=values[0])))
        return received

    @staticmethod
    def _edges_from(graph: Graph, i: int) -> dict[int, Float[Tensor, "B _ _ e"]]:
        """The edges from the nodes of layer i, by the layer that they lead to."""
        edges = {}
        if i < len(graph.forward):
            edges[i + 1] = graph.forward[i].transpose(1, 2)
        if i > 0 and graph.backward:
            edges[i - 1] = graph.backward[i - 1]
        return edges

    def _heads(self, x: Float[Tensor, "B n width"]) -> Float[Tensor, "B heads n head"]:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _related_logits(self, e: Tensor, query: Tensor, key: Tensor) -> Float[Tensor, "B heads queries keys"]:
        to_q, to_k, _, _ = self.edge.weight.chunk(4)
        products = (F.linear(e, to_q) + query[:, :, None]) * (F.linear(e, to_k) + key[:, None])
        return products.unflatten(-1, (self.heads, -1)).sum(-1).movedim(-1, 1)

    def _related_values(self, e: Tensor, attention: Tensor, value: Tensor) -> Float[Tensor, "B queries width"]:
        _, _, to_scale, to_shift = self.edge.weight.chunk(4)
        values = value[:, None] * F.linear(e, to_scale) + F.linear(e, to_shift)
        weighted = attention.movedim(1, -1)[..., None] * values.unflatten(-1, (self.heads, -1))
        return weighted.sum(2).flatten(2)


class EdgeUpdate(nn.Module):
    """e_ij from itself, its reverse and both ends, then an MLP; both residual with the norm after."""

    def __init__(self, node_width: int, edge_width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.both = linear(2 * edge_width, hidden)
        self.source, self.target = linear(node_width, hidden), linear(node_width, hidden)
        self.first = nn.Sequential(nn.GELU(), linear(hidden, edge_width), nn.Dropout(dropout))
        self.second = nn.Sequential(
            linear(edge_width, hidden, bias=False), nn.GELU(), linear(hidden, edge_width), nn.Dropout(dropout)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(edge_width) for _ in range(2))

    def forward(self, graph: Graph, no_edge: Float[Tensor, " e"], *, only_last: bool = False) -> Graph:
        """The same nodes, with new edges; or with those of the last matrix alone, and the others as they were."""
        if only_last:
            new = self(Graph(graph.nodes[-2:], graph.forward[-1:], graph.backward[-1:]), no_edge)
            before = graph.backward[:-1] or [no_edge.expand_as(e) for e in graph.forward[:-1]]
            return Graph(graph.nodes, (*graph.forward[:-1], *new.forward), (*before, *new.backward))
        own, other = self.both.weight.chunk(2, dim=1)
        source, target = [self.source(x) for x in graph.nodes], [self.target(x) for x in graph.nodes]
        forward, backward = [], []
        reverses = graph.backward or [no_edge] * len(graph.forward)
        for i, (e, reverse) in enumerate(zip(graph.forward, reverses, strict=True)):
            ahead = source[i][:, None] + target[i + 1][:, :, None]
            forward.append(self._update(e, F.linear(e, own, self.both.bias) + F.linear(reverse, other) + ahead))
            behind = source[i + 1][:, :, None] + target[i][:, None]
            backward.append(self._update(reverse, F.linear(reverse, own, self.both.bias) + F.linear(e, other) + behind))
        return Graph(graph.nodes, tuple(forward), tuple(backward))

    def _update(self, e: Tensor, hidden: Tensor) -> Float[Tensor, "B out in e"]:
        e = self.norms[0](e + self.first(hidden))
        return self.norms[1](e + self.second(e))


class RelationalLayer(nn.Module):
    """Attention and an MLP for the nodes, each residual with the norm after; then, but for the last, the edges.

    Only what is read of it is computed: of the last layer (`left` 0) the output nodes, of the one before (`left` 1) of
    all edges those of the last matrix.
    """

    def __init__(self, options: NgTReader.Options, *, left: int) -> None:
        super().__init__()
        self.left = left
        node, edge, dropout = options.node_width, options.edge_width, options.dropout
        self.attention = RelationalAttention(node, edge, options.attention_width, options.heads)
        self.mix = linear(node, node)
        self.mlp = nn.Sequential(
            linear(node, 2 * node, bias=False), nn.GELU(), linear(2 * node, node), nn.Dropout(dropout)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(node) for _ in range(2))
        self.dropout = dropout
        self.edges = None if left == 0 else EdgeUpdate(node, edge, 2 * edge, dropout)

    def forward(self, graph: Graph, no_edge: Float[Tensor, " e"]) -> Graph:
        """The graph after one layer; after the last one no more than the output nodes."""
        nodes, last = [], self.edges is None
        read = graph.nodes[-1:] if last else graph.nodes
        for x, received in zip(read, self.attention(graph, no_edge, only_outputs=last), strict=True):
            x = self.norms[0](x + F.dropout(self.mix(received), self.dropout, self.training))
            nodes.append(self.norms[1](x + self.mlp(x)))
        if self.edges is None:
            return Graph(tuple(nodes), (), ())
        return self.edges(graph._replace(nodes=tuple(nodes)), no_edge, only_last=self.left == 1)


class NgTReader(Reader):
    """NG-T: neural graph, relational Transformer, an MLP on the output nodes. Invariant to the order of hidden neurons.

    With the defaults, [2, 32, 32, 1] and 10 classes it has the 376,586 parameters of the release: encodings and
    positions 30,208, four layers 4 x 70,080, three edge updates 3 x 18,816, readout 9,610.

    The release keeps an edge feature for every pair of nodes, joined or not, and updates them all; here pairs that no
    weight joins keep the feature of a weight of 0. That is what makes width 128 possible: of 645^2 = 416,025 pairs,
    66,176 are edges. Weights should come with a deviation of about 1, as for `NgGnnReader`. About 8 KB an edge and
    layer stay for the backward pass; `reader.checkpoint=true` computes each layer again, a few networks at a time.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Released: as it is. Small: node_width=32 edge_width=16 attention_width=32 heads=4 layers=2 frequencies=32."""

        node_width: int = 64
        """MLPs are twice as wide as what they work on."""
        edge_width: int = 32
        attention_width: int = 128
        heads: int = 8
        layers: int = 4
        readout_width: int = 128
        frequencies: int = 128
        """Gaussian frequencies of the encoding of a weight or bias; it has two features for each."""
        frequency_scale: float = 1.0
        """Their standard deviation."""
        reversed_edges: bool = False
        """Whether reversed edges begin with the weight as well. Otherwise they learn of it in the first edge update."""
        probes: int = 0
        """As of `NgGnnReader`."""
        dropout: float = 0.2
        standardise_pooled: bool = False
        """Whether the output nodes are standardised over the networks of a batch before the MLP: of networks that began
        alike most of them is what all have in common. Not in the release."""

    def __init__(self, config: ReaderConfig, *, layout: Layout, classes: int) -> None:
        super().__init__(config, layout=layout, classes=classes)
        options = self.options
        if options.attention_width % options.heads:
            raise InputError(
                f"reader.options.attention_width is {options.attention_width}; it must be a multiple of the "
                f"{options.heads} heads (reader.options.heads)."
            )
        self.checkpoint = config.checkpoint
        self.graph = NeuralGraph(
            layout,
            node_width=options.node_width,
            edge_width=options.edge_width,
            frequencies=options.frequencies,
            frequency_scale=options.frequency_scale,
            reversed_edges=options.reversed_edges,
            probes=options.probes,
        )
        self.layers = nn.ModuleList(
            RelationalLayer(options, left=options.layers - 1 - i) for i in range(options.layers)
        )
        self.readout = nn.Sequential(
            pooled_standardiser(layout.channels * options.node_width, options.standardise_pooled),
            nn.Linear(layout.channels * options.node_width, options.readout_width),
            nn.ReLU(),
            nn.Linear(options.readout_width, classes),
        )

    def forward(self, weights: Weights) -> Float[Tensor, "B K"]:
        """Class logits of a batch of networks, or of their offsets."""
        run = partial(in_parts, layout=self.layout, recompute=self.checkpoint)
        no_edge = self.graph.no_edge()
        graph = run(lambda raw: self.graph(self.inputs(raw), raw), weights, random=False)
        for layer in self.layers:
            graph = run(partial(layer, no_edge=no_edge), graph, random=self.training and self.options.dropout > 0)
        return self.readout(graph.nodes[-1].flatten(1))
