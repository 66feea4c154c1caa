"""Every config of eval.spectrum: its header's own command, at both sizes."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch

from eval import spectrum
from mwt.fields import build_field
from mwt.spectra.models import models
from mwt.spectra.study import make_task

CPU = torch.device("cpu")


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "configs" / "spectrum").glob("*.yaml")))
def test_a_config_s_own_command(path: Path) -> None:
    """The program takes it, at its own size and at the tiny one, and so does every model."""
    lines = [line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#")]
    command = " ".join(lines[lines.index("") + 1 :]).partition("the same with ")
    words = shlex.split(command[0].replace("\\", ""))
    tiny = [word for word in shlex.split(command[2].partition(" tiny")[0]) if "=" in word]
    assert words[:5] == ["python", "-m", "eval.spectrum", "--config", f"configs/spectrum/{path.name}"]
    for further in ([], tiny):
        arguments = spectrum.parse([*words[3:], *further])
        found = models(arguments.models, [], path, arguments.overrides)
        assert len(found) > 5
        task = make_task(next(iter(found.values())).signal, 0, CPU)
        for config in found.values():
            build_field(config.field, coordinate_dims=len(task.size), channels=1, seed=0)
    assert tiny
    assert any(line.startswith("Time:    ") for line in lines)
