"""The Stanford bunny out of the npm package `bunny` (public domain): two JavaScript arrays become a PLY file."""

from __future__ import annotations

import json
import re
import tarfile
from pathlib import Path

import numpy as np

from data_pipes.prepare.mesh import Mesh
from mwt.errors import InputError

LAYOUT = "index.js of the npm package bunny, its folder, or the archive that `npm pack bunny` leaves"
_SCRIPT = "index.js"


def make(src: Path | None, out: Path) -> Path:
    """Write `out`/bunny.ply; returns it.

    Raises:
        InputError: there is no package at `src`, or it holds something else.
    """
    if src is None:
        raise InputError(f"bunny is not downloaded: run `npm pack bunny` and give the archive as --src ({LAYOUT}).")
    mesh = parse(script(src), str(src))
    out.mkdir(parents=True, exist_ok=True)
    path = out / "bunny.ply"
    path.write_bytes(ply(mesh))
    return path


def script(src: Path) -> str:
    """The package's index.js, from the file itself, the folder or the archive.

    Raises:
        InputError: it is not there.
    """
    if src.is_dir():
        for path in (src / _SCRIPT, src / "package" / _SCRIPT):
            if path.is_file():
                return path.read_text(encoding="utf-8")
        raise InputError(f"{src} holds no {_SCRIPT}; it takes {LAYOUT}.")
    if not src.is_file():
        raise InputError(f"There is no file {src}; it takes {LAYOUT}.")
    if src.suffix == ".js":
        return src.read_text(encoding="utf-8")
    try:
        with tarfile.open(src) as archive:
            for member in archive:
                file = archive.extractfile(member) if member.name.endswith(f"package/{_SCRIPT}") else None
                if file is not None:
                    return file.read().decode("utf-8")
    except (tarfile.TarError, OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{src} is not an archive that can be read ({error}); it takes {LAYOUT}.") from error
    raise InputError(f"{src} holds no package/{_SCRIPT}; it takes {LAYOUT}.")


def parse(text: str, where: str) -> Mesh:
    """The arrays `exports.positions` and `exports.cells`, read as data: nothing is run.

    Raises:
        InputError: they are missing, or are no vertices and triangles.
    """
    found = {}
    for name in ("positions", "cells"):
        match = re.search(rf"exports\.{name}\s*=\s*(\[[\[\]\d\s,.eE+-]*\])", text)
        if match is None:
            raise InputError(f"{where}: no array exports.{name} in {_SCRIPT}.")
        try:
            found[name] = np.array(json.loads(match[1]), dtype=np.float64 if name == "positions" else np.int64)
        except ValueError as error:
            raise InputError(f"{where}: exports.{name} is not an array of triples ({error}).") from error
    vertices, triangles = found["positions"], found["cells"]
    if vertices.ndim != 2 or triangles.ndim != 2 or vertices.shape[1] != 3 or triangles.shape[1] != 3:
        raise InputError(f"{where}: exports.positions or exports.cells is not an array of triples.")
    if len(triangles) == 0 or triangles.min() < 0 or triangles.max() >= len(vertices):
        raise InputError(f"{where}: a triangle has a vertex that is not in 0 … {len(vertices) - 1}.")
    return Mesh(vertices, triangles)


def ply(mesh: Mesh) -> bytes:
    """The mesh as a binary PLY file."""
    header = (
        "ply\nformat binary_little_endian 1.0\n"
        f"element vertex {len(mesh.vertices)}\nproperty float x\nproperty float y\nproperty float z\n"
        f"element face {len(mesh.triangles)}\nproperty list uchar int vertex_indices\nend_header\n"
    )
    faces = np.empty(len(mesh.triangles), dtype=[("count", "u1"), ("vertices", "<i4", 3)])
    faces["count"], faces["vertices"] = 3, mesh.triangles
    return header.encode() + mesh.vertices.astype("<f4").tobytes() + faces.tobytes()
