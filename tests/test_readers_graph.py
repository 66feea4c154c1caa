"""The graph readers: their sizes as published, their symmetries and what they must see, one layer of each by loops."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mwt.readers.graph as graph_file
from data_pipes.read import open_split
from mwt.config import ClassifyConfig, ReaderConfig, model_config
from mwt.config_files import load_config
from mwt.errors import InputError
from mwt.memory import estimate
from mwt.model import MetaWeightTransformer
from mwt.optim import make_optimizer
from mwt.readers import Reader, make_reader
from mwt.readers.graph import GaussianEncoding, Graph
from mwt.readers.ng_gnn import GnnLayer, aggregate, amplifications
from mwt.readers.ng_t import EdgeUpdate, NgTReader, RelationalAttention, RelationalLayer
from mwt.readers.scalegmn import Mlp, ScaleEq, ScaleGmnBReader, ScaleGmnLayer, SignInvariant
from mwt.symmetry import flip_signs, permute_neurons, random_permutations, random_signs
from mwt.training import Meter, train_step
from mwt.weight_space import Layout, Weights, render

GRAPH_READERS = ("ng_gnn", "ng_t", "scalegmn", "scalegmn_b")
SCALE = ("scalegmn", "scalegmn_b")
SMALL: dict[str, dict[str, Any]] = {
    "ng_gnn": {"width": 8, "layers": 2, "frequencies": 5},
    "ng_t": {"node_width": 8, "edge_width": 4, "attention_width": 8, "heads": 2, "layers": 2, "frequencies": 5},
    "scalegmn": {"width": 8, "mlp_width": 8, "layers": 2},
    "scalegmn_b": {"width": 8, "mlp_width": 8, "layers": 2},
}


def layout_of(*sizes: int, shared_output: bool = False) -> Layout:
    return Layout(sizes=sizes, omegas=(30.0,) * (len(sizes) - 2), shared_output=shared_output)


def random_weights(layout: Layout, count: int = 3) -> Weights:
    return Weights.unflatten(torch.randn(count, layout.count, dtype=torch.float64), layout)


def build(name: str, layout: Layout, *, small: bool = True, **config: Any) -> Reader:
    options = {**(SMALL[name] if small else {}), **config.pop("options", {})}
    config = {"input": "raw", **config}
    reader = make_reader(ReaderConfig(name=name, options=options, **config), layout=layout, classes=10)
    return reader.double().eval()


def random_graph(sizes: tuple[int, ...], *, nodes: int, edges: int, count: int = 2) -> Graph:
    def draw(*shape: int) -> Tensor:
        return torch.randn(count, *shape, dtype=torch.float64)

    pairs = list(zip(sizes[1:], sizes[:-1], strict=True))
    return Graph(
        tuple(draw(n, nodes) for n in sizes),
        tuple(draw(*pair, edges) for pair in pairs),
        tuple(draw(*pair, edges) for pair in pairs),
    )


# ---- sizes -------------------------------------------------------------------------------------------------------


def mlp_count(inputs: int, hidden: int, outputs: int) -> int:
    return (inputs + 1) * hidden + 2 * hidden + (hidden + 1) * outputs


def scale_eq_count(inputs: int, extra: int, d: int = 128) -> int:
    return inputs * d + mlp_count(inputs, d, inputs) + 2 * mlp_count(inputs + extra, d, d)


def published_counts() -> dict[str, int]:
    """Parameters on [2, 32, 32, 1] with 10 classes; each sum beside the number that the release counts."""
    d = 32
    gnn = 2 * 257 * d + 2 * (d + 1) * d + 5 * d  # encodings, maps, positions
    gnn += 4 * ((d + 1) * 2 * d + (2 * d + 1) * d + (9 * d + 1) * d + (d + 1) * d)  # FiLM, message, update, out
    gnn += 3 * 2 * d + 3 * 4 * (d + 1) * d  # norms, edge updates
    gnn += 2 * (d + 1) * d + (d + 1) * 10
    assert gnn == 92_010

    n, e, a = 64, 32, 128
    transformer = 257 * n + 257 * e + (n + 1) * n + (e + 1) * e + 5 * n
    transformer += 4 * (n * 3 * a + e * 4 * a + (a + 1) * n + (n + 1) * n + 2 * 2 * n + n * 2 * n + (2 * n + 1) * n)
    transformer += 3 * ((2 * e + 1) * 2 * e + 2 * (n + 1) * 2 * e + (2 * e + 1) * e)
    transformer += 3 * (e * 2 * e + (2 * e + 1) * e + 2 * 2 * e)
    transformer += (n + 1) * 128 + 129 * 10
    assert transformer == 376_586

    d = 128
    edge_update = d * d + mlp_count(d, d, d) + mlp_count(2 * d, d, d)
    scale = 2 * d + 5 * d + 4 * d  # embeddings, positions of nodes and of edges
    scale += 4 * (2 * d * d + scale_eq_count(d, 0) + scale_eq_count(2 * d, 0) + d * d) + 3 * edge_update
    scale += mlp_count(d, d, 10)
    assert scale == 1_772_042
    both = 2 * d + 5 * d
    both += 4 * (2 * (2 * d * d + scale_eq_count(d, d)) + scale_eq_count(3 * d, d)) + 3 * edge_update
    both += (2 * d + 1) * d + (d + 1) * d + mlp_count(2 * d, d, 10)
    return {"ng_gnn": gnn, "ng_t": transformer, "scalegmn": scale, "scalegmn_b": both}


@pytest.mark.parametrize("name", GRAPH_READERS)
def test_parameters_are_as_many_as_published(name: str) -> None:
    reader = build(name, layout_of(2, 32, 32, 1), small=False)
    assert sum(p.numel() for p in reader.parameters()) == published_counts()[name]


# ---- symmetries of the whole reader ------------------------------------------------------------------------------


def check_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def check_other(found: Tensor, expected: Tensor) -> None:
    """Every network's logits differ, by far more than `check_same` allows."""
    assert ((found - expected).abs().amax(1) > 1e-9).all()


def permuted_ends(weights: Weights, *, inputs: bool) -> Weights:
    matrices, biases = list(weights.weights), list(weights.biases)
    if inputs:
        matrices[0] = matrices[0].flip(2)
    else:
        matrices[-1], biases[-1] = matrices[-1].flip(1), biases[-1].flip(1)
    return Weights(tuple(matrices), tuple(biases))


@pytest.mark.parametrize("sizes", [(2, 32, 32, 1), (2, 16, 16, 16, 3), (3, 5, 7, 2)], ids=str)
@pytest.mark.parametrize("name", GRAPH_READERS)
def test_invariant_to_order_and_signs_of_hidden_neurons_and_to_nothing_else(name: str, sizes: tuple[int, ...]) -> None:
    layout, generator = layout_of(*sizes), torch.Generator().manual_seed(3)
    # Four rounds see all layers; large weights, because each round weakens what an untrained reader passes on.
    reader = build(name, layout, small=sizes != (2, 32, 32, 1), options={"layers": 4}, input="scale", token_scale=10.0)
    weights = random_weights(layout)
    with torch.no_grad():
        logits = reader(weights)
        assert logits.shape == (3, 10)
        orders = random_permutations(layout, generator, 3)
        check_same(reader(permute_neurons(weights, orders)), logits)
        flipped = reader(flip_signs(weights, random_signs(layout, generator, 3)))
        (check_same if name in SCALE else check_other)(flipped, logits)
        # Rows without the columns that belong to them: other networks.
        *before, matrix, last = weights.weights
        uncoupled = Weights((*before, matrix.take_along_dim(orders[-1][..., None], 1), last), weights.biases)
        check_other(reader(uncoupled), logits)
        one_bias = Weights(weights.weights, (-weights.biases[0], *weights.biases[1:]))
        check_other(reader(one_bias), logits)
        check_other(reader(permuted_ends(weights, inputs=True)), logits)
        if layout.channels > 1:
            check_other(reader(permuted_ends(weights, inputs=False)), logits)


OTHER_OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("ng_gnn", {"reversed_edges": False}),
    ("ng_gnn", {"probes": 6}),
    ("ng_gnn", {"readout": "full", "layers": 1}),
    ("ng_t", {"reversed_edges": True, "probes": 3}),
    ("scalegmn", {"readout": "full", "plain_ends": True}),
    ("scalegmn", {"symmetrise": False, "skip": False, "edge_positions": False, "extra_positions": True}),
    ("scalegmn_b", {"readout": "full", "edge_positions": True, "skip": True}),
]


@pytest.mark.parametrize(("name", "options"), OTHER_OPTIONS)
def test_the_same_symmetries_with_other_options(name: str, options: dict[str, Any]) -> None:
    layout, generator = layout_of(2, 9, 6, 3), torch.Generator().manual_seed(3)
    reader, weights = build(name, layout, options=options), random_weights(layout)
    with torch.no_grad():
        logits = reader(weights)
        check_same(reader(permute_neurons(weights, random_permutations(layout, generator, 3))), logits)
        flipped = reader(flip_signs(weights, random_signs(layout, generator, 3)))
        (check_same if name in SCALE else check_other)(flipped, logits)
        check_other(reader(random_weights(layout)), logits)


@pytest.mark.parametrize("name", [*GRAPH_READERS, "dws", "nfn_np", "nfn_hnp"])
def test_what_is_pooled_is_standardised_over_the_batch(name: str) -> None:
    layout, options = layout_of(2, 6, 5, 1), {**SMALL.get(name, {}), "standardise_pooled": True}
    reader = make_reader(ReaderConfig(name=name, options=options, input="raw"), layout=layout, classes=10).double()
    (pooled,) = [module for module in reader.modules() if type(module) is nn.BatchNorm1d and not module.affine]
    seen: list[Tensor] = []
    pooled.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))  # type: ignore[arg-type]
    reader(random_weights(layout, 8))
    (before, after), = seen  # fmt: skip
    expected = (before - before.mean(0)) / (before.var(0, correction=0) + 1e-5).sqrt()
    check_same(after, expected)
    plain = make_reader(ReaderConfig(name=name, options=SMALL.get(name, {}), input="raw"), layout=layout, classes=10)
    count = [sum(p.numel() for p in r.parameters()) for r in (plain, reader)]
    assert count[0] == count[1]


def test_every_network_is_read_by_itself() -> None:
    layout = layout_of(2, 6, 5, 1)
    weights = random_weights(layout, 4)
    for name in GRAPH_READERS:
        reader = build(name, layout)
        check_same(reader(weights.map(lambda x: x[2:3])), reader(weights)[2:3])


# ---- layers: equivariant, and equal to loops over nodes and edges ------------------------------------------------


def graph_layers() -> dict[str, Callable[[Graph], Graph]]:
    layout = layout_of(2, 4, 3, 1)
    no_edge = torch.randn(6, dtype=torch.float64)
    transformer = RelationalLayer(
        NgTReader.Options(node_width=6, edge_width=6, attention_width=8, heads=2, dropout=0.0), left=2
    ).double()
    scale = ScaleGmnBReader.Options(width=6, mlp_width=5)
    layer = ScaleGmnLayer(layout, scale, backward=True, last=False).double().eval()
    positions = tuple(torch.randn(n, 6, dtype=torch.float64) for n in (2, 1, 1, 1))
    return {
        "ng_gnn": GnnLayer(layout, 6, reversed_edges=True, dropout=0.0, last=False).double(),
        "ng_t": lambda graph: transformer(graph, no_edge),
        "scalegmn_b": lambda graph: layer(graph, positions),
    }


def moved(graph: Graph, orders: list[Tensor], signs: list[Tensor]) -> Graph:
    """The graph with nodes in another order, which first got other signs; edges move and flip with both ends."""
    signed = [s[:, None] * x for s, x in zip(signs, graph.nodes, strict=True)]
    nodes = tuple(x[:, order] for x, order in zip(signed, orders, strict=True))

    def move(edges: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        flipped = [signs[i + 1][:, None, None] * signs[i][:, None] * e for i, e in enumerate(edges)]
        return tuple(e[:, orders[i + 1]][:, :, orders[i]] for i, e in enumerate(flipped))

    return Graph(nodes, move(graph.forward), move(graph.backward))


@pytest.mark.parametrize("name", ["ng_gnn", "ng_t", "scalegmn_b"])
def test_a_layer_moves_its_output_as_its_input_is_moved(name: str) -> None:
    sizes = (2, 4, 3, 1)
    layer, graph = graph_layers()[name], random_graph(sizes, nodes=6, edges=6)
    orders = [torch.arange(2), torch.tensor([2, 0, 3, 1]), torch.tensor([1, 2, 0]), torch.arange(1)]
    signs = [torch.ones(n, dtype=torch.float64) for n in sizes]
    if name == "scalegmn_b":
        signs[1], signs[2] = torch.tensor([1.0, -1, -1, 1]).double(), torch.tensor([-1.0, -1, 1]).double()
    out = layer(graph)
    for found, expected in zip(layer(moved(graph, orders, signs)), moved(out, orders, signs), strict=True):
        for a, b in zip(found, expected, strict=True):
            check_same(a, b)
    assert not torch.equal(out.nodes[1][:, orders[1]], out.nodes[1])


def test_pna_aggregators_against_numpy() -> None:
    ahead, behind = torch.randn(2, 3, 4, 5).double(), torch.randn(2, 7, 3, 5).double()
    for incoming, together in (
        ([(ahead, 2)], ahead.numpy()),
        ([(ahead, 2), (behind, 1)], np.concatenate([ahead.numpy(), behind.numpy().swapaxes(1, 2)], axis=2)),
    ):
        std = np.sqrt(together.var(2) + 1e-5)
        expected = np.concatenate([together.mean(2), together.min(2), together.max(2), std], axis=-1)
        np.testing.assert_allclose(aggregate(incoming).numpy(), expected, rtol=1e-12, atol=1e-12)


def test_degrees_amplify_as_in_pna() -> None:
    degrees = [32] * 2 + [2 + 32] * 32 + [32 + 1] * 32 + [32]
    logs = np.log(np.array(degrees) + 1)
    found = amplifications(layout_of(2, 32, 32, 1), reversed_edges=True)
    np.testing.assert_allclose(found, (logs / logs.mean())[[0, 2, 34, 66]], rtol=1e-12)
    forward = amplifications(layout_of(2, 32, 32, 1), reversed_edges=False)
    logs = np.log(np.array([0] * 2 + [2] * 32 + [32] * 33) + 1)
    np.testing.assert_allclose(forward, (logs / logs.mean())[[0, 2, 34, 66]], rtol=1e-12)


def flattened(graph: Graph) -> tuple[list[Tensor], dict[tuple[int, int], Tensor], list[int]]:
    """The first network as a list of nodes and a dictionary of edges, (source, target) -> feature; nodes' layers."""
    nodes = [x for layer in graph.nodes for x in layer[0]]
    layers = [i for i, layer in enumerate(graph.nodes) for _ in layer[0]]
    begin = [layers.index(i) for i in range(len(graph.nodes))]
    edges = {}
    for i, (ahead, behind) in enumerate(zip(graph.forward, graph.backward, strict=True)):
        for out in range(ahead.shape[1]):
            for inp in range(ahead.shape[2]):
                edges[begin[i] + inp, begin[i + 1] + out] = ahead[0, out, inp]
                edges[begin[i + 1] + out, begin[i] + inp] = behind[0, out, inp]
    return nodes, edges, layers


def check_graph(found: Graph, nodes: list[Tensor], edges: dict[tuple[int, int], Tensor]) -> None:
    found_nodes, found_edges, _ = flattened(found)
    check_same(torch.stack(found_nodes), torch.stack(nodes))
    assert found_edges.keys() == edges.keys()
    for pair, edge in edges.items():
        check_same(found_edges[pair], edge)


def test_a_gnn_layer_against_loops_over_nodes_and_edges() -> None:
    layout = layout_of(2, 4, 3, 2)
    layer = GnnLayer(layout, 6, reversed_edges=True, dropout=0.0, last=False).double()
    graph = random_graph(layout.sizes, nodes=6, edges=6)
    nodes, edges, _ = flattened(graph)
    neighbours = [[j for j in range(len(nodes)) if (j, i) in edges] for i in range(len(nodes))]
    logs = [np.log(len(near) + 1) for near in neighbours]
    after = []
    for i, x in enumerate(nodes):
        messages = []
        for j in neighbours[i]:
            film = layer.film.weight @ edges[j, i] + layer.film.bias
            joint = layer.message.weight @ torch.cat([x, nodes[j]]) + layer.message.bias
            messages.append(film[:6] * joint + film[6:])
        m = torch.stack(messages)
        summary = torch.cat([m.mean(0), m.amin(0), m.amax(0), (m.var(0, correction=0) + 1e-5).sqrt()])
        h = layer.out(layer.update(torch.cat([x, summary, summary * (logs[i] / np.mean(logs))])))
        after.append(nn.functional.silu(layer.norm(h)))
    new_edges = {}
    for (j, i), e in edges.items():
        hidden = layer.edge(e) + layer.source(after[j]) + layer.target(after[i])
        new_edges[j, i] = layer.edge_out(nn.functional.silu(hidden))
    check_graph(layer(graph), after, new_edges)


def test_relational_attention_against_loops_over_pairs() -> None:
    sizes, width, heads = (2, 4, 3, 2), 8, 2
    attention = RelationalAttention(6, 5, width, heads).double()
    graph, no_edge = random_graph(sizes, nodes=6, edges=5), torch.randn(5, dtype=torch.float64)
    nodes, edges, _ = flattened(graph)
    to_q, to_k, to_v = attention.node.weight.chunk(3)
    edge_q, edge_k, edge_s, edge_t = attention.edge.weight.chunk(4)
    received = []
    for i, x in enumerate(nodes):
        parts = []
        for head in (slice(0, 4), slice(4, 8)):
            logits, values = [], []
            for j, y in enumerate(nodes):
                e = edges.get((i, j), no_edge)
                query, key = (to_q @ x + edge_q @ e)[head], (to_k @ y + edge_k @ e)[head]
                logits.append(query @ key / width**0.5)
                values.append(((to_v @ y) * (edge_s @ e) + edge_t @ e)[head])
            share = torch.stack(logits).exp()
            parts.append(sum(s * v for s, v in zip(share / share.sum(), values, strict=True)))
        received.append(attention.out.weight @ torch.cat(parts) + attention.out.bias)
    found = torch.cat([x[0] for x in attention(graph, no_edge)])
    check_same(found, torch.stack(received))


def test_the_transformers_edge_update_against_loops_over_edges() -> None:
    update, graph = EdgeUpdate(6, 5, 7, 0.0).double(), random_graph((2, 4, 3), nodes=6, edges=5)
    nodes, edges, _ = flattened(graph)
    after = {}
    for (i, j), e in edges.items():
        hidden = update.both(torch.cat([e, edges[j, i]])) + update.source(nodes[i]) + update.target(nodes[j])
        e = update.norms[0](e + update.first(hidden))
        after[i, j] = update.norms[1](e + update.second(e))
    no_edge = torch.randn(5, dtype=torch.float64)
    check_graph(update(graph, no_edge), nodes, after)
    alike = graph._replace(backward=tuple(no_edge.expand_as(e) for e in graph.forward))
    for found, expected in zip(update(graph._replace(backward=()), no_edge), update(alike, no_edge), strict=True):
        for a, b in zip(found, expected, strict=True):
            check_same(a, b)


@pytest.mark.parametrize("reversed_edges", [False, True])
def test_the_transformer_leaves_out_only_what_is_not_read(reversed_edges: bool) -> None:
    layout = layout_of(2, 4, 3, 2)
    reader = build("ng_t", layout, options={"layers": 3, "reversed_edges": reversed_edges})
    assert isinstance(reader, NgTReader)
    weights, no_edge = random_weights(layout), reader.graph.no_edge()
    graph = reader.graph(weights, weights)
    if not reversed_edges:
        graph = graph._replace(backward=tuple(no_edge.expand_as(e) for e in graph.forward))
    for layer in reader.layers:
        received = layer.attention(graph, no_edge)
        nodes = [layer.norms[0](x + layer.mix(r)) for x, r in zip(graph.nodes, received, strict=True)]
        graph = graph._replace(nodes=tuple(layer.norms[1](x + layer.mlp(x)) for x in nodes))
        if layer.edges is not None:
            graph = layer.edges(graph, no_edge)
    check_same(reader(weights), reader.readout(graph.nodes[-1].flatten(1)))


def plain_mlp(mlp: Mlp, *parts: Tensor) -> Tensor:
    return mlp.second(nn.functional.silu(mlp.norm(mlp.first(torch.cat(parts)))))


def invariant(module: SignInvariant, x: Tensor) -> Tensor:
    return x.abs() if module.rho is None else plain_mlp(module.rho, x) + plain_mlp(module.rho, -x)


def scale_eq(module: ScaleEq, x: Tensor, place: str, *extra: Tensor) -> Tensor:
    if place == "hidden":
        return (module.linear.weight @ x) * plain_mlp(module.mlp, invariant(module.invariant, x), *extra)
    if module.plain:
        return plain_mlp(module.ends[place == "output"], x, *extra)
    return (module.linear.weight @ x) * plain_mlp(module.ends[0], x, *extra)


SCALE_LAYERS: list[dict[str, Any]] = [
    {},
    {"plain_ends": True, "symmetrise": False, "skip": True, "extra_positions": False},
]


@pytest.mark.parametrize("options", SCALE_LAYERS, ids=["released", "plain"])
def test_a_scalegmn_layer_against_loops_over_nodes_and_edges(options: dict[str, Any]) -> None:
    layout = layout_of(2, 4, 3, 2)
    chosen = ScaleGmnBReader.Options(width=6, mlp_width=5, **options)
    layer = ScaleGmnLayer(layout, chosen, backward=True, last=False).double().eval()
    graph = random_graph(layout.sizes, nodes=6, edges=6)
    per_layer = tuple(torch.randn(n, 6, dtype=torch.float64) for n in (2, 1, 1, 2))
    found = layer(graph, per_layer if chosen.extra_positions else None)
    nodes, edges, layers = flattened(graph)
    places = [("input", "hidden", "hidden", "output")[k] for k in layers]
    positions = [p for k, n in enumerate(layout.sizes) for p in per_layer[k].expand(n, -1)]
    extra = [(p,) if chosen.extra_positions else () for p in positions]
    after = []
    for i, x in enumerate(nodes):
        received = [torch.zeros(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)]
        for j, y in enumerate(nodes):
            if (j, i) in edges:
                back = layers[j] > layers[i]
                way = layer.backward_messages if back else layer.forward_messages
                assert way is not None
                message = (way.edge.weight @ edges[j, i]) * (way.node.weight @ y)
                received[back] += scale_eq(way.message, message, places[i], *extra[j])
        updated = scale_eq(layer.update, torch.cat([x, *received]), places[i], *extra[i])
        after.append(updated if layer.skip is None else updated + layer.skip.weight @ x)
    new_edges = dict(edges)
    for (j, i), e in edges.items():
        if layers[i] > layers[j]:
            ends = [invariant(layer.invariant, nodes[k]) for k in (j, i)]
            new_edges[j, i] = (layer.edge.weight @ e) * plain_mlp(layer.ends, *ends)
    check_graph(found, after, new_edges)


def test_edges_are_encoded_as_the_two_maps_in_turn_would() -> None:
    layout = layout_of(2, 4, 3, 1)
    for reversed_edges in (False, True):
        graph = build("ng_gnn", layout, options={"reversed_edges": reversed_edges}).graph
        weights = random_weights(layout)
        found = graph(weights, weights)  # type: ignore[operator]
        for w, ahead, behind in zip(weights.weights, found.forward, found.backward or found.forward, strict=True):
            nought = torch.zeros_like(w)
            triple = torch.stack([w, nought, w] if reversed_edges else [w], dim=-1)
            check_same(ahead, graph.edge(graph.encode_weight(triple)))  # type: ignore[operator, union-attr]
            if reversed_edges:
                turned = torch.stack([nought, w, w], dim=-1)
                check_same(behind, graph.edge(graph.encode_weight(turned)))  # type: ignore[operator, union-attr]


def test_gaussian_encoding_against_numpy() -> None:
    encoding = GaussianEncoding(3, 7, 2.0)
    x = torch.randn(4, 3)
    angle = 2 * np.pi * x.numpy() @ encoding.frequencies.numpy().T
    expected = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    np.testing.assert_allclose(encoding(x).numpy(), expected, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(encoding(x), encoding(x).float())
    assert abs(GaussianEncoding(1, 4000, 2.0).frequencies.std().item() - 2) < 0.1
    assert "frequencies" in encoding.state_dict()


# ---- recomputation, inputs, refusals -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRAPH_READERS)
def test_recomputed_in_parts_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = layout_of(2, 6, 5, 1)
    monkeypatch.setattr(graph_file, "EDGES_AT_ONCE", 2 * (12 + 30 + 5))  # five networks in parts of two
    plain, parts = build(name, layout), build(name, layout, checkpoint=True)
    parts.load_state_dict(plain.state_dict())
    weights = random_weights(layout, 5)
    results = []
    for reader in (plain, parts):
        given = weights.map(lambda x: x.clone().requires_grad_())
        logits = reader(given)
        logits.square().sum().backward()
        grads = [x.grad for x in (*given.weights, *given.biases, *reader.parameters()) if x.grad is not None]
        results.append((logits, *grads))
    assert len(results[0]) == len(results[1])
    for a, b in zip(*results, strict=True):
        check_same(a, b)
    with torch.no_grad():
        check_same(parts(weights), results[0][0])


@pytest.mark.parametrize("name", GRAPH_READERS)
def test_dropout_falls_alike_in_the_recomputation(name: str) -> None:
    layout = layout_of(2, 6, 5, 1)
    weights, results = random_weights(layout), []
    plain, parts = build(name, layout).train(), build(name, layout, checkpoint=True).train()
    parts.load_state_dict(plain.state_dict())
    for reader in (plain, parts):
        torch.manual_seed(5)
        logits = reader(weights)
        logits.square().sum().backward()
        results.append([logits, *(p.grad for p in reader.parameters() if p.grad is not None)])
    for a, b in zip(*results, strict=True):
        check_same(a, b)
    assert not torch.equal(plain.eval()(weights), results[0][0])


def test_probes_are_what_the_networks_draw() -> None:
    layout = layout_of(2, 6, 5, 3)
    reader, weights = build("ng_gnn", layout, options={"probes": 7}), random_weights(layout)
    probes = reader.graph.probes
    answers = render(layout, weights, probes.coords)
    check_same(probes(weights)[-1], probes.embed[-1](answers.mT))
    hidden = torch.sin(30 * (weights.weights[0][1] @ probes.coords[4] + weights.biases[0][1]))
    caught: list[Tensor] = []
    probes.embed[1].register_forward_hook(lambda module, inputs, output: caught.append(inputs[0]))
    reader(weights)
    check_same(caught[0][1, :, 4], hidden)


@pytest.mark.parametrize("name", ["ng_gnn", "ng_t"])
def test_probes_of_offsets_are_refused(name: str) -> None:
    layout = layout_of(2, 6, 5, 3, shared_output=True)
    weights = random_weights(layout)
    reader = build(name, layout, options={"probes": 7})
    assert reader(weights).isfinite().all()
    offsets = Weights(
        (*weights.weights[:-1], torch.zeros_like(weights.weights[-1])),
        (*weights.biases[:-1], torch.zeros_like(weights.biases[-1])),
    )
    with pytest.raises(InputError, match=r"reader\.options\.probes asks the networks .* offsets from a common base"):
        build(name, layout, options={"probes": 7})(offsets)


@pytest.mark.parametrize("name", SCALE)
def test_scalegmn_refuses_a_mean_and_standardises_layers_without_one(name: str) -> None:
    layout, generator = layout_of(2, 6, 5, 3), torch.Generator().manual_seed(1)
    for config in ({"input": "standardise"}, {"input": "scale", "token_scale": 0.0}):
        with pytest.raises(InputError, match=r"whose signs may flip, and .* subtracts a mean"):
            build(name, layout, **config)
    weights = random_weights(layout, 50).map(lambda x: 3 * x + 1)
    reader = build(name, layout, input="standardise_layers")
    moments = [weights.map(f) for f in (lambda x: x.mean(0, True), lambda x: x.std(0, correction=0, keepdim=True))]
    reader.learn_statistics(*moments)
    for given, read in zip(
        (*weights[0], *weights[1]), (*reader.inputs(weights)[0], *reader.inputs(weights)[1]), strict=True
    ):
        np.testing.assert_allclose(read.numpy(), given.numpy() / np.sqrt((given.numpy() ** 2).mean()), rtol=1e-9)
    flipped = flip_signs(weights, random_signs(layout, generator, 50))
    check_same(reader(flipped), reader(weights))


def test_wrong_options_are_refused() -> None:
    layout = layout_of(2, 6, 5, 3)
    with pytest.raises(InputError, match=r"reader\.options\.readout is 'last'; there are auto, output, full"):
        build("scalegmn", layout, options={"readout": "last"})
    with pytest.raises(InputError, match=r"attention_width is 9; it must be a multiple of the 2 heads"):
        build("ng_t", layout, options={"attention_width": 9})


# ---- end to end --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRAPH_READERS)
def test_offsets_are_read_and_reached_where_the_output_layer_says_nothing(name: str) -> None:
    layout = layout_of(2, 6, 6, 6, 1, shared_output=True)
    reader = build(name, layout, input="scale", token_scale=2.0, options={"layers": 4})  # as deep as the networks
    weights = random_weights(layout)
    sine = [x.requires_grad_() for x in (*weights.weights[:-1], *weights.biases[:-1])]
    nought = (torch.zeros_like(weights.weights[-1]), torch.zeros_like(weights.biases[-1]))
    offsets = Weights((*weights.weights[:-1], nought[0]), (*weights.biases[:-1], nought[1]))
    logits = reader(offsets)
    assert (logits[0] - logits[1]).abs().max() > 1e-8
    for gradient in torch.autograd.grad(logits.square().sum(), sine):
        assert (gradient.flatten(1).abs().amax(1) > 0).all()


@pytest.mark.parametrize("name", GRAPH_READERS)
def test_a_training_step_on_digits(name: str) -> None:
    options = [f"reader.options.{key}={value}" for key, value in SMALL[name].items()]
    loaded = load_config(
        ClassifyConfig,
        None,
        ["siren.hidden=16", "siren.hidden_layers=1", "inner_loop.steps=2", f"reader.name={name}", *options],
    )
    split = open_split("builtin:digits", "train", device=torch.device("cpu"), limit=8)
    batch = next(split.batches(batch_size=8))
    config = model_config(loaded, split.info.facts)
    for checkpoint in (False, True):  # also that the step can be foretold: nothing depends on the content of tensors
        changed = replace(config, reader=replace(config.reader, checkpoint=checkpoint))
        foretold = estimate(changed, batch, batch_size=8, precision="fp32", device=torch.device("cpu"))
        assert foretold is not None
        assert foretold.tensors > 0
    model = MetaWeightTransformer(config)
    optimizer = make_optimizer(model, loaded.optim)
    meter = Meter(torch.device("cpu"))
    train_step(
        model, batch, step=1, epoch=0, seed=0, inner_loop=config.inner_loop, optimizer=optimizer, clip_norm=1.0,
        autocast=nullcontext(), backward=Tensor.backward, unscale=lambda: None, meter=meter,
    )  # fmt: skip
    assert all(np.isfinite(v) for v in meter.read().values())
    for group, parameters in model.parameter_groups().items():
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in parameters), group
