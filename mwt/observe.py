"""From a batch of signals to what the inner loop sees: coordinates, values in [-1, 1], and the subset of each step."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from mwt.config import InnerLoopConfig
from mwt.errors import InputError
from mwt.rng import uniform
from mwt.structs import Batch, Observations
from mwt.surface import ask


def grid(
    height: int, width: int, *, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "N 2"]:
    """(y, x) of every pixel in row-major order, each axis from -1 to 1 with both end points."""
    y = torch.linspace(-1, 1, height, device=device, dtype=dtype)
    x = torch.linspace(-1, 1, width, device=device, dtype=dtype)
    return torch.cartesian_prod(y, x)


def pixels(images: UInt8[Tensor, "B C h w"]) -> Float[Tensor, "B N C"]:
    """Grey levels 0 to 255 as values -1 to 1, row-major."""
    return images.flatten(2).mT.to(torch.float32) * (2 / 255) - 1


def points_per_step(config: InnerLoopConfig, count: int) -> int:
    """P, how many of a signal's `count` points each inner step sees: max(1, floor(s * N)), or the count given.

    Raises:
        InputError: more points asked for than a signal has.
    """
    if config.points is None:
        return max(1, int(config.fraction * count))
    if config.points > count:
        raise InputError(
            f"inner_loop.points is {config.points}, but a signal of this data has only {count} points; "
            f"choose at most {count}, or null for all."
        )
    return config.points


def random_subsets(
    positions: Int[Tensor, " B"], *, draws: int, points: int, count: int, seed: int, purpose: str, epoch: int
) -> Int[Tensor, "B draws P"]:
    """`draws` independent subsets of `points` out of `count`, without replacement, for each sample."""
    noise = uniform(positions, draws * count, seed=seed, purpose=purpose, epoch=epoch)
    return noise.view(len(positions), draws, count).topk(points, dim=-1, sorted=False).indices


def observe(
    batch: Batch,
    config: InnerLoopConfig,
    *,
    seed: int,
    epoch: int = 0,
    purpose: str = "subset",
    steps: int | None = None,
) -> Observations:
    """Observations of a batch: all points for every step if s = 1, else fresh subsets for each of the S + 1 steps.

    Of surfaces (`coords` without `values`) every step sees s * N fresh queries anywhere in the cube [-1, 1]^3.
    The subsets and the queries depend on (seed, purpose, epoch, position of the sample) alone.

    Args:
        steps: S, if other than the configured number of inner steps.
    """
    steps = config.steps if steps is None else steps
    if batch.images is not None:
        coords: Tensor
        coords = grid(*batch.images.shape[-2:], device=batch.images.device) if batch.coords is None else batch.coords
        values = pixels(batch.images)
    elif batch.values is None:
        assert batch.coords is not None, "a batch has images, or coords and values, or the coords of surfaces"
        points = points_per_step(config, batch.coords.shape[1])
        if batch.queries is not None and batch.distances is not None:
            assert batch.queries.shape[1:3] == (steps + 1, points), "asked ahead for other steps than these"
            return Observations(coords=batch.queries, values=batch.distances)
        coords, values = ask(
            batch.coords, batch.positions, draws=steps + 1, points=points, seed=seed, purpose=purpose, epoch=epoch
        )
        return Observations(coords=coords, values=values)
    else:
        assert batch.coords is not None, "a batch has images, or coords and values"
        coords, values = batch.coords, batch.values
    count = values.shape[1]
    points = points_per_step(config, count)
    if points == count:
        return Observations(coords=coords, values=values)
    index = random_subsets(
        batch.positions, draws=steps + 1, points=points, count=count, seed=seed, purpose=purpose, epoch=epoch
    )
    return Observations(coords=coords, values=values, index=index)


def asked_ahead(batch: Batch, config: InnerLoopConfig, *, seed: int, epoch: int) -> Batch:
    """The batch with what `observe` says of it for training; for surfaces, whose nearest points take time to find.

    For a thread that works while the step before runs: the numbers are the same whoever asks, and when.
    """
    seen = observe(batch, config, seed=seed, epoch=epoch)
    return replace(batch, queries=seen.coords, distances=seen.values)


def whole(batch: Batch) -> Observations:
    """Every point of every signal, for measuring a fit."""
    return observe(batch, InnerLoopConfig(), seed=0)
