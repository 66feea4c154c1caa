"""A picture from its gradient or its Laplacian alone: Poisson reconstruction (Sitzmann et al. 2020, section 4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from mwt.errors import InputError
from mwt.fields import Field
from mwt.signals.image import ImageOptions, ImageTask
from mwt.signals.pictures import psnr, to_bytes, write_picture
from mwt.signals.task import means


def finite_gradient(values: Float[Tensor, "N h w C"], spacing: tuple[float, float]) -> Float[Tensor, "N h w C 2"]:
    """(d/dy, d/dx) by central differences, one-sided at the borders, as `numpy.gradient` does."""
    return torch.stack(torch.gradient(values, spacing=spacing, dim=(1, 2)), dim=-1)


def finite_laplacian(values: Float[Tensor, "N h w C"], spacing: tuple[float, float]) -> Float[Tensor, "N h w C"]:
    """The five-point stencil; beyond the border the picture goes on with the border's values (no flux)."""
    padded = F.pad(values.movedim(-1, 1), (1, 1, 1, 1), mode="replicate").movedim(1, -1)
    middle = 2 * values
    down = (padded[:, 2:, 1:-1] + padded[:, :-2, 1:-1] - middle) / spacing[0] ** 2
    right = (padded[:, 1:-1, 2:] + padded[:, 1:-1, :-2] - middle) / spacing[1] ** 2
    return down + right


def field_gradient(
    fields: Field, coords: Float[Tensor, "P D"], count: int, *, laplacian: bool
) -> Float[Tensor, "N P C D"] | Float[Tensor, "N P C"]:
    """Derivatives of N fields with respect to coordinates, by autograd, with a graph to their parameters."""
    own = coords.expand(count, -1, -1).clone().requires_grad_()
    values = fields(own if fields.copies is not None else own[0])
    values = values if values.ndim == 3 else values[None]
    rows = []
    for channel in range(values.shape[-1]):
        [gradient] = torch.autograd.grad(values[..., channel].sum(), own, create_graph=True)
        if laplacian:
            second = [
                torch.autograd.grad(gradient[..., axis].sum(), own, create_graph=True)[0][..., axis]
                for axis in range(coords.shape[-1])
            ]
            rows.append(torch.stack(second).sum(0))
        else:
            rows.append(gradient)
    return torch.stack(rows, dim=2)


def solve_laplacian(laplacian: Float[Tensor, "N h w C"], spacing: tuple[float, float]) -> Float[Tensor, "N h w C"]:
    """The picture with this five-point Laplacian, no flux through its border and mean 0, exact (cosine transforms)."""
    import numpy as np
    from scipy.fft import dctn, idctn

    array = laplacian.double().cpu().numpy()
    height, width = array.shape[1:3]
    rows = (2 * np.cos(np.pi * np.arange(height) / height) - 2) / spacing[0] ** 2
    columns = (2 * np.cos(np.pi * np.arange(width) / width) - 2) / spacing[1] ** 2
    eigenvalues = rows[:, None] + columns[None, :]
    eigenvalues[0, 0] = 1.0
    spectrum = dctn(array, axes=(1, 2), norm="ortho") / eigenvalues[None, ..., None]
    spectrum[:, 0, 0] = 0.0  # the mean is not determined
    return torch.from_numpy(idctn(spectrum, axes=(1, 2), norm="ortho")).to(laplacian)


def solve_gradient(gradient: Float[Tensor, "N h w C 2"], spacing: tuple[float, float]) -> Float[Tensor, "N h w C"]:
    """The picture whose central differences are nearest to these, by least squares (scipy's LSMR, 1,000 iterations)."""
    import numpy as np
    from scipy.sparse import eye_array, kron, lil_array, vstack
    from scipy.sparse.linalg import lsmr

    def line(count: int, step: float) -> Any:
        matrix = lil_array((count, count))
        for i in range(count):
            before, after = max(i - 1, 0), min(i + 1, count - 1)
            matrix[i, after] += 1 / (step * (after - before))
            matrix[i, before] -= 1 / (step * (after - before))
        return matrix.tocsr()

    count, height, width, channels, _ = gradient.shape
    operator = vstack(
        [kron(line(height, spacing[0]), eye_array(width)), kron(eye_array(height), line(width, spacing[1]))], "csr"
    )
    right = gradient.double().cpu().movedim(-1, 1).flatten(1, 3).numpy()  # [N, 2 h w, C]
    solved = np.stack([[lsmr(operator, one[:, c], maxiter=1000)[0] for c in range(channels)] for one in right])
    return torch.from_numpy(solved).to(gradient).mT.reshape(count, height, width, channels)


class PoissonTask(ImageTask):
    """A picture from derivatives. They say nothing of its mean, which is taken from the truth before judging."""

    derivatives = 1

    @dataclass(frozen=True, kw_only=True)
    class Options(ImageOptions):
        """Those of all pictures, and what is given."""

        given: str = "gradient"
        """gradient or laplacian."""

    options: Options

    def __init__(self, paths: Sequence[Path], options: Options, device: torch.device) -> None:
        if options.given not in ("gradient", "laplacian"):
            raise InputError(f"signal.given is {options.given!r}; it is gradient or laplacian.")
        super().__init__(paths, options, device)
        self.derivatives = 1 if options.given == "gradient" else 2
        spans = [high - low for low, high in self.frame.coordinate_range]
        height, width = self.truth.shape[1:3]
        if min(height, width) < 2:
            raise InputError(f"{paths[0]} is {height} x {width}; task=poisson needs at least 2 pixels along each axis.")
        self.frame = replace(self.frame, meta={"mean": self.truth.mean((1, 2)).tolist()})
        self.spacing = (spans[0] / (height - 1), spans[1] / (width - 1))
        pictures = self.frame.to_values(self.truth)
        if options.given == "gradient":
            self.values = finite_gradient(pictures, self.spacing).flatten(1, 2)
        else:
            self.values = finite_laplacian(pictures, self.spacing).flatten(1, 2)
        self.size = self.values.square().flatten(1).mean(1).clamp_min(1e-12)
        """Mean square of what is given [N]: losses are shares of it, so that rates do not depend on the resolution."""

    def loss(self, fields: Field, index: Int[Tensor, " P"] | None, generator: torch.Generator) -> Float[Tensor, " N"]:
        """Mean squared error of the derivatives, as a share of their mean square."""
        coords, values = self.coords, self.values
        if index is not None:
            coords, values = coords[index], values[:, index]
        found = field_gradient(fields, coords, self.count, laplacian=self.derivatives == 2)
        return (found - values).square().flatten(1).mean(1) / self.size

    def reconstruct(self, fields: Field, size: tuple[int, int] | None = None) -> Float[Tensor, "N h w C"]:
        """The pictures with the truth's mean, channel by channel."""
        shown = super().reconstruct(fields, size)
        return shown + (self.truth.mean((1, 2), keepdim=True) - shown.mean((1, 2), keepdim=True))

    def judge(self, shown: Float[Tensor, "N h w C"]) -> dict[str, Float[Tensor, " N"]]:
        """Also after the best scale and shift, as the literature reports it."""
        x, y = shown.flatten(1), self.truth.flatten(1)
        x0, y0 = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
        scale = (x0 * y0).sum(1, keepdim=True) / x0.square().sum(1, keepdim=True).clamp_min(1e-12)
        best = (x0 * scale + y.mean(1, keepdim=True)).view_as(shown)
        return {**super().judge(shown), "psnr_affine": psnr(best.flatten(1, 2), self.truth.flatten(1, 2))}

    def baselines(self) -> dict[str, dict[str, float]]:
        """What a linear solver makes of the same derivatives (scipy)."""
        given = self.values.unflatten(1, self.truth.shape[1:3])
        solve = solve_gradient if self.options.given == "gradient" else solve_laplacian
        solved = self.frame.to_data(solve(given, self.spacing))
        solved = solved + (self.truth.mean((1, 2), keepdim=True) - solved.mean((1, 2), keepdim=True))
        return {"linear solver": means(self.judge(solved))}

    def write(self, fields: Field, folder: Path) -> list[Path]:
        """The reconstructions, and beside them the size of what was given."""
        files = super().write(fields, folder)
        given = self.values.abs() if self.values.ndim == 3 else self.values.norm(dim=-1)
        for name, size in zip(self.names, given.unflatten(1, self.truth.shape[1:3]), strict=True):
            shown = size / size.flatten().quantile(0.99) if size.numel() < 2**24 else size / size.max()
            files.append(write_picture(folder / f"{Path(name).stem}.measured.png", to_bytes(shown)))
        return files
