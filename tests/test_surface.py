"""mwt.surface: distances against SciPy, torch.cdist and closed forms; queries by (seed, purpose, epoch, position)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist
from scipy.stats import kstest
from torch import Tensor

from data_pipes.augment import augment
from mwt.config import InnerLoopConfig
from mwt.observe import asked_ahead, observe
from mwt.structs import Batch
from mwt.surface import by_differences, distances
from mwt.training import _micro_batches

POINTS = 300


def batch(*positions: int, points: int = POINTS) -> Batch:
    """Surfaces that depend on their positions."""
    surfaces = [torch.randn(points, 3, generator=torch.Generator().manual_seed(p)) / 3 for p in positions]
    return Batch(labels=torch.zeros(len(positions), dtype=torch.int64), positions=torch.tensor(positions),
                 coords=torch.stack(surfaces))  # fmt: skip


def test_distances_are_those_of_scipy() -> None:
    numbers = torch.Generator().manual_seed(0)
    shape = torch.randn(3, 500, 3, generator=numbers)
    queries = torch.rand(3, 70, 3, generator=numbers) * 2 - 1
    queries[0, :5] = shape[0, :5] + 1e-6
    expected = np.stack([cdist(q.double(), s.double()).min(1) for q, s in zip(queries, shape, strict=True)])
    torch.testing.assert_close(distances(queries, shape).double(), torch.from_numpy(expected), rtol=1e-6, atol=1e-9)
    for chunk in (1, 32, 1000):
        found = by_differences(queries, shape, chunk=chunk)
        torch.testing.assert_close(found.double(), torch.from_numpy(expected), rtol=1e-6, atol=1e-9)


def test_threads_do_not_change_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as torch uses, and bit for bit the same."""
    asked = []

    class Tree(cKDTree):  # type: ignore[misc]
        def query(self, *arguments: Any, **options: Any) -> Any:
            asked.append(options["workers"])
            return super().query(*arguments, **options)

    monkeypatch.setattr("scipy.spatial.cKDTree", Tree)
    shape, queries = torch.rand(2, 5000, 3), torch.rand(2, 20_000, 3)
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)  # noqa: B023
        found.append(distances(queries, shape))
    assert asked == [1, 1, 3, 3]
    assert torch.equal(*found)


@pytest.mark.gpu
def test_distances_on_a_gpu_are_those_on_the_cpu() -> None:
    shape = torch.rand(2, 32768, 3)
    queries = torch.rand(2, 3000, 3) * 2 - 1
    torch.testing.assert_close(distances(queries.cuda(), shape.cuda()).cpu(), distances(queries, shape))


def see(signals: Batch, fraction: float = 0.1, steps: int = 3, **address: int | str) -> tuple[Tensor, Tensor]:
    config = InnerLoopConfig(steps=steps, fraction=fraction)
    seen = observe(signals, config, **{"seed": 0, "epoch": 0, "purpose": "subset", **address})
    assert seen.index is None
    for step in range(steps + 1):
        coords, values = seen.at(step)
        torch.testing.assert_close(values[..., 0], distances(coords, signals.coords))
    return seen.coords, seen.values


def test_every_step_has_queries_of_its_own() -> None:
    coords, values = see(batch(4, 9))
    assert coords.shape == (2, 4, 30, 3)
    assert values.shape == (2, 4, 30, 1)
    assert len(coords.flatten(0, 2).unique(dim=0)) == 2 * 4 * 30
    assert see(batch(4), fraction=1.0)[0].shape == (1, 4, POINTS, 3)
    assert observe(batch(4), InnerLoopConfig(steps=1, points=7), seed=0).values.shape == (1, 2, 7, 1)


def test_what_is_asked_ahead_is_what_the_step_would_ask() -> None:
    """Bit for bit, also in micro batches; for another number of steps or points it is not taken."""
    config, signals = InnerLoopConfig(steps=3, fraction=0.1), batch(4, 9, 2)
    then = observe(signals, config, seed=5, epoch=2)
    ahead = asked_ahead(signals, config, seed=5, epoch=2)
    now = observe(ahead, config, seed=5, epoch=2)
    assert torch.equal(now.coords, then.coords)
    assert torch.equal(now.values, then.values)
    parts = [observe(part, config, seed=5, epoch=2) for part in _micro_batches(ahead, 2)]
    assert torch.equal(torch.cat([part.values for part in parts]), then.values)
    for other in (InnerLoopConfig(steps=2, fraction=0.1), InnerLoopConfig(steps=3, fraction=0.2)):
        with pytest.raises(AssertionError, match="asked ahead for other steps"):
            observe(ahead, other, seed=5, epoch=2)


def test_queries_are_uniform_in_the_cube() -> None:
    coords = observe(batch(*range(8)), InnerLoopConfig(steps=3, fraction=1.0), seed=1).coords.reshape(-1, 3).numpy()
    assert coords.min() >= -1
    assert coords.max() < 1
    for axis in range(3):
        assert kstest(coords[:, axis], "uniform", args=(-1, 2)).pvalue > 0.01
    assert np.abs(np.corrcoef(coords.T) - np.eye(3)).max() < 0.03


def test_queries_depend_on_seed_purpose_epoch_and_position_alone() -> None:
    coords, values = see(batch(4, 9, 2))
    alone = see(batch(9))
    assert torch.equal(alone[0][0], coords[1])
    assert torch.equal(alone[1][0], values[1])
    for address in ({"seed": 1}, {"epoch": 1}, {"purpose": "evaluate"}):
        assert not (see(batch(9), **address)[0] == alone[0]).any()


def test_augmentation_moves_the_surface_before_it_is_asked() -> None:
    """One factor in 0.9 … 1.1 for a shape, normal noise of 0.01 for each coordinate of each point."""
    signals = batch(*range(40), points=2000)
    assert signals.coords is not None
    moved = augment(signals, "points", seed=0, epoch=3).coords
    assert moved is not None
    factors, noise = [], []
    for before, after in zip(signals.coords.double(), moved.double(), strict=True):
        factor = (before * after).sum() / before.square().sum()
        factors.append(float(factor))
        noise.append((after - factor * before).flatten())
    assert 0.899 < min(factors) < 0.91
    assert 1.09 < max(factors) < 1.101
    assert kstest(factors, "uniform", args=(0.9, 0.2)).pvalue > 0.01
    assert kstest(torch.cat(noise).numpy(), "norm", args=(0, 0.01)).pvalue > 0.01
    see(augment(signals, "points", seed=0, epoch=3))
    again = augment(batch(7, points=2000), "points", seed=0, epoch=3).coords
    assert torch.equal(again[0], moved[7])
    assert not torch.equal(augment(batch(7, points=2000), "points", seed=0, epoch=4).coords, again)
