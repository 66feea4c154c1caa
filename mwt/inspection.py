"""Look into a trained run: load it, evaluate it in full, follow its fits step by step, and map its space of weights.

What the programs in `eval/` share. The data comes in as batches, so that nothing here knows how they are read.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mwt.checkpoint import Weights, find_checkpoint, load_model
from mwt.config import ClassifyConfig
from mwt.config_files import load_config
from mwt.errors import InputError
from mwt.evaluation import POINTS_AT_ONCE, Evaluation, autocast, evaluate
from mwt.metrics import confusion_matrix, psnr
from mwt.model import MetaWeightTransformer
from mwt.observe import grid, observe, pixels
from mwt.runtime import choose_device, write_json
from mwt.structs import Batch, SignalFacts

EVAL_FRACTION = "inner_loop.eval_fraction"
CURVE_SAMPLES = 2000
"""Samples on which the curve over inner steps is measured unless all are asked for: it costs S / 2 evaluations."""
OFFSET_NUMBERS = 1 << 27
"""Most offsets held at once for a map of them: 512 MiB in fp32."""

Batches = Callable[[str], Iterable[Batch]]
"""Makes the batches of a split anew; the text says what for, for a progress bar."""


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """A run directory with one of its checkpoints loaded, on a device and in evaluation mode."""

    path: Path
    checkpoint: str
    step: int
    """Optimizer steps that the checkpoint has seen."""
    config: ClassifyConfig
    model: MetaWeightTransformer
    device: torch.device
    weights: Weights | None = None
    """Which of an averaged run's weights were asked for; None: the average."""
    altered: bool = False
    """Whether it looks at something else than the run says: other data, a part of it, or other points."""

    def files(self, split: str, steps: int) -> tuple[Path, Path]:
        """Where an evaluation lies: its JSON, and its predictions.

        The plain names are for the test split as trained; whatever differs is in the name, so that it overwrites
        nothing.
        """
        differs = {
            split: split != self.config.data.test_split,
            self.checkpoint: self.checkpoint != "last",
            "raw": self.weights == "raw",
            f"steps{steps}": steps != self.model.config.inner_loop.steps,
            "altered": self.altered,
        }
        suffix = "".join(f"_{name}" for name, does in differs.items() if does)
        return self.path / "eval" / f"classify{suffix}.json", self.path / "eval" / f"predictions{suffix}.npz"


def open_trained(
    run: Path | str, *, checkpoint: str = "last", weights: Weights | None = None, overrides: Iterable[str] = ()
) -> TrainedRun:
    """A run for evaluation. Its device is chosen anew (`run.device=auto`); `overrides` may change `data.*` and `run.*`.

    Args:
        weights: as of `mwt.checkpoint.load_model`.

    Raises:
        InputError: not a run directory, no such checkpoint, a damaged file, an override that would change the model.
    """
    run, overrides = Path(run), list(overrides)
    folder = find_checkpoint(run, checkpoint)
    for item in overrides:
        key = item.split("=", 1)[0]
        if "=" in item and not key.startswith(("data.", "run.")) and key != EVAL_FRACTION:
            raise InputError(
                f"{key} cannot be changed here: the model of {run} is trained already. Only data.*, run.* and "
                f"{EVAL_FRACTION} can be overridden, such as data.path, data.limit, run.device and run.precision."
            )
    config = load_config(ClassifyConfig, run / "config.yaml", ["run.device=auto", *overrides])
    device = choose_device(config.run.device)
    if config.run.precision == "fp16" and device.type == "cpu":
        raise InputError("run.precision is fp16, which needs a CUDA device; add run.precision=fp32 on the CPU.")
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    model = load_model(folder, device, weights=weights)
    step = int(folder.name.rpartition("-")[2])
    if any(item.startswith(EVAL_FRACTION) for item in overrides):
        inner = replace(model.config.inner_loop, eval_fraction=config.inner_loop.eval_fraction)
        model.config = replace(model.config, inner_loop=inner)
    altered = any(item.startswith(("data.path=", "data.limit=", EVAL_FRACTION)) for item in overrides)
    return TrainedRun(
        path=run,
        checkpoint=checkpoint,
        step=step,
        config=config,
        model=model,
        device=device,
        weights=weights,
        altered=altered,
    )


def check_data_fits(model: MetaWeightTransformer, facts: SignalFacts, path: str | Path) -> None:
    """Refuse data that the model cannot take.

    Raises:
        InputError: another kind of signal, other channels, classes, or (where the model's is fixed) another size.
    """
    trained = model.config.signal
    pairs = enumerate(zip(facts.classes, trained.classes, strict=False))
    k = next((k for k, (theirs, ours) in pairs if theirs != ours), 0)
    for what, theirs, ours in (
        ("kind of signal", facts.kind, trained.kind),
        ("channels", facts.channels, trained.channels),
        ("number of classes", len(facts.classes), len(trained.classes)),
        (f"class {k}", repr(facts.classes[k]), repr(trained.classes[k])),
        ("size", _size(facts), _size(trained)),
    ):
        if theirs != ours and not (what == "size" and trained.height is None):
            raise InputError(f"The data {path} does not fit the model: {what} {theirs} there, {ours} in training.")


def _size(facts: SignalFacts) -> str:
    return "that varies" if facts.height is None or facts.width is None else f"{facts.height} x {facts.width}"


def evaluate_run(
    run: TrainedRun, split: str, batches: Batches, *, steps: int | None = None, curve: int | None = CURVE_SAMPLES
) -> tuple[dict[str, Any], Evaluation]:
    """Evaluate a split: what `eval/classify.json` holds (README, formats), and each sample's result.

    Args:
        steps: inner steps, if other than trained; more only with shared rates.
        curve: on how many samples the curve over inner steps is measured; None: all, 0: no curve.

    Raises:
        InputError: fewer than one inner step, or more than rates were learned for.
    """
    inner = run.model.config.inner_loop
    steps = inner.steps if steps is None else steps
    if steps < 1:
        raise InputError(f"--steps is {steps}; at least one inner step is needed: without any, all offsets are zero.")
    if steps > inner.steps and not inner.shared_alpha:
        raise InputError(
            f"--steps is {steps}, but this model learned its rates for {inner.steps} inner steps, each its own. "
            "More steps need rates shared by all steps (inner_loop.shared_alpha=true in training)."
        )
    precision = run.config.run.precision
    began = time.perf_counter()
    result = evaluate(run.model, batches("evaluation"), precision=precision, steps=steps)
    seconds = time.perf_counter() - began
    count = len(result.labels)
    limit = count if curve is None else min(count, curve)
    rows = []
    for step in range(1, steps + 1) if limit else ():
        if step == steps and limit == count:
            part = result
        else:
            some = first_samples(batches(f"curve, step {step} of {steps}"), limit)
            part = evaluate(run.model, some, precision=precision, steps=step)
        numbers = part.summary()
        names = ("count", "accuracy", "cross_entropy", "psnr", "mse")
        rows.append({"steps": step, **{name: numbers[name] for name in names if name in numbers}})
    parameters = {name: sum(p.numel() for p in group) for name, group in run.model.parameter_groups().items()}
    document = {
        **result.summary(), "per_class": result.per_class(), "split": split, "checkpoint": run.checkpoint,
        "inner_steps": steps, "step": run.step, "data": run.config.data.path, "classes": list(result.classes),
        "confusion": confusion_matrix(result.predicted, result.labels, len(result.classes)).tolist(), "curve": rows,
        "precision": precision, "device": str(run.device), "seconds": seconds, "images_per_second": count / seconds,
        "parameters": parameters,
    }  # fmt: skip
    return document, result


def first_samples(batches: Iterable[Batch], count: int) -> Iterator[Batch]:
    """Batches that hold the first `count` samples; the last one is cut."""
    for batch in batches:
        if len(batch) >= count:
            yield select(batch, torch.arange(count))
            return
        count -= len(batch)
        yield batch


def select(batch: Batch, rows: Int[Tensor, " n"]) -> Batch:
    """Some samples of a batch, by their place in it."""
    rows = rows.to(batch.labels.device)
    return replace(batch, **{name: value[rows] for name, value in vars(batch).items() if isinstance(value, Tensor)})


def samples_at(batches: Iterable[Batch], positions: list[int]) -> list[Batch]:
    """The samples at some positions of a split that is not shuffled, one batch each, in the order asked for."""
    found: dict[int, Batch] = {}
    wanted = set(positions)
    for batch in batches:
        for row, position in enumerate(batch.positions.tolist()):
            if position in wanted:
                found[position] = select(batch, torch.tensor([row]))
        if len(found) == len(wanted):
            break
    return [found[position] for position in positions]


def save_evaluation(run: TrainedRun, document: dict[str, Any], result: Evaluation) -> tuple[Path, Path]:
    """Write the numbers and the predictions of a split into the run directory; both files are whole or not there."""
    numbers, predictions = run.files(document["split"], document["inner_steps"])
    numbers.parent.mkdir(exist_ok=True)
    columns = {
        "position": result.positions, "label": result.labels, "predicted": result.predicted,
        "probabilities": result.probabilities, "mse": result.losses[:, -1],
    }  # fmt: skip
    if result.kind == "image":
        columns["psnr"] = result.psnr
    numbers.unlink(missing_ok=True)  # so that numbers never stand beside predictions of another evaluation
    temporary = predictions.with_name(f".{predictions.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            np.savez(file, **{name: value.numpy() for name, value in columns.items()})  # type: ignore[arg-type]
        os.replace(temporary, predictions)
    finally:
        temporary.unlink(missing_ok=True)
    write_json(numbers, document)
    return numbers, predictions


def load_evaluation(run: TrainedRun, split: str, count: int) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """The stored evaluation of a split, if of this checkpoint, all `count` samples, trained steps, and with a curve."""
    numbers, predictions = run.files(split, run.model.config.inner_loop.steps)
    try:
        document = json.loads(numbers.read_text())
        with np.load(predictions, allow_pickle=False) as archive:
            columns = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, KeyError, BadZipFile):  # not there, or damaged: it is made anew
        return None
    expected = {
        "step": run.step, "checkpoint": run.checkpoint, "split": split, "count": count,
        "data": run.config.data.path, "inner_steps": run.model.config.inner_loop.steps,
    }  # fmt: skip
    fresh = all(document.get(key) == value for key, value in expected.items()) and document["curve"]
    return (document, columns) if fresh and len(columns["label"]) == count else None


@torch.no_grad()
def trajectory(
    model: MetaWeightTransformer, batch: Batch, precision: str = "fp32"
) -> tuple[Float[Tensor, "S1 B W"], Float[Tensor, "B S1"]]:
    """How images are fitted: offsets before the first inner step (zero: the base) and after each, and the PSNR in dB.

    The subsets that the steps see are those of `evaluate`; the PSNR is over all pixels.

    Raises:
        InputError: signals that are not images.
    """
    if batch.images is None:
        raise InputError("Pictures are for images; this data holds points of shapes, which have no pixels to draw.")
    with autocast(batch.labels.device, precision):
        seen = observe(batch, model.config.inner_loop.for_evaluation(), seed=0, purpose="evaluate")
        stages = [model.siren.init_offsets(len(batch))]
        for step in range(1, model.config.inner_loop.steps + 1):
            stages.append(model.fit(seen, step).offsets.float())
    height, width = batch.images.shape[-2:]
    values = pixels(batch.images)
    quality = [psnr(render(model, stage, height, width).flatten(2).mT, values) for stage in stages]
    return torch.stack(stages), torch.stack(quality, dim=1)


@torch.no_grad()
def render(
    model: MetaWeightTransformer, offsets: Float[Tensor, "B W"], height: int, width: int
) -> Float[Tensor, "B C h w"]:
    """`model.reconstruct`, a part of the pixels at a time: large pictures do not fill the memory."""
    coords = grid(height, width, device=offsets.device)
    parts = coords.split(max(1, POINTS_AT_ONCE // max(1, len(offsets))))
    values = torch.cat([model.siren(offsets, part) for part in parts], dim=1)
    return values.mT.reshape(len(offsets), -1, height, width)


@torch.no_grad()
def collect_offsets(
    model: MetaWeightTransformer, batches: Iterable[Batch], *, count: int, precision: str = "fp32"
) -> tuple[Float[Tensor, "n W"], Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Offsets, labels and positions of the first `count` samples (fewer, where the fields are large), on the CPU."""
    rows = []
    for batch in first_samples(batches, min(count, max(2, OFFSET_NUMBERS // model.siren.adapted_size))):
        with autocast(batch.labels.device, precision):
            seen = observe(batch, model.config.inner_loop.for_evaluation(), seed=0, purpose="evaluate")
            offsets = model.fit(seen).offsets
        rows.append((offsets.float().cpu(), batch.labels.cpu(), batch.positions.cpu()))
    offsets, labels, positions = (torch.cat(column) for column in zip(*rows, strict=True))
    return offsets, labels, positions


def principal_components(
    vectors: Float[Tensor, "n W"], count: int = 2
) -> tuple[Float[Tensor, "n k"], Float[Tensor, " k"]]:
    """Coordinates along the first `count` principal components, and the share of the variance along each (0 to 1).

    Randomised SVD (Halko et al. 2011) with a fixed seed; signs are chosen so that equal data gives equal pictures.
    """
    centred = vectors - vectors.mean(0)
    rank = min(*vectors.shape, count + 8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        left, strength, _ = torch.svd_lowrank(centred, q=rank, niter=4)
    points = (left * strength)[:, :count]
    extreme = points.gather(0, points.abs().argmax(0, keepdim=True))
    total = centred.square().sum().clamp_min(torch.finfo(vectors.dtype).tiny)
    return points * torch.where(extreme < 0, -1.0, 1.0), strength[:count].square() / total


@torch.no_grad()
def interpolate(
    model: MetaWeightTransformer, ends: Float[Tensor, "2 W"], frames: int
) -> tuple[Float[Tensor, "F W"], Float[Tensor, "F K"]]:
    """Offsets on the straight line between two signals' offsets, both included, and what the reader says of each."""
    share = torch.linspace(0, 1, frames, device=ends.device, dtype=ends.dtype)[:, None]
    offsets = ends[0] * (1 - share) + ends[1] * share
    return offsets, model.read(offsets).float().softmax(-1)
