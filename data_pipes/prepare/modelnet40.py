"""ModelNet40: meshes -> points on their surface, to which unsigned distances are asked while training."""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from data_pipes.prepare.mesh import normalised, read_off, sample_surface
from data_pipes.prepare.source import Part, Request, Source, checksum, other_counts, stored_order
from data_pipes.write import Sample
from mwt.errors import InputError
from mwt.rng import uniform
from mwt.structs import SignalFacts

SURFACE_POINTS = 32 * 1024
COUNTS = {"train": 9843, "test": 2468}
LICENCE = "none stated, for academic research (Wu et al. 2015, Princeton ModelNet)"
LAYOUT = "ModelNet40/CLASS/{train,test}/*.off, or ModelNet40.zip with it"
_NAME = re.compile(r"(?:.*/)?(?P<label>[^/]+)/(?P<split>train|test)/[^/]+\.off", re.IGNORECASE)
_MAX_BYTES = 2**28
"""The largest mesh of ModelNet40 has some 40 MB."""


@dataclass(frozen=True, slots=True)
class MeshFile:
    """Where a mesh lies (a file, or a member `name` of a zip file), and its class."""

    path: str
    name: str
    label: int

    def read(self) -> tuple[bytes, str]:
        """Its bytes, and what messages call it."""
        try:
            if not self.path.endswith(".zip"):
                return Path(self.path).read_bytes(), self.path
            archive = _open_zip(self.path)
            if archive.getinfo(self.name).file_size > _MAX_BYTES:
                raise InputError(f"{self.path}: {self.name} unpacks to more than {_MAX_BYTES} bytes; it is no mesh.")
            return archive.read(self.name), f"{self.path}: {self.name}"
        except (OSError, zipfile.BadZipFile, EOFError) as error:
            raise InputError(f"{self.path}: {self.name} cannot be read: {error}.") from error


@lru_cache(maxsize=1)
def _open_zip(path: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)  # opened once per process, closed with it


@dataclass(frozen=True)
class SurfaceMaker:
    """Makes the sample of a mesh: what is fixed of it, `points` on its surface, normalised, float32 [points, 3]."""

    points: int
    seed: int

    def __call__(self, file: MeshFile) -> Sample:
        """One sample; the points depend on the mesh and the seed alone, so equal meshes are equal samples.

        Raises:
            InputError: no mesh, or one without area; the message names the file.
        """
        data, where = file.read()
        mesh = read_off(data, where)
        digest = hashlib.sha256(mesh.vertices.tobytes() + mesh.triangles.tobytes()).hexdigest()
        numbers = uniform(torch.tensor([0]), 3 * self.points, seed=self.seed, purpose=f"surface of {digest}")
        surface = normalised(sample_surface(mesh, numbers.view(self.points, 3).numpy(), where))
        stream = io.BytesIO()
        np.lib.format.write_array(stream, surface.astype("<f4"), version=(1, 0), allow_pickle=False)
        return Sample(extension="npy", data=stream.getvalue(), label=file.label)


def load(request: Request) -> Source:
    """9,843 meshes for training and 2,468 for testing, of 40 classes: 32,768 points of each, 393 kB; 4.8 GB in all.

    The released code takes other points in every epoch; here the points are fixed and the queries are fresh
    (`mwt.surface`).

    Raises:
        InputError: no --src, or no meshes in it.
    """
    request.only("modelnet40", "seed")
    if request.src is None:
        raise InputError(f"modelnet40 is not downloaded; get ModelNet40.zip and give it as --src. Taken is {LAYOUT}.")
    found = [
        (match["label"], match["split"].lower(), path, name)
        for path, name in _meshes(request.src)
        if (match := _NAME.fullmatch(name)) and not name.startswith("__MACOSX") and "/." not in name
    ]
    classes = tuple(sorted({label for label, *_ in found}))
    splits: dict[str, Part] = {}
    make = SurfaceMaker(SURFACE_POINTS, request.seed)
    for split in ("train", "test"):
        files = [
            MeshFile(path, name, classes.index(label))
            for label, _, path, name in sorted(entry for entry in found if entry[1] == split)
        ]
        empty = set(range(len(classes))) - {file.label for file in files}
        if empty or not files:
            some = ", ".join(classes[label] for label in sorted(empty)[:5])
            raise InputError(
                f"{request.src} (--src) holds no {split} meshes{some and f' of {some}'}; expected is {LAYOUT}."
            )
        splits[split] = Part(stored_order(files, split), make)
    facts = SignalFacts(kind="points", channels=1, height=None, width=None, classes=classes)
    content = checksum((split, file.name, file.label) for split, part in splits.items() for file in part.items)
    notes = other_counts("ModelNet40", splits, COUNTS)
    return Source(name="modelnet40", facts=facts, licence=LICENCE, splits=splits, content=content, notes=notes)


def _meshes(src: Path) -> Iterator[tuple[str, str]]:
    """(path, name within the data set) of all OFF files; for a zip file, path is the archive's."""
    archive = src if src.is_file() else src / "ModelNet40.zip"
    if archive.is_file() and not (src / "ModelNet40").is_dir():
        try:
            for name in _open_zip(str(archive)).namelist():
                yield str(archive), name
        except (OSError, zipfile.BadZipFile) as error:
            raise InputError(f"{archive} cannot be read as a zip file: {error}; get it again.") from error
        return
    if not src.is_dir():
        raise InputError(f"No folder at {src} (--src).")
    folder = src / "ModelNet40" if (src / "ModelNet40").is_dir() else src
    for path in folder.glob("*/*/*"):
        yield str(path), path.relative_to(folder).as_posix()
