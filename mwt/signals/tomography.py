"""Tomography: a slice from its integrals along parallel rays (computed tomography, Radon transform).

Geometry, as in scikit-image's `radon(circle=True)`: an n x n picture turns about pixel n // 2; the disc of radius
n // 2 pixels about it is all there is. A view has n rays, one pixel apart. The ray at u (in radii, -1 to 1) of the view
at angle a is the points (y, x) = (-u sin a + v cos a, u cos a + v sin a), |v| <= sqrt(1 - u^2), about the centre.
Integrals are in radii: the sum over pixels that `radon` gives is n // 2 times as large.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from mwt.errors import InputError
from mwt.fields import Field
from mwt.rng import derived_seed
from mwt.signals.dicom import is_dicom, read_dicom
from mwt.signals.image import ImageOptions, ImageTask
from mwt.signals.pictures import PICTURES, centre, psnr, read_picture, to_bytes, write_picture
from mwt.signals.task import means, predict, show, signal_names


@dataclass(frozen=True)
class Scan:
    """Where rays run: `size` rays a view through a picture of size x size, `samples` points along each."""

    size: int
    angles: Float[Tensor, " V"]
    """In radians."""
    samples: int

    @property
    def radius(self) -> float:
        """Of the disc, in coordinates of the picture's frame, whose pixels run from -1 to 1."""
        return 2 * (self.size // 2) / (self.size - 1)

    @property
    def centre(self) -> float:
        """The coordinate of pixel size // 2 along both axes: 0 for odd sizes."""
        return 2 * (self.size // 2) / (self.size - 1) - 1

    @property
    def rays(self) -> int:
        """All of them, view by view."""
        return len(self.angles) * self.size

    def points(self, rays: Int[Tensor, " R"]) -> tuple[Float[Tensor, "R S 2"], Float[Tensor, " R"]]:
        """Points (y, x) in the middle of equal pieces of each ray's chord, and the length of a piece in radii."""
        views, detectors = rays // self.size, rays % self.size
        u = (detectors - self.size // 2) / (self.size // 2)
        half = (1 - u.square()).clamp_min(0).sqrt()
        middle = (2 * torch.arange(self.samples, device=rays.device) + 1) / self.samples - 1
        v = half[:, None] * middle
        angles = self.angles[views]
        sin, cos = angles.sin()[:, None], angles.cos()[:, None]
        places = torch.stack([v * cos - u[:, None] * sin, u[:, None] * cos + v * sin], dim=-1)
        return places * self.radius + self.centre, 2 * half / self.samples

    def integrals(
        self, values: Callable[[Float[Tensor, "P 2"]], Float[Tensor, "N P"]], rays: Int[Tensor, " R"]
    ) -> Float[Tensor, "N R"]:
        """Line integrals, in radii, of whatever `values` gives at points (the midpoint rule)."""
        points, pieces = self.points(rays)
        return values(points.flatten(0, 1)).unflatten(1, points.shape[:2]).sum(-1) * pieces

    def inside(self, coords: Float[Tensor, "P 2"]) -> Bool[Tensor, " P"]:
        """Which points lie in the disc."""
        return (coords - self.centre).square().sum(-1) <= self.radius**2 * (1 + 1e-6)

    def of_pictures(self, pictures: Float[Tensor, "N n n"], *, samples: int | None = None) -> Float[Tensor, "N V n"]:
        """Sinograms of pictures, between whose pixels values are interpolated linearly."""
        scan = Scan(self.size, self.angles, samples or self.samples)

        def values(coords: Tensor) -> Tensor:
            grid = coords.flip(-1).expand(len(pictures), 1, -1, -1)
            return F.grid_sample(pictures[:, None], grid, align_corners=True)[:, 0, 0]

        parts = torch.arange(self.rays, device=pictures.device).split(4096)
        return torch.cat([scan.integrals(values, part) for part in parts], dim=1).unflatten(1, (-1, self.size))


def add_noise(sinogram: Float[Tensor, "V n"], options: TomographyTask.Options, name: str) -> Float[Tensor, "V n"]:
    """What a detector would have measured; as it is, where no noise is asked for.

    photons: Beer and Lambert's law. The largest integral is taken as an optical depth of `attenuation`; counts are
    Poisson(photons exp(-depth)) + readout N(0, 1), at least one, and the integral is what their logarithm says.
    sigma: Gaussian, of so large a share of the largest integral.
    Random numbers depend on `noise_seed` and the file's name: the same whatever is fitted beside it.

    Raises:
        InputError: a negative deviation, no photons, or both kinds at once.
    """
    generator = torch.Generator().manual_seed(derived_seed(options.noise_seed, f"tomography/{name}"))
    if options.sigma < 0 or options.readout < 0 or options.attenuation <= 0:
        raise InputError("signal.sigma and signal.readout cannot be negative, and signal.attenuation must be positive.")
    largest = float(sinogram.max())
    if options.photons is None:
        return sinogram + options.sigma * largest * torch.randn(sinogram.shape, generator=generator)
    if options.photons <= 0 or options.sigma > 0:
        raise InputError("signal.photons must be positive, and is given instead of signal.sigma.")
    depth = options.attenuation / largest
    counts = torch.poisson(options.photons * (-depth * sinogram).exp(), generator=generator)
    counts = (counts + options.readout * torch.randn(sinogram.shape, generator=generator)).clamp_min(1.0)
    return -(counts / options.photons).log() / depth


def filtered_back_projection(sinogram: Float[Tensor, "V n"], angles: Float[Tensor, " V"]) -> Float[Tensor, "n n"]:
    """scikit-image's `iradon` with a ramp filter, of integrals in radii.

    Raises:
        ImportError: scikit-image is not installed.
    """
    from skimage.transform import iradon

    size = sinogram.shape[1]
    pixels = (sinogram.double() * (size // 2)).T.cpu().numpy()
    degrees = np.rad2deg(angles.double().cpu().numpy())
    return torch.from_numpy(iradon(pixels, theta=degrees, filter_name="ramp", circle=True)).float()


class TomographyTask(ImageTask):
    """Mean squared error of line integrals; a point is a ray. The slice itself is used to simulate and to judge.

    PSNR and SSIM are those inside the disc: PSNR over its pixels, SSIM over windows whose middle lies in it, with what
    lies outside set to black.
    """

    between = True
    endings = (*PICTURES, ".dcm")

    @dataclass(frozen=True, kw_only=True)
    class Options(ImageOptions):
        """The slice (a picture, as grey and cut to a square; a DICOM file), the scan, and the noise."""

        low: float = 0.0
        high: float = 1.0
        views: int = 40
        endpoint: bool = False
        """Angles from 0 to 180 degrees: with 180 itself or without."""
        samples: int | None = None
        """Points along each ray; null: as many as pixels along the picture."""
        window: tuple[float, ...] = ()
        """DICOM: (low, high) in its units (CT: Hounsfield) that become 0 and 1; (): the file's own, or all there is."""
        sigma: float = 0.0
        """Gaussian noise, as a share of the largest integral."""
        photons: float | None = None
        """Photons that enter along each ray: Poisson noise."""
        readout: float = 0.0
        """Standard deviation of the noise of reading, in photons."""
        attenuation: float = 3.0
        """photons: the optical depth of the largest integral (a share exp(-3) passes)."""
        noise_seed: int = 0

    options: Options

    @classmethod
    def takes(cls, path: Path) -> bool:
        """Also DICOM files without an ending."""
        return super().takes(path) or is_dicom(path)

    @classmethod
    def shapes(cls, paths: Sequence[Path], options: Any) -> list[tuple[int, ...]]:
        """Height, width and channels of the squares."""
        return [tuple(read_slice(path, options).shape) for path in paths]

    def __init__(self, paths: Sequence[Path], options: Options, device: torch.device) -> None:
        if options.views < 1 or (options.samples is not None and options.samples < 2):
            raise InputError("signal.views must be at least 1 and signal.samples at least 2, or null.")
        if len(options.window) not in (0, 2):
            raise InputError(f"signal.window has {len(options.window)} numbers; give two, or none.")
        slices = [read_slice(path, options) for path in paths]
        for path, picture in zip(paths, slices, strict=True):
            if picture.shape != slices[0].shape:
                raise InputError(
                    f"{path} is {len(picture)} pixels wide and {paths[0]} {len(slices[0])}; slices that are fitted "
                    "together have one size (signal.crop)."
                )
        self.names = signal_names(paths)
        self.options = options
        size = len(slices[0])
        if size < 4:
            raise InputError(f"{paths[0]} is {size} pixels wide; a slice has at least 4.")
        steps = options.views - 1 if options.endpoint else options.views
        angles = torch.arange(options.views, dtype=torch.float64) * (math.pi / max(steps, 1))
        self.scan = Scan(size, angles.float().to(device), options.samples or size)
        pictures = torch.stack(slices).to(device)
        self.set_truth(pictures)
        self.disc = self.scan.inside(self.coords).view(size, size)
        self.set_truth(pictures * self.disc[..., None])
        clean = self.scan.of_pictures(self.truth[..., 0], samples=2 * size).cpu()
        if not float(clean.flatten(1).amax(1).min()) > 0:
            raise InputError("A slice is black inside the disc: there is nothing to scan (signal.window).")
        noisy = [add_noise(one, options, path.name) for path, one in zip(paths, clean, strict=True)]
        self.measured = torch.stack(noisy).to(device)
        """Sinograms [N, V, n] in radii."""

    @property
    def points(self) -> int:
        """Rays of all views."""
        return self.scan.rays

    def loss(self, fields: Field, index: Int[Tensor, " P"] | None, generator: torch.Generator) -> Float[Tensor, " N"]:
        """Mean squared error of the integrals along rays."""
        rays = torch.arange(self.scan.rays, device=self.coords.device) if index is None else index
        found = self.scan.integrals(lambda coords: self.frame.to_data(predict(fields, coords))[..., 0], rays)
        return (found - self.measured.flatten(1)[:, rays]).square().mean(-1)

    def reconstruct(self, fields: Field, size: tuple[int, int] | None = None) -> Float[Tensor, "N h w C"]:
        """The slices, black outside the disc."""
        shown = super().reconstruct(fields, size)
        coords = self.coords if size is None else self.frame.grid(size, device=self.coords.device)
        return shown * self.scan.inside(coords).view(1, *shown.shape[1:3], 1)

    def judge(self, shown: Float[Tensor, "N h w C"]) -> dict[str, Float[Tensor, " N"]]:
        """PSNR and SSIM inside the disc."""
        metrics = {"psnr": psnr(shown[:, self.disc], self.truth[:, self.disc])}
        if len(self.disc) < 11:
            return metrics
        from torchmetrics.functional.image import structural_similarity_index_measure

        pair = (shown.clamp(0, 1).movedim(-1, 1), self.truth.movedim(-1, 1))
        _, everywhere = structural_similarity_index_measure(
            *pair, data_range=1.0, reduction="none", return_full_image=True
        )
        return {**metrics, "ssim": everywhere[:, 0, self.disc].mean(-1)}

    def back_projected(self) -> Float[Tensor, "N h w C"]:
        """What filtered back-projection makes of the same sinograms.

        Raises:
            ImportError: scikit-image is not installed.
        """
        found = [filtered_back_projection(one, self.scan.angles) for one in self.measured]
        return torch.stack(found).to(self.truth.device)[..., None] * self.disc[..., None]

    def baselines(self) -> dict[str, dict[str, float]]:
        """Filtered back-projection, where scikit-image is at hand."""
        try:
            return {"filtered back-projection": means(self.judge(self.back_projected()))}
        except ImportError:
            return {}

    def write(self, fields: Field, folder: Path) -> list[Path]:
        """The slices; NAME.sinogram.png, what was measured above what the field gives; NAME.fbp.png."""
        files = super().write(fields, folder)
        parts = torch.arange(self.scan.rays, device=self.coords.device).split(2048)

        def values(coords: Tensor) -> Tensor:
            return self.frame.to_data(show(fields, coords))[..., 0]

        found = torch.cat([self.scan.integrals(values, part) for part in parts], dim=1).view_as(self.measured)
        for name, measured, own in zip(self.names, self.measured, found, strict=True):
            pair = torch.cat([measured, own])[..., None] / measured.max()
            files.append(write_picture(folder / f"{Path(name).stem}.sinogram.png", to_bytes(pair)))
        try:
            projected = self.back_projected()
        except ImportError:
            return files
        for name, picture in zip(self.names, projected, strict=True):
            files.append(write_picture(folder / f"{Path(name).stem}.fbp.png", to_bytes(picture)))
        return files

    def facts(self) -> dict[str, Any]:
        """Also the scan."""
        return {**super().facts(), "views": self.options.views, "samples": self.scan.samples}


def read_slice(path: Path, options: TomographyTask.Options) -> Float[Tensor, "n n 1"]:
    """A picture or a DICOM file as a grey square: `crop`, or the largest in the middle.

    Raises:
        InputError: as of `read_picture` and `read_dicom`.
    """
    picture = read_dicom(path, options.window) if is_dicom(path) else read_picture(path, grey=True)
    return centre(picture, options.crop or min(picture.shape[:2]), str(path))
