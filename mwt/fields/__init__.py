"""Fields: networks from coordinates to values. There are two kinds.

* An ordinary field (`Field`, built by `build_field`) owns its parameters; an optimizer fits it to one signal, or its N
  copies to N signals. Architectures: `list_fields()`.
* An adapted field (`AdaptedField`) is the base that a meta-learned inner loop starts from. It owns what all signals
  share, and is called with one vector of offsets for each signal. `mwt.siren.Siren` is one; `WithOffsets` makes one of
  any ordinary field.
"""

from __future__ import annotations

from mwt.fields.activations import list_activations
from mwt.fields.adapted import AdaptedField, WithOffsets
from mwt.fields.config import (
    ActivationConfig,
    EncodingConfig,
    FieldConfig,
    HashGridConfig,
    InterpolatedGridConfig,
    MFNConfig,
    MLPConfig,
)
from mwt.fields.config_asmr import ASMRConfig
from mwt.fields.encoding import list_encodings
from mwt.fields.field import Field, evaluate
from mwt.fields.files import load_field, save_field
from mwt.fields.frame import Frame
from mwt.fields.grid import total_variation
from mwt.fields.registry import FIELDS, build_field, list_fields

__all__ = [
    "FIELDS",
    "ASMRConfig",
    "ActivationConfig",
    "AdaptedField",
    "EncodingConfig",
    "Field",
    "FieldConfig",
    "Frame",
    "HashGridConfig",
    "InterpolatedGridConfig",
    "MFNConfig",
    "MLPConfig",
    "WithOffsets",
    "build_field",
    "evaluate",
    "list_activations",
    "list_encodings",
    "list_fields",
    "load_field",
    "save_field",
    "total_variation",
]
