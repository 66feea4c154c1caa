"""INCODE (Kazerouni et al., WACV 2024): a SIREN whose sines share four numbers that a small network predicts.

    h_i = exp(a) sin(exp(b) omega_i (W_i h_(i-1) + b_i) + c) + d,     (a, b, c, d) = harmonizer(latent)

The harmonizer is linear layers with SiLU between them, weights N(0, 0.001^2), all biases `bias` at first, as released;
so are the SIREN's initial values (first U(+-1/in), others and last U(+-sqrt(6/in)/omega), biases as in `nn.Linear`).
To the loss comes `penalty` times 0.1993 relu(-a) + 0.0196 relu(-b) + 0.0588 relu(-c) + 0.0269 relu(-d).

**The latent is our choice**: N(0, 1) by the seed, saved with the field, and not learned. In the released code it is
pooled features of the signal itself: of pictures the first five children of a ResNet-34 (for which no pretrained
weights are loaded: they are random at first and learned along), of sounds MFCCs. A fit has one signal, so either latent
is a constant, and the network can say the same four numbers; the ways that gradients take to them differ. Fields here
know no signal, and so one network can be fitted to many at once.

`activation.name=incode` of `mlp` learns the four numbers themselves, in every layer separately (as NeAF does).
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mwt.fields.config_harmonized import HarmonizedConfig
from mwt.fields.field import Field, MuonParameter, hidden_matrices
from mwt.fields.layers import Initializer, Linear, Spread, weight_spread

PENALTIES = (0.1993, 0.0196, 0.0588, 0.0269)
"""Of negative a, b, c and d."""


class HarmonizedSiren(Field):
    """See the module's text. Muon takes the SIREN's hidden matrices; the harmonizer is Adam's."""

    def __init__(self, config: HarmonizedConfig, *, coordinate_dims: int, channels: int, draws: Initializer) -> None:
        """A fresh network, or `draws.copies` of them, each with a latent of its own position."""
        super().__init__(coordinate_dims=coordinate_dims, channels=channels, copies=draws.copies, derivatives=2)
        self.omega = config.omega
        self.first_omega = config.first_omega or config.omega
        self.weight = config.penalty

        def linear(inputs: int, outputs: int, *, first: bool = False) -> Linear:
            weight = weight_spread("siren", inputs, outputs, omega=config.omega, first=first)
            return Linear(draws, inputs, outputs, weight=weight, bias=Spread("uniform", inputs**-0.5))

        self.first = linear(coordinate_dims, config.width, first=True)
        self.hidden = nn.ModuleList(linear(config.width, config.width) for _ in range(config.hidden_layers))
        self.last = linear(config.width, channels)
        self.register_buffer("latent", draws.normal(config.latent))
        self.latent: Tensor
        sizes = (config.latent, *config.harmonizer, 4)
        self.harmonizer = nn.ModuleList()
        for inputs, outputs in pairwise(sizes):
            layer = Linear(draws, inputs, outputs, weight=Spread("normal", 0.001), bias=None)
            layer.bias = nn.Parameter(draws.full(config.bias, outputs))
            self.harmonizer.append(layer)

    def coefficients(self) -> Float[Tensor, "*N 4"]:
        """a, b, c and d of every network."""
        x = self.latent[..., None, :]
        for i, layer in enumerate(self.harmonizer):
            x = layer(F.silu(x) if i else x)
        return x[..., 0, :]

    def penalty(self) -> Float[Tensor, "*N"] | None:
        """What is added to the loss of every network; None: nothing."""
        if not self.weight:
            return None
        coefficients = self.coefficients()
        return self.weight * (F.relu(-coefficients) * coefficients.new_tensor(PENALTIES)).sum(-1)

    def values(self, coords: Tensor) -> Tensor:
        """[*N, P, D] to [*N, P, C]. The first phase in full precision, also under autocast."""
        with torch.autocast(coords.device.type, enabled=False):
            gain, rate, phase, shift = (part[..., None, None] for part in self.coefficients().unbind(-1))
            gain, rate = gain.exp(), rate.exp()
            hidden = gain * (rate * self.first_omega * self.first(coords) + phase).sin() + shift
        for layer in self.hidden:
            hidden = gain * (rate * self.omega * layer(hidden) + phase).sin() + shift
        values: Tensor = self.last(hidden)
        return values

    def macs_per_point(self) -> float:
        """Of the SIREN's layers: the harmonizer does not depend on points."""
        return float(sum(layer.macs for layer in (self.first, *self.hidden, self.last)))

    def muon_parameters(self) -> list[MuonParameter]:
        """The hidden-to-hidden matrices [*N, in, out]."""
        return hidden_matrices(self.hidden, "hidden")
