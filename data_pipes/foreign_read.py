"""Trees of networks from other code bases -> a weight set: NFN's folders of labels, or any tree with splits.json.

Every network is a file of torch.save with the weights and biases of its layers in turn. They are opened with
`weights_only=True`: tensors and plain containers, nothing that would run.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from data_pipes.foreign import NETWORK_NAME, OMEGA, TREE_PREFIX, Convention, from_foreign
from data_pipes.weight_manifest import Description
from data_pipes.weight_write import WeightSetWriter
from mwt.errors import InputError
from mwt.structs import SignalFacts
from mwt.weight_space import Layout, Weights

_BATCH = 256
_MAX_CLASSES = 100_000


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A network of a tree."""

    path: Path
    label: int | None
    """None: it lies in the file."""
    name: str
    """Its path as the tree has it."""


@dataclass(frozen=True, kw_only=True)
class Tree:
    """What is known of a tree before its networks are read."""

    root: Path
    splits: dict[str, list[Listed]]
    """Those that hold a network."""

    @property
    def digest(self) -> str:
        """SHA-256 of which networks it lists, and of the sizes of their files."""
        hashed = hashlib.sha256()
        for split, listed in self.splits.items():
            for item in listed:
                hashed.update(f"{split} {item.name} {item.label} {item.path.stat().st_size}\n".encode())
        return hashed.hexdigest()


# ---- which networks there are ------------------------------------------------------------------------------------


def list_tree(
    root: Path, *, splits: Path | None = None, prefix: str = TREE_PREFIX,
    split_points: tuple[int, int] | None = None,
) -> Tree:  # fmt: skip
    """The networks of a tree, by its splits.json, or, where split points are given, by the numbers of its files.

    Args:
        splits: the list, where it is not ROOT/splits.json.
        prefix: of the folders of labels; augmented copies have one of their own (randinit_smaller_aug0).
        split_points: numbers of the first networks of val and of test.

    Raises:
        InputError: no tree, a file that is missing, a number that is missing or double.
    """
    if not root.is_dir():
        raise InputError(f"There is no folder {root}.")
    if split_points is not None:
        found = _list_folders(root, prefix, split_points)
    else:
        file = splits or root / "splits.json"
        if not file.is_file():
            raise InputError(
                f"{file} is not there. Name the list with --splits FILE, or, for numbered files in folders of labels, "
                "say where val and test begin: --split-points 45000 50000 in NFN's sets of CIFAR-10."
            )
        found = _list_splits(root, file)
    found = {split: listed for split, listed in found.items() if listed}
    if not found:
        raise InputError(f"{root} has no networks.")
    return Tree(root=root, splits=found)


def _list_splits(root: Path, file: Path) -> dict[str, list[Listed]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        pairs: dict[str, list[tuple[str, int | None]]] = {}
        for split, entry in content.items():
            paths = entry if isinstance(entry, list) else entry["path"]
            labels = [None] * len(paths) if isinstance(entry, list) else [int(label) for label in entry["label"]]
            pairs[split] = [(str(path), label) for path, label in zip(paths, labels, strict=True)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{file} is no list of splits ({error}): each split must have as many labels as paths, or be a list of "
            "paths."
        ) from error
    return {
        split: [Listed(path=_find(root, name, file), label=label, name=name) for name, label in listed]
        for split, listed in pairs.items()
    }


def _find(root: Path, name: str, file: Path) -> Path:
    """A listed file: where the list says, seen from the tree, or wherever its last parts lie in the tree.

    Lists hold paths of the machine that they were made on, or ones that begin above the tree.
    """
    parts = Path(name).parts
    for start in range(len(parts)):
        if (path := root / Path(*parts[start:])).is_file():
            return path
    if Path(name).is_file():
        return Path(name)
    raise InputError(f"{name}, listed in {file}, is missing: neither it nor its last folders are in {root}.")


def _list_folders(root: Path, prefix: str, points: tuple[int, int]) -> dict[str, list[Listed]]:
    pattern = re.compile(re.escape(prefix) + r"_(\d+)s")
    found: dict[int, Listed] = {}
    for folder in sorted(root.glob(f"{prefix}_*s")):
        if (of_label := pattern.fullmatch(folder.name)) is None:
            continue  # copies: randinit_smaller_aug0_3s
        for path in folder.glob("*.pth"):
            if (numbered := NETWORK_NAME.fullmatch(path.name)) is None:
                raise InputError(f"{path} is not called net, a number, and .pth.")
            number, name = int(numbered[1]), f"{folder.name}/{path.name}"
            if number in found:
                raise InputError(f"{path} and {found[number].path} have the same number.")
            found[number] = Listed(path=path, label=int(of_label[1]), name=name)
    if not found:
        raise InputError(f"{root} has no files {prefix}_LABELs/netNUMBER.pth.")
    if (lost := next((i for i in range(len(found)) if i not in found), None)) is not None:
        raise InputError(f"{root}: net{lost}.pth is missing, though there are {len(found)} networks; copy it again.")
    val, test = points
    if not 0 <= val <= test <= len(found):
        raise InputError(f"--split-points {val} {test} must rise, and {root} has {len(found)} networks.")
    ordered = [found[i] for i in range(len(found))]
    return {"train": ordered[:val], "val": ordered[val:test], "test": ordered[test:]}


# ---- one network -------------------------------------------------------------------------------------------------


def read_network(item: Listed, layout: Layout | None) -> tuple[Weights, int]:
    """A network [1, …] in fp32, as it lies in its file, and its label.

    Args:
        layout: what it must be; None: whatever it is.

    Raises:
        InputError: the file is missing, holds other things than tensors, or a network of another layout.
    """
    try:
        content = torch.load(item.path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, depending on which bytes are wrong
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{item.path} cannot be read as a file of tensors ({reason}). Nothing else is unpickled."
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{item.path} holds a {type(content).__name__}, not weights and biases by name.")
    content = dict(content)
    label = content.pop("label", item.label) if item.label is None else item.label
    if label is None:
        raise InputError(f"{item.path} holds no label, and its list gives none.")
    tensors = [_checked(item.path, name, value) for name, value in content.items()]
    weights = [tensor for name, tensor in zip(content, tensors, strict=True) if name.endswith("weight")]
    biases = [tensor for name, tensor in zip(content, tensors, strict=True) if name.endswith("bias")]
    if len(weights) + len(biases) != len(content) or not _is_chain(weights, biases):
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in zip(content, tensors, strict=True))
        raise InputError(f"{item.path} is no plain network of two layers at least: it holds {shapes or 'nothing'}.")
    sizes = (weights[0].shape[1], *(bias.shape[0] for bias in biases))
    if layout is not None and sizes != layout.sizes:
        raise InputError(f"{item.path} has layers of {list(sizes)} neurons, the first network has {layout}.")
    return Weights(tuple(w[None] for w in weights), tuple(b[None] for b in biases)), int(label)


def _checked(path: Path, name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise InputError(f"{path} holds {name}, which is no tensor of real numbers.")
    tensor = value.detach().float()
    if not bool(tensor.isfinite().all()):
        raise InputError(f"{path}: {name} holds numbers that are not finite.")
    return tensor


def _is_chain(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> bool:
    if len(weights) != len(biases) or len(weights) < 2 or any(w.dim() != 2 for w in weights):
        return False
    fits = all(w.shape[:1] == b.shape for w, b in zip(weights, biases, strict=True))
    return fits and all(w.shape[0] == after.shape[1] for w, after in pairwise(weights))


# ---- the set -----------------------------------------------------------------------------------------------------


def describe_tree(
    tree: Tree, *, convention: Convention, omega: float = OMEGA, classes: Sequence[str] = (),
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32",
) -> Description:  # fmt: skip
    """The weight set that a tree becomes. Its layout is that of the first network.

    Args:
        omega: the frequency of all sine layers.
        classes: names of the labels; by default their numbers.

    Raises:
        InputError: the first network cannot be used.
    """
    listed = [item for items in tree.splits.values() for item in items]
    weights, _ = read_network(listed[0], None)
    sizes = (weights.weights[0].shape[2], *(bias.shape[1] for bias in weights.biases))
    layout = Layout(sizes=sizes, omegas=(omega,) * (len(sizes) - 2), shared_output=False)
    kinds: dict[int, Literal["image", "points"]] = {2: "image", 3: "points"}
    if layout.coordinate_dims not in kinds:
        raise InputError(f"{listed[0].path} takes {layout.coordinate_dims} coordinates; 2 or 3 can be read.")
    if convention == "dws" and layout.coordinate_dims != 2:
        raise InputError("The dws convention is about pictures, and these networks take 3 coordinates: use --from nfn.")
    known = [item.label for item in listed if item.label is not None]
    names = tuple(classes)
    if not names:  # where the labels lie in the files, all of them have to be read for the largest
        top = max(known) if len(known) == len(listed) else max(read_network(item, layout)[1] for item in listed)
        names = tuple(str(i) for i in range(min(top, _MAX_CLASSES - 1) + 1))
    signal = SignalFacts(
        kind=kinds[layout.coordinate_dims], channels=layout.channels, height=None, width=None, classes=names
    )
    return Description(
        name=tree.root.resolve().name, signal=signal, layout=layout, values="phi", dtype=dtype, has_base=False, steps=0,
        source={}, train_split="train" if "train" in tree.splits else next(iter(tree.splits)),
        fit={
            "method": "unknown", "read_from": os.path.abspath(tree.root), "convention": convention, "omega": omega,
            "sha256": tree.digest,
        },
    )  # fmt: skip


def write_tree(tree: Tree, writer: WeightSetWriter, convention: Convention, advance: Any = None) -> None:
    """Reads what is missing of the set, and writes it.

    Args:
        advance: called with a number of networks when they have been read.

    Raises:
        InputError: a network cannot be used, or has a label without a name; names its file.
    """
    layout, classes = writer.description.layout, len(writer.description.classes)
    for task in writer.missing():
        with writer.shard(task) as shard:
            for start in range(task.start, task.stop, _BATCH):
                stop = min(start + _BATCH, task.stop)
                items = tree.splits[task.split][start:stop]
                read = [read_network(item, layout) for item in items]
                for item, (_, label) in zip(items, read, strict=True):
                    if not 0 <= label < classes:
                        raise InputError(f"{item.path} has the label {label}, and there are {classes}; see --classes.")
                flat = torch.cat([weights.flat() for weights, _ in read])
                unknown = torch.full((len(items), 1), torch.nan)
                shard.add(
                    from_foreign(Weights.unflatten(flat, layout), convention),
                    labels=torch.tensor([label for _, label in read]), index=torch.arange(start, stop),
                    psnr=unknown[:, 0], losses=unknown, keys=[item.name for item in items],
                )  # fmt: skip
                if advance is not None:
                    advance(len(items))
