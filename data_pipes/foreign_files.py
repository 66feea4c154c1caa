"""The files of each format of `data_pipes.foreign`: what they are called, what lies in them.

For every format: `need` says what they take, `write` writes those of some networks, `finish` those about all of them.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from data_pipes.foreign import FORMATS, LEAST_STD, import_h5py, safe_deviations, to_foreign, tree_path
from data_pipes.foreign_plan import Piece, Plan
from data_pipes.weight_manifest import BASE_FILE, layer_tensors, read_manifest, read_networks
from data_pipes.weight_moments import layer_scalars
from data_pipes.weights import WeightBatch, load_weight_set
from mwt.errors import InputError
from mwt.memory import readable
from mwt.runtime import write_json, write_text
from mwt.weight_space import Layout, Weights

SPLITS_FILE, STATISTICS_FILE = "splits.json", "statistics.pth"
_ARRAYS = "arrays"
_BLOCK = 4096


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a set takes on the disk while it is written."""

    bytes: int
    files: int

    def scaled(self, share: float) -> Need:
        """What a share of it takes."""
        return Need(bytes=math.ceil(self.bytes * share), files=math.ceil(self.files * share))

    def check(self, folder: Path, out: Path) -> None:
        """Raises InputError if the disk has no room for it, or takes no more files."""
        free = shutil.disk_usage(folder).free
        if self.bytes > free:
            raise InputError(
                f"{out} needs {readable(self.bytes)}, but its disk has only {readable(free)} free; choose another "
                "--out."
            )
        if hasattr(os, "statvfs") and (disk := os.statvfs(folder)).f_files and self.files > disk.f_favail:
            raise InputError(
                f"{out} needs {self.files:,} files, but its disk takes only {disk.f_favail:,} more; choose another "
                "--out, or --format npz, which has a file for each split."
            )


def need(plan: Plan) -> Need:
    """Of the whole set."""
    nothing = Weights.unflatten(torch.zeros(1, plan.layout.count), plan.layout)
    if FORMATS[plan.format].tree:
        size = len(torch_bytes(network_dict(plan.format, nothing, 0, 0)))
        return Need(bytes=plan.count * math.ceil(size / _BLOCK) * _BLOCK, files=plan.count + 16)
    size = 4 * plan.layout.count + 32
    if plan.format == "npz":
        return Need(bytes=2 * plan.count * size, files=64)  # arrays by themselves, then zipped
    return Need(bytes=plan.count * size, files=len(plan.pieces) + 16)


def begin(plan: Plan) -> None:
    """Whatever must be there before the first network. Called again where a set is taken up."""
    if plan.format != "npz":
        return
    for split, part in plan.parts.items():
        folder = plan.data / _ARRAYS / split
        if not part.places or (plan.data / f"{split}.npz").is_file():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        for name, (kind, shape) in _npz_columns(plan.layout).items():
            if not (folder / f"{name}.npy").is_file():
                whole = (len(part.places), *shape)
                half = folder / f"{name}.half"
                np.lib.format.open_memmap(half, mode="w+", dtype=kind, shape=whole).flush()
                if hasattr(os, "posix_fallocate"):  # a full disk is an error now, and would be a crash in a mapped file
                    with open(half, "r+b") as file:
                        os.posix_fallocate(file.fileno(), 0, half.stat().st_size)
                os.replace(half, folder / f"{name}.npy")


def write(plan: Plan, piece: Piece, weights: Weights, batch: WeightBatch) -> dict[str, int]:
    """Writes converted networks; names and sizes of the files that hold them alone."""
    if plan.format == "npz":
        return _write_npz(plan, piece, weights, batch)
    if plan.format == "arena-hdf5":
        return _write_hdf5(plan, piece, weights, batch)
    files = {}
    for row, label in enumerate(batch.labels.tolist()):
        name = tree_path(label, piece.start + row)
        content = torch_bytes(network_dict(plan.format, weights, row, label))
        path = plan.data / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        files[name] = len(content)
    return files


def finish(plan: Plan, mean: Weights, std: Weights) -> None:
    """Lists of the splits, statistics [1, …] of converted networks, and the base where there is one.

    Deviations are given as they are, and written as 1 where they are below 1e-5.
    """
    manifest = read_manifest(plan.native)
    base = None
    if manifest.has_base:
        base = to_foreign(read_networks(manifest.folder / BASE_FILE, plan.layout), plan.layout, plan.convention)
    if plan.format == "npz":
        _finish_npz(plan, mean, std, base)
    elif plan.format == "arena-hdf5":
        _finish_hdf5(plan, mean, std, base)
    else:
        _finish_tree(plan, mean, std, base)


def labels(plan: Plan, split: str) -> list[int]:
    """Of a split as it is written."""
    part = plan.parts[split]
    if not part.places:
        return []
    column = load_weight_set(plan.native, part.source).column("label")
    found: list[int] = column[torch.tensor(part.places)].tolist()
    return found


# ---- trees of .pth -----------------------------------------------------------------------------------------------


def network_dict(name: str, weights: Weights, row: int, label: int) -> dict[str, Any]:
    """One network as the tree formats hold it: `seq.{i}.weight` [out, in] and `seq.{i}.bias` [out], in turn."""
    content: dict[str, Any] = {}
    for i, (weight, bias) in enumerate(zip(*weights, strict=True)):
        # Copies: torch.save writes whole storages, and rows are views of those of the batch.
        content[f"seq.{i}.weight"], content[f"seq.{i}.bias"] = weight[row].clone(), bias[row].clone()
    if name == "scalegmn-fmnist":
        content["label"] = label
    return content


def torch_bytes(content: dict[str, Any]) -> bytes:
    """What torch.save writes; the same for the same content, wherever it will lie."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _finish_tree(plan: Plan, mean: Weights, std: Weights, base: Weights | None) -> None:
    splits: dict[str, Any] = {}
    for split, part in plan.parts.items():
        found = labels(plan, split)
        paths = [tree_path(label, part.first + i) for i, label in enumerate(found)]
        splits[split] = paths if plan.format == "scalegmn-fmnist" else {"path": paths, "label": found}
    write_json(plan.data / SPLITS_FILE, splits)
    moments = {"mean": mean, "std": safe_deviations(std)}
    # As DWSNets and neural-graphs have them after loading: [in, out, 1] and [out, 1].
    content = {
        "weights": {name: [w[0].mT.unsqueeze(-1).contiguous() for w in of.weights] for name, of in moments.items()},
        "biases": {name: [b[0].unsqueeze(-1).clone() for b in of.biases] for name, of in moments.items()},
    }
    (plan.data / STATISTICS_FILE).write_bytes(torch_bytes(content))
    if base is not None:
        (plan.data / "base.pth").write_bytes(torch_bytes(network_dict("nfn", base, 0, 0)))
    if plan.format == "neural-graphs":
        write_text(plan.data / "statistics.yaml", _layer_statistics(plan, mean, std))


def _layer_statistics(plan: Plan, mean: Weights, std: Weights) -> str:
    """One mean and one deviation a layer, as neural-graphs' data configurations hold them."""
    scalars = layer_scalars(plan.layout, mean, std)
    count = len(plan.layout.shapes)
    stats = {}
    for kind, name in (("weight", "weights"), ("bias", "biases")):
        found = [scalars[f"layers.{i}.{kind}"] for i in range(count)]
        stats[f"{name}_mean"] = [layer["mean"] for layer in found]
        stats[f"{name}_std"] = [1.0 if layer["std"] < LEAST_STD else layer["std"] for layer in found]
    return OmegaConf.to_yaml(OmegaConf.create({"stats": stats}))


# ---- neural-field-arena ------------------------------------------------------------------------------------------


def param_config(layout: Layout) -> list[tuple[str, list[int]]]:
    """Name and shape of each parameter, in the order of a row of `params`, as fit-a-nef's SIREN has them."""
    last = len(layout.shapes) - 1
    names = [f"kernel_net_{i}.linear" if i < last else "output_linear" for i in range(last + 1)]
    return [
        pair
        for name, (outputs, inputs) in zip(names, layout.shapes, strict=True)
        for pair in ((f"{name}.bias", [outputs]), (f"{name}.kernel", [inputs, outputs]))
    ]


def arena_rows(weights: Weights) -> Tensor:
    """[n, N]: layer by layer the bias, then the kernel [in, out] row-major."""
    parts = [part for w, b in zip(*weights, strict=True) for part in (b, w.mT.flatten(-2))]
    return torch.cat(parts, dim=-1)


def _write_hdf5(plan: Plan, piece: Piece, weights: Weights, batch: WeightBatch) -> dict[str, int]:
    h5py = import_h5py()
    # The loader takes the range from what follows the first underscore.
    plain = re.sub(r"[^A-Za-z0-9]+", "-", plan.name).strip("-") or "networks"
    path = plan.data / f"{plain}_{piece.start}-{piece.start + len(piece.places)}.hdf5"
    with h5py.File(path, "w") as file:
        file.create_dataset("params", data=arena_rows(weights).numpy())
        file.create_dataset("labels", data=batch.labels.numpy())
        config = file.create_dataset("param_config", (1,), dtype=h5py.string_dtype())
        config[0] = json.dumps(param_config(plan.layout))
    return {path.name: path.stat().st_size}


def _finish_hdf5(plan: Plan, mean: Weights, std: Weights, base: Weights | None) -> None:
    moments = {"mean": arena_rows(mean)[0].tolist(), "std": arena_rows(safe_deviations(std))[0].tolist()}
    content = {}
    for split, part in plan.parts.items():  # looked up by name, or by range
        content[split] = content[f"{part.first}_{part.first + len(part.places)}"] = moments
    write_json(plan.data / "metadata.json", content)
    if base is not None:
        np.save(plan.data / "base.npy", arena_rows(base)[0].numpy())


# ---- npz ---------------------------------------------------------------------------------------------------------


def _npz_columns(layout: Layout) -> dict[str, tuple[str, tuple[int, ...]]]:
    columns: dict[str, tuple[str, tuple[int, ...]]] = {}
    for i, shape in enumerate(layout.shapes):
        columns[f"layers.{i}.weight"], columns[f"layers.{i}.bias"] = ("<f4", shape), ("<f4", shape[:1])
    return columns | {"label": ("<i8", ()), "index": ("<i8", ()), "psnr": ("<f4", ())}


def _write_npz(plan: Plan, piece: Piece, weights: Weights, batch: WeightBatch) -> dict[str, int]:
    rows = {**layer_tensors(weights), "label": batch.labels, "index": batch.index, "psnr": batch.psnr}
    start = piece.start - plan.parts[piece.split].first
    for name, tensor in rows.items():
        path = plan.data / _ARRAYS / piece.split / f"{name}.npy"
        array = np.lib.format.open_memmap(path, mode="r+")
        array[start : start + len(tensor)] = tensor.numpy()
        array.flush()
    return {}


def _finish_npz(plan: Plan, mean: Weights, std: Weights, base: Weights | None) -> None:
    for split, part in plan.parts.items():
        done, half = plan.data / f"{split}.npz", plan.data / f"{split}.npz.half"
        folder = plan.data / _ARRAYS / split
        if part.places and not done.is_file():
            with zipfile.ZipFile(half, "w", allowZip64=True) as archive:
                for name in _npz_columns(plan.layout):
                    archive.write(folder / f"{name}.npy", f"{name}.npy")
            os.replace(half, done)
        shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(plan.data / _ARRAYS, ignore_errors=True)
    moments = {"mean": mean, "std": safe_deviations(std)}
    arrays: dict[str, Any] = {
        f"{name}.{kind}": x[0].numpy() for kind, of in moments.items() for name, x in layer_tensors(of).items()
    }
    np.savez(plan.data / "statistics.npz", **arrays)
    if base is not None:
        single: dict[str, Any] = {name: x[0].numpy() for name, x in layer_tensors(base).items()}
        np.savez(plan.data / "base.npz", **single)
