"""Nearest neighbours in the space of weights: nothing is learned, the training networks are kept."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from mwt.config import ReaderConfig
from mwt.errors import InputError
from mwt.readers.interface import Reader
from mwt.weight_space import Layout, Weights

CANDIDATES = (1, 3, 5, 7, 9, 15, 25)
"""Of k, where it is chosen."""
SMOOTHING = 0.01
"""Votes that every class has beforehand, so that none is impossible."""


class KNNReader(Reader):
    """The vote of the k nearest training networks, by Euclidean distance after `reader.input`.

    Its training is `memorise`; it has no parameters. The networks that it keeps are buffers, saved with it.
    """

    memorises = True
    stored: Tensor
    labels: Tensor
    k: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """How many vote."""

        neighbours: int = 0
        """k; 0 chooses it among CANDIDATES by leave-one-out over the training networks. (Where an image has several
        networks, its others are neighbours of each, and that choice is too sure of itself: give k.)"""

    def __init__(self, config: ReaderConfig, *, layout: Layout, classes: int) -> None:
        super().__init__(config, layout=layout, classes=classes)
        if self.options.neighbours < 0:
            raise InputError(f"reader.options.neighbours is {self.options.neighbours}; it must be 0 (choose) or more.")
        self.register_buffer("stored", torch.empty(0, layout.count))
        self.register_buffer("labels", torch.empty(0, dtype=torch.int64))
        self.register_buffer("k", torch.tensor(self.options.neighbours))

    @torch.no_grad()
    def memorise(self, batches: Iterable[tuple[Weights, Int[Tensor, " B"]]]) -> None:
        """Keep the training networks, and choose k where that is asked for."""
        rows = [(self.inputs(weights).flat(), labels) for weights, labels in batches]
        self.stored, self.labels = (torch.cat(column) for column in zip(*rows, strict=True))
        if not self.options.neighbours:
            most = min(max(CANDIDATES), len(self.labels) - 1)
            # Each network's nearest is itself (or an exact copy of it): left out.
            near = torch.cat([self._nearest(part, most + 1)[:, 1:] for part in self.stored.split(1024)])
            hits = [(self._votes(near[:, :k]).argmax(-1) == self.labels).float().mean() for k in CANDIDATES]
            self.k.fill_(CANDIDATES[int(torch.stack(hits).argmax())])

    def forward(self, weights: Weights) -> Float[Tensor, "B K"]:
        """Logarithms of the shares of votes.

        Raises:
            InputError: nothing has been memorised, as end to end, where there is no training set to keep.
        """
        if not len(self.labels):
            raise InputError(
                "reader.name=knn keeps the networks of a training split and has none: train it with train.weights on "
                "a set of fitted networks. End to end it cannot be used."
            )
        near = self._nearest(self.inputs(weights).flat(), min(int(self.k), len(self.labels)))
        return self._votes(near).log()

    def _nearest(self, flat: Tensor, count: int) -> Int[Tensor, "B k"]:
        """Labels of the `count` nearest, nearest first."""
        distance = torch.cdist(flat, self.stored)
        return self.labels[distance.topk(min(count, len(self.labels)), largest=False).indices]

    def _votes(self, near: Int[Tensor, "B k"]) -> Float[Tensor, "B K"]:
        counts = F.one_hot(near, self.classes).sum(1).to(self.stored.dtype) + SMOOTHING
        return counts / counts.sum(-1, keepdim=True)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in ("stored", "labels"):  # as many as were memorised
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name], device=self.k.device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
