"""Addressed random numbers against SplitMix64 in plain Python integers, whose published outputs come first."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from scipy import stats

from mwt.rng import derived_seed, permutation, uniform

MASK = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15


def mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def splitmix64(seed: int, count: int) -> list[int]:
    return [mix((seed + k * GAMMA) & MASK) for k in range(1, count + 1)]


def seed_of(seed: int, purpose: str, epoch: int) -> int:
    digest = hashlib.sha256(f"{seed}/{purpose}/{epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def test_the_reference_here_gives_the_published_outputs() -> None:
    """Seed 1234567 (Vigna's splitmix64.c, as quoted by Rosetta Code and by many libraries' tests)."""
    assert splitmix64(1234567, 5) == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_numbers_are_splitmix64_s() -> None:
    positions = torch.tensor([0, 1, 7, 1_281_166, 2**40])
    numbers = uniform(positions, 33, seed=3, purpose="subset", epoch=2)
    for row, position in zip(numbers, positions.tolist(), strict=True):
        start = mix((position * GAMMA + seed_of(3, "subset", 2)) & MASK)
        expected = [(z >> 40) * 2.0**-24 for z in splitmix64(start, 33)]
        assert row.tolist() == expected  # 24 bits are exact in float32


def test_derived_seeds_fit_a_generator_and_differ() -> None:
    seeds = {derived_seed(s, p, e) for s in (0, 1) for p in ("order", "subset", "augment") for e in range(4)}
    assert len(seeds) == 24
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derived_seed(5, "order", 1) == seed_of(5, "order", 1)


def test_a_number_depends_on_its_address_alone() -> None:
    """Neither the batch nor its order enters, so no rank and no resume does."""
    whole = uniform(torch.arange(10), 6, seed=1, purpose="x", epoch=4)
    parts = torch.cat([uniform(torch.arange(5), 6, seed=1, purpose="x", epoch=4)] + [
        uniform(torch.tensor([p]), 6, seed=1, purpose="x", epoch=4) for p in range(5, 10)
    ])  # fmt: skip
    assert torch.equal(whole, parts)
    assert torch.equal(uniform(torch.arange(10).flip(0), 6, seed=1, purpose="x", epoch=4), whole.flip(0))
    assert torch.equal(uniform(torch.arange(10), 3, seed=1, purpose="x", epoch=4), whole[:, :3])
    assert torch.equal(uniform(torch.arange(10, dtype=torch.int32), 6, seed=1, purpose="x", epoch=4), whole)
    for other in ({"seed": 2}, {"purpose": "y"}, {"epoch": 5}):
        changed = uniform(torch.arange(10), 6, **{"seed": 1, "purpose": "x", "epoch": 4, **other})
        assert not (changed == whole).any()


def test_numbers_are_uniform_and_neighbours_unrelated() -> None:
    numbers = uniform(torch.arange(400), 500, seed=0, purpose="test").double().numpy()
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts, _ = np.histogram(numbers, bins=100, range=(0, 1))
    assert stats.chisquare(counts).pvalue > 1e-3
    # Correlations of 200,000 independent pairs have standard deviation 0.0022; five of them.
    assert abs(np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]) < 0.011
    assert abs(np.corrcoef(numbers[:, :-1].ravel(), numbers[:, 1:].ravel())[0, 1]) < 0.011


def test_permutations() -> None:
    order = permutation(50, seed=0, purpose="order", epoch=1)
    assert sorted(order.tolist()) == list(range(50))
    torch.manual_seed(99)
    assert torch.equal(permutation(50, seed=0, purpose="order", epoch=1), order)
    assert not torch.equal(permutation(50, seed=0, purpose="order", epoch=2), order)
