"""Coordinates, values and subsets: what the inner loop is shown."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from mwt.config import InnerLoopConfig
from mwt.errors import InputError
from mwt.observe import grid, observe, pixels, points_per_step, random_subsets, whole
from mwt.structs import Batch, Observations


def images(count: int = 4, channels: int = 1, height: int = 5, width: int = 6, first: int = 0) -> Batch:
    grey = torch.randint(256, (count, channels, height, width), dtype=torch.uint8)
    return Batch(images=grey, labels=torch.zeros(count).long(), positions=torch.arange(first, first + count))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 2), (8, 8), (5, 11)])
def test_grid_against_numpy(height: int, width: int) -> None:
    """(y, x), both from -1 to 1 with end points, rows first."""
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    expected = np.stack([y.ravel(), x.ravel()], axis=-1)
    np.testing.assert_allclose(grid(height, width, dtype=torch.float64).numpy(), expected, rtol=0, atol=1e-15)


def test_the_corners_of_the_grid() -> None:
    corners = grid(4, 7)[[0, 6, 21, 27]].tolist()
    assert corners == [[-1, -1], [-1, 1], [1, -1], [1, 1]]


def test_grey_levels_become_values_in_row_major_order() -> None:
    image = torch.arange(24, dtype=torch.uint8).reshape(1, 2, 3, 4)
    values = pixels(image)
    assert values.shape == (1, 12, 2)
    for row in range(3):
        for column in range(4):
            for channel in range(2):
                grey = image[0, channel, row, column].item()
                assert values[0, row * 4 + column, channel].item() == pytest.approx(grey / 255 * 2 - 1, abs=1e-7)
    ends = pixels(torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1))
    assert ends.flatten().tolist() == [-1, 1]


@pytest.mark.parametrize(
    ("share", "count", "points"),
    [(1.0, 1024, 1024), (0.1, 1024, 102), (0.25, 102_400, 25_600), (0.01, 102_400, 1024), (0.00005, 32_768, 1),
     (0.001, 10, 1), (0.999, 10, 9)],
)  # fmt: skip
def test_points_per_step(share: float, count: int, points: int) -> None:
    """max(1, floor(s N)); 102 of CIFAR's 1,024, 1,024 of ImageNet's 102,400."""
    assert points_per_step(InnerLoopConfig(fraction=share), count) == points


def test_a_count_goes_before_the_share_and_cannot_exceed_the_signal() -> None:
    assert points_per_step(InnerLoopConfig(fraction=0.1, points=7), 20) == 7
    with pytest.raises(InputError, match=r"inner_loop\.points is 21, .* only 20 points.*at most 20"):
        points_per_step(InnerLoopConfig(points=21), 20)


def subsets(positions: torch.Tensor, epoch: int = 0, seed: int = 0) -> torch.Tensor:
    return random_subsets(positions, draws=4, points=6, count=20, seed=seed, purpose="subset", epoch=epoch)


def test_subsets_are_without_replacement_and_independent_by_step_signal_epoch_and_seed() -> None:
    index = subsets(torch.arange(50))
    assert index.shape == (50, 4, 6)
    assert index.min() >= 0
    assert index.max() < 20
    as_sets = [[frozenset(step.tolist()) for step in sample] for sample in index]
    assert all(len(chosen) == 6 for sample in as_sets for chosen in sample)
    # 200 of 38,760 possible subsets: by chance half a pair is alike; a shared generator would make 50 or 4 alike.
    assert len({chosen for sample in as_sets for chosen in sample}) > 190
    assert not torch.equal(subsets(torch.arange(50), epoch=1), index)
    assert not torch.equal(subsets(torch.arange(50), seed=1), index)


def test_every_point_is_chosen_equally_often_and_steps_overlap_by_chance() -> None:
    index = subsets(torch.arange(2000))
    chosen = torch.zeros(2000, 4, 20).scatter_(-1, index, 1.0)
    for step in range(4):
        # Without replacement the counts vary less than multinomial ones, by (1 - 6/20) / (1 - 1/20).
        statistic = stats.chisquare(chosen[:, step].sum(0).numpy()).statistic / (0.7 / 0.95)
        assert 1e-3 < stats.chi2(19).sf(statistic) < 1 - 1e-3
    # The overlap of two steps is hypergeometric: mean 6 * 6 / 20, variance 0.663.
    overlap = (chosen[:, 0] * chosen[:, 1]).sum(-1).mean().item()
    assert abs(overlap - 1.8) < 4 * (0.663 / 2000) ** 0.5


def test_two_processes_see_what_one_would() -> None:
    config = InnerLoopConfig(steps=3, points=9)
    batch = images(6, first=100)
    together = observe(batch, config, seed=2, epoch=5)
    assert together.index is not None
    for part in (slice(0, 3), slice(3, 6)):
        half = Batch(images=batch.images[part], labels=batch.labels[part], positions=batch.positions[part])
        alone = observe(half, config, seed=2, epoch=5)
        assert alone.index is not None
        assert torch.equal(alone.index, together.index[part])


def test_the_whole_signal_needs_no_index() -> None:
    seen = observe(images(), InnerLoopConfig(steps=3), seed=0)
    assert seen.index is None
    assert seen.coords.shape == (30, 2)
    assert observe(images(), InnerLoopConfig(points=30), seed=0).index is None
    assert whole(images()).index is None


@pytest.mark.parametrize("steps", [None, 5])
def test_an_observation_is_the_pixel_at_its_coordinate(steps: int | None) -> None:
    batch = images(channels=3)
    seen = observe(batch, InnerLoopConfig(steps=2, points=8), seed=0, steps=steps)
    assert seen.index is not None
    assert seen.index.shape == (4, (2 if steps is None else steps) + 1, 8)
    for step in range(seen.index.shape[1]):
        coords, values = seen.at(step)
        rows = ((coords[..., 0] + 1) / 2 * 4).round().long()
        columns = ((coords[..., 1] + 1) / 2 * 5).round().long()
        for b in range(4):
            grey = batch.images[b, :, rows[b], columns[b]].T.float()
            torch.testing.assert_close(values[b], grey / 127.5 - 1, rtol=0, atol=1e-6)


def test_point_sets_keep_points_and_values_together() -> None:
    coords = torch.rand(2, 12, 3)
    sums, two = coords.sum(-1, keepdim=True), torch.arange(2)
    batch = Batch(coords=coords, values=sums, labels=two, positions=two)
    seen = observe(batch, InnerLoopConfig(steps=1, points=5), seed=0)
    for step in range(2):
        points, values = seen.at(step)
        assert points.shape == (2, 5, 3)
        assert torch.equal(points.sum(-1, keepdim=True), values)


def test_points_of_each_step() -> None:
    coords, values = torch.rand(2, 3, 4, 3), torch.rand(2, 3, 4, 1)
    seen = Observations(coords=coords, values=values)
    for step in range(3):
        assert torch.equal(seen.at(step)[0], coords[:, step])
        assert torch.equal(seen.at(step)[1], values[:, step])
