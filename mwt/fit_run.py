"""Finished runs of `train.fit`, read back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mwt.config_files import load_config
from mwt.errors import InputError
from mwt.fit_config import FitConfig


@dataclass(frozen=True, kw_only=True)
class FitRun:
    """What a finished run of `train.fit` holds; its fields: `load_field(folder / "field")`."""

    folder: Path
    config: FitConfig
    result: dict[str, Any]
    """result.json."""


def is_finished(folder: Path) -> bool:
    """Whether a run's result has been written.

    Raises:
        InputError: not a run at all.
    """
    if not (folder / "config.yaml").is_file():
        raise InputError(f"{folder} is not a run of train.fit (it has no config.yaml).")
    return (folder / "result.json").is_file()


def read_fit_run(folder: Path) -> FitRun:
    """A finished run.

    Raises:
        InputError: not a run, not finished, or its files are damaged.
    """
    if not is_finished(folder):
        raise InputError(f"{folder} is not a finished run of train.fit (it has no result.json).")
    try:
        result = json.loads((folder / "result.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}/result.json is not readable as JSON ({error}).") from error
    return FitRun(folder=folder, config=load_config(FitConfig, folder / "config.yaml"), result=result)
