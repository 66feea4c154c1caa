"""The outer optimizer: AdamW in three groups, its schedule, gradient clipping per group.

As released with the paper: weight decay on every tensor, OneCycle with a maximum per group (its momentum cycling
included), norms clipped group by group. Other schedules move the rates alone. With `optim.name: muon` the matrices
between hidden layers, of the SIREN and of the reader, are Muon's; everything else stays with AdamW.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from mwt.config import OptimConfig
from mwt.model import MetaWeightTransformer
from mwt.muon import Muon
from mwt.muon_groups import Split, split_parameters
from mwt.weights_config import WeightsOptimConfig


def make_optimizer(model: MetaWeightTransformer, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW with the groups siren, alpha and reader, each with its own learning rate; or Muon, and AdamW for the rest.

    Muon's groups follow those of AdamW and bear the name of the part that they belong to. Their updates are made as
    large as AdamW's (Liu et al. 2025, "Muon is scalable for LLM training", section 2.2), times `muon_factor`.
    """
    rates = {"siren": config.lr_siren, "alpha": config.lr_alpha, "reader": config.lr_reader}
    if config.name == "muon":
        return _make_muon(model, config, rates)
    groups = [{"params": params, "lr": rates[name], "name": name} for name, params in model.parameter_groups().items()]
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True)


def _make_muon(model: MetaWeightTransformer, config: OptimConfig, rates: dict[str, float]) -> Muon:
    split = split_parameters(model)
    adam, muon = [], []
    for name, rate in rates.items():
        part = Split(tuple(role for role in split.roles if role.name.startswith(f"{name}.")))
        rest = [(role.name, role.parameter) for role in part.adam]
        adam.append({"params": rest, "use_muon": False, "lr": rate, "name": name})
        muon += part.muon_groups(lr=rate * config.muon_factor, adjust="match_rms_adamw", name=name)
    return Muon([{**group, "weight_decay": config.weight_decay} for group in adam + muon])


def make_schedule(
    optimizer: torch.optim.Optimizer, config: OptimConfig | WeightsOptimConfig, *, total_steps: int
) -> LRScheduler:
    """The schedule over `total_steps` optimizer steps; call its `step` after each."""
    if config.schedule != "onecycle":
        rise = round(config.warmup * total_steps)
        return LambdaLR(
            optimizer, partial(rate_factor, rise=rise, total=total_steps, falls=config.schedule == "cosine")
        )
    rates = [group["lr"] for group in optimizer.param_groups]
    warmup = config.warmup
    if warmup * total_steps == 1:  # OneCycleLR would divide by the zero steps of such a rise
        warmup = 1.5 / total_steps
    cycles = not isinstance(optimizer, Muon)  # Muon's momentum stays, and with it that of the AdamW beside it
    return OneCycleLR(optimizer, max_lr=rates, total_steps=total_steps, pct_start=warmup, cycle_momentum=cycles)


def rate_factor(step: int, *, rise: int, total: int, falls: bool) -> float:
    """What the rates are multiplied with at `step`, counted from 0: up a line, then level or down a cosine to 0."""
    if step < rise:
        return (step + 1) / (rise + 1)
    return (1 + math.cos(math.pi * (step - rise) / max(1, total - rise))) / 2 if falls else 1.0


def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float | None) -> torch.Tensor:
    """Clip each part's gradients to norm `max_norm` (None: not at all); returns the norms before it [parts].

    The groups of one name (siren, alpha, reader) are one part; a group without a name is one by itself.
    """
    limit = float("inf") if max_norm is None else max_norm
    parts: dict[str | int, list[nn.Parameter]] = {}
    for number, group in enumerate(optimizer.param_groups):
        parts.setdefault(group.get("name", number), []).extend(group["params"])
    norms = []
    for parameters in parts.values():
        frozen = all(parameter.grad is None for parameter in parameters)
        norm = parameters[0].new_zeros(()) if frozen else nn.utils.clip_grad_norm_(parameters, limit)
        norms.append(norm)
    return torch.stack(norms)


def step_if_finite(optimizer: torch.optim.Optimizer, norms: torch.Tensor) -> None:
    """`optimizer.step()`, which does nothing where a norm is not finite: parameters, moments and counters stay.

    The device decides: fused optimizers and Muon take such a flag, made for loss scaling. A gradient scaler sets its
    own.
    """
    own: Any = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    if getattr(own, "_step_supports_amp_scaling", False):
        own.found_inf = (~norms.isfinite().all()).float()
    optimizer.step()
