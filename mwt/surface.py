"""Distance fields of surfaces that are given by points: fresh queries for every step, exact distances to them."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mwt.rng import uniform

PAIRS_AT_ONCE = 2**25
"""Distances that are held at a time on a GPU: 128 MiB."""


def ask(
    surface: Float[Tensor, "B N 3"],
    positions: Int[Tensor, " B"],
    *,
    draws: int,
    points: int,
    seed: int,
    purpose: str,
    epoch: int,
) -> tuple[Float[Tensor, "B draws P 3"], Float[Tensor, "B draws P 1"]]:
    """`draws` sets of `points` queries, uniform in the cube [-1, 1]^3, and their distances to the surface.

    All queries of a sample are independent, and a function of (seed, purpose, epoch, position of the sample) alone.
    (Released code of MWT, modelnet_dataloader.py; the values are the distances as they are, not clamped.)
    """
    numbers = uniform(positions, draws * points * 3, seed=seed, purpose=purpose, epoch=epoch)
    queries = (2 * numbers - 1).view(len(positions), draws * points, 3)
    values = distances(queries, surface)
    return queries.unflatten(1, (draws, points)), values.unflatten(1, (draws, points))[..., None]


@torch.no_grad()
def distances(queries: Float[Tensor, "B Q 3"], surface: Float[Tensor, "B N 3"]) -> Float[Tensor, "B Q"]:
    """Euclidean distance of every query to the nearest of its signal's surface points, in float32.

    By a k-d tree on the CPU, in as many threads as torch uses, which does not change the result; on other devices by
    all differences, a part at a time. No expansion of the square: near the surface it would lose most of the digits.
    """
    if queries.device.type == "cpu":
        from scipy.spatial import cKDTree  # half a second, for surfaces alone

        pairs = zip(queries.numpy(), surface.numpy(), strict=True)
        threads = torch.get_num_threads()
        found = [cKDTree(points).query(asked, workers=threads)[0] for asked, points in pairs]
        return torch.stack([torch.from_numpy(distance) for distance in found]).float()
    return by_differences(queries, surface, chunk=max(1, PAIRS_AT_ONCE // surface.shape[1]))


def by_differences(
    queries: Float[Tensor, "B Q 3"], surface: Float[Tensor, "B N 3"], *, chunk: int
) -> Float[Tensor, "B Q"]:
    """The same by all differences, of `chunk` queries of one signal at a time."""
    result = queries.new_empty(queries.shape[:2])
    for asked, points, nearest in zip(queries, surface, result, strict=True):
        axes = points.mT.contiguous()
        for start in range(0, len(asked), chunk):
            part = asked[start : start + chunk]
            squares = (part[:, :1] - axes[0]).square_()
            for axis in (1, 2):
                difference = part[:, axis : axis + 1] - axes[axis]
                squares.addcmul_(difference, difference)
            nearest[start : start + chunk] = squares.amin(1).sqrt_()
    return result
