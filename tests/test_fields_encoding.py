"""Encodings of coordinates, against NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from mwt.fields import EncodingConfig, Field, FieldConfig, MLPConfig, build_field


def build(dims: int = 2, **settings: Any) -> Field:
    config = MLPConfig(width=6, hidden_layers=0, encoding=EncodingConfig(**settings))
    return build_field(FieldConfig(mlp=config), coordinate_dims=dims, channels=1, seed=0)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_encodings_against_numpy(dims: int) -> None:
    x = np.random.default_rng(0).uniform(-1, 1, (5, dims))

    def features(**settings: Any) -> tuple[np.ndarray, Field]:
        field = build(dims, **settings).double()
        found = field.encoding(torch.from_numpy(x)).detach().numpy()
        assert found.shape == (5, field.encoding.outputs)
        return found, field

    np.testing.assert_array_equal(features(name="identity")[0], x)
    expected = [x]
    for i in range(10 if dims == 3 else 4):
        for j in range(dims):
            expected += [np.sin(2**i * np.pi * x[:, j : j + 1]), np.cos(2**i * np.pi * x[:, j : j + 1])]
    np.testing.assert_allclose(features(name="nerf")[0], np.concatenate(expected, 1), atol=1e-12)

    found, field = features(name="fourier", frequencies=300, sigma=3.0)
    matrix = field.state_dict()["encoding.matrix"].numpy()
    angles = 2 * np.pi * x @ matrix.T
    np.testing.assert_allclose(found, np.concatenate([np.sin(angles), np.cos(angles)], 1), atol=1e-12)
    assert stats.kstest(matrix.ravel(), stats.norm(0, 3).cdf).pvalue > 1e-3
    assert "encoding.matrix" not in dict(field.named_parameters())

    found, field = features(name="fourier_kan", frequencies=6, outputs=9)
    cosine, sine = (getattr(field.encoding, name).detach().numpy().reshape(dims, 6, 9) for name in ("cosine", "sine"))
    total = np.zeros((5, 9))
    for j in range(dims):
        for k in range(6):
            total += np.cos((k + 1) * x[:, j : j + 1]) * cosine[j, k] + np.sin((k + 1) * x[:, j : j + 1]) * sine[j, k]
    total = (total - total.mean(1, keepdims=True)) / np.sqrt(total.var(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(found, total, atol=1e-10)


def test_frequencies_by_nyquist() -> None:
    def outputs(samples: int) -> int:
        return build(name="nerf", samples=samples).encoding.outputs

    # floor(log2(samples / 4)) frequencies
    assert [outputs(n) for n in (8, 63, 64, 512)] == [2 * (1 + 2 * count) for count in (1, 3, 4, 7)]


def test_fkan_starts_with_unit_sums() -> None:
    """a and b from N(0, 1 / (D K)): before the layer norm, features have variance 1."""
    field = build(name="fourier_kan")
    for name in ("cosine", "sine"):
        values = getattr(field.encoding, name).detach().numpy()
        assert values.shape == (2 * 270, 128)
        assert stats.kstest(values.ravel(), stats.norm(0, (2 * 270) ** -0.5).cdf).pvalue > 1e-3
