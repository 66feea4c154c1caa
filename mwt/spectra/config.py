"""Configuration of `eval.spectrum`: a small signal, a field, how it is fitted, and when its kernel is looked at."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field as made
from typing import Literal

from mwt.config_checks import require
from mwt.fields.config import FieldConfig, MLPConfig
from mwt.fit_config import FitOptimConfig


@dataclass(frozen=True, kw_only=True)
class SpectrumSignalConfig:
    """The signal that all models are fitted to."""

    name: str = "sines"
    """sines, noise, spheres, sierpinski, star (`mwt.signals.synthetic`), or a picture: a file, or skimage:NAME."""
    dims: int = 2
    """Axes of noise and spheres: 1, 2 or 3."""
    size: int | None = None
    """Samples along each axis; null: 256, 32 or 10 on one, two or three axes. Pictures are made so small, and grey."""
    frequencies: tuple[int, ...] = (4, 8, 12, 16, 20, 24, 28, 32, 36, 40)
    """sines: periods over the signal."""
    cutoff: float = 0.5
    """noise: nothing beyond cutoff / sqrt 2 periods per sample."""
    depth: int = 4
    """sierpinski: levels."""
    radius: float = 0.1
    """spheres: share of the side."""
    keep: float = 1.0
    """Share of the samples that the fit sees. The others are held out, and so are frequencies above the Nyquist limit
    that the kept ones have on average: keep * (samples) / 2 on one axis, keep^(1/D) * (samples along one) / 2 on D."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "frequencies", tuple(self.frequencies))  # YAML brings a list
        require(self.dims in (1, 2, 3), f"signal.dims is {self.dims}; it is 1, 2 or 3.")
        require(self.size is None or self.size >= 4, f"signal.size is {self.size}; it must be at least 4, or null.")
        require(0 < self.keep <= 1, f"signal.keep is {self.keep}; it must lie in (0, 1].")
        require(self.depth >= 0, f"signal.depth is {self.depth}; it cannot be negative.")
        require(self.radius > 0, f"signal.radius is {self.radius}; it must be positive.")


@dataclass(frozen=True, kw_only=True)
class SpectrumRunConfig:
    """How the program runs."""

    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    looks: int = 3
    """How often the kernel is computed: at the beginning, and then more often at first; the last time at the end."""
    records: int = 40
    """How often the errors at each frequency are written down, likewise."""
    points: int = 256
    """About how many points a kernel has where the signal is that of a run or a grid."""
    memory: int = 256
    """MiB for Jacobians."""

    def __post_init__(self) -> None:
        require(self.looks >= 0, f"run.looks is {self.looks}; it cannot be negative.")
        for name in ("records", "points", "memory"):
            require(getattr(self, name) >= 1, f"run.{name} is {getattr(self, name)}; it must be at least 1.")
        require(self.threads is None or self.threads >= 1, "run.threads must be at least 1, or null.")


def _field() -> FieldConfig:
    return FieldConfig(mlp=MLPConfig(width=64, hidden_layers=2))


@dataclass(frozen=True, kw_only=True)
class SpectrumConfig:
    """Everything that `eval.spectrum` takes beside the models' names."""

    signal: SpectrumSignalConfig = made(default_factory=SpectrumSignalConfig)
    field: FieldConfig = made(default_factory=_field)
    """What the models have in common."""
    optim: FitOptimConfig = made(default_factory=lambda: FitOptimConfig(steps=300))
    run: SpectrumRunConfig = made(default_factory=SpectrumRunConfig)
