"""Settings of fields with many small weight matrices: `tiled` (KiloNeRF) and `experts` (levels of experts)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mwt.errors import InputError


@dataclass(frozen=True, kw_only=True)
class TiledConfig:
    """One tiny SIREN for each tile of the coordinates' range (Reiser et al. 2021, KiloNeRF)."""

    tiles: tuple[int, ...] = (16,)
    """Tiles: one number for all axes, or one per axis."""
    width: int = 16
    hidden_layers: int = 1
    """L: hidden-to-hidden matrices of each tile. There are L + 2 linear layers."""
    omega: float = 30.0
    """Of the sines, the first layer's too."""
    frequencies: int = 10
    """L of NeRF's encoding, before the first layer; 0: the coordinates themselves."""
    coordinates: Literal["frame", "tile"] = "tile"
    """What a network sees: the field's coordinates, or those within its tile, from -1 to 1."""
    coordinate_range: tuple[float, float] = (-1.0, 1.0)
    """The coordinates that the tiles divide; beyond it the outermost tiles go on."""

    def __post_init__(self) -> None:
        for name in ("tiles", "coordinate_range"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # YAML brings lists
        if min(self.tiles) < 1 or self.width < 1:
            raise InputError("tiled.tiles and tiled.width must be at least 1.")
        if min(self.hidden_layers, self.frequencies) < 0:
            raise InputError("tiled.hidden_layers and tiled.frequencies cannot be negative.")
        if not self.omega > 0:
            raise InputError(f"tiled.omega is {self.omega}; it must be positive.")
        if not self.coordinate_range[0] < self.coordinate_range[1]:
            raise InputError("tiled.coordinate_range must rise.")


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """Levels of experts (Hao et al. 2022): each layer has a grid of weight matrices, which repeats itself in space."""

    bases: tuple[Any, ...] = ((8, 8, 8),)
    """Matrices along an axis, layer by layer: one list for all axes, or one per axis. Layer i divides the range into
    the product of the bases up to i; its matrices come again after base i of these cells. Tuples of whole numbers:
    what YAML brings are lists within a tuple, hence the annotation."""
    width: int = 24
    activation: Literal["leaky_relu", "sine"] = "leaky_relu"
    """leaky_relu: with slope 0.2. sine: SIREN's layers and initial weights (LoE_SIREN)."""
    omega: float = 30.0
    """Of sine."""
    frequencies: int = 8
    """L of NeRF's encoding, before the first layer; 0: the coordinates themselves."""
    coordinate_range: tuple[float, float] = (-1.0, 1.0)
    """The coordinates that the cells divide; beyond it the outermost matrices go on."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "bases", tuple(tuple(axis) for axis in self.bases))
        object.__setattr__(self, "coordinate_range", tuple(self.coordinate_range))
        if not self.bases or len({len(axis) for axis in self.bases}) != 1 or not self.bases[0]:
            raise InputError("experts.bases must be lists of equal length, one for all axes or one per axis.")
        if min(min(axis) for axis in self.bases) < 1 or self.width < 1:
            raise InputError("experts.bases and experts.width must be at least 1.")
        if self.frequencies < 0:
            raise InputError("experts.frequencies cannot be negative.")
        if not self.omega > 0:
            raise InputError(f"experts.omega is {self.omega}; it must be positive.")
        if not self.coordinate_range[0] < self.coordinate_range[1]:
            raise InputError("experts.coordinate_range must rise.")
