"""What a task is: a signal, or several of one shape, what a fit sees of it, and how well a field shows it.

A task is made from files by its class in `TASKS` and knows nothing of optimizers. Everything has a leading axis of N
signals, 1 for a single one: fields without copies give it through `predict`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from mwt.errors import InputError
from mwt.fields import Field, Frame, evaluate
from mwt.rng import derived_seed, permutation


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How well the fields show their signals. `metrics` by name, one number a signal; a picture of the first signal."""

    metrics: dict[str, Float[Tensor, " N"]]
    picture: UInt8[Tensor, "C h w"]
    """What the field shows."""


BESIDE = ("truth", "error", "measured", "bicubic", "sinogram", "fbp")
"""What tasks write of a signal beside its reconstruction: NAME.truth.png, ..."""


def signal_names(paths: Sequence[Path]) -> tuple[str, ...]:
    """The files' names, numbered where two would be written under one (a/x.png and b/x.png, x.png and x.jpg).

    Raises:
        InputError: one is called as what is written of another (x.png and x.truth.png).
    """
    stems = {path.stem: path for path in paths}
    if len(stems) < len(paths):
        return tuple(f"{number:03d}-{path.name}" for number, path in enumerate(paths))
    for stem, path in stems.items():
        before, _, last = stem.rpartition(".")
        if last in BESIDE and before in stems:
            raise InputError(
                f"{stems[before]} and {path} cannot be fitted together: the {last} of the one would be written under "
                "the name of the other. The latter looks like the outcome of a fit: name the signals by a glob that "
                "leaves it out, or rename it."
            )
    return tuple(path.name for path in paths)


def means(metrics: dict[str, Float[Tensor, " N"]]) -> dict[str, float]:
    """Each metric's mean over the signals."""
    return {name: fmean(values.tolist()) for name, values in metrics.items()}


class Task(ABC):
    """One kind of signal. A subclass reads files in its constructor: `__init__(paths, options, device)`."""

    metric: ClassVar[str]
    """The metric that decides what is best; larger is better."""
    derivatives: int = 0
    """Derivatives with respect to coordinates that the loss takes."""
    between: bool = False
    """Whether values are asked for between the samples of `frame`, or of what was measured."""
    endings: ClassVar[tuple[str, ...]] = ()
    """Of the files that a folder of signals is searched for (`takes`)."""
    takes_folder: ClassVar[bool] = False
    """Whether a folder is one signal."""
    subsets: ClassVar[bool] = True
    """Whether a step can see some of the points."""
    several: ClassVar[bool] = True
    """Whether several signals can be fitted as one batch."""

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """What `signal.KEY` may hold beside `signal.path`."""

    @classmethod
    def takes(cls, path: Path) -> bool:
        """Whether a file in a folder of signals is one of them."""
        return path.suffix.lower() in cls.endings

    @classmethod
    def shapes(cls, paths: Sequence[Path], options: Any) -> list[tuple[int, ...]]:
        """The shape of each file's signal, where signals of one batch must have one; here any go together.

        Raises:
            InputError: files that cannot be read, or that do not belong into one run whatever their shapes.
        """
        return [()] * len(paths)

    @abstractmethod
    def __init__(self, paths: Sequence[Path], options: Any, device: torch.device) -> None:
        """Read the signals.

        Args:
            paths: what `signal.path` names, one or more files.
            options: of the class's own `Options`.

        Raises:
            InputError: a file or an option that will not do.
        """

    frame: Frame
    channels: int
    names: tuple[str, ...]
    """One name a signal."""

    @property
    def count(self) -> int:
        """N."""
        return len(self.names)

    @property
    @abstractmethod
    def points(self) -> int:
        """What there is to sample from: pixels, samples, rays."""

    @abstractmethod
    def loss(self, fields: Field, index: Int[Tensor, " P"] | None, generator: torch.Generator) -> Float[Tensor, " N"]:
        """The loss of each signal at the points `index` (None: all of them); `generator` for what else is random."""

    @abstractmethod
    def evaluate(self, fields: Field) -> Evaluation:
        """Metrics and pictures, without a graph."""

    @abstractmethod
    def write(self, fields: Field, folder: Path) -> list[Path]:
        """Write the reconstructions, and the error maps where there are some; returns the files."""

    def residual(self, fields: Field) -> Float[Tensor, "N P C"] | None:
        """What the fields show less what is there, at the samples of `frame`, in the fields' range, whatever the fit
        saw of it; None for a signal that is not samples on a grid."""
        return None

    def baselines(self) -> dict[str, dict[str, float]]:
        """Metrics (means over the signals) of simple methods on the same data, by name."""
        return {}

    def facts(self) -> dict[str, Any]:
        """What a result file says of the signal."""
        return {"signals": self.count, "points": self.points, "size": self.frame.size}


def make_tasks(kind: type[Task], paths: Sequence[Path], options: Any, device: torch.device) -> dict[str, Task]:
    """The signals of a run, one task for each of their shapes ("512x768x3"; "" where there is one).

    Shapes come in the order of the files, so that the first file's signal is the first of the first task.

    Raises:
        InputError: a file or an option that will not do.
    """
    if len(paths) == 1:
        return {"": kind(paths, options, device)}
    batches: dict[tuple[int, ...], list[Path]] = {}
    for path, shape in zip(paths, kind.shapes(paths, options), strict=True):
        batches.setdefault(shape, []).append(path)
    names = dict(zip(paths, signal_names(paths), strict=True))
    tasks = {}
    for shape, batch in batches.items():
        task = kind(batch, options, device)
        task.names = tuple(names[path] for path in batch)  # which differ over all batches
        tasks["x".join(map(str, shape)) if len(batches) > 1 else ""] = task
    return tasks


def predict(fields: Field, coords: Float[Tensor, "P D"] | Float[Tensor, "N P D"]) -> Float[Tensor, "N P C"]:
    """Values with the axis of signals, with a graph."""
    values = fields(coords)
    return values if values.ndim == 3 else values[None]


def show(fields: Field, coords: Float[Tensor, "P D"], *, chunk: int = 8192) -> Float[Tensor, "N P C"]:
    """`predict` for all points of a signal: without a graph, in chunks of bounded memory."""
    values = evaluate(fields, coords, chunk=chunk)
    return values if values.ndim == 3 else values[None]


@dataclass
class Sampler:
    """Which points each step sees: every point once before any comes again, in an order by (seed, round).

    The remainder of a round that fills no batch is left out, others each time. The same points for all signals.

    With `tiles`, the points are the samples of a grid and come in whole tiles from all over it, as many tiles as have
    `batch` samples, one at least: for fields whose samples share work. Where the sides of the tiles do not divide those
    of the grid, tiles at its edges have fewer samples.
    """

    points: int
    batch: int | None
    seed: int
    device: torch.device
    tiles: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    """Samples of the grid, and of a tile, along each axis."""
    _order: tuple[int, Tensor] | None = field(default=None, init=False)

    def index(self, step: int) -> Int[Tensor, " P"] | None:
        """The points of a step, counted from 0; None: all of them, in order."""
        if self.batch is None or self.batch >= self.points:
            return None
        if self.tiles is None:
            return self._chosen(step, self.points, self.batch)
        size, tile = self.tiles
        counts = [-(-samples // side) for samples, side in zip(size, tile, strict=True)]
        total = math.prod(counts)
        chosen = self._chosen(step, total, min(total, max(1, self.batch // math.prod(tile))))
        corners = torch.unravel_index(chosen.sort().values, counts)  # in order, the field need not look for them
        numbers, inside = torch.zeros((), dtype=torch.long, device=self.device), torch.ones((), device=self.device) > 0
        for axis, (corner, samples, side) in enumerate(zip(corners, size, tile, strict=True)):
            place = torch.arange(side, device=self.device).view(-1, *(1,) * (len(tile) - axis - 1))
            own = corner.view(-1, *(1,) * len(tile)) * side + place
            numbers, inside = numbers * samples + own, inside & (own < samples)
        return numbers[inside]

    def _chosen(self, step: int, total: int, batch: int) -> Int[Tensor, " P"]:
        """`batch` of `total` things, each once before any comes again."""
        round_, place = divmod(step, total // batch)
        if self._order is None or self._order[0] != round_:
            order = permutation(total, seed=self.seed, purpose="points", epoch=round_)
            self._order = (round_, order.to(self.device))
        return self._order[1][place * batch : (place + 1) * batch]

    def generator(self, step: int) -> torch.Generator:
        """For what else a step draws."""
        return torch.Generator(self.device).manual_seed(derived_seed(self.seed, "step", step))
