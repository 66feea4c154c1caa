"""Fields on disk: a folder with the weights (safetensors) and what they mean (JSON). Nothing is pickled.

    field, frame = load_field("runs/fit/field")
    values = evaluate(field, frame.grid())
    picture = frame.to_data(values).reshape(*frame.size, field.channels)

FOLDER/field.safetensors   the state of the module, under its own names: parameters and the Fourier matrix
FOLDER/field.json          {"schema", "field": {"name", NAME: {...}}, "coordinate_dims", "channels", "copies", "frame"}
"""

from __future__ import annotations

import errno
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mwt.errors import InputError
from mwt.fields.config import FieldConfig
from mwt.fields.field import Field
from mwt.fields.frame import Frame
from mwt.fields.registry import build_field, field_block
from mwt.runtime import write_json

SCHEMA = 1
WEIGHTS, ARCHITECTURE = "field.safetensors", "field.json"


def save_field(field: Field, frame: Frame, folder: Path | str) -> None:
    """Write a field that `build_field` made, and the frame of its signal.

    Raises:
        InputError: the frame has another number of axes than the field has coordinates.
        OSError: disk full, no permission.
    """
    if frame.coordinate_dims != field.coordinate_dims:
        raise InputError(f"The frame has {frame.coordinate_dims} axes and the field {field.coordinate_dims}.")
    config = field.config
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu().contiguous() for name, value in field.state_dict().items()}
    temporary = folder / f".{WEIGHTS}"
    try:
        save_file(state, temporary)
        temporary.replace(folder / WEIGHTS)
    except SafetensorError as error:  # wraps the system's errors, whose text alone names them
        raise OSError(errno.EIO, f"the field could not be written ({error})", str(folder / WEIGHTS)) from error
    finally:
        temporary.unlink(missing_ok=True)
    content = {
        "schema": SCHEMA,
        "field": {"name": config.name, config.name: asdict(field_block(config))},
        "coordinate_dims": field.coordinate_dims,
        "channels": field.channels,
        "copies": field.copies,
        "frame": asdict(frame),
    }
    write_json(folder / ARCHITECTURE, content)  # last: a folder with it is whole


def load_field(folder: Path | str) -> tuple[Field, Frame]:
    """The field of a folder, on the CPU in evaluation mode, and the frame of its signal.

    Raises:
        InputError: a missing or damaged file, or one that describes something else; names file and key.
    """
    folder = Path(folder)
    path = folder / ARCHITECTURE
    content = _read_architecture(path)
    try:
        config = _field_config(content["field"])
        frame = Frame.from_dict(content["frame"])
        sizes = {name: content[name] for name in ("coordinate_dims", "channels", "copies")}
        field = build_field(config, seed=0, frame=frame, **sizes)
    except (InputError, TypeError) as error:
        raise InputError(f"{path}: {error}") from error
    weights = folder / WEIGHTS
    state = _read_weights(weights)
    _check_state(field, state, weights)
    field.load_state_dict(state, assign=True)  # the file's precision is kept
    return field.eval(), frame


def _read_architecture(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        inside = sorted(str(found.parent) for found in path.parent.glob(f"*/{ARCHITECTURE}"))
        if inside:
            raise InputError(
                f"{path.parent} holds fields of several shapes: load one of {', '.join(inside)}."
            ) from error
        raise InputError(f"{path} is missing; `save_field` writes it.") from error
    except ValueError as error:
        raise InputError(f"{path} is not readable as JSON ({error}).") from error
    wanted = {
        "schema": int,
        "field": dict,
        "coordinate_dims": int,
        "channels": int,
        "copies": int | None,
        "frame": dict,
    }
    for key, kind in wanted.items():
        if not isinstance(content, dict) or key not in content:
            raise InputError(f"{path}: {key} is missing.")
        if not isinstance(content[key], kind):
            raise InputError(f"{path}: {key} is {content[key]!r}, which is not of the right type.")
    if content["schema"] != SCHEMA:
        raise InputError(f"{path}: schema is {content['schema']}; this version reads {SCHEMA}.")
    found: dict[str, Any] = content
    return found


def _field_config(content: dict[str, Any]) -> FieldConfig:
    try:
        merged = OmegaConf.merge(OmegaConf.structured(FieldConfig), content)
        config: FieldConfig = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        key = f"field.{error.full_key}" if getattr(error, "full_key", None) else "field"
        raise InputError(f"{key}: {str(error).splitlines()[0]}") from error
    return config


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing.") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}).") from error


def _check_state(field: Field, state: dict[str, Tensor], path: Path) -> None:
    own = field.state_dict()
    for name in own.keys() | state.keys():
        if name not in state:
            raise InputError(f"{path}: {name} is missing.")
        if name not in own:
            raise InputError(f"{path}: {name} does not belong to the field that {ARCHITECTURE} describes.")
        if own[name].shape != state[name].shape:
            raise InputError(f"{path}: {name} is {list(state[name].shape)}; it should be {list(own[name].shape)}.")
        if own[name].is_floating_point() != state[name].is_floating_point():
            raise InputError(f"{path}: {name} holds {state[name].dtype}; it should be floating-point numbers.")
