"""Distances and insides against spheres, boxes and trimesh; surfaces of known fields; the bunny's package."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from matplotlib import colormaps
from PIL import Image

from data_pipes.prepare.__main__ import main as prepare
from mwt.errors import InputError
from mwt.fields import ASMRConfig, Field, FieldConfig
from mwt.fields.config import MLPConfig
from mwt.fit_config import FitOptimConfig
from mwt.fitting import SignalFit, fields_for
from mwt.signals import meshes
from mwt.signals.meshes import Mesh, Placement, contains, marching_cubes, read_mesh, render, sample_surface
from mwt.signals.nearest import Nearest
from mwt.signals.shape import ShapeTask, chamfer_distance
from train.fit import main

CPU = torch.device("cpu")
SMALL = {"queries": 2000, "grid": 16, "mesh_grid": 16}
SMALL_KEYS = [f"signal.{key}={value}" for key, value in SMALL.items()]


def ball(subdivisions: int = 3) -> trimesh.Trimesh:
    return trimesh.creation.icosphere(subdivisions=subdivisions, radius=1.0)


def own(mesh: trimesh.Trimesh) -> Mesh:
    return Mesh(np.array(mesh.vertices), np.array(mesh.faces), bool(mesh.is_watertight))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    ball().export(tmp_path / "ball.ply")
    trimesh.creation.box((1, 2, 0.5)).export(tmp_path / "box.obj")
    opened = ball()
    opened.update_faces(np.arange(len(opened.faces)) > 3)
    opened.export(tmp_path / "open.off")
    return tmp_path


@pytest.mark.parametrize("ending", ["obj", "ply", "stl", "off"])
def test_meshes_of_all_kinds(tmp_path: Path, ending: str) -> None:
    """Also those of STL, whose triangles share no vertices in the file."""
    ball().export(path := tmp_path / f"a.{ending}")
    found = read_mesh(path)
    assert found.watertight
    assert (len(found.vertices), len(found.triangles)) == (642, 1280)
    np.testing.assert_allclose(np.linalg.norm(found.vertices, axis=1), 1, atol=1e-5)


def test_a_mesh_inside_out_is_turned(tmp_path: Path) -> None:
    inverted = ball()
    inverted.invert()
    inverted.export(path := tmp_path / "a.ply")
    found = read_mesh(path)
    centres = found.corners.mean(1)
    assert ((found.normals * centres).sum(1) > 0).all()


def test_a_placed_mesh_fills_the_cube() -> None:
    mesh = own(trimesh.creation.box((1, 2, 0.5)).apply_translation((5, 6, 7)))
    place = Placement.within(mesh, 0.9)
    found = place.to_cube(mesh)
    np.testing.assert_allclose(place.to_file(found).vertices, mesh.vertices)
    np.testing.assert_allclose(found.vertices.max(0), [0.45, 0.9, 0.225])
    np.testing.assert_allclose(found.vertices.min(0), [-0.45, -0.9, -0.225])


def test_distance_and_inside_of_a_box() -> None:
    """Against the closed form of a box's signed distance, near the surface and far."""
    half = np.array([0.5, 0.9, 0.3])
    mesh = own(trimesh.creation.box(2 * half))
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.uniform(-1, 1, (3000, 3)), sample_surface(mesh, 500, rng)[0]])
    away = np.abs(points) - half
    signed = np.linalg.norm(away.clip(0), axis=1) + np.minimum(away.max(1), 0)
    np.testing.assert_allclose(Nearest(mesh.corners)(points), np.abs(signed), atol=1e-12)
    clear = np.abs(signed) > 1e-9
    np.testing.assert_array_equal(contains(mesh, points)[clear], (signed < 0)[clear])


def test_distance_of_a_sphere() -> None:
    """Flat triangles lie within the sphere, by at most 1 - cos of half an edge's angle (here 0.0012)."""
    mesh, rng = own(ball(4)), np.random.default_rng(0)
    points = rng.uniform(-1.5, 1.5, (2000, 3))
    expected = np.abs(np.linalg.norm(points, axis=1) - 1)
    np.testing.assert_allclose(Nearest(mesh.corners)(points), expected, atol=1.5e-3)


def winding_number(mesh: Mesh, points: np.ndarray) -> np.ndarray:
    """Solid angles of all triangles over 4 pi (Van Oosterom and Strackee 1983)."""
    a, b, c = (mesh.corners[None, :, i] - points[:, None] for i in range(3))
    la, lb, lc = (np.linalg.norm(v, axis=-1) for v in (a, b, c))
    volume = (a * np.cross(b, c)).sum(-1)
    rest = la * lb * lc + (a * b).sum(-1) * lc + (b * c).sum(-1) * la + (c * a).sum(-1) * lb
    return 2 * np.arctan2(volume, rest).sum(1) / (4 * np.pi)


def test_inside_agrees_with_the_winding_number() -> None:
    """A torus in two pieces and a ball within; and most of it still, where triangles are missing."""
    parts = [trimesh.creation.torus(0.6, 0.25), trimesh.creation.icosphere(2, 0.2).apply_translation((0, 0, 0.7))]
    whole = own(trimesh.util.concatenate(parts))
    points = np.random.default_rng(1).uniform(-0.9, 0.9, (800, 3))
    truth = winding_number(whole, points) > 0.5
    assert 0.1 < truth.mean() < 0.9
    np.testing.assert_array_equal(contains(whole, points), truth)
    holed = Mesh(whole.vertices, whole.triangles[8:])
    assert (contains(holed, points) == truth).mean() > 0.99


def test_lines_through_edges_and_corners_cross_once() -> None:
    """A grid's lines run through the edges of a box that lies on the grid: nothing is counted twice or left out."""
    mesh = own(trimesh.creation.box((1, 1, 1)))
    line = np.linspace(-1, 1, 9)
    points = np.stack(np.meshgrid(line, line, line, indexing="ij"), -1).reshape(-1, 3)
    inside = contains(mesh, points)
    strictly, outside = (np.abs(points) < 0.49).all(1), (np.abs(points) > 0.51).any(1)
    assert inside[strictly].all()
    assert not inside[outside].any()


def test_surface_of_a_known_field() -> None:
    line = np.linspace(-1, 1, 40)
    x, y, z = np.meshgrid(line, line, line, indexing="ij")
    found = marching_cubes(0.7 - np.sqrt((x - 0.1) ** 2 + y**2 + z**2))
    assert found is not None
    np.testing.assert_allclose(np.linalg.norm(found.vertices - [0.1, 0, 0], axis=1), 0.7, atol=2e-3)
    assert ((found.normals * (found.corners.mean(1) - [0.1, 0, 0])).sum(1) > 0).mean() > 0.99
    centred = own(trimesh.creation.icosphere(4, 0.75).apply_translation((0.1, 0, 0)))
    assert chamfer_distance(found, centred) == pytest.approx(0.05, abs=2e-3)
    assert marching_cubes(np.ones((5, 5, 5))) is None
    assert chamfer_distance(None, centred) == pytest.approx(12**0.5)


def test_a_picture_of_a_ball() -> None:
    """White but for the disc, and brightest where the normal is the light's."""
    picture = render(own(ball(4)), 101)[..., 0].numpy()
    line = (2 * np.arange(101) + 1) / 101 - 1
    y, x = np.meshgrid(-line, line, indexing="ij")
    inner, outer = np.hypot(x, y) < 0.98, np.hypot(x, y) > 1.0
    assert (picture[outer] == 1).all()
    normals = np.stack([x, y, np.sqrt((1 - x**2 - y**2).clip(0))], -1)
    np.testing.assert_allclose(picture[inner], (0.2 + 0.7 * (normals @ meshes.LIGHT).clip(0))[inner], atol=0.06)


def test_distances_are_colours() -> None:
    """A ball within a ball: inferno at the share of the way between them, whichever is coloured; white beside."""
    outer, inner = own(ball(4)), own(trimesh.creation.icosphere(4, 0.6))
    for mesh, other, radius in ((outer, inner, 1.0), (inner, outer, 0.6)):
        picture = meshes.render_distances(mesh, other, 40, 0.8).numpy()
        expected = colormaps["inferno"](0.5)[:3]
        line = (2 * np.arange(40) + 1) / 40 - 1
        away = np.hypot(*np.meshgrid(line, line))
        assert (picture[away > radius] == 1).all()
        np.testing.assert_allclose(picture[away < radius - 0.05], np.tile(expected, ((away < radius - 0.05).sum(), 1)),
                                   atol=0.03)  # fmt: skip
    lost = meshes.render_distances(outer, None, 40, 0.8).numpy()[20, 20]
    np.testing.assert_allclose(lost, colormaps["inferno"](1.0)[:3], atol=1e-6)
    assert (meshes.render_distances(None, outer, 8, 0.8) == 1).all()


class Ball(Field):
    """Signed distance to a sphere, exactly."""

    def __init__(self, radius: float, sign: float = 1.0) -> None:
        super().__init__(coordinate_dims=3, channels=1, copies=None, derivatives=2)
        self.radius, self.sign = radius, sign

    def values(self, coords: torch.Tensor) -> torch.Tensor:
        return self.sign * (coords.norm(dim=-1, keepdim=True) - self.radius)


def test_losses_of_an_exact_distance_are_zero(tmp_path: Path) -> None:
    """Each term, up to the flatness of triangles; and each grows with a field that is wrong in its way."""
    ball(4).export(tmp_path / "a.ply")
    weights = ["distance", "surface", "eikonal", "normal"]
    for weight in weights:
        values = {f"weight_{name}": float(name == weight) for name in weights}
        task = ShapeTask([tmp_path / "a.ply"], ShapeTask.Options(mode="distance", **SMALL, **values), CPU)
        assert task.derivatives == (1 if weight in ("eikonal", "normal") else 0)
        exact = float(task.loss(Ball(0.9), None, torch.Generator()).detach())
        assert exact < 2e-3
        wrong = {"eikonal": 3.0, "normal": -1.0}.get(weight, 1.0)
        assert float(task.loss(Ball(0.7, wrong), None, torch.Generator()).detach()) > exact + 0.1
    assert float(task.evaluate(Ball(0.9)).metrics["iou"]) > 0.99


def test_occupancy_losses_are_torchs(folder: Path) -> None:
    for loss in ("bce", "mse"):
        task = ShapeTask([folder / "ball.ply"], ShapeTask.Options(loss=loss, **SMALL), CPU)
        field, index = Ball(0.5, -4.0), torch.arange(0, 2000, 7)
        coords = task.queries.coords[0, index]
        logits, inside = field(coords)[:, 0], (task.queries.values[0, index] > 0).float()
        assert float((inside == (coords.norm(dim=-1) < 0.9)).float().mean()) > 0.95  # the mesh has flat triangles
        expected = (
            torch.nn.functional.binary_cross_entropy_with_logits(logits, inside)
            if loss == "bce"
            else torch.nn.functional.mse_loss(logits, 2 * inside - 1)
        )
        torch.testing.assert_close(task.loss(field, index, torch.Generator())[0], expected)


def test_several_shapes_are_fitted_as_each_alone(folder: Path) -> None:
    config = FieldConfig(mlp=MLPConfig(width=12, hidden_layers=1))

    def fitted(paths: list[Path], seed: int) -> SignalFit:
        options = ShapeTask.Options(mode="distance", points_seed=seed, **SMALL)
        task = ShapeTask(paths, options, CPU)
        fit = SignalFit(task, fields_for(config, task, seed=1), FitOptimConfig(steps=5, points=200), 1, 1)
        fit.run(lambda: False, lambda _: None, lambda: None)
        return fit

    together = fitted([folder / "ball.ply", folder / "box.obj"], 0)
    alone = fitted([folder / "ball.ply"], 0)  # the first draws the same points
    for key, value in alone.fields.state_dict().items():
        torch.testing.assert_close(together.fields.state_dict()[key][0], value, rtol=1e-4, atol=1e-6)


# ---- a lattice -------------------------------------------------------------------------------------------------------

HALF = np.array([0.45, 0.9, 0.225])
"""Of the box (1, 2, 0.5) with reach 0.9; none of a lattice's points below lies on its faces."""


class Box(Field):
    """Positive inside the box."""

    def __init__(self, half: np.ndarray) -> None:
        super().__init__(coordinate_dims=3, channels=1, copies=None, derivatives=1)
        self.half = torch.from_numpy(half).float()

    def values(self, coords: torch.Tensor) -> torch.Tensor:
        return (self.half - coords.abs()).amin(-1, keepdim=True)


@pytest.mark.parametrize("loss", ["bce", "mse"])
def test_a_lattice_knows_a_box_exactly(folder: Path, loss: str) -> None:
    """Insides, losses and IoU against the closed form, on all points and on some."""
    task = ShapeTask([folder / "box.obj"], ShapeTask.Options(lattice=12, loss=loss, mesh_grid=20), CPU)
    assert (task.points, task.frame.size, task.between, task.queries) == (12**3, (12, 12, 12), False, None)
    line = np.linspace(-1, 1, 12)
    points = np.stack(np.meshgrid(line, line, line, indexing="ij"), -1).reshape(-1, 3)
    inside = (np.abs(points) < HALF).all(1)
    assert 0.02 < inside.mean() < 0.2
    field, other = Box(HALF), HALF * [1, 0.7, 1]
    for index in (None, torch.arange(5, 1728, 11)):
        chosen = slice(None) if index is None else index.numpy()
        logits = (HALF - np.abs(points)).min(1)[chosen]
        expected = np.where(inside[chosen], np.logaddexp(0, -logits), np.logaddexp(0, logits)).mean()
        if loss == "mse":
            expected = np.square(logits - np.where(inside[chosen], 1.0, -1.0)).mean()
        found = task.loss(field, index, torch.Generator())
        np.testing.assert_allclose(found.numpy(), [expected], rtol=1e-5)
    assert float(task.evaluate(field).metrics["iou"]) == 1
    shorter = (np.abs(points) < other).all(1)
    found = float(task.evaluate(Box(other)).metrics["iou"])
    assert found == pytest.approx((shorter & inside).sum() / (shorter | inside).sum())
    assert found < 1


@pytest.mark.parametrize("points", [pytest.param("null", marks=pytest.mark.slow), 800])
def test_asmr_learns_a_lattice(folder: Path, points: object) -> None:
    """All points at a step, or tiles: every one right in the end, and a surface within a step of the faces."""
    arguments = ["task=shape", f"signal.path={folder}/box.obj", "signal.lattice=12", f"run.dir={folder / 'run'}",
                 "field.name=asmr", "field.asmr.width=32", "field.asmr.layers=3", "field.asmr.omega=8",
                 "optim.steps=200", f"optim.points={points}", "optim.lr=1e-2", "run.evaluations=2",
                 "run.device=cpu", "run.ranks=false"]  # fmt: skip
    assert main(arguments) == 0
    found = json.loads((folder / "run/result.json").read_text())
    assert (found["final"]["iou"], found["signal"]["size"]) == (1.0, [12, 12, 12])
    written = trimesh.load(folder / "run/reconstruction/box.ply")
    np.testing.assert_allclose(np.abs(written.vertices).max(0), HALF / 0.9, atol=2 / 11)  # in the file's units


def test_several_boxes_on_one_lattice(folder: Path) -> None:
    """Each as if alone."""
    config = FieldConfig(name="asmr", asmr=ASMRConfig(width=8, layers=3))

    def fitted(paths: list[Path]) -> SignalFit:
        task = ShapeTask(paths, ShapeTask.Options(lattice=8), CPU)
        fit = SignalFit(task, fields_for(config, task, seed=1), FitOptimConfig(steps=4, points=100), 1, 1)
        fit.run(lambda: False, lambda _: None, lambda: None)
        return fit

    together, alone = fitted([folder / "ball.ply", folder / "box.obj"]), fitted([folder / "box.obj"])
    for key, value in alone.fields.state_dict().items():
        torch.testing.assert_close(together.fields.state_dict()[key][1], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", [pytest.param("occupancy", marks=pytest.mark.slow), "distance"])
def test_the_program_finds_a_ball(folder: Path, mode: str) -> None:
    out = folder / "run"
    arguments = ["task=shape", f"signal.path={folder}/ball.ply", f"signal.mode={mode}", f"run.dir={out}", *SMALL_KEYS,
                 "signal.queries=8000", "field.mlp.width=32", "field.mlp.hidden_layers=1", "run.device=cpu",
                 "field.mlp.activation.omega=5", "optim.steps=80", "optim.points=1000", "optim.lr=3e-3",
                 "run.evaluations=2"]  # fmt: skip
    assert main(arguments) == 0
    found = json.loads((out / "result.json").read_text())
    assert found["final"]["iou"] > 0.9
    assert found["final"]["chamfer"] < 0.05
    assert found["signal"]["meshes"] == [{"triangles": 1280, "watertight": True}]
    written = trimesh.load(out / "reconstruction/ball.ply")
    np.testing.assert_allclose(np.linalg.norm(written.vertices, axis=1), 1, atol=0.11)  # in the file's units
    with Image.open(out / "reconstruction/ball.png") as picture:
        assert picture.size == (640, 320)


def test_an_open_mesh_has_an_occupancy(folder: Path) -> None:
    arguments = ["--debug", "task=shape", f"signal.path={folder}/open.off", f"run.dir={folder / 'run'}", *SMALL_KEYS]
    assert main(arguments) == 0
    found = json.loads((folder / "run/result.json").read_text())
    assert found["signal"]["meshes"][0]["watertight"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["signal.path={folder}/open.off", "signal.mode=distance"], "open.off is not watertight"),
        (["signal.path={folder}/text.obj"], "text.obj (is not a mesh that can be read|holds no triangles)"),
        (["signal.path={folder}/points.ply"], "points.ply (is not a mesh that can be read|holds no triangles)"),
        (["signal.path={folder}/line.obj"], "line.obj has no triangle with an area"),
        (["signal.path={folder}/sheet.obj"], "None of 16\\^3 points lies inside .*sheet.obj.* no inside: close it"),
        (["signal.path={folder}/ball.ply", "signal.mode=volume"], "signal.mode is 'volume'"),
        (["signal.path={folder}/ball.ply", "signal.loss=l1"], "signal.loss is 'l1'"),
        (["signal.path={folder}/ball.ply", "signal.reach=2"], "signal.reach is 2.0"),
        (["signal.path={folder}/ball.ply", "signal.lattice=2"], "signal.lattice is 2"),
        (["signal.path={folder}/ball.ply", "signal.lattice=8", "signal.mode=distance"], "lattice .* not how far"),
        (["signal.path={folder}/ball.ply", "field.name=asmr"], "between the samples"),
        (["signal.path={folder}/ball.ply", "signal.mode=distance", "field.mlp.activation.name=finer"],
         "derivatives of order 1"),
    ],
)  # fmt: skip
def test_bad_shapes_get_a_sentence(folder: Path, arguments: list[str], message: str) -> None:
    (folder / "text.obj").write_text("no mesh")
    (folder / "line.obj").write_text("v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n")
    (folder / "sheet.obj").write_text("v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nf 1 2 3\nf 1 3 4\n")
    trimesh.PointCloud(np.eye(3)).export(folder / "points.ply")
    given = [item.format(folder=folder) for item in arguments]
    with pytest.raises(InputError, match=message):
        main(["--debug", "task=shape", *SMALL_KEYS, *given, f"run.dir={folder / 'run'}"])


def test_without_trimesh_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "trimesh", None)
    with pytest.raises(InputError, match=r"pip install 'meta-weight-transformer\[shapes\]'"):
        read_mesh(Path("bunny.ply"))


# ---- the bunny's package ---------------------------------------------------------------------------------------------

TETRAHEDRON = """exports.positions=[[0,0,0],[1.5,0,0],[0,1,-2e-1],[0,0,1]]
exports.cells=[[0,2,1],[0,1,3],[0,3,2],[1,2,3]]
"""


@pytest.mark.parametrize("kind", ["folder", "archive", "script"])
def test_javascript_arrays_become_a_mesh(tmp_path: Path, kind: str) -> None:
    src = tmp_path / "package"
    src.mkdir()
    (src / "index.js").write_text(TETRAHEDRON)
    if kind == "archive":
        src = tmp_path / "bunny-1.0.1.tgz"
        with tarfile.open(src, "w:gz") as archive:
            member = tarfile.TarInfo("package/index.js")
            member.size = len(TETRAHEDRON)
            archive.addfile(member, io.BytesIO(TETRAHEDRON.encode()))
    elif kind == "script":
        src = src / "index.js"
    prepare(["bunny", "--src", str(src), "--out", str(tmp_path / "out")])
    found = read_mesh(tmp_path / "out/bunny.ply")
    assert found.watertight
    assert sorted(map(tuple, found.vertices.round(6).tolist())) == [(0, 0, 0), (0, 0, 1), (0, 1, -0.2), (1.5, 0, 0)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("exports.positions=[[0,0,0]]", "no array exports.cells"),
        ("exports.positions=[[0,0,0]]\nexports.cells=[[0,1,2]]", "not in 0 … 0"),
        ("exports.positions=[[0,0],[1]]\nexports.cells=[[0,1,2]]", "not an array of triples"),
        ("exports.positions=run()\nexports.cells=[[0,1,2]]", "no array exports.positions"),
    ],
)
def test_other_scripts_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "index.js").write_text(text)
    with pytest.raises(InputError, match=message):
        prepare(["bunny", "--src", str(tmp_path), "--out", str(tmp_path / "out")])


def test_the_bunny_has_to_be_given(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="npm pack bunny"):
        prepare(["bunny", "--out", str(tmp_path / "out")])
    with pytest.raises(InputError, match="There is no file"):
        prepare(["bunny", "--src", str(tmp_path / "none"), "--out", str(tmp_path / "out")])
