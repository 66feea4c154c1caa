"""Settings of ASMR (`mwt.fields.asmr`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mwt.config_checks import require


@dataclass(frozen=True, kw_only=True)
class ASMRConfig:
    """Activation-sharing multi-resolution network (Li et al. 2024), on the samples of a grid and nowhere else."""

    bases: tuple[Any, ...] | None = None
    """Of the digits of a sample's number, the coarsest first: [[4, 4, 4, 8]] for all axes, or one list per axis, all
    equally long. null: chosen for the size (`mwt.fields.asmr_bases.choose_bases`). Tuples of whole numbers: what YAML
    brings are lists within a tuple, hence the annotation."""
    layers: int | None = None
    """L, linear layers and digits; null: as many as `bases` has, or 4."""
    width: int = 256
    omega: float = 30.0
    """Frequency of the sines; the modulation is multiplied by it twice, as released."""
    size: tuple[int, ...] | None = None
    """Samples along each axis: one number for all, or one per axis. null: the signal's own."""
    coordinate_range: tuple[float, float] = (-1.0, 1.0)
    """With `size`, of a field without a signal: the coordinates of the first and the last sample."""

    def __post_init__(self) -> None:
        if self.bases is not None:
            object.__setattr__(self, "bases", tuple(tuple(axis) for axis in self.bases))
        for name in ("size", "coordinate_range"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        require(self.layers is None or self.layers >= 2, f"asmr.layers is {self.layers}; it must be at least 2.")
        require(self.width >= 1, f"asmr.width is {self.width}; it must be at least 1.")
        require(self.omega > 0, f"asmr.omega is {self.omega}; it must be positive.")
        require(self.size is None or (bool(self.size) and min(self.size) >= 1), "asmr.size must be 1 or more, or null.")
        require(self.coordinate_range[0] < self.coordinate_range[1], "asmr.coordinate_range must rise.")
        if self.bases is None:
            return
        lengths = {len(axis) for axis in self.bases}
        require(
            len(lengths) == 1 and min(lengths) >= 2,
            f"asmr.bases has {', '.join(str(len(axis)) for axis in self.bases) or 'no'} numbers; every axis needs as "
            "many as the others, and 2 at least: fill up with 1.",
        )
        require(min(min(axis) for axis in self.bases) >= 1, "asmr.bases holds a number below 1; 1 stands for no digit.")
        require(
            self.layers in (None, len(self.bases[0])),
            f"asmr.layers is {self.layers}, and asmr.bases has {len(self.bases[0])} digits; there is one for each "
            "linear layer: leave out asmr.layers.",
        )
