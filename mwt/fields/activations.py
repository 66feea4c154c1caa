"""Activations of coordinate networks. Each layer has an instance of its own, and so its own learned settings.

z is the pre-activation Wx + b; n its number of inputs. Settings and rules of initial weights (named as in
`mwt.fields.layers.weight_spread`) are those of the original authors' code where it states them, else those of NeAF
(Fourier-ASR), the audio precursor of INR-Bench by the same author. The rule is for all layers, head included. Biases
are torch's U(+-1/sqrt n) everywhere, as in all of the codes. Order: how many derivatives with respect to coordinates
are right (see `Activation.derivatives`).

| name            | formula                                        | defaults       | weights        | order |
|-----------------|------------------------------------------------|----------------|----------------|-------|
| relu            | max(0, z)                                      |                | kaiming_normal | 1     |
| prelu           | z > 0: z, else slope z                         | slope 0.25 *   | kaiming_normal | 1     |
| silu            | z sigmoid(z)                                   |                | kaiming_normal | 2     |
| softplus        | log(1 + exp(beta z)) / beta                    | beta 1         | kaiming_normal | 2     |
| elu             | z > 0: z, else exp(z) - 1                      |                | elu_normal     | 2     |
| selu            | 1.0507 (z > 0: z, else 1.6733 (exp(z) - 1))    |                | lecun_normal   | 1     |
| tanh, sigmoid   |                                                |                | xavier_normal  | 2     |
| sine            | sin(omega z)                                   | omega 30       | siren          | 2     |
| gaussian        | exp(-(s z)^2)                                  | s 30           | torch          | 2     |
| super_gaussian  | exp(-z^2 / (2 a^2))^b                          | a 1, b 1       | kaiming_normal | 2     |
| laplacian       | exp(-abs(z) / a)                               | a 1            | kaiming_normal | 1     |
| quadratic       | 1 / (1 + (a z)^2)                              | a 1            | kaiming_normal | 2     |
| multi_quadratic | 1 / sqrt(1 + (a z)^2)                          | a 1            | kaiming_normal | 2     |
| expsin          | exp(-sin(a z))                                 | a 1            | kaiming_normal | 2     |
| sinc            | sin(pi z) / (pi z)                             |                | kaiming_normal | 2     |
| finer           | sin(omega (abs(z) + 1) z)                      | omega 30       | siren          | 0, 2  |
| wire            | exp(i omega z - abs(s z)^2), complex           | omega 20, s 10 | torch          | 2     |
| wire_real       | sin(omega z) exp(-(s z)^2)                     | omega 20, s 10 | torch          | 2     |
| spder           | sin(omega z) sqrt(abs(omega z))                | omega 30       | siren          | 2     |
| hosc            | tanh(beta sin(omega z))                        | 30, beta 8     | siren          | 2     |
| incode          | exp(a) sin(exp(b) omega z + c) + d             | omega 30 and * | siren          | 2     |

* learned, in every layer separately: prelu's slope; incode's a, b, c, d from 0.1993, 0.0196, 0.0588, 0.0269.

Sources and differences between papers and codes:

* sine: Sitzmann et al. 2020. omega multiplies weights and bias alike. For audio they set first_omega to 3000.
* gaussian: Ramasinghe and Lucey 2021 write exp(-z^2 / (2 a^2)); WIRE's and FINER++'s codes have s = 1/(sqrt 2 a), with
  10 or 30. Here 30 (a = 0.0236).
* super_gaussian, laplacian, quadratic, multi_quadratic, expsin: Ramasinghe and Lucey 2021; a = b = 1 as in the public
  code (kwea123/Coordinate-MLPs), which states no initial weights: they are NeAF's. NeAF itself has a = 0.1. With
  b = 1, super_gaussian is a Gaussian.
* elu, selu, silu, softplus, tanh, sigmoid, prelu, sinc: NeAF; there one instance, and so one learned slope, serves all
  layers, and sinc does not run.
* finer: Liu et al. 2024. Their code leaves the factor abs(z) + 1 out of the gradient (`detach_scale`). Derivatives with
  respect to coordinates are then wrong (order 0); with detach_scale=false they are right.
* wire: Saragadam et al. 2023. First layer real, the others complex, width / sqrt 2, output the real part; omega and s
  as set for images (10 and 40 in the module). A layer's values are at most exp((omega / 2 s)^2): keep omega / s to 2.
* wire_real: with a sine, as in the code of McGinnis et al. 2025 (Muon); WIRE's own real variant has a cosine.
* spder: Shah and Sitawarin 2023. The second derivative is infinite where z = 0; here it is cut off (see `Spder`).
* hosc: Serrano et al. 2024, with beta 8 as in public reimplementations. omega 30 and SIREN's weights are our choice.
* incode: Kazerouni et al. 2024 predict a, b, c, d by a network (`field.name=harmonized`); here, as in NeAF, they are
  learned numbers.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mwt.config_checks import require
from mwt.fields.config import ActivationConfig, choose
from mwt.fields.layers import Initializer

SETTINGS = ("omega", "scale", "a", "b", "beta")


class Activation(nn.Module):
    """A function of each pre-activation. Its settings are numbers, or parameters [*N] where they are learned."""

    defaults: ClassVar[dict[str, float]] = {}
    """Settings that `ActivationConfig` can change."""
    learned: ClassVar[dict[str, float]] = {}
    """Settings that are always learned, with their initial values."""
    weight_rule: ClassVar[str] = "kaiming_normal"
    complex_values: ClassVar[bool] = False
    derivatives: int = 2
    """How many derivatives are right: that of order k is, if those below are continuous. 2 stands for 2 and more.

    The second derivative of relu is 0 wherever it exists, and so says nothing of the function: order 1.
    """

    def __init__(self, values: dict[str, float], draws: Initializer, trainable: bool) -> None:
        super().__init__()
        for name, value in values.items():
            setattr(self, name, nn.Parameter(draws.full(value)) if trainable else value)
        for name, value in self.learned.items():
            setattr(self, name, nn.Parameter(draws.full(value)))

    @classmethod
    def steepness(cls, values: dict[str, float]) -> float:
        """How fast it changes with z: the frequency of a wave, or one over a width; 0 where it has neither.

        Args:
            values: of its settings (`activation_values`).
        """
        return max(values.get("omega", 0.0), values.get("scale", 0.0))

    def setting(self, name: str) -> Tensor | float:
        """A setting, shaped to multiply [*N, P, H]."""
        value: Tensor | float = getattr(self, name)
        return value[..., None, None] if isinstance(value, Tensor) else value


class Relu(Activation):
    derivatives = 1

    def forward(self, z: Tensor) -> Tensor:
        return z.relu()


class PRelu(Activation):
    learned: ClassVar = {"slope": 0.25}
    derivatives = 1

    def forward(self, z: Tensor) -> Tensor:
        return torch.where(z > 0, z, self.setting("slope") * z)


class Silu(Activation):
    def forward(self, z: Tensor) -> Tensor:
        return F.silu(z)


class Softplus(Activation):
    defaults: ClassVar = {"beta": 1.0}

    def forward(self, z: Tensor) -> Tensor:
        beta = self.setting("beta")
        return F.softplus(beta * z) / beta


class Elu(Activation):
    weight_rule = "elu_normal"

    def forward(self, z: Tensor) -> Tensor:
        return F.elu(z)


class Selu(Activation):
    weight_rule = "lecun_normal"
    derivatives = 1

    def forward(self, z: Tensor) -> Tensor:
        return F.selu(z)


class Tanh(Activation):
    weight_rule = "xavier_normal"

    def forward(self, z: Tensor) -> Tensor:
        return z.tanh()


class Sigmoid(Activation):
    weight_rule = "xavier_normal"

    def forward(self, z: Tensor) -> Tensor:
        return z.sigmoid()


class Sine(Activation):
    defaults: ClassVar = {"omega": 30.0}
    weight_rule = "siren"

    def forward(self, z: Tensor) -> Tensor:
        return (self.setting("omega") * z).sin()


class Gaussian(Activation):
    defaults: ClassVar = {"scale": 30.0}
    weight_rule = "torch"

    def forward(self, z: Tensor) -> Tensor:
        return (-(self.setting("scale") * z).square()).exp()


class SuperGaussian(Activation):
    defaults: ClassVar = {"a": 1.0, "b": 1.0}

    @classmethod
    def steepness(cls, values: dict[str, float]) -> float:
        """s of the Gaussian exp(-(s z)^2) that it is."""
        return math.sqrt(values["b"] / 2) / values["a"]

    def forward(self, z: Tensor) -> Tensor:
        return ((z / self.setting("a")).square() * (-0.5 * self.setting("b"))).exp()


class Laplacian(Activation):
    defaults: ClassVar = {"a": 1.0}
    derivatives = 1

    @classmethod
    def steepness(cls, values: dict[str, float]) -> float:
        return 1 / values["a"]

    def forward(self, z: Tensor) -> Tensor:
        return (-z.abs() / self.setting("a")).exp()


class Quadratic(Activation):
    defaults: ClassVar = {"a": 1.0}

    @classmethod
    def steepness(cls, values: dict[str, float]) -> float:
        return values["a"]

    def forward(self, z: Tensor) -> Tensor:
        return 1 / (1 + (self.setting("a") * z).square())


class MultiQuadratic(Activation):
    defaults: ClassVar = {"a": 1.0}

    @classmethod
    def steepness(cls, values: dict[str, float]) -> float:
        return values["a"]

    def forward(self, z: Tensor) -> Tensor:
        return (1 + (self.setting("a") * z).square()).rsqrt()


class ExpSin(Activation):
    defaults: ClassVar = {"a": 1.0}

    @classmethod
    def steepness(cls, values: dict[str, float]) -> float:
        return values["a"]

    def forward(self, z: Tensor) -> Tensor:
        return (-(self.setting("a") * z).sin()).exp()


class Sinc(Activation):
    """Near 0 a Taylor series: there torch.sinc has a NaN as second derivative and loses digits of the first."""

    def forward(self, z: Tensor) -> Tensor:
        x = math.pi * z
        near = x.abs() < 0.1
        away = torch.where(near, torch.ones_like(x), x)
        square = torch.where(near, x, torch.zeros_like(x)).square()
        series = torch.ones_like(x)
        for k in (8, 6, 4, 2):  # 1 - x^2/6 (1 - x^2/20 (1 - ...)); the rest is below 1e-17
            series = 1 - square / (k * (k + 1)) * series
        return torch.where(near, series, away.sin() / away)


class Finer(Activation):
    """The period shrinks with |z|; `detach` is `ActivationConfig.detach_scale`."""

    defaults: ClassVar = {"omega": 30.0}
    weight_rule = "siren"
    detach = True

    def forward(self, z: Tensor) -> Tensor:
        factor = (z.detach() if self.detach else z).abs() + 1
        return (self.setting("omega") * factor * z).sin()


class Wire(Activation):
    """Complex Gabor wavelet: real or complex z to complex values."""

    defaults: ClassVar = {"omega": 20.0, "scale": 10.0}
    weight_rule = "torch"
    complex_values = True

    def forward(self, z: Tensor) -> Tensor:
        omega, scale = self.setting("omega"), self.setting("scale")
        if not z.is_complex():
            return torch.complex(-(scale * z).square(), omega * z).exp()
        decay = (scale * z.real).square() + (scale * z.imag).square()
        return torch.complex(-omega * z.imag - decay, omega * z.real).exp()


class WireReal(Activation):
    defaults: ClassVar = {"omega": 20.0, "scale": 10.0}
    weight_rule = "torch"

    def forward(self, z: Tensor) -> Tensor:
        return (self.setting("omega") * z).sin() * (-(self.setting("scale") * z).square()).exp()


class Spder(Activation):
    """Below |omega z| = 1e-6 the root is held at its value there, so that both derivatives stay finite.

    Values change by less than 1e-9. The second derivative grows like |omega z|^(-1/2) up to there, and is 0 beyond.
    """

    defaults: ClassVar = {"omega": 30.0}
    weight_rule = "siren"

    def forward(self, z: Tensor) -> Tensor:
        u = self.setting("omega") * z
        return u.sin() * u.abs().clamp(min=1e-6).sqrt()


class Hosc(Activation):
    defaults: ClassVar = {"omega": 30.0, "beta": 8.0}
    weight_rule = "siren"

    def forward(self, z: Tensor) -> Tensor:
        return (self.setting("beta") * (self.setting("omega") * z).sin()).tanh()


class Incode(Activation):
    defaults: ClassVar = {"omega": 30.0}
    learned: ClassVar = {"amplitude": 0.1993, "frequency": 0.0196, "phase": 0.0588, "shift": 0.0269}
    weight_rule = "siren"

    def forward(self, z: Tensor) -> Tensor:
        gain, rate, phase, shift = (torch.as_tensor(self.setting(name)) for name in self.learned)
        return gain.exp() * (rate.exp() * self.setting("omega") * z + phase).sin() + shift


ACTIVATIONS: dict[str, type[Activation]] = {
    "relu": Relu,
    "prelu": PRelu,
    "silu": Silu,
    "softplus": Softplus,
    "elu": Elu,
    "selu": Selu,
    "tanh": Tanh,
    "sigmoid": Sigmoid,
    "sine": Sine,
    "gaussian": Gaussian,
    "super_gaussian": SuperGaussian,
    "laplacian": Laplacian,
    "quadratic": Quadratic,
    "multi_quadratic": MultiQuadratic,
    "expsin": ExpSin,
    "sinc": Sinc,
    "finer": Finer,
    "wire": Wire,
    "wire_real": WireReal,
    "spder": Spder,
    "hosc": Hosc,
    "incode": Incode,
}


def list_activations() -> list[str]:
    """Names that `activation.name` accepts."""
    return list(ACTIVATIONS)


def activation_values(config: ActivationConfig, *, first: bool = False) -> dict[str, float]:
    """The settings of a layer's activation: what the configuration gives, and the defaults of the rest.

    Raises:
        InputError: an unknown name, or a setting that this activation does not have.
    """
    kind = choose(ACTIVATIONS, config.name, "activation.name")
    given = {name: getattr(config, name) for name in SETTINGS if getattr(config, name) is not None}
    known = ", ".join(kind.defaults) or "no settings"
    asked = [*given, *(["first_omega"] if config.first_omega is not None else [])]
    for name in asked:
        has = name.removeprefix("first_") in kind.defaults
        require(
            has,
            f"activation.{name} is set, but {config.name} does not have it; it has {known}. Where a config file "
            f"sets it for another activation: field.mlp.activation.{name}=null.",
        )
    for name, value in [*given.items(), ("first_omega", config.first_omega)]:
        require(value is None or value > 0, f"activation.{name} is {value}; it must be positive.")
    values = {**kind.defaults, **given}
    if first and config.first_omega is not None:
        values["omega"] = config.first_omega
    return values


def make_activation(config: ActivationConfig, draws: Initializer, *, first: bool = False) -> Activation:
    """The activation of one layer.

    Raises:
        InputError: see `activation_values`.
    """
    values = activation_values(config, first=first)
    layer = ACTIVATIONS[config.name](values, draws, config.trainable)
    if isinstance(layer, Finer):
        layer.detach = config.detach_scale
        layer.derivatives = 0 if config.detach_scale else 2
    return layer
