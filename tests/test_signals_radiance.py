"""Rays, compositing and sampling against closed forms and loops; scenes; a fit of the synthetic one."""

from __future__ import annotations

import json
import math
import shutil
import weakref
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from data_pipes.prepare import synthetic_scene
from data_pipes.prepare.__main__ import main as prepare
from mwt.errors import InputError
from mwt.fields import Field
from mwt.signals import radiance
from mwt.signals.radiance import RadianceTask, orbit
from mwt.signals.rendering import (
    camera_rays,
    composite,
    edges,
    important,
    ray_weights,
    stratified,
    through_cube,
)
from train.fit import main

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("radiance") / "scene"
    prepare(["synthetic_scene", "--out", str(path), "--size", "16", "--views", "10"])
    return path


@pytest.fixture
def scene(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "scene"))


# ---- rays ------------------------------------------------------------------------------------------------------------


def test_rays_of_a_camera_that_is_not_turned() -> None:
    """At (1, 2, 3), looking along -z, 90 degrees wide: focal length is half the width."""
    camera = torch.eye(4, dtype=torch.float64)
    camera[:3, 3] = torch.tensor([1.0, 2.0, 3.0])
    origins, directions = camera_rays(camera, 2, 4, math.pi / 2)
    assert torch.equal(origins, torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64).expand(8, 3))
    first = np.array([-1.5 / 2, 0.5 / 2, -1.0])  # the upper left pixel's middle
    np.testing.assert_allclose(directions[0].numpy(), first / np.linalg.norm(first))
    last = np.array([1.5 / 2, -0.5 / 2, -1.0])
    np.testing.assert_allclose(directions[-1].numpy(), last / np.linalg.norm(last))


def test_a_turned_camera_sees_a_point_where_it_projects() -> None:
    """Projection of a point by the inverse matrix gives the pixel whose ray runs through the point."""
    camera = torch.from_numpy(synthetic_scene.look_at(np.array([2.0, -3.0, 1.5])))
    point = torch.tensor([0.3, 0.2, -0.4, 1.0], dtype=torch.float64)
    x, y, z, _ = torch.linalg.inv(camera) @ point
    focal = 50 / math.tan(0.35)
    column, row = 50 + focal * x / -z - 0.5, 50 - focal * y / -z - 0.5
    origins, directions = camera_rays(camera, 100, 100, 0.7)
    wanted = (point[:3] - camera[:3, 3]) / (point[:3] - camera[:3, 3]).norm()
    nearest = int((directions @ wanted).argmax())
    assert abs(nearest // 100 - float(row)) < 0.51
    assert abs(nearest % 100 - float(column)) < 0.51
    assert torch.equal(origins[0], camera[:3, 3])


def test_where_rays_cross_the_cube() -> None:
    origins = torch.tensor([[0.0, 0.0, 5.0], [0.0, 0.0, 5.0], [0.0, 0.0, 0.0], [3.0, 3.0, 0.0]])
    directions = torch.tensor([[0.0, 0.0, -1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [-(0.5**0.5), -(0.5**0.5), 0.0]])
    enter, leave = through_cube(origins, directions, 1.5, 0.1, 100.0)
    torch.testing.assert_close(enter[[0, 2, 3]], torch.tensor([3.5, 0.1, 1.5 * 2**0.5]))
    torch.testing.assert_close(leave[[0, 2, 3]], torch.tensor([6.5, 1.5, 4.5 * 2**0.5]))
    assert enter[1] == leave[1]  # it misses


# ---- compositing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("random", [True, False])
def test_a_homogeneous_medium(random: bool) -> None:
    """Beer and Lambert: opacity 1 - exp(-density x length), whatever the places."""
    generator = torch.Generator().manual_seed(0) if random else None
    enter, leave = torch.tensor([0.5, 1.0]).double(), torch.tensor([2.5, 4.0]).double()
    places = stratified(enter, leave, 7, generator)
    lengths = edges(places, enter, leave).diff(dim=1)
    torch.testing.assert_close(lengths.sum(1), leave - enter)
    weights = ray_weights(torch.full_like(places, 0.8), lengths)
    opacity = 1 - (-0.8 * (leave - enter)).exp()
    torch.testing.assert_close(weights.sum(1), opacity)
    seen = composite(weights, torch.tensor([0.2, 0.4, 0.6]).double().expand(2, 7, 3), 1.0)
    expected = opacity[:, None] * torch.tensor([0.2, 0.4, 0.6]).double() + (1 - opacity[:, None])
    torch.testing.assert_close(seen, expected)


def test_compositing_against_loops() -> None:
    rng = np.random.default_rng(0)
    density, lengths, colours = rng.exponential(2, (5, 9)), rng.random((5, 9)), rng.random((5, 9, 3))
    expected = np.zeros((5, 3))
    for r in range(5):
        through = 1.0
        for s in range(9):
            alpha = 1 - math.exp(-density[r, s] * lengths[r, s])
            expected[r] += through * alpha * colours[r, s]
            through *= 1 - alpha
        expected[r] += through * 0.25
    weights = ray_weights(torch.from_numpy(density), torch.from_numpy(lengths))
    np.testing.assert_allclose(composite(weights, torch.from_numpy(colours), 0.25).numpy(), expected, rtol=1e-12)


def test_places_fall_where_the_weights_are() -> None:
    """Shares of places in each piece are the weights' shares; without a generator they are the quantiles."""
    ends = torch.tensor([[0.0, 1.0, 2.0, 4.0]])
    weights = torch.tensor([[0.1, 0.6, 0.3]])
    places = important(ends, weights, 2000, torch.Generator().manual_seed(0))
    found = torch.histogram(places[0], ends[0]).hist / 2000
    torch.testing.assert_close(found, weights[0], atol=2e-3, rtol=0)
    even = important(ends, torch.zeros(1, 3), 6, None)  # nothing seen: equally many in each piece
    torch.testing.assert_close(even, torch.tensor([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5]]))


class Rainbow(Field):
    """Fog whose colours are its places."""

    def __init__(self) -> None:
        super().__init__(coordinate_dims=3, channels=4, copies=None, derivatives=0)

    def values(self, coords: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.full_like(coords[..., :1], 1.0), 4 * coords], -1)


class Fog(Field):
    """One density and one colour everywhere."""

    def __init__(self, density: float) -> None:
        super().__init__(coordinate_dims=3, channels=4, copies=None, derivatives=0)
        self.density = density

    def values(self, coords: torch.Tensor) -> torch.Tensor:
        return torch.tensor([math.log(self.density), 0.0, 0.0, 0.0]).expand(*coords.shape[:-1], 4)


def test_fog_looks_as_the_law_says(scene: Path) -> None:
    """The whole path through the task, both passes: half grey over white, by the ray's way through the cube."""
    task = RadianceTask([scene], RadianceTask.Options(bound=1.0, samples=8, importance=8), CPU)
    enter, leave = through_cube(task.origins, task.directions, 1.0, 0.1, 100.0)
    expected = 1 - 0.5 * (1 - (-0.7 * (leave - enter)).exp())
    for generator in (None, torch.Generator().manual_seed(0)):
        seen = task.colours_of(Fog(0.7), task.origins, task.directions, generator)
        torch.testing.assert_close(seen, expected[:, None].expand(-1, 3), atol=1e-5, rtol=1e-5)
    assert (expected == 1).any()
    assert expected.min() < 0.7


# ---- scenes ----------------------------------------------------------------------------------------------------------


def test_the_scene_is_where_the_cameras_say(scene: Path) -> None:
    """A ray through a pixel of the red ball meets the ball; the format is NeRF's, with transparent pixels."""
    content = json.loads((scene / "transforms_train.json").read_text())
    assert len(content["frames"]) == 10
    assert len(json.loads((scene / "transforms_test.json").read_text())["frames"]) == 2
    ball = synthetic_scene.SCENE[1]
    for frame in content["frames"]:
        array = np.asarray(Image.open(scene / f"{frame['file_path']}.png")).astype(float)
        assert array.shape == (16, 16, 4)
        camera = torch.tensor(frame["transform_matrix"], dtype=torch.float64)
        origins, directions = camera_rays(camera, 16, 16, content["camera_angle_x"])
        r, g, b, alpha = array.reshape(-1, 4).T
        red = (r > 2.5 * b) & (r > 3 * g) & (alpha == 255)
        away = torch.tensor(ball.centre, dtype=torch.float64) - origins
        miss = torch.linalg.cross(directions, away).norm(dim=-1).numpy()
        assert red.any()
        assert (miss[red] < ball.radius + 0.1).all()
        assert (alpha[miss > 2.2] == 0).all()


def test_transparent_pixels_are_white(scene: Path) -> None:
    task = RadianceTask([scene], RadianceTask.Options(), CPU)
    content = json.loads((scene / "transforms_train.json").read_text())
    name = content["frames"][3]["file_path"]
    rgba = np.asarray(Image.open(scene / f"{name}.png")).astype(float) / 255
    np.testing.assert_allclose(
        task.colours.view(10, 16, 16, 3)[3].numpy(), rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:], atol=1e-6
    )
    black = RadianceTask([scene], RadianceTask.Options(white=False, smaller=2), CPU)
    assert black.fitted.pictures.shape == (10, 8, 8, 3)
    assert float(black.colours.min()) == 0


def test_views_are_kept_for_judging(scene: Path) -> None:
    (scene / "transforms_test.json").unlink()
    task = RadianceTask([scene], RadianceTask.Options(holdout=4, test_views=None), CPU)
    assert task.kept.names == ("./train/r_0", "./train/r_4", "./train/r_8")
    assert len(task.fitted.names) == 7
    assert not set(task.kept.names) & set(task.fitted.names)


def resized(scene: Path, split: str, size: int, angle: float) -> None:
    """Give a split's pictures another size and its cameras another angle."""
    path = scene / f"transforms_{split}.json"
    content = json.loads(path.read_text())
    for frame in content["frames"]:
        picture = scene / f"{frame['file_path']}.png"
        Image.open(picture).resize((size, size - 4)).save(picture)
    path.write_text(json.dumps({**content, "camera_angle_x": angle}))


def test_views_that_judge_have_a_size_and_an_angle_of_their_own(scene: Path) -> None:
    """Fog as these cameras see it: the law along their rays, at their size."""
    resized(scene, "test", 24, 1.1)
    task = RadianceTask([scene], RadianceTask.Options(bound=1.0, samples=8, importance=8), CPU)
    camera = task.kept.cameras[0]
    origins, directions = camera_rays(camera, 20, 24, 1.1)
    enter, leave = through_cube(origins, directions, 1.0, 0.1, 100.0)
    expected = (1 - 0.5 * (1 - (-0.7 * (leave - enter)).exp())).view(20, 24, 1).expand(-1, -1, 3)
    torch.testing.assert_close(task.draw(Fog(0.7), camera, task.kept), expected, atol=1e-5, rtol=1e-5)
    assert set(task.evaluate(Fog(0.7)).metrics) == {"psnr", "ssim"}
    task.write(Fog(0.7), scene)
    with Image.open(scene / "000.png") as row, Image.open(scene / "orbit.gif") as film:
        assert row.size == (72, 20)
        assert film.size == (16, 16)


def test_smaller_pictures_are_of_whole_ones(scene: Path) -> None:
    """What is left over would be cut off, and rays would run beside what they saw."""
    with pytest.raises(InputError, match=r"frame 0 \(./train/r_0\) is 16 x 16 pixels; .*both sides: 1, 2, 4, 8, 16\."):
        RadianceTask([scene], RadianceTask.Options(smaller=3), CPU)
    resized(scene, "test", 24, 1.1)
    with pytest.raises(InputError, match=r"smaller is 8, and .*test/r_0\) is 20 x 24 pixels; .*both sides: 1, 2, 4\."):
        RadianceTask([scene], RadianceTask.Options(smaller=8), CPU)
    assert RadianceTask([scene], RadianceTask.Options(smaller=4), CPU).kept.pictures.shape == (2, 5, 6, 3)


def test_only_views_that_are_used_are_read_one_at_a_time(scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than one picture is held at its full size."""
    original, read, held = radiance._over, list[Path](), list[weakref.ref[torch.Tensor]]()

    def watched(path: Path, background: float, where: str) -> torch.Tensor:
        assert sum(reference() is not None for reference in held) <= 1
        picture = original(path, background, where)
        read.append(path)
        held.append(weakref.ref(picture))
        return picture

    monkeypatch.setattr(radiance, "_over", watched)
    task = RadianceTask([scene], RadianceTask.Options(smaller=2, test_views=1), CPU)
    assert sum(path.parent.name == "test" for path in read) == 1
    assert len(read) == 11
    rgba = np.asarray(Image.open(scene / "train/r_3.png")).astype(float) / 255
    whole = rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:]
    np.testing.assert_allclose(task.fitted.pictures[3].numpy(), whole.reshape(8, 2, 8, 2, 3).mean((1, 3)), atol=1e-6)
    (scene / "transforms_test.json").unlink()
    read.clear()
    RadianceTask([scene], RadianceTask.Options(holdout=4, test_views=1), CPU)
    assert len(read) == 8  # seven that are fitted, and one of three that are kept


def test_a_circle_of_cameras() -> None:
    cameras = orbit(torch.from_numpy(np.stack(synthetic_scene.hemisphere(5, 0.5))).float(), 8)
    for camera in cameras:
        torch.testing.assert_close(camera[:3, :3] @ camera[:3, :3].mT, torch.eye(3), atol=1e-6, rtol=0)
        assert float(torch.linalg.det(camera[:3, :3])) == pytest.approx(1)
        torch.testing.assert_close(camera[:3, 2] * 4, camera[:3, 3])  # it looks at the middle
        assert float(camera[2, 1]) > 0  # upright


def test_the_film_shows_the_scene_from_several_sides(scene: Path) -> None:
    task = RadianceTask([scene], RadianceTask.Options(samples=8, importance=0, orbit=3, test_views=1), CPU)
    assert scene / "orbit.gif" in task.write(Rainbow(), scene)
    with Image.open(scene / "orbit.gif") as film:
        frames = [np.asarray(frame.convert("RGB")).astype(int) for frame in ImageSequence.Iterator(film)]
    assert len(frames) == 3
    for one, other in combinations(frames, 2):
        assert np.abs(one - other).mean() > 5


def test_the_program_leaves_views_and_a_film(scene: Path) -> None:
    out = scene / "run"
    arguments = ["--debug", "task=radiance", f"signal.path={scene}", f"run.dir={out}", "signal.samples=4",
                 "signal.importance=4", "signal.orbit=3", "signal.test_views=1"]  # fmt: skip
    assert main(arguments) == 0
    found = json.loads((out / "result.json").read_text())
    assert set(found["final"]) == {"psnr", "ssim"}
    assert found["signal"]["judged by"] == ["./test/r_0"]
    assert (out / "reconstruction/orbit.gif").is_file()
    with Image.open(out / "reconstruction/000.png") as row:
        assert row.size == (48, 16)


def test_a_short_fit_beats_the_mean_colour(scene: Path) -> None:
    """Views that it has not seen, better by 3 dB than the best single colour for each of them."""
    arguments = ["task=radiance", f"signal.path={scene}", f"run.dir={scene / 'run'}", "signal.samples=16",
                 "signal.importance=8", "signal.orbit=0", "run.device=cpu", "run.film=false", "run.evaluations=1",
                 "field.name=hash_grid", "field.hash_grid.levels=4", "field.hash_grid.base_resolution=[4]",
                 "field.hash_grid.finest_resolution=[16]", "field.hash_grid.decoder.width=16", "optim.steps=80",
                 "optim.points=256", "optim.lr=0.02"]  # fmt: skip
    assert main(arguments) == 0
    found = json.loads((scene / "run/result.json").read_text())["final"]["psnr"]
    truth = RadianceTask([scene], RadianceTask.Options(), CPU).kept.pictures.flatten(1, 2)
    flat = -10 * (truth - truth.mean(1, keepdim=True)).square().mean((1, 2)).log10()
    assert found > float(flat.mean()) + 3


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("no picture", r"frame 2: there is no picture ./train/r_2"),
        ("no key", r"frame 2: transform_matrix is missing"),
        ("matrix", r"frame 2 \(./train/r_2\): transform_matrix is not 4 x 4"),
        ("angle", r"camera_angle_x is missing"),
        ("text", r"transforms_train.json is not readable as JSON"),
        ("size", r"frame 2 \(./train/r_2\) is of another size than ./train/r_0"),
        ("no image", r"frame 2 \(./train/r_2\): .*r_2.png is not an image"),
        ("no file", r"holds no transforms_train.json and no transforms.json"),
        ("empty", r"frames is no list, or empty"),
    ],
)
def test_bad_scenes_get_a_sentence(scene: Path, spoil: str, message: str) -> None:
    path = scene / "transforms_train.json"
    content = json.loads(path.read_text())
    if spoil == "no picture":
        (scene / "train/r_2.png").unlink()
    elif spoil == "no key":
        del content["frames"][2]["transform_matrix"]
    elif spoil == "matrix":
        content["frames"][2]["transform_matrix"] = [[1, 2], [3]]
    elif spoil == "angle":
        del content["camera_angle_x"]
    elif spoil == "size":
        Image.new("RGBA", (5, 5)).save(scene / "train/r_2.png")
    elif spoil == "no image":
        (scene / "train/r_2.png").write_text("no image")
    elif spoil == "empty":
        content["frames"] = []
    path.write_text("{" if spoil == "text" else json.dumps(content))
    if spoil == "no file":
        path.unlink()
    with pytest.raises(InputError, match=message):
        main(["--debug", "task=radiance", f"signal.path={scene}", f"run.dir={scene / 'run'}"])


def test_bad_arguments_of_the_scene(tmp_path: Path) -> None:
    for arguments, message in (
        (["--views", "1"], "2 to 10000"),
        (["--size", "4"], "8 to 2048"),
        (["--size", "8x9"], "square"),
    ):
        with pytest.raises(InputError, match=message):
            prepare(["synthetic_scene", "--out", str(tmp_path / "out"), *arguments])
