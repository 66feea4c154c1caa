"""Shapes: a field that is positive inside a mesh, or its signed distance (negative inside)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from mwt.errors import InputError
from mwt.fields import Field, Frame
from mwt.rng import derived_seed
from mwt.signals.meshes import (
    MESHES,
    Mesh,
    Placement,
    contains,
    marching_cubes,
    read_mesh,
    render,
    render_distances,
    sample_surface,
    write_mesh,
)
from mwt.signals.nearest import Nearest
from mwt.signals.pictures import to_bytes, write_picture
from mwt.signals.task import Evaluation, Task, predict, show, signal_names

NOWHERE = 2 * math.sqrt(3)
"""Chamfer distance of a field without a surface: the diagonal of the cube."""
FAR = 0.02
"""Distance, of a cube from -1 to 1, that is yellow in pictures of the error."""


@dataclass(frozen=True, kw_only=True)
class ShapeOptions:
    """What is fitted, where it is asked, and how it is judged."""

    mode: str = "occupancy"
    """occupancy: positive inside, negative outside. distance: signed distance, negative inside; needs a closed mesh.
    Faces of one body within another are surface too."""
    loss: str = "bce"
    """occupancy: bce takes the field's values as logits, mse compares them with 1 and -1."""
    reach: float = 0.9
    """The longest side of the mesh's box becomes -reach to reach, of a cube from -1 to 1."""
    queries: int = 200_000
    """Points, drawn once: three tenths of them anywhere, the others near the surface; of a distance, 2 of 10 on it."""
    spread: float = 0.03
    """Standard deviation, along each axis, of points near the surface about it."""
    weight_distance: float = 1.0
    """distance: of |f - d| at all points."""
    weight_surface: float = 1.0
    """distance: of |f| on the surface, besides."""
    weight_eikonal: float = 0.05
    """distance: of (|gradient| - 1)^2 at all points."""
    weight_normal: float = 0.05
    """distance: of 1 - cosine of gradient and normal, on the surface."""
    grid: int = 64
    """Metrics are those of so many points along each axis."""
    mesh_grid: int = 128
    """The mesh that is written comes from so many."""
    lattice: int | None = None
    """occupancy: fit so many points along each axis, end points included, and nothing between them. They are the points
    of metrics and of the written mesh too; queries, spread, grid and mesh_grid count for nothing."""
    points_seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in ("occupancy", "distance"):
            raise InputError(f"signal.mode is {self.mode!r}; it is occupancy or distance.")
        if self.loss not in ("bce", "mse"):
            raise InputError(f"signal.loss is {self.loss!r}; it is bce or mse.")
        if not 0 < self.reach <= 1:
            raise InputError(f"signal.reach is {self.reach}; it must lie above 0 and not above 1.")
        if min(self.grid, self.mesh_grid) < 4 or self.queries < 10 or self.spread <= 0:
            raise InputError("signal.grid and mesh_grid must be at least 4, queries 10, and spread positive.")
        if self.lattice is not None and (self.lattice < 4 or self.mode != "occupancy"):
            raise InputError(
                f"signal.lattice is {self.lattice}, and signal.mode {self.mode!r}: a lattice has at least 4 points "
                "along each axis, and knows what is inside (signal.mode=occupancy), not how far."
            )
        if min(self.weight_distance, self.weight_surface, self.weight_eikonal, self.weight_normal) < 0:
            raise InputError("signal.weight_... cannot be negative.")


@dataclass(frozen=True)
class Queries:
    """What is known at points about shapes: signed distances, or 1 inside and -1 outside; normals on the surface."""

    coords: Float[Tensor, "N Q 3"]
    values: Float[Tensor, "N Q"]
    normals: Float[Tensor, "N Q 3"]
    """0 where a point is not on the surface."""
    surface: Bool[Tensor, " Q"]
    """Which points are on it; the same of all signals."""

    def at(self, index: Int[Tensor, " P"]) -> Queries:
        """Some of the points."""
        return Queries(self.coords[:, index], self.values[:, index], self.normals[:, index], self.surface[index])


def ask(mesh: Mesh, options: ShapeOptions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points [Q, 3], values [Q] and normals [Q, 3] of one shape: those anywhere, then near, then on the surface."""
    rng = np.random.default_rng(derived_seed(options.points_seed, "shape"))
    anywhere, near, on = counts(options)
    spread = sample_surface(mesh, near, rng)[0] + options.spread * rng.standard_normal((near, 3))
    points, owners = sample_surface(mesh, on, rng)
    coords = np.concatenate([rng.uniform(-1, 1, (anywhere, 3)), spread.clip(-1, 1), points])
    normals = np.concatenate([np.zeros((anywhere + near, 3)), mesh.normals[owners]])
    values = np.where(contains(mesh, coords), 1.0, -1.0)
    if options.mode == "distance":
        values = -values * Nearest(mesh.corners)(coords)
        values[anywhere + near :] = 0.0
    return coords, values, normals


def counts(options: ShapeOptions) -> tuple[int, int, int]:
    """How many points lie anywhere, near the surface and on it."""
    anywhere = round(0.3 * options.queries)
    on = round(0.2 * options.queries) if options.mode == "distance" else 0
    return anywhere, options.queries - anywhere - on, on


class ShapeTask(Task):
    """Occupancy or signed distance at points that are drawn once, or occupancy on a lattice, for fields on samples too.

    IoU on a grid decides what is best; with `lattice`, on the lattice itself.

    `chamfer` is the mean of two means: the distances of 10,000 points on the field's surface (marching cubes) to the
    mesh, and of as many on the mesh to the field's surface; in the cube's units, 3.46 where the field has no surface.
    """

    metric = "iou"
    between = True
    endings = MESHES

    @dataclass(frozen=True, kw_only=True)
    class Options(ShapeOptions):
        """Those of all shapes."""

    def __init__(self, paths: Sequence[Path], options: ShapeOptions, device: torch.device) -> None:
        self.options = options
        self.names = signal_names(paths)
        self.channels = 1
        meshes = [read_mesh(path) for path in paths]
        for path, mesh in zip(paths, meshes, strict=True):
            if options.mode == "distance" and not mesh.watertight:
                raise InputError(
                    f"{path} is not watertight (some edges have not two triangles), so it has no inside, and its "
                    "distance no sign: mend it, or set signal.mode=occupancy."
                )
        self.placements = [Placement.within(mesh, options.reach) for mesh in meshes]
        self.meshes = [place.to_cube(mesh) for place, mesh in zip(self.placements, meshes, strict=True)]
        """In the cube."""
        graded = options.mode == "distance" and (options.weight_eikonal > 0 or options.weight_normal > 0)
        self.derivatives = 1 if graded else 0
        self.between = options.lattice is None
        self.frame = Frame(
            kind="shape",
            axes=("x", "y", "z"),
            coordinate_range=((-1.0, 1.0),) * 3,
            size=None if options.lattice is None else (options.lattice,) * 3,
            value_range=(0.0, 1.0),
            data_range=(0.0, 1.0),
            meta={
                "mode": options.mode,
                "centre": [place.centre.tolist() for place in self.placements],
                "scale": [place.scale for place in self.placements],
            },
        )
        self.side = options.lattice or options.grid
        """Points along each axis of `coords`."""
        self.coords = self.frame.grid((self.side,) * 3, device=device)
        grid = self.coords.double().cpu().numpy()
        self.inside = torch.from_numpy(np.stack([contains(mesh, grid) for mesh in self.meshes])).to(device)
        """On the grid [N, g^3]."""
        for path, inside in zip(paths, self.inside, strict=True):
            if not inside.any() and (options.mode == "occupancy" or options.lattice is not None):
                raise InputError(
                    f"None of {self.side}^3 points lies inside {path}, so that there is nothing to tell from outside. "
                    "An open surface (a sheet, a terrain) has no inside: close it. A thin shape needs a finer "
                    f"signal.{'grid' if options.lattice is None else 'lattice'}."
                )

        self.queries = self._ask(device) if self.between else None

    def _ask(self, device: torch.device) -> Queries:
        """Points of all shapes, and what is known at them."""
        options = self.options
        found = [ask(mesh, options) for mesh in self.meshes]
        coords, values, normals = (
            torch.from_numpy(np.stack(part)).float().to(device) for part in zip(*found, strict=True)
        )
        surface = torch.arange(options.queries, device=device) >= options.queries - counts(options)[2]
        return Queries(coords, values, normals, surface)

    @property
    def points(self) -> int:
        """Points at which the shape is known."""
        return len(self.coords) if self.queries is None else self.options.queries

    def loss(self, fields: Field, index: Int[Tensor, " P"] | None, generator: torch.Generator) -> Float[Tensor, " N"]:
        """That of the mode (`ShapeOptions`), the mean over points."""
        if self.queries is None:
            coords, inside = self.coords, self.inside
            if index is not None:
                coords, inside = coords[index], inside[:, index]
            return self._occupancy_loss(predict(fields, coords)[..., 0], inside)
        asked = self.queries if index is None else self.queries.at(index)
        coords = asked.coords.detach().requires_grad_(self.derivatives > 0)
        values = fields(coords if fields.copies is not None else coords[0])[..., 0]
        values = values if values.ndim == 2 else values[None]
        if self.options.mode == "distance":
            return self._distance_loss(values, coords, asked)
        return self._occupancy_loss(values, asked.values > 0)

    def _occupancy_loss(self, values: Float[Tensor, "N P"], inside: Bool[Tensor, "N P"]) -> Float[Tensor, " N"]:
        wanted = inside.to(values.dtype)
        if self.options.loss == "mse":
            return (values - (2 * wanted - 1)).square().mean(-1)
        return F.binary_cross_entropy_with_logits(values, wanted, reduction="none").mean(-1)

    def _distance_loss(self, values: Float[Tensor, "N P"], coords: Tensor, asked: Queries) -> Float[Tensor, " N"]:
        options, on = self.options, asked.surface.to(values.dtype)
        share = on.sum().clamp_min(1.0)
        loss = options.weight_distance * (values - asked.values).abs().mean(-1)
        loss = loss + options.weight_surface * (values.abs() * on).sum(-1) / share
        if self.derivatives == 0:
            return loss
        [gradient] = torch.autograd.grad(values.sum(), coords, create_graph=True)
        length = gradient.norm(dim=-1)
        cosine = (gradient * asked.normals).sum(-1) / length.clamp_min(1e-8)
        loss = loss + options.weight_eikonal * (length - 1).square().mean(-1)
        return loss + options.weight_normal * ((1 - cosine) * on).sum(-1) / share

    def inwards(self, fields: Field, size: int) -> Float[Tensor, "N g g g"]:
        """The fields on a grid, positive inside."""
        coords = self.coords if size == self.side else self.frame.grid((size,) * 3, device=self.coords.device)
        sign = -1.0 if self.options.mode == "distance" else 1.0
        return sign * show(fields, coords, chunk=32768)[..., 0].unflatten(1, (size,) * 3)

    def evaluate(self, fields: Field) -> Evaluation:
        """IoU and Chamfer distance, and a picture of the first signal's surface."""
        inwards = self.inwards(fields, self.side)
        inside = inwards.flatten(1) > 0
        both, either = (inside & self.inside).sum(1), (inside | self.inside).sum(1)
        surfaces = [marching_cubes(one.cpu().numpy()) for one in inwards]
        chamfer = [chamfer_distance(*pair) for pair in zip(surfaces, self.meshes, strict=True)]
        return Evaluation(
            metrics={"iou": (both / either.clamp_min(1)).cpu(), "chamfer": torch.tensor(chamfer)},
            picture=to_bytes(render(surfaces[0], 192)),
        )

    def write(self, fields: Field, folder: Path) -> list[Path]:
        """NAME.ply, the field's surface where the file's mesh is (none: no file); NAME.png and NAME.error.png.

        The pictures have the file's mesh on the left and the field's surface on the right; in the latter, colours are
        distances from the other one (`render_distances`; yellow is a hundredth of the cube's side).
        """
        files = []
        shown = self.inwards(fields, self.options.lattice or self.options.mesh_grid)
        for name, place, mesh, own in zip(self.names, self.placements, self.meshes, shown, strict=True):
            surface, stem = marching_cubes(own.cpu().numpy()), Path(name).stem
            if surface is not None:
                files.append(write_mesh(folder / f"{stem}.ply", place.to_file(surface)))
            pair = torch.cat([render(mesh, 320), render(surface, 320)], dim=1)
            files.append(write_picture(folder / f"{stem}.png", to_bytes(pair)))
            pair = torch.cat(
                [render_distances(mesh, surface, 320, FAR), render_distances(surface, mesh, 320, FAR)], dim=1
            )
            files.append(write_picture(folder / f"{stem}.error.png", to_bytes(pair)))
        return files

    def facts(self) -> dict[str, Any]:
        """Also the mode, and the meshes."""
        meshes = [{"triangles": len(mesh.triangles), "watertight": mesh.watertight} for mesh in self.meshes]
        return {**super().facts(), "mode": self.options.mode, "meshes": meshes}


def chamfer_distance(surface: Mesh | None, mesh: Mesh, *, count: int = 10_000) -> float:
    """See `ShapeTask`."""
    if surface is None:
        return NOWHERE
    rng = np.random.default_rng(0)
    there = Nearest(mesh.corners)(sample_surface(surface, count, rng)[0])
    back = Nearest(surface.corners)(sample_surface(mesh, count, rng)[0])
    return float(there.mean() + back.mean()) / 2
