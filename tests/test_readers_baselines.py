"""mlp, linear, knn, pixel_cnn, inr2vec and inr2array: sizes, symmetries, phases, and what they say when misused."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier

from mwt.config import ReaderConfig
from mwt.errors import InputError
from mwt.readers import Reader, load_reader, make_reader
from mwt.readers.inr2array import NPAttention
from mwt.readers.inr2vec import positional_encoding
from mwt.readers.two_phase import TwoPhaseReader
from mwt.symmetry import permute_neurons, random_permutations
from mwt.weight_space import Layout, Weights, render

LAYOUT = Layout(sizes=(2, 8, 8, 8, 3), omegas=(10.0, 1.0, 1.0), shared_output=False)
D, C, H, N, K = 2, 3, 8, LAYOUT.count, 5
SMALL = {
    "linear": {},
    "mlp": {"width": 7},
    "inr2vec": {"width": 6, "code": 12, "decoder_width": 10, "frequencies": 3},
    "inr2array": {
        "width": 16, "heads": 2, "blocks": 2, "patches": 2, "field_width": 4,
        "classifier_width": 24, "classifier_heads": 2, "classifier_blocks": 2,
    },
    "pixel_cnn": {"width": 4, "stages": 2},
    "knn": {"neighbours": 3},
}  # fmt: skip
TWO_PHASE = ("inr2vec", "inr2array")


def make(name: str, reader_input: str = "raw", **options: object) -> Reader:
    config = ReaderConfig(name=name, input=reader_input, options={**SMALL.get(name, {}), **options})
    return make_reader(config, layout=LAYOUT, classes=K).double().eval()


def networks(count: int) -> Weights:
    return Weights.unflatten(torch.randn(count, N, dtype=torch.float64), LAYOUT)


def parameters(reader: torch.nn.Module) -> int:
    return sum(p.numel() for p in reader.parameters())


# ---- sizes -------------------------------------------------------------------------------------------------------


def dense(*sizes: int) -> int:
    """Of a chain of linear layers with biases."""
    return sum(a * b + b for a, b in pairwise(sizes))


def test_sizes_of_the_flat_readers() -> None:
    assert dense(2, 8, 8, 8, 3) == N
    assert parameters(make("linear")) == dense(N, K)
    with torch.device("meta"):
        navon, zhou = (
            make_reader(ReaderConfig(name="mlp", options=options), layout=LAYOUT, classes=K)
            for options in ({"batch_norm": True}, {"width": 1000, "depth": 3, "dropout": 0.5})
        )
    assert parameters(navon) == dense(N, 32, 32, 32, 32, K) + 4 * 2 * 32
    assert parameters(zhou) == dense(N, 1000, 1000, 1000, K)
    assert sum(isinstance(layer, torch.nn.Dropout) for layer in zhou.modules()) == 3
    cnn = 9 * C * 4 + 9 * 4 * 4 + 2 * 2 * 4 + 9 * 4 * 8 + 9 * 8 * 8 + 2 * 2 * 8 + dense(8, K)
    assert parameters(make("pixel_cnn")) == cnn
    assert parameters(make("knn")) == 0


@pytest.mark.parametrize("options", [{}, SMALL["inr2vec"]], ids=["published", "small"])
def test_sizes_of_inr2vec(options: dict) -> None:
    with torch.device("meta"):
        reader = make_reader(ReaderConfig(name="inr2vec", options=options), layout=LAYOUT, classes=K)
    w, c, d, f = (
        options.get(name, default)
        for name, default in (("width", 512), ("code", 1024), ("decoder_width", 512), ("frequencies", 10))
    )
    encoder = dense(H, w, w, 2 * w, 2 * w, c) + 2 * (w + w + 2 * w + 2 * w)
    inputs = c + D * (1 + 2 * f)
    decoder = 2 * dense(inputs, d) + 4 * dense(d, d) + dense(d, C)
    classifier = dense(c, c // 2, c // 4, K) + 2 * (c // 2 + c // 4)
    assert isinstance(reader, TwoPhaseReader)
    assert [parameters(part) for part in (reader.encoder, reader.decoder, reader.classifier)] == [
        encoder, decoder, classifier
    ]  # fmt: skip
    assert parameters(reader) == encoder + decoder + classifier
    formula = (H * w + w) + (w**2 + w) + (2 * w**2 + 2 * w) + (4 * w**2 + 2 * w) + 12 * w + 2 * w * c + c
    assert encoder == formula  # the docstring's
    assert classifier == c * c / 2 + c * c / 8 + K * c / 4 + 9 * c / 4 + K


@pytest.mark.parametrize("options", [{}, SMALL["inr2array"]], ids=["published", "small"])
def test_sizes_of_inr2array(options: dict) -> None:
    with torch.device("meta"):
        reader = make_reader(ReaderConfig(name="inr2array", options=options), layout=LAYOUT, classes=K)
    c, blocks, patches, field = (
        options.get(name, default)
        for name, default in (("width", 256), ("blocks", 6), ("patches", 4), ("field_width", 16))
    )
    v, depth, latents = options.get("classifier_width", 512), options.get("classifier_blocks", 12), patches**D
    attention, layers = 3 * c * c + dense(c, c), len(LAYOUT.shapes)
    block = attention + dense(c, 4 * c, c) + 2 * 2 * c
    encoder = 2 * layers * c + (D + C) * c + blocks * block + 2 * c + latents * c + dense(c, 3 * c) + dense(c, c)
    decoder = dense(c, dense(D, field, field, C))
    layer = dense(v, 3 * v) + dense(v, v) + dense(v, 4 * v, v) + 2 * 2 * v
    classifier = dense(c, v) + v + latents * v + depth * layer + 2 * v + dense(v, v, K)
    assert isinstance(reader, TwoPhaseReader)
    assert [parameters(part) for part in (reader.encoder, reader.decoder, reader.classifier)] == [
        encoder, decoder, classifier
    ]  # fmt: skip
    assert block == 12 * c * c + 10 * c  # the docstring's
    assert layer == 12 * v * v + 13 * v


# ---- symmetries --------------------------------------------------------------------------------------------------


def orders(count: int = 1) -> tuple[torch.Tensor, ...]:
    return random_permutations(LAYOUT, torch.Generator().manual_seed(3), count)


def difference(reader: Reader, one: Weights, other: Weights) -> float:
    with torch.no_grad():
        return float((reader(one) - reader(other)).abs().max())


def test_inr2array_is_invariant_to_orders_of_hidden_neurons_and_to_nothing_less() -> None:
    reader, weights = make("inr2array"), networks(3)
    assert difference(reader, weights, permute_neurons(weights, orders(3))) < 1e-12
    rows = Weights((weights.weights[0][:, orders()[0][0]], *weights.weights[1:]), weights.biases)
    assert difference(reader, weights, rows) > 1e-6  # rows without their biases and the columns after them
    inputs = Weights((weights.weights[0].flip(2), *weights.weights[1:]), weights.biases)
    assert difference(reader, weights, inputs) > 1e-6  # (y, x) are not (x, y)


def test_inr2vec_reads_a_set_of_rows_which_is_another_symmetry_than_that_of_networks() -> None:
    reader, weights = make("inr2vec"), networks(2)
    one, two = orders()[0][0], orders()[1][0]
    # Rows of hidden matrices in any order, even from layer to layer: it makes no difference to it, but to the network.
    moved = torch.cat([weights.weights[1], weights.weights[2]], dim=1)[:, torch.randperm(2 * H)]
    rows = Weights((weights.weights[0], moved[:, :H], moved[:, H:], weights.weights[3]), weights.biases)
    coords = torch.rand(5, D, dtype=torch.float64)
    assert difference(reader, weights, rows) < 1e-12
    assert float((render(LAYOUT, weights, coords) - render(LAYOUT, rows, coords)).abs().max()) > 0.1
    # Orders of neurons, which make no difference to the network, do to it: in the last sine layer through the bias
    # alone, which is a row by itself, elsewhere through the columns of the next layer as well.
    still = torch.arange(H)[None]
    last = permute_neurons(weights, (still, still, one[None]))
    assert float((render(LAYOUT, weights, coords) - render(LAYOUT, last, coords)).abs().max()) < 1e-12
    assert difference(reader, weights, last) > 1e-6
    no_bias = Weights(weights.weights, tuple(b * 0 for b in weights.biases))
    assert difference(reader, no_bias, permute_neurons(no_bias, (still, still, one[None]))) < 1e-12
    assert difference(reader, no_bias, permute_neurons(no_bias, (still, two[None], still))) > 1e-6


@pytest.mark.parametrize("name", ["mlp", "linear", "transformer"])
def test_what_knows_nothing_of_networks_is_not_invariant(name: str) -> None:
    options = {"token_scale": 1.0, "head_dim": 4, "blocks": 2} if name == "transformer" else {}
    reader = make_reader(ReaderConfig(name=name, **options), layout=LAYOUT, classes=K).double().eval()
    weights = networks(2)
    assert difference(reader, weights, permute_neurons(weights, orders(2))) > 1e-6


def test_attention_among_weights_against_loops() -> None:
    """Equation by equation, for one network, one head: what each weight attends to, written out."""
    torch.manual_seed(1)
    layout, c = Layout(sizes=(2, 3, 4, 1), omegas=(1.0, 1.0), shared_output=False), 4
    attention = NPAttention(c, heads=1).double().requires_grad_(False)
    w = [torch.randn(1, o, i, c, dtype=torch.float64) for o, i in layout.shapes]
    b = [torch.randn(1, o, c, dtype=torch.float64) for o, _ in layout.shapes]
    result = attention(Weights(tuple(w), tuple(b)))

    def qkv(x: torch.Tensor) -> list[np.ndarray]:
        return [part.numpy() for part in (x @ attention.qkv.weight.T).chunk(3, dim=-1)]

    def attend(q: np.ndarray, keys: list[np.ndarray], values: list[np.ndarray]) -> np.ndarray:
        scores = np.array([(q * k).sum() for k in keys]) / math.sqrt(q.size)
        share = np.exp(scores - scores.max())
        return sum(s * v for s, v in zip(share / share.sum(), values, strict=True))

    ws, bs = [qkv(x[0]) for x in w], [qkv(x[0]) for x in b]
    keys = [x[1].mean((0, 1)) for x in ws] + [x[1].mean(0) for x in bs]
    values = [x[2].mean((0, 1)) for x in ws] + [x[2].mean(0) for x in bs]

    def neurons(layer: int, part: int) -> list[np.ndarray]:
        """Tokens over the neurons of a layer: columns of the matrix before, its bias, rows of the matrix after."""
        found = []
        if layer > 0:
            found += [ws[layer - 1][part][:, k] for k in range(layout.sizes[layer - 1])] + [bs[layer - 1][part]]
        if layer < len(ws):
            found += [ws[layer][part][j] for j in range(layout.sizes[layer + 1])]
        return found

    i, j, k = 1, 3, 2  # one weight and one bias in the middle
    column = attend(ws[i][0][:, k], neurons(i + 1, 1), neurons(i + 1, 2))[j]
    row = attend(ws[i][0][j], neurons(i, 1), neurons(i, 2))[k]
    alone = attend(ws[i][0][j, k], keys, values)
    out = lambda x: attention.out(torch.from_numpy(x))  # noqa: E731
    torch.testing.assert_close(result.weights[i][0, j, k], out(column + row + alone), rtol=0, atol=1e-12)
    bias = attend(bs[i][0], neurons(i + 1, 1), neurons(i + 1, 2))[j] + attend(bs[i][0][j], keys, values)
    torch.testing.assert_close(result.biases[i][0, j], out(bias), rtol=0, atol=1e-12)


# ---- two phases --------------------------------------------------------------------------------------------------


def test_positional_encoding_against_numpy() -> None:
    coords = torch.rand(4, 2, dtype=torch.float64) * 2 - 1
    x = coords.numpy()[:, :, None] * 2.0 ** np.arange(3)
    expected = np.concatenate([coords.numpy(), np.sin(x).reshape(4, -1), np.cos(x).reshape(4, -1)], axis=1)
    np.testing.assert_allclose(positional_encoding(coords, 3).numpy(), expected, atol=1e-12)


def test_the_published_inr2array_standardises_no_latents() -> None:
    reader = make("inr2array", dropout=0.0)
    assert not any(isinstance(module, torch.nn.BatchNorm1d) for module in reader.modules())
    own = make("inr2array", standardise_latents=True, dropout=0.0)
    assert parameters(own) == parameters(reader)
    with torch.no_grad():  # in training a constant that is added to all latents does not matter
        latents = torch.randn(5, *own.encode(networks(1)).shape[1:], dtype=torch.float64)
        moved = own.train().classifier(latents + 3)
        torch.testing.assert_close(moved, own.classifier(latents), atol=1e-4, rtol=1e-4)
        assert not torch.allclose(reader.train().classifier(latents + 3), reader.classifier(latents), atol=1e-2)


def test_each_latent_of_inr2array_draws_its_own_patch() -> None:
    reader = make("inr2array")
    assert isinstance(reader, TwoPhaseReader)
    codes = torch.randn(2, 4, 16, dtype=torch.float64)
    coords = torch.tensor([[-0.9, 0.3], [0.2, 0.9], [-1.0, -1.0], [0.5, -0.5], [1.0, 1.0]], dtype=torch.float64)
    patches = [1, 3, 0, 2, 3]
    drawn = reader.decoder(codes, coords)
    for m in range(4):
        touched = codes.clone()
        touched[:, m] += 1
        changed = (reader.decoder(touched, coords) - drawn).abs().amax((0, 2)) > 1e-9
        assert changed.tolist() == [patch == m for patch in patches]


def test_patches_are_drawn_in_full_precision() -> None:
    decoder = make("inr2array").float().decoder  # type: ignore[union-attr]
    codes, coords = torch.randn(2, 4, 16), torch.rand(50, D) * 2 - 1
    with torch.no_grad():
        decoder.make.weight.zero_()  # the SIRENs are the bias, which no precision of the product changes
        decoder.make.bias.copy_(decoder.make.bias.bfloat16())
        exact = decoder(codes, coords)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(decoder(codes, coords), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", TWO_PHASE)
def test_a_first_phase_learns_to_draw_and_a_frozen_encoder_stays(name: str) -> None:
    torch.manual_seed(0)
    reader = make(name, dropout=0.0, **({"blocks": 1, "field_width": 8} if name == "inr2array" else {})).train()
    assert isinstance(reader, TwoPhaseReader)
    layout = reader.layout
    weights = Weights.unflatten(torch.randn(4, N, dtype=torch.float64) * 0.2, layout)
    coords = torch.cartesian_prod(torch.linspace(-1, 1, 4), torch.linspace(-1, 1, 4)).double()
    optimizer = torch.optim.Adam(reader.parameters(), lr=1e-2 if name == "inr2vec" else 2e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = reader.pretraining_loss(weights, weights, coords)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    variance = float(render(layout, weights, coords).var())
    assert losses[-1] < 0.8 * min(losses[0], variance)

    reader.freeze_encoder()
    reader.train()
    before = {key: value.clone() for key, value in reader.encoder.state_dict().items()}
    head = reader.classifier.state_dict()
    head = {key: value.clone() for key, value in head.items()}
    optimizer = torch.optim.Adam([p for p in reader.parameters() if p.requires_grad], lr=1e-2)
    torch.nn.functional.cross_entropy(reader(weights), torch.arange(4) % K).backward()
    optimizer.step()
    assert all(torch.equal(before[key], value) for key, value in reader.encoder.state_dict().items())
    assert any(not torch.equal(head[key], value) for key, value in reader.classifier.state_dict().items())


# ---- nearest neighbours, and what is refused -----------------------------------------------------------------------


def test_nearest_neighbours_against_scikit_learn() -> None:
    train, test, labels = networks(60), networks(20), torch.randint(K, (60,))
    reader = make("knn", neighbours=3)
    reader.memorise([(train.map(lambda x: x[:40]), labels[:40]), (train.map(lambda x: x[40:]), labels[40:])])
    oracle = KNeighborsClassifier(3).fit(train.flat().numpy(), labels.numpy())
    np.testing.assert_array_equal(reader(test).argmax(-1).numpy(), oracle.predict(test.flat().numpy()))

    chosen = make("knn", neighbours=0)
    shifted = Weights.unflatten(train.flat() + labels[:, None] * 0.3, LAYOUT)  # classes that can be told apart
    chosen.memorise([(shifted, labels)])
    points = shifted.flat().numpy()
    accuracy = {
        k: (
            cross_val_predict(KNeighborsClassifier(k), points, labels.numpy(), cv=LeaveOneOut()) == labels.numpy()
        ).mean()
        for k in (1, 3, 5, 7, 9, 15, 25)
    }
    assert accuracy[int(chosen.k)] == max(accuracy.values())


def test_readers_that_need_more_than_a_batch_of_weights_say_so() -> None:
    with pytest.raises(InputError, match="keeps the networks of a training split"):
        make("knn")(networks(2))
    with pytest.raises(InputError, match="reads images and not weights"):
        make("pixel_cnn")(networks(2))
    uneven = Layout(sizes=(2, 8, 6, 3), omegas=(1.0, 1.0), shared_output=False)
    with pytest.raises(InputError, match=r"one width; these networks are \[2, 8, 6, 3\]"):
        make_reader(ReaderConfig(name="inr2vec"), layout=uneven, classes=K)
    for name, option, value in (("inr2vec", "code", 6), ("inr2array", "width", 10), ("knn", "neighbours", -1)):
        with pytest.raises(InputError, match=f"reader.options.{option} is {value}"):
            make(name, **{option: value})


@pytest.mark.parametrize("name", SMALL)
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    reader = make(name, "raw").float()
    reader.facts = {"values": "phi", "classes": list("abcde")}
    x = networks(4).map(torch.Tensor.float)
    if name == "knn":
        reader.memorise([(networks(9).map(torch.Tensor.float), torch.randint(K, (9,)))])
    given = torch.randn(4, C, 9, 9) if name == "pixel_cnn" else x
    reader.save_pretrained(tmp_path / "reader")
    again = load_reader(tmp_path / "reader")
    assert torch.equal(again(given), reader(given))
    assert (again.layout, again.config, again.facts) == (reader.layout, reader.config, reader.facts)
    (tmp_path / "reader" / "model.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_reader(tmp_path / "reader")
    with pytest.raises(InputError, match="holds no reader"):
        load_reader(tmp_path)
