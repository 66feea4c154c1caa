"""Tokens against the sentence of the paper, written with einops and with loops."""

from __future__ import annotations

import torch
from einops import rearrange

from mwt.config import ReaderConfig, SirenConfig
from mwt.readers import TransformerReader
from mwt.siren import Siren
from mwt.tokens import tokens
from mwt.weight_space import Layout

H, L = 6, 3
NETWORKS = Layout(sizes=(2, 64, 64, 1), omegas=(10.0, 1.0), shared_output=True)
"""64 tokens of 65 numbers."""


def field() -> Siren:
    return Siren(SirenConfig(hidden=H, hidden_layers=L), coordinate_dims=2, channels=1)


def test_tokens_against_einops() -> None:
    siren = field()
    offsets = torch.randn(2, siren.adapted_size)
    hidden = offsets[:, 2 * H + H :]  # the first layer is left out
    layers = rearrange(hidden, "b (l f o) -> b l f o", l=L, f=H + 1, o=H)  # the bias is one more input
    assert torch.equal(tokens(siren.network_weights(offsets)), rearrange(layers, "b l f o -> b (l o) f"))


def test_a_token_is_one_output_neuron() -> None:
    siren = field()
    offsets = torch.randn(2, siren.adapted_size)
    result = tokens(siren.network_weights(offsets))
    assert result.shape == (2, L * H, H + 1)
    for layer, (weight, bias) in enumerate(siren.unflatten(offsets)[1:]):
        for neuron in range(H):
            token = result[:, layer * H + neuron]
            assert torch.equal(token[:, :H], weight[:, :, neuron])
            assert torch.equal(token[:, H], bias[:, neuron])


def test_the_base_is_added_before_the_scale() -> None:
    """(offsets + beta) x lambda, not offsets x lambda + beta."""
    reader = TransformerReader(ReaderConfig(blocks=1, token_scale=500.0), layout=NETWORKS, classes=3)
    zero_base = TransformerReader(ReaderConfig(blocks=1, token_scale=1.0), layout=NETWORKS, classes=3)
    zero_base.load_state_dict(reader.state_dict())
    x = torch.randn(2, 64, 65) * 1e-3
    with torch.no_grad():
        reader.base.normal_(0, 1e-3)
        torch.testing.assert_close(reader.read_tokens(x), zero_base.read_tokens((x + reader.base) * 500))


def test_layer_norm_is_over_tokens_and_features_together() -> None:
    """So a token that is ten times another's size stays so, and the scale of the whole does not matter."""
    reader = TransformerReader(ReaderConfig(blocks=1, token_scale=0.0), layout=NETWORKS, classes=3)
    plain = TransformerReader(ReaderConfig(blocks=1, token_scale=1.0), layout=NETWORKS, classes=3)
    plain.load_state_dict(reader.state_dict())
    x = torch.randn(2, 64, 65) * torch.tensor([1.0, 10]).repeat(32)[:, None] + 3
    mean, variance = x.mean((1, 2), keepdim=True), x.var((1, 2), keepdim=True, correction=0)
    with torch.no_grad():
        torch.testing.assert_close(
            reader.read_tokens(x), plain.read_tokens((x - mean) / (variance + 1e-5).sqrt()), rtol=1e-4, atol=1e-5
        )


def test_the_order_of_tokens_matters_only_through_the_base() -> None:
    """No other positional signal (section 3.2): with beta 0 the logits do not depend on the order."""
    reader = TransformerReader(ReaderConfig(blocks=2, token_scale=1.0), layout=NETWORKS, classes=3).double()
    x = torch.randn(2, 64, 65, dtype=torch.float64)
    shuffled = x[:, torch.randperm(64)]
    with torch.no_grad():
        torch.testing.assert_close(reader.read_tokens(x), reader.read_tokens(shuffled), rtol=0, atol=1e-12)
        reader.base.normal_()
        assert (reader.read_tokens(x) - reader.read_tokens(shuffled)).abs().max() > 1e-3
