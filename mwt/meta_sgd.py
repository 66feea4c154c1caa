"""Learned learning rates alpha (Meta-SGD, Li et al. 2017): one rate per adapted weight, per inner step or shared."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mwt.config import InnerLoopConfig


class MetaSGD(nn.ParameterList):
    """Rates [1, W] of each inner step, initialised U(alpha_min, alpha_max); with shared rates a single tensor."""

    def __init__(self, config: InnerLoopConfig, adapted_size: int) -> None:
        count = 1 if config.shared_alpha else config.steps
        low, high = config.alpha_min, config.alpha_max
        super().__init__(nn.Parameter(torch.empty(1, adapted_size).uniform_(low, high)) for _ in range(count))
        self.shared = config.shared_alpha

    def rates(self, step: int) -> Float[Tensor, "1 W"]:
        """The rates of inner step `step`, counted from 0."""
        return self[0 if self.shared else step]
