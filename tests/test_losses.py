"""The outer losses by hand, and the scaling of the gradient at the boundary between fit and reader."""

from __future__ import annotations

import pytest
import torch

from mwt.losses import outer_losses, scale_gradient
from mwt.structs import Fit, Output


def test_outer_losses_by_hand() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 3.0]], dtype=torch.float64)
    labels = torch.tensor([1, 0])
    losses = torch.tensor([[9.0, 0.5], [9.0, 0.3]], dtype=torch.float64)
    fitted = Fit(offsets=torch.zeros(2, 4).double(), prediction=torch.zeros(2, 1, 1).double(), losses=losses)
    result = outer_losses(Output(fit=fitted, logits=logits), labels)
    rows = [-(row[k] - row.exp().sum().log()) for row, k in zip(logits, labels, strict=True)]
    assert result.classification.item() == pytest.approx(sum(r.item() for r in rows) / 2, abs=1e-14)
    assert result.reconstruction.item() == pytest.approx(0.4, abs=1e-14)
    assert result.total.item() == pytest.approx(result.classification.item() + 0.4, abs=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_cross_entropy_is_never_taken_in_half_precision(dtype: torch.dtype) -> None:
    logits = torch.randn(8, 10)
    fitted = Fit(offsets=torch.zeros(8, 1), prediction=torch.zeros(8, 1, 1), losses=torch.ones(8, 2))
    result = outer_losses(Output(fit=fitted, logits=logits.to(dtype)), torch.arange(8))
    assert result.classification.dtype == torch.float32
    expected = torch.nn.functional.cross_entropy(logits.to(dtype).float(), torch.arange(8))
    assert torch.equal(result.classification, expected)


@pytest.mark.parametrize("weight", [0.01, 1.0, 10.0])
def test_the_gradient_is_scaled_and_the_value_is_not(weight: float) -> None:
    x = torch.randn(2, 3, requires_grad=True)
    y = scale_gradient(x, weight)
    assert torch.equal(y, x)
    upstream = torch.randn(2, 3)
    y.backward(upstream)
    assert torch.equal(x.grad, upstream * weight)


def test_weight_zero_detaches() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    assert not scale_gradient(x, 0.0).requires_grad
    assert scale_gradient(x, 1e-9).requires_grad
