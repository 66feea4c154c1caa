"""The digits of ASMR: which bases for how many samples.

The number x of a sample along an axis of N = B_0 B_1 ... B_(L-1) samples is written with L digits, the coarsest first:
digit i is floor(x / G_i) mod B_i, with G_i = B_(i+1) ... B_(L-1). The last base is the side of a tile, within which all
but the last hidden layer's activations are shared. (Li et al. 2024, section 3.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

from mwt.errors import InputError

Bases = tuple[tuple[int, ...], ...]
"""Of every axis, the coarsest first."""

PADDING, ENOUGH = 8.0, 0.5
"""Of the choice of bases: what padding costs, as a multiple of its logarithm, and what is good enough."""


def bases_for(size: tuple[int, ...], given: Bases | None, layers: int | None) -> Bases:
    """The given bases, or those that `choose_bases` finds, for each axis of `size`.

    Given ones for each axis that fit only with the last two axes exchanged are exchanged: those for pictures of
    512 x 768 do for 768 x 512 too.

    Raises:
        InputError: given ones that do not fit the number of axes or the size.
    """
    if given is None:
        return tuple(choose_bases(samples, layers or 4) for samples in size)
    if len(given) not in (1, len(size)):
        raise InputError(
            f"asmr.bases has {len(given)} lists for {len(size)} axes; give 1, or one per axis, as [[4, 4, 4, 8]]."
        )
    bases = given * (len(size) // len(given))
    turned = (*bases[:-2], *bases[-2:][::-1])
    if not _enough(bases, size) and _enough(turned, size):
        bases = turned
    for axis, (samples, own) in enumerate(zip(size, bases, strict=True)):
        if math.prod(own) < samples:
            hint = " x ".join(map(str, choose_bases(samples, len(own))))
            raise InputError(
                f"asmr.bases {list(own)} count to {math.prod(own):,}, and axis {axis} has {samples:,} samples; "
                f"{hint} would do."
            )
    return bases


def _enough(bases: Bases, size: tuple[int, ...]) -> bool:
    return all(math.prod(own) >= samples for samples, own in zip(size, bases, strict=True))


@cache
def choose_bases(samples: int, layers: int) -> tuple[int, ...]:
    """Bases for so many samples, or for a larger number that has better ones (a prime has none); rising.

    The work of a sample falls with the last base to the power of the dimensions, for the last hidden layer is computed
    once a tile; but a tile is told from its neighbours by one linear modulation only, so that a side far above the
    published ones (about the cube root of the size) shows less. Hence the last base is to be near the cube root (the
    square root where there are two layers), and the others, which cost little, near each other:

        |log(B_(L-1) / N^(1/3))| + log(max / min of the others) / 4

    is below 1/2, or least when 8 log(N / samples) is added for padding. For 512, 768 and 8,192 samples with 4, 4 and 6
    layers: 4 4 4 8, 4 4 6 8 (both as published) and 2 4 4 4 4 16.
    """
    best, cost = (1,) * (layers - 1) + (samples,), math.inf
    padded = samples
    while (padding := PADDING * math.log(padded / samples)) < cost:
        for found in factorisations(padded, layers):
            *others, last = found
            own = padding + abs(math.log(last / padded ** (1 / min(layers, 3)))) + math.log(others[-1] / others[0]) / 4
            if own < cost:
                best, cost = found, own
        if cost - padding < ENOUGH:
            return best
        padded += 1
    return best


def factorisations(number: int, count: int, least: int = 1) -> Iterator[tuple[int, ...]]:
    """All ways to write a number as a product of `count` rising factors from `least` on."""
    if count == 1:
        if number >= least:
            yield (number,)
        return
    for factor in range(least, number + 1):
        if factor**count > number:
            return
        if number % factor == 0:
            for rest in factorisations(number // factor, count - 1, factor):
                yield (factor, *rest)
