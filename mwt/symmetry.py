"""Symmetries of SIREN weights: other weights that draw the same field, and weights that draw it moved.

Hidden neurons have no order: permuting the rows and the bias of layer i together with the columns of layer i + 1
changes nothing. Sine is odd: the sign of a hidden neuron's row and bias may be flipped with that of the column after
it. And sin(z + pi) = -sin(z): a neuron's phase omega b may be shifted by pi if the column after it changes its sign.
All are statements about whole weights: offsets from a base may be permuted and flipped if their base is too, while a
phase is no property of an offset.

Functions take a batch of networks and keep it: permutations, signs and turns are given for each hidden layer, as
[B, neurons], or [1, neurons] for all networks alike. They are differentiable in the weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mwt.errors import InputError
from mwt.weight_space import Layout, Weights

Permutations = tuple[Int[Tensor, "_ _"], ...]
Signs = tuple[Float[Tensor, "_ _"], ...]


def random_permutations(layout: Layout, generator: torch.Generator, count: int = 1) -> Permutations:
    """A random order of the neurons of each hidden layer [count, neurons], on the generator's device."""
    device = generator.device
    return tuple(torch.rand(count, n, generator=generator, device=device).argsort(-1) for n in layout.hidden)


def random_signs(layout: Layout, generator: torch.Generator, count: int = 1) -> Signs:
    """+1 or -1 for every hidden neuron [count, neurons], on the generator's device."""
    device = generator.device
    return tuple(torch.randint(2, (count, n), generator=generator, device=device) * 2.0 - 1.0 for n in layout.hidden)


def _check(per_layer: Sequence[Tensor], weights: Weights, what: str) -> None:
    found, expected = [x.shape[-1] for x in per_layer], [b.shape[-1] for b in weights.biases[:-1]]
    if found != expected:
        raise InputError(f"the {what} are of hidden layers of {found} neurons; these networks have {expected}.")


def permute_neurons(weights: Weights, permutations: Permutations) -> Weights:
    """The same fields with the hidden neurons in another order: new neuron j is old neuron permutation[j].

    Rows and bias of a layer move together with the columns of the next.

    Raises:
        InputError: permutations of layers of other widths.
    """
    _check(permutations, weights, "permutations")
    matrices, biases = list(weights.weights), list(weights.biases)
    for i, order in enumerate(permutations):
        matrices[i] = matrices[i].take_along_dim(order[:, :, None], 1)
        biases[i] = biases[i].take_along_dim(order, 1)
        matrices[i + 1] = matrices[i + 1].take_along_dim(order[:, None, :], 2)
    return Weights(tuple(matrices), tuple(biases))


def flip_signs(weights: Weights, signs: Signs) -> Weights:
    """The same fields with rows, biases and following columns of the hidden neurons multiplied by +1 or -1.

    Raises:
        InputError: signs of layers of other widths.
    """
    _check(signs, weights, "signs")
    matrices, biases = list(weights.weights), list(weights.biases)
    for i, given in enumerate(signs):
        sign = given.to(biases[i].dtype)
        matrices[i], biases[i] = matrices[i] * sign[:, :, None], biases[i] * sign
        matrices[i + 1] = matrices[i + 1] * sign[:, None, :]
    return Weights(tuple(matrices), tuple(biases))


def shift_phases(weights: Weights, layout: Layout, turns: tuple[Int[Tensor, "_ _"], ...]) -> Weights:
    """The same fields with whole half turns added to the phases: b + turns * pi / omega, columns times (-1)^turns.

    Raises:
        InputError: turns of layers of other widths.
    """
    _check(turns, weights, "turns")
    matrices, biases = list(weights.weights), list(weights.biases)
    for i, (half_turns, omega) in enumerate(zip(turns, layout.omegas, strict=True)):
        biases[i] = biases[i] + half_turns.to(biases[i].dtype) * (math.pi / omega)
        matrices[i + 1] = matrices[i + 1] * (1 - 2 * (half_turns % 2))[:, None, :]
    return Weights(tuple(matrices), tuple(biases))


def reduce_phases(weights: Weights, layout: Layout) -> Weights:
    """The same fields with every phase omega b in [-pi/2, pi/2]. Exact but for rounding."""
    phases = zip(weights.biases[:-1], layout.omegas, strict=True)
    return shift_phases(weights, layout, tuple(-(b.detach() * omega / math.pi).round().long() for b, omega in phases))


def _order(matrix: Float[Tensor, "B out in"], bias: Float[Tensor, "B out"]) -> Int[Tensor, "B out"]:
    """Order of the neurons by bias; where two biases are equal, by the row, first weight first."""
    order = bias.argsort(dim=-1, stable=True)
    if bool((bias.take_along_dim(order, 1).diff(dim=1) != 0).all()):
        return order
    order = torch.arange(bias.shape[1], device=bias.device).expand_as(bias)
    for key in (*matrix.flip(-1).unbind(-1), bias):  # stable sorts, the least important key first
        order = order.take_along_dim(key.take_along_dim(order, 1).argsort(dim=-1, stable=True), 1)
    return order


def canonical(weights: Weights, *, signs: bool = True) -> Weights:
    """One representative of all orders, and with `signs` all signs, of the hidden neurons: equal bit by bit.

    Layer by layer from the input: the sign makes a neuron's bias positive, or, where that is 0, the first weight of its
    row that is not; then neurons are sorted by bias, ties by the row. The choice is unique except for two neurons of
    one layer with the same row and bias (the order of their columns then stays as it came), and for a neuron whose row
    and bias are all 0 (the sign of its column does). Phases are left alone: `reduce_phases` first, up to rounding.
    """
    matrices, biases = list(weights.weights), list(weights.biases)
    for i in range(len(matrices) - 1):
        matrix, bias = matrices[i].detach(), biases[i].detach()
        sign = torch.ones_like(bias)
        if signs:
            keys = torch.cat([bias[..., None], matrix], dim=-1)
            first = (keys != 0).to(torch.int8).argmax(-1, keepdim=True)  # the first of the greatest
            sign = torch.where(keys.take_along_dim(first, -1)[..., 0] < 0, -1.0, 1.0).to(bias)
        order = _order(matrix * sign[..., None], bias * sign)
        matrices[i] = (matrices[i] * sign[..., None]).take_along_dim(order[:, :, None], 1)
        biases[i] = (biases[i] * sign).take_along_dim(order, 1)
        matrices[i + 1] = (matrices[i + 1] * sign[:, None, :]).take_along_dim(order[:, None, :], 2)
    return Weights(tuple(matrices), tuple(biases))


class Alignment(NamedTuple):
    """Networks brought near to a reference: flip_signs(permute_neurons(networks, permutations), signs)."""

    weights: Weights
    permutations: Permutations
    signs: Signs


@torch.no_grad()
def align(weights: Weights, reference: Weights, *, signs: bool = True, sweeps: int = 20) -> Alignment:
    """The order (and the signs) of the hidden neurons that brings each network near to a reference network.

    Weight matching (Ainsworth, Hayase and Srinivasa 2023, Git Re-Basin, algorithm 1): maximise the inner product of
    all weights and biases with the reference's, one hidden layer at a time as a linear assignment, until none changes.
    A neuron's sign is free and enters its assignment as the absolute value. The first sweep goes from input to output
    and looks at rows and biases alone, so that a permuted copy is recovered exactly; the result is a local optimum.

    Args:
        reference: B networks, or one for all.
        signs: whether signs are matched too; False for networks whose activation is not odd.
        sweeps: how often the layers are gone through at most.
    """
    aligned, hidden = weights, len(weights.biases) - 1
    device = weights.biases[0].device
    permutations = [torch.arange(b.shape[1], device=device).expand_as(b).clone() for b in weights.biases[:-1]]
    flips = [torch.ones_like(b) for b in weights.biases[:-1]]
    for sweep in range(sweeps + 1):
        changed = False
        for i in range(hidden):
            near = reference.weights[i] @ aligned.weights[i].mT
            near = near + reference.biases[i][:, :, None] * aligned.biases[i][:, None, :]
            if sweep:
                near = near + reference.weights[i + 1].mT @ aligned.weights[i + 1]
            score = (near.abs() if signs else near).cpu().double().numpy()
            order = torch.stack([torch.from_numpy(linear_sum_assignment(s, maximize=True)[1]) for s in score])
            order = order.to(device)
            best = near.take_along_dim(order[:, :, None], 2)[..., 0]
            sign = torch.where(best < 0, -1.0, 1.0).to(best) if signs else torch.ones_like(best)
            permutations[i] = permutations[i].take_along_dim(order, 1)
            flips[i] = flips[i].take_along_dim(order, 1) * sign
            permuted = permute_neurons(weights, tuple(permutations))
            aligned = flip_signs(permuted, tuple(flips))
            changed |= bool((order != torch.arange(order.shape[1], device=device)).any() or (sign < 0).any())
        if sweep and not changed:
            break
    return Alignment(aligned, tuple(permutations), tuple(flips))


def move_coordinates(
    weights: Weights, matrix: Float[Tensor, "_ D D"] | None = None, shift: Float[Tensor, "_ D"] | None = None
) -> Weights:
    """Networks that draw at x what these draw at matrix @ x + shift: W_0 matrix and b_0 + W_0 shift. Exact.

    A matrix (or shift) a network, or one for all. A rotation turns the picture the other way about the origin of the
    coordinates; matrix c shrinks it by c; a shift t moves it by -t.
    """
    first, bias = weights.weights[0], weights.biases[0]
    if shift is not None:
        bias = bias + (first @ shift[:, :, None].to(first))[..., 0]
    if matrix is not None:
        first = first @ matrix.to(first)
    return Weights((first, *weights.weights[1:]), (bias, *weights.biases[1:]))


@dataclass(frozen=True, kw_only=True)
class WeightAugmentation:
    """How far `augment` goes. Defaults are those of Navon et al. (2023); 0 switches one off."""

    translation: float = 0.25
    """Each coordinate of the shift is uniform in +- this."""
    rotation: float = 45.0
    """Degrees; the angle is uniform in +- this. Fields of two coordinates only."""
    scaling: float = 0.2
    """Coordinates are multiplied by a factor uniform in 1 +- this."""
    noise: float = 0.1
    """Standard deviation of the Gaussian noise on each tensor, in standard deviations of that network's tensor."""
    dropout: float = 0.01
    """Probability of a weight or bias of being set to 0. The others keep their values."""


def augment(weights: Weights, generator: torch.Generator, options: WeightAugmentation | None = None) -> Weights:
    """Randomly changed networks for training: the field moved, turned and scaled, then its weights disturbed.

    Each network gets numbers of its own. Moving, turning and scaling are exact (`move_coordinates`). The released
    code of Navon et al. differs in three points: it also shifts biases of deeper layers, which is no translation of
    the field; its noise is the same constant for all of a tensor; its dropout scales the other weights.
    """
    options = options or WeightAugmentation()
    first = weights.weights[0]
    count, _, dims = first.shape

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=first.dtype, device=generator.device).to(first) * 2 - 1

    matrix = torch.eye(dims).to(first) * (1 + options.scaling * uniform(count))[:, None, None]
    if dims == 2:
        angle = uniform(count) * math.radians(options.rotation)
        cos, sin = angle.cos(), angle.sin()
        matrix = matrix @ torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2))
    weights = move_coordinates(weights, matrix, options.translation * uniform(count, dims))

    def disturb(x: Tensor) -> Tensor:
        every = tuple(range(1, x.ndim))
        like = {"generator": generator, "dtype": x.dtype, "device": generator.device}
        if options.noise:
            spread = x.std(every, keepdim=True, correction=0) * options.noise
            x = x + spread * torch.randn(x.shape, **like).to(x)  # type: ignore[call-overload]
        if options.dropout:
            keep = torch.rand(x.shape, **like).to(x) >= options.dropout  # type: ignore[call-overload]
            x = x * keep
        return x

    return weights.map(disturb)
