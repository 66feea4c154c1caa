"""A small scene of spheres and boxes, ray-traced from cameras on a hemisphere, in the format of NeRF's Blender scenes.

Written: transforms_train.json, transforms_test.json (a fifth as many views, between those of train) and their pictures
(RGBA; transparent where there is nothing). Nothing is random.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image

from mwt.errors import InputError

ANGLE = 0.7
"""Horizontal field of view in radians, near that of Blender's scenes (0.69)."""
DISTANCE = 4.0
"""From the cameras to the middle."""
FINER = 3
"""Rays along each axis of a pixel."""
LIGHT = np.array([0.5, -0.3, 0.8]) / np.linalg.norm([0.5, -0.3, 0.8])
AMBIENT = 0.35


@dataclass(frozen=True)
class Sphere:
    """A ball; `stripes` bands of half the brightness lie around its vertical axis."""

    centre: tuple[float, float, float]
    radius: float
    colour: tuple[float, float, float]
    stripes: int = 0


@dataclass(frozen=True)
class Box:
    """A box along the axes."""

    centre: tuple[float, float, float]
    half: tuple[float, float, float]
    colour: tuple[float, float, float]


SCENE: tuple[Sphere | Box, ...] = (
    Box((0.0, 0.0, -0.65), (1.0, 1.0, 0.08), (0.75, 0.72, 0.65)),
    Sphere((-0.35, -0.3, -0.12), 0.45, (0.85, 0.25, 0.2), stripes=4),
    Sphere((0.5, 0.45, -0.27), 0.3, (0.2, 0.4, 0.85)),
    Box((0.5, -0.45, -0.25), (0.22, 0.28, 0.32), (0.25, 0.7, 0.35)),
    Box((-0.45, 0.55, -0.37), (0.3, 0.2, 0.2), (0.9, 0.75, 0.2)),
)


def make(out: Path, size: int, views: int) -> Path:
    """Write the scene at `size` x `size` pixels from `views` cameras, and a fifth as many to test; returns `out`.

    Raises:
        InputError: a size or a number of views that will not do.
    """
    if not 8 <= size <= 2048 or not 2 <= views <= 10_000:
        raise InputError(f"--size is {size} and --views {views}; they must lie in 8 to 2048 and 2 to 10000.")
    for split, count, shift in (("train", views, 0.5), ("test", max(1, views // 5), 0.25)):
        (out / split).mkdir(parents=True, exist_ok=True)
        frames = []
        for number, camera in enumerate(hemisphere(count, shift)):
            name = f"{split}/r_{number}"
            Image.fromarray(trace(camera, size)).save(out / f"{name}.png")
            frames.append({"file_path": f"./{name}", "transform_matrix": camera.tolist()})
        content = {"camera_angle_x": ANGLE, "frames": frames}
        (out / f"transforms_{split}.json").write_text(json.dumps(content, indent=1))
    return out


def hemisphere(count: int, shift: float) -> list[Float[np.ndarray, "4 4"]]:
    """Cameras spread evenly (a Fibonacci spiral) from 10 degrees above the ground to 80, that look at the middle."""
    low, high = math.sin(math.radians(10)), math.sin(math.radians(80))
    cameras = []
    for i in range(count):
        height = low + (high - low) * (i + shift) / count
        turn = (i + shift) * math.pi * (3 - math.sqrt(5))
        flat = math.sqrt(1 - height**2)
        cameras.append(look_at(DISTANCE * np.array([flat * math.cos(turn), flat * math.sin(turn), height])))
    return cameras


def look_at(place: Float[np.ndarray, " 3"]) -> Float[np.ndarray, "4 4"]:
    """From camera to world: x to the right, y upwards, the camera looks along -z at the middle; the world's z is up."""
    backwards = place / np.linalg.norm(place)
    right = np.cross([0.0, 0.0, 1.0], backwards)
    right /= np.linalg.norm(right)
    camera = np.eye(4)
    camera[:3] = np.stack([right, np.cross(backwards, right), backwards, place], axis=1)
    return camera


def trace(camera: Float[np.ndarray, "4 4"], size: int) -> np.ndarray:
    """A picture [size, size, 4] of bytes, each pixel the mean of its rays; colours are not multiplied by alpha."""
    fine = size * FINER
    focal = fine / 2 / math.tan(ANGLE / 2)
    line = np.arange(fine) + 0.5 - fine / 2
    y, x = np.meshgrid(-line / focal, line / focal, indexing="ij")
    directions = np.stack([x, y, -np.ones_like(x)], axis=-1) @ camera[:3, :3].T
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    colours, hit = shade(camera[:3, 3], directions.reshape(-1, 3))
    rgba = np.concatenate([colours * hit[:, None], hit[:, None]], axis=1)
    rgba = rgba.reshape(size, FINER, size, FINER, 4).mean((1, 3))
    rgba[..., :3] /= rgba[..., 3:].clip(1e-9)
    return np.round(255 * rgba.clip(0, 1)).astype(np.uint8)


def shade(origin: Float[np.ndarray, " 3"], directions: Float[np.ndarray, "R 3"]) -> tuple[np.ndarray, np.ndarray]:
    """Colours [R, 3] of the first things that rays meet (Lambert's law, one light, no shadows), and whether they do."""
    nearest = np.full(len(directions), np.inf)
    colours = np.zeros_like(directions)
    for thing in SCENE:
        far, normals, base = (
            _meet_sphere(thing, origin, directions)
            if isinstance(thing, Sphere)
            else _meet_box(thing, origin, directions)
        )
        closer = far < nearest
        nearest[closer] = far[closer]
        lit = AMBIENT + (1 - AMBIENT) * (normals[closer] @ LIGHT).clip(0)
        colours[closer] = base[closer] * lit[:, None]
    return colours, np.isfinite(nearest)


def _meet_sphere(ball: Sphere, origin: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    away = origin - np.array(ball.centre)
    half = directions @ away
    root = half**2 - (away @ away - ball.radius**2)
    far = np.where(root > 0, -half - np.sqrt(root.clip(0)), np.inf)
    met = np.where(np.isfinite(far), far, 0.0)[:, None]
    normals = (away + met * directions) / ball.radius
    base = np.broadcast_to(np.array(ball.colour), directions.shape).copy()
    if ball.stripes:
        base[np.sin(np.pi * ball.stripes * normals[:, 2]) > 0] *= 0.5
    return far, normals, base


def _meet_box(box: Box, origin: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    safe = np.where(np.abs(directions) < 1e-12, 1e-12, directions)
    one = (np.array(box.centre) - np.array(box.half) - origin) / safe
    two = (np.array(box.centre) + np.array(box.half) - origin) / safe
    enter, leave = np.minimum(one, two), np.maximum(one, two).min(1)
    axis = enter.argmax(1)
    near = enter.max(1)
    normals = np.zeros_like(directions)
    rows = np.arange(len(directions))
    normals[rows, axis] = -np.sign(directions[rows, axis])
    far = np.where((near < leave) & (near > 0), near, np.inf)
    return far, normals, np.broadcast_to(np.array(box.colour), directions.shape)
