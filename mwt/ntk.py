"""The neural tangent kernel of an ordinary field: what gradient descent learns fast, and what it does not.

The empirical kernel (Jacot et al. 2018) of a field f with parameters w, at points x_i, is K = sum over outputs c of
J_c J_c^T, with J_c[i] = d f_c(x_i) / d w. Near w, gradient descent takes the residual's part along an eigenvector away
at a rate in proportion to its eigenvalue: a spectrum that falls steeply is a field that learns some things and never
the others. Which, the eigenvectors' frequencies say. Complex weights are pairs of reals, and count as two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import functional_call, jacrev, vjp, vmap

from mwt.errors import InputError, TrainingError
from mwt.fields.activations import Finer
from mwt.fields.field import Field
from mwt.fields.layers import BatchNorm
from mwt.fields.tiled import TileLinear

MEMORY = 2**28
"""Bytes that Jacobians take at once."""
FLOOR = 1e-10
"""Eigenvalues below this share of the largest are rounding errors as far as `Spectrum.decay` is concerned."""


def jacobian(
    field: Field, coords: Float[Tensor, "P D"], *, rows: slice = slice(None), dtype: torch.dtype = torch.float64
) -> Float[Tensor, "p C W"]:
    """Derivatives of the values at the points `rows` with respect to the W real parameters, in their order.

    Computed in `dtype`, whatever the precision of the field; as in training: a clamped output is not clamped. With
    batch normalisation a value depends on all points, and so do its derivatives: they are those of the whole set.
    FINER's are the whole ones, also where training leaves a factor out of its gradient (`detach_scale`): a kernel is
    one of the function.

    Raises:
        InputError: a field with copies.
    """
    if field.copies is not None:
        raise InputError(f"The kernel is that of one network; this field has {field.copies} copies.")
    own = {name: value.detach().to(dtype) for name, value in field.named_parameters()}
    fixed = {name: value.to(dtype) if value.is_floating_point() else value for name, value in field.named_buffers()}
    coords = coords.to(dtype)
    training = field.training
    detached = [module for module in field.modules() if isinstance(module, Finer) and module.detach]
    field.train()
    for layer in detached:
        layer.detach = False
    try:
        if any(isinstance(module, BatchNorm) for module in field.modules()):
            parts = _together(field, own, fixed, coords, rows)
        elif any(isinstance(module, TileLinear) for module in field.modules()):
            # points are sorted by tile, and vmap forbids looking at them
            parts = _together(field, own, fixed, coords[rows], slice(None))
        else:

            def value(parameters: dict[str, Tensor], point: Tensor) -> Tensor:
                found: Tensor = functional_call(field, (parameters, fixed), (point[None],))
                return found[0]

            parts = vmap(jacrev(value), in_dims=(None, 0))(own, coords[rows])
    finally:
        for layer in detached:
            layer.detach = True
        field.train(training)
    return torch.cat([part.reshape(*part.shape[:2], -1) for part in parts.values()], dim=2)


def _together(
    field: Field, own: dict[str, Tensor], fixed: dict[str, Tensor], coords: Tensor, rows: slice
) -> dict[str, Tensor]:
    """Derivatives [p, C, ...] by each parameter, all points at once: a backward pass through all for each value."""

    def values(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        copies = {name: value.clone() for name, value in buffers.items()}  # the running statistics, which it writes
        found: Tensor = functional_call(field, (parameters, fixed | copies), (coords,))
        return found

    written = {name: value.clone() for name, value in fixed.items() if value.is_floating_point()}
    found, pull = vjp(values, own, written)  # type: ignore[misc]
    ones = torch.eye(found.numel(), dtype=found.dtype, device=found.device).unflatten(1, found.shape)
    chosen = ones.unflatten(0, found.shape)[rows].flatten(0, 1)
    pulled = [pull(one)[0] for one in chosen]  # one after the other: the activations of all points are large enough
    return {name: torch.stack([part[name] for part in pulled]).unflatten(0, (-1, found.shape[-1])) for name in own}


def kernel(
    field: Field, coords: Float[Tensor, "P D"], *, memory: int = MEMORY, dtype: torch.dtype = torch.float64
) -> Float[Tensor, "P P"]:
    """The empirical kernel, symmetric to the last bit, block by block: Jacobians of all points are never held at once.

    Args:
        memory: bytes for Jacobians. With less than they all need, those of earlier points are computed again for each
            block of rows.

    Raises:
        InputError: as of `jacobian`.
    """
    outputs = field.channels * sum(parameter.numel() for parameter in field.parameters())
    width = torch.finfo(dtype).bits // 8
    chunk = max(1, memory // (4 * outputs * width))  # two blocks, and the parts that each is put together from
    blocks = [slice(start, start + chunk) for start in range(0, len(coords), chunk)]
    result = coords.new_zeros((len(coords), len(coords)), dtype=dtype)
    for i, rows in enumerate(blocks):
        left = jacobian(field, coords, rows=rows, dtype=dtype).flatten(1)
        result[rows, rows] = left @ left.mT
        for columns in blocks[:i]:
            result[rows, columns] = left @ jacobian(field, coords, rows=columns, dtype=dtype).flatten(1).mT
    lower = result.tril()
    return lower + lower.tril(-1).mT


# ---- the spectrum ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Eigenvalues of a kernel, the largest first, and their eigenvectors as columns."""

    values: Float[Tensor, " P"]
    vectors: Float[Tensor, "P P"]

    @property
    def relative(self) -> Float[Tensor, " P"]:
        """lambda_i / lambda_1; all 0 for a kernel that is 0."""
        return self.values / self.values[0].clamp_min(torch.finfo(self.values.dtype).tiny)

    @property
    def effective_rank(self) -> float:
        """(sum of lambda)^2 / sum of lambda^2: P where all are equal, 1 where there is one; 0 for a zero kernel."""
        share = self.relative
        return float(share.sum().square() / share.square().sum()) if share[0] > 0 else 0.0

    def fraction_above(self, share: float) -> float:
        """How many eigenvalues, of all, are above `share` of the largest."""
        return float((self.relative > share).double().mean())

    @property
    def decay(self) -> float:
        """a of lambda_i ~ i^-a: least squares in logarithms, over eigenvalues above 1e-10 of the largest."""
        used = self.relative[self.relative > FLOOR]
        if len(used) < 2:
            return math.inf
        x = torch.arange(1, len(used) + 1, dtype=used.dtype, device=used.device).log()
        y = used.log()
        x, y = x - x.mean(), y - y.mean()
        return -float((x * y).sum() / x.square().sum())

    def summary(self) -> dict[str, float]:
        """The numbers by which spectra are compared."""
        return {
            "effective_rank": self.effective_rank,
            **{f"above_1e-{k}": self.fraction_above(10.0**-k) for k in (2, 4, 6)},
            "decay": self.decay,
            "log10_trace": math.log10(max(float(self.values.sum()), 1e-300)),
        }

    def energy(self, residual: Float[Tensor, "P C"]) -> Float[Tensor, " P"]:
        """The share of the residual's energy along each eigenvector; sums to one (to zero where there is none)."""
        parts = (self.vectors.mT @ residual.to(self.vectors)).square().sum(1)
        return _shares(parts)

    def energy_below(self, residual: Float[Tensor, "P C"], share: float) -> float:
        """The share of the residual's energy along eigenvectors with less than `share` of the largest eigenvalue."""
        return float(self.energy(residual)[self.relative < share].sum())


def spectrum(matrix: Float[Tensor, "P P"]) -> Spectrum:
    """The eigenvalues of a symmetric kernel in float64; what rounding makes negative is 0.

    Raises:
        TrainingError: numbers that are not finite.
    """
    if not bool(matrix.isfinite().all()):
        raise TrainingError(
            "The kernel holds numbers that are not finite, as the field's weights or its derivatives do."
        )
    matrix = matrix.double()
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return Spectrum(values=values.flip(0).clamp_min(0), vectors=vectors.flip(1))


# ---- frequencies -----------------------------------------------------------------------------------------------------


def _shares(parts: Tensor) -> Tensor:
    return parts / parts.sum().clamp_min(torch.finfo(parts.dtype).tiny)


def frequency_bins(size: tuple[int, ...], device: torch.device | None = None) -> Int[Tensor, " P"]:
    """For each coefficient of the DFT of a grid, row by row, its frequency: periods over the signal, rounded.

    In more than one dimension that is the length of the vector of frequencies, so that a bin is a ring.
    """
    lines = [torch.fft.fftfreq(count, 1 / count, device=device, dtype=torch.float64) for count in size]
    squares = torch.stack([line.square() for line in torch.meshgrid(*lines, indexing="ij")])
    return squares.sum(0).sqrt().round().long().flatten()


def power_by_frequency(values: Float[Tensor, "P n"], size: tuple[int, ...]) -> Float[Tensor, "F n"]:
    """The energy of each of n signals on a grid (last axis fastest) at 0, 1, 2, ... periods over the signal.

    The sum over frequencies is the sum of squares of the values (Parseval).

    Raises:
        InputError: `size` has another number of points.
    """
    if math.prod(size) != len(values):
        raise InputError(f"{len(values)} values do not lie on a grid of {' x '.join(map(str, size))}.")
    axes = tuple(range(len(size)))
    waves = torch.fft.fftn(values.double().unflatten(0, size), dim=axes, norm="ortho").flatten(0, len(size) - 1)
    bins = frequency_bins(size, values.device)
    power = torch.zeros(int(bins.max()) + 1, values.shape[1], dtype=torch.float64, device=values.device)
    return power.index_add_(0, bins, waves.abs().square())


def energy_by_frequency(residual: Float[Tensor, "P C"], size: tuple[int, ...]) -> Float[Tensor, " F"]:
    """The share of the residual's energy at each frequency, all channels together; sums to one (to zero without any).

    Raises:
        InputError: as of `power_by_frequency`.
    """
    return _shares(power_by_frequency(residual, size).sum(1))
