"""ModelNet40: OFF files of every form, points evenly on the surface, and the way from a mesh to a training run."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial import ConvexHull
from scipy.stats import chisquare

import train.classify as program
from data_pipes.prepare import modelnet40
from data_pipes.prepare.__main__ import main
from data_pipes.prepare.mesh import Mesh, normalised, read_off, sample_surface
from data_pipes.read import open_split
from data_pipes.schema import read_info
from data_pipes.verify import main as verify
from mwt.config import InnerLoopConfig
from mwt.errors import InputError
from mwt.observe import observe
from mwt.outer_loop import OuterLoop
from mwt.surface import ask
from mwt.training import Meter
from tests.runs import last_step, rows, tensors

CUBE = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], dtype=float)
QUADS = ((0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3))


def off(vertices: np.ndarray, faces: list[tuple[int, ...]], header: str = "OFF\n") -> str:
    lines = [" ".join(map(str, vertex)) for vertex in vertices]
    lines += [" ".join(map(str, (len(face), *face))) for face in faces]
    return f"{header}{len(vertices)} {len(faces)} 0\n" + "\n".join(lines) + "\n"


def cube(header: str = "OFF\n", scale: float = 1.0) -> str:
    return off(CUBE * scale, list(QUADS), header)


def sphere(count: int = 2000) -> Mesh:
    """The hull of points on the unit sphere, spread by the golden angle."""
    z = 1 - (2 * np.arange(count) + 1) / count
    angle = np.arange(count) * np.pi * (3 - np.sqrt(5))
    radius = np.sqrt(1 - z**2)
    points = np.stack([radius * np.cos(angle), radius * np.sin(angle), z], axis=1)
    return Mesh(points, ConvexHull(points).simplices.astype(np.int64))


def numbers(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, 3), dtype=np.float32)


@pytest.mark.parametrize(
    "text",
    [
        cube(),
        cube("OFF"),  # OFF8 6 0, as in many files of ModelNet40
        cube("OFF "),
        cube("OFF # made by hand\n\n# counts follow\n"),
        cube().replace(" ", "   ").replace("\n", "\r\n"),
        cube().replace("4 0 1 3 2", "4 0 1 3 2  255 0 0"),
        cube() + "\n\n",
    ],
)
def test_off_files_of_every_form(text: str) -> None:
    mesh = read_off(text.encode(), "x")
    assert np.array_equal(mesh.vertices, CUBE)
    assert mesh.triangles.shape == (12, 3)
    a, b, c = (mesh.vertices[mesh.triangles[:, i]] for i in range(3))
    assert np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() / 2 == pytest.approx(6)
    assert np.einsum("ij,ij->", a, np.cross(b, c)) / 6 in (pytest.approx(1), pytest.approx(-1)), "encloses its volume"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "x.off is no OFF file"),
        ("PLY\n1 1 1\n", "x.off is no OFF file"),
        ("OFF\n", "no numbers of vertices and faces"),
        ("OFF\nmany\n", "no numbers of vertices and faces"),
        (cube().rsplit("\n", 2)[0], r"says that it has 8 vertices and 6 faces, which does not fit the 13 lines"),
        (cube() + "3 0 1 2\n", r"which does not fit the 15 lines"),
        (cube().replace("4 0 1 3 2", "4 0 1 3 8"), r"vertices that are not in 0 … 7"),
        (cube().replace("4 0 1 3 2", "5 0 1 3 2"), "holds a line that is no vertex"),
        (cube().replace("1.0 1.0 1.0", "1.0 nan 1.0"), "a vertex that is not three finite numbers"),
        (cube().replace("1.0 1.0 1.0", "1.0 x 1.0"), "holds a line that is no vertex"),
        (cube().replace("1.0 1.0 1.0", "1.0 1.0"), "holds a line that is no vertex"),
        (off(CUBE, [(0, 1)]), "has no triangles"),
    ],
)
def test_off_files_that_are_not_right(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_off(text.encode(), "x.off")


def test_points_are_spread_by_area() -> None:
    """Two triangles, areas 1 : 3, and within a triangle equally many in each of its four quarters."""
    vertices = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [5, 0, 0], [8, 0, 0], [5, 1, 0]], dtype=float)
    points = sample_surface(Mesh(vertices, np.array([[0, 1, 2], [3, 4, 5]])), numbers(20_000), "x")
    assert points.shape == (20_000, 3)
    large = points[:, 0] > 2
    assert chisquare([(~large).sum(), large.sum()], [5000, 15_000]).pvalue > 0.01
    x, y = (points[large, 0] - 5) / 3, points[large, 1]
    assert (x >= 0).all()
    assert (y >= 0).all()
    assert (x + y <= 1 + 1e-12).all()
    quarters = [(x > 0.5).sum(), (y > 0.5).sum(), (x + y < 0.5).sum()]
    assert chisquare([*quarters, len(x) - sum(quarters)]).pvalue > 0.01
    with pytest.raises(InputError, match="x: the mesh has no area"):
        sample_surface(Mesh(vertices * 0, np.array([[0, 1, 2]])), numbers(5), "x")
    flat = Mesh(vertices, np.array([[0, 0, 0], [0, 1, 2], [1, 1, 1]]))  # triangles without area get no points
    assert (sample_surface(flat, numbers(1000), "x").sum(1) > 0).all()


def test_normalisation() -> None:
    points = numbers(500) * [1, 2, 7] + [100, -3, 0]
    result = normalised(points)
    assert np.abs(result.mean(0)).max() < 1e-12
    assert np.abs(result).max() == 1
    expected = points - points.mean(0)  # one factor for all axes: the shape is kept
    assert np.allclose(result / expected, (result / expected)[0, 0])


def write_tree(root: Path, count: int = 3) -> Path:
    """ModelNet40/{ball,box}/{train,test}/*.off."""
    ball = sphere(60)
    for name in ("box", "ball"):
        for split, many in (("train", count), ("test", 2)):
            folder = root / "ModelNet40" / name / split
            folder.mkdir(parents=True)
            for index in range(many):
                scale = 1.0 + index + 10 * (split == "test")
                text = cube("OFF", scale) if name == "box" else off(ball.vertices * scale, ball.triangles.tolist())
                (folder / f"{name}_{index:04d}.off").write_text(text)
            (folder / ".DS_Store").touch()
    (root / "ModelNet40" / "README.txt").touch()
    return root


def prepare(*arguments: object) -> None:
    main(["modelnet40", *map(str, arguments)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shapes")
    write_tree(root)
    prepare("--src", root, "--out", root / "out")
    return root / "out"


def test_modelnet40(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info = read_info(folder)
    assert (info.name, info.signal, info.channels, info.classes) == ("modelnet40", "points", 1, ("ball", "box"))
    assert {split: part.count for split, part in info.splits.items()} == {"train": 6, "test": 4}
    split = open_split(folder, "train", device=torch.device("cpu"))
    batch = next(split.batches(batch_size=6))
    assert batch.values is None
    assert batch.coords is not None
    assert batch.coords.shape == (6, 32768, 3)
    assert batch.labels.bincount().tolist() == [3, 3]
    assert torch.equal(batch.coords.abs().amax((1, 2)), torch.ones(6))
    assert batch.coords.mean(1).abs().max() < 1e-6
    assert len({bytes(surface.numpy()) for surface in batch.coords}) == 6, "every mesh has its own points"
    streamed = open_split(folder, "train", device=torch.device("cpu"), reader="stream")
    assert torch.equal(next(streamed.batches(batch_size=6)).coords, batch.coords)
    verify([str(folder)])
    assert "is in order" in capsys.readouterr().out
    prepare("--src", folder.parent / "ModelNet40", "--out", tmp_path / "again", "--workers", 2)
    assert read_info(tmp_path / "again").splits == info.splits
    archive = tmp_path / "ModelNet40.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for path in sorted((folder.parent / "ModelNet40").rglob("*.off"), reverse=True):
            packed.write(path, path.relative_to(folder.parent))
        packed.writestr("__MACOSX/ModelNet40/box/train/._box_0000.off", b"x")
    prepare("--src", archive, "--out", tmp_path / "zipped", "--workers", 1)
    assert [part.count for part in read_info(tmp_path / "zipped").splits.values()] == [6, 4]
    assert read_info(tmp_path / "zipped").splits == info.splits
    note = "Note: these are 6 train and 4 test samples; ModelNet40 has 9,843 train and 2,468 test."
    assert note in capsys.readouterr().out


def test_a_mesh_in_both_splits_is_found(tmp_path: Path) -> None:
    """Under another name and written otherwise, but with the same corners and faces."""
    src = write_tree(tmp_path / "src")
    text = (src / "ModelNet40" / "box" / "train" / "box_0001.off").read_text()
    (src / "ModelNet40" / "box" / "test" / "box_0123.off").write_text("OFF # a copy\n" + text.removeprefix("OFF"))
    prepare("--src", src, "--out", tmp_path / "out")
    with pytest.raises(InputError, match=r"^1 faults in .*:\nSample .* \(test\) is the same signal as .* \(train\)\.$"):
        verify([str(tmp_path / "out")])


def test_distances_are_those_of_the_shapes(folder: Path) -> None:
    """Closed forms. The nearest of 32,768 points is never nearer than the surface, and hardly farther."""
    split = open_split(folder, "test", device=torch.device("cpu"))
    batch = next(split.batches(batch_size=4))
    seen = observe(batch, InnerLoopConfig(steps=1, points=2000), seed=0)
    queries, found = seen.coords[:, 0].double(), seen.values[:, 0, :, 0].double()
    assert batch.coords is not None
    for label, query, distance, surface in zip(batch.labels, queries, found, batch.coords.double(), strict=True):
        if label == 0:
            # the hull of 60 points lies between the sphere and its own inscribed one
            centre_to_surface = surface.norm(dim=-1)
            assert centre_to_surface.min() > 0.85
            expected, slack = (query.norm(dim=-1) - 1).abs(), 0.15
        else:
            middle = (surface.amax(0) + surface.amin(0)) / 2  # the mean of the points is not quite the centre
            half = (surface.amax(0) - surface.amin(0)) / 2
            outside = (query - middle).abs() - half
            expected, slack = (outside.clamp(min=0).norm(dim=-1) + outside.amax(-1).clamp(max=0)).abs(), 0.07
            assert (distance > expected - 1e-3).all()
            # the points' spacing is sqrt(24 / 32768) = 0.03; farther away it matters in second order only
            assert (distance - expected)[expected > 0.3].max() < 0.01
        assert (distance - expected).abs().max() < slack


def test_a_fine_sphere() -> None:
    mesh = sphere()
    surface = torch.from_numpy(sample_surface(mesh, numbers(32768), "x"))[None]
    queries = torch.rand(1, 3000, 3, dtype=torch.float64) * 2 - 1
    from mwt.surface import distances

    expected = (queries.norm(dim=-1) - 1).abs()
    found = distances(queries, surface).double()
    # spacing of the points: sqrt(4 pi / 32768) = 0.02; far away it matters in second order only
    assert (found - expected).abs().max() < 0.04
    far = expected > 0.3
    assert (found - expected)[far].abs().max() < 0.004


def test_meshes_that_are_not_right(tmp_path: Path) -> None:
    src, out = write_tree(tmp_path), tmp_path / "out"

    def refused(message: str, *more: object) -> None:
        with pytest.raises(InputError, match=message):
            prepare("--src", src, "--out", out, *more)
        assert not out.exists()

    refused(r"--size has no meaning for modelnet40", "--size", 3)
    bad = src / "ModelNet40" / "ball" / "train" / "ball_0001.off"
    bad.write_text(bad.read_text()[:-30])
    refused(r"ball/train/ball_0001\.off (says|holds a line)", "--workers", 1)
    shutil.rmtree(src / "ModelNet40" / "box" / "test")
    refused(r"--src\) holds no test meshes of box; expected is ModelNet40/CLASS/\{train,test\}")
    shutil.rmtree(src / "ModelNet40")
    refused(r"--src\) holds no train meshes; expected is")
    (src / "ModelNet40.zip").write_bytes(b"PK")
    refused(r"ModelNet40\.zip cannot be read as a zip file")
    with pytest.raises(InputError, match=r"modelnet40 is not downloaded; get ModelNet40\.zip"):
        prepare("--out", out)


def test_training_on_shapes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it is, with the paper's augmentation. Distances are found beside the step before, by a thread that changes no
    bit: one run does without it, another reads as needed, is stopped in the middle of an epoch and resumed."""
    threads: dict[str, Counter[str]] = {}

    def train(name: str, *more: str) -> int:
        def noted(*arguments: Any, **options: Any) -> Any:
            threads.setdefault(name, Counter())[threading.current_thread().name] += 1
            return ask(*arguments, **options)

        monkeypatch.setattr("mwt.observe.ask", noted)
        return program.main([
            "--config", "configs/classify/modelnet40_mwt_l_s0001.yaml", "--debug", f"data.path={folder}",
            "data.limit=null", "data.batch_size=2", "data.monitor_split=null", "optim.epochs=2",
            f"run.dir={tmp_path / name}", *more,
        ])  # fmt: skip

    with monkeypatch.context() as patch:
        patch.setattr(program, "has_core_to_spare", lambda device: True)
        assert train("ahead") == 0
    assert "memory    about" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(program, "OuterLoop", lambda **parts: OuterLoop(**{**parts, "prepare_ahead": False}))
        assert train("at once") == 0
    with monkeypatch.context() as patch:
        add = Meter.add

        def stopping(meter: Meter, step: int, *rest: Any) -> None:
            add(meter, step, *rest)
            if step == 4:
                os.kill(os.getpid(), signal.SIGTERM)

        patch.setattr(Meter, "add", stopping)
        assert train("stopped", "data.reader=indexed") == 143
    assert last_step(tmp_path / "stopped") == 4
    assert train("stopped", "--resume", "data.reader=indexed") == 0
    for name in ("at once", "stopped"):
        assert rows(tmp_path / name) == rows(tmp_path / "ahead")
        found = tensors(tmp_path / name)
        assert all(torch.equal(value, found[key]) for key, value in tensors(tmp_path / "ahead").items())
    assert threads["ahead"] == {"prefetch": 6, "MainThread": 1}  # and that one signal is looked at before training
    assert threads["at once"] == {"MainThread": 6 + 1}
    assert modelnet40.SURFACE_POINTS == 32768
