"""Every config of a fit: it parses, its task takes its options, and its header names its own command, data and time."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mwt.config_files import load_config, read_options
from mwt.fields import Frame, build_field
from mwt.fit_config import FitConfig
from mwt.signals import TASKS

FOLDER = Path(__file__).parents[1] / "configs" / "fit"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_config_of_a_fit(path: Path) -> None:
    config = load_config(FitConfig, path)
    options = dict(config.signal)
    assert options.pop("path")
    read_options(TASKS[config.task].Options, options, path.name)
    dims = {"audio": 1, "video": 3, "shape": 3, "radiance": 3}.get(config.task, 2)
    frame = Frame(kind="", axes=("a",) * dims, coordinate_range=((-1.0, 1.0),) * dims, size=(512,) * dims)
    assert build_field(config.field, coordinate_dims=dims, channels=1, seed=0, frame=frame).num_parameters > 0
    header = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert f"python -m train.fit --config configs/fit/{path.name}" in header
    assert re.search(r"^# Data: +\w", header, re.M)
    assert re.search(r"^# Time: +.*(second|minute| s )", header, re.M)
    assert config.run.dir == f"runs/fit/{path.stem}"
