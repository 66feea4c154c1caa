"""The rank of weight matrices while a network is trained, which is what Muon preserves and Adam loses.

McGinnis et al., "Optimizing Rank for High-Fidelity Implicit Neural Representations" (ICML 2026), figure 1. The
functions take a matrix [m, n] or a stack [..., m, n] and give a number for each matrix.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Inexact
from matplotlib.figure import Figure
from torch import Tensor, nn

from mwt.errors import InputError
from mwt.muon_groups import split_parameters
from mwt.plots import Line, curves_figure


def singular_values(matrices: Inexact[Tensor, "*N m n"]) -> Float[Tensor, "*N k"]:
    """Falling; in single precision at least."""
    matrices = matrices.detach()
    return torch.linalg.svdvals(matrices if matrices.dtype.itemsize >= 4 else matrices.float())


def _stable_rank(values: Tensor) -> Tensor:
    shares = values / values[..., :1]  # before squaring, which underflows for very small weights
    return shares.square().sum(-1)


def _effective_rank(values: Tensor, *, squared: bool = True) -> Tensor:
    shares = values / values[..., :1]
    if squared:
        shares = shares.square()
    shares = shares / shares.sum(-1, keepdim=True)
    return torch.special.entr(shares).sum(-1).exp()


def spectral_norm(matrices: Inexact[Tensor, "*N m n"]) -> Float[Tensor, "*N"]:
    """The largest singular value."""
    return singular_values(matrices)[..., 0]


def frobenius_norm(matrices: Inexact[Tensor, "*N m n"]) -> Float[Tensor, "*N"]:
    """The root of the sum of squares."""
    return torch.linalg.vector_norm(singular_values(matrices), dim=-1)


def stable_rank(matrices: Inexact[Tensor, "*N m n"]) -> Float[Tensor, "*N"]:
    """Squared Frobenius norm over squared spectral norm: 1 for rank one, k for k equal singular values.

    About n/4 for an n x n matrix of independent entries. Of a zero matrix: NaN.
    """
    return _stable_rank(singular_values(matrices))


def effective_rank(matrices: Inexact[Tensor, "*N m n"], *, squared: bool = True) -> Float[Tensor, "*N"]:
    """exp of the entropy of the singular values' distribution. Of a zero matrix: NaN.

    Args:
        squared: of the squared singular values, as in the code of McGinnis et al.; False: of the singular values
            themselves, as Roy and Vetterli (2007) define it, which gives more.
    """
    return _effective_rank(singular_values(matrices), squared=squared)


def condition_number(matrices: Inexact[Tensor, "*N m n"]) -> Float[Tensor, "*N"]:
    """Largest over smallest singular value; inf where that is 0."""
    values = singular_values(matrices)
    return values[..., 0] / values[..., -1]


@dataclass(frozen=True, kw_only=True)
class RankRow:
    """One layer at one step. Of a stack of networks: means over them. None: not finite (a zero or singular matrix)."""

    step: int
    layer: str
    stable_rank: float | None
    effective_rank: float | None
    """Of squared singular values."""
    spectral_norm: float | None
    frobenius_norm: float | None
    condition_number: float | None


QUANTITIES = tuple(field.name for field in dataclasses.fields(RankRow) if field.name not in ("step", "layer"))
"""What a row holds beside step and layer."""


class RankTracker:
    """Records the ranks of a network's hidden matrices during a fit: call `record` every few hundred steps.

    It waits for the device and computes the singular values of every matrix: milliseconds for 256 x 256.
    """

    def __init__(self, module: nn.Module, *, names: Sequence[str] | None = None) -> None:
        """Of the matrices that Muon would take (`mwt.muon_groups`), or of the 2-D parameters with the given names.

        Raises:
            InputError: there are none, or a name is not that of a matrix.
        """
        self.rows: list[RankRow] = []
        if names is None:
            roles = split_parameters(module).muon
            self._matrices = lambda: {role.name: role.matrices for role in roles}
            return
        named = dict(module.named_parameters())
        for name in names:
            if name not in named or named[name].ndim != 2:
                raise InputError(f"{name} is no matrix of {type(module).__name__}.")
        self._matrices = lambda: {name: named[name].detach() for name in names}

    def record(self, step: int) -> list[RankRow]:
        """Add a row for each layer as it is after `step` optimizer steps, and return these rows."""
        rows = []
        for layer, matrices in self._matrices().items():
            values = singular_values(matrices)
            numbers = {
                "stable_rank": _stable_rank(values),
                "effective_rank": _effective_rank(values),
                "spectral_norm": values[..., 0],
                "frobenius_norm": torch.linalg.vector_norm(values, dim=-1),
                "condition_number": values[..., 0] / values[..., -1],
            }
            means = {name: number.double().mean() for name, number in numbers.items()}
            plain = {name: mean.item() if mean.isfinite() else None for name, mean in means.items()}
            rows.append(RankRow(step=step, layer=layer, **plain))
        self.rows += rows
        return rows

    def as_json(self) -> list[dict[str, int | str | float | None]]:
        """The rows as plain objects."""
        return [dataclasses.asdict(row) for row in self.rows]


SHOWN = ("stable_rank", "effective_rank", "spectral_norm", "condition_number")
"""What `rank_figure` shows of QUANTITIES."""


def rank_figure(runs: Mapping[str, Sequence[RankRow]], *, quantities: Sequence[str] = SHOWN) -> Figure:
    """A panel for each layer with a curve for each run, as figure 1 of McGinnis et al. does for Adam and Muon.

    Args:
        runs: name and rows of up to three runs of one architecture; `read_ranks` has those of a fit.
        quantities: of QUANTITIES, one below the other.

    Raises:
        InputError: no run or too many, another quantity, or runs with different layers.
    """
    if unknown := [quantity for quantity in quantities if quantity not in QUANTITIES]:
        raise InputError(f"quantity is {unknown[0]!r}; there are {', '.join(QUANTITIES)}.")
    if not 1 <= len(runs) <= 3:
        raise InputError(f"A figure of ranks shows one to three runs, not {len(runs)}.")
    layers = {name: list(dict.fromkeys(row.layer for row in rows)) for name, rows in runs.items()}
    first = next(iter(layers.values()))
    if not first or any(own != first for own in layers.values()):
        raise InputError("The runs to be shown have no rows, or not the same layers: " + str(layers))
    panels: list[tuple[str, list[Line]]] = []
    for quantity, layer in itertools.product(quantities, first):
        lines: list[Line] = []
        for name, rows in runs.items():
            points = [(row.step, getattr(row, quantity)) for row in rows if row.layer == layer]
            points = [(step, value) for step, value in points if value is not None]
            lines.append((name, [step for step, _ in points], [value for _, value in points]))
        panels.append((f"{layer}: {quantity.replace('_', ' ')}", lines))
    logarithmic = [title for title, _ in panels if title.endswith(": condition number")]
    return curves_figure(panels, xlabel="step", columns=len(first), log_y=logarithmic)


def read_ranks(run: Path) -> list[RankRow]:
    """The rows that `train.fit` left in a run directory (ranks.json).

    Raises:
        InputError: there is no such file, or it is damaged.
    """
    path = run / "ranks.json"
    try:
        return [RankRow(**row) for row in json.loads(path.read_text())]
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing; fits with hidden matrices and run.ranks=true have one.") from error
    except (OSError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}).") from error
