"""What a field learns of a signal, frequency by frequency, and what its tangent kernel said beforehand."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from mwt import ntk
from mwt.errors import InputError, NotDefinedError, TrainingError
from mwt.fields import Field, FieldConfig, Frame, build_field
from mwt.fields.registry import ON_SAMPLES
from mwt.fit_config import FitOptimConfig
from mwt.fitting import SignalFit, evaluation_steps, fields_for
from mwt.signals import signal_paths, synthetic
from mwt.signals.image import ImageTask
from mwt.signals.pictures import read_picture
from mwt.signals.synthetic import SampledTask
from mwt.signals.task import Evaluation
from mwt.spectra.config import SpectrumRunConfig, SpectrumSignalConfig

LARGEST_KERNEL = 4096
"""Points; the kernel of more takes gigabytes, and its eigenvalues hours."""
ROUNDING = 1e-12
"""Energy beside the mean, as a share of all, that a constant picture, made smaller in float32, stays below."""
PRESENT = 1e-6
"""A frequency with less than this share of the signal's energy is none of its frequencies."""
FLAT = 1e-4
"""Along eigenvectors with less than this share of the largest eigenvalue, little is learned in reasonable time."""


# ---- signals ---------------------------------------------------------------------------------------------------------


def make_task(config: SpectrumSignalConfig, seed: int, device: torch.device) -> SampledTask:
    """The small signal of the configuration.

    Raises:
        InputError: an unknown name, or settings that do not go together.
    """
    name = config.name
    dims = 1 if name == "sines" else config.dims if name in ("noise", "spheres") else 2
    size = config.size or {1: 256, 2: 32, 3: 10}[dims]
    made: dict[str, Callable[[], Tensor]] = {
        "sines": lambda: synthetic.sines(size, config.frequencies, seed=seed),
        "noise": lambda: synthetic.bandlimited_noise((size,) * dims, config.cutoff, seed=seed),
        "spheres": lambda: synthetic.spheres((size,) * dims, config.radius, seed=seed),
        "sierpinski": lambda: synthetic.sierpinski(size, config.depth),
        "star": lambda: synthetic.star(size),
    }
    if name in made:
        values = made[name]()
    elif ":" in name or Path(name).suffix:
        (path,) = signal_paths(name, ImageTask)[:1]
        picture = read_picture(path, grey=True).movedim(-1, 0)[None]
        side = min(picture.shape[-2:])
        top, left = ((length - side) // 2 for length in picture.shape[-2:])
        square = picture[..., top : top + side, left : left + side]
        values, name = F.interpolate(square, (size, size), mode="area")[0, 0], path.stem
    else:
        raise InputError(f"signal.name is {name!r}; it is {', '.join(made)}, a file, or skimage:NAME.")
    return SampledTask(values[..., None], name, device, keep=config.keep, seed=seed)


def held_out_from(task: SampledTask) -> float:
    """The frequency, in periods over the signal, above which the samples that the fit sees show nothing on average.

    It is the Nyquist limit of a regular grid of as many samples; infinite where all are seen.
    """
    if not len(task.held_out):
        return float("inf")
    return min(task.size) / 2 * (task.points / len(task.coords)) ** (1 / len(task.size))


# ---- one model -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Look:
    """A kernel on the way."""

    step: int
    kernel: Float[Tensor, "P P"]
    relative: Float[Tensor, " P"]
    """Eigenvalues over the largest."""
    vectors_frequency: Float[Tensor, " P"]
    """Mean frequency of each eigenvector."""
    energy: Float[Tensor, " P"] | None
    """The residual's share along each eigenvector."""
    summary: dict[str, float]


def look(
    fields: Field, coords: Tensor, size: tuple[int, ...], residual: Tensor | None, *, step: int, memory: int
) -> Look:
    """The kernel at the grid `coords`, and what follows from it.

    Raises:
        InputError: too many points, or a field without a kernel.
        TrainingError: a kernel that is not finite.
    """
    if len(coords) > LARGEST_KERNEL:
        raise InputError(
            f"A kernel of {len(coords):,} points is too large (at most {LARGEST_KERNEL:,}); choose a smaller "
            "signal.size, or run.looks=0 for no kernels."
        )
    matrix = ntk.kernel(fields, coords, memory=memory * 2**20)
    try:
        found = ntk.spectrum(matrix)
    except TrainingError as problem:
        raise TrainingError(f"At step {step}: {problem}") from problem
    power = ntk.power_by_frequency(found.vectors, size)  # each column sums to 1
    orders = torch.arange(len(power), dtype=power.dtype, device=power.device)
    summary = found.summary()
    if residual is not None:
        summary["flat_energy"] = found.energy_below(residual, FLAT)
        error = residual.to(matrix)
        aligned = (error * (matrix @ error)).sum() / (matrix.norm() * error.square().sum()).clamp_min(1e-300)
        summary["alignment"] = float(aligned)
    return Look(
        step=step,
        kernel=matrix.cpu(),
        relative=found.relative.cpu(),
        vectors_frequency=(orders @ power).cpu(),
        energy=None if residual is None else found.energy(residual).cpu(),
        summary=summary,
    )


@dataclass(kw_only=True)
class Study:
    """All that is known of a model: spectra, errors by frequency at each of `steps`, how well it fits in the end."""

    name: str
    parameters: int = 0
    looks: list[Look] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    shares: list[Tensor] = field(default_factory=list)
    """Of the residual's energy, [F] at each step."""
    errors: list[Tensor] = field(default_factory=list)
    """Size of the error over that of the signal, [K] at each step: 1 is nothing learned, 0 all."""
    frequencies: list[int] = field(default_factory=list)
    """The K frequencies that the signal has."""
    final: dict[str, float] = field(default_factory=dict)
    problem: str = ""
    """Why there is nothing in the end: not finite, or not defined."""

    @property
    def outcome(self) -> str:
        """`problem` in two words: not defined, not finite, stopped; empty where there is none."""
        return self.problem.partition(":")[0]

    def learned(self, threshold: float = 0.5) -> list[int | None]:
        """For each frequency the first recorded step from which its error stays below `threshold`."""
        found: list[int | None] = []
        for k in range(len(self.frequencies)):
            above = [i for i, errors in enumerate(self.errors) if not float(errors[k]) < threshold]
            first = above[-1] + 1 if above else 0
            found.append(self.steps[first] if first < len(self.steps) else None)
        return found

    def as_json(self) -> dict[str, Any]:
        """Everything but the kernels themselves."""
        return {
            "name": self.name,
            "parameters": self.parameters,
            "problem": self.problem,
            "final": self.final,
            "kernels": [
                {
                    "step": look.step,
                    **look.summary,
                    "relative_eigenvalues": look.relative.tolist(),
                    "eigenvector_frequencies": look.vectors_frequency.tolist(),
                    "residual_energy": None if look.energy is None else look.energy.tolist(),
                }
                for look in self.looks
            ],
            "steps": self.steps,
            "residual_energy_by_frequency": [share.tolist() for share in self.shares],
            "frequencies": self.frequencies,
            "relative_error": [errors.tolist() for errors in self.errors],
            "learned_at_step": self.learned(),
        }


def study(
    name: str,
    config: FieldConfig,
    task: SampledTask,
    optim: FitOptimConfig,
    run: SpectrumRunConfig,
    *,
    stop: Callable[[], bool] = lambda: False,
    on_step: Callable[[], None] = lambda: None,
) -> Study:
    """Fit a field to the task's signal and follow its kernel and its errors.

    A fit or a kernel that is not finite ends the study, which then says so (`Study.problem`).

    Raises:
        InputError: settings that do not go together.
    """
    result = Study(name=name)
    try:
        fields = fields_for(config, task, seed=run.seed).to(task.coords.device)
    except NotDefinedError as error:
        result.problem = f"not defined: {error}"
        return result
    result.parameters = fields.num_parameters
    power = ntk.power_by_frequency(task.values[0], task.size).sum(1)
    present = power > PRESENT * power[1:].sum().clamp_min(1e-300)
    present[0] = False  # the mean is no frequency
    if not float(power[1:].sum()) > ROUNDING * float(power.sum()):
        raise InputError(
            f"{task.names[0]} is the same everywhere: it has no frequencies to follow; choose another signal."
        )
    result.frequencies = present.nonzero()[:, 0].tolist()
    fit = SignalFit(task, fields, optim, run.seed, run.records)
    recorded = evaluation_steps(optim.steps, run.records)
    places = {round((i + 1) / max(run.looks - 1, 1) * len(recorded)) - 1 for i in range(run.looks - 1)}
    looking = {recorded[max(place, 0)] for place in places}

    def record() -> None:
        [residual] = task.residual(fields)
        if fit.step in looking or (fit.step == 0 and run.looks):
            result.looks.append(look(fields, task.coords, task.size, residual, step=fit.step, memory=run.memory))
        error = ntk.power_by_frequency(residual, task.size).sum(1)
        result.steps.append(fit.step)
        result.shares.append((error / error.sum().clamp_min(1e-300)).cpu())
        result.errors.append((error[present] / power[present]).sqrt().cpu())

    def on_evaluation(found: Evaluation) -> None:
        if bool(task.residual(fields).isfinite().all()):
            record()

    try:
        record()
        if not fit.run(stop, on_evaluation, on_step):
            result.problem = f"stopped: at step {fit.step}"
            return result
    except TrainingError as error:
        result.problem = f"not finite: {error}"
        return result
    result.final = {key: value for key, value in fit.curve[-1].items() if key not in ("step", "seconds")}
    result.final |= bands(result, task)
    return result


def bands(result: Study, task: SampledTask) -> dict[str, float]:
    """Mean relative error over the signal's frequencies, below and above where frequencies count as held out."""
    limit, last = held_out_from(task), result.errors[-1]
    below = torch.tensor([frequency <= limit for frequency in result.frequencies], dtype=torch.bool)
    found = {}
    for key, chosen in (("error_seen", below), ("error_held_out", ~below)):
        if bool(chosen.any()):
            found[key] = float(last[chosen].mean())
    return found


# ---- does the spectrum say how good the fit will be? -----------------------------------------------------------------


def correlations(summaries: Sequence[dict[str, float]], metric: Sequence[float]) -> list[dict[str, Any]]:
    """Spearman's and Pearson's correlation of each summary with the metric over the models, with two-sided p-values.

    A summary that is the same for all models, or fewer than three models, have none (null).
    """
    from scipy.stats import pearsonr, spearmanr

    rows = []
    for name in summaries[0] if summaries else ():
        values = [summary[name] for summary in summaries]
        row: dict[str, Any] = {"summary": name, "models": len(values)}
        row |= dict.fromkeys(("spearman", "spearman_p", "pearson", "pearson_p"))
        finite = torch.tensor([*values, *metric], dtype=torch.float64).isfinite().all()
        if len(values) >= 3 and finite and len(set(values)) > 1 and len(set(metric)) > 1:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # values that differ in the last digits alone
                for kind, function in (("spearman", spearmanr), ("pearson", pearsonr)):
                    found = function(values, metric)
                    row |= {kind: float(found.statistic), f"{kind}_p": float(found.pvalue)}
        rows.append(row)
    return rows


def coarse_grid(
    fields: Field, frame: Frame, points: int, device: torch.device | None = None
) -> tuple[Float[Tensor, "P D"], tuple[int, ...]]:
    """Coordinates of about so many points over a frame, equally many along each axis, and how many that are.

    A field that is defined on samples alone is asked at some of them: every k-th, and never at one twice.
    """
    sides = (max(2, round(points ** (1 / frame.coordinate_dims))),) * frame.coordinate_dims
    if fields.config.name not in ON_SAMPLES or frame.size is None:
        return frame.grid(sides, device=device), sides
    sides = tuple(min(side, samples) for side, samples in zip(sides, frame.size, strict=True))
    grid = frame.grid(device=device).unflatten(0, frame.size)
    for axis, (side, samples) in enumerate(zip(sides, frame.size, strict=True)):
        grid = grid.index_select(axis, torch.arange(side, device=device) * (samples // side))
    return grid.flatten(0, -2), sides


def first_look(config: FieldConfig, frame: Frame, channels: int, run: SpectrumRunConfig, *, seed: int) -> Look:
    """The kernel of a fresh field at a coarse grid of a signal's frame.

    Raises:
        InputError: a field without a kernel, or that is not defined there.
        TrainingError: a kernel that is not finite.
    """
    fields = build_field(config, coordinate_dims=frame.coordinate_dims, channels=channels, seed=seed, frame=frame)
    coords, size = coarse_grid(fields, frame, run.points)
    return look(fields, coords, size, None, step=0, memory=run.memory)
