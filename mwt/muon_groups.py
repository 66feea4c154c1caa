"""Which parameters of a network Muon takes, by the roles that the network itself declares, and at which rate.

A module says it with a method `muon_parameters()`: (name, parameter, layout) of each weight matrix between two hidden
layers, in forward order. Everything else is Adam's: first and last layers, biases, gains, tables of embeddings and
grids, Fourier matrices, latent codes. Being a matrix is not enough: a hash table is one too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from mwt.errors import InputError, NotDefinedError
from mwt.muon import as_matrices, check_layout

RELATIVE_LR = 0.03
"""`default_lr` as a share of the median spectral norm of the matrices at the beginning."""
RELATIVE_LR_RELU = 0.09
"""The same for plain ReLU networks, whose best rates lie three times as high."""


@runtime_checkable
class MuonModule(Protocol):
    """A module that knows which of its parameters are hidden matrices."""

    def muon_parameters(self) -> list[tuple[str, nn.Parameter, str]]:
        """Name within the module, parameter and layout (`mwt.muon.LAYOUTS`) of each, in forward order."""
        ...


@dataclass(frozen=True, kw_only=True)
class Role:
    """What becomes of one parameter."""

    name: str
    parameter: nn.Parameter
    layout: str | None
    """Of a matrix that Muon takes; None: Adam."""
    why: str

    @property
    def matrices(self) -> Tensor:
        """[..., fan_out, fan_in]"""
        return as_matrices(self.parameter.detach(), self.layout)


@dataclass(frozen=True)
class Split:
    """The parameters of a network, each with its role, in the order in which they are registered."""

    roles: tuple[Role, ...]

    @property
    def muon(self) -> list[Role]:
        """The parameters that Muon takes."""
        return [role for role in self.roles if role.layout is not None]

    @property
    def adam(self) -> list[Role]:
        """The others."""
        return [role for role in self.roles if role.layout is None]

    def muon_groups(self, *, lr: float | None = None, relative: float = RELATIVE_LR, **options: Any) -> list[Any]:
        """Groups of `mwt.muon.Muon`, one for each layout. `lr` None: `default_lr` of the group's matrices."""
        groups = []
        for layout in dict.fromkeys(role.layout for role in self.muon):
            roles = [role for role in self.muon if role.layout == layout]
            rate = default_lr([role.matrices for role in roles], relative=relative) if lr is None else lr
            params = [(role.name, role.parameter) for role in roles]
            groups.append({"params": params, "use_muon": True, "lr": rate, "layout": layout, **options})
        return groups

    def groups(
        self, *, lr: float | None = None, lr_adam: float = 1e-3, relative: float = RELATIVE_LR, **options: Any
    ) -> list[dict[str, Any]]:
        """All groups of `mwt.muon.Muon`.

        Args:
            lr: of Muon; None: `default_lr`, with `relative`.
            lr_adam: of everything else.
            options: further keys of the Muon groups, such as weight_decay.
        """
        rest = [(role.name, role.parameter) for role in self.adam]
        adam = [{"params": rest, "use_muon": False, "lr": lr_adam}] if rest else []
        return [*self.muon_groups(lr=lr, relative=relative, **options), *adam]

    def report(self) -> str:
        """A table for people: what goes where, and why."""
        rows = [("parameter", "shape", "optimizer", "why")]
        for role in self.roles:
            shape = " x ".join(map(str, role.parameter.shape)) or "scalar"
            rows.append((role.name, shape, "Adam" if role.layout is None else "Muon", role.why))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, *self.summary()])

    def summary(self) -> list[str]:
        """How much each of the two takes, a line for each."""
        return [
            f"{kind}: {sum(role.parameter.numel() for role in roles):,} numbers in {len(roles)} parameters"
            for kind, roles in (("Muon", self.muon), ("Adam", self.adam))
        ]


def split_parameters(module: nn.Module, *, muon_first: bool = False, exclude: Sequence[str] = ()) -> Split:
    """Ask a network which parameters are hidden matrices, for Muon; everything else is Adam's.

    The modules in it that have a method `muon_parameters` are asked, the outermost first; an `nn.Sequential` given
    itself, whose order is that of computation, has its linear layers taken: between first and last they are hidden.

    Args:
        muon_first: give Muon the first layer too, of `nn.Sequential` or of a module that has it as attribute `first`.
            For inputs that are embedded; the rank of a first layer's gradient over coordinates is theirs, 2 or 3.
        exclude: patterns (`blocks.0.*`) of names that are left to Adam all the same.

    Raises:
        InputError: nothing qualifies, a pattern matches none of the matrices, or a module names what it does not have.
    """
    named = dict(module.named_parameters())
    found: dict[int, tuple[str | None, str]] = {}
    for matrix, declared, role in _declared(module, muon_first):
        found.setdefault(id(matrix), (declared, role))
    if found.keys() - {id(parameter) for parameter in named.values()}:
        raise InputError(f"{type(module).__name__}: muon_parameters() names a tensor that is no parameter of it.")
    unused, roles = set(exclude), []
    for name, parameter in named.items():
        layout, why = found.get(id(parameter), (None, "vector" if parameter.ndim < 2 else "no hidden matrix"))
        if layout is not None and (patterns := [pattern for pattern in exclude if fnmatchcase(name, pattern)]):
            unused.difference_update(patterns)
            layout, why = None, f"excluded by {patterns[0]}"
        if layout is not None:
            check_layout(name, parameter, layout)
        roles.append(Role(name=name, parameter=parameter, layout=layout, why=why))
    if unused:
        raise InputError(f"exclude: {', '.join(sorted(unused))} matches none of Muon's matrices.")
    split = Split(tuple(roles))
    if not split.muon:
        raise NotDefinedError(
            f"{type(module).__name__} has no weight matrix between two hidden layers, so there is nothing for Muon; "
            "use Adam, or let the network name its matrices with a method muon_parameters()."
        )
    return split


def _declared(module: nn.Module, muon_first: bool, *, whole: bool = True) -> Iterator[tuple[Tensor, str, str]]:
    """Parameter, layout and role of what the modules declare, the outermost first; `whole`: not a part of another."""
    if isinstance(module, MuonModule):
        matrices = module.muon_parameters()
        if muon_first:
            first = getattr(getattr(module, "first", None), "weight", None)
            if first is None or not matrices:
                raise InputError(f"muon_first: {type(module).__name__} has no hidden matrix or no layer `first`.")
            yield first, matrices[0][2].removeprefix("complex_"), "first layer, by muon_first"  # coordinates are real
        for _, parameter, layout in matrices:
            yield parameter, layout, f"hidden matrix, {layout}"
    elif whole and isinstance(module, nn.Sequential) and not any(isinstance(m, MuonModule) for m in module.modules()):
        layers = list(_linear_layers(module))
        if muon_first and len(layers) > 2:
            yield layers[0].weight, "out_in", "first layer, by muon_first"
        for layer in layers[1:-1]:
            yield layer.weight, "out_in", "hidden matrix, out_in"
    else:
        for child in module.children():
            yield from _declared(child, muon_first, whole=False)


def _linear_layers(sequence: nn.Sequential) -> Iterator[nn.Linear]:
    """In the order of computation, through sequences within sequences and nothing else."""
    for layer in sequence:
        if isinstance(layer, nn.Linear):
            yield layer
        elif isinstance(layer, nn.Sequential):
            yield from _linear_layers(layer)


def default_lr(matrices: Iterable[Tensor], *, relative: float = RELATIVE_LR) -> float:
    """A rate to begin with: `relative` times the median spectral norm of initial matrices [..., m, n].

    A step of Muon changes a matrix by the rate in spectral norm, so the rate follows the scale of the weights. 0.03
    suits SIREN and Fourier features (best at 0.02 to 0.04); plain ReLU networks take RELATIVE_LR_RELU.

    Raises:
        InputError: the matrices are zero.
    """
    norms = torch.cat([torch.linalg.matrix_norm(matrix.detach().to(_wide(matrix)), 2).flatten() for matrix in matrices])
    median = norms.double().quantile(0.5).item()
    if median == 0:
        raise InputError("The matrices are zero at the beginning, so no rate can be derived from them; give Muon's lr.")
    return relative * median


def _wide(matrix: Tensor) -> torch.dtype:
    return matrix.dtype if matrix.dtype.itemsize >= 4 else torch.float32


def cosine_to_zero(optimizer: torch.optim.Optimizer, steps: int) -> CosineAnnealingLR:
    """The schedule that Muon needs: all rates down a cosine to 0 over exactly the `steps` that are run."""
    return CosineAnnealingLR(optimizer, T_max=steps)
