"""A radiance field: density and colour in space, from pictures of a scene (NeRF; Mildenhall et al. 2020).

A scene is a folder in the format of NeRF's Blender scenes: transforms_train.json (or transforms.json) with
camera_angle_x and frames, each with a file_path and a transform_matrix. Directions of view are left out: what is seen
of a place is the same from everywhere, so that any field with four outputs will do.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from mwt.errors import InputError
from mwt.fields import Field, Frame
from mwt.signals.pictures import PICTURES, error_map, psnr, ssim, to_bytes, write_picture
from mwt.signals.rendering import camera_rays, composite, edges, important, ray_weights, stratified, through_cube
from mwt.signals.task import Evaluation, Task, predict

CHUNK = 1024
"""Rays at a time, when pictures are drawn."""


@dataclass(frozen=True)
class Views:
    """Pictures of a scene over the background, and the cameras that took them."""

    names: tuple[str, ...]
    pictures: Float[Tensor, "V h w 3"]
    cameras: Float[Tensor, "V 4 4"]
    angle: float


@dataclass(frozen=True)
class Scene:
    """A transforms file whose pictures have not been read."""

    path: Path
    names: tuple[str, ...]
    files: tuple[Path, ...]
    cameras: Float[Tensor, "V 4 4"]
    angle: float

    def views(self, chosen: Sequence[int], *, background: float, smaller: int) -> Views:
        """Some of the views. One picture at a time is held at its full size.

        Args:
            chosen: their numbers.
            background: what is seen through transparent pixels.
            smaller: pixels along each axis that become one, their mean.

        Raises:
            InputError: a picture that will not do, or is of another size than the first; names the frame. Sides that
                `smaller` does not divide: cameras' angle and middle are those of whole pictures.
        """
        first: torch.Size | None = None
        pictures = torch.empty(0)
        for place, number in enumerate(chosen):
            where = f"{self.path}: frame {number} ({self.names[number]})"
            picture = _over(self.files[number], background, where)
            if first is None:
                first = picture.shape
                common = math.gcd(*first[:2])
                if smaller < 1 or common % smaller:
                    divisors = ", ".join(str(number) for number in range(1, common + 1) if common % number == 0)
                    raise InputError(
                        f"signal.smaller is {smaller}, and {where} is {first[0]} x {first[1]} pixels; it must divide "
                        f"both sides: {divisors}."
                    )
                pictures = torch.empty(len(chosen), first[0] // smaller, first[1] // smaller, 3)
            if picture.shape != first:
                raise InputError(f"{where} is of another size than {self.names[chosen[0]]}.")
            if smaller > 1:
                picture = torch.nn.functional.avg_pool2d(picture.movedim(-1, 0), smaller).movedim(0, -1)
            pictures[place] = picture
        index = list(chosen)
        return Views(tuple(self.names[i] for i in index), pictures, self.cameras[index], self.angle)


def read_scene(path: Path) -> Scene:
    """The views of a transforms file, without their pictures.

    Args:
        path: JSON; file_path is relative to it, with or without an ending.

    Raises:
        InputError: a missing file or key, or a matrix that will not do; names the frame.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable as JSON ({error}).") from error
    for key in ("camera_angle_x", "frames"):
        if not isinstance(content, dict) or key not in content:
            raise InputError(f"{path}: {key} is missing.")
    angle = content["camera_angle_x"]
    if not isinstance(angle, int | float) or not 0 < angle < math.pi:
        raise InputError(f"{path}: camera_angle_x is {angle!r}; it lies between 0 and pi.")
    if not isinstance(content["frames"], list) or not content["frames"]:
        raise InputError(f"{path}: frames is no list, or empty.")
    names: list[str] = []
    files: list[Path] = []
    cameras: list[Tensor] = []
    for number, frame in enumerate(content["frames"]):
        where = f"{path}: frame {number}"
        for key in ("file_path", "transform_matrix"):
            if not isinstance(frame, dict) or key not in frame:
                raise InputError(f"{where}: {key} is missing.")
        names.append(str(frame["file_path"]))
        cameras.append(_matrix(frame["transform_matrix"], f"{where} ({names[-1]})"))
        files.append(_picture_file(path.parent, names[-1], where))
    return Scene(path, tuple(names), tuple(files), torch.stack(cameras), float(angle))


def _matrix(content: Any, where: str) -> Float[Tensor, "4 4"]:
    try:
        matrix = np.array(content, dtype=np.float32)
    except (TypeError, ValueError):
        matrix = np.empty(0, dtype=np.float32)
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all():
        raise InputError(f"{where}: transform_matrix is not 4 x 4 finite numbers.")
    return torch.from_numpy(matrix)


def _picture_file(folder: Path, name: str, where: str) -> Path:
    for path in (folder / name, *(folder / f"{name}{ending}" for ending in PICTURES if ending != ".npy")):
        if path.is_file():
            return path
    raise InputError(f"{where}: there is no picture {name} in {folder}.")


def _over(path: Path, background: float, where: str) -> Float[Tensor, "h w 3"]:
    try:
        with Image.open(path) as image:
            array = np.asarray(image.convert("RGBA"), dtype=np.float32) / 255
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise InputError(f"{where}: {path} is not an image that can be read ({error}).") from error
    return torch.from_numpy(array[..., :3] * array[..., 3:] + background * (1 - array[..., 3:]))


class RadianceTask(Task):
    """Mean squared error of rays' colours; a point is a ray. PSNR and SSIM are the means of views not fitted to.

    The field's coordinates are places divided by `bound`; outside that cube there is nothing. Of its four values the
    first is the logarithm of the density (as in Instant-NGP), per unit of the scene, the others are colours before a
    sigmoid. Rays are sampled twice: evenly, then where the first pass saw something; both samples are composited.
    """

    between = True
    metric = "psnr"
    several = False
    takes_folder = True
    endings = (".json",)

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """The scene, the rays and the views that are kept for judging."""

        bound: float = 1.5
        """The scene lies in the cube from -bound to bound."""
        near: float = 0.1
        """Nothing is nearer to a camera."""
        far: float = 100.0
        """Nothing is farther away."""
        samples: int = 32
        """Places along each ray, evenly."""
        importance: int = 32
        """Further places where these saw something; 0: one pass."""
        white: bool = True
        """Behind everything, and behind transparent pixels: white, or else black."""
        smaller: int = 1
        """Use pictures of so many times fewer pixels along each axis."""
        holdout: int = 8
        """Every so manieth view is kept for judging, where there is no transforms_test.json."""
        test_views: int | None = 4
        """Judge by so many of the views that are kept, evenly chosen; null: all."""
        orbit: int = 24
        """Pictures of the film along a circle; 0: none."""

    def __init__(self, paths: Sequence[Path], options: Options, device: torch.device) -> None:
        if options.samples < 2 or options.importance < 0 or options.bound <= 0 or not 0 <= options.near < options.far:
            raise InputError(
                "signal.samples must be at least 2, importance not negative, bound positive, and near below far."
            )
        if options.holdout < 2 or options.orbit < 0 or (options.test_views is not None and options.test_views < 1):
            raise InputError("signal.holdout must be at least 2, orbit not negative, test_views at least 1 or null.")
        self.options = options
        self.background = 1.0 if options.white else 0.0
        path = paths[0]
        self.names = ((path if path.is_dir() else path.parent).name,)
        self.fitted, self.kept = self._views(path)
        self.channels = 4
        self.frame = Frame(
            kind="radiance",
            axes=("x", "y", "z"),
            coordinate_range=((-1.0, 1.0),) * 3,
            value_range=(-1.0, 1.0),
            data_range=(-1.0, 1.0),
            meta={
                "bound": options.bound,
                "values": ["log_density", "red_logit", "green_logit", "blue_logit"],
                "background": self.background,
            },
        )
        height, width = self.fitted.pictures.shape[1:3]
        rays = [camera_rays(camera, height, width, self.fitted.angle) for camera in self.fitted.cameras]
        self.origins, self.directions = (torch.cat(part).to(device) for part in zip(*rays, strict=True))
        self.colours = self.fitted.pictures.reshape(-1, 3).to(device)

    def _views(self, path: Path) -> tuple[Views, Views]:
        """Those that are fitted, and those that are kept."""
        options = self.options
        if path.is_dir():
            found = [path / name for name in ("transforms_train.json", "transforms.json") if (path / name).is_file()]
            if not found:
                raise InputError(f"{path} holds no transforms_train.json and no transforms.json.")
            path = found[0]
        scene = other = read_scene(path)
        fitted, kept = list(range(len(scene.names))), list(range(0, len(scene.names), options.holdout))
        test = path.with_name("transforms_test.json")
        if test.is_file() and test != path:
            other = read_scene(test)
            kept = list(range(len(other.names)))
        else:
            fitted = [i for i in fitted if i % options.holdout]
        if not fitted:
            raise InputError(f"{path} has one frame; a radiance field takes several views of a scene.")
        count = min(options.test_views or len(kept), len(kept))
        kept = [kept[i * len(kept) // count] for i in range(count)]
        how: dict[str, Any] = {"background": self.background, "smaller": options.smaller}
        return scene.views(fitted, **how), other.views(kept, **how)

    @property
    def points(self) -> int:
        """Rays of all fitted views."""
        return len(self.origins)

    def colours_of(
        self, fields: Field, origins: Tensor, directions: Tensor, generator: torch.Generator | None
    ) -> Float[Tensor, "R 3"]:
        """What rays see: places at random with a generator, else the same every time."""
        options = self.options
        enter, leave = through_cube(origins, directions, options.bound, options.near, options.far)

        def ask(places: Tensor) -> tuple[Tensor, Tensor]:
            coords = (origins[:, None] + directions[:, None] * places[..., None]) / options.bound
            values = predict(fields, coords.flatten(0, 1).clamp(-1, 1))[0].unflatten(0, places.shape)
            return values[..., 0].clamp(max=10.0).exp(), values[..., 1:].sigmoid()

        places = stratified(enter, leave, options.samples, generator)
        density, colours = ask(places)
        if options.importance:
            ends = edges(places, enter, leave)
            with torch.no_grad():
                weights = ray_weights(density, ends.diff(dim=1))
                more = important(ends, weights, options.importance, generator)
            more_density, more_colours = ask(more)
            places, order = torch.cat([places, more], dim=1).sort(dim=1)
            density = torch.cat([density, more_density], dim=1).gather(1, order)
            colours = torch.cat([colours, more_colours], dim=1)
            colours = colours.gather(1, order[..., None].expand(-1, -1, 3))
        weights = ray_weights(density, edges(places, enter, leave).diff(dim=1))
        return composite(weights, colours, self.background)

    def loss(self, fields: Field, index: Int[Tensor, " P"] | None, generator: torch.Generator) -> Float[Tensor, " N"]:
        """Mean squared error over rays and colours."""
        chosen = slice(None) if index is None else index
        seen = self.colours_of(fields, self.origins[chosen], self.directions[chosen], generator)
        return (seen - self.colours[chosen]).square().mean()[None]

    @torch.no_grad()
    def draw(self, fields: Field, camera: Float[Tensor, "4 4"], like: Views) -> Float[Tensor, "h w 3"]:
        """What a camera sees, at the size and the angle of those of `like`."""
        height, width = like.pictures.shape[1:3]
        origins, directions = camera_rays(camera.to(self.origins.device), height, width, like.angle)
        training = fields.training
        fields.eval()
        try:
            parts = zip(origins.split(CHUNK), directions.split(CHUNK), strict=True)
            rays = torch.cat([self.colours_of(fields, *part, None) for part in parts])
        finally:
            fields.train(training)
        return rays.view(height, width, 3).cpu()

    def evaluate(self, fields: Field) -> Evaluation:
        """PSNR and SSIM of the views that are kept, and the first of them."""
        shown = torch.stack([self.draw(fields, camera, self.kept) for camera in self.kept.cameras])
        truth = self.kept.pictures
        metrics = {"psnr": psnr(shown.flatten(1, 2), truth.flatten(1, 2)).mean()[None]}
        if min(shown.shape[1:3]) >= 11:
            metrics["ssim"] = ssim(shown, truth).mean()[None]
        return Evaluation(metrics=metrics, picture=to_bytes(shown[0]))

    def write(self, fields: Field, folder: Path) -> list[Path]:
        """NUMBER.png, the truth, the field and the error side by side of each view that is kept, and orbit.gif."""
        files = []
        for number, (camera, truth) in enumerate(zip(self.kept.cameras, self.kept.pictures, strict=True)):
            shown = self.draw(fields, camera, self.kept)
            row = torch.cat([to_bytes(truth), to_bytes(shown), error_map(shown, truth)], dim=2)
            files.append(write_picture(folder / f"{number:03d}.png", row))
        if self.options.orbit:
            cameras = orbit(self.fitted.cameras, self.options.orbit)
            drawn = (to_bytes(self.draw(fields, camera, self.fitted)) for camera in cameras)
            first, *rest = [Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()) for picture in drawn]
            first.save(folder / "orbit.gif", save_all=True, append_images=rest, duration=80, loop=0)
            files.insert(0, folder / "orbit.gif")
        return files

    def facts(self) -> dict[str, Any]:
        """Also the views."""
        return {**super().facts(), "views": len(self.fitted.names), "judged by": list(self.kept.names)}


def orbit(cameras: Float[Tensor, "V 4 4"], count: int) -> list[Float[Tensor, "4 4"]]:
    """Cameras along a circle 30 degrees above the ground (z is up), as far from the middle as these are on average."""
    distance = float(cameras[:, :3, 3].norm(dim=-1).mean())
    found = []
    for i in range(count):
        turn, rise = 2 * math.pi * i / count, math.pi / 6
        backwards = torch.tensor([math.cos(rise) * math.cos(turn), math.cos(rise) * math.sin(turn), math.sin(rise)])
        right = torch.tensor([-math.sin(turn), math.cos(turn), 0.0])
        camera = torch.eye(4)
        camera[:3] = torch.stack([right, torch.linalg.cross(backwards, right), backwards, backwards * distance], dim=1)
        found.append(camera)
    return found
