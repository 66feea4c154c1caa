"""Triangle meshes: files, distances to them, what lies inside, pictures of them; shared by tasks that see shapes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from matplotlib import colormaps
from scipy.spatial import cKDTree
from torch import Tensor

from mwt.errors import InputError

MESHES = (".obj", ".ply", ".stl", ".off")
"""Endings that `read_mesh` takes."""
NEIGHBOURS = 8
PAIRS = 2**19
"""Pairs of a point and a triangle that are held at a time."""


@dataclass(frozen=True)
class Mesh:
    """Corners of triangles, counter-clockwise from outside where the mesh is closed."""

    vertices: Float[np.ndarray, "V 3"]
    triangles: Int[np.ndarray, "T 3"]
    watertight: bool = False
    """Whether every edge has exactly two triangles, which turn the same way."""

    @property
    def corners(self) -> Float[np.ndarray, "T 3 3"]:
        """Coordinates of each triangle's three corners."""
        return self.vertices[self.triangles]

    @property
    def crosses(self) -> Float[np.ndarray, "T 3"]:
        """Normals of twice the triangle's area in length."""
        a, b, c = self.corners.swapaxes(0, 1)
        return np.cross(b - a, c - a)

    @property
    def normals(self) -> Float[np.ndarray, "T 3"]:
        """Unit normals; of a triangle without area, nothing in particular."""
        crosses = self.crosses
        return crosses / np.linalg.norm(crosses, axis=1, keepdims=True).clip(1e-30)


def trimesh_library() -> Any:
    """The library that reads meshes.

    Raises:
        InputError: it is not installed.
    """
    try:
        import trimesh
    except ImportError as error:
        raise InputError(
            "task=shape reads meshes through trimesh: pip install 'meta-weight-transformer[shapes]'."
        ) from error
    return trimesh


def read_mesh(path: Path) -> Mesh:
    """An OBJ, PLY, STL or OFF file; vertices at one place are one, and a closed mesh is turned outside out.

    Raises:
        InputError: no such file, not a mesh, no triangles, vertices that are not finite, or no area.
    """
    library = trimesh_library()
    if not path.is_file():
        raise InputError(f"There is no file {path}.")
    try:
        found = library.load(path, force="mesh", process=True)
    except Exception as error:  # loaders raise many kinds
        raise InputError(f"{path} is not a mesh that can be read ({error}).") from error
    if not isinstance(found, library.Trimesh) or len(found.faces) == 0:
        raise InputError(f"{path} holds no triangles; a shape needs a surface, not points alone.")
    found.merge_vertices(merge_tex=True, merge_norm=True)
    if not np.isfinite(found.vertices).all():
        raise InputError(f"{path} holds a vertex that is not three finite numbers.")
    watertight = bool(found.is_watertight and found.is_winding_consistent)
    if watertight and found.volume < 0:
        found.invert()
    mesh = Mesh(np.asarray(found.vertices, dtype=np.float64), np.asarray(found.faces, dtype=np.int64), watertight)
    if not np.linalg.norm(mesh.crosses, axis=1).sum() > 0:
        raise InputError(f"{path} has no triangle with an area: its vertices lie on a line or at one place.")
    return mesh


def write_mesh(path: Path, mesh: Mesh) -> Path:
    """Write a mesh in the format of its ending."""
    trimesh_library().Trimesh(mesh.vertices, mesh.triangles, process=False).export(path)
    return path


@dataclass(frozen=True)
class Placement:
    """Where a mesh lies in the cube: a place in the file is centre + scale * one in the cube."""

    centre: Float[np.ndarray, " 3"]
    scale: float

    @classmethod
    def within(cls, mesh: Mesh, reach: float) -> Placement:
        """That in which the longest side of the mesh's box runs from -reach to reach, and the middle is 0."""
        low, high = mesh.vertices.min(0), mesh.vertices.max(0)
        return cls((low + high) / 2, float((high - low).max()) / (2 * reach))

    def to_cube(self, mesh: Mesh) -> Mesh:
        """A mesh of the file, in the cube."""
        return Mesh((mesh.vertices - self.centre) / self.scale, mesh.triangles, mesh.watertight)

    def to_file(self, mesh: Mesh) -> Mesh:
        """The inverse."""
        return Mesh(mesh.vertices * self.scale + self.centre, mesh.triangles, mesh.watertight)


def sample_surface(
    mesh: Mesh, count: int, rng: np.random.Generator
) -> tuple[Float[np.ndarray, "count 3"], Int[np.ndarray, " count"]]:
    """Points spread evenly over the surface (Osada et al. 2002, eq. 1), and the triangles that they lie in."""
    areas = np.linalg.norm(mesh.crosses, axis=1)
    chosen = rng.choice(len(areas), count, p=areas / areas.sum())
    a, b, c = mesh.corners[chosen].swapaxes(0, 1)
    root, along = np.sqrt(rng.random((count, 1))), rng.random((count, 1))
    return (1 - root) * a + root * (1 - along) * b + root * along * c, chosen


class Nearest:
    """Distances to a mesh: those to the triangles of the nearest of many points on it, the least of them.

    The triangles are the right ones but for ties: with points `d` apart, an error is below d^2 over twice the distance.
    """

    def __init__(self, mesh: Mesh, rng: np.random.Generator) -> None:
        points, self.owners = sample_surface(mesh, max(50_000, 8 * len(mesh.triangles)), rng)
        self.tree = cKDTree(points)
        self.corners = mesh.corners

    def __call__(self, points: Float[np.ndarray, "P 3"]) -> Float[np.ndarray, " P"]:
        """Euclidean distances, without a sign."""
        from trimesh.triangles import closest_point

        result = np.empty(len(points))
        for start in range(0, len(points), PAIRS // NEIGHBOURS):
            asked = points[start : start + PAIRS // NEIGHBOURS]
            owners = self.owners[self.tree.query(asked, NEIGHBOURS)[1]]  # [P, K]
            many = np.repeat(asked, NEIGHBOURS, axis=0)
            away = np.linalg.norm(closest_point(self.corners[owners.ravel()], many) - many, axis=1)
            result[start : start + len(asked)] = away.reshape(-1, NEIGHBOURS).min(1)
        return result


def crossings(
    mesh: Mesh, points: Float[np.ndarray, "P 3"], axis: int
) -> Iterator[tuple[Int[np.ndarray, " H"], Int[np.ndarray, " H"], Float[np.ndarray, " H"]]]:
    """Where the lines through points, along an axis, go through the mesh: points, triangles, heights along the axis.

    Triangles are found through a table of cells across the axis. A line belongs to one of two triangles at an edge
    that they share (the edge is always computed from its lower end), so that those through a closed mesh cross it an
    even number of times.
    """
    across = [other for other in range(3) if other != axis]
    flat = mesh.corners[:, :, across]  # [T, 3, 2]
    low, high = flat.min((0, 1)), flat.max((0, 1))
    side = int(np.clip(2 * np.sqrt(len(flat)), 1, 256))
    cell = (high - low).clip(1e-30) / side

    def place(where: np.ndarray) -> np.ndarray:
        return ((where - low) / cell).astype(np.int64).clip(0, side - 1)

    first, last = place(flat.min(1)), place(flat.max(1))
    spans = last - first + 1
    owners, within = _repeated(spans.prod(1))
    cells = first[owners] + np.stack([within // spans[owners, 1], within % spans[owners, 1]], axis=1)
    numbers = cells[:, 0] * side + cells[:, 1]
    order = np.argsort(numbers, kind="stable")
    owners, starts = owners[order], np.searchsorted(numbers[order], np.arange(side * side + 1))
    normals, anchors = mesh.crosses, mesh.corners[:, 0]
    inside = ((points[:, across] >= low) & (points[:, across] <= high)).all(1).nonzero()[0]
    table = place(points[inside][:, across]) @ np.array([side, 1])
    counts = starts[table + 1] - starts[table]
    for part in np.array_split(np.arange(len(inside)), max(1, -(-int(counts.sum()) // PAIRS))):
        which, offset = _repeated(counts[part])
        asked = inside[part[which]]
        triangles = owners[starts[table[part[which]]] + offset]
        hit = _contains(flat[triangles], points[asked][:, across])
        asked, triangles = asked[hit], triangles[hit]
        normal, anchor = normals[triangles], anchors[triangles]
        slope = normal[:, across] / np.where(normal[:, axis] == 0, 1e-30, normal[:, axis])[:, None]
        heights = anchor[:, axis] - (slope * (points[asked] - anchor)[:, across]).sum(1)
        yield asked, triangles, heights


def _repeated(counts: Int[np.ndarray, " N"]) -> tuple[Int[np.ndarray, " M"], Int[np.ndarray, " M"]]:
    """(0, 0, 1, 1, 1, ...) and (0, 1, 0, 1, 2, ...) for counts (2, 3, ...)."""
    which = np.repeat(np.arange(len(counts)), counts)
    return which, np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)


def _contains(corners: Float[np.ndarray, "M 3 2"], points: Float[np.ndarray, "M 2"]) -> Bool[np.ndarray, " M"]:
    """Whether each point lies in its triangle of the plane: a half-line to the right crosses one edge."""
    hit = np.zeros(len(points), dtype=bool)
    x, y = points.T
    for i, j in ((0, 1), (1, 2), (2, 0)):
        a, b = corners[:, i], corners[:, j]
        lower = np.where((a[:, 1] < b[:, 1])[:, None], a, b)
        upper = np.where((a[:, 1] < b[:, 1])[:, None], b, a)
        straddles = (lower[:, 1] > y) != (upper[:, 1] > y)
        rise = np.where(straddles, upper[:, 1] - lower[:, 1], 1.0)
        hit ^= straddles & (x < lower[:, 0] + (y - lower[:, 1]) * ((upper[:, 0] - lower[:, 0]) / rise))
    return hit


def contains(mesh: Mesh, points: Float[np.ndarray, "P 3"]) -> Bool[np.ndarray, " P"]:
    """Whether points lie inside: lines along two of the three axes cross the mesh above them an odd number of times.

    Exact for a closed mesh, but for rounding; the vote mends most of what a small hole does (Nooruddin and Turk 2003).
    """
    votes = np.zeros(len(points), dtype=np.int64)
    for axis in range(3):
        above = np.zeros(len(points), dtype=np.int64)
        for asked, _, heights in crossings(mesh, points, axis):
            above += np.bincount(asked[heights > points[asked, axis]], minlength=len(points))
        votes += above % 2
    return votes >= 2


def marching_cubes(inwards: Float[np.ndarray, "g g g"]) -> Mesh | None:
    """The surface where numbers on a grid over [-1, 1]^3, positive inside, are 0; None where there is none.

    Raises:
        InputError: scikit-image is not installed.
    """
    try:
        from skimage.measure import marching_cubes as extract
    except ImportError as error:
        raise InputError(
            "task=shape finds surfaces through scikit-image: pip install 'meta-weight-transformer[shapes]'."
        ) from error
    if not inwards.min() < 0 < inwards.max():
        return None
    vertices, triangles, _, _ = extract(inwards, 0.0, gradient_direction="ascent")  # turned outwards
    mesh = Mesh(vertices * (2 / (np.array(inwards.shape) - 1)) - 1, triangles.astype(np.int64))
    return mesh if np.linalg.norm(mesh.crosses, axis=1).sum() > 0 else None


LIGHT = np.array([0.4, 0.5, 0.77]) / np.linalg.norm([0.4, 0.5, 0.77])


def _seen(mesh: Mesh | None, size: int) -> Int[np.ndarray, " P"]:
    """The triangle at each pixel of [-1, 1]^2 from far along z, x to the right, y upwards; -1 where there is none."""
    picture = np.full(size * size, -1)
    if mesh is not None:
        line = (2 * np.arange(size) + 1) / size - 1
        y, x = np.meshgrid(-line, line, indexing="ij")
        points = np.stack([x.ravel(), y.ravel(), np.zeros(size * size)], axis=1)
        for asked, triangles, heights in crossings(mesh, points, 2):
            order = np.argsort(heights)  # the highest on a line, which comes in one part, is assigned last
            picture[asked[order]] = triangles[order]
    return picture


def render(mesh: Mesh | None, size: int) -> Float[Tensor, "size size 1"]:
    """A picture from far along z, each triangle lit by its slope, on white."""
    seen, picture = _seen(mesh, size), np.ones(size * size)
    if mesh is not None:
        normals = mesh.normals[seen[seen >= 0]]
        normals *= np.where(normals[:, 2:] < 0, -1.0, 1.0)
        picture[seen >= 0] = 0.2 + 0.7 * (normals @ LIGHT).clip(0)
    return torch.from_numpy(picture).float().view(size, size, 1)


def render_distances(mesh: Mesh | None, other: Mesh | None, size: int, most: float) -> Float[Tensor, "size size 3"]:
    """The picture of `render`, each triangle coloured by how far its middle lies from `other`.

    Black at 0 to yellow at `most` and more, or where there is no other (matplotlib's inferno), on white.
    """
    seen, picture = _seen(mesh, size), np.ones((size * size, 3))
    if mesh is not None:
        shown, places = np.unique(seen[seen >= 0], return_inverse=True)
        far = np.full(len(shown), most)
        if other is not None and len(shown):
            far = Nearest(other, np.random.default_rng(0))(mesh.corners[shown].mean(1))
        picture[seen >= 0] = colormaps["inferno"]((far / most).clip(0, 1))[places, :3]
    return torch.from_numpy(picture).float().view(size, size, 3)
