"""Models by name, and the fields of runs and grids, for the study of their spectra."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mwt.config_files import load_config, read_options
from mwt.errors import InputError
from mwt.fields import (
    FieldConfig,
    Frame,
    build_field,
    list_activations,
    list_encodings,
    list_fields,
    load_field,
)
from mwt.fields.registry import field_block
from mwt.fit_run import FitRun, is_finished, read_fit_run
from mwt.ntk import energy_by_frequency
from mwt.signals import TASKS, signal_paths
from mwt.signals.task import Task
from mwt.spectra.config import SpectrumConfig, SpectrumRunConfig
from mwt.spectra.study import Look, coarse_grid, look

KINDS = {"kan": "kan.basis", "mfn": "mfn.filter"}
"""What the word after the colon sets, in `kan:fourier` and `mfn:gabor`."""


def model_overrides(text: str) -> list[str]:
    """Overrides of `field.` that a model's text stands for.

    `sine` (an activation of the coordinate MLP), `nerf+sine` (after an encoding), `hash_grid` (a field), `kan:fourier`
    and `mfn:gabor` (a field and its kind), `config` (what `field.` says), or overrides with blanks between them:
    `name=mfn mfn.width=64`.

    Raises:
        InputError: none of these.
    """
    if text == "config":
        return []
    if "=" in text:
        return text.split()
    first, colon, kind = text.partition(":")
    if colon:
        if first not in KINDS:
            raise InputError(f"{text!r}: before the colon there can be {', '.join(KINDS)}.")
        return [f"name={first}", f"{KINDS[first]}={kind}"]
    if text in list_fields():
        return [f"name={text}"]
    encoding, _, activation = text.rpartition("+")
    if activation not in list_activations() or (encoding and encoding not in list_encodings()):
        raise InputError(
            f"{text!r} is no model: give an activation ({', '.join(list_activations())}), ENCODING+ACTIVATION with one "
            f"of {', '.join(list_encodings())}, a field ({', '.join(list_fields())}), kan:BASIS, mfn:FILTER, or "
            "'key=value key=value' of a field."
        )
    return [f"mlp.activation.name={activation}"] + ([f"mlp.encoding.name={encoding}"] if encoding else [])


def models(
    texts: list[str], encodings: list[str], path: Path | None, overrides: list[str]
) -> dict[str, SpectrumConfig]:
    """The configuration of each model, by its text; each activation with each of `encodings`.

    Raises:
        InputError: no such model, or an override that will not do.
    """
    names = [part for text in texts for part in ([text] if "=" in text else text.split(",")) if part]
    known = set(list_activations())
    if encodings:
        pairs = [f"{encoding}+{name}" for name in names if name in known for encoding in encodings]
        names = [*pairs, *(name for name in names if name not in known)]
    names = [name.removeprefix("identity+") for name in names]
    found: dict[str, SpectrumConfig] = {}
    for name in names:
        own = [f"field.{item}" for item in model_overrides(name)]
        config = load_config(SpectrumConfig, path, [*overrides, *own])
        found[label(config.field) if name == "config" else name] = config
    return found


def label(config: FieldConfig) -> str:
    """A field's name as `model_overrides` would take it."""
    if config.name == "mlp":
        encoding, activation = config.mlp.encoding.name, config.mlp.activation.name
        return activation if encoding == "identity" else f"{encoding}+{activation}"
    if config.name in KINDS:
        return f"{config.name}:{getattr(field_block(config), KINDS[config.name].partition('.')[2])}"
    return config.name


# ---- runs of train.fit -----------------------------------------------------------------------------------------------


def run_looks(run: FitRun, settings: SpectrumRunConfig, device: torch.device) -> tuple[list[Look], dict[int, Tensor]]:
    """The kernels of a run's field at its beginning and in the end, and where its residual's energy lies then.

    Kernels are taken at a coarse grid of the signal's frame, the residual (`Task.residual`) at all samples; that of
    signals which are not samples on a grid is left out.

    Raises:
        InputError: several signals at once, a field without a kernel, or a signal that is not what it was.
        NotDefinedError: a field that has no value where it is looked at.
        TrainingError: a kernel that is not finite.
    """
    trained, frame = load_field(run.folder / "field")
    if trained.copies is not None:
        raise InputError(f"{run.folder} holds {trained.copies} fields; a kernel is that of one.")
    dims, channels, seed = trained.coordinate_dims, trained.channels, run.config.run.seed
    fresh = build_field(run.config.field, coordinate_dims=dims, channels=channels, seed=seed, frame=frame)
    coords, size = coarse_grid(trained, frame, settings.points, device)
    task = _task(run, device)
    looks, energy = [], {}
    for step, fields in ((0, fresh), (run.config.optim.steps, trained)):
        fields.to(device)
        looks.append(look(fields, coords, size, None, step=step, memory=settings.memory))
        residual = task.residual(fields)
        if residual is not None:
            energy[step] = energy_by_frequency(residual[0], frame.size or ()).cpu()
    return looks, energy


def _task(run: FitRun, device: torch.device) -> Task:
    """The run's signal, read again."""
    kind, options = TASKS[run.config.task], dict(run.config.signal)
    paths = signal_paths(str(options.pop("path")), kind)
    return kind(paths, read_options(kind.Options, options, f"{run.folder}, signal"), device)


# ---- grids of eval.grid ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class GridModel:
    """A field of a grid, on one task: its metric at the end of each seed's fit."""

    task: str
    name: str
    config: FieldConfig
    frame: Frame
    channels: int
    seed: int
    metrics: tuple[float, ...]

    @property
    def metric(self) -> float:
        """The mean over seeds."""
        return sum(self.metrics) / len(self.metrics)


def grid_models(folder: Path, metric: str | None) -> tuple[list[GridModel], int, dict[str, str]]:
    """The field of each row that a grid of `train.fit` has fitted, how many of its runs have no result, and which rows
    are left out, and why: those of several signals of several shapes, which have a field for each shape.

    Runs in its folder that belong to no row (of another scale, or of overrides that are no longer) are left out.

    Args:
        metric: a name in `final` of result.json; by default the first, which is the task's own.

    Raises:
        InputError: not the folder of a grid, or of one without a finished fit; a metric that a run does not have.
    """
    try:
        rows = json.loads((folder / "cells.json").read_text())["rows"]
    except (OSError, ValueError, LookupError) as error:
        raise InputError(f"{folder} is not the folder of a grid (eval.grid writes its cells.json; {error}).") from error
    groups: dict[tuple[str, ...], list[FitRun]] = {}  # rows of equal runs are one
    unfinished: set[str] = set()
    for row in rows:
        runs = []
        for job in (job for chain in row["jobs"].values() for job in chain.values()):
            with suppress(InputError):  # not begun, or of another program
                path = folder / "jobs" / job
                if is_finished(path):
                    runs.append(read_fit_run(path))
                else:
                    unfinished.add(job)
        if runs:
            groups[tuple(run.folder.name for run in runs)] = runs
    if not groups:
        raise InputError(f"{folder} holds no finished run of train.fit.")
    found, left_out = [], {}
    for runs in groups.values():
        if len(runs[0].result["fields"]) > 1:
            left_out[f"{runs[0].config.task}: {runs[0].folder.name}"] = "fields of several shapes"
            continue
        for run in runs:
            if metric is not None and metric not in run.result["final"]:
                raise InputError(f"{run.folder}: there is no {metric}; there are {', '.join(run.result['final'])}.")
        fields, frame = load_field(runs[0].folder / "field")
        name = metric or next(iter(runs[0].result["final"]))
        found.append(
            GridModel(
                task=runs[0].config.task,
                name=label(runs[0].config.field),
                config=runs[0].config.field,
                frame=frame,
                channels=fields.channels,
                seed=runs[0].config.run.seed,
                metrics=tuple(float(run.result["final"][name]) for run in runs),
            )
        )
    return found, len(unfinished), left_out
