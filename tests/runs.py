"""What training leaves behind, as tests compare it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mwt.tracking import read_metrics

MACHINE = {"images_per_second", "seconds", "peak_memory_gb"}
"""Of a line of metrics.jsonl, what depends on the machine and not on the run."""


def rows(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what depends on the machine."""
    return [{k: v for k, v in row.items() if k not in MACHINE} for row in read_metrics(run / "metrics.jsonl")]


def last_step(run: Path) -> int:
    """The step of the last checkpoint."""
    return int(json.loads((run / "checkpoints" / "last.json").read_text())["folder"].removeprefix("step-"))


def tensors(run: Path, file: str = "model.safetensors") -> dict[str, torch.Tensor]:
    """Those of a file of the last checkpoint."""
    folder = json.loads((run / "checkpoints" / "last.json").read_text())["folder"]
    return load_file(run / "checkpoints" / folder / file)


def check_alike(one: Path, other: Path, tolerance: float = 1e-6) -> None:
    """The same lines in the log, losses and parameters within `tolerance`."""
    ours, theirs = rows(one), rows(other)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            near = pytest.approx(value, rel=10 * tolerance, abs=tolerance) if isinstance(value, float) else value
            assert b[key] == near, (a["step"], key)
    parameters = tensors(other)
    for name, value in tensors(one).items():
        torch.testing.assert_close(parameters[name], value, rtol=0, atol=tolerance, msg=name)
