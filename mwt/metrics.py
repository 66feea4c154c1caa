"""Measures of reconstruction and classification, per sample and over a split."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def squared_error(prediction: Float[Tensor, "B P C"], values: Float[Tensor, "B P C"]) -> Float[Tensor, " B"]:
    """Mean squared error of each signal on the scale [0, 1], with the prediction clamped to the value range [-1, 1]."""
    return ((prediction.clamp(-1, 1) - values) / 2).square().mean((-2, -1))


def psnr(prediction: Float[Tensor, "B P C"], values: Float[Tensor, "B P C"]) -> Float[Tensor, " B"]:
    """Peak signal-to-noise ratio of each signal in dB, for values in [-1, 1]."""
    return decibel(squared_error(prediction, values))


def decibel(error: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Mean squared errors on the scale [0, 1] as peak signal-to-noise ratios; a perfect fit counts as 100 dB."""
    return -10 * error.clamp_min(1e-10).log10()


def calibration_error(probabilities: Float[Tensor, "n K"], labels: Int[Tensor, " n"], bins: int = 15) -> float:
    """Expected calibration error with equal-width confidence bins (Guo et al. 2017)."""
    from torchmetrics.functional.classification import multiclass_calibration_error

    return float(multiclass_calibration_error(probabilities, labels, num_classes=probabilities.shape[1], n_bins=bins))


def confusion_matrix(predicted: Int[Tensor, " n"], labels: Int[Tensor, " n"], classes: int) -> Int[Tensor, "K K"]:
    """Counts; rows are true classes, columns predicted ones."""
    return torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)
