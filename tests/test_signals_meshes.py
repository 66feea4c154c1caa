"""Distances against all triangles in closed form; meshes of several bodies against balls in closed form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import trimesh

from mwt.signals import nearest
from mwt.signals.meshes import Mesh, contains, read_mesh, sample_surface
from mwt.signals.nearest import Nearest

BUNNY = Path(__file__).parents[1] / "configs/fit/signals/bunny.ply"


def all_distances(corners: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The least distance [P] to triangles [T, 3, 3]: to the plane where a point stands over its triangle, or to edges.

    Triangles without area are their edges.
    """
    best = np.full(len(points), np.inf)
    for start in range(0, len(points), 50):
        asked = points[start : start + 50, None]  # [P, 1, 3]
        a, b, c = corners.swapaxes(0, 1)
        normal = np.cross(b - a, c - a)
        length = np.linalg.norm(normal, axis=1)
        over = np.broadcast_to(length > 0, (len(asked), len(corners))).copy()
        edges = np.full(over.shape, np.inf)
        for one, other in ((a, b), (b, c), (c, a)):
            along = other - one
            over &= (np.cross(normal, along) * (asked - one)).sum(-1) >= 0
            share = ((asked - one) * along).sum(-1) / np.maximum((along**2).sum(-1), 1e-300)
            edges = np.minimum(edges, np.linalg.norm(asked - one - share.clip(0, 1)[..., None] * along, axis=-1))
        plane = np.abs(((asked - a) * normal).sum(-1)) / np.maximum(length, 1e-300)
        best[start : start + 50] = np.where(over, plane, edges).min(1)
    return best


def arrays(*parts: trimesh.Trimesh) -> Mesh:
    whole = trimesh.util.concatenate(list(parts))
    return Mesh(np.array(whole.vertices), np.array(whole.faces), watertight=True)


def ball(place: tuple[float, float, float], radius: float, *, inverted: bool = False, fine: int = 3) -> trimesh.Trimesh:
    found = trimesh.creation.icosphere(fine, radius).apply_translation(place)
    if inverted:
        found.invert()
    return found


def shapes(kind: str) -> tuple[Mesh, np.ndarray]:
    """A mesh, and points near what is hard about it."""
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((200, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    if kind == "bunny":
        mesh = read_mesh(BUNNY)
        return mesh, sample_surface(mesh, 200, rng)[0] + 0.02 * np.ptp(mesh.vertices) * directions
    if kind == "slivers":  # a cylinder's, 1.6 long and 0.003 wide; on the axis all of them are as near
        mesh = arrays(trimesh.creation.cylinder(0.5, 1.6, sections=500))
        return mesh, np.concatenate([directions, np.array([[0.0, 0.0, 0.1]])])
    if kind == "no area":
        corners = np.array([[0, 0, 0], [1, 0, 0], [0.5, 0, 0], [2, 2, 2], [0.3, 1, 0]])
        return Mesh(corners, np.array([[0, 1, 2], [3, 3, 3], [0, 1, 4]])), 2 * directions
    size = {"balls": 0.02, "tiny balls": 1e-4}[kind]  # on a plate, 1.8 wide
    places = [(x, y, 0.1) for x in (-0.75, -0.25, 0.25, 0.75) for y in (-0.75, -0.25, 0.25, 0.75)]
    mesh = arrays(trimesh.creation.box((1.8, 1.8, 0.02)), *(ball(place, size, fine=1) for place in places))
    return mesh, np.array(places)[rng.integers(0, 16, 200)] + size * (1 + rng.random((200, 1))) * directions


@pytest.mark.parametrize("kind", ["balls", "tiny balls", "slivers", "no area", "bunny"])
def test_distances_are_those_to_all_triangles(kind: str) -> None:
    """Also where large triangles lie beside small ones."""
    mesh, points = shapes(kind)
    points = np.concatenate([points, np.random.default_rng(1).uniform(-1, 1, (100, 3))])
    np.testing.assert_allclose(
        Nearest(mesh.corners)(points), all_distances(mesh.corners, points), rtol=1e-9, atol=1e-12
    )


def test_distances_do_not_depend_on_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh, points = shapes("balls")
    whole = Nearest(mesh.corners)(points)
    monkeypatch.setattr(nearest, "PAIRS", 100)
    np.testing.assert_array_equal(Nearest(mesh.corners)(points), whole)


# ---- several bodies --------------------------------------------------------------------------------------------------


def read_back(folder: Path, *parts: trimesh.Trimesh) -> Mesh:
    trimesh.util.concatenate(list(parts)).export(folder / "a.ply")
    found = read_mesh(folder / "a.ply")
    assert found.watertight
    return found


def faces_out(mesh: Mesh, centre: tuple[float, float, float], radius: float) -> bool:
    """Whether the triangles of a ball all face away from its centre; or all towards it."""
    middles = mesh.corners.mean(1) - centre
    own = np.abs(np.linalg.norm(mesh.corners - centre, axis=2) - radius).max(1) < 1e-5
    assert own.sum() == 1280
    out = (mesh.normals[own] * middles[own]).sum(1) > 0
    assert out.all() or not out.any()
    return bool(out[0])


def within(mesh: Mesh, *balls: tuple[tuple[float, float, float], float]) -> tuple[np.ndarray, np.ndarray]:
    """What `contains` says of points, and in which of the balls they are [B, P]; none lies near a ball's surface."""
    points = np.random.default_rng(0).uniform(-1, 1, (4000, 3))
    away = np.stack([np.linalg.norm(points - centre, axis=1) / radius for centre, radius in balls])
    clear = (np.abs(away - 1) > 0.02).all(0)
    return contains(mesh, points[clear]), away[:, clear] < 1


@pytest.mark.parametrize("inverted", [(False, False), (True, False), (True, True)])
def test_what_two_bodies_share_is_inside(tmp_path: Path, inverted: tuple[bool, bool]) -> None:
    left, right = ((-0.2, 0.0, 0.05), 0.6), ((0.3, 0.1, 0.0), 0.5)
    mesh = read_back(tmp_path, ball(*left, inverted=inverted[0]), ball(*right, inverted=inverted[1]))
    assert faces_out(mesh, *left)
    assert faces_out(mesh, *right)
    found, truth = within(mesh, left, right)
    assert truth.all(0).sum() > 50
    np.testing.assert_array_equal(found, truth.any(0))


@pytest.mark.parametrize("inverted", [(False, False), (True, False), (False, True), (True, True)])
def test_bodies_apart_face_outwards(tmp_path: Path, inverted: tuple[bool, bool]) -> None:
    left, right = ((-0.5, 0.0, 0.05), 0.4), ((0.5, 0.1, 0.0), 0.3)
    mesh = read_back(tmp_path, ball(*left, inverted=inverted[0]), ball(*right, inverted=inverted[1]))
    assert faces_out(mesh, *left)
    assert faces_out(mesh, *right)
    found, truth = within(mesh, left, right)
    np.testing.assert_array_equal(found, truth.any(0))


@pytest.mark.parametrize("inverted", [(False, True), (False, False), (True, False), (True, True)])
def test_a_body_within_another_is_a_cavity(tmp_path: Path, inverted: tuple[bool, bool]) -> None:
    """However the file turns the two."""
    outer, inner = ((0.0, 0.0, 0.05), 0.9), ((0.1, 0.0, 0.0), 0.6)
    mesh = read_back(tmp_path, ball(*outer, inverted=inverted[0]), ball(*inner, inverted=inverted[1]))
    assert faces_out(mesh, *outer)
    assert not faces_out(mesh, *inner)
    found, truth = within(mesh, outer, inner)
    np.testing.assert_array_equal(found, truth[0] & ~truth[1])


def test_bodies_within_a_cavity_are_solid(tmp_path: Path) -> None:
    """Two balls in a hollow one; and one within its wall is a cavity too."""
    outer, hollow, one, two, bubble = (
        ((0.0, 0.0, 0.0), 0.95), ((0.1, 0.0, 0.0), 0.7), ((0.4, 0.0, 0.0), 0.25), ((-0.2, 0.1, 0.0), 0.3),
        ((-0.77, 0.0, 0.0), 0.12),
    )  # fmt: skip
    mesh = read_back(tmp_path, *(ball(*body) for body in (one, bubble, outer, two, hollow)))
    assert [faces_out(mesh, *body) for body in (outer, hollow, one, two, bubble)] == [True, False, True, True, False]
    found, truth = within(mesh, outer, hollow, one, two, bubble)
    np.testing.assert_array_equal(found, truth.sum(0) % 2 == 1)


def test_open_meshes_are_taken_as_they_are(tmp_path: Path) -> None:
    """Their triangles may face any way: a ball with some turned and four missing has its inside still."""
    rough = ball((0.0, 0.0, 0.0), 0.8)
    rough.faces[::3] = rough.faces[::3, ::-1]
    rough.update_faces(np.arange(len(rough.faces)) > 3)
    rough.export(tmp_path / "a.ply")
    mesh = read_mesh(tmp_path / "a.ply")
    assert not mesh.watertight
    found, truth = within(mesh, ((0.0, 0.0, 0.0), 0.8))
    assert (found == truth[0]).mean() > 0.99
