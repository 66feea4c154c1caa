"""The field of a meta-learned model as its configuration names it, and the tokens that a reader sees of its fits."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mwt.config import ModelConfig
from mwt.config_files import read_options
from mwt.errors import InputError
from mwt.field_config import MODULATED, AdaptedFieldConfig
from mwt.fields import FieldConfig, Frame, WithOffsets, build_field, list_fields
from mwt.fields.asmr import ASMR
from mwt.fields.config import choose
from mwt.fields.field import Field
from mwt.fields.modulated import ModulatedASMR, ModulatedField, ModulatedSiren
from mwt.siren import Siren
from mwt.structs import SignalFacts
from mwt.tokens import chunks

ModelField = Siren | ModulatedField | WithOffsets


def make_field(config: ModelConfig) -> ModelField:
    """A fresh field, by torch's global generator (of ordinary fields: by its seed).

    Raises:
        InputError: no such field, or settings that do not go together; names the key.
        NotDefinedError: a field on pixels, and signals without, or of various sizes.
    """
    name, signal = config.field.name, config.signal
    choose(dict.fromkeys(["siren", *MODULATED, *list_fields()]), name, "field.name")
    if name == "siren":
        return Siren(config.siren, coordinate_dims=signal.coordinate_dims, channels=signal.channels)
    if name == "modulated":
        siren = Siren(config.siren, coordinate_dims=signal.coordinate_dims, channels=signal.channels)
        return ModulatedSiren(siren, latent=config.field.latent)
    if name == "asmr_modulated":
        given = {"width": config.siren.hidden, "layers": config.siren.hidden_layers + 2}
        if twice := given.keys() & config.field.options.keys():
            raise InputError(
                f"field.options.{min(twice)} is not for field.name=asmr_modulated: siren.hidden is its width, and it "
                "has siren.hidden_layers + 2 linear layers."
            )
        asmr = _ordinary("asmr", config.field.options | given, signal)
        assert isinstance(asmr, ASMR)
        return ModulatedASMR(asmr, latent=config.field.latent)
    return WithOffsets(_ordinary(name, config.field.options, signal), config.field.adapted)


def _ordinary(name: str, options: dict[str, object], signal: SignalFacts) -> Field:
    """A field of `mwt.fields` for the pixels of `signal`, with `options` for its block."""
    read = read_options(FieldConfig, {"name": name, name: options}, "field.options")
    dims, sized = signal.coordinate_dims, signal.height is not None and signal.width is not None
    frame = Frame(
        kind=signal.kind,
        axes=("y", "x", "z")[:dims],
        coordinate_range=((-1.0, 1.0),) * dims,
        size=(signal.height, signal.width) if sized else None,  # type: ignore[arg-type]  # `sized` says that they are
    )
    seed = torch.initial_seed()
    field = build_field(read, coordinate_dims=dims, channels=signal.channels, seed=seed, frame=frame)
    if field.penalty() is not None:
        raise InputError(f"field.name={name}: the inner loop adds no penalty to its loss; set field.options.penalty=0.")
    return field


def field_tokens(
    field: ModulatedField | WithOffsets, config: AdaptedFieldConfig, offsets: Float[Tensor, "B W"]
) -> Float[Tensor, "B T F"]:
    """What a reader sees of fits: the adapted numbers in pieces, or the shift of each layer."""
    if config.tokens == "modulations":
        assert isinstance(field, ModulatedField)  # the configuration refuses the others
        return field.modulations(offsets)
    return chunks(offsets, config.token_size)
