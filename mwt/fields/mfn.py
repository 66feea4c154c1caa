"""Multiplicative filter networks (Fathony et al., ICLR 2021), with the initial values of their code.

z_1 = g_1(x),  z_{i+1} = (W_i z_i + b_i) * g_{i+1}(x),  values = W z + b. The filters g:

    fourier   sin(omega x + phi)
    gabor     sin(omega x + phi) exp(-gamma / 2 |x - mu|^2)

omega starts as nn.Linear's weights, U(+-1/sqrt D), times input_scale / sqrt(L + 1), for gabor times sqrt(gamma) too;
phi from U(+-pi); mu from U(-1, 1); gamma from Gamma(alpha / (L + 1), beta); W from U(+-sqrt(weight_scale / H)).
"""

from __future__ import annotations

import math

import torch
from scipy.special import gammaincinv
from torch import Tensor, nn

from mwt.fields.config import MFNConfig
from mwt.fields.field import Field, MuonParameter, hidden_matrices
from mwt.fields.layers import Initializer, Linear, Spread, affine


class FourierFilter(nn.Module):
    """sin(omega x + phi), with omega [*N, D, H] and phi [*N, H]."""

    def __init__(self, config: MFNConfig, coordinate_dims: int, draws: Initializer) -> None:
        super().__init__()
        filters = config.hidden_layers + 1
        scale = config.input_scale / math.sqrt(filters)
        torch_default = Spread("uniform", coordinate_dims**-0.5)
        self.omega = nn.Parameter(draws.draw(torch_default, coordinate_dims, config.width) * scale)
        self.phi = nn.Parameter(draws.uniform(config.width, low=-math.pi, high=math.pi))
        self.macs = coordinate_dims * config.width

    def forward(self, coords: Tensor) -> Tensor:
        """[..., P, D] to [..., P, H]."""
        return affine(coords, self.omega, self.phi).sin()


class GaborFilter(FourierFilter):
    """The same under a Gaussian envelope with centres mu [*N, H, D] and precisions gamma [*N, H]."""

    def __init__(self, config: MFNConfig, coordinate_dims: int, draws: Initializer) -> None:
        super().__init__(config, coordinate_dims, draws)
        self.mu = nn.Parameter(draws.uniform(config.width, coordinate_dims, low=-1.0, high=1.0))
        # A Gamma variate by the inverse of its distribution function: torch's own sampler takes no generator.
        level = draws.uniform(config.width).double().numpy()
        drawn = gammaincinv(config.alpha / (config.hidden_layers + 1), level) / config.beta
        gamma = torch.as_tensor(drawn, dtype=torch.float32)
        self.gamma = nn.Parameter(gamma)
        self.macs += coordinate_dims * config.width  # the distances to the centres
        self.omega = nn.Parameter(self.omega.detach() * gamma.sqrt()[..., None, :])

    def forward(self, coords: Tensor) -> Tensor:
        """[..., P, D] to [..., P, H]."""
        mu = self.mu
        # |x|^2 + |mu|^2 - 2 x mu rather than |x - mu|^2: no tensor [P, H, D].
        distance = coords.square().sum(-1, keepdim=True) + mu.square().sum(-1)[..., None, :] - 2 * (coords @ mu.mT)
        return super().forward(coords) * (-0.5 * distance * self.gamma[..., None, :]).exp()


class MultiplicativeFilterNetwork(Field):
    """L + 1 filters, multiplied into each other through L hidden matrices."""

    def __init__(self, config: MFNConfig, *, coordinate_dims: int, channels: int, draws: Initializer) -> None:
        super().__init__(coordinate_dims=coordinate_dims, channels=channels, copies=draws.copies, derivatives=2)
        kind = {"fourier": FourierFilter, "gabor": GaborFilter}[config.filter]
        width, torch_default = config.width, Spread("uniform", config.width**-0.5)
        hidden = Spread("uniform", math.sqrt(config.weight_scale / width))
        count = config.hidden_layers
        self.filters = nn.ModuleList(kind(config, coordinate_dims, draws) for _ in range(count + 1))
        self.hidden = nn.ModuleList(
            Linear(draws, width, width, weight=hidden, bias=torch_default) for _ in range(count)
        )
        self.last = Linear(draws, width, channels, weight=torch_default, bias=torch_default)

    def values(self, coords: Tensor) -> Tensor:
        """[*N, P, D] to [*N, P, C]."""
        with torch.autocast(coords.device.type, enabled=False):  # omega x needs more digits than bf16 has
            filters = [one(coords) for one in self.filters]
        hidden = filters[0]
        for layer, own in zip(self.hidden, filters[1:], strict=True):
            hidden = layer(hidden) * own
        return self.last(hidden)

    def macs_per_point(self) -> float:
        """Of the filters' frequencies and centres, and of the linear layers."""
        return float(sum(part.macs for part in (*self.filters, *self.hidden, self.last)))

    def muon_parameters(self) -> list[MuonParameter]:
        """The hidden-to-hidden matrices [*N, in, out]."""
        return hidden_matrices(self.hidden, "hidden")
