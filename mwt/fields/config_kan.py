"""Settings of Kolmogorov-Arnold networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mwt.errors import InputError


@dataclass(frozen=True, kw_only=True)
class KANConfig:
    """Layers of one learned function per pair of input and output. What is null has the default of the basis, where
    `mwt.fields.kan_bases` has the table; defaults make the networks of INR-Bench (6 layers, width 64)."""

    basis: str = "fourier"
    """One of `mwt.fields.list_kan_bases()`."""
    width: int = 64
    """H."""
    hidden_layers: int = 4
    """L: hidden-to-hidden layers. There are L + 2 layers: D -> H, L times H -> H, H -> C."""
    size: int | None = None
    """How fine the functions are. bspline: intervals; fourier: frequencies; grbf, rbf, fcn_interpolation: centres; the
    polynomials: degree; fcn: hidden units. Wavelets have none."""
    grid_range: tuple[float, float] | None = None
    """bspline: ends of the intervals; grbf, rbf, fcn_interpolation: first and last centre."""
    order: int = 3
    """bspline: degree of the pieces."""
    frequencies: int = 1
    """fcn: octaves of sin(2^i x) and cos(2^i x) that each small network sees beside x."""
    norm: Literal["auto", "none", "layer", "batch"] = "auto"
    """Normalisation between layers, over the units (layer) or over the points (batch); never of the coordinates and
    never of the values. auto: that of the basis. With batch, a value depends on the other points of the step, so that
    derivatives with respect to coordinates are not defined; tasks that need them ask for layer."""

    def __post_init__(self) -> None:
        if self.grid_range is not None:
            object.__setattr__(self, "grid_range", tuple(self.grid_range))  # YAML brings a list
            if not self.grid_range[0] < self.grid_range[1]:
                raise InputError("kan.grid_range must be two numbers, the lower one first.")
        for name, least in (("width", 2), ("hidden_layers", 0), ("size", 1), ("order", 1), ("frequencies", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"kan.{name} is {value}; it must be at least {least}.")
