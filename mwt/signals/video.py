"""Video: a field over (t, y, x), from a folder of frames or an animated picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image, ImageSequence
from torch import Tensor

from mwt.errors import InputError
from mwt.fields import Field, Frame
from mwt.plots import curves_figure, figure_png
from mwt.runtime import write_json
from mwt.signals.pictures import PICTURES, error_map, in_order, psnr, read_pictures, ssim, to_bytes, write_shown
from mwt.signals.task import Evaluation, Task, predict, show


def read_video(path: Path, *, grey: bool, limit: int | None) -> Float[Tensor, "T h w C"]:
    """Frames of a folder, by name (2 before 10), or of an animated GIF, WebP or PNG, in [0, 1].

    Raises:
        InputError: no frames, frames of several sizes, a file that is none.
    """
    if path.is_dir():
        files = sorted((file for file in path.iterdir() if file.suffix.lower() in PICTURES), key=in_order)[:limit]
        if not files:
            raise InputError(f"{path} holds no frames (files that end in {', '.join(PICTURES)}).")
        return read_pictures(files, grey=grey)
    try:
        with Image.open(path) as image:
            shown = islice(ImageSequence.Iterator(image), limit)
            frames = [np.asarray(frame.convert("L" if grey else "RGB")) for frame in shown]
    except Exception as error:  # Pillow's plug-ins raise many kinds
        raise InputError(f"{path} is not a video that can be read ({error}); it takes frames or a GIF.") from error
    video = torch.from_numpy(np.stack(frames)).float() / 255
    return video[..., None] if video.ndim == 3 else video


class VideoTask(Task):
    """Mean squared error at the pixels of all frames; PSNR is the mean of the frames' own."""

    metric = "psnr"
    several = False
    takes_folder = True

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """How a video is read."""

        grey: bool = False
        frames: int | None = None
        """Only so many, from the first."""
        stride: int = 1
        """So many pixels along both axes of a frame are averaged into one."""
        low: float = -1.0
        """What black is for the field."""
        high: float = 1.0
        """What white is."""

    def __init__(self, paths: Sequence[Path], options: Options, device: torch.device) -> None:
        if options.frames is not None and options.frames < 2:
            raise InputError(f"signal.frames is {options.frames}; a video has two or more.")
        video = read_video(paths[0], grey=options.grey, limit=options.frames)
        if options.stride < 1 or min(video.shape[1:3]) < options.stride:
            raise InputError(f"signal.stride is {options.stride}; it must lie between 1 and the size of a frame.")
        if options.stride > 1:
            pooled = torch.nn.functional.avg_pool2d(video.movedim(-1, 1), options.stride)
            video = pooled.movedim(1, -1)
        if len(video) < 2:
            raise InputError(f"{paths[0]} has one frame; a video has two or more (task=image takes one).")
        self.names = (paths[0].name,)
        self.truth = video.to(device)
        self.channels = video.shape[-1]
        self.frame = Frame(
            kind="video",
            axes=("t", "y", "x"),
            coordinate_range=((-1.0, 1.0),) * 3,
            size=tuple(video.shape[:3]),
            value_range=(options.low, options.high),
            data_range=(0.0, 1.0),
        )
        self.coords = self.frame.grid(device=device)
        self.values = self.frame.to_values(self.truth.flatten(0, 2))

    @property
    def points(self) -> int:
        """Pixels of all frames."""
        return len(self.coords)

    def loss(self, fields: Field, index: Int[Tensor, " P"] | None, generator: torch.Generator) -> Float[Tensor, " N"]:
        """Mean squared error over pixels and channels."""
        coords, values = (self.coords, self.values) if index is None else (self.coords[index], self.values[index])
        return (predict(fields, coords) - values).square().mean((-2, -1))

    def residual(self, fields: Field) -> Float[Tensor, "N P C"]:
        """At the pixels of all frames."""
        return show(fields, self.coords) - self.values

    def reconstruct(self, fields: Field) -> Float[Tensor, "T h w C"]:
        """The frames that the field shows, not clamped."""
        return self.frame.to_data(show(fields, self.coords))[0].unflatten(0, self.truth.shape[:3])

    def psnr_by_frame(self, shown: Float[Tensor, "T h w C"]) -> Float[Tensor, " T"]:
        """Of each frame by itself."""
        return psnr(shown.flatten(1, 2), self.truth.flatten(1, 2))

    def evaluate(self, fields: Field) -> Evaluation:
        """PSNR and SSIM, frame by frame; the frame in the middle."""
        shown = self.reconstruct(fields)
        by_frame = self.psnr_by_frame(shown)
        metrics = {"psnr": by_frame.mean()[None], "psnr_worst": by_frame.min()[None]}
        if min(shown.shape[1:3]) >= 11:
            metrics["ssim"] = ssim(shown, self.truth).mean()[None]
        return Evaluation(metrics=metrics, picture=to_bytes(shown[len(shown) // 2]))

    def write(self, fields: Field, folder: Path) -> list[Path]:
        """video.gif with the truth on the left and the field on the right, video.error.gif, and the frames.

        Also the PSNR of each frame in order: psnr.json, a list, and its curve psnr.png.
        """
        shown = self.reconstruct(fields)
        by_frame = self.psnr_by_frame(shown).tolist()
        shown = shown.cpu()
        films = {
            "video.gif": [to_bytes(pair) for pair in torch.cat([self.truth.cpu(), shown], dim=2)],
            "video.error.gif": [error_map(*pair) for pair in zip(shown, self.truth.cpu(), strict=True)],
        }
        for name, images in films.items():
            arrays = [image[0] if len(image) == 1 else image.permute(1, 2, 0) for image in images]
            first, *rest = [Image.fromarray(array.contiguous().numpy()) for array in arrays]
            first.save(folder / name, save_all=True, append_images=rest, duration=80, loop=0)
        write_json(folder / "psnr.json", by_frame)
        line = ("", list(range(len(by_frame))), by_frame)
        figure = curves_figure([("PSNR of each frame, dB", [line])], xlabel="frame", whole_numbers=True)
        (folder / "psnr.png").write_bytes(figure_png(figure))
        files = [folder / name for name in (*films, "psnr.png", "psnr.json")]
        for i, (frame, truth) in enumerate(zip(shown, self.truth, strict=True)):
            files += write_shown(folder / f"{i:05d}.png", frame, truth)
        return files
