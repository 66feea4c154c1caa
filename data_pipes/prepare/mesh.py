"""Triangle meshes: reading OFF files, and points spread evenly over their surface."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from mwt.errors import InputError


@dataclass(frozen=True)
class Mesh:
    """Corners of triangles: coordinates, and for each triangle the numbers of its three."""

    vertices: Float[np.ndarray, "V 3"]
    triangles: Int[np.ndarray, "T 3"]


def read_off(data: bytes, where: str) -> Mesh:
    """A mesh in the Object File Format, as text.

    Many files of ModelNet40 lack the line break after OFF (`OFF490 518 0`); comments, empty lines, several spaces in
    a row, colours after a face and faces of more than three corners (cut into a fan) are understood as well.

    Raises:
        InputError: another kind of file, one that is cut off or has more lines than it says, or numbers that are no
            numbers of vertices; the message names `where`.
    """
    text = data.decode("ascii", errors="replace")
    lines = [line for raw in text.splitlines() if (line := raw.split("#", 1)[0].strip())]
    if not lines or not lines[0].startswith("OFF"):
        raise InputError(f"{where} is no OFF file: it does not begin with OFF.")
    if rest := lines[0][3:].strip():
        lines[0] = rest
    else:
        lines = lines[1:]
    try:
        counts = [int(word) for word in lines[0].split()]
        vertex_count, face_count = counts[:2]
    except (IndexError, ValueError):
        raise InputError(f"{where}: no numbers of vertices and faces follow on OFF.") from None
    if vertex_count < 3 or face_count < 1 or len(lines) != 1 + vertex_count + face_count:
        raise InputError(
            f"{where} says that it has {vertex_count} vertices and {face_count} faces, "
            f"which does not fit the {len(lines) - 1} lines that follow."
        )
    try:
        vertices = np.array([line.split()[:3] for line in lines[1 : 1 + vertex_count]], dtype=np.float64)
        corners = [_corners(line) for line in lines[1 + vertex_count :]]
    except (IndexError, ValueError):
        raise InputError(f"{where} holds a line that is no vertex (x y z) or no face (3 i j k).") from None
    if vertices.shape != (vertex_count, 3) or not np.isfinite(vertices).all():
        raise InputError(f"{where} holds a vertex that is not three finite numbers.")
    triangles = np.array([triangle for face in corners for triangle in face], dtype=np.int64).reshape(-1, 3)
    if len(triangles) == 0 or triangles.min() < 0 or triangles.max() >= vertex_count:
        raise InputError(f"{where} has no triangles, or some with vertices that are not in 0 … {vertex_count - 1}.")
    return Mesh(vertices, triangles)


def _corners(line: str) -> list[tuple[int, int, int]]:
    """The triangles of a face; a point or an edge has none."""
    words = line.split()
    count = int(words[0])
    face = [int(word) for word in words[1 : 1 + count]]
    if len(face) != count:
        raise ValueError
    return [(face[0], face[i], face[i + 1]) for i in range(1, count - 1)]


def sample_surface(mesh: Mesh, numbers: Float[np.ndarray, "N 3"], where: str) -> Float[np.ndarray, "N 3"]:
    """Points spread over the surface, equally many per area on average, one for each triple of numbers in [0, 1).

    Raises:
        InputError: the mesh has no area.
    """
    a, b, c = (mesh.vertices[mesh.triangles[:, corner]] for corner in range(3))
    areas = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    ends = np.cumsum(areas)
    if not ends[-1] > 0:
        raise InputError(f"{where}: the mesh has no area, so there is no surface to take points from.")
    chosen = np.searchsorted(ends, numbers[:, 0].astype(np.float64) * ends[-1], side="right").clip(max=len(ends) - 1)
    # Osada et al. 2002, eq. 1: uniform within a triangle
    root, along = np.sqrt(numbers[:, 1:2].astype(np.float64)), numbers[:, 2:3].astype(np.float64)
    return (1 - root) * a[chosen] + root * (1 - along) * b[chosen] + root * along * c[chosen]


def normalised(points: Float[np.ndarray, "N 3"]) -> Float[np.ndarray, "N 3"]:
    """Points moved so that their mean is 0 and scaled so that the largest coordinate is 1 (released code of MWT)."""
    centred = points - points.mean(0)
    return centred / np.abs(centred).max()
