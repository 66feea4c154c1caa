"""Networks as data: one network in the three forms, as a model, as `Weights`, as a plain torch module."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mwt.config import ReaderConfig, SirenConfig
from mwt.errors import InputError
from mwt.readers import Standardise, make_reader
from mwt.siren import Siren
from mwt.weight_space import Layout, Weights, render

LAYOUT = Layout(sizes=(2, 5, 4, 3), omegas=(30.0, 7.0), shared_output=False)


def random_weights(layout: Layout, count: int) -> Weights:
    return Weights.unflatten(torch.randn(count, layout.count, dtype=torch.float64), layout)


def test_flat_and_back() -> None:
    weights = random_weights(LAYOUT, 3)
    assert [w.shape for w in weights.weights] == [(3, 5, 2), (3, 4, 5), (3, 3, 4)]
    assert LAYOUT.count == 15 + 24 + 15
    again = Weights.unflatten(weights.flat(), LAYOUT)
    assert all(torch.equal(a, b) for pair in zip(weights, again, strict=True) for a, b in zip(*pair, strict=True))


def test_what_networks_draw_against_torch_modules() -> None:
    weights, coords = random_weights(LAYOUT, 2), torch.rand(7, 2, dtype=torch.float64)
    drawn = render(LAYOUT, weights, coords)
    for signal in range(2):
        hidden = coords
        for i, (w, b) in enumerate(zip(*weights, strict=True)):
            linear = nn.Linear(w.shape[2], w.shape[1]).double()
            linear.load_state_dict({"weight": w[signal], "bias": b[signal]})
            hidden = linear(hidden) if i == 2 else torch.sin(LAYOUT.omegas[i] * linear(hidden))
        torch.testing.assert_close(drawn[signal], hidden, rtol=0, atol=1e-12)
    own = render(LAYOUT, weights, coords.expand(2, -1, -1))
    torch.testing.assert_close(own, drawn, rtol=0, atol=1e-12)


def test_a_siren_as_weights_draws_what_it_draws() -> None:
    siren = Siren(SirenConfig(hidden=6, hidden_layers=2, omega=11.0), coordinate_dims=2, channels=3).double()
    offsets, coords = torch.randn(4, siren.adapted_size, dtype=torch.float64) / 10, torch.rand(9, 2).double()
    with torch.no_grad():
        siren.out_scale.copy_(torch.tensor([0.1, 0.2, 0.3]))
        phi, delta = siren.network_weights(offsets, "phi"), siren.network_weights(offsets)
        torch.testing.assert_close(render(siren.layout, phi, coords), siren(offsets, coords), rtol=0, atol=1e-12)
        base = siren.network_weights(torch.zeros_like(offsets), "phi")
    torch.testing.assert_close(phi.flat() - base.flat(), delta.flat(), rtol=0, atol=1e-12)
    assert siren.layout.sizes == (2, 6, 6, 6, 3)
    assert siren.layout.shared_output
    assert not delta.weights[-1].any()
    assert not delta.biases[-1].any()


def test_standardised_by_weight_and_by_layer_against_numpy() -> None:
    weights = random_weights(LAYOUT, 500)
    flat = weights.flat().numpy()
    flat[:, -3:] = 2.0  # a layer that is the same in all
    weights = Weights.unflatten(torch.from_numpy(flat), LAYOUT)
    mean, std = (
        weights.map(lambda x: x.mean(0, keepdim=True)),
        weights.map(lambda x: x.std(0, keepdim=True, correction=0)),
    )
    single = Standardise(LAYOUT).double()
    single.learn(mean, std, by_layer=False)
    expected = (flat - flat.mean(0)) / [s if s >= 1e-5 else 1 for s in flat.std(0)]
    torch.testing.assert_close(single(weights).flat(), torch.from_numpy(expected))
    pooled = Standardise(LAYOUT).double()
    pooled.learn(mean, std, by_layer=True)
    first = flat[:, :10]
    torch.testing.assert_close(
        pooled(weights).weights[0].flatten(1), torch.from_numpy((first - first.mean()) / first.std())
    )


def test_a_reader_says_what_is_wrong() -> None:
    ten = {"layout": LAYOUT, "classes": 10}
    with pytest.raises(InputError, match=r"one width; these networks are \[2, 5, 4, 3\]"):
        make_reader(ReaderConfig(), **ten)
    with pytest.raises(InputError, match="there are transformer"):
        make_reader(ReaderConfig(name="nosuch"), **ten)
    square = {"layout": Layout(sizes=(2, 64, 64, 1), omegas=(30.0, 30.0), shared_output=False), "classes": 10}
    with pytest.raises(InputError, match=r"reader.options of transformer: .*widht"):
        make_reader(ReaderConfig(options={"widht": 3}), **square)
    reader = make_reader(ReaderConfig(input="standardise", blocks=1), **square)
    with pytest.raises(InputError, match="mean and deviation of every weight"):
        reader(Weights.unflatten(torch.randn(2, 64 * 3 + 65 * 64 + 65), square["layout"]))
