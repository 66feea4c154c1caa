"""Run directories and checkpoints: safetensors for tensors, JSON for the rest, nothing pickled, nothing half written.

RUN/config.yaml               the resolved configuration
RUN/overrides.txt             what was given on the command line
RUN/env.json                  commit, versions, hardware
RUN/metrics.jsonl             one object a line
RUN/checkpoints/last.json     {"folder": "step-00001234"}: replaced only once that folder is whole
RUN/checkpoints/best.json     likewise, where the data has a validation split
RUN/checkpoints/step-…/       model.safetensors, config.json, README.md (`from_pretrained` reads them),
                              optimizer.safetensors, state.json; where the run averages its weights (optim.ema),
                              the model is the average, and raw.safetensors holds the weights being trained
RUN/nonfinite/step-….json     the samples of steps whose loss or gradient was not finite
RUN/eval/NAME.json, RUN/figures/
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mwt.config import ClassifyConfig
from mwt.config_files import load_config
from mwt.errors import InputError
from mwt.model import MetaWeightTransformer
from mwt.readers import Reader
from mwt.runtime import sync, write_json

Weights = Literal["ema", "raw"]
RAW = "raw.safetensors"
"""In a checkpoint of a run that averages its weights: those being trained."""

SAME_RESULT = {"inner_loop": {"engine", "checkpoint"}, "reader": {"checkpoint"}}
"""Settings of a model that say how it is computed and not what: another value gives the same up to rounding."""


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing.") from error
    except ValueError as error:
        raise InputError(f"{path} is not readable as JSON ({error}).") from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing.") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}).") from error


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{names[id(parameter)]}|{key}": value.detach().cpu().contiguous()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def save_checkpoint(
    run: Path,
    *,
    name: str,
    model: MetaWeightTransformer | Reader,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    average: MetaWeightTransformer | None = None,
) -> Path:
    """Write a checkpoint and let `name` ("last" or "best") point at it; older ones that nothing points at are removed.

    Args:
        state: JSON-able; `state["step"]` names the folder.
        average: the model with averaged weights, where there is one.

    Raises:
        OSError: disk full, no permission; says that the previous checkpoint is untouched.
    """
    try:
        return _save(run, name, model, average, optimizer, state)
    except (OSError, SafetensorError) as error:  # safetensors wraps the system's errors, whose text alone names them
        message = (
            f"the checkpoint of step {state['step']} could not be written "
            f"({getattr(error, 'strerror', None) or error}); {_what_is_left(run)}"
        )
        number = error.errno if isinstance(error, OSError) else errno.EIO
        raise OSError(number, message, str(run / "checkpoints")) from error


def _what_is_left(run: Path) -> str:
    if not has_checkpoint(run):
        return "there is none before it"
    return f"the last one, {find_checkpoint(run).name}, is untouched, and --resume goes on from there"


def _save(
    run: Path,
    name: str,
    model: MetaWeightTransformer | Reader,
    average: MetaWeightTransformer | None,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
) -> Path:
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{state['step']:08d}"
    left_out = {"params", "param_names"}
    groups = [{k: v for k, v in group.items() if k not in left_out} for group in optimizer.param_groups]
    state = {**state, "groups": groups}
    pointer = folder / f"{name}.json"
    if final.name in _pointed_at(folder):
        # The tensors of this step are there; what is known about it may be newer. The pointer comes first: killed
        # between the two, a run evaluates once more, and does not take for done what is not.
        write_json(pointer, {"folder": final.name})
        write_json(final / "state.json", state)
    else:
        shutil.rmtree(final, ignore_errors=True)  # of a run that died before anything pointed at it
        temporary = folder / f".{final.name}.{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            (model if average is None else average).save_pretrained(temporary)
            if average is not None:
                weights = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
                save_file(weights, temporary / RAW)
            save_file(_optimizer_tensors(model, optimizer), temporary / "optimizer.safetensors")
            write_json(temporary / "state.json", state)
            for file in temporary.iterdir():
                sync(file)
            sync(temporary)
            os.replace(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync(folder)
    write_json(pointer, {"folder": final.name})
    sync(folder)  # the pointer lasts before what it pointed at goes
    _remove_unused(folder)
    return final


def _pointed_at(folder: Path) -> set[str]:
    return {str(_read_json(pointer)["folder"]) for pointer in folder.glob("*.json")}


def _remove_unused(folder: Path) -> None:
    kept = _pointed_at(folder)
    for path in folder.iterdir():
        if path.is_dir() and path.name.startswith(("step-", ".step-")) and path.name not in kept:
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.startswith((".last.json.", ".best.json.")):  # a pointer that a killed process was writing
            path.unlink(missing_ok=True)


def check_run_directory(run: Path) -> None:
    """Refuse what no program of `train` has made.

    Raises:
        InputError: it has no configuration.
    """
    if not (run / "config.yaml").is_file():
        raise InputError(
            f"{run} is not a run directory (it has no config.yaml); train.classify, train.weights and train.fit make "
            "them."
        )


def has_checkpoint(run: Path, name: str = "last") -> bool:
    """Whether the run has come as far as a checkpoint."""
    return (run / "checkpoints" / f"{name}.json").is_file()


def find_checkpoint(run: Path, name: str = "last") -> Path:
    """The folder that `last` or `best` points at.

    Raises:
        InputError: not a run directory, or no such checkpoint; says what there is.
    """
    check_run_directory(run)
    pointer = run / "checkpoints" / f"{name}.json"
    if not has_checkpoint(run, name):
        there = sorted(path.stem for path in (run / "checkpoints").glob("*.json"))
        hint = f"it has {' and '.join(there)}" if there else "training has not written any yet"
        raise InputError(f"{run} has no checkpoint {name!r}; {hint}.")
    folder = run / "checkpoints" / str(_read_json(pointer)["folder"])
    if not folder.is_dir():
        raise InputError(f"{pointer} points at {folder.name}, which is not there.")
    return folder


def load_model(
    folder: Path, device: torch.device | str = "cpu", *, weights: Weights | None = None
) -> MetaWeightTransformer:
    """The model of a checkpoint folder, in evaluation mode.

    Args:
        weights: ema, the moving average; raw, the weights that were being trained; None: the average if there is one.

    Raises:
        InputError: a missing or damaged file, or no average.
    """
    for file in ("config.json", "model.safetensors"):
        if not (folder / file).is_file():
            raise InputError(f"{folder} holds no model: {file} is missing.")
    averaged = (folder / RAW).is_file()
    if weights == "ema" and not averaged:
        raise InputError(f"{folder} holds no average of the weights; it was trained without optim.ema.")
    try:
        model = MetaWeightTransformer.from_pretrained(folder, map_location="cpu")
        if weights == "raw" and averaged:
            model.load_state_dict(_read_tensors(folder / RAW))
        return model.to(device)
    except (SafetensorError, RuntimeError, TypeError, KeyError, ValueError, AttributeError) as error:
        raise InputError(f"The model in {folder} cannot be loaded: {str(error).splitlines()[0]}") from error


def resume(
    folder: Path,
    *,
    model: MetaWeightTransformer,
    optimizer: torch.optim.Optimizer,
    average: MetaWeightTransformer | None = None,
) -> dict[str, Any]:
    """Put a checkpoint into `model`, `average` and `optimizer`, in place, and return its state.

    Raises:
        InputError: the checkpoint belongs to another architecture; names what differs.
    """
    _check_architecture(_read_json(folder / "config.json"), model, folder)
    if average is not None:
        average.load_state_dict(_read_tensors(folder / "model.safetensors"))
    weights = "model.safetensors" if average is None else RAW
    return restore(folder, model=model, optimizer=optimizer, weights=weights)


def restore(
    folder: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer, weights: str = "model.safetensors"
) -> dict[str, Any]:
    """Put the tensors of a checkpoint into a model of the same architecture and its optimizer; returns its state."""
    model.load_state_dict(_read_tensors(folder / weights))
    tensors = _read_tensors(folder / "optimizer.safetensors")
    named = dict(model.named_parameters())
    for key, value in tensors.items():
        name, entry = key.rsplit("|", 1)
        parameter = named[name]
        # AdamW keeps its step counter in float32 beside the parameter if fused, else on the CPU.
        optimizer.state[parameter][entry] = value.to(parameter.device)
    state: dict[str, Any] = _read_json(folder / "state.json")
    for group, saved in zip(optimizer.param_groups, state.pop("groups"), strict=True):
        group.update({key: tuple(v) if isinstance(v, list) else v for key, v in saved.items()})
    return state


def _check_architecture(saved: Any, model: MetaWeightTransformer, folder: Path) -> None:
    ours = dataclasses.asdict(model.config)
    try:
        stored = dataclasses.asdict(type(model.config).from_dict(saved))
    except (TypeError, KeyError, ValueError) as error:
        raise InputError(f"{folder / 'config.json'} does not describe a model ({error}).") from error
    for block, values in ours.items():
        for key, value in values.items():
            if stored[block][key] != value and key not in SAME_RESULT.get(block, ()):
                raise InputError(
                    f"The checkpoint {folder} is of another model: {block}.{key} is {stored[block][key]!r} there "
                    f"and {value!r} here. Use the run's own config, or another run.dir."
                )


def load_run(
    run: Path | str,
    *,
    checkpoint: str = "last",
    device: torch.device | str = "cpu",
    weights: Weights | None = None,
) -> tuple[ClassifyConfig, MetaWeightTransformer]:
    """Configuration and model of a run directory, for `eval` programs.

    Raises:
        InputError: no run directory, no such checkpoint, a damaged file.
    """
    run = Path(run)
    folder = find_checkpoint(run, checkpoint)
    return load_config(ClassifyConfig, run / "config.yaml"), load_model(folder, device, weights=weights)
