"""Kolmogorov-Arnold networks (Liu et al. 2024): layers of learned functions of one number, with exchangeable bases.

The bases, their defaults and sources are in `mwt.fields.kan_bases`. Layers follow each other without an activation
between them. Memory: a layer of fixed functions needs G tensors [P, in] and G products with [in, out]; one with
functions of each pair computes its P x in x out numbers a few points at a time (`mwt.fields.bounded`), forward and
backward. Neither ever holds P x in x out x G numbers, nor the latter P x in x out.

Initial values, those of X-KANeRF, for G functions of n inputs; U and N are for all pairs alike:

    bspline            coefficients by least squares to noise U(+-0.05 / intervals) at the knots, times a factor for
                       each pair from U(+-1/sqrt n); weights of SiLU likewise
    fourier            N(0, 1 / (n K)), bias 0
    grbf, rbf          N(0, 0.01); weights and bias of SiLU as nn.Linear
    fcn_interpolation  U(+-sqrt(6 / ((n + out) G)))
    polynomials        N(0, s^2) with s = 1 / (n (degree + 1))
    wavelets           w U(+-1/sqrt n), t 0, s 1; bias 0
    fcn                N(0, 2 / (fan_in + fan_out)) within each small network, biases 0; outputs over sqrt n (ours: the
                       sum over n of what the code has grows with n)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mwt.errors import InputError
from mwt.fields.bounded import bounded
from mwt.fields.config import choose
from mwt.fields.config_kan import KANConfig
from mwt.fields.field import Field, MuonParameter
from mwt.fields.kan_bases import BASES, Basis, Curve, Values
from mwt.fields.layers import BatchNorm, Initializer, Spread, add_product, affine


class LayerNorm(nn.Module):
    """Layer normalisation (Ba et al. 2016) over the units of each point, as `nn.LayerNorm`, for N networks too."""

    def __init__(self, draws: Initializer, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(draws.full(1.0, width))
        self.bias = nn.Parameter(draws.full(0.0, width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., P, H] to the same."""
        shape = x.shape[-1:]
        if self.weight.ndim == 1:
            return F.layer_norm(x, shape, self.weight, self.bias)
        return F.layer_norm(x, shape) * self.weight[..., None, :] + self.bias[..., None, :]


class Layer(nn.Module):
    """One layer, called with its input [..., P, in] and the same normalised; [..., P, out]."""

    def muon_parameters(self, prefix: str) -> list[MuonParameter]:
        """What Muon may train, by names that begin with `prefix`."""
        raise NotImplementedError


class FixedFunctions(Layer):
    """sum over g of B_g(x) W_g, with weight [*N, G in, out], rows of one function together; and what goes beside."""

    def __init__(self, config: KANConfig, basis: Basis, draws: Initializer, inputs: int, outputs: int) -> None:
        super().__init__()
        assert basis.functions is not None
        assert basis.size is not None
        size = config.size or basis.size
        self.functions, self.squash = basis.functions, basis.family == "polynomial"
        self.arguments: tuple[int | float, ...] = (size,)
        if basis.grid_range is not None:
            self.arguments += config.grid_range or basis.grid_range
        if config.basis == "bspline":
            self.arguments += (config.order,)
        values = self.functions(torch.zeros(1), *self.arguments)
        self.scale: nn.Parameter | None = None
        self.base: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        torch_default = Spread("uniform", inputs**-0.5)
        if config.basis == "bspline":
            initial = _spline_noise(self.functions, self.arguments, draws, inputs, outputs)
            self.scale = nn.Parameter(draws.draw(torch_default, inputs, outputs))
        else:
            spread = {
                "fourier": Spread("normal", (inputs * size) ** -0.5),
                "fcn_interpolation": Spread("uniform", math.sqrt(6 / ((inputs + outputs) * size))),
                "grbf": Spread("normal", 0.1),
                "rbf": Spread("normal", 0.1),
            }.get(config.basis, Spread("normal", 1 / (inputs * (size + 1))))
            initial = draws.draw(spread, len(values) * inputs, outputs)
        self.weight = nn.Parameter(initial)
        self.count = len(values)
        if basis.base:
            self.base = nn.Parameter(draws.draw(torch_default, inputs, outputs))
        if basis.bias:
            zero = Spread("uniform", 0.0)
            self.bias = nn.Parameter(draws.draw(torch_default if basis.base else zero, outputs))

    def forward(self, x: Tensor, normed: Tensor) -> Tensor:
        """[..., P, in] to [..., P, out]: the basis at `normed`, SiLU at `x`."""
        values = self.functions(normed.tanh() if self.squash else normed, *self.arguments)
        weights: Tensor = self.weight.unflatten(-2, (self.count, -1))
        if self.scale is not None:
            weights = weights * self.scale[..., None, :, :]
        bias: Tensor | None = self.bias
        terms: list[tuple[Tensor, Tensor]] = []
        for value, weight in zip(values, weights.unbind(-3), strict=True):
            if isinstance(value, Tensor):
                terms.append((value, weight))
            else:  # the same at every point
                part = value * weight.sum(-2)
                bias = part if bias is None else bias + part
        if self.base is not None:
            terms.append((F.silu(x), self.base))
        result = affine(*terms[0], bias)
        for value, weight in terms[1:]:
            result = add_product(result, value, weight)
        return result

    def muon_parameters(self, prefix: str) -> list[MuonParameter]:
        """The coefficients as one matrix from G in values to out, and that of SiLU."""
        found: list[MuonParameter] = [(f"{prefix}.weight", self.weight, "in_out")]
        return found if self.base is None else [*found, (f"{prefix}.base", self.base, "in_out")]


def _spline_noise(
    functions: Callable[..., Values], arguments: tuple[int | float, ...], draws: Initializer, inputs: int, outputs: int
) -> Tensor:
    """Coefficients [*N, G in, out] of splines that are near small noise at the knots, the smallest such."""
    intervals, (low, high) = int(arguments[0]), arguments[1:3]
    knots = torch.linspace(low, high, intervals + 1, dtype=torch.float64)
    values = [value for value in functions(knots, *arguments) if isinstance(value, Tensor)]
    inverse = torch.linalg.pinv(torch.stack(values, dim=-1)).float()
    noise = draws.uniform(intervals + 1, inputs * outputs, low=-0.05 / intervals, high=0.05 / intervals)
    return (inverse @ noise).unflatten(-1, (inputs, outputs)).flatten(-3, -2)


class PairFunctions(Layer):
    """sum over inputs and hidden units h of w psi(features(x) A), with A and w for each pair of input and output.

    Wavelets have the features (x, 1), A = (1 / s, -t / s) and one unit.
    """

    def __init__(self, curve: Curve) -> None:
        super().__init__()
        self.curve = curve
        self.function = _PairSum(curve)

    def sum(self, features: Tensor, matrix: Tensor, weight: Tensor) -> Tensor:
        """Features [..., P, in, F], matrix [*N, in, F, E] and weight [*N, in, E] to [..., P, E]."""
        features, weight = features.transpose(-2, -3).contiguous(), weight[..., None, :]
        lead = torch.broadcast_shapes(*(tensor.shape[:-3] for tensor in (features, matrix, weight)))
        tensors = [tensor.expand(*lead, *tensor.shape[-3:]) for tensor in (features, matrix, weight)]
        with torch.autocast(features.device.type, enabled=False):
            tensors = [tensor.to(weight.dtype) for tensor in tensors]
            numbers = math.prod(lead) * weight.shape[-3] * weight.shape[-1]
            return bounded(self.function, tensors[:1], tensors[1:], numbers=numbers)


class _PairSum:
    """psi(features A) w, summed over inputs; and its derivatives by all three, written down."""

    def __init__(self, curve: Curve) -> None:
        self.curve = curve

    def __call__(self, features: Tensor, matrix: Tensor, weight: Tensor) -> tuple[Tensor]:
        value, _ = self.curve(features @ matrix)
        return ((value * weight).sum(-3),)

    def vjp(self, features: Tensor, gradient: Tensor, matrix: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        """Derivatives by features, matrix and weight."""
        value, slope = self.curve(features @ matrix)
        gradient = gradient.unsqueeze(-3)
        inner = slope() * gradient * weight
        return inner @ matrix.mT, features.mT @ inner, (value * gradient).sum(-2, keepdim=True)


class Wavelets(PairFunctions):
    """w psi((x - t) / s), all three [*N, in, out]."""

    def __init__(
        self, config: KANConfig, basis: Basis, draws: Initializer, inputs: int, outputs: int, *, last: bool
    ) -> None:
        assert basis.curve is not None
        super().__init__(basis.curve)
        self.weight = nn.Parameter(draws.draw(Spread("uniform", inputs**-0.5), inputs, outputs))
        self.scale = nn.Parameter(draws.full(1.0, inputs, outputs))
        self.shift = nn.Parameter(draws.full(0.0, inputs, outputs))
        self.bias = nn.Parameter(draws.full(0.0, outputs)) if last else None

    def forward(self, x: Tensor, normed: Tensor) -> Tensor:
        """[..., P, in] to [..., P, out], of `normed`."""
        factor = self.scale.reciprocal()
        matrix = torch.stack(torch.broadcast_tensors(factor, -self.shift * factor), dim=-2)
        result = self.sum(torch.stack([normed, torch.ones_like(normed)], dim=-1), matrix, self.weight)
        return result if self.bias is None else result + self.bias[..., None, :]

    def muon_parameters(self, prefix: str) -> list[MuonParameter]:
        """The weights: with all s and t alike, as at the beginning, a matrix after psi."""
        return [(f"{prefix}.weight", self.weight, "in_out")]


class SmallNetworks(PairFunctions):
    """A network of one hidden layer for each pair: first [*N, in, F, out h], its bias and weight [*N, in, out h]."""

    def __init__(self, config: KANConfig, basis: Basis, draws: Initializer, inputs: int, outputs: int) -> None:
        assert basis.curve is not None
        assert basis.size is not None
        super().__init__(basis.curve)
        self.hidden = config.size or basis.size
        self.frequencies = config.frequencies
        features, units = 1 + 2 * config.frequencies, outputs * self.hidden
        first = Spread("normal", math.sqrt(2 / (features + self.hidden)))
        second = Spread("normal", math.sqrt(2 / (self.hidden + 1) / inputs))
        self.first = nn.Parameter(draws.draw(first, inputs, features, units))
        self.first_bias = nn.Parameter(draws.full(0.0, inputs, units))
        self.weight = nn.Parameter(draws.draw(second, inputs, units))
        self.bias = nn.Parameter(draws.full(0.0, outputs))

    def forward(self, x: Tensor, normed: Tensor) -> Tensor:
        """[..., P, in] to [..., P, out], of `normed`."""
        angles = [2.0**i * normed for i in range(self.frequencies)]
        waves = [wave for angle in angles for wave in (angle.sin(), angle.cos())]
        features = torch.stack([normed, *waves, torch.ones_like(normed)], dim=-1)
        matrix = torch.cat([self.first, self.first_bias[..., None, :]], dim=-2)
        result = self.sum(features, matrix, self.weight)
        return result.unflatten(-1, (-1, self.hidden)).sum(-1) + self.bias[..., None, :]

    def muon_parameters(self, prefix: str) -> list[MuonParameter]:
        """None: they are many small matrices, of which no two share an input or an output."""
        return []


class KAN(Field):
    """L + 2 layers of functions, with normalisation between them where the basis wants it."""

    def __init__(self, config: KANConfig, *, coordinate_dims: int, channels: int, draws: Initializer) -> None:
        """A fresh network, or `draws.copies` of them.

        Raises:
            InputError: an unknown basis, or a setting that it does not have.
        """
        basis = choose(BASES, config.basis, "kan.basis")
        _check(config, basis)
        norm = basis.norm if config.norm == "auto" else config.norm
        derivatives = 0 if norm == "batch" else basis.derivatives
        if config.basis == "bspline":
            derivatives = min(derivatives, config.order)
        super().__init__(
            coordinate_dims=coordinate_dims, channels=channels, copies=draws.copies, derivatives=derivatives
        )
        self.waves = basis.family == "fourier"
        widths = [coordinate_dims, *[config.width] * (config.hidden_layers + 1), channels]

        def layer(number: int) -> Layer:
            inputs, outputs = widths[number], widths[number + 1]
            if basis.family == "wavelet":
                return Wavelets(config, basis, draws, inputs, outputs, last=number == len(widths) - 2)
            if basis.family == "network":
                return SmallNetworks(config, basis, draws, inputs, outputs)
            return FixedFunctions(config, basis, draws, inputs, outputs)

        self.first = layer(0)
        self.hidden = nn.ModuleList(layer(i + 1) for i in range(config.hidden_layers))
        self.last = layer(len(widths) - 2)
        count = 0 if norm == "none" else config.hidden_layers + 1
        self.norms = nn.ModuleList(
            BatchNorm(draws, config.width) if norm == "batch" else LayerNorm(draws, config.width) for _ in range(count)
        )

    def values(self, coords: Tensor) -> Tensor:
        """[*N, P, D] to [*N, P, C]."""
        full = torch.autocast(coords.device.type, enabled=False)  # k x needs more digits than bf16 has
        with full:
            hidden = self.first(coords, coords)
        with full if self.waves else nullcontext():
            for i, layer in enumerate([*self.hidden, self.last]):
                hidden = layer(hidden, self.norms[i](hidden) if self.norms else hidden)
        return hidden

    def muon_parameters(self) -> list[MuonParameter]:
        """The hidden layers' coefficients as matrices [*N, G in, out]; none of small networks."""
        layers: list[Layer] = list(self.hidden)  # type: ignore[arg-type]
        return [found for i, layer in enumerate(layers) for found in layer.muon_parameters(f"hidden.{i}")]


def _check(config: KANConfig, basis: Basis) -> None:
    """Refuse settings that the basis does not have."""
    defaults, name = KANConfig(), config.basis
    unknown = [
        key
        for key, has in (
            ("size", basis.size is not None),
            ("grid_range", basis.grid_range is not None),
            ("order", name == "bspline"),
            ("frequencies", name == "fcn"),
        )
        if not has and getattr(config, key) != getattr(defaults, key)
    ]
    if unknown:
        raise InputError(f"kan.{unknown[0]} is set, but kan.basis is {name}, which has none.")
    if basis.family == "spline" and name != "bspline" and config.size == 1:
        raise InputError(f"kan.size is 1; {name} needs at least 2 centres.")
    if name == "fibonacci" and config.size == 1:
        raise InputError("kan.size is 1; fibonacci needs at least 2, for F_0 is 0 and F_1 the constant 1.")
