"""Symmetries of SIREN weights, checked by what the networks draw."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mwt.errors import InputError
from mwt.symmetry import (
    WeightAugmentation,
    align,
    augment,
    canonical,
    flip_signs,
    move_coordinates,
    permute_neurons,
    random_permutations,
    random_signs,
    reduce_phases,
    shift_phases,
)
from mwt.weight_space import Layout, Weights, render

LAYOUT = Layout(sizes=(2, 8, 6, 7, 3), omegas=(30.0, 7.0, 1.0), shared_output=False)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.fixture
def weights(generator: torch.Generator) -> Weights:
    flat = torch.randn(5, LAYOUT.count, generator=generator, dtype=torch.float64) / 3
    return Weights.unflatten(flat, LAYOUT)


@pytest.fixture
def coords(generator: torch.Generator) -> Tensor:
    return torch.rand(11, 2, generator=generator, dtype=torch.float64) * 2 - 1


def assert_same_weights(a: Weights, b: Weights) -> None:
    torch.testing.assert_close(a.flat(), b.flat(), rtol=0, atol=0)


@pytest.mark.parametrize("count", [1, 5])
def test_permuted_and_flipped_networks_draw_the_same(
    weights: Weights, coords: Tensor, generator: torch.Generator, count: int
) -> None:
    drawn = render(LAYOUT, weights, coords)
    permuted = permute_neurons(weights, random_permutations(LAYOUT, generator, count))
    flipped = flip_signs(weights, random_signs(LAYOUT, generator, count))
    for other in (permuted, flipped):
        assert (other.flat() != weights.flat()).sum() > weights.flat().numel() / 3
        torch.testing.assert_close(render(LAYOUT, other, coords), drawn, rtol=0, atol=1e-10)


def test_one_layer_permuted_alone_draws_something_else(weights: Weights, coords: Tensor) -> None:
    drawn = render(LAYOUT, weights, coords)
    rows = (weights.weights[0].flip(1), *weights.weights[1:])
    assert (render(LAYOUT, Weights(rows, weights.biases), coords) - drawn).abs().max() > 0.1
    signs = (-weights.weights[0], *weights.weights[1:])
    assert (render(LAYOUT, Weights(signs, weights.biases), coords) - drawn).abs().max() > 0.1


def test_permutations_against_matrix_products(weights: Weights, generator: torch.Generator) -> None:
    permutations = random_permutations(LAYOUT, generator, 5)
    permuted = permute_neurons(weights, permutations)
    for signal in range(5):
        matrices = [torch.eye(2), *[torch.eye(len(p[signal]))[p[signal]] for p in permutations], torch.eye(3)]
        for i, (w, b) in enumerate(zip(*weights, strict=True)):
            before, after = matrices[i].double(), matrices[i + 1].double()
            assert torch.equal(permuted.weights[i][signal], after @ w[signal] @ before.T)
            assert torch.equal(permuted.biases[i][signal], after @ b[signal])


def test_half_turns_of_the_phase(weights: Weights, coords: Tensor, generator: torch.Generator) -> None:
    turns = tuple(torch.randint(-3, 4, (5, n), generator=generator) for n in LAYOUT.hidden)
    shifted = shift_phases(weights, LAYOUT, turns)
    drawn = render(LAYOUT, weights, coords)
    torch.testing.assert_close(render(LAYOUT, shifted, coords), drawn, rtol=0, atol=1e-10)
    reduced = reduce_phases(shifted, LAYOUT)
    torch.testing.assert_close(render(LAYOUT, reduced, coords), drawn, rtol=0, atol=1e-10)
    for bias, omega in zip(reduced.biases[:-1], LAYOUT.omegas, strict=True):
        assert (bias * omega).abs().max() <= math.pi / 2 + 1e-9
    torch.testing.assert_close(reduced.flat(), reduce_phases(weights, LAYOUT).flat(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("zero_biases", [False, True])
def test_copies_have_one_canonical_form(
    weights: Weights, coords: Tensor, generator: torch.Generator, zero_biases: bool
) -> None:
    if zero_biases:  # as at initialisation: signs and order then follow the rows
        weights = Weights(weights.weights, tuple(torch.zeros_like(b) for b in weights.biases))
    form = canonical(weights)
    for _ in range(3):
        copy = permute_neurons(weights, random_permutations(LAYOUT, generator, 5))
        copy = flip_signs(copy, random_signs(LAYOUT, generator, 5))
        assert not torch.equal(copy.flat(), weights.flat())
        assert_same_weights(canonical(copy), form)
    torch.testing.assert_close(render(LAYOUT, form, coords), render(LAYOUT, weights, coords), rtol=0, atol=1e-10)
    assert not torch.equal(
        canonical(flip_signs(weights, random_signs(LAYOUT, generator)), signs=False).flat(), form.flat()
    )
    assert all(bool((b.diff(dim=1) >= 0).all()) for b in form.biases[:-1])


def test_alignment_recovers_a_permutation(weights: Weights, generator: torch.Generator) -> None:
    permutations, signs = random_permutations(LAYOUT, generator, 5), random_signs(LAYOUT, generator, 5)
    copy = flip_signs(permute_neurons(weights, permutations), signs)
    found = align(copy, weights)
    assert_same_weights(found.weights, weights)
    for there, back in zip(permutations, found.permutations, strict=True):
        assert torch.equal(there.take_along_dim(back, 1), torch.arange(there.shape[1]).expand_as(there))
    assert_same_weights(flip_signs(permute_neurons(copy, found.permutations), found.signs), found.weights)
    one = Weights(*(tuple(x[:1] for x in part) for part in weights))
    noise = Weights.unflatten(0.01 * torch.randn(5, LAYOUT.count, generator=generator, dtype=torch.float64), LAYOUT)
    noisy = permute_neurons(one.map(lambda x: x.repeat_interleave(5, 0)), permutations)
    noisy = Weights.unflatten(noisy.flat() + noise.flat(), LAYOUT)
    again = align(noisy, one, signs=False)
    assert (again.weights.flat() - one.flat()).abs().max() < 0.06
    assert all(bool((s == 1).all()) for s in again.signs)


def test_alignment_of_unrelated_networks_brings_them_nearer(weights: Weights, coords: Tensor) -> None:
    reference = Weights(*(tuple(x[:1] for x in part) for part in weights))
    found = align(weights, reference)
    before, after = ((x.flat() - reference.flat()).norm(dim=1) for x in (weights, found.weights))
    assert (after[1:] < before[1:]).all()
    assert after[0] == 0
    torch.testing.assert_close(
        render(LAYOUT, found.weights, coords), render(LAYOUT, weights, coords), rtol=0, atol=1e-10
    )


def test_moved_coordinates_against_moved_points(weights: Weights, coords: Tensor, generator: torch.Generator) -> None:
    matrix = torch.randn(5, 2, 2, generator=generator, dtype=torch.float64)
    shift = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    drawn = render(LAYOUT, move_coordinates(weights, matrix, shift), coords)
    points = torch.stack([coords @ m.T + s for m, s in zip(matrix, shift, strict=True)])
    torch.testing.assert_close(drawn, render(LAYOUT, weights, points), rtol=0, atol=1e-9)


def test_an_augmented_field_is_a_similar_image(weights: Weights, generator: torch.Generator) -> None:
    moved = augment(weights, generator, WeightAugmentation(noise=0.0, dropout=0.0))
    assert_same_weights(Weights(moved.weights[1:], moved.biases[1:]), Weights(weights.weights[1:], weights.biases[1:]))
    for old, new, old_bias, new_bias in zip(
        weights.weights[0], moved.weights[0], weights.biases[0], moved.biases[0], strict=True
    ):
        matrix = torch.linalg.lstsq(old, new).solution
        factor = torch.linalg.det(matrix).sqrt()
        torch.testing.assert_close(matrix @ matrix.T, factor**2 * torch.eye(2).double())
        assert 0.8 <= factor <= 1.2
        assert math.degrees(abs(torch.atan2(matrix[1, 0], matrix[0, 0]))) <= 45
        shift = torch.linalg.lstsq(old, (new_bias - old_bias)[:, None]).solution
        assert shift.abs().max() <= 0.25
        torch.testing.assert_close(old @ shift, (new_bias - old_bias)[:, None])


def test_noise_and_dropout_have_the_stated_size(generator: torch.Generator) -> None:
    layout = Layout(sizes=(3, 300, 300, 1), omegas=(30.0, 30.0), shared_output=False)
    weights = Weights.unflatten(torch.randn(2, layout.count, generator=generator) * 5, layout)
    off = {"translation": 0.0, "rotation": 0.0, "scaling": 0.0}
    dropped = augment(weights, generator, WeightAugmentation(noise=0.0, **off))
    share = (dropped.flat() == 0).float().mean().item()
    assert abs(share - 0.01) < 0.001
    assert torch.equal(dropped.flat()[dropped.flat() != 0], weights.flat()[dropped.flat() != 0])
    noise = augment(weights, generator, WeightAugmentation(dropout=0.0, **off)).weights[1] - weights.weights[1]
    assert abs(noise.std().item() / 5 - 0.1) < 0.002
    assert noise.mean().abs() < 0.01


def test_permutations_of_other_networks_are_refused(weights: Weights, generator: torch.Generator) -> None:
    other = Layout(sizes=(2, 8, 6, 3), omegas=(30.0, 30.0), shared_output=False)
    with pytest.raises(InputError, match=r"permutations are of hidden layers of \[8, 6\] neurons.* have \[8, 6, 7\]"):
        permute_neurons(weights, random_permutations(other, generator))
    with pytest.raises(InputError, match="signs are of hidden layers"):
        flip_signs(weights, random_signs(other, generator))
