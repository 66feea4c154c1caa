"""The architectures by name. A new one is a class here and a block of its name in `FieldConfig`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from mwt.errors import InputError
from mwt.fields.asmr import ASMR
from mwt.fields.config import FieldConfig, choose
from mwt.fields.experts import LevelsOfExperts
from mwt.fields.field import Field
from mwt.fields.frame import Frame
from mwt.fields.grid import Grid
from mwt.fields.harmonized import HarmonizedSiren
from mwt.fields.hash_grid import HashGrid
from mwt.fields.kan import KAN
from mwt.fields.layers import Initializer
from mwt.fields.mfn import MultiplicativeFilterNetwork
from mwt.fields.mlp import CoordinateMLP
from mwt.fields.tiled import Tiled

FieldClass = Callable[..., Field]
"""Called with (block of the configuration, coordinate_dims=, channels=, draws=)."""

FIELDS: dict[str, FieldClass] = {
    "mlp": CoordinateMLP,
    "mfn": MultiplicativeFilterNetwork,
    "hash_grid": HashGrid,
    "grid": Grid,
    "kan": KAN,
    "tiled": Tiled,
    "experts": LevelsOfExperts,
    "asmr": ASMR,
    "harmonized": HarmonizedSiren,
}

ON_SAMPLES = frozenset({"asmr"})
"""Fields that are defined on the samples of a grid and nowhere else. They are told its frame (frame=)."""


def list_fields() -> list[str]:
    """Names that `field.name` accepts."""
    return list(FIELDS)


def field_block(config: FieldConfig) -> Any:
    """The block that counts."""
    choose(FIELDS, config.name, "field.name")
    return getattr(config, config.name)


def build_field(
    config: FieldConfig,
    *,
    coordinate_dims: int,
    channels: int,
    seed: int,
    copies: int | None = None,
    position: int = 0,
    frame: Frame | None = None,
) -> Field:
    """A freshly initialised field, on the CPU in float32.

    Args:
        copies: N independent networks in one module, every parameter [N, ...]; None: one network.
        position: number of the (first) network. Initial values depend on seed and position alone: copy i is what
            `position + i` makes without copies.
        frame: of the signal, for fields that are defined on its samples alone; without it they take their
            configuration's size. The others ignore it.

    Raises:
        InputError: an unknown name, with a suggestion, or settings that do not go together; names the key.
        NotDefinedError: a field on samples, and a signal that has none.
    """
    kind: FieldClass = choose(FIELDS, config.name, "field.name")
    for name, value in (("coordinate_dims", coordinate_dims), ("channels", channels)):
        if value < 1:
            raise InputError(f"{name} is {value}; a field needs at least 1.")
    if config.name in ON_SAMPLES:
        kind = partial(kind, frame=frame)
    draws = Initializer(seed, copies=copies, position=position)
    field = kind(field_block(config), coordinate_dims=coordinate_dims, channels=channels, draws=draws)
    field.config = config
    return field
