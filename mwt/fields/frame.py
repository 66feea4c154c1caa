"""The frame of a signal: what its coordinates and values mean. Saved beside a field, so that it can be read later."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mwt.config_checks import require
from mwt.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Frame:
    """Axes, ranges and size of the signal that a field was fitted to."""

    kind: str
    """image, audio, volume, points, ...: for people and programs; nothing here depends on it."""
    axes: tuple[str, ...]
    """Names in the order of the coordinates, such as ("y", "x"). There are D."""
    coordinate_range: tuple[tuple[float, float], ...]
    """Lowest and highest coordinate along each axis."""
    size: tuple[int, ...] | None = None
    """Samples along each axis; None where the signal is no grid."""
    endpoint: bool = True
    """Whether the last sample lies at the highest coordinate, or one step before it."""
    value_range: tuple[float, float] = (-1.0, 1.0)
    """Numbers of the field that stand for ..."""
    data_range: tuple[float, float] = (0.0, 1.0)
    """... these of the signal; between and beyond them, linearly."""
    meta: dict[str, Any] = field(default_factory=dict, hash=False)
    """What else a reader of the field has to know, for JSON. Lists hold one entry a signal. What `mwt.signals` writes:

    audio      rate: samples a second. peaks: amplitudes in the file that 1 of the field stands for; of a single signal
               `data_range` is ±peak already.
    shape      mode: occupancy (positive inside) or distance (negative inside). centre [x, y, z] and scale: a place in
               the file is centre + scale * coordinates, and a distance there is scale times the field's.
    radiance   bound: places in the scene are bound * coordinates. values: what the four are, (log density per unit of
               the scene, red, green, blue before a sigmoid). background: what is seen behind, 0 to 1.
    poisson    mean: of each channel, which the fit does not know: shift pictures that the field shows to it.
    """

    def __post_init__(self) -> None:
        count, pairs = len(self.axes), len(self.coordinate_range)
        require(count >= 1, "frame.axes is empty.")
        require(pairs == count, f"frame.coordinate_range has {pairs} pairs for {count} axes.")
        require(self.size is None or len(self.size) == count, f"frame.size must have {count} numbers, or be null.")
        for name in ("value_range", "data_range"):
            low, high = getattr(self, name)
            require(low < high, f"frame.{name} is {low} to {high}; it must rise.")

    @property
    def coordinate_dims(self) -> int:
        """D."""
        return len(self.axes)

    def grid(
        self,
        size: tuple[int, ...] | None = None,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Float[Tensor, "P D"]:
        """The coordinates of a full grid, last axis fastest; `size` other than the signal's asks between its samples.

        Raises:
            InputError: the signal has no size and none is given, or another number of axes is.
        """
        size = self.size if size is None else size
        if size is None or len(size) != self.coordinate_dims:
            raise InputError(f"A grid of a signal with axes {', '.join(self.axes)} needs {len(self.axes)} sizes.")
        lines = []
        for count, (low, high) in zip(size, self.coordinate_range, strict=True):
            if self.endpoint:
                lines.append(torch.linspace(low, high, count, device=device, dtype=dtype))
            else:
                lines.append(low + (high - low) / count * torch.arange(count, device=device, dtype=dtype))
        return torch.cartesian_prod(*lines).reshape(-1, self.coordinate_dims)

    def to_data(self, values: Tensor) -> Tensor:
        """The field's numbers as the signal's."""
        (low, high), (start, end) = self.value_range, self.data_range
        return (values - low) * ((end - start) / (high - low)) + start

    def to_values(self, data: Tensor) -> Tensor:
        """The signal's numbers as the field's."""
        (low, high), (start, end) = self.value_range, self.data_range
        return (data - start) * ((high - low) / (end - start)) + low

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Frame:
        """The inverse of `dataclasses.asdict`, for what JSON brings.

        Raises:
            InputError: a key is missing or not known, or a value will not do; names the key.
        """
        known = {entry.name: entry for entry in dataclasses.fields(cls)}
        for key in content:
            require(key in known, f"frame.{key} is not known.")
        for key in ("kind", "axes", "coordinate_range"):
            require(key in content, f"frame.{key} is missing.")
        values = dict(content)
        try:  # JSON has lists for tuples, and no difference between 1 and 1.0
            values["axes"] = tuple(map(str, content["axes"]))
            values["coordinate_range"] = tuple((float(low), float(high)) for low, high in content["coordinate_range"])
            if content.get("size") is not None:
                values["size"] = tuple(map(int, content["size"]))
            for name in {"value_range", "data_range"} & content.keys():
                low, high = content[name]
                values[name] = (float(low), float(high))
            values["meta"] = dict(content.get("meta", {}))
        except (TypeError, ValueError) as error:
            raise InputError(f"frame has a value of the wrong form ({error}).") from error
        return cls(**values)
