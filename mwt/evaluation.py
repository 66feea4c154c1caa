"""Evaluate a model on a split: used while training, by `eval.classify`, by reports and by benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mwt.metrics import calibration_error, confusion_matrix, decibel, squared_error
from mwt.model import MetaWeightTransformer
from mwt.observe import observe, whole
from mwt.structs import Batch
from mwt.weight_space import Layout, Weights, render

POINTS_AT_ONCE = 1 << 19
"""Field evaluations at once when a whole signal is rendered: bounds the memory of 320 x 320 images."""


@dataclass(frozen=True, kw_only=True)
class Classification:
    """What a classifier said of each sample of a split, in the order of the split, on the CPU."""

    classes: tuple[str, ...]
    positions: Int[Tensor, " n"]
    labels: Int[Tensor, " n"]
    probabilities: Float[Tensor, "n K"]

    @property
    def predicted(self) -> Int[Tensor, " n"]:
        """The most probable class of each sample."""
        return self.probabilities.argmax(-1)

    def summary(self) -> dict[str, Any]:
        """Numbers by name, as `eval/classify.json` holds them."""
        correct = (self.predicted == self.labels).float()
        return {
            "accuracy": float(correct.mean()),
            "cross_entropy": float(-self.probabilities.gather(1, self.labels[:, None]).clamp_min(1e-12).log().mean()),
            "ece": calibration_error(self.probabilities, self.labels),
            "count": len(self.labels),
        }

    def per_class(self) -> dict[str, dict[str, float | int | None]]:
        """Count, accuracy (recall) and precision of each class; null where a class does not occur."""
        matrix = confusion_matrix(self.predicted, self.labels, len(self.classes)).double()
        hits, true, predicted = matrix.diag(), matrix.sum(1), matrix.sum(0)
        return {
            name: {
                "count": int(true[k]),
                "accuracy": float(hits[k] / true[k]) if true[k] else None,
                "precision": float(hits[k] / predicted[k]) if predicted[k] else None,
            }
            for k, name in enumerate(self.classes)
        }


@dataclass(frozen=True, kw_only=True)
class Evaluation(Classification):
    """What a model did on each sample: what it said, and how well its fields were fitted."""

    error: Float[Tensor, " n"]
    """Mean squared error over all points, values on the scale [0, 1]."""
    subset_error: Float[Tensor, " n"]
    """The same over the points that the final loss saw: all of them if s = 1."""
    losses: Float[Tensor, "n S1"]
    """Loss before each inner step and after the last, values on the scale [-1, 1]."""
    kind: str = "image"

    @property
    def psnr(self) -> Float[Tensor, " n"]:
        """PSNR of each sample over all its points, in dB."""
        return decibel(self.error)

    def summary(self) -> dict[str, Any]:
        """Numbers by name, as `eval/classify.json` holds them."""
        numbers = super().summary()
        if self.kind == "image":  # a distance field has no peak value
            numbers |= {
                "psnr": float(self.psnr.mean()),
                "psnr_pooled": float(decibel(self.error.mean())),
                "psnr_subset": float(decibel(self.subset_error).mean()),
            }
        numbers["mse"] = float(self.losses[:, -1].mean())
        return numbers


def whole_error(field: Callable[[Tensor], Tensor], batch: Batch) -> Float[Tensor, " B"]:
    """Mean squared error on the scale [0, 1], over all points of each signal, of what `field` says at coordinates."""
    seen = whole(batch)
    points = seen.values.shape[1]
    chunk = max(1, POINTS_AT_ONCE // len(batch))
    total = torch.zeros(len(batch), device=seen.values.device)
    for start in range(0, points, chunk):
        part = slice(start, start + chunk)
        prediction = field(seen.coords[..., part, :])
        values = seen.values[:, part]
        total += squared_error(prediction.float(), values) * values.shape[1]
    return total / points


def networks_psnr(layout: Layout, weights: Weights, batch: Batch) -> Float[Tensor, " B"]:
    """PSNR in dB of networks, output layer included, against the images that they show; NaN for point sets."""
    if batch.images is None:  # a distance field has no peak value
        return torch.full((len(batch),), torch.nan, device=batch.labels.device)
    return decibel(whole_error(lambda coords: render(layout, weights, coords), batch))


@torch.no_grad()
def evaluate(
    model: MetaWeightTransformer,
    batches: Iterable[Batch],
    *,
    precision: str = "fp32",
    steps: int | None = None,
    whole_signal: bool = True,
) -> Evaluation:
    """Fit and classify every sample of `batches`, deterministically: subsets depend on the sample's position alone.

    In a process group every rank passes its own share, and all get the whole result.

    Args:
        precision: fp32, bf16 or fp16 (autocast).
        steps: inner steps, if other than trained (fewer, or, with shared rates, more).
        whole_signal: measure the reconstruction over all points, also where the fit saw subsets.
    """
    was_training = model.training
    model.eval()
    config = model.config.inner_loop.for_evaluation()
    rows: list[tuple[Tensor, ...]] = []
    for batch in batches:
        with autocast(batch.labels.device, precision):
            seen = observe(batch, config, seed=0, purpose="evaluate", steps=steps)
            output = model.fit_and_read(seen, steps=steps)
            values = seen.at(config.steps if steps is None else steps)[1]
            subset_error = squared_error(output.fit.prediction.float(), values)
            full = whole_signal and seen.index is not None
            error = whole_error(partial(model.siren, output.fit.offsets), batch) if full else subset_error
        logits = output.logits.float()
        rows.append((batch.positions, batch.labels, logits.softmax(-1), error, subset_error, output.fit.losses.float()))
    model.train(was_training)
    if not rows:  # a rank that got no share of a small split still takes part in the gathering
        rows.append(_no_rows(model, config.steps if steps is None else steps))
    columns = [_gather(list(column)) for column in zip(*rows, strict=True)]
    if not len(columns[0]):
        raise ValueError("nothing to evaluate: no batches")
    order = columns[0].argsort()
    positions, labels, probabilities, error, subset_error, losses = (column[order] for column in columns)
    return Evaluation(
        classes=model.config.signal.classes,
        positions=positions,
        labels=labels,
        probabilities=probabilities,
        error=error,
        subset_error=subset_error,
        losses=losses,
        kind=model.config.signal.kind,
    )


def _no_rows(model: MetaWeightTransformer, steps: int) -> tuple[Tensor, ...]:
    device = model.device
    integer, number = (torch.zeros(0, dtype=dtype, device=device) for dtype in (torch.int64, torch.float32))
    classes = len(model.config.signal.classes)
    return (
        integer,
        integer,
        number.view(0, 1).expand(0, classes),
        number,
        number,
        number.view(0, 1).expand(0, steps + 1),
    )


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The autocast context of a precision name: nothing for fp32."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype=None if precision == "fp32" else dtype, enabled=precision != "fp32")


def _gather(parts: list[Tensor]) -> Tensor:
    """All parts of all ranks in one CPU tensor."""
    own = torch.cat(parts)
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return own.cpu()
    counts = [torch.zeros(1, dtype=torch.int64, device=own.device) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(counts, torch.tensor([len(own)], device=own.device))
    sizes = [int(count) for count in counts]
    padded = own.new_zeros((max(sizes), *own.shape[1:]))
    padded[: len(own)] = own
    gathered = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(gathered, padded)
    return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)]).cpu()
