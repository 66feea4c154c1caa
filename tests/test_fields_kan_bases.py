"""The bases of Kolmogorov-Arnold networks against SciPy's special functions and closed forms, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import interpolate, special
from torch import Tensor

from mwt.fields import kan_bases as bases
from mwt.fields import list_kan_bases

ALL = list_kan_bases()
PAIRED = [name for name in ALL if bases.BASES[name].curve is not None]
X = np.linspace(-1.7, 1.7, 41)


def stacked(values: bases.Values) -> np.ndarray:
    """[G, points]; constants as often as the others have points."""
    return np.stack([np.broadcast_to(np.asarray(value), X.shape) for value in values])


def bessel(n: int, x: np.ndarray) -> np.ndarray:
    terms = [math.factorial(n + k) / (math.factorial(n - k) * math.factorial(k)) * (x / 2) ** k for k in range(n + 1)]
    return np.sum(np.broadcast_arrays(*terms), axis=0)


def roots(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of t^2 = x t + 1, which Binet's formulas are made of."""
    return (x + np.sqrt(x**2 + 4)) / 2, (x - np.sqrt(x**2 + 4)) / 2


def fibonacci(n: int, x: np.ndarray) -> np.ndarray:
    a, b = roots(x)
    return np.tanh((a ** (n + 1) - b ** (n + 1)) / (a - b))  # the list begins with F_1


POLYNOMIALS: dict[str, Callable[[int, np.ndarray], np.ndarray]] = {
    "chebyshev1": special.eval_chebyt,
    "chebyshev2": special.eval_chebyu,
    "jacobi": lambda n, x: special.eval_jacobi(n, 1, 1, x),
    "hermite": special.eval_hermite,
    "gegenbauer": lambda n, x: special.eval_gegenbauer(n, 3, x),
    "legendre": special.eval_legendre,
    "laguerre": lambda n, x: special.eval_genlaguerre(n, -0.5, x),
    "bessel": bessel,
    "fibonacci": fibonacci,
    "lucas": lambda n, x: roots(x)[0] ** n + roots(x)[1] ** n,
}


def test_all_bases_are_there() -> None:
    assert len(ALL) == 22
    assert {name for name in ALL if bases.BASES[name].family == "polynomial"} == POLYNOMIALS.keys()


@pytest.mark.parametrize("degree", [1, 2, 7])
@pytest.mark.parametrize("name", list(POLYNOMIALS))
def test_polynomials_against_scipy(name: str, degree: int) -> None:
    functions = bases.BASES[name].functions
    assert functions is not None
    found = stacked(functions(torch.from_numpy(X), degree))
    count = degree if name == "fibonacci" else degree + 1
    expected = np.stack([POLYNOMIALS[name](n, X) * np.ones_like(X) for n in range(count)])
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-11)


def test_fourier() -> None:
    x = np.linspace(-9, 9, 41)
    k = np.arange(1, 101)[:, None]
    expected = np.concatenate([np.cos(k * x), np.sin(k * x)])
    np.testing.assert_allclose(stacked(bases.fourier(torch.from_numpy(x), 100)), expected, rtol=0, atol=2e-13)
    single = x.astype(np.float32)  # no more error than that of k x itself in float32
    found = stacked(bases.fourier(torch.from_numpy(single), 100))
    expected = np.concatenate([np.cos(k * single.astype(float)), np.sin(k * single.astype(float))])
    assert np.abs(found - expected).max() < 9 * 100 * 2.0**-23


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_splines_against_scipy(order: int) -> None:
    low, high, intervals = -1.0, 1.5, 5
    step = (high - low) / intervals
    knots = low + step * np.arange(-order, intervals + order + 1)
    x = np.concatenate([np.linspace(-6, 6, 201), knots[1:-1]])
    found = np.stack(bases.bspline(torch.from_numpy(x), intervals, low, high, order))  # type: ignore[arg-type]
    assert len(found) == intervals + order
    for m, values in enumerate(found):
        own = interpolate.BSpline.basis_element(knots[m : m + order + 2], extrapolate=False)
        np.testing.assert_allclose(values, np.nan_to_num(own(x)), rtol=0, atol=1e-13)


def test_splines_have_both_derivatives_at_the_knots() -> None:
    x = torch.linspace(-1, 1, 6, dtype=torch.float64).requires_grad_()
    for m, value in enumerate(bases.bspline(x, 5, -1.0, 1.0)):
        assert isinstance(value, Tensor)
        own = interpolate.BSpline.basis_element((np.arange(-3, 9) * 0.4 - 1)[m : m + 5], extrapolate=False)
        [first] = torch.autograd.grad(value.sum(), x, create_graph=True)
        [second] = torch.autograd.grad(first.sum(), x)
        for order, derivative in ((1, first), (2, second)):
            expected = np.nan_to_num(own.derivative(order)(x.detach().numpy() + 1e-12))
            np.testing.assert_allclose(derivative.detach().numpy(), expected, rtol=0, atol=1e-9)


def test_gaussians_and_hats() -> None:
    x, grid = torch.from_numpy(X * 2), np.linspace(-2, 2, 8)
    apart = X * 2 - grid[:, None]
    np.testing.assert_allclose(stacked(bases.grbf(x, 8, -2.0, 2.0)), np.exp(-(apart**2)), rtol=1e-12)
    np.testing.assert_allclose(stacked(bases.rbf(x, 8, -2.0, 2.0)), np.exp(-((apart * 7 / 4) ** 2)), rtol=1e-12)
    heights = np.random.default_rng(0).normal(size=8)
    wide = np.linspace(-2 - 4 / 7, 2 + 4 / 7, 10)  # down to 0 one step outside
    expected = np.interp(X * 2, wide, [0, *heights, 0])
    np.testing.assert_allclose(heights @ stacked(bases.hats(x, 8, -2.0, 2.0)), expected, rtol=0, atol=1e-12)


def meyer(u: np.ndarray) -> np.ndarray:
    v = np.abs(u)
    t = 2 * v - 1
    nu = t**4 * (35 - 84 * t + 70 * t**2 - 20 * t**3)
    return np.sin(np.pi * v) * np.select([v <= 0.5, v >= 1], [1.0, 0.0], np.cos(np.pi / 2 * nu))


def bump(u: np.ndarray) -> np.ndarray:
    inside = np.abs(u) < 1
    return np.where(inside, np.exp(-1 / np.where(inside, 1 - u**2, 1)), 0)


CURVES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mexican_hat": lambda u: 2 / (np.sqrt(3) * np.pi**0.25) * (u**2 - 1) * np.exp(-(u**2) / 2),
    "morlet": lambda u: np.cos(5 * u) * np.exp(-(u**2) / 2),
    "dog": lambda u: -u * np.exp(-(u**2) / 2),
    "meyer": meyer,
    "shannon": lambda u: np.sinc(u / np.pi),
    "bump": bump,
    "fcn": lambda u: u * special.expit(u),
}


@pytest.mark.parametrize("name", PAIRED)
def test_curves_and_their_slopes(name: str) -> None:
    curve = bases.BASES[name].curve
    assert curve is not None
    u = np.concatenate([np.linspace(-4, 4, 97) + 0.003, [-0.1, 0.1, 0.09999, 0.5, 1.0, -1.0, 30.0]])
    value, slope = curve(torch.from_numpy(u))
    np.testing.assert_allclose(value, CURVES[name](u), rtol=0, atol=1e-13)
    places = torch.from_numpy(u).requires_grad_()
    [expected] = torch.autograd.grad(curve(places)[0].sum(), places)
    torch.testing.assert_close(slope(), expected, rtol=0, atol=1e-12)
    smooth = torch.tensor([-2.3, -0.97, -0.72, 0.004, 0.3, 0.81, 1.4, 3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda u: curve(u)[0], smooth)
    assert torch.autograd.gradcheck(lambda u: curve(u)[1](), smooth)
    assert torch.autograd.gradgradcheck(lambda u: curve(u)[0], smooth)


def test_the_bump_is_safe() -> None:
    u = torch.tensor([-1e20, -5.0, -1.0, -1 + 2**-24, 0.999, 1.0, 7.0], requires_grad=True)
    value, slope = bases.bump(u)
    [first] = torch.autograd.grad(value.sum(), u, create_graph=True)
    [second] = torch.autograd.grad(first.sum(), u)
    for found in (value, slope(), first, second):
        assert found.abs().max() == 0


def test_shannon_is_smooth_at_zero() -> None:
    u = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    [first] = torch.autograd.grad(bases.shannon(u)[0].sum(), u, create_graph=True)
    [second] = torch.autograd.grad(first.sum(), u)
    assert first.item() == 0
    assert second.item() == pytest.approx(-1 / 3)
