"""DWS and NFN: the symmetries that they have and those that they have not, their sizes, and NFN against its authors'
own layers."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipes.read import open_split
from data_pipes.schema import read_info
from mwt.config import InnerLoopConfig, LossConfig, ModelConfig, OptimConfig, ReaderConfig, SirenConfig
from mwt.errors import InputError
from mwt.model import MetaWeightTransformer
from mwt.optim import make_optimizer
from mwt.readers import Reader, make_reader
from mwt.readers.dws import DWSLayer, DWSReader, fold, places
from mwt.readers.nfn import FourierFeatures, HNPLinear, IOEncoding, NPLinear, hnp_pool, np_pool
from mwt.symmetry import permute_neurons, random_permutations
from mwt.training import Meter, train_step
from mwt.weight_space import Layout, Weights

READERS = ["dws", "nfn_np", "nfn_hnp"]
SIZES = [(2, 32, 32, 1), (2, 16, 16, 16, 3), (3, 12, 2)]
SMALL: dict[str, dict[str, Any]] = {
    "dws": {"hidden": 8, "n_hidden": 2},
    "nfn_np": {"channels": 6, "head": 16},
    "nfn_hnp": {"channels": 6, "head": 16},
}


def layout_of(*sizes: int) -> Layout:
    return Layout(sizes=sizes, omegas=(30.0,) * (len(sizes) - 2), shared_output=False)


def build(name: str, layout: Layout, **options: Any) -> Reader:
    torch.manual_seed(1)
    config = ReaderConfig(name=name, input="raw", options={**SMALL[name], **options})
    return make_reader(config, layout=layout, classes=5).double()


def random_weights(layout: Layout, count: int = 3, channels: tuple[int, ...] = ()) -> Weights:
    def draw(*shape: int) -> Tensor:
        return torch.randn(count, *channels, *shape, dtype=torch.float64)

    return Weights(tuple(draw(*s) for s in layout.shapes), tuple(draw(s[0]) for s in layout.shapes))


def permute_features(features: Weights, permutations: list[Tensor]) -> Weights:
    """Weights [B, C, out, in] with neurons of every layer, inputs and outputs too, in another order."""
    before, after = permutations[:-1], permutations[1:]
    return Weights(
        tuple(w[..., o, :][..., i] for w, i, o in zip(features.weights, before, after, strict=True)),
        tuple(b[..., o] for b, o in zip(features.biases, after, strict=True)),
    )


def assert_near(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dws", {}),
        ("dws", {"set_layer": "deepsets", "reduction": "mean", "batch_norm": False}),
        ("nfn_np", {}),
        ("nfn_hnp", {}),
        ("nfn_np", {"fourier": 5, "io_encoding": True}),
        ("nfn_hnp", {"fourier": 5, "io_encoding": True}),
    ],
)
def test_logits_ignore_the_order_of_hidden_neurons_and_nothing_else(
    name: str, options: dict[str, Any], sizes: tuple[int, ...]
) -> None:
    layout = layout_of(*sizes)
    reader, weights = build(name, layout, **options), random_weights(layout)
    permutations = random_permutations(layout, torch.Generator().manual_seed(2), 3)
    for training in (True, False):  # batch norm sees the same numbers either way
        reader.train(training)
        logits = reader(weights)
        assert logits.std(0).min() > 1e-6, "all networks alike"
        assert_near(reader(permute_neurons(weights, permutations)), logits)

    def changes(matrices: tuple[Tensor, ...], biases: tuple[Tensor, ...]) -> bool:
        return bool((reader(Weights(matrices, biases)) - logits).abs().max() > 1e-6)

    rows, *rest = weights.weights
    order = permutations[0]
    # One network's neurons moved without their columns; their biases alone.
    assert changes((rows.take_along_dim(order[..., None], 1), *rest), weights.biases)
    assert changes(weights.weights, (weights.biases[0].take_along_dim(order, 1), *weights.biases[1:]))
    ends_matter = name != "nfn_np" or options.get("io_encoding", False)
    assert changes((rows.flip(-1), *rest), weights.biases) == ends_matter
    if sizes[-1] > 1:
        *others, last = weights.weights
        turned = (*weights.biases[:-1], weights.biases[-1].flip(-1))
        assert changes((*others, last.flip(1)), turned) == ends_matter


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("linear", [NPLinear, HNPLinear])
def test_a_linear_layer_of_nfn_commutes_with_permutations(
    linear: type[NPLinear] | type[HNPLinear], sizes: tuple[int, ...]
) -> None:
    layout = layout_of(*sizes)
    layer = linear(layout.shapes, 3, 4).double()
    features = random_weights(layout, channels=(3,))
    orders = [torch.randperm(size) for size in sizes]
    if linear is HNPLinear:
        orders[0], orders[-1] = torch.arange(sizes[0]), torch.arange(sizes[-1])
    moved, expected = layer(permute_features(features, orders)), permute_features(layer(features), orders)
    for found, right in zip((*moved.weights, *moved.biases), (*expected.weights, *expected.biases), strict=True):
        assert_near(found, right)
    orders[0] = orders[0].flip(0)  # the inputs: NP commutes with that too, HNP does not
    moved, expected = layer(permute_features(features, orders)), permute_features(layer(features), orders)
    assert (moved.weights[0] - expected.weights[0]).abs().max().item() < 1e-10 or linear is HNPLinear
    assert (moved.weights[0] - expected.weights[0]).abs().max().item() > 1e-3 or linear is NPLinear


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("set_layer", ["sab", "deepsets"])
def test_a_layer_of_dws_commutes_with_permutations(set_layer: str, sizes: tuple[int, ...]) -> None:
    layout, features = layout_of(*sizes), 4
    where = places(layout)
    layer = DWSLayer(where, features, 6, set_layer=set_layer, heads=2, reduction="max").double()
    tensors = [
        torch.randn(3, *(sizes[axis] for axis in place.axes), features * place.folded, dtype=torch.float64)
        for place in where
    ]
    orders = {axis: torch.randperm(sizes[axis]) for axis in range(1, len(sizes) - 1)}

    def permute(xs: list[Tensor]) -> list[Tensor]:
        moved = []
        for x, place in zip(xs, where, strict=True):
            for dim, axis in enumerate(place.axes, start=1):
                x = x.index_select(dim, orders[axis])
            moved.append(x)
        return moved

    out = layer(tensors)
    assert [x.shape[:-1] for x in out] == [x.shape[:-1] for x in tensors]
    for found, right in zip(layer(permute(tensors)), permute(out), strict=True):
        assert_near(found, right)
        assert right.std() > 1e-3


def test_every_tensor_reaches_every_tensor_of_a_layer() -> None:
    """All (source, target) pairs of sub-maps are there: a change of any one source changes each target."""
    layout = layout_of(2, 5, 4, 6, 3)
    where = places(layout)
    layer = DWSLayer(where, 1, 2, set_layer="sab", heads=1, reduction="max").double()
    tensors = fold(random_weights(layout))
    before = layer(tensors)
    for i, source in enumerate(tensors):
        after = layer([*tensors[:i], source * 3 + 1, *tensors[i + 1 :]])
        assert all((a - b).abs().max() > 1e-4 for a, b in zip(after, before, strict=True))


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_dws_has_the_published_number_of_parameters() -> None:
    layout = layout_of(2, 32, 32, 1)
    reader = make_reader(ReaderConfig(name="dws"), layout=layout, classes=10)
    assert isinstance(reader, DWSReader)
    assert count(reader) == 552_650

    # By hand. Of the 36 pairs of a layer, 12 have a set layer in common (an attention block of 3 F F' + F'F' weights
    # and 4 F' biases; to or from W_0, which holds two values a feature, with 2 F or 2 F'), 1 is W_1 to itself with
    # four linear maps, 23 have one linear map.
    def layer(f: int, o: int) -> int:
        def block(i: int, j: int) -> int:
            return 3 * (i * j + j) + j * j + j

        folded = {"W0": 2, "W1": 1, "W2": 1, "b0": 1, "b1": 1, "b2": 1}
        touches = {"W0": {1}, "W1": {1, 2}, "W2": {2}, "b0": {1}, "b1": {2}, "b2": set()}
        total = 0
        for source, s in folded.items():
            for target, t in folded.items():
                common = len(touches[source] & touches[target])
                total += {0: s * f * t * o + t * o, 1: block(s * f, t * o), 2: 4 * (f * o + o)}[common]
        return total

    norms, head = 4 * 6 * 2 * 32, 7 * 32 * 10 + 10
    assert layer(1, 32) + 4 * layer(32, 32) + norms + head == 552_650


def test_nfn_has_the_published_numbers_of_parameters() -> None:
    layout = layout_of(2, 128, 128, 128, 128, 128, 3)
    assert count(NPLinear(layout.shapes, 1, 64)) == 15_104
    assert count(NPLinear(layout.shapes, 64, 64)) == 821_504
    assert count(HNPLinear(layout.shapes, 1, 64)) == 28_864
    assert count(HNPLinear(layout.shapes, 64, 64)) == 1_690_048
    features = random_weights(layout, count=1, channels=(2,))
    assert np_pool(features).shape == (1, 2, 12)
    assert hnp_pool(features).shape == (1, 2, 17)
    # The comparison of MWT, table 5: 1.8M and 3.6M. RGB images have the shapes that the released code assumes for all.
    head = 128 * 128 + 128 + 128 * 10 + 10
    for name, layers, pooled, total in (
        ("nfn_np", 15_104 + 2 * 821_504, 12, 1_774_346),
        ("nfn_hnp", 28_864 + 2 * 1_690_048, 17, 3_566_154),
    ):
        assert layers + (pooled * 64 * 128 + 128) + head == total
        assert count(make_reader(ReaderConfig(name=name), layout=layout, classes=10)) == total


def authors_spec(features: Weights) -> tuple[Any, Any]:
    """The features and the layout in the classes of the authors' package."""
    common = pytest.importorskip("nfn.common")
    theirs = common.WeightSpaceFeatures(features.weights, features.biases)
    return theirs, common.network_spec_from_wsfeat(theirs)


def copy_parameters(ours: nn.Module, theirs: nn.Module, matrices: int) -> None:
    """From the authors' layer into ours. Their convolutions of width 1 have further axes of length 1."""
    inner = {"itself": "layer_{}", "whole": "layer_{}_rc", "column": "layer_{}_r", "row": "layer_{}_c"}
    inner |= {"bias_row": "bias_{}", "bias_whole": "bias_{}_rc"}
    if isinstance(ours, NPLinear):
        names = {f"layers.{i}.{a}": b.format(i) for i in range(matrices) for a, b in inner.items()}
    else:
        names = {f"inner.{i - 1}.{a}": b.format(i) for i in range(1, matrices - 1) for a, b in inner.items()}
        names |= {
            "first": "w0_rpt",
            "first_whole": "w0_rbdcst",
            "first_bias": "bias_0",
            "first_bias_whole": "bias_0_rc",
        }
        names |= {"last": "wfin_cpt", "last_whole": "wfin_cbdcst", "last_bias": "bias_fin_rc"}
    state = theirs.state_dict()
    taken = {f"{a}.{kind}": state.pop(f"{b}.{kind}") for a, b in names.items() for kind in ("weight", "bias")}
    assert not state, "parameters of theirs that ours has not"
    ours.load_state_dict({k: v.flatten(1) if k.endswith("weight") else v for k, v in taken.items()})


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kind", ["NP", "HNP"])
def test_layers_pools_and_encodings_against_the_authors_package(kind: str, sizes: tuple[int, ...]) -> None:
    authors = pytest.importorskip("nfn.layers", reason="needs the authors' package: pip install nfn")
    layout = layout_of(*sizes)
    features = random_weights(layout, channels=(3,))
    their_features, spec = authors_spec(features)
    theirs = getattr(authors, f"{kind}Linear")(spec, 3, 4).double()
    ours = {"NP": NPLinear, "HNP": HNPLinear}[kind](layout.shapes, 3, 4).double()
    copy_parameters(ours, theirs, len(layout.shapes))
    found, right = ours(features), theirs(their_features)
    for a, b in zip((*found.weights, *found.biases), (*right.weights, *right.biases), strict=True):
        assert_near(a, b)
    their_pool = getattr(authors, f"{kind}Pool")(spec)
    assert_near({"NP": np_pool, "HNP": hnp_pool}[kind](features), their_pool(their_features))
    reader = build(f"nfn_{kind.lower()}", layout)
    assert reader.pooled(layout) == their_pool.get_num_outs(spec)  # type: ignore[operator]

    their_fourier = authors.GaussianFourierFeatureTransform(spec, 3, 7, scale=2.0).double()
    fourier = FourierFeatures(3, 7, 2.0).double()
    fourier.frequencies.copy_(their_fourier._B.mT)
    for our, their in (
        (fourier(features), their_fourier(their_features)),
        (IOEncoding(layout.shapes).double()(features), authors.IOSinusoidalEncoding(spec)(their_features)),
    ):
        for a, b in zip((*our.weights, *our.biases), (*their.weights, *their.biases), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)  # our codes are kept in single precision


def test_fourier_features_keep_their_digits_in_half_precision() -> None:
    features = random_weights(layout_of(2, 8, 8, 1), channels=(1,)).map(lambda x: x.float())
    encode = FourierFeatures(1, 16, scale=10.0)
    exact = encode(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = encode(features)
    for a, b in zip(half.weights, exact.weights, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", READERS)
def test_gradients_against_differences(name: str) -> None:
    layout = layout_of(2, 4, 3, 1)
    options = {"dws": {"hidden": 4, "n_hidden": 1, "heads": 2}}.get(name, {"channels": 3, "layers": 2, "head": 4})
    reader = build(name, layout, **options)
    flat = torch.randn(2, layout.count, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: reader(Weights.unflatten(x, layout)), (flat,))
    reader(Weights.unflatten(flat, layout)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in reader.parameters())


@pytest.mark.parametrize("name", READERS)
def test_an_empty_batch_and_float32(name: str) -> None:
    layout = layout_of(2, 8, 8, 1)
    reader = build(name, layout).eval()
    assert reader(random_weights(layout, 0)).shape == (0, 5)
    single = reader.float()(random_weights(layout, 2).map(lambda x: x.float()))
    assert single.dtype == torch.float32


@pytest.mark.parametrize("name", READERS)
def test_a_training_step_end_to_end_on_digits(name: str) -> None:
    split = open_split("builtin:digits", "train", device=torch.device("cpu"), limit=8)
    batch = next(iter(split.batches(batch_size=8)))
    torch.manual_seed(0)
    model = MetaWeightTransformer(
        ModelConfig(
            siren=SirenConfig(hidden=8, hidden_layers=1),
            inner_loop=InnerLoopConfig(steps=2),
            reader=ReaderConfig(name=name, options=SMALL[name]),
            loss=LossConfig(),
            signal=read_info("builtin:digits").facts,
        )
    )
    offsets = torch.randn(8, model.siren.adapted_size, requires_grad=True)
    model.reader(model.siren.network_weights(offsets)).logsumexp(-1).sum().backward()
    assert offsets.grad is not None
    # Maxima and ReLU leave some weights out, but no layer.
    grad = Weights.unflatten(F.pad(offsets.grad, (0, 9)), model.siren.layout)
    assert all(x.abs().max() > 0 for part in grad for x in part[:-1])
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    optimizer, meter = make_optimizer(model, OptimConfig()), Meter(torch.device("cpu"))
    train_step(
        model,
        batch,
        step=1,
        epoch=0,
        seed=0,
        inner_loop=model.config.inner_loop,
        optimizer=optimizer,
        clip_norm=1.0,
        autocast=nullcontext(),
        backward=Tensor.backward,
        unscale=lambda: None,
        meter=meter,
    )
    assert not meter.bad_steps()
    same = {key for key, p in model.named_parameters() if torch.equal(p, before[key])}
    # The shared output layer's offsets are 0: what the reader's first layer multiplies with them stays.
    assert all(key.startswith("reader.layers.") for key in same), same
    assert len(same) < len(before) / 3


def test_dropout_acts_in_training_only() -> None:
    layout = layout_of(2, 8, 8, 1)
    weights = random_weights(layout)
    for name in READERS:
        reader = build(name, layout, dropout=0.5)
        assert not torch.equal(reader(weights), reader(weights))
        reader.eval()
        assert torch.equal(reader(weights), reader(weights))


def test_bad_options_are_refused() -> None:
    layout = layout_of(2, 8, 8, 1)
    for name, options, message in (
        ("dws", {"hidden": 12}, "reader.options.hidden is 12, not a multiple of reader.options.heads, 8"),
        ("dws", {"set_layer": "ds"}, "reader.options.set_layer is 'ds'; it is sab or deepsets"),
        ("dws", {"n_hidden": 0}, "reader.options.n_hidden is 0"),
        ("nfn_np", {"layers": 0}, "reader.options.layers is 0; it must be at least 1"),
        ("nfn_hnp", {"dropout": 1.0}, "reader.options.dropout is 1.0"),
        ("nfn_hnp", {"chanels": 3}, "Did you mean.* .?channels"),
    ):
        with pytest.raises(InputError, match=message):
            build(name, layout, **options)
