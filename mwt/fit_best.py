"""The best of a fit, signal by signal: what is saved beside its end."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from mwt.fields import Field


@dataclass
class Best:
    """Each signal's best evaluation by the task's metric, and the weights that it was made with."""

    steps: list[int]
    """One a signal, as all here."""
    metrics: dict[str, list[float]]
    weights: dict[str, Tensor]
    """The state of the fields, on the CPU; with copies, each network as it was at its own best."""

    def look(self, step: int, metrics: dict[str, list[float]], metric: str, fields: Field) -> None:
        """Keep those signals that are better than before."""
        now = metrics[metric]
        before = self.metrics.get(metric, [math.nan] * len(now))
        rows = [i for i, (new, old) in enumerate(zip(now, before, strict=True)) if new > old or math.isnan(old)]
        if len(rows) == len(now):
            self.steps, self.metrics = [step] * len(now), {name: list(values) for name, values in metrics.items()}
            for name, value in fields.state_dict().items():
                if name in self.weights:
                    self.weights[name].copy_(value.detach())
                else:
                    self.weights[name] = value.detach().to("cpu", copy=True)
            return
        for i in rows:
            self.steps[i] = step
            for name, values in self.metrics.items():
                values[i] = metrics[name][i]
        for name, value in fields.state_dict().items() if rows else ():
            if value.ndim and len(value) == len(now):  # what has no axis of networks does not change
                self.weights[name][rows] = value.detach()[rows].cpu()
