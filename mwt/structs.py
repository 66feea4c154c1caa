"""The vocabulary: the few dataclasses that travel through the program, each made in one place.

Dimension names, used in shapes all over the project:

    B signals in a batch      P observed points       S inner steps       D coordinate dimensions
    C channels                H hidden width          L hidden layers     W adapted weights of a field (|phi|)
    T tokens                  K classes               N points of a whole signal (h * w pixels, or a point set)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SignalFacts:
    """What the data says about its signals; no hyper-parameter. `height` and `width` are None where sizes differ."""

    kind: Literal["image", "points"]
    channels: int
    height: int | None
    width: int | None
    classes: tuple[str, ...]

    @property
    def coordinate_dims(self) -> int:
        """D: (y, x) for images, (x, y, z) for point sets."""
        return 2 if self.kind == "image" else 3


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Signals with labels, on the device. Made by `data_pipes`; `images`, `coords` and `values`, or `coords` are set.

    `coords` alone are points on surfaces: the signals are the distances to them, asked for anew in every step. Where
    that has been done ahead of the step (`mwt.observe.asked_ahead`), `queries` and `distances` are what it sees.

    Beside images, `coords` [B, h * w, 2] places their pixels elsewhere than on the regular grid (an augmentation).

    `positions` are the samples' places in their split: the key of all randomness that concerns a sample.
    """

    labels: Int[Tensor, " B"]
    positions: Int[Tensor, " B"]
    images: UInt8[Tensor, "B C h w"] | None = None
    coords: Float[Tensor, "B N D"] | None = None
    values: Float[Tensor, "B N C"] | None = None
    queries: Float[Tensor, "B S1 P D"] | None = None
    distances: Float[Tensor, "B S1 P C"] | None = None

    @property
    def is_surface(self) -> bool:
        """Whether the signals are distances to points on surfaces."""
        return self.images is None and self.values is None

    def __len__(self) -> int:
        return self.labels.shape[0]

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`; from pinned memory the copy does not block."""
        moved = {
            name: tensor.to(device, non_blocking=True)
            for name, tensor in vars(self).items()
            if isinstance(tensor, Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True, kw_only=True)
class Observations:
    """The coordinates and values that each inner step, and last the final loss, sees. Made by `mwt.observe`.

    Three forms: coordinates shared by the batch [N, D] with values [B, N, C]; coordinates of each signal [B, N, D];
    or a point set for each step [B, S+1, P, D] with values [B, S+1, P, C]. With the first two, `index` [B, S+1, P]
    may choose the points of each step; without it every step sees all of them.
    """

    coords: Float[Tensor, "N D"] | Float[Tensor, "B N D"] | Float[Tensor, "B S1 P D"]
    values: Float[Tensor, "B N C"] | Float[Tensor, "B S1 P C"]
    index: Int[Tensor, "B S1 P"] | None = None

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Coordinates ([P, D], or [B, P, D] where signals differ) and values [B, P, C] of one step."""
        if self.coords.ndim == 4:
            return self.coords[:, step], self.values[:, step]
        if self.index is None:
            return self.coords, self.values
        index = self.index[:, step]
        if self.coords.ndim == 2:
            coords = self.coords[index]
        else:
            coords = self.coords.gather(1, index[..., None].expand(-1, -1, self.coords.shape[-1]))
        return coords, self.values.gather(1, index[..., None].expand(-1, -1, self.values.shape[-1]))

    def signals(self, start: int, stop: int) -> Observations:
        """Those of signals `start` up to `stop` of the batch."""
        part = slice(start, stop)
        return Observations(
            coords=self.coords if self.coords.ndim == 2 else self.coords[part],
            values=self.values[part],
            index=None if self.index is None else self.index[part],
        )


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A batch of fields fitted to signals. Made by `mwt.inner_loop.fit`.

    `offsets` are phi - theta, flat; `prediction` is what the fitted field says at the points of the final step;
    `losses` are the mean squared errors before each inner step and, last, after all of them.
    """

    offsets: Float[Tensor, "B W"]
    prediction: Float[Tensor, "B P C"]
    losses: Float[Tensor, "B S1"]


@dataclass(frozen=True, kw_only=True)
class Output:
    """What a model says about a batch. Made by `mwt.model.MetaWeightTransformer.forward`."""

    fit: Fit
    logits: Float[Tensor, "B K"]


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The two losses of the outer loop, each a mean over the batch. Made by `mwt.losses.outer_losses`."""

    classification: Float[Tensor, ""]
    reconstruction: Float[Tensor, ""]

    @property
    def total(self) -> Tensor:
        """Their plain sum: the classification weight acts inside the model, on the gradient that enters the fit."""
        return self.classification + self.reconstruction
