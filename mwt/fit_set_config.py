"""Configuration of `train.fit_set`: independent SIRENs, one for each image of a data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mwt.errors import InputError


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How one network is fitted to one signal."""

    optimizer: Literal["adam", "muon"] = "adam"
    """muon: for the matrices between hidden layers (Jordan et al. 2024), Adam for the rest."""
    lr: float = 5e-4
    """Adam's rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    muon_lr: float = 0.02
    momentum: float = 0.95
    """Muon's, with Nesterov."""
    schedule: Literal["constant", "cosine"] = "constant"
    """cosine: both rates fall from full to 0 over `steps`."""
    steps: int = 1000
    target_psnr: float | None = None
    """dB over all points at which a network stops; null: all take `steps` steps."""
    check_every: int = 10
    """Steps between two comparisons with the target."""
    points: int | None = None
    """Random points that each step sees, other ones for each network and step; null: all."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))  # YAML brings a list
        for name in ("lr", "muon_lr", "eps"):
            _require(getattr(self, name) > 0, f"fit.{name} is {getattr(self, name)}; it must be positive.")
        for name in ("steps", "check_every"):
            _require(getattr(self, name) >= 1, f"fit.{name} is {getattr(self, name)}; it must be at least 1.")
        for value in (*self.betas, self.momentum):
            _require(0 <= value < 1, f"fit.betas and fit.momentum must lie in [0, 1), not {value}.")
        _require(self.points is None or self.points >= 1, "fit.points must be at least 1, or null.")
