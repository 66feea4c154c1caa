"""What every ordinary field is: a module from coordinates to values, one network or N independent ones at once."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mwt.cost import counted_macs
from mwt.errors import InputError, NotDefinedError
from mwt.fields.config import FieldConfig
from mwt.fields.layers import BatchNorm, Linear
from mwt.muon_groups import RELATIVE_LR

MuonParameter = tuple[str, nn.Parameter, str]
"""Name, matrix [*N, in, out] and its layout (`mwt.muon.LAYOUTS`)."""


class Field(nn.Module):
    """A coordinate network with its own parameters, to be fitted by any optimizer.

    Subclasses compute `values`. With `copies=N` every parameter has a leading axis [N, ...], and so have the values:
    N networks that share nothing but the code. `derivatives` says how many derivatives with respect to coordinates
    autograd gives rightly (0, 1, or 2 for two and more; `mwt.fields.activations.Activation.derivatives`).
    """

    config: FieldConfig
    """What `build_field` made it from."""
    tile: tuple[int, ...] | None = None
    """Sides of the tiles of a grid whose samples share work, where some do: a batch is best made of whole tiles."""
    relative_lr: float = RELATIVE_LR
    """Muon's rate to begin with, as a share of the matrices' spectral norm."""

    def __init__(self, *, coordinate_dims: int, channels: int, copies: int | None, derivatives: int) -> None:
        super().__init__()
        self.coordinate_dims = coordinate_dims
        self.channels = channels
        self.copies = copies
        self.derivatives = derivatives

    def forward(self, coords: Float[Tensor, "*B P D"]) -> Float[Tensor, "*N P C"]:
        """Values at coordinates [P, D], which copies share, or [N, P, D].

        Raises:
            InputError: coordinates of another shape.
        """
        wanted = f"[P, {self.coordinate_dims}]" + ("" if self.copies is None else f" or [{self.copies}, P, D]")
        own = coords.ndim == 3 and self.copies in (None, coords.shape[0])
        if coords.shape[-1] != self.coordinate_dims or not (coords.ndim == 2 or own):
            raise InputError(f"The field takes coordinates {wanted}, not {list(coords.shape)}.")
        return self.values(coords)

    def values(self, coords: Tensor) -> Tensor:
        """`forward` without the check of shapes."""
        raise NotImplementedError

    def muon_parameters(self) -> list[MuonParameter]:
        """The matrices between hidden layers, which Muon may train; everything else is Adam's."""
        return []

    def penalty(self) -> Tensor | None:
        """What a fit adds to the loss of each network [*N] so that its parameters stay sensible; None: nothing."""
        return None

    def split(self, coords: Tensor, at_once: int) -> tuple[Tensor, ...]:
        """Coordinates [*N, P, D] in parts, one after the other, each to be evaluated with bounded memory."""
        return coords.split(at_once, dim=-2)

    @property
    def detail(self) -> str:
        """What people should know of how it was made, beside its configuration."""
        return ""

    @property
    def num_parameters(self) -> int:
        """Real numbers that are learned, per network."""
        return sum(parameter.numel() for parameter in self.parameters()) // (self.copies or 1)

    def macs_per_point(self) -> float:
        """Multiply-adds of one network for a point of a whole grid, by formula: see `mwt.cost`, also for what counts.

        A class without a formula is counted as it computes 16 points, in evaluation mode.
        """
        coords = next(self.parameters()).new_zeros(16, self.coordinate_dims)
        return counted_macs(lambda: evaluate(self, coords)) / 16 / (self.copies or 1)

    def require_derivatives(self, order: int, task: str) -> None:
        """Refuse a field whose derivatives will not do.

        Raises:
            NotDefinedError: `task` needs derivatives of an order that this field has not.
        """
        if self.derivatives < order:
            mend = "It is defined on whole samples only: choose another field."
            if self.tile is None:
                mend = "Choose a smoother activation or interpolation (finer: activation.detach_scale=false)."
            if any(isinstance(module, BatchNorm) for module in self.modules()):
                mend = "Leave out batch normalisation (kan.norm=layer, or mlp.batch_norm=false)."
            raise NotDefinedError(
                f"{task} needs derivatives of order {order} with respect to coordinates; those of this field are right "
                f"up to order {self.derivatives}. {mend}"
            )


def hidden_matrices(layers: nn.ModuleList, prefix: str) -> list[MuonParameter]:
    """The weights of linear layers, named as in `named_parameters`."""
    found: list[MuonParameter] = []
    for i, layer in enumerate(layers):
        if isinstance(layer, Linear):
            layout = "complex_in_out" if layer.complex_values else "in_out"
            found.append((f"{prefix}.{i}.weight", layer.weight, layout))
    return found


@torch.no_grad()
def evaluate(
    field: Field, coords: Float[Tensor, "*B P D"], *, chunk: int = 65536, device: torch.device | None = None
) -> Float[Tensor, "*N P C"]:
    """The field's values without a graph, in evaluation mode, at most `chunk` points at a time.

    Args:
        coords: [P, D], or [N, P, D] for copies.
        chunk: points in memory at once, over all copies together.
        device: where the values are put together, chunk by chunk; by default where the coordinates are.

    Raises:
        InputError: coordinates of another shape, or `chunk` below 1.
    """
    if chunk < 1:
        raise InputError(f"chunk is {chunk}; it must be at least 1.")
    at_once = max(1, chunk // (field.copies or 1))
    training = field.training
    field.eval()
    try:
        return torch.cat([field(part).to(device or coords.device) for part in field.split(coords, at_once)], dim=-2)
    finally:
        field.train(training)
