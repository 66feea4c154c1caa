"""ScaleGMN and ScaleGMN-B: graph networks that see no difference between a sine network and itself with signs flipped.

Kalogeropoulos, Bouritsas and Panagakis, "Scale Equivariant Graph Metanetworks", NeurIPS 2024. Sine is odd: with all
weights into and out of a neuron and its bias negated, a network draws the same. Here the features of a hidden node
change their sign with the neuron, those of an edge with each of its two ends, and what is read at the end does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mwt.config import ReaderConfig
from mwt.errors import InputError
from mwt.readers.graph import Graph, Positions, in_parts
from mwt.readers.interface import Reader, pooled_standardiser
from mwt.weight_space import Layout, Weights

Place = Literal["input", "hidden", "output"]
"""Of a node. Only hidden nodes have a sign that may flip."""


class Mlp(nn.Module):
    """Linear, layer norm, SiLU, linear. The input may come in parts, of which some are shared: they are broadcast."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.second = nn.Linear(hidden, outputs)

    def forward(self, *parts: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The MLP of the concatenation of the parts, each mapped before it is broadcast."""
        weights = self.first.weight.split([part.shape[-1] for part in parts], dim=1)
        hidden = F.linear(parts[0], weights[0], self.first.bias)
        for part, weight in zip(parts[1:], weights[1:], strict=True):
            hidden = hidden + F.linear(part, weight)
        return self.second(F.silu(self.norm(hidden)))


class SignInvariant(nn.Module):
    """rho(x) + rho(-x) with an MLP rho, or |x|: the same for x and -x."""

    def __init__(self, width: int, hidden: int, *, symmetrise: bool) -> None:
        super().__init__()
        self.rho = Mlp(width, hidden, width) if symmetrise else None

    def forward(self, x: Float[Tensor, "*shape d"]) -> Float[Tensor, "*shape d"]:
        """The invariant features, as many."""
        if self.rho is None:
            return x.abs()
        first, second = self.rho.first, self.rho.second
        # W (+-x) + b and the sum after the last linear map are each one product, not two.
        x = F.linear(x, first.weight)
        both = F.silu(self.rho.norm(first.bias + x)) + F.silu(self.rho.norm(first.bias - x))
        return F.linear(both, second.weight, 2 * second.bias)


class ScaleEq(nn.Module):
    """(W x) * MLP(invariant of x, extra): changes its sign with x. Inputs and outputs have no sign: plain MLPs.

    For these it is (W x) * MLP(x, extra), one MLP for both kinds, or, with `plain`, just an MLP, one for each kind.
    """

    def __init__(self, inputs: int, outputs: int, extra: int, options: ScaleGmnReader.Options) -> None:
        super().__init__()
        hidden = options.mlp_width
        self.linear = nn.Linear(inputs, outputs, bias=False)
        self.invariant = SignInvariant(inputs, hidden, symmetrise=options.symmetrise)
        self.mlp = Mlp(inputs + extra, hidden, outputs)
        self.plain = options.plain_ends
        self.ends = nn.ModuleList(Mlp(inputs + extra, hidden, outputs) for _ in range(2 if self.plain else 1))

    def forward(self, x: Float[Tensor, "*shape i"], place: Place, *extra: Tensor) -> Float[Tensor, "*shape o"]:
        """Of nodes at one place, or of messages to them. `extra` must not depend on signs."""
        if place == "hidden":
            return self.linear(x) * self.mlp(self.invariant(x), *extra)
        if self.plain:
            return self.ends[0 if place == "input" else 1](x, *extra)
        return self.linear(x) * self.ends[0](x, *extra)


class Messages(nn.Module):
    """ScaleEq(E e_ij * V x_j), which goes from j to i and is summed there; one direction of the edges."""

    def __init__(self, options: ScaleGmnReader.Options) -> None:
        super().__init__()
        width = options.width
        self.node, self.edge = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.message = ScaleEq(width, width, width if options.extra_positions else 0, options)

    def forward(
        self, nodes: Tensor, edges: Float[Tensor, "B out in e"], place: Place, positions: tuple[Tensor, ...], dim: int
    ) -> Float[Tensor, "B n d"]:
        """The sums that nodes at `place` receive from `nodes`, which are dimension `dim` of the edges."""
        facing = 3 - dim
        messages = self.edge(edges) * self.node(nodes).unsqueeze(facing)
        return self.message(messages, place, *(p.unsqueeze(facing - 1) for p in positions)).sum(dim)


class ScaleGmnLayer(nn.Module):
    """One round: messages, x_i' = ScaleEq([x_i, received]) (+ R x_i), e_ij' = (L e_ij) * MLP(inv(x_j), inv(x_i)).

    With `backward`, nodes also receive along reversed edges, whose features are the weights' as they came.
    """

    def __init__(self, layout: Layout, options: ScaleGmnReader.Options, *, backward: bool, last: bool) -> None:
        super().__init__()
        width = options.width
        hidden: list[Place] = ["hidden"] * len(layout.hidden)
        self.places: list[Place] = ["input", *hidden, "output"]
        self.forward_messages = Messages(options)
        self.backward_messages = Messages(options) if backward else None
        extra = width if options.extra_positions else 0
        self.update = ScaleEq((3 if backward else 2) * width, width, extra, options)
        self.skip = nn.Linear(width, width, bias=False) if options.skip else None
        self.dropout = options.dropout
        self.last = last
        if not last:
            self.edge = nn.Linear(width, width, bias=False)
            self.invariant = SignInvariant(width, options.mlp_width, symmetrise=options.symmetrise)
            self.ends = Mlp(2 * width, options.mlp_width, width)

    def forward(self, graph: Graph, positions: tuple[Tensor, ...] | None) -> Graph:
        """The graph after one round; `positions` join messages and updates as extra features, or are None."""
        extra = [() if positions is None else (p,) for p in positions or graph.nodes]
        nodes = []
        for i, (x, place) in enumerate(zip(graph.nodes, self.places, strict=True)):
            known = [x, x.new_zeros(()).expand_as(x)]
            if i > 0:
                known[1] = self.forward_messages(graph.nodes[i - 1], graph.forward[i - 1], place, extra[i - 1], 2)
            if self.backward_messages is not None:
                known.append(x.new_zeros(()).expand_as(x))
                if i < len(graph.backward):
                    known[2] = self.backward_messages(graph.nodes[i + 1], graph.backward[i], place, extra[i + 1], 1)
            updated = self.update(torch.cat(known, dim=-1), place, *extra[i])
            if self.skip is not None:
                updated = updated + self.skip(x)
            nodes.append(F.dropout(updated, self.dropout, self.training))
        return Graph(tuple(nodes), *(((), ()) if self.last else (self._edges(graph), graph.backward)))

    def _edges(self, graph: Graph) -> tuple[Float[Tensor, "B _ _ e"], ...]:
        ends = [self.invariant(x) for x in graph.nodes]
        return tuple(
            self.edge(e) * self.ends(ends[i][:, None], ends[i + 1][:, :, None]) for i, e in enumerate(graph.forward)
        )


class ScaleGmnReader(Reader):
    """ScaleGMN. Invariant to the order and to the signs of hidden neurons.

    With the defaults, [2, 32, 32, 1] and 10 classes it has the 1,772,042 parameters of the release's MNIST
    configuration: embedding and positions 1,408, four layers 4 x 347,264, three edge updates 3 x 99,328, residual maps
    4 x 16,384, readout 18,058.

    Nothing may be subtracted from the weights, or signs would flip about another point than zero. So
    `reader.input=standardise_layers` divides each layer by its root mean square over the training split and subtracts
    no mean; `standardise` and a `token_scale` of 0 are refused. An output layer that all networks share is zero among
    offsets, and messages through zeros are zero: the readout is then of all nodes, not of the output nodes.
    The output nodes see as many layers back as there are rounds: `layers` should be no less than weight matrices.
    `reader.checkpoint=true` computes each layer again in the backward pass, a few networks at a time.
    """

    backward = False

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Released: MNIST as it is; F-MNIST and CIFAR-10 as below. Small: width=16 mlp_width=16 layers=2.

        F-MNIST: layers=2 mlp_width=64 readout=full plain_ends=true.
        CIFAR-10: width=64 mlp_width=64 plain_ends=true symmetrise=false skip=false edge_positions=false.
        """

        width: int = 128
        """Of nodes and of edges."""
        mlp_width: int = 128
        """Hidden layer of the MLPs."""
        layers: int = 4
        readout: str = "auto"
        """output: an MLP of the output nodes. full: of the sum of invariants of all hidden nodes and of the inputs and
        outputs. auto: full where all networks have the same output layer, else output."""
        symmetrise: bool = True
        """Invariants rho(x) + rho(-x); otherwise |x|."""
        plain_ends: bool = False
        """Inputs and outputs are updated by MLPs alone, instead of by a linear map times an MLP."""
        skip: bool = True
        """A linear residual connection in each layer."""
        edge_positions: bool = True
        """Edges are multiplied by a learned vector for the place of their weight matrix, as hidden nodes are."""
        extra_positions: bool = False
        """The learned positions also join the invariants in messages and updates."""
        dropout: float = 0.2
        standardise_pooled: bool = False
        """Whether what is pooled is standardised over the networks of a batch before the MLP: of networks that began
        alike most of it is what all have in common. Not in the release."""

        def __post_init__(self) -> None:
            if self.readout not in ("auto", "output", "full"):
                raise InputError(f"reader.options.readout is {self.readout!r}; there are auto, output, full.")

    def __init__(self, config: ReaderConfig, *, layout: Layout, classes: int) -> None:
        if config.input == "standardise" or (config.input == "scale" and not config.token_scale):
            asked = "reader.input=standardise" if config.input == "standardise" else "reader.token_scale=0"
            raise InputError(
                f"reader.name={config.name} reads weights whose signs may flip, and {asked} subtracts a mean. "
                "Use reader.input=standardise_layers (it subtracts none here), raw, or scale with a positive "
                "reader.token_scale."
            )
        super().__init__(config, layout=layout, classes=classes)
        options, width = self.options, self.options.width
        self.checkpoint = config.checkpoint
        self.full = options.readout == "full" or (options.readout == "auto" and layout.shared_output)
        self.node, self.edge = (nn.Linear(1, width, bias=False) for _ in range(2))
        self.positions = Positions(layout, width)
        # First matrix: by input. Hidden: one vector. Last: by output.
        counts = [layout.coordinate_dims, *[1] * (len(layout.hidden) - 1), layout.channels]
        self.edge_positions = (
            nn.ParameterList(torch.randn(count, width) for count in counts) if options.edge_positions else None
        )
        self.layers = nn.ModuleList(
            ScaleGmnLayer(layout, options, backward=self.backward, last=i == options.layers - 1)
            for i in range(options.layers)
        )
        self._make_readout()

    def _make_readout(self) -> None:
        layout, options, width = self.layout, self.options, self.options.width
        ends, hidden = layout.channels * width, options.mlp_width
        self.project: nn.ModuleList | None = None
        if self.full:
            self.invariant = SignInvariant(width, hidden, symmetrise=options.symmetrise)
            self.summand = Mlp(width, hidden, hidden)
            ends = hidden + (layout.coordinate_dims + layout.channels) * width
        elif self.backward:
            sizes = (layout.coordinate_dims, layout.channels)
            self.project = nn.ModuleList(nn.Linear(size * width, width) for size in sizes)
            ends = 2 * width
        self.standardise_pooled = pooled_standardiser(ends, options.standardise_pooled)
        self.readout = Mlp(ends, hidden, self.classes)

    def learn_statistics(self, mean: Weights, std: Weights) -> None:
        """Each layer's root mean square over the training split; no mean."""
        root = Weights.unflatten((mean.flat() ** 2 + std.flat() ** 2).sqrt(), self.layout)
        super().learn_statistics(mean.map(torch.zeros_like), root)

    def forward(self, weights: Weights) -> Float[Tensor, "B K"]:
        """Class logits of a batch of networks, or of their offsets."""
        run = partial(in_parts, layout=self.layout, recompute=self.checkpoint)
        graph = run(self._graph, weights, random=False)
        positions = self.positions() if self.options.extra_positions else None
        for layer in self.layers:
            random = self.training and self.options.dropout > 0
            graph = run(partial(layer, positions=positions), graph, random=random)
        return self._read(graph.nodes)

    def _graph(self, weights: Weights) -> Graph:
        """Nodes: bias, or 1 for inputs; times a position where signs flip, plus it where not. Edges: the weight."""
        weights = self.inputs(weights)
        ones = weights.biases[0].new_ones(len(weights.biases[0]), self.layout.coordinate_dims)
        places = self.positions()
        nodes = [self.node(b[..., None]) for b in (ones, *weights.biases)]
        ends = (0, len(nodes) - 1)
        nodes = [x + p if i in ends else x * p for i, (x, p) in enumerate(zip(nodes, places, strict=True))]
        edges = [self.edge(w[..., None]) for w in weights.weights]
        if self.edge_positions is not None:
            last, pairs = len(edges) - 1, enumerate(zip(edges, self.edge_positions, strict=True))
            edges = [e * (p[:, None] if i == last else p) for i, (e, p) in pairs]
        return Graph(tuple(nodes), tuple(edges), tuple(edges) if self.backward else ())

    def _read(self, nodes: tuple[Tensor, ...]) -> Float[Tensor, "B K"]:
        first, last = nodes[0].flatten(1), nodes[-1].flatten(1)
        if self.full:
            hidden = [self.summand(self.invariant(x)).sum(1) for x in nodes[1:-1]]
            pooled = torch.cat([sum(hidden[1:], start=hidden[0]), first, last], dim=-1)
        elif self.project is not None:
            pooled = torch.cat([self.project[1](last), self.project[0](first)], dim=-1)
        else:
            pooled = last
        return self.readout(self.standardise_pooled(pooled))


class ScaleGmnBReader(ScaleGmnReader):
    """ScaleGMN-B: `ScaleGmnReader` with messages against the direction of the network as well.

    With the defaults, [2, 32, 32, 1] and 10 classes it has 3,089,162 parameters, by the arithmetic of the release's
    MNIST configuration: embedding and positions 896, four layers 4 x 676,608, three edge updates 3 x 99,328, readout
    83,850. Backward edges keep the features of the weights as they came, as released; they flip as forward ones do.
    """

    backward = True

    @dataclass(frozen=True, kw_only=True)
    class Options(ScaleGmnReader.Options):
        """Other defaults, the release's: no residual maps, positions for nodes only, and those in every update.

        `readout=output` is here of the output and the input nodes.
        """

        skip: bool = False
        edge_positions: bool = False
        extra_positions: bool = True
