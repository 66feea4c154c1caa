"""Image regression: a field that shows a picture, at any size and scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mwt.config_checks import require
from mwt.errors import InputError
from mwt.fields import Field, Frame
from mwt.signals.pictures import (
    PICTURES,
    error_map,
    psnr,
    read_picture,
    read_pictures,
    ssim,
    to_bytes,
    write_picture,
    write_shown,
)
from mwt.signals.task import Evaluation, Task, predict, show, signal_names


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """How pictures are read; of every task that fits one."""

    grey: bool = False
    """Read colours as grey."""
    crop: int | None = None
    """Use the square of so many pixels in the middle."""
    low: float = -1.0
    """What black is for the field."""
    high: float = 1.0
    """What white is."""
    aspect: str = "stretch"
    """stretch: both axes run from -1 to 1. keep: the longer one does, and pixels stay square."""
    scale: int = 1
    """Written reconstructions have so many times the pixels along each axis."""

    def __post_init__(self) -> None:
        require(self.scale >= 1, f"signal.scale is {self.scale}; it must be at least 1.")


def image_frame(height: int, width: int, options: ImageOptions) -> Frame:
    """Axes (y, x), row by row, end points included.

    Raises:
        InputError: an aspect or a value range that will not do.
    """
    if options.aspect not in ("stretch", "keep"):
        raise InputError(f"signal.aspect is {options.aspect!r}; it is stretch or keep.")
    steps = max(height, width, 2) - 1  # end points are included: a side of n pixels has n - 1 steps
    spans = (1.0, 1.0) if options.aspect == "stretch" else ((height - 1) / steps, (width - 1) / steps)
    return Frame(
        kind="image",
        axes=("y", "x"),
        coordinate_range=tuple((-span, span) for span in spans),
        size=(height, width),
        value_range=(options.low, options.high),
        data_range=(0.0, 1.0),
    )


class ImageTask(Task):
    """Mean squared error at pixels. What a field is compared with is the picture itself."""

    metric = "psnr"
    endings = PICTURES

    @dataclass(frozen=True, kw_only=True)
    class Options(ImageOptions):
        """Those of all pictures."""

    def __init__(self, paths: Sequence[Path], options: ImageOptions, device: torch.device) -> None:
        pictures = read_pictures(paths, grey=options.grey, crop=options.crop).to(device)
        self.names = signal_names(paths)
        self.options = options
        self.between = self.between or options.scale > 1
        self.set_truth(pictures)

    @classmethod
    def shapes(cls, paths: Sequence[Path], options: Any) -> list[tuple[int, ...]]:
        """Height, width and channels, as they are after cropping."""
        found = [tuple(read_picture(path, grey=options.grey).shape) for path in paths]
        return found if options.crop is None else [(options.crop, options.crop, channels) for _, _, channels in found]

    def set_truth(self, pictures: Float[Tensor, "N h w C"]) -> None:
        """Everything that follows from the pictures."""
        self.truth = pictures
        height, width, self.channels = pictures.shape[1:]
        self.frame = image_frame(height, width, self.options)
        self.coords = self.frame.grid(device=pictures.device)
        self.values = self.frame.to_values(pictures.flatten(1, 2))
        """What the loss compares with, [N, P, C], in the field's range."""

    @property
    def points(self) -> int:
        """Pixels."""
        return len(self.coords)

    def loss(self, fields: Field, index: Int[Tensor, " P"] | None, generator: torch.Generator) -> Float[Tensor, " N"]:
        """Mean squared error over pixels and channels."""
        coords, values = self.coords, self.values
        if index is not None:
            coords, values = coords[index], values[:, index]
        return (predict(fields, coords) - values).square().mean((-2, -1))

    def reconstruct(self, fields: Field, size: tuple[int, int] | None = None) -> Float[Tensor, "N h w C"]:
        """The pictures that the fields show, in [0, 1] but not clamped, at their own size or another."""
        coords = self.coords if size is None else self.frame.grid(size, device=self.coords.device)
        return self.frame.to_data(show(fields, coords)).unflatten(1, size or self.truth.shape[1:3])

    def residual(self, fields: Field) -> Float[Tensor, "N P C"]:
        """Against the pictures themselves, not against what was measured of them."""
        shown = self.frame.to_values(self.reconstruct(fields)) - self.frame.to_values(self.truth)
        return shown.flatten(1, 2)

    def judge(self, shown: Float[Tensor, "N h w C"]) -> dict[str, Float[Tensor, " N"]]:
        """PSNR and SSIM over the whole picture."""
        metrics = {"psnr": psnr(shown.flatten(1, 2), self.truth.flatten(1, 2))}
        return metrics if min(shown.shape[1:3]) < 11 else {**metrics, "ssim": ssim(shown, self.truth)}

    def evaluate(self, fields: Field) -> Evaluation:
        """What `judge` says, and pictures."""
        shown = self.reconstruct(fields)
        return Evaluation(metrics=self.judge(shown), picture=to_bytes(shown[0]))

    def write(self, fields: Field, folder: Path) -> list[Path]:
        """NAME.png (`write_shown`), NAME.error.png and NAME.truth.png of each signal."""
        shown = self.reconstruct(fields)
        (height, width), scale = self.truth.shape[1:3], self.options.scale
        large = shown if scale == 1 else self.reconstruct(fields, (height * scale, width * scale))
        files = []
        for name, picture, own, truth in zip(self.names, large, shown, self.truth, strict=True):
            stem = Path(name).stem
            files += write_shown(folder / f"{stem}.png", picture, truth)
            files.append(write_picture(folder / f"{stem}.error.png", error_map(own, truth)))
            files.append(write_picture(folder / f"{stem}.truth.png", to_bytes(truth)))
        return files
