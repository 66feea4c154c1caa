"""Random numbers that depend on (seed, purpose, epoch, position of the sample) and on nothing else.

Ordinary generators hand out numbers in the order of the calls, so that a second process or a resumed run sees others.
Here a number is a hash of its address: whoever asks, on whatever device, gets the same one. The hash is SplitMix64
(Steele, Lea and Flood 2014), written in wrapping int64 arithmetic, which CPUs and GPUs share.
"""

from __future__ import annotations

import hashlib

import torch
from jaxtyping import Float, Int
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def derived_seed(seed: int, purpose: str, epoch: int = 0) -> int:
    """A 63-bit seed for one purpose, for `torch.Generator` and for `uniform`; other purposes get unrelated seeds."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # logical, not arithmetic


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def uniform(
    positions: Int[Tensor, " B"], count: int, *, seed: int, purpose: str, epoch: int = 0
) -> Float[Tensor, "B count"]:
    """`count` float32 numbers in [0, 1) for each position, equal on every device and in every process."""
    state = _mix(positions.long() * _GOLDEN + derived_seed(seed, purpose, epoch))
    counter = torch.arange(1, count + 1, device=positions.device, dtype=torch.int64) * _GOLDEN
    return _shift(_mix(state[:, None] + counter), 40).to(torch.float32) * 2.0**-24


def permutation(count: int, *, seed: int, purpose: str, epoch: int = 0) -> Int[Tensor, " count"]:
    """A random order of `count` things, on the CPU; equal in every process."""
    generator = torch.Generator().manual_seed(derived_seed(seed, purpose, epoch))
    return torch.randperm(count, generator=generator)
