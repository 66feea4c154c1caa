"""The outer optimizer: AdamW in three groups, OneCycle, gradient clipping per group.

As released with the paper: weight decay on every tensor, OneCycle with a maximum per group (its momentum cycling
included), norms clipped group by group.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from mwt.config import OptimConfig
from mwt.model import MetaWeightTransformer


def make_optimizer(model: MetaWeightTransformer, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with the groups siren, alpha and reader, each with its own learning rate."""
    rates = {"siren": config.lr_siren, "alpha": config.lr_alpha, "reader": config.lr_reader}
    groups = [{"params": params, "lr": rates[name], "name": name} for name, params in model.parameter_groups().items()]
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True)


def make_schedule(optimizer: torch.optim.Optimizer, config: OptimConfig, *, total_steps: int) -> OneCycleLR:
    """OneCycle over `total_steps` optimizer steps; call its `step` after each."""
    rates = [group["lr"] for group in optimizer.param_groups]
    warmup = config.warmup
    if warmup * total_steps == 1:  # OneCycleLR would divide by the zero steps of such a rise
        warmup = 1.5 / total_steps
    return OneCycleLR(optimizer, max_lr=rates, total_steps=total_steps, pct_start=warmup)


def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float | None) -> torch.Tensor:
    """Clip each group's gradients to norm `max_norm` (None: not at all); returns the norms before it [groups]."""
    limit = float("inf") if max_norm is None else max_norm
    norms = []
    for group in optimizer.param_groups:
        parameters = group["params"]
        norms.append(nn.utils.clip_grad_norm_(parameters, limit).to(parameters[0].device))  # frozen: 0, on the CPU
    return torch.stack(norms)
