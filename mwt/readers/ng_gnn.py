"""NG-GNN: a message-passing network over the graph of a network's weights.

Kofinas et al., "Graph Neural Networks for Learning Equivariant Representations of Neural Networks", ICLR 2024; its
layers are PNA's (Corso et al., "Principal Neighbourhood Aggregation for Graph Nets", NeurIPS 2020).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import log

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mwt.config import ReaderConfig
from mwt.errors import InputError
from mwt.readers.graph import Graph, NeuralGraph, in_parts
from mwt.readers.interface import Reader, pooled_standardiser
from mwt.weight_space import Layout, Weights

LEAST_VARIANCE = 1e-5


def aggregate(incoming: list[tuple[Float[Tensor, "B _ _ d"], int]]) -> Float[Tensor, "B n 4*d"]:
    """Mean, minimum, maximum and standard deviation of all messages that nodes receive.

    Args:
        incoming: one or two sets of messages, each with the dimension to aggregate over. Of two, the moments of the
            union are put together from those of the parts.
    """
    parts = [_variance_and_mean(messages, dim) for messages, dim in incoming]
    low = [messages.amin(dim) for messages, dim in incoming]
    high = [messages.amax(dim) for messages, dim in incoming]
    if len(incoming) == 1:
        [(variance, mean)], [lowest], [highest] = parts, low, high
    else:
        counts = [messages.shape[dim] for messages, dim in incoming]
        share = counts[0] / sum(counts)
        (variance_0, mean_0), (variance_1, mean_1) = parts
        mean = share * mean_0 + (1 - share) * mean_1
        variance = share * variance_0 + (1 - share) * variance_1 + share * (1 - share) * (mean_0 - mean_1) ** 2
        lowest, highest = torch.minimum(*low), torch.maximum(*high)
    return torch.cat([mean, lowest, highest, (variance + LEAST_VARIANCE).sqrt()], dim=-1)


def _variance_and_mean(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """As torch.var_mean, which on CPUs takes five times as long over a dimension that is not the last."""
    mean = x.mean(dim, keepdim=True)
    return (x - mean).square().mean(dim), mean.squeeze(dim)


def amplifications(layout: Layout, reversed_edges: bool) -> list[float]:
    """PNA's scaler log(degree + 1), over its mean over all nodes, for the nodes of each layer (Corso, equation 5)."""
    sizes = layout.sizes
    after = [*sizes[1:], 0] if reversed_edges else [0] * len(sizes)
    logs = [log(1 + before + behind) for before, behind in zip((0, *sizes[:-1]), after, strict=True)]
    return [x * sum(sizes) / sum(n * y for n, y in zip(sizes, logs, strict=True)) for x in logs]


class GnnLayer(nn.Module):
    """One round of messages: PNA with edges that modulate (FiLM), then, but for the last, norm and edge update.

    Message from j to i: scale(e_ij) * (V [x_i, x_j] + c) + shift(e_ij). Aggregated by mean, minimum, maximum and
    standard deviation, each as it is and amplified by the degree; x_i' = O U [x_i, aggregated]. Edge update:
    e_ij' = L silu(E e_ij + S x_j' + T x_i'). Neither has a residual connection, as released.
    """

    def __init__(self, layout: Layout, width: int, *, reversed_edges: bool, dropout: float, last: bool) -> None:
        super().__init__()
        self.amplify = amplifications(layout, reversed_edges)
        self.film = nn.Linear(width, 2 * width)
        self.message = nn.Linear(2 * width, width)
        self.update = nn.Linear(9 * width, width)
        self.out = nn.Linear(width, width)
        self.dropout = dropout
        self.last = last
        if not last:
            self.norm = nn.LayerNorm(width)
            self.edge, self.source, self.target, self.edge_out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, graph: Graph) -> Graph:
        """The graph after one round."""
        nodes = self.update_nodes(graph)
        if self.last:
            return Graph(nodes, (), ())
        nodes = tuple(F.dropout(F.silu(self.norm(x)), self.dropout, self.training) for x in nodes)
        source, target = [self.source(x) for x in nodes], [self.target(x) for x in nodes]
        forward = tuple(
            self.edge_out(F.silu(self.edge(e) + source[i][:, None] + target[i + 1][:, :, None]))
            for i, e in enumerate(graph.forward)
        )
        backward = tuple(
            self.edge_out(F.silu(self.edge(e) + source[i + 1][:, :, None] + target[i][:, None]))
            for i, e in enumerate(graph.backward)
        )
        return Graph(nodes, forward, backward)

    def update_nodes(self, graph: Graph) -> tuple[Float[Tensor, "B _ d"], ...]:
        """The nodes after messages and PNA's update, before the norm."""
        to_target, to_source = self.message.weight.chunk(2, dim=1)
        as_target = [F.linear(x, to_target, self.message.bias) for x in graph.nodes]
        as_source = [F.linear(x, to_source) for x in graph.nodes]
        incoming: list[list[tuple[Tensor, int]]] = [[] for _ in graph.nodes]
        for i, e in enumerate(graph.forward):
            scale, shift = self.film(e).chunk(2, dim=-1)
            incoming[i + 1].append((scale * (as_source[i][:, None] + as_target[i + 1][:, :, None]) + shift, 2))
        for i, e in enumerate(graph.backward):
            scale, shift = self.film(e).chunk(2, dim=-1)
            incoming[i].append((scale * (as_source[i + 1][:, :, None] + as_target[i][:, None]) + shift, 1))
        updated = []
        for x, received, amplify in zip(graph.nodes, incoming, self.amplify, strict=True):
            summary = aggregate(received) if received else x.new_zeros(*x.shape[:-1], 4 * x.shape[-1])
            updated.append(self.out(self.update(torch.cat([x, summary, amplify * summary], dim=-1))))
        return tuple(updated)


class NgGnnReader(Reader):
    """NG-GNN: neural graph, PNA layers, an MLP on the output nodes. Invariant to the order of hidden neurons.

    With the defaults, [2, 32, 32, 1] and 10 classes it has the 92,010 parameters of the release: encodings and
    positions 18,720, four layers 4 x 14,496, three norms 192, three edge updates 3 x 4,224, readout 2,442.

    Weights should come with a deviation of about 1 (`reader.input=standardise_layers`; end to end, a matching
    `reader.token_scale`): the Gaussian encoding turns `frequency_scale` times for each 1. Statistics of each weight
    (`standardise`) break the invariance. Degrees count the reversed edges too, where the release counts forward ones.
    The output nodes see as many layers back as there are rounds: `layers` should be no less than weight matrices. An
    output layer that all networks share says nothing, and the readout is then of all layers.
    `reader.checkpoint=true` computes each layer again in the backward pass, a few networks at a time.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Released: MNIST as it is; with probes, probes=64. Small: width=16 layers=2 frequencies=32."""

        width: int = 32
        """Of nodes and of edges."""
        layers: int = 4
        frequencies: int = 128
        """Gaussian frequencies of the encoding of a weight or bias; it has two features for each."""
        frequency_scale: float = 3.0
        """Their standard deviation."""
        reversed_edges: bool = True
        """Messages against the direction of the network as well."""
        probes: int = 0
        """Learned inputs that are pushed through the networks; the answers are features of the nodes. Needs the
        networks' own weights, not offsets."""
        readout: str = "auto"
        """output: an MLP of the output nodes. full: of the inputs, the outputs and the mean of each hidden layer. auto:
        full where all networks have the same output layer, else output."""
        dropout: float = 0.2
        standardise_pooled: bool = False
        """Whether what is pooled is standardised over the networks of a batch before the MLP: of networks that began
        alike most of it is what all have in common. Not in the release."""

        def __post_init__(self) -> None:
            if self.readout not in ("auto", "output", "full"):
                raise InputError(f"reader.options.readout is {self.readout!r}; there are auto, output, full.")

    def __init__(self, config: ReaderConfig, *, layout: Layout, classes: int) -> None:
        super().__init__(config, layout=layout, classes=classes)
        options, width = self.options, self.options.width
        self.checkpoint = config.checkpoint
        self.graph = NeuralGraph(
            layout,
            node_width=width,
            edge_width=width,
            frequencies=options.frequencies,
            frequency_scale=options.frequency_scale,
            reversed_edges=options.reversed_edges,
            probes=options.probes,
        )
        self.layers = nn.ModuleList(
            GnnLayer(
                layout,
                width,
                reversed_edges=options.reversed_edges,
                dropout=options.dropout,
                last=i == options.layers - 1,
            )
            for i in range(options.layers)
        )
        self.full = options.readout == "full" or (options.readout == "auto" and layout.shared_output)
        read = layout.channels + (layout.coordinate_dims + len(layout.hidden) if self.full else 0)
        self.readout = nn.Sequential(
            pooled_standardiser(read * width, options.standardise_pooled),
            nn.Linear(read * width, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, classes),
        )

    def forward(self, weights: Weights) -> Float[Tensor, "B K"]:
        """Class logits of a batch of networks, or of their offsets."""
        run = partial(in_parts, layout=self.layout, recompute=self.checkpoint)
        graph = run(lambda raw: self.graph(self.inputs(raw), raw), weights, random=False)
        for layer in self.layers:
            graph = run(layer, graph, random=self.training and self.options.dropout > 0)
        return self.readout(self._read(graph.nodes))

    def _read(self, nodes: tuple[Float[Tensor, "B _ d"], ...]) -> Float[Tensor, "B read"]:
        if not self.full:
            return nodes[-1].flatten(1)
        means = [F.silu(x).mean(1) for x in nodes[1:-1]]
        return torch.cat([nodes[0].flatten(1), *means, nodes[-1].flatten(1)], dim=1)
