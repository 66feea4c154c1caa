"""Signals that are made and not read: known frequencies, noise of a known band, shapes with edges at every scale.

Those of more than one dimension are the ones that Grids Often Outperform Implicit Neural Representations (2025) uses;
sines of equal amplitude and random phase are those of Rahaman et al. 2019. All lie in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mwt.errors import InputError
from mwt.fields import Field, Frame
from mwt.rng import derived_seed, permutation
from mwt.signals.pictures import psnr, to_bytes
from mwt.signals.task import Evaluation, Task, predict, show


def _generator(seed: int, purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(derived_seed(seed, purpose))


def _unit(values: Tensor) -> Tensor:
    """Shifted and scaled to [0, 1]."""
    low, high = values.min(), values.max()
    return ((values - low) / (high - low).clamp_min(1e-12)).float()


def sines(size: int, frequencies: Sequence[int], *, seed: int) -> Float[Tensor, " {size}"]:
    """The sum of sines of equal amplitude and random phase, `frequencies` in periods over the signal, around 1/2.

    Raises:
        InputError: a frequency that so many samples do not show, or none.
    """
    if not frequencies or not all(1 <= k < size / 2 for k in frequencies):
        raise InputError(f"frequencies are {list(frequencies)}; {size} samples show 1 to {(size - 1) // 2} periods.")
    phase = torch.rand(len(frequencies), generator=_generator(seed, "phases"), dtype=torch.float64)
    place = torch.arange(size, dtype=torch.float64) / size
    waves = torch.sin(2 * math.pi * (torch.tensor(frequencies)[:, None] * place + phase[:, None])).sum(0)
    return (0.5 + 0.5 * waves / waves.abs().max()).float()


def bandlimited_noise(size: tuple[int, ...], cutoff: float, *, seed: int) -> Float[Tensor, "*size"]:
    """Uniform white noise without what lies beyond `cutoff` / sqrt 2 periods per sample; `cutoff` in (0, 1].

    Raises:
        InputError: a cutoff that leaves nothing but the mean, or is above 1.
    """
    noise = torch.rand(size, generator=_generator(seed, "noise"), dtype=torch.float64)
    lines = torch.meshgrid(*(torch.fft.fftfreq(count, dtype=torch.float64) for count in size), indexing="ij")
    inside = torch.stack([line.square() for line in lines]).sum(0).sqrt() <= cutoff / math.sqrt(2)
    if not (0 < cutoff <= 1 and int(inside.sum()) > 1):
        raise InputError(f"cutoff is {cutoff}; it must lie in (0, 1] and leave a frequency besides the mean.")
    return _unit(torch.fft.ifftn(torch.fft.fftn(noise) * inside).real)


def spheres(size: tuple[int, ...], radius: float, *, fraction: float = 0.1, seed: int) -> Float[Tensor, "*size"]:
    """Balls of `radius` (share of the longest side) at random places, until `fraction` of the grid is 1, not 0.

    Raises:
        InputError: balls that fit between the samples, so that hardly any would show.
    """
    longest, random = max(size), _generator(seed, "spheres")
    if radius * longest < 0.5:
        raise InputError(
            f"radius is {radius}; for {longest} samples it must be at least {0.5 / longest:.3g}, half of one."
        )
    places = torch.stack(torch.meshgrid(*(torch.arange(count) + 0.5 for count in size), indexing="ij"))
    inside = torch.zeros(size, dtype=torch.bool)
    while inside.double().mean() < fraction:
        centre = torch.rand(len(size), generator=random) * torch.tensor(size)
        inside |= (places - centre.reshape(-1, *[1] * len(size))).square().sum(0) <= (radius * longest) ** 2
    return inside.float()


def sierpinski(size: int, depth: int) -> Float[Tensor, "{size} {size}"]:
    """Sierpinski's triangle of 3^depth cells, right-angled: (3/4)^depth of the square is 1 where 2^depth divides it."""
    cell = torch.arange(size) * 2**depth // size
    return ((cell[:, None] & cell[None, :]) == 0).float()


def star(size: int, *, wedges: int = 40, radius: float = 0.48) -> Float[Tensor, "{size} {size}"]:
    """Siemens' star: a disc (radius as a share of the side) of white and black wedges, finer towards the middle."""
    place = torch.arange(size) + 0.5 - size / 2
    angle = torch.atan2(place[:, None], place[None, :]) / (2 * math.pi) + 0.5
    white = (angle * wedges).floor().long() % 2 == 0
    return (white & (place[:, None].square() + place[None, :].square() <= (radius * size) ** 2)).float()


class SampledTask(Task):
    """Mean squared error at samples of a signal that is at hand, on a grid; some may be held out.

    Coordinates run from -1 to just below 1, so that whole periods over the signal are frequencies of its DFT.
    """

    metric = "psnr"

    def __init__(
        self, truth: Float[Tensor, "*size C"], name: str, device: torch.device, *, keep: float = 1.0, seed: int = 0
    ) -> None:
        """Take numbers in [0, 1].

        Args:
            truth: last axis channels.
            keep: share of the samples, chosen at random, that the fit sees; the others judge it.

        Raises:
            InputError: a share that is not in (0, 1], or leaves none to fit.
        """
        size = tuple(truth.shape[:-1])
        self.channels = truth.shape[-1]
        self.names = (name,)
        self.frame = Frame(
            kind="samples",
            axes=("z", "y", "x")[-len(size) :],
            coordinate_range=((-1.0, 1.0),) * len(size),
            size=size,
            endpoint=False,
        )
        self.coords = self.frame.grid(device=device)
        self.truth = truth.reshape(1, -1, self.channels).to(device)
        self.values = self.frame.to_values(self.truth)
        count = math.floor(keep * len(self.coords))
        if not (0 < keep <= 1 and count):
            raise InputError(f"keep is {keep}; it must lie in (0, 1] and leave a sample to fit.")
        order = permutation(len(self.coords), seed=seed, purpose="kept samples")
        self.seen = order[:count].sort().values.to(device)
        """Indices of the samples that the fit sees."""
        self.held_out = order[count:].sort().values.to(device)

    @property
    def size(self) -> tuple[int, ...]:
        """Samples along each axis."""
        return tuple(self.frame.size or ())

    @property
    def points(self) -> int:
        """Samples that the fit sees."""
        return len(self.seen)

    def loss(self, fields: Field, index: Int[Tensor, " P"] | None, generator: torch.Generator) -> Float[Tensor, " N"]:
        """Mean squared error over the samples that it sees."""
        index = self.seen if index is None else self.seen[index]
        return (predict(fields, self.coords[index]) - self.values[:, index]).square().mean((-2, -1))

    def residual(self, fields: Field) -> Float[Tensor, "1 P C"]:
        """At all samples, those held out too."""
        return show(fields, self.coords) - self.values

    def evaluate(self, fields: Field) -> Evaluation:
        """PSNR at all samples, and at those held out where there are some."""
        shown = self.frame.to_data(show(fields, self.coords))
        metrics = {"psnr": psnr(shown, self.truth)}
        if len(self.held_out):
            metrics["psnr_held_out"] = psnr(shown[:, self.held_out], self.truth[:, self.held_out])
        plane = shown[0].unflatten(0, self.size)
        while plane.ndim < 3:
            plane = plane[None]
        while plane.ndim > 3:
            plane = plane[len(plane) // 2]
        return Evaluation(metrics=metrics, picture=to_bytes(plane))

    def write(self, fields: Field, folder: Path) -> list[Path]:
        """What the field shows, as an array."""
        path = folder / f"{self.names[0]}.npy"
        np.save(path, self.frame.to_data(show(fields, self.coords))[0].unflatten(0, self.size).cpu().numpy())
        return [path]
