"""PSNR against torchmetrics and scikit-image, calibration error and confusion matrix by counting."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio
from sklearn.metrics import confusion_matrix as sklearn_confusion
from torchmetrics.functional.image import peak_signal_noise_ratio as torchmetrics_psnr

from mwt.metrics import calibration_error, confusion_matrix, psnr, squared_error


def test_psnr_of_each_signal() -> None:
    values = torch.rand(3, 50, 3) * 2 - 1
    prediction = values + torch.randn(3, 50, 3) * torch.tensor([0.01, 0.1, 0.5])[:, None, None]
    ours = psnr(prediction, values)
    for b in range(3):
        target, shown = (values[b] + 1) / 2, ((prediction[b] + 1) / 2).clamp(0, 1)
        assert ours[b].item() == pytest.approx(torchmetrics_psnr(shown, target, data_range=1.0).item(), abs=1e-4)
        theirs = peak_signal_noise_ratio(target.double().numpy(), shown.double().numpy(), data_range=1.0)
        assert ours[b].item() == pytest.approx(theirs, abs=1e-4)


def test_predictions_are_clamped_and_a_perfect_fit_is_finite() -> None:
    values = torch.ones(1, 4, 1)
    assert psnr(values * 7, values).item() == 100
    assert squared_error(-values * 7, values).item() == 1
    assert psnr(-values, values).item() == 0


def test_calibration_error_by_hand() -> None:
    """Fifteen equal bins of the highest probability: sum over bins of share times |accuracy - confidence|."""
    probabilities = torch.softmax(torch.randn(500, 4) * 2, dim=-1)
    labels = torch.randint(4, (500,))
    confidence, predicted = (t.numpy() for t in probabilities.max(-1))
    hit = predicted == labels.numpy()
    bins = np.minimum((confidence * 15).astype(int), 14)
    members = [bins == k for k in range(15) if (bins == k).any()]
    expected = sum(chosen.mean() * abs(hit[chosen].mean() - confidence[chosen].mean()) for chosen in members)
    assert calibration_error(probabilities, labels) == pytest.approx(float(expected), abs=1e-6)


def test_a_sure_and_right_model_is_calibrated() -> None:
    assert calibration_error(torch.eye(3), torch.arange(3)) == pytest.approx(0, abs=1e-6)
    assert calibration_error(torch.eye(3), torch.tensor([1, 2, 0])) == pytest.approx(1, abs=1e-6)


def test_confusion_matrix_has_true_classes_in_rows() -> None:
    labels, predicted = torch.randint(5, (200,)), torch.randint(4, (200,))
    matrix = confusion_matrix(predicted, labels, 5)
    assert np.array_equal(matrix.numpy(), sklearn_confusion(labels.numpy(), predicted.numpy(), labels=range(5)))
    assert confusion_matrix(torch.tensor([2]), torch.tensor([0]), 3)[0, 2] == 1
    assert math.isclose(float(matrix.sum()), 200)
