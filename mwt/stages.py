"""The stages of training: what learns, and what a later stage takes from an earlier run.

    joint            everything at once (the paper's MWT and, with w_cls = 0, its WT)
    reconstruction   SIREN and learned rates alone, by the reconstruction loss; the reader takes no part
    classifier       the reader alone, on the fits of a SIREN that stays as it is

The last two after one another are the sequential WT (Gielisse and van Gemert, CVPR 2025, table 7).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mwt.checkpoint import find_checkpoint, load_model
from mwt.config import ModelConfig
from mwt.errors import InputError
from mwt.model import MetaWeightTransformer

LEARNS = {
    "joint": ("siren", "alpha", "reader"),
    "reconstruction": ("siren", "alpha"),
    "classifier": ("reader",),
}
"""Which groups of parameters learn in each stage."""


def begin_stage(model: MetaWeightTransformer, stage: str) -> None:
    """Freeze what does not learn in `stage`: it gets no gradient, so no update and no weight decay either.

    Call it before the model is given to an optimizer or wrapped for several processes.
    """
    model.stage = stage
    for name, parameters in model.parameter_groups().items():
        for parameter in parameters:
            fixed = name == "alpha" and not model.config.inner_loop.learn_alpha
            parameter.requires_grad_(name in LEARNS[stage] and not fixed)


def rest_unread(model: MetaWeightTransformer) -> None:
    """Freeze what the logits do not depend on: a decoder of a first phase, ends of a graph that nobody asks.

    Several processes wait for the gradient of everything that learns, and these would never get one. Call it after
    `begin_stage`. A reader that cannot work end to end says so here, before anything is written.

    Raises:
        InputError: the reader cannot read what the loop fits.
    """
    if model.stage == "reconstruction":
        return
    learning = [parameter for parameter in model.reader.parameters() if parameter.requires_grad]
    was_training = model.reader.training
    model.reader.eval()  # no dropout, no running means: nothing is drawn and nothing changes
    with torch.enable_grad():
        logits = model.read(model.siren.init_offsets(1))
        gradients = torch.autograd.grad(logits.sum(), learning, allow_unused=True) if learning else ()
    model.reader.train(was_training)
    for parameter, gradient in zip(learning, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)


def _fits(config: ModelConfig) -> dict[str, Any]:
    """What two models must have in common for one to take the SIREN and the learned rates of the other."""
    siren, inner, signal = config.siren, config.inner_loop, config.signal
    return {
        **{f"field.{name}": getattr(config.field, name) for name in ("name", "latent", "adapted", "options")},
        "siren.hidden": siren.hidden,
        "siren.hidden_layers": siren.hidden_layers,
        "siren.omega": siren.omega,
        "inner_loop.steps": inner.steps,
        "inner_loop.shared_alpha": inner.shared_alpha,
        "inner_loop.optimizer": inner.optimizer,
        "the signals' channels": signal.channels,
        "the signals' coordinates": signal.coordinate_dims,
    }


def load_field(model: MetaWeightTransformer, run: Path | str) -> None:
    """Put the SIREN and the learned rates of a run's last checkpoint into `model`; its reader stays as it is.

    Raises:
        InputError: no run directory, no checkpoint, a damaged file, or another architecture; names what differs.
    """
    folder = find_checkpoint(Path(run))
    trained = load_model(folder)
    ours, theirs = _fits(model.config), _fits(trained.config)
    for name, value in ours.items():
        if theirs[name] != value:
            raise InputError(
                f"run.init_from: the SIREN of {run} does not fit: {name} is {theirs[name]!r} there and {value!r} here. "
                "Set it as it is there, or take the SIREN of another run."
            )
    model.siren.load_state_dict(trained.siren.state_dict())
    model.alpha.load_state_dict(trained.alpha.state_dict())
