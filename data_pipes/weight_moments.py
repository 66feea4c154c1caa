"""Mean and deviation of every weight over a split, shard by shard, in double precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mwt.weight_space import Layout, Weights

_AT_ONCE = 2**22  # numbers that are converted to double precision together


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Count, mean and sum of squared deviations from the mean of each of N numbers.

    Combined pairwise (Chan, Golub and LeVeque 1979): the result does not lose digits where the mean is large against
    the deviation, as sums of squares would.
    """

    count: int
    mean: Float[Tensor, " N"]
    squares: Float[Tensor, " N"]

    @staticmethod
    def of(rows: Float[Tensor, "n N"]) -> Moments:
        """Of n rows."""
        if not len(rows):
            nothing = rows.new_zeros(rows.shape[1], dtype=torch.float64)
            return Moments(count=0, mean=nothing, squares=nothing.clone())
        parts = []
        for columns in rows.split(max(1, _AT_ONCE // len(rows)), dim=1):
            exact = columns.double()
            mean = exact.mean(0)
            parts.append((mean, (exact - mean).square().sum(0)))
        means, squares = zip(*parts, strict=True)
        return Moments(count=len(rows), mean=torch.cat(means), squares=torch.cat(squares))

    def __add__(self, other: Moments) -> Moments:
        count = self.count + other.count
        if not count:
            return self
        apart = other.mean - self.mean
        share = other.count / count
        return Moments(
            count=count,
            mean=self.mean + apart * share,
            squares=self.squares + other.squares + apart.square() * (self.count * share),
        )

    @property
    def std(self) -> Float[Tensor, " N"]:
        """Standard deviation (1 / n)."""
        return (self.squares / max(1, self.count)).sqrt()


def layer_scalars(layout: Layout, mean: Weights, std: Weights) -> dict[str, dict[str, float]]:
    """Mean and standard deviation of all entries of each layer over all networks, from those of each entry [1, …]."""
    scalars = {}
    for i in range(len(layout.shapes)):
        for kind, means, stds in (("weight", mean.weights, std.weights), ("bias", mean.biases, std.biases)):
            middle, spread = means[i].double(), stds[i].double()
            variance = spread.square().mean() + middle.var(correction=0)
            scalars[f"layers.{i}.{kind}"] = {"mean": float(middle.mean()), "std": float(variance.sqrt())}
    return scalars
