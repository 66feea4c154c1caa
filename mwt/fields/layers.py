"""Linear maps, their initial values, and batch normalisation, for one network or for N independent ones at once.

With `copies=N` every parameter has a leading axis: a matrix is [N, in, out], a vector [N, out], a number [N]. Modules
take the number of networks from their parameters' shapes and broadcast, so that the same code runs one network, N
copies, and (`mwt.fields.adapted`) networks that share some parameters and not others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from mwt.errors import InputError
from mwt.rng import derived_seed


class Spread(NamedTuple):
    """Where initial values come from: U(+-size), or N(0, size^2)."""

    kind: str
    size: float


class Initializer:
    """Draws initial values, each network's from its own generator of (seed, position).

    Network i of `copies=N` is therefore the one that `position + i` makes alone, bit by bit. Values are drawn on the
    CPU in float32.
    """

    def __init__(self, seed: int, *, copies: int | None = None, position: int = 0) -> None:
        if copies is not None and copies < 1:
            raise InputError(f"copies is {copies}; it must be at least 1, or None for one network without that axis.")
        self.copies = copies
        self.lead = () if copies is None else (copies,)
        self._generators = [
            Generator().manual_seed(derived_seed(seed, "field", position + i)) for i in range(copies or 1)
        ]

    def _each(self, draw: Callable[[Generator], Tensor]) -> Tensor:
        drawn = [draw(generator) for generator in self._generators]
        return drawn[0] if self.copies is None else torch.stack(drawn)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """[*N, *shape] from U(low, high)."""
        return self._each(lambda g: torch.rand(shape, generator=g, dtype=torch.float32)) * (high - low) + low

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        """[*N, *shape] from N(0, std^2)."""
        return self._each(lambda g: torch.randn(shape, generator=g, dtype=torch.float32)) * std

    def draw(self, spread: Spread, *shape: int) -> Tensor:
        """[*N, *shape] from `spread`."""
        if spread.kind == "normal":
            return self.normal(*shape, std=spread.size)
        return self.uniform(*shape, low=-spread.size, high=spread.size)

    def full(self, value: float, *shape: int) -> Tensor:
        """[*N, *shape] of one value."""
        return torch.full((*self.lead, *shape), value, dtype=torch.float32)


def weight_spread(rule: str, inputs: int, outputs: int, *, omega: float = 1.0, first: bool = False) -> Spread:
    """The initial weights of a layer by the name of a rule (`MLPConfig.weight_init`, without auto).

    torch U(+-1/sqrt(in)), what `nn.Linear` does; kaiming_normal std sqrt(2/in); xavier_normal std sqrt(2/(in+out));
    xavier_uniform U(+-sqrt(6/(in+out))); lecun_normal std 1/sqrt(in); elu_normal std sqrt(1.5505.../in); siren
    U(+-1/in) in the first layer and U(+-sqrt(6/in)/omega) in the others (Sitzmann et al. 2020, section 3.2).
    """
    if rule == "siren":
        return Spread("uniform", 1 / inputs if first else (6 / inputs) ** 0.5 / omega)
    spreads = {
        "torch": Spread("uniform", inputs**-0.5),
        "kaiming_normal": Spread("normal", (2 / inputs) ** 0.5),
        "xavier_normal": Spread("normal", (2 / (inputs + outputs)) ** 0.5),
        "xavier_uniform": Spread("uniform", (6 / (inputs + outputs)) ** 0.5),
        "lecun_normal": Spread("normal", inputs**-0.5),
        "elu_normal": Spread("normal", (1.5505188080679277 / inputs) ** 0.5),
    }
    return spreads[rule]


class Linear(nn.Module):
    """x W + b with weight [*N, in, out] and bias [*N, out].

    A complex map keeps real and imaginary parts in a last axis of size 2 instead of a complex tensor: `.double()`,
    optimizers and gradient scalers treat complex parameters differently or not at all. With `real_part` only the real
    part of the result is returned.
    """

    def __init__(
        self,
        draws: Initializer,
        inputs: int,
        outputs: int,
        *,
        weight: Spread,
        bias: Spread | None,
        complex_values: bool = False,
        real_part: bool = False,
    ) -> None:
        super().__init__()
        pair = (2,) if complex_values else ()
        self.complex_values = complex_values
        self.real_part = real_part
        self.weight = nn.Parameter(draws.draw(weight, inputs, outputs, *pair))
        self.bias = None if bias is None else nn.Parameter(draws.draw(bias, outputs, *pair))

    @property
    def macs(self) -> int:
        """Multiply-adds for one point: in x out, four times that of complex numbers (twice, for a real part alone)."""
        real = 1 if not self.complex_values else 2 if self.real_part else 4
        inputs, outputs = self.weight.shape[-3:-1] if self.complex_values else self.weight.shape[-2:]
        return real * inputs * outputs

    def forward(self, x: Tensor) -> Tensor:
        """[..., P, in] to [..., P, out]; a leading axis of the input or of the parameters is broadcast."""
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if self.complex_values:
            weight = torch.view_as_complex(weight)
            bias = None if bias is None else torch.view_as_complex(bias)
            x = x.to(weight.dtype)
        result = affine(x, weight, bias)
        return result.real if self.real_part else result


def affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W + b: [..., P, in], [*N, in, out] and [*N, out] to [..., P, out]."""
    if bias is None:
        return x @ weight
    if x.ndim == weight.ndim == 2 and bias.ndim == 1:
        return torch.addmm(bias, x, weight)
    if x.ndim == weight.ndim == 3 and bias.ndim == 2 and len(x) == len(weight) == len(bias):
        return torch.baddbmm(bias[:, None], x, weight)
    return x @ weight + bias[..., None, :]


def add_product(base: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """base + x W: [..., P, out], [..., P, in] and [*N, in, out] to [..., P, out]."""
    if base.ndim == x.ndim == weight.ndim == 2:
        return torch.addmm(base, x, weight)
    if base.ndim == x.ndim == weight.ndim == 3 and len(base) == len(x) == len(weight):
        return torch.baddbmm(base, x, weight)
    return base + x @ weight


class BatchNorm(nn.Module):
    """Batch normalisation (Ioffe and Szegedy 2015) over the points, separately for each network and unit.

    As `nn.BatchNorm1d` on [P, H], with momentum 0.1 and epsilon 1e-5, for [N, P, H] too.
    """

    def __init__(self, draws: Initializer, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(draws.full(1.0, width))
        self.bias = nn.Parameter(draws.full(0.0, width))
        self.register_buffer("mean", draws.full(0.0, width))
        self.register_buffer("variance", draws.full(1.0, width))
        self.mean: Tensor
        self.variance: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """[..., P, H] to the same."""
        mean, variance = self.mean, self.variance
        if self.training:
            points = x.shape[-2]
            if points < 2:
                raise InputError("Batch normalisation needs at least 2 points in a training step; there is 1.")
            variance, mean = torch.var_mean(x, dim=-2, correction=0)
            with torch.no_grad():
                self.mean.lerp_(mean.to(self.mean.dtype), 0.1)
                self.variance.lerp_((variance * (points / (points - 1))).to(self.variance.dtype), 0.1)
        scale = self.weight * (variance + 1e-5).rsqrt()
        return (x - mean[..., None, :]) * scale[..., None, :] + self.bias[..., None, :]
