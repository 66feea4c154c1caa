"""Fields: networks from coordinates to values, whose adapted weights differ from signal to signal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn


@runtime_checkable
class Field(Protocol):
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


__all__ = ["Field"]
