"""eval.cost: what it writes is what the field is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import eval.cost as program
from mwt.errors import InputError
from mwt.fields import FieldConfig, Frame, MLPConfig, build_field, save_field


def saved(folder: Path, *, size: tuple[int, ...] | None, copies: int | None = None) -> None:
    config = FieldConfig(mlp=MLPConfig(width=8, hidden_layers=1))
    frame = Frame(kind="image", axes=("y", "x"), coordinate_range=((-1.0, 1.0),) * 2, size=size)
    save_field(build_field(config, coordinate_dims=2, channels=3, seed=0, copies=copies), frame, folder / "field")


@pytest.mark.parametrize("copies", [None, 2])
def test_cost_of_a_fitted_field(copies: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path, size=(6, 9), copies=copies)
    assert program.main(["--run", str(tmp_path), "--runs", "3", "--device", "cpu"]) == 0
    found = json.loads((tmp_path / "eval" / "cost.json").read_text())
    assert found["parameters"] == 3 * 8 + 9 * 8 + 9 * 3
    assert found["macs_per_point"] == found["macs_counted"] == 2 * 8 + 8 * 8 + 8 * 3
    assert found["points"] == 54 * (copies or 1)
    assert found["points_per_second"] == pytest.approx(found["points"] / found["latency_ms"] * 1000, rel=0.01)
    assert "parameters" in capsys.readouterr().out


def test_a_signal_without_a_grid_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, size=None)
    with pytest.raises(InputError, match="no grid"):
        program.main(["--run", str(tmp_path)])
