"""Bases of Kolmogorov-Arnold networks: the functions of one number that a layer has for each pair of input and output.

y_o = sum over inputs i of phi_io(x_i). There are three families.

*Fixed functions* B_g, the same for all pairs: phi_io = sum over g of c_gio B_g(x_i). T stands for tanh x.

| name              | functions B_g                                           | size     | also     | norm  | order |
|-------------------|---------------------------------------------------------|----------|----------|-------|-------|
| bspline           | B-splines of degree `order` (3) on G equal intervals of | G 5      | SiLU     |       | 2     |
|                   | [-1, 1] and beyond; G + 3 of them; 0 off the grid       |          |          |       |       |
| fourier           | cos(k x), sin(k x), k = 1..K                            | K 8      | bias     |       | 2     |
| grbf (FastKAN)    | exp(-(n(x) - g_m)^2), g_m equally spaced on [-2, 2]     | 8        | SiLU, b. | inner | 2     |
| rbf               | exp(-((x - g_m) / h)^2), h the step between the g_m     | 8        | SiLU, b. |       | 2     |
| fcn_interpolation | hats: max(0, 1 - abs(x - g_m) / h), g_m on [-2, 2]      | 8        |          |       | 1     |
| chebyshev1        | T_n(T), n = 0..degree, as in all of the following       | degree 4 |          | layer | 2     |
| chebyshev2        | U_n(T)                                                  | 4        |          | layer | 2     |
| jacobi            | P_n^(1, 1)(T)                                           | 3        |          | layer | 2     |
| hermite           | H_n(T), the physicists'                                 | 4        |          | layer | 2     |
| gegenbauer        | C_n^(3)(T)                                              | 4        |          | layer | 2     |
| legendre          | P_n(T)                                                  | 4        |          | layer | 2     |
| laguerre          | L_n^(-1/2)(T)                                           | 3        |          | layer | 2     |
| bessel            | y_n(T), Bessel polynomials                              | 3        |          | layer | 2     |
| fibonacci         | tanh F_n(T), n = 1..degree                              | 4        |          | layer | 2     |
| lucas             | L_n(T), Lucas polynomials                               | 3        |          | layer | 2     |

*Wavelets*, moved and stretched for each pair: phi_io = w_io psi((x_i - t_io) / s_io).

| name              | psi(u)                                                  | size     | also     | norm  | order |
|-------------------|---------------------------------------------------------|----------|----------|-------|-------|
| mexican_hat       | 2 / (sqrt 3 pi^(1/4)) (u^2 - 1) exp(-u^2 / 2)           |          |          | batch | 2     |
| morlet            | cos(5 u) exp(-u^2 / 2)                                  |          |          | batch | 2     |
| dog               | -u exp(-u^2 / 2)                                        |          |          | batch | 2     |
| meyer             | sin(pi v) aux(v), v = abs(u): a kink at 0               |          |          | batch | 1     |
| shannon           | sin(u) / u                                              |          |          | batch | 2     |
| bump              | exp(-1 / (1 - u^2)), 0 from abs(u) = 1 on               |          |          | batch | 2     |

*Networks*: fcn, phi_io = w . SiLU(A [x_i, sin(2^j x_i), cos(2^j x_i), 1]) with `size` (1) hidden units of its own for
each pair and j < `frequencies` (1); bias; order 2.

norm: of all inputs but the coordinates; inner: in the argument of B_g alone, not of SiLU. order: how many derivatives
are right (`mwt.fields.activations.Activation.derivatives`); with batch normalisation none.

Source of list and settings: X-KANeRF, by INR-Bench's first author, whose own list is not public; the count agrees.
Differences from that code, and what they do to the number of parameters (E pairs, width H, L + 2 layers, C values):

* No normalisation of the values: over C of them it would force their mean to 0, and one alone to a constant (-2 C).
* grbf: none of the coordinates (-2 D); of two, only the sign of their difference would be left.
* Wavelets: no weight that is not used (-E); a bias of the values, once batch normalisation brings none (+C).
* fibonacci: no coefficient of F_0 = 0 (-E).
* shannon: no Hamming window over the input features, which made outputs depend on the order of the features.
* bump: no 0 times infinity outside of its support, which was NaN.
* fcn: one bias for each value, rather than one for each pair, which are only ever seen as a sum (-E, + C + (L + 1) H).
* 1, the first polynomial, is kept for each input, as there: its coefficients add up to a bias.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Values = list[Tensor | float]
"""A basis at x [..., P, in]: tensors of that shape, and numbers where a function is constant."""

# ---- polynomials by recurrences ------------------------------------------------------------------------------------


def _recurrence(
    x: Tensor, degree: int, start: Values, following: Callable[[int], tuple[float, float, float]]
) -> Values:
    """p_n = (a x + b) p_{n-1} + c p_{n-2} with a, b, c = following(n), from p_0 and p_1 on."""
    values = list(start)
    for n in range(2, degree + 1):
        a, b, c = following(n)
        last, before = values[-1], values[-2]
        if isinstance(last, Tensor) and isinstance(before, Tensor):
            value = torch.addcmul(before if c == 1 else c * before, x, last, value=a)
        else:
            value = a * x * last + c * before
        values.append(torch.add(value, last, alpha=b) if b else value)
    return values[: degree + 1]


def chebyshev1(x: Tensor, degree: int) -> Values:
    """First kind, T_n."""
    return _recurrence(x, degree, [1.0, x], lambda n: (2, 0, -1))


def chebyshev2(x: Tensor, degree: int) -> Values:
    """Second kind, U_n."""
    return _recurrence(x, degree, [1.0, 2 * x], lambda n: (2, 0, -1))


def jacobi(x: Tensor, degree: int) -> Values:
    """P_n^(1, 1)."""

    def following(n: int) -> tuple[float, float, float]:  # of P_n^(a, b) with a = b = 1
        return (2 * n + 1) * (n + 1) / (n * (n + 2)), 0, -(n + 1) / (n + 2)

    return _recurrence(x, degree, [1.0, 2 * x], following)


def hermite(x: Tensor, degree: int) -> Values:
    """The physicists' H_n."""
    return _recurrence(x, degree, [1.0, 2 * x], lambda n: (2, 0, -2 * (n - 1)))


def gegenbauer(x: Tensor, degree: int, alpha: float = 3.0) -> Values:
    """C_n^(alpha)."""
    return _recurrence(
        x, degree, [1.0, 2 * alpha * x], lambda n: (2 * (n - 1 + alpha) / n, 0, -(n - 2 + 2 * alpha) / n)
    )


def legendre(x: Tensor, degree: int) -> Values:
    """P_n."""
    return _recurrence(x, degree, [1.0, x], lambda n: ((2 * n - 1) / n, 0, -(n - 1) / n))


def laguerre(x: Tensor, degree: int, alpha: float = -0.5) -> Values:
    """L_n^(alpha)."""
    return _recurrence(
        x, degree, [1.0, 1 + alpha - x], lambda n: (-1 / n, (2 * n - 1 + alpha) / n, -(n - 1 + alpha) / n)
    )


def bessel(x: Tensor, degree: int) -> Values:
    """Bessel polynomials y_n."""
    return _recurrence(x, degree, [1.0, x + 1], lambda n: (2 * n - 1, 0, 1))


def fibonacci(x: Tensor, degree: int) -> Values:
    """tanh F_n from n = 1 on: F_0 is 0."""
    values = _recurrence(x, degree, [0.0, 1.0], lambda n: (1, 0, 1))[1:]
    return [value.tanh() if isinstance(value, Tensor) else math.tanh(value) for value in values]


def lucas(x: Tensor, degree: int) -> Values:
    """L_n."""
    return _recurrence(x, degree, [2.0, x], lambda n: (1, 0, 1))


# ---- splines, bumps and waves --------------------------------------------------------------------------------------


def fourier(x: Tensor, count: int) -> Values:
    """cos(x) .. cos(K x), sin(x) .. sin(K x); one cosine and one sine are computed, the others by angle addition."""
    cosines, sines = [x.cos()], [x.sin()]
    for k in range(2, count + 1):  # from halves: rounding errors grow as those of k x do
        (c, s), (d, t) = ((cosines[m - 1], sines[m - 1]) for m in (k // 2, k - k // 2))
        cosines.append(torch.addcmul(c * d, s, t, value=-1))
        sines.append(torch.addcmul(s * d, c, t))
    return [*cosines, *sines]


def _distances(x: Tensor, low: float, high: float, count: int) -> list[Tensor]:
    """(x - g_m) / h for `count` equally spaced g_m, h apart."""
    step = (high - low) / (count - 1)
    return [x / step - (low / step + m) for m in range(count)]


def grbf(x: Tensor, count: int, low: float, high: float) -> Values:
    """Gaussians of one width, however near the centres are."""
    step = (high - low) / (count - 1)
    return [(-(x - (low + m * step)).square()).exp() for m in range(count)]


def rbf(x: Tensor, count: int, low: float, high: float) -> Values:
    """Gaussians as wide as the step between the centres."""
    return [(-u.square()).exp() for u in _distances(x, low, high, count)]


def hats(x: Tensor, count: int, low: float, high: float) -> Values:
    """Linear interpolation between the centres, down to 0 one step beyond them."""
    return [(1 - u.abs()).relu() for u in _distances(x, low, high, count)]


def bspline(x: Tensor, intervals: int, low: float, high: float, order: int = 3) -> Values:
    """Cardinal B-splines of degree `order`, as many as are not 0 everywhere between low and high.

    Powers of the distance to the end of the support nearest by: those of x itself would lose digits.
    """
    step = (high - low) / intervals
    signs = [(-1) ** j * math.comb(order + 1, j) / math.factorial(order) for j in range(order // 2 + 1)]
    values: Values = []
    for m in range(intervals + order):
        u = x / step - (low / step + m + (1 - order) / 2)
        u = torch.where(u < 0, -u, u)  # abs has derivative 0 at 0, and so no second one
        total = signs[0] * ((order + 1) / 2 - u).relu() ** order
        for j in range(1, len(signs)):
            total = torch.add(total, ((order + 1) / 2 - j - u).relu() ** order, alpha=signs[j])
        values.append(total)
    return values


# ---- functions of each pair: value and slope -------------------------------------------------------------------------

Curve = Callable[[Tensor], tuple[Tensor, Tensor]]
"""u to psi(u) and psi'(u), both differentiable."""


def mexican_hat(u: Tensor) -> tuple[Tensor, Tensor]:
    """With the sign of the code: negative at 0."""
    square = u.square()
    bell = (square * -0.5).exp() * (2 / (math.sqrt(3) * math.pi**0.25))
    return (square - 1) * bell, (3 - square) * u * bell


def morlet(u: Tensor) -> tuple[Tensor, Tensor]:
    """A cosine of frequency 5 under a Gaussian."""
    bell, angle = (u.square() * -0.5).exp(), 5 * u
    value = angle.cos() * bell
    return value, torch.add(-u * value, angle.sin() * bell, alpha=-5)


def dog(u: Tensor) -> tuple[Tensor, Tensor]:
    """Derivative of a Gaussian."""
    square = u.square()
    bell = (square * -0.5).exp()
    return -u * bell, (square - 1) * bell


def meyer(u: Tensor) -> tuple[Tensor, Tensor]:
    """sin(pi v) times 1 up to v = 1/2, 0 from 1 on, and cos(pi/2 nu(2 v - 1)) between."""
    v = u.abs()
    t = (2 * v - 1).clamp(0, 1)
    angle = math.pi / 2 * t**4 * (35 + t * (-84 + t * (70 - 20 * t)))
    inside = v < 1
    sine, aux = (math.pi * v).sin(), angle.cos()
    # nu'(t) = 140 t^3 (1 - t)^3, and t grows twice as fast as v
    slope = math.pi * (math.pi * v).cos() * aux - sine * angle.sin() * (140 * math.pi) * (t * (1 - t)) ** 3
    return torch.where(inside, sine * aux, 0.0), torch.where(inside, slope * u.sign(), 0.0)


def shannon(u: Tensor) -> tuple[Tensor, Tensor]:
    """sin(u) / u; near 0 by its series, as the quotient has no derivatives there."""
    near = u.abs() < 0.1
    small = torch.where(near, u, 0.0).square()
    safe = torch.where(near, 1.0, u)
    quotient = safe.sin() / safe
    value = 1 - small / 6 * (1 - small / 20 * (1 - small / 42 * (1 - small / 72)))
    slope = -u / 3 * (1 - small / 10 * (1 - small / 28 * (1 - small / 54)))
    return torch.where(near, value, quotient), torch.where(near, slope, (safe.cos() - quotient) / safe)


def bump(u: Tensor) -> tuple[Tensor, Tensor]:
    """Where 1 - u^2 is below 0.01 the bump is, too, by 40 orders of magnitude, and counts as 0."""
    inside = 1 - u.square() > 0.01
    u = torch.where(inside, u, 0.0)
    root = (1 - u.square()).reciprocal()
    value = torch.where(inside, (-root).exp(), 0.0)
    return value, -2 * u * root.square() * value


def silu(u: Tensor) -> tuple[Tensor, Tensor]:
    """u sigmoid(u)."""
    gate = u.sigmoid()
    value = u * gate
    return value, torch.addcmul(gate, value, 1 - gate)


# ---- the registry ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Basis:
    """A row of the tables above."""

    family: Literal["spline", "fourier", "polynomial", "wavelet", "network"]
    functions: Callable[..., Values] | None = None
    """Of splines (x, size, low, high; bspline: order), fourier and polynomials (x, size)."""
    curve: Curve | None = None
    """Of wavelets and networks."""
    size: int | None = None
    grid_range: tuple[float, float] | None = None
    norm: Literal["none", "layer", "batch"] = "none"
    base: bool = False
    """Beside the basis, a linear map of SiLU(x)."""
    bias: bool = False
    derivatives: int = 2


def _polynomial(functions: Callable[..., Values], degree: int) -> Basis:
    return Basis(family="polynomial", functions=functions, size=degree, norm="layer")


def _wavelet(curve: Curve, derivatives: int = 2) -> Basis:
    return Basis(family="wavelet", curve=curve, norm="batch", derivatives=derivatives)


WIDE = (-2.0, 2.0)
BASES: dict[str, Basis] = {
    "bspline": Basis(family="spline", functions=bspline, size=5, grid_range=(-1.0, 1.0), base=True),
    "fourier": Basis(family="fourier", functions=fourier, size=8, bias=True),
    "grbf": Basis(family="spline", functions=grbf, size=8, grid_range=WIDE, norm="layer", base=True, bias=True),
    "rbf": Basis(family="spline", functions=rbf, size=8, grid_range=WIDE, base=True, bias=True),
    "fcn": Basis(family="network", curve=silu, size=1, bias=True),
    "fcn_interpolation": Basis(family="spline", functions=hats, size=8, grid_range=WIDE, derivatives=1),
    "chebyshev1": _polynomial(chebyshev1, 4),
    "chebyshev2": _polynomial(chebyshev2, 4),
    "jacobi": _polynomial(jacobi, 3),
    "hermite": _polynomial(hermite, 4),
    "gegenbauer": _polynomial(gegenbauer, 4),
    "legendre": _polynomial(legendre, 4),
    "laguerre": _polynomial(laguerre, 3),
    "bessel": _polynomial(bessel, 3),
    "fibonacci": _polynomial(fibonacci, 4),
    "lucas": _polynomial(lucas, 3),
    "mexican_hat": _wavelet(mexican_hat),
    "morlet": _wavelet(morlet),
    "dog": _wavelet(dog),
    "meyer": _wavelet(meyer, 1),
    "shannon": _wavelet(shannon),
    "bump": _wavelet(bump),
}


def list_kan_bases() -> list[str]:
    """Names that `kan.basis` accepts."""
    return list(BASES)
