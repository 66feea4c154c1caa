"""`manifest.json`: what a set of fitted networks on disk says about itself, and how what is stored becomes networks.

The format is described in docs/weight_sets.md.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data_pipes.remote import fetch, joined, shown
from data_pipes.schema import INFO_FILE, DatasetInfo, ShardInfo, SplitInfo
from mwt.config import DataConfig
from mwt.errors import InputError
from mwt.structs import SignalFacts
from mwt.weight_space import Layout, Weights

WEIGHTS_SCHEMA = 1
MANIFEST_FILE, BASE_FILE, STATISTICS_FILE = "manifest.json", "base.safetensors", "statistics.safetensors"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

Values = Literal["phi", "delta"]
"""The weights of the networks, or their differences from the base."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """What is known of a set before it is written. A set that was begun is taken up only with an equal one."""

    name: str
    signal: SignalFacts
    """Of the signals that the networks show; with the classes."""
    layout: Layout
    values: Values
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    has_base: bool
    """Whether there is a base that all fits began with (theta, or a shared initialisation)."""
    steps: int
    """S: `loss` has S + 1 columns."""
    source: dict[str, Any]
    """The signals: path, name, and the sha256 of its dataset.json. Empty: not known; PSNR and losses are NaN."""
    fit: dict[str, Any]
    """How the networks were fitted: method, inner steps, fraction or number of points, model …"""
    train_split: str = "train"
    """The split that is copied, and of which the statistics are taken; where it is not in the set, the first one."""
    copies: int = 0
    """Augmented fits of each signal of the training split, beside that of the signal as it is."""
    augment: dict[str, Any] = field(default_factory=lambda: {"kind": "none"})
    """kind, padding and seed of `data_pipes.augment.augment`; the epoch is the number of the copy."""
    config: dict[str, Any] = field(default_factory=dict)
    """The configuration that the networks were fitted with, as a whole."""

    def __post_init__(self) -> None:
        if self.layout.shared_output and not self.has_base:
            raise ValueError("networks that share the output layer need a base, which holds it")
        if self.values == "delta" and not self.has_base:
            raise ValueError("differences from a base need a base")

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels."""
        return self.signal.classes

    @property
    def unmeasured(self) -> tuple[str, ...]:
        """Columns that are NaN: distance fields have no PSNR, what came without its signals has no losses either."""
        return ("psnr", "loss") if not self.source else () if self.signal.kind == "image" else ("psnr",)

    @property
    def stored_layers(self) -> int:
        """How many layers differ from network to network, and so lie in the shards."""
        return len(self.layout.shapes) - self.layout.shared_output

    @property
    def columns(self) -> dict[str, tuple[torch.dtype, tuple[int | None, ...]]]:
        """Kind and shape [n, …] of each tensor of a shard, without n; None where shards differ."""
        found: dict[str, tuple[torch.dtype, tuple[int | None, ...]]] = {}
        for i, (outputs, inputs) in enumerate(self.layout.shapes[: self.stored_layers]):
            found[f"layers.{i}.weight"] = (DTYPES[self.dtype], (outputs, inputs))
            found[f"layers.{i}.bias"] = (DTYPES[self.dtype], (outputs,))
        if self.fit.get("method") == "independent":  # each fit stops when it is good
            found["steps"] = (torch.int64, ())
        return found | {
            "label": (torch.int64, ()), "index": (torch.int64, ()), "copy": (torch.int64, ()),
            "psnr": (torch.float32, ()), "loss": (torch.float32, (self.steps + 1,)),
            "key": (torch.uint8, (None,)), "crc32": (torch.int64, ()),
        }  # fmt: skip

    @property
    def network_bytes(self) -> int:
        """What one network takes on the disk, about (keys vary in length)."""
        sizes = ((kind.itemsize, [size or 8 for size in shape]) for kind, shape in self.columns.values())
        return sum(item * int(torch.tensor(shape).prod()) if shape else item for item, shape in sizes)

    def as_json(self) -> dict[str, Any]:
        """As the manifest holds it."""
        content = asdict(self)
        architecture = content.pop("layout")
        classes = content["signal"].pop("classes")
        order = ["y", "x"] if self.signal.kind == "image" else ["x", "y", "z"]
        content |= {
            "schema": WEIGHTS_SCHEMA, "architecture": architecture, "classes": classes,
            "coordinates": {"order": order, "range": [-1, 1], "end_points": True}, "value_range": [-1, 1],
        }  # fmt: skip
        return cast(dict[str, Any], json.loads(json.dumps(content)))


@dataclass(frozen=True, kw_only=True)
class Manifest(Description):
    """The content of `manifest.json`, and the folder where it lies."""

    folder: Path
    splits: dict[str, SplitInfo]
    statistics: dict[str, Any]
    """split and count that they are of; mean and std of all entries of each layer (`layers.{i}.weight`, `.bias`)."""
    psnr: dict[str, float | None]
    """Mean PSNR of each split in dB; null for point sets."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Signals of each split that could not be used."""
    diverged: dict[str, list[list[int]]] = field(default_factory=dict)
    """Of each split that has any, signal and copy of the networks that were not finite and so are not in the set."""
    package: dict[str, Any] = field(default_factory=dict)
    """Version and commit of the program that wrote it."""
    fingerprint: str = ""
    """Of all that the set was begun with; an equal export finds it complete."""

    def split(self, name: str) -> SplitInfo:
        """The split `name`.

        Raises:
            InputError: there is none of that name; the message lists those there are.
        """
        if name not in self.splits:
            raise InputError(f"{self.folder} has no split {name!r}; it has {', '.join(self.splits) or 'none'}.")
        return self.splits[name]

    @property
    def left_out(self) -> str | None:
        """A sentence about the networks that diverged, if any did."""
        if not self.diverged:
            return None
        counts = ", ".join(f"{len(lost):,} of {name!r}" for name, lost in self.diverged.items())
        return f"Fits that diverged are not in the set: {counts} ({MANIFEST_FILE} lists them under `diverged`)."


def is_weight_set(path: str | Path) -> bool:
    """Whether a folder looks like a weight set."""
    return (Path(path).expanduser() / MANIFEST_FILE).is_file()


def read_manifest(path: str | Path) -> Manifest:
    """Reads `manifest.json` of a folder.

    Raises:
        InputError: no such folder, no manifest in it, or one that cannot be used.
    """
    folder = Path(path).expanduser()
    file = folder / MANIFEST_FILE
    if not file.is_file():
        what = "has no " + MANIFEST_FILE if folder.is_dir() else "is not there"
        raise InputError(f"No set of fitted networks at {folder}: it {what}. Make one with `python -m eval.export`.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read as JSON: {error}.") from error
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != WEIGHTS_SCHEMA:
        raise InputError(
            f"{file} is of schema version {schema}, this program reads version {WEIGHTS_SCHEMA}; export the networks "
            "again, or update the program."
        )
    try:
        return _parse(content, folder)
    except KeyError as error:
        raise InputError(f"{file} lacks the key {error}; export the networks again.") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{file} cannot be used: {str(error).splitlines()[0]}.") from error


def _parse(content: dict[str, Any], folder: Path) -> Manifest:
    architecture = content["architecture"]
    layout = Layout(
        sizes=tuple(int(size) for size in architecture["sizes"]),
        omegas=tuple(float(omega) for omega in architecture["omegas"]),
        shared_output=bool(architecture["shared_output"]),
    )
    if content["values"] not in ("phi", "delta") or content["dtype"] not in DTYPES:
        raise ValueError(f"values {content['values']!r} or dtype {content['dtype']!r} are not known")
    splits = {}
    for name, entry in content["splits"].items():
        shards = tuple(ShardInfo(**shard) for shard in entry["shards"])
        for shard in shards:
            if Path(shard.file).name != shard.file:  # a list from elsewhere must not lead out of the folder
                raise ValueError(f"the shard name {shard.file!r} is no plain file name")
        splits[name] = SplitInfo(count=entry["count"], shards=shards)
        if entry["count"] != sum(shard.count for shard in shards):
            raise ValueError(f"the count of split {name!r} is not the sum of its shards' counts")
    return Manifest(
        folder=folder, layout=layout, splits=splits,
        signal=SignalFacts(**content["signal"], classes=tuple(content["classes"])),
        **{key: content[key] for key in (
            "name", "values", "dtype", "has_base", "steps", "source", "fit", "train_split", "copies", "augment",
            "config", "statistics", "psnr", "skipped", "package", "fingerprint",
        )},
        diverged=content.get("diverged", {}),
    )  # fmt: skip


def describe_source(info: DatasetInfo, data: DataConfig) -> dict[str, Any]:
    """`Description.source` of a data set: its name, where it lies, and the sha256 of its dataset.json."""
    path = data.path
    if info.url is not None:
        path, content = shown(info.url), fetch(joined(info.url, INFO_FILE), data.schemes)
    else:
        content = (info.folder / INFO_FILE).read_bytes()
        if not info.is_builtin:
            path = os.path.abspath(info.folder)
    return {"path": path, "name": info.name, "sha256": hashlib.sha256(content).hexdigest()}


def layer_tensors(weights: Weights) -> dict[str, Tensor]:
    """The tensors of networks under the names that they have on the disk."""
    named = {}
    for i, (weight, bias) in enumerate(zip(*weights, strict=True)):
        named[f"layers.{i}.weight"], named[f"layers.{i}.bias"] = weight, bias
    return named


def read_networks(file: Path, layout: Layout, suffix: str = "") -> Weights:
    """One network's tensors of `base.safetensors` or `statistics.safetensors`, as fp32 [1, …].

    Raises:
        InputError: the file is missing, damaged, or of another layout.
    """
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} is missing or damaged ({error}); copy or export the networks again.") from error
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    for i, (outputs, inputs) in enumerate(layout.shapes):
        for kind, shape, into in (("weight", (outputs, inputs), weights), ("bias", (outputs,), biases)):
            tensor = tensors.get(f"layers.{i}.{kind}{suffix}")
            if tensor is None or tensor.shape != shape:
                found = "missing" if tensor is None else list(tensor.shape)
                raise InputError(f"{file}: layers.{i}.{kind}{suffix} is {found}, not {list(shape)} as in the manifest.")
            into.append(tensor.float()[None])
    return Weights(tuple(weights), tuple(biases))


def networks(
    description: Description, base: Weights | None, stored: Sequence[tuple[Tensor, Tensor]], values: Values
) -> Weights:
    """Networks in fp32, output layer included, of what shards hold: (weight [B, out, in], bias [B, out]) of each layer.

    Args:
        base: of one network's shapes [1, …], on the same device; needed for other `values` and a shared output layer.
        values: what is wanted; `description.values` is what is stored.
    """
    weights, biases = [w.float() for w, _ in stored], [b.float() for _, b in stored]
    if values != description.values:
        assert base is not None, "whoever asks for other values has checked that there is a base"
        sign = 1 if values == "phi" else -1
        weights = [w + sign * b for w, b in zip(weights, base.weights, strict=False)]
        biases = [w + sign * b for w, b in zip(biases, base.biases, strict=False)]
    if description.layout.shared_output:
        assert base is not None, "a shared output layer lies in the base"
        weight, bias = base.weights[-1], base.biases[-1]
        if values == "delta":
            weight, bias = torch.zeros_like(weight), torch.zeros_like(bias)
        weights.append(weight.expand(len(weights[0]), -1, -1))
        biases.append(bias.expand(len(biases[0]), -1))
    return Weights(tuple(weights), tuple(biases))


def whole_statistics(
    description: Description, base: Weights | None, mean: Tensor, std: Tensor
) -> tuple[Weights, Weights]:
    """Means and deviations [N] of what is stored as those of whole networks [1, …], in double precision.

    A shared output layer lies in no shard: its mean is itself (of differences 0), its deviation 0.
    """
    layout = description.layout
    if layout.shared_output:
        assert base is not None, "a shared output layer lies in the base"
        output = torch.cat([base.weights[-1].flatten(), base.biases[-1].flatten()]).double()
        nothing = torch.zeros_like(output)
        mean = torch.cat([mean, output if description.values == "phi" else nothing])
        std = torch.cat([std, nothing])
    return Weights.unflatten(mean[None], layout), Weights.unflatten(std[None], layout)
