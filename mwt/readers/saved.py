"""Readers on disk: reader.json (configuration, layout, classes, what it was trained on) and model.safetensors."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mwt.config import ReaderConfig
from mwt.errors import InputError
from mwt.readers.interface import CONFIG_FILE, TENSORS_FILE, Reader
from mwt.weight_space import Layout


def load_reader(folder: Path | str, device: torch.device | str = "cpu") -> Reader:
    """A saved reader, in evaluation mode: of a folder that `save_pretrained` has written, or of a run of train.weights.

    Of a run it is the checkpoint `best` where there is one, else `last`.

    Raises:
        InputError: no reader there, or a damaged one.
    """
    from mwt.readers import make_reader

    folder = checkpoint_folder(Path(folder))
    file = folder / CONFIG_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        layout = {**content["layout"], "sizes": tuple(content["layout"]["sizes"])}
        layout["omegas"] = tuple(layout["omegas"])
        reader = make_reader(
            ReaderConfig(**content["reader"]), layout=Layout(**layout), classes=int(content["classes"])
        )
        reader.facts = content["facts"]
        reader.load_state_dict(load_file(folder / TENSORS_FILE))
    except FileNotFoundError as error:
        raise InputError(
            f"{folder} holds no reader: {Path(error.filename or TENSORS_FILE).name} is missing."
        ) from error
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise InputError(f"The reader in {folder} cannot be loaded: {str(error).splitlines()[0]}") from error
    return reader.to(device).eval()


def checkpoint_folder(folder: Path) -> Path:
    """The folder of a run's checkpoint `best`, or else `last`; of anything else, the folder itself."""
    for name in ("best", "last"):
        pointer = folder / "checkpoints" / f"{name}.json"
        if pointer.is_file():
            return pointer.parent / str(json.loads(pointer.read_text())["folder"])
    return folder
