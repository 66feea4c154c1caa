"""Settings of `harmonized`, INCODE's SIREN whose sines a small network tunes."""

from __future__ import annotations

from dataclasses import dataclass

from mwt.config_checks import require


@dataclass(frozen=True, kw_only=True)
class HarmonizedConfig:
    """Sizes and initial values of the released code's image task (Kazerouni et al. 2024)."""

    width: int = 256
    hidden_layers: int = 3
    """L: hidden-to-hidden matrices. There are L + 1 sine layers and a linear one."""
    omega: float = 30.0
    first_omega: float | None = None
    """Frequency of the first layer; null: omega. INCODE's audio: 3000."""
    latent: int = 64
    """Numbers that the harmonizer sees. INCODE: 64 pooled features of a picture, 50 of a sound."""
    harmonizer: tuple[int, ...] = (64, 32)
    """Widths of its hidden layers. INCODE's audio: 32; its denoising: 32, 16, 8, with layer norms (not here)."""
    bias: float = 0.312
    """Of all its layers at the beginning, and so about a, b, c and d. INCODE's denoising: 0.0005."""
    penalty: float = 1.0
    """What INCODE's penalty of negative a, b, c and d is multiplied with; 0: none."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "harmonizer", tuple(self.harmonizer))  # YAML brings a list
        for name in ("width", "latent"):
            require(getattr(self, name) >= 1, f"harmonized.{name} is {getattr(self, name)}; it must be at least 1.")
        require(self.hidden_layers >= 0, "harmonized.hidden_layers cannot be negative.")
        require(all(width >= 1 for width in self.harmonizer), "harmonized.harmonizer must be widths of at least 1.")
        for name in ("omega", "first_omega"):
            value = getattr(self, name)
            require(value is None or value > 0, f"harmonized.{name} is {value}; it must be positive.")
        require(self.penalty >= 0, f"harmonized.penalty is {self.penalty}; it cannot be negative.")
