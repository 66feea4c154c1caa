"""Coordinate MLPs: any encoding with any activation, one network or many at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mwt.errors import InputError
from mwt.fields.activations import ACTIVATIONS, activation_values, make_activation
from mwt.fields.config import MLPConfig
from mwt.fields.encoding import make_encoding
from mwt.fields.field import Field, MuonParameter, hidden_matrices
from mwt.fields.layers import BatchNorm, Initializer, Linear, Spread, weight_spread
from mwt.muon_groups import RELATIVE_LR, RELATIVE_LR_RELU

SIREN_NORM, TORCH_NORM = 8**0.5, (4 / 3) ** 0.5
"""Spectral norms that large square matrices begin with: SIREN's times omega, and those of `nn.Linear`. Where the latter
(or larger ones) stand before an activation that has a frequency or a narrow width itself, such as Gaussians, Muon's
rate is a share of what SIREN's would have there (RESULTS.md: 0.005 was best for a Gaussian of 30 and a real WIRE of
20, which 0.03 times their own norm would ruin)."""


class CoordinateMLP(Field):
    """encoding -> first -> activation -> L times (hidden -> activation) -> last -> range of the output.

    SIREN is activation=sine; NeRF's and Tancik's networks are relu with encoding nerf and fourier; WIRE, FINER, SPDER,
    HOSC, Gaussian and the rest are the other activations. The encoding and the first layer are computed in full
    precision under autocast: a coordinate times omega needs more digits than bf16 has.
    """

    def __init__(self, config: MLPConfig, *, coordinate_dims: int, channels: int, draws: Initializer) -> None:
        """A fresh network, or `draws.copies` of them.

        Raises:
            InputError: an unknown name, a setting that the activation or encoding does not have, batch normalisation
                of complex numbers.
        """
        settings = activation_values(config.activation)
        kind = ACTIVATIONS[config.activation.name]
        if kind.complex_values and config.batch_norm:
            raise InputError(
                f"mlp.batch_norm is for real activations, and {config.activation.name} is complex; use wire_real, or "
                "batch_norm=false."
            )
        super().__init__(coordinate_dims=coordinate_dims, channels=channels, copies=draws.copies, derivatives=0)
        self.output = config.output
        self.clamp = config.clamp
        rule = kind.weight_rule if config.weight_init == "auto" else config.weight_init
        omega = settings.get("omega", 30.0)
        width = int(config.width / math.sqrt(2)) if kind.complex_values else config.width

        def linear(inputs: int, outputs: int, *, first: bool = False, last: bool = False) -> Linear:
            bias = None
            if config.bias:
                size = 0.0 if config.bias_init == "zero" else inputs**-0.5
                size = config.first_bias_scale if first and config.first_bias_scale is not None else size
                bias = Spread("uniform", size)
            return Linear(
                draws,
                inputs,
                outputs,
                weight=weight_spread(rule, inputs, outputs, omega=omega, first=first),
                bias=bias,
                complex_values=kind.complex_values and not first,
                real_part=last,
            )

        self.encoding = make_encoding(config.encoding, coordinate_dims, draws)
        self.first = linear(self.encoding.outputs, width, first=True)
        self.hidden = nn.ModuleList(linear(width, width) for _ in range(config.hidden_layers))
        self.last = linear(width, channels, last=True)
        count = config.hidden_layers + 1
        activations = [make_activation(config.activation, draws, first=i == 0) for i in range(count)]
        self.activations = nn.ModuleList(activations)
        self.norms = nn.ModuleList(BatchNorm(draws, width) for _ in range(count if config.batch_norm else 0))
        if config.activation.name == "relu" and config.encoding.name == "identity":
            self.relative_lr = RELATIVE_LR_RELU
        frequency = kind.steepness(settings)
        if rule != "siren" and frequency > SIREN_NORM / TORCH_NORM:
            self.relative_lr = RELATIVE_LR * SIREN_NORM / TORCH_NORM / frequency
        if not config.batch_norm:  # with it, a value depends on the other points too
            self.derivatives = min(activation.derivatives for activation in activations)

    def _activate(self, number: int, z: Tensor) -> Tensor:
        if self.norms:
            z = self.norms[number](z)
        return self.activations[number](z)

    def values(self, coords: Tensor) -> Tensor:
        """[*N, P, D] to [*N, P, C]."""
        with torch.autocast(coords.device.type, enabled=False):
            hidden = self.first(self.encoding(coords))
        hidden = self._activate(0, hidden)
        for i, layer in enumerate(self.hidden):
            hidden = self._activate(i + 1, layer(hidden))
        values = self.last(hidden)
        if self.output == "sigmoid":
            return values.sigmoid()
        if self.output == "tanh":
            return values.tanh()
        if self.output == "clamp" and not self.training:
            return values.clamp(*self.clamp)
        return values

    def macs_per_point(self) -> float:
        """Of the encoding and all linear layers."""
        return float(self.encoding.macs + sum(layer.macs for layer in self.modules() if isinstance(layer, Linear)))

    def muon_parameters(self) -> list[MuonParameter]:
        """The hidden-to-hidden matrices [*N, in, out], or [*N, in, out, 2] of complex numbers."""
        return hidden_matrices(self.hidden, "hidden")
