"""Triangle meshes: files, what lies inside, pictures of them; shared by tasks that see shapes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from matplotlib import colormaps
from torch import Tensor

from mwt.errors import InputError
from mwt.signals.nearest import Nearest

MESHES = (".obj", ".ply", ".stl", ".off")
"""Endings that `read_mesh` takes."""
PAIRS = 2**16
"""Pairs of a point and a triangle that are worked on at a time."""


@dataclass(frozen=True)
class Mesh:
    """Corners of triangles, counter-clockwise from outside where the mesh is closed.

    A closed mesh may have several bodies: outside is where they wind about a point 0 times in all (`contains`).
    """

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
    """An OBJ, PLY, STL or OFF file; vertices at one place are one, and bodies of a closed mesh are turned (`_turned`).

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
    mesh = Mesh(np.asarray(found.vertices, dtype=np.float64), np.asarray(found.faces, dtype=np.int64), watertight)
    if watertight:
        mesh = _turned(
            mesh, library.graph.connected_component_labels(found.face_adjacency, node_count=len(found.faces))
        )
    if not np.linalg.norm(mesh.crosses, axis=1).sum() > 0:
        raise InputError(f"{path} has no triangle with an area: its vertices lie on a line or at one place.")
    return mesh


def _turned(mesh: Mesh, bodies: Int[np.ndarray, " T"]) -> Mesh:
    """A closed mesh whose bodies (numbers of triangles that share edges) are turned by how they lie in each other.

    A body within no other is turned outwards, one within one other (all of its vertices are) inwards: it is a cavity.
    One within two is outwards again, and so on. How the file turns them counts for nothing, since files do it at will:
    two balls, one in the other, are a hollow ball, whichever way they face. Bodies that overlap lie outside each other.
    """
    count = int(bodies.max()) + 1
    firsts = np.unique(bodies, return_index=True)[1]
    corners = mesh.corners
    heights = ((corners[:, 0] - corners[firsts, 0][bodies]) * mesh.crosses).sum(1)
    outwards = np.bincount(bodies, heights) > 0  # the volume's sign
    order = np.argsort(bodies, kind="stable")
    parts = np.split(mesh.triangles[order], np.cumsum(np.bincount(bodies))[:-1])
    places = [mesh.vertices[np.unique(part)] for part in parts]
    low, high = (np.stack([end(place, axis=0) for place in places]) for end in (np.min, np.max))
    around = np.zeros(count, dtype=np.int64)
    for body, part in enumerate(parts):
        within = ((low > low[body]) & (high < high[body])).all(1).nonzero()[0]
        if len(within):
            inside = contains(Mesh(mesh.vertices, part, watertight=True), np.concatenate([places[i] for i in within]))
            sizes = [len(places[i]) for i in within]
            around[within] += np.logical_and.reduceat(inside, np.cumsum([0, *sizes[:-1]]))
    wrong = outwards != (around % 2 == 0)
    triangles = np.where(wrong[bodies][:, None], mesh.triangles[:, ::-1], mesh.triangles)
    return Mesh(mesh.vertices, triangles, mesh.watertight)


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


def crossings(
    mesh: Mesh, points: Float[np.ndarray, "P 3"], axis: int
) -> Iterator[tuple[Int[np.ndarray, " H"], Int[np.ndarray, " H"], Float[np.ndarray, " H"], Int[np.ndarray, " H"]]]:
    """Where the lines through points, along an axis, go through the mesh: points, triangles, heights along the axis.

    And 1 or -1, which differ between lines that enter and that leave. Triangles are found through a table of cells
    across the axis. A line belongs to one of two triangles at an edge that they share (the edge is always computed from
    its lower end), so that those through a closed mesh cross it an even number of times, and the signs sum to 0.
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
        turns = _turns(flat[triangles], points[asked][:, across])
        hit = turns != 0
        asked, triangles = asked[hit], triangles[hit]
        normal, anchor = normals[triangles], anchors[triangles]
        slope = normal[:, across] / np.where(normal[:, axis] == 0, 1e-30, normal[:, axis])[:, None]
        heights = anchor[:, axis] - (slope * (points[asked] - anchor)[:, across]).sum(1)
        yield asked, triangles, heights, turns[hit]


def _repeated(counts: Int[np.ndarray, " N"]) -> tuple[Int[np.ndarray, " M"], Int[np.ndarray, " M"]]:
    """(0, 0, 1, 1, 1, ...) and (0, 1, 0, 1, 2, ...) for counts (2, 3, ...)."""
    which = np.repeat(np.arange(len(counts)), counts)
    return which, np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)


def _turns(corners: Float[np.ndarray, "M 3 2"], points: Float[np.ndarray, "M 2"]) -> Int[np.ndarray, " M"]:
    """How often each triangle of the plane winds about its point, counter-clockwise: -1, 0 or 1.

    Of the edges that a half-line to the right crosses, those that go up, less those that go down.
    """
    turns = np.zeros(len(points), dtype=np.int64)
    x, y = points.T
    for i, j in ((0, 1), (1, 2), (2, 0)):
        a, b = corners[:, i], corners[:, j]
        lower = np.where((a[:, 1] < b[:, 1])[:, None], a, b)
        upper = np.where((a[:, 1] < b[:, 1])[:, None], b, a)
        straddles = (lower[:, 1] > y) != (upper[:, 1] > y)
        rise = np.where(straddles, upper[:, 1] - lower[:, 1], 1.0)
        crossed = straddles & (x < lower[:, 0] + (y - lower[:, 1]) * ((upper[:, 0] - lower[:, 0]) / rise))
        turns += np.where(a[:, 1] < b[:, 1], 1, -1) * crossed
    return turns


def contains(mesh: Mesh, points: Float[np.ndarray, "P 3"]) -> Bool[np.ndarray, " P"]:
    """Whether points lie inside, by the mesh above them along two of the three axes.

    From inside a closed mesh, a line leaves it more often than it enters, or less (the winding number is not 0): what
    two bodies share is inside. Exact but for rounding. An open mesh, whose triangles may face any way, is crossed an
    odd number of times; the vote mends most of what a small hole does (Nooruddin and Turk 2003).
    """
    votes = np.zeros(len(points), dtype=np.int64)
    for axis in range(3):
        above = np.zeros(len(points), dtype=np.int64)
        for asked, _, heights, turns in crossings(mesh, points, axis):
            higher = heights > points[asked, axis]
            np.add.at(above, asked[higher], turns[higher])
        votes += above != 0 if mesh.watertight else above % 2
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
        for asked, triangles, heights, _ in crossings(mesh, points, 2):
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
            far = Nearest(other.corners)(mesh.corners[shown].mean(1))
        picture[seen >= 0] = colormaps["inferno"]((far / most).clip(0, 1))[places, :3]
    return torch.from_numpy(picture).float().view(size, size, 3)
