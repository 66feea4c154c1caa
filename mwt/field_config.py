"""Settings of the field that a meta-learned model fits to every signal (`mwt.model_field` builds it)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from mwt.errors import InputError

MODULATED = ("modulated", "asmr_modulated")
"""Fields of which a latent vector is adapted."""
ON_SAMPLES = ("asmr", "asmr_modulated")
"""Fields that are defined on the pixels of one size and nowhere else."""


@dataclass(frozen=True, kw_only=True)
class AdaptedFieldConfig:
    """Which field, which of its numbers the inner loop adapts, and what the reader sees of them."""

    name: str = "siren"
    """siren: the network of the block `siren`, offsets to the weights and biases of its sine layers (the paper).
    modulated: the same network, of which a latent vector shifts the biases (`mwt.fields.modulated`).
    asmr_modulated: ASMR likewise, siren.hidden wide, with siren.hidden_layers + 2 linear layers.
    Or one of `mwt.fields.list_fields()`, with offsets to the parameters that `adapted` names."""
    latent: int = 64
    """modulated, asmr_modulated: numbers of the latent vector."""
    adapted: tuple[str, ...] = ("",)
    """Of list_fields(): beginnings of the names of the adapted parameters, such as [table]; all by default."""
    tokens: Literal["vector", "modulations"] = "vector"
    """What the Transformer reads. vector: the adapted numbers, `token_size` a token. modulations: the shifts that the
    latent makes, a token for each layer. (Of `siren` it reads a token for each neuron.)"""
    token_size: int = 16
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of the architecture: those of its block in `mwt.fields.FieldConfig`, such as field.options.levels=4 of
    hash_grid, and field.options.omega=8 of asmr_modulated. siren and modulated have none but the block `siren`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "adapted", tuple(self.adapted))  # YAML brings a list
        for name in ("latent", "token_size"):
            if getattr(self, name) < 1:
                raise InputError(f"field.{name} is {getattr(self, name)}; it must be at least 1.")
        if self.tokens == "modulations" and self.name not in MODULATED:
            raise InputError(
                f"field.tokens=modulations is for field.name={' and '.join(MODULATED)}, which have a latent; "
                f"field.name is {self.name}."
            )
        if self.adapted != ("",) and self.name in ("siren", *MODULATED):
            raise InputError(
                f"field.adapted is for offsets to any field; of field.name={self.name} it is settled what is adapted."
            )
        if self.options and self.name in ("siren", "modulated"):
            raise InputError(
                f"field.options has {', '.join(self.options)}, but field.name={self.name} takes its settings from the "
                "block siren."
            )

    @property
    def on_samples(self) -> bool:
        """Whether it is defined on the pixels of one size and nowhere else."""
        return self.name in ON_SAMPLES
