"""Pictures from less: super-resolution, inpainting, denoising. The field sees what was measured alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from mwt.errors import InputError
from mwt.fields import Field
from mwt.rng import derived_seed
from mwt.signals.image import ImageOptions, ImageTask
from mwt.signals.pictures import psnr, read_picture, to_bytes, write_picture
from mwt.signals.task import means, predict

# ---- super-resolution ------------------------------------------------------------------------------------------------


def downsample(pictures: Float[Tensor, "N h w C"], factor: int) -> Float[Tensor, "N hl wl C"]:
    """Bicubic with antialiasing (the kernel as wide as `factor` pixels), as a camera with larger pixels would see."""
    height, width = pictures.shape[1] // factor, pictures.shape[2] // factor
    small = F.interpolate(pictures.movedim(-1, 1), (height, width), mode="bicubic", antialias=True)
    return small.movedim(1, -1)


def upsample(pictures: Float[Tensor, "N h w C"], factor: int) -> Float[Tensor, "N H W C"]:
    """Bicubic, the baseline, with the literature's kernel: Keys' with -0.5 (torch's plain one has -0.75)."""
    size = (pictures.shape[1] * factor, pictures.shape[2] * factor)
    return F.interpolate(pictures.movedim(-1, 1), size, mode="bicubic", antialias=True).movedim(1, -1)


class SuperResolutionTask(ImageTask):
    """A picture from one that is `factor` times smaller: the field is drawn large, made small, and compared there.

    The large picture is used to make the small one, and to judge. A step draws the whole picture.
    """

    subsets = False
    between = True

    @dataclass(frozen=True, kw_only=True)
    class Options(ImageOptions):
        """Those of all pictures, and the factor."""

        factor: int = 4
        """2, 3, 4, ...; the picture is cropped to a multiple of it."""

    options: Options

    def __init__(self, paths: Sequence[Path], options: Options, device: torch.device) -> None:
        super().__init__(paths, options, device)
        factor = options.factor
        height, width = self.truth.shape[1:3]
        if factor < 2 or min(height, width) < 4 * factor:
            raise InputError(
                f"signal.factor is {factor}, for a picture of {height} x {width}; it must be at least 2 and leave at "
                "least 4 pixels."
            )
        self.set_truth(self.truth[:, : height - height % factor, : width - width % factor])
        self.small = downsample(self.truth, factor)
        self.values = self.frame.to_values(self.small.flatten(1, 2))

    @property
    def points(self) -> int:
        """Pixels of the small picture."""
        return self.small.shape[1] * self.small.shape[2]

    def loss(self, fields: Field, index: Int[Tensor, " P"] | None, generator: torch.Generator) -> Float[Tensor, " N"]:
        """Mean squared error of the drawn picture made small.

        Raises:
            InputError: a subset of points, which the forward model cannot take.
        """
        if index is not None:
            raise InputError("task=super_resolution draws the whole picture in each step: leave out optim.points.")
        large = predict(fields, self.coords).unflatten(1, self.truth.shape[1:3])
        return (downsample(large, self.options.factor).flatten(1, 2) - self.values).square().mean((-2, -1))

    def baselines(self) -> dict[str, dict[str, float]]:
        """Bicubic interpolation."""
        return {"bicubic": means(self.judge(upsample(self.small, self.options.factor)))}

    def write(self, fields: Field, folder: Path) -> list[Path]:
        """The reconstructions, and beside them what was measured and what bicubic makes of it."""
        files = super().write(fields, folder)
        for name, small in zip(self.names, self.small, strict=True):
            large = upsample(small[None], self.options.factor)[0]
            files.append(write_picture(folder / f"{Path(name).stem}.measured.png", to_bytes(small)))
            files.append(write_picture(folder / f"{Path(name).stem}.bicubic.png", to_bytes(large)))
        return files


# ---- inpainting ------------------------------------------------------------------------------------------------------


class InpaintingTask(ImageTask):
    """A picture from some of its pixels. PSNR and SSIM over all pixels, `psnr_missing` over those never seen."""

    @dataclass(frozen=True, kw_only=True)
    class Options(ImageOptions):
        """Those of all pictures, and which pixels are known. Several masks add up."""

        keep: float | None = None
        """Share of pixels, chosen at random, that are known; null: all but for the other masks."""
        box: tuple[int, ...] = ()
        """top, left, height, width of a rectangle that is missing."""
        text: str | None = None
        """Written over the picture, missing where the letters are."""
        mask: str | None = None
        """An image file of the picture's size, as it is after `crop`: black is missing."""
        mask_seed: int = 0

    options: Options

    def __init__(self, paths: Sequence[Path], options: Options, device: torch.device) -> None:
        super().__init__(paths, options, device)
        height, width = self.truth.shape[1:3]
        self.known = known_pixels(height, width, options).to(device)
        """[h, w], of all pictures."""
        self.where = self.known.flatten().nonzero()[:, 0]
        if not 0 < len(self.where) < height * width:
            raise InputError(
                f"{len(self.where)} of {height * width} pixels are known; inpainting needs some known and some "
                "missing: set signal.keep, box, text or mask."
            )

    @property
    def points(self) -> int:
        """Known pixels."""
        return len(self.where)

    def loss(self, fields: Field, index: Int[Tensor, " P"] | None, generator: torch.Generator) -> Float[Tensor, " N"]:
        """Mean squared error over known pixels."""
        return super().loss(fields, self.where if index is None else self.where[index], generator)

    def judge(self, shown: Float[Tensor, "N h w C"]) -> dict[str, Float[Tensor, " N"]]:
        """Also over the missing pixels alone."""
        missing = ~self.known
        return {**super().judge(shown), "psnr_missing": psnr(shown[:, missing], self.truth[:, missing])}

    def measured(self) -> Float[Tensor, "N h w C"]:
        """The pictures with missing pixels grey."""
        return torch.where(self.known[..., None], self.truth, 0.5)

    def baselines(self) -> dict[str, dict[str, float]]:
        """Linear interpolation between known pixels (scipy's griddata), the nearest one outside their hull."""
        filled = torch.stack([_interpolated(picture, self.known) for picture in self.truth.cpu()])
        return {"linear": means(self.judge(filled.to(self.truth.device)))}

    def write(self, fields: Field, folder: Path) -> list[Path]:
        """The reconstructions, and beside them what was measured."""
        files = super().write(fields, folder)
        for name, picture in zip(self.names, self.measured(), strict=True):
            files.append(write_picture(folder / f"{Path(name).stem}.measured.png", to_bytes(picture)))
        return files


def known_pixels(height: int, width: int, options: InpaintingTask.Options) -> Bool[Tensor, "h w"]:
    """Which pixels are known, by every mask that the options name.

    Raises:
        InputError: a mask of another size, a box outside the picture, a share out of range.
    """
    known = torch.ones(height, width, dtype=torch.bool)
    if options.keep is not None:
        if not 0 < options.keep < 1:
            raise InputError(f"signal.keep is {options.keep}; it is a share of pixels between 0 and 1.")
        order = torch.randperm(height * width, generator=_generator(options.mask_seed, "mask"))
        known.view(-1)[order[round(options.keep * height * width) :]] = False
    if options.box:
        if len(options.box) != 4:
            raise InputError(f"signal.box is {list(options.box)}; it is [top, left, height, width].")
        top, left, tall, wide = options.box
        if min(options.box) < 0 or top + tall > height or left + wide > width:
            raise InputError(f"signal.box {list(options.box)} does not lie within the picture of {height} x {width}.")
        known[top : top + tall, left : left + wide] = False
    if options.text:
        known &= ~letters(options.text, height, width)
    if options.mask:
        mask = read_picture(Path(options.mask).expanduser(), grey=True)
        if mask.shape[:2] != (height, width):
            raise InputError(
                f"The mask {options.mask} is {mask.shape[0]} x {mask.shape[1]} and the picture {height} x {width}; "
                "they must have one size."
            )
        known &= mask[..., 0] >= 0.5
    return known


def letters(text: str, height: int, width: int) -> Bool[Tensor, "h w"]:
    """Lines of `text` all over a picture."""
    image = Image.new("1", (width, height))
    size = max(8, height // 12)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size)
    row = (text + " ") * math.ceil(2 * width / max(1.0, pen.textlength(text + " ", font)))
    for number, top in enumerate(range(0, height, round(1.5 * size))):
        pen.text((-number * size, top), row, fill=1, font=font)
    return torch.from_numpy(np.array(image))


def _interpolated(picture: Float[Tensor, "h w C"], known: Bool[Tensor, "h w"]) -> Float[Tensor, "h w C"]:
    from scipy.interpolate import griddata
    from scipy.spatial import QhullError

    at, everywhere = known.cpu().nonzero().numpy(), torch.ones_like(known).cpu().nonzero().numpy()
    values = picture[known.cpu()].numpy()
    try:
        linear = griddata(at, values, everywhere, method="linear")
    except QhullError:  # fewer than four known pixels, or all on a line: they have no triangles
        linear = np.full((len(everywhere), values.shape[1]), np.nan)
    outside = np.isnan(linear)
    linear[outside] = griddata(at, values, everywhere, method="nearest")[outside]
    return torch.from_numpy(linear).float().view_as(picture)


# ---- denoising -------------------------------------------------------------------------------------------------------


class DenoisingTask(ImageTask):
    """A picture from a noisy one. The field is fitted to the noise as well, so the best step comes before the last.

    `psnr` is against the picture without noise, which a real measurement has not; the loss never sees it.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(ImageOptions):
        """Those of all pictures, and the noise, on the scale of black 0 to white 1."""

        sigma: float = 0.1
        """Standard deviation of Gaussian noise, where `photons` is null."""
        photons: float | None = None
        """White has so many photons on average: Poisson noise, as in WIRE and INCODE (tau)."""
        readout: float = 2.0
        """Standard deviation of the noise of reading, in photons."""
        noise_seed: int = 0

    options: Options

    def __init__(self, paths: Sequence[Path], options: Options, device: torch.device) -> None:
        super().__init__(paths, options, device)
        self.noisy = torch.stack(
            [add_noise(picture, options, path.name) for path, picture in zip(paths, self.truth.cpu(), strict=True)]
        ).to(device)
        self.values = self.frame.to_values(self.noisy.flatten(1, 2))

    def baselines(self) -> dict[str, dict[str, float]]:
        """The noisy picture itself, and total-variation denoising (Chambolle 2004) where scikit-image is at hand."""
        found = {"noisy": means(self.judge(self.noisy))}
        try:
            from skimage.restoration import denoise_tv_chambolle
        except ImportError:
            return found
        smooth = [denoise_tv_chambolle(picture.cpu().numpy(), weight=0.1, channel_axis=-1) for picture in self.noisy]
        smooth_tensor = torch.stack([torch.from_numpy(picture).float() for picture in smooth]).to(self.truth.device)
        return {**found, "total variation": means(self.judge(smooth_tensor))}

    def write(self, fields: Field, folder: Path) -> list[Path]:
        """The reconstructions, and beside them what was measured."""
        files = super().write(fields, folder)
        for name, picture in zip(self.names, self.noisy, strict=True):
            files.append(write_picture(folder / f"{Path(name).stem}.measured.png", to_bytes(picture)))
        return files


def add_noise(picture: Float[Tensor, "h w C"], options: DenoisingTask.Options, name: str) -> Float[Tensor, "h w C"]:
    """Gaussian noise, or photon and readout noise: (Poisson(tau x) + readout N(0, 1)) / tau. Not clamped.

    It depends on `noise_seed` and the file's name: the same whatever is fitted beside it.

    Raises:
        InputError: a negative deviation or no photons.
    """
    generator = _generator(options.noise_seed, f"noise/{name}")
    if options.photons is None:
        if options.sigma <= 0:
            raise InputError(f"signal.sigma is {options.sigma}; it must be positive.")
        return picture + options.sigma * torch.randn(picture.shape, generator=generator)
    if options.photons <= 0 or options.readout < 0:
        raise InputError("signal.photons must be positive, and signal.readout cannot be negative.")
    counts = torch.poisson(picture * options.photons, generator=generator)
    return (counts + options.readout * torch.randn(picture.shape, generator=generator)) / options.photons


def _generator(seed: int, purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(derived_seed(seed, purpose))
