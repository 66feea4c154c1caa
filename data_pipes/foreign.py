"""The networks of a weight set as other code bases know them, and back: docs/weight_sets.md, "Other formats".

Their networks are plain SIRENs with one frequency, sin(30 (W h + b)) in every sine layer, and a linear output layer.
Ours, sin(omega_i (W_i h + b_i)), become theirs exactly, by a factor a layer: W_i omega_i / 30 and b_i omega_i / 30.

Two conventions say what such a network draws:

    nfn   coordinates (row, column), values in [-1, 1]: what nfn's own SIRENs do, and ours
    dws   coordinates (column, row); values in [0, 1], 0.5 being added to the output: DWSNets, neural-graphs, ScaleGMN
          (but for CIFAR-10, whose networks are nfn's)

From one to the other the two columns of the first matrix change places, and the output layer is halved. Both are
linear in the weights, so that differences of weights, means and (as all factors are positive) deviations go the same
way.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mwt.errors import InputError
from mwt.weight_space import Layout, Weights

OMEGA = 30.0
"""The one frequency of all sine layers."""
LEAST_STD = 1e-5
"""Deviations below it are written as 1, as nfn's own normaliser does: 0 / 0 of a shared output layer would be NaN."""
TREE_PREFIX = "randinit_smaller"
NETWORK_NAME = re.compile(r"net(\d+)\.pth$")
_LABEL_IN_PATH = re.compile(r"_\ds")  # where nfn and ScaleGMN look for the label, in the whole path

Convention = Literal["nfn", "dws"]


@dataclass(frozen=True, kw_only=True)
class Format:
    """What a code base asks of a set."""

    convention: Convention
    """What it takes networks to draw, unless the user says otherwise."""
    tree: bool
    """Whether it is a file for every network, `randinit_smaller_{label}s/net{number}.pth`."""
    label_in_path: bool = False
    """Whether a loader of it reads the label from the path."""


FORMATS: dict[str, Format] = {
    "nfn": Format(convention="nfn", tree=True, label_in_path=True),
    "dws": Format(convention="dws", tree=True),
    "neural-graphs": Format(convention="dws", tree=True),
    "scalegmn": Format(convention="dws", tree=True),
    "scalegmn-cifar": Format(convention="nfn", tree=True, label_in_path=True),
    "scalegmn-fmnist": Format(convention="dws", tree=True),
    "arena-hdf5": Format(convention="nfn", tree=False),
    "npz": Format(convention="nfn", tree=False),
}


def to_foreign(weights: Weights, layout: Layout, convention: Convention) -> Weights:
    """Networks of ours [B, …], or differences, means or deviations of them, as plain networks of frequency 30."""
    factors = [omega / OMEGA for omega in layout.omegas] + [0.5 if convention == "dws" else 1.0]
    matrices = [_scaled(weight, factor) for weight, factor in zip(weights.weights, factors, strict=True)]
    biases = [_scaled(bias, factor) for bias, factor in zip(weights.biases, factors, strict=True)]
    if convention == "dws":
        matrices[0] = matrices[0].flip(-1)
    return Weights(tuple(matrices), tuple(biases))


def from_foreign(weights: Weights, convention: Convention) -> Weights:
    """Plain networks of one frequency [B, …] as networks of ours, of that same frequency in all sine layers."""
    if convention == "nfn":
        return weights
    matrices, biases = list(weights.weights), list(weights.biases)
    matrices[0] = matrices[0].flip(-1)
    matrices[-1], biases[-1] = 2 * matrices[-1], 2 * biases[-1]
    return Weights(tuple(matrices), tuple(biases))


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    """In double precision: rounded once."""
    return tensor if factor == 1 else (tensor.double() * factor).to(tensor.dtype)


def safe_deviations(std: Weights) -> Weights:
    """1 where a deviation is below 1e-5."""
    return std.map(lambda x: torch.where(x < LEAST_STD, torch.ones_like(x), x))


def tree_path(label: int, number: int) -> str:
    """Where a network lies in a tree, from its root."""
    return f"{TREE_PREFIX}_{label}s/net{number}.pth"


def check_format(name: str, out: Path, classes: int) -> None:
    """Whether a set of so many classes can be written in this format to `out`.

    Raises:
        InputError: its loaders would not find the labels, or cannot tell so many; a library is missing.
    """
    check_tree_place(name, out)
    if FORMATS[name].label_in_path and classes > 10:
        raise InputError(
            f"The loaders of {name} read one digit as the label, so that they know 10 classes at most, and this set "
            f"has {classes}. A tree with splits.json alone, --format dws, has no such limit."
        )
    if name == "arena-hdf5":
        import_h5py()


def import_h5py() -> Any:
    """The library, an optional one.

    Raises:
        InputError: it is not installed.
    """
    try:
        import h5py
    except ImportError as error:
        raise InputError("--format arena-hdf5 needs h5py, which is not installed: pip install -e '.[hdf5]'.") from error
    return h5py


def check_tree_place(name: str, out: Path) -> None:
    """Whether loaders that read the label from the whole path would find the right one under `out`.

    Raises:
        InputError: they would not.
    """
    # The folder of the label follows, and it begins with no underscore: what the slash cuts off cannot match.
    if FORMATS[name].label_in_path and (found := _LABEL_IN_PATH.search(f"{out}/")):
        raise InputError(
            f"The loaders of {name} take the label from the first underscore, digit and s of the whole path, and would "
            f"find {found[0]!r} in {out}; choose a folder without."
        )
