"""Fields of the meta-learned inner loop: a shared base plus offsets, one vector for each signal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from mwt.errors import InputError
from mwt.fields.field import Field
from mwt.fields.layers import BatchNorm


@runtime_checkable
class AdaptedField(Protocol):
    """What the inner loop asks of a field; any `nn.Module` that has it can be fitted.

    The adapted tensors of a signal lie in one vector of W offsets, in the order of `adapted_shapes`. What is not
    adapted (and the base that offsets are added to) are ordinary parameters, which the outer loop learns.
    """

    @property
    def adapted_shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the adapted tensors, in the order in which they lie in an offset vector."""
        ...

    @property
    def adapted_size(self) -> int:
        """W, the length of an offset vector."""
        ...

    def init_offsets(self, batch_size: int) -> Float[Tensor, "B W"]:
        """Where the fits start."""
        ...

    def __call__(
        self, offsets: Float[Tensor, "B W"], coords: Float[Tensor, "P D"] | Float[Tensor, "B P D"]
    ) -> Float[Tensor, "B P C"]:
        """The values of each signal's field at shared coordinates or at its own."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """The tensors that the signals share."""
        ...


class WithOffsets(nn.Module):
    """Any ordinary field as an `AdaptedField`: its parameters are the base, offsets are added to those chosen."""

    def __init__(self, field: Field, adapted: Sequence[str] = ("",)) -> None:
        """Wrap `field`.

        Args:
            adapted: beginnings of the names of the parameters that signals have offsets to: `("hidden.",)` for the
                hidden layers, `("",)` for all.

        Raises:
            InputError: no parameter has such a name, the field has copies, or it has batch normalisation, whose
                statistics are shared.
        """
        super().__init__()
        if field.copies is not None:
            raise InputError(
                "The inner loop makes a network for each signal of one base: build the field without copies."
            )
        if any(isinstance(module, BatchNorm) for module in field.modules()):
            raise InputError("A field with batch_norm cannot be adapted: its statistics would mix the signals.")
        self.field = field
        self.names = [name for name, _ in field.named_parameters() if name.startswith(tuple(adapted))]
        if not self.names:
            known = ", ".join(name for name, _ in field.named_parameters())
            raise InputError(f"No parameter begins with {' or '.join(adapted)}; there are {known}.")

    @property
    def adapted_shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the adapted tensors, in the order in which they lie in an offset vector."""
        own = dict(self.field.named_parameters())
        return [(name, tuple(own[name].shape)) for name in self.names]

    @property
    def adapted_size(self) -> int:
        """W, the length of an offset vector."""
        own = dict(self.field.named_parameters())
        return sum(own[name].numel() for name in self.names)

    def init_offsets(self, batch_size: int) -> Float[Tensor, "B W"]:
        """Zero: every fit starts from the base itself."""
        return next(self.field.parameters()).new_zeros(batch_size, self.adapted_size)

    def forward(
        self, offsets: Float[Tensor, "B W"], coords: Float[Tensor, "P D"] | Float[Tensor, "B P D"]
    ) -> Float[Tensor, "B P C"]:
        """The values of each signal's field at shared coordinates or at its own."""
        own = dict(self.field.named_parameters())
        parts = offsets.split([own[name].numel() for name in self.names], dim=1)
        changed = {
            name: own[name] + part.reshape(-1, *own[name].shape) for name, part in zip(self.names, parts, strict=True)
        }
        values: Tensor = functional_call(self.field, changed, (coords,))
        return values
