"""What a saved field's frame says, alone, puts its numbers back into the units of the signal's file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import trimesh
from PIL import Image

from data_pipes.prepare.__main__ import main as prepare
from mwt.fields import Field, FieldConfig, Frame, load_field, save_field
from mwt.fields.config import MLPConfig
from mwt.fitting import fields_for
from mwt.signals.audio import AudioTask
from mwt.signals.meshes import read_mesh
from mwt.signals.nearest import Nearest
from mwt.signals.poisson import PoissonTask
from mwt.signals.radiance import RadianceTask
from mwt.signals.shape import ShapeTask
from mwt.signals.task import Task

CPU = torch.device("cpu")
CONFIG = FieldConfig(mlp=MLPConfig(width=8, hidden_layers=1))


def read_back(task: Task, folder: Path) -> Frame:
    """The frame as another program finds it."""
    save_field(fields_for(CONFIG, task, seed=0), task.frame, folder / "field")
    frame = load_field(folder / "field")[1]
    assert frame == task.frame
    return frame


@pytest.mark.parametrize("mode", ["occupancy", "distance"])
def test_a_shape(tmp_path: Path, mode: str) -> None:
    """Places and distances of a box somewhere else, and the sign, against the file's mesh."""
    box = trimesh.creation.box((10, 20, 5)).apply_translation((50, 60, 70))
    box.export(tmp_path / "box.ply")
    trimesh.creation.icosphere(2, 3.0).export(tmp_path / "ball.ply")
    options = ShapeTask.Options(mode=mode, queries=400, grid=16)
    task = ShapeTask([tmp_path / "ball.ply", tmp_path / "box.ply"], options, CPU)
    meta = read_back(task, tmp_path).meta
    assert meta["mode"] == mode
    places = np.array(meta["centre"][1]) + meta["scale"][1] * task.queries.coords[1].double().numpy()
    away = places - [50, 60, 70]
    inside = (np.abs(away) < [5, 10, 2.5]).all(1)
    values = task.queries.values[1].numpy()
    if mode == "occupancy":
        np.testing.assert_array_equal(values > 0, inside)
    else:
        file = Nearest(read_mesh(tmp_path / "box.ply").corners)(places)
        np.testing.assert_allclose(meta["scale"][1] * values, np.where(inside, -1, 1) * file, atol=0.05)


def test_the_surface_is_written_where_the_mesh_is(tmp_path: Path) -> None:
    ball = trimesh.creation.icosphere(3, 30.0).apply_translation((100, 0, -40))
    ball.export(tmp_path / "ball.ply")
    task = ShapeTask([tmp_path / "ball.ply"], ShapeTask.Options(queries=400, grid=16, mesh_grid=32), CPU)

    class Inside(Field):
        def __init__(self) -> None:
            super().__init__(coordinate_dims=3, channels=1, copies=None, derivatives=1)

        def values(self, coords: torch.Tensor) -> torch.Tensor:
            return 0.9 - coords.norm(dim=-1, keepdim=True)

    out = tmp_path / "out"
    out.mkdir()
    files = [path.name for path in task.write(Inside(), out)]
    assert files == ["ball.ply", "ball.png", "ball.error.png"]
    written = trimesh.load(out / "ball.ply")
    np.testing.assert_allclose(np.linalg.norm(written.vertices - [100, 0, -40], axis=1), 30, atol=0.1)
    with Image.open(out / "ball.error.png") as picture:
        colours = np.asarray(picture).astype(int).sum(-1)
    assert picture.size == (640, 320)
    assert (colours[:, 160] < 200).mean() > 0.5  # dark: near each other
    assert colours[0, 0] == 3 * 255


@pytest.mark.parametrize("count", [1, 2])
def test_sounds(tmp_path: Path, count: int) -> None:
    """Amplitudes: of one sound through `to_data`, of several by the peaks."""
    for i in range(count):
        soundfile.write(tmp_path / f"{i}.wav", (i + 1) * 0.3 * np.sin(np.arange(400) / 7), 8000, subtype="FLOAT")
    task = AudioTask([tmp_path / f"{i}.wav" for i in range(count)], AudioTask.Options(), CPU)
    frame = read_back(task, tmp_path)
    assert frame.meta["rate"] == 8000
    for i in range(count):
        values = frame.to_data(task.truth[i]) if count == 1 else task.truth[i] * frame.meta["peaks"][i]
        np.testing.assert_allclose(values[:, 0], soundfile.read(tmp_path / f"{i}.wav")[0], atol=1e-6)


def test_a_radiance_field(tmp_path: Path) -> None:
    prepare(["synthetic_scene", "--out", str(tmp_path / "scene"), "--size", "8", "--views", "4"])
    task = RadianceTask([tmp_path / "scene"], RadianceTask.Options(bound=1.25, white=False), CPU)
    meta = read_back(task, tmp_path).meta
    assert (meta["bound"], meta["background"], meta["values"][0]) == (1.25, 0.0, "log_density")
    assert len(meta["values"]) == task.channels


def test_a_picture_from_its_gradient(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    meta = read_back(PoissonTask([tmp_path / "a.png"], PoissonTask.Options(), CPU), tmp_path).meta
    np.testing.assert_allclose(meta["mean"], [array.mean((0, 1)) / 255], rtol=1e-5)


def test_fields_that_were_saved_without_it_can_be_read(tmp_path: Path) -> None:
    frame = Frame(kind="image", axes=("y", "x"), coordinate_range=((-1.0, 1.0),) * 2)
    content = {"kind": "image", "axes": ["y", "x"], "coordinate_range": [[-1, 1], [-1, 1]]}
    assert Frame.from_dict(json.loads(json.dumps(content))) == frame
    assert frame.meta == {}
