"""Learned rates: how many, of what distribution, which belongs to which step."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from mwt.config import InnerLoopConfig
from mwt.meta_sgd import MetaSGD


@pytest.mark.parametrize(("shared", "count"), [(False, 4), (True, 1)])
def test_one_vector_a_step_or_one_for_all(shared: bool, count: int) -> None:
    alpha = MetaSGD(InnerLoopConfig(steps=4, shared_alpha=shared), 10)
    assert [tuple(p.shape) for p in alpha.parameters()] == [(1, 10)] * count
    assert [name for name, _ in alpha.named_parameters()] == [str(j) for j in range(count)]
    for step in range(4):
        assert alpha.rates(step) is alpha[0 if shared else step]


@pytest.mark.parametrize(("low", "high"), [(0.1, 1.0), (0.5, 0.6)])
def test_initial_rates_are_uniform(low: float, high: float) -> None:
    """Section 4: alpha ~ U(0.1, 1.0)."""
    alpha = MetaSGD(InnerLoopConfig(steps=2, alpha_min=low, alpha_max=high), 20_000)
    for rates in alpha.parameters():
        numbers = rates.detach().double().flatten().numpy()
        assert stats.kstest(numbers, stats.uniform(low, high - low).cdf).pvalue > 1e-3
    assert not torch.equal(alpha[0], alpha[1])


def test_shared_rates_serve_any_step() -> None:
    alpha = MetaSGD(InnerLoopConfig(steps=2, shared_alpha=True), 3)
    assert alpha.rates(17) is alpha[0]
    with pytest.raises(IndexError):
        MetaSGD(InnerLoopConfig(steps=2), 3).rates(2)
