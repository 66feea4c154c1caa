"""Check a set of fitted networks: counts, checksums, finite numbers, labels, duplicates, statistics, and that the
stored networks still show their signals."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from data_pipes.augment import augment
from data_pipes.read import open_split
from data_pipes.schema import BUILTIN_PREFIX, ShardInfo, read_info
from data_pipes.weight_manifest import (
    BASE_FILE,
    STATISTICS_FILE,
    Description,
    Manifest,
    describe_source,
    layer_tensors,
    read_networks,
    whole_statistics,
)
from data_pipes.weight_moments import Moments, layer_scalars
from data_pipes.weights import WeightSet, open_shard, row_checksums
from mwt.config import DataConfig
from mwt.errors import InputError
from mwt.evaluation import networks_psnr

PSNR_TOLERANCE = {"fp32": 1e-3, "fp16": 1e-3, "bf16": 1e-3}
"""dB by which the PSNR of a stored network may differ from the one that is stored with it. That one is of the network
as it is stored, rounding included, so that no precision needs more: it only covers sums in another order."""
RENDERED = 32
"""Networks of each split that are drawn, from all over it."""
_STATISTICS_TOLERANCE = 1e-5  # relative to the largest number of a layer: fp32


@dataclass
class SplitReport:
    """What is wrong with one split, one sentence each, and what was found."""

    faults: list[str] = field(default_factory=list)
    duplicates: int = 0
    drawn: int = 0
    worst: float = 0.0
    """Largest difference of a PSNR, in dB."""


def check_split(manifest: Manifest, split: str, data: str | None) -> SplitReport:
    """Reads a split from beginning to end, and draws some of its networks where `data` holds the signals."""
    report = SplitReport()
    seen: set[tuple[int, int]] = set()
    total: Moments | None = None
    for shard in manifest.split(split).shards:
        tensors = _read_shard(manifest, shard, report)
        if tensors is None:
            continue
        for pair in zip(tensors["index"].tolist(), tensors["copy"].tolist(), strict=True):
            if pair in seen:
                report.duplicates += 1
                report.faults.append(f"Shard {shard.file}: the network of sample {pair[0]}, copy {pair[1]}, is double.")
            seen.add(pair)
        if split == manifest.statistics["split"]:
            flat = [tensors[name].flatten(1) for name in tensors if name.startswith("layers.")]
            part = Moments.of(torch.cat(flat, dim=1))
            total = part if total is None else total + part
    if not report.faults:
        try:
            if total is not None:
                report.faults += _check_statistics(manifest, total)
            if data is not None and "psnr" not in manifest.unmeasured:
                _check_psnr(manifest, split, data, report)
        except InputError as error:
            report.faults.append(str(error))
    return report


def _read_shard(manifest: Manifest, shard: ShardInfo, report: SplitReport) -> dict[str, Tensor] | None:
    path = manifest.folder / shard.file
    if not path.is_file():
        report.faults.append(f"Shard {path} is missing.")
        return None
    if path.stat().st_size != shard.bytes:
        report.faults.append(f"Shard {path} has {path.stat().st_size} bytes, not the {shard.bytes} recorded.")
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
            report.faults.append(f"Shard {path} has another sha256 than recorded.")
    try:
        tensors = open_shard(manifest, shard)
    except InputError as error:
        report.faults.append(str(error))
        return None
    report.faults += [f"Shard {path}: {text}." for text in _row_faults(manifest, tensors)]
    return tensors


def _row_faults(manifest: Description, tensors: dict[str, Tensor]) -> Iterator[str]:
    if not len(tensors["label"]):
        return
    if bool((wrong := row_checksums(tensors) != tensors["crc32"]).any()):
        yield f"network {int(wrong.nonzero()[0])} has changed since it was written (CRC-32)"
    labels, classes = tensors["label"], len(manifest.classes)
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        yield f"a label is not in 0 … {classes - 1}"
    if not 0 <= int(tensors["copy"].min()) <= int(tensors["copy"].max()) <= manifest.copies:
        yield f"a copy is not in 0 … {manifest.copies}"
    for name, tensor in tensors.items():
        known = name not in manifest.unmeasured
        if tensor.dtype.is_floating_point and known and not bool(tensor.isfinite().all()):
            yield f"{name} holds numbers that are not finite"


def _check_statistics(manifest: Manifest, total: Moments) -> list[str]:
    """Whether statistics.safetensors and the manifest say what the networks do."""
    faults = []
    file = manifest.folder / STATISTICS_FILE
    if total.count != manifest.statistics["count"]:
        faults.append(f"{file} is of {manifest.statistics['count']} networks, not of {total.count}.")
    mean, std = (read_networks(file, manifest.layout, suffix) for suffix in (".mean", ".std"))
    base = read_networks(manifest.folder / BASE_FILE, manifest.layout) if manifest.has_base else None
    again = whole_statistics(manifest, base, total.mean, total.std)
    for suffix, recorded, whole in zip((".mean", ".std"), (mean, std), again, strict=True):
        written = layer_tensors(recorded)
        for name, tensor in layer_tensors(whole).items():
            largest = float(tensor.abs().max())
            apart = float((written[name].double() - tensor).abs().max())
            if not apart <= _STATISTICS_TOLERANCE * max(largest, 1e-30):  # NaN is no match either
                faults.append(f"{file}: {name}{suffix} differs by {apart:.3g} from that of the networks.")
    scalars = layer_scalars(manifest.layout, mean, std)
    for name, numbers in scalars.items():
        stored = manifest.statistics["layers"].get(name, {})
        for key, value in numbers.items():
            if abs(stored.get(key, float("inf")) - value) > 1e-4 * max(numbers["std"], abs(value), 1e-30):
                faults.append(f"{manifest.folder}: the manifest's {key} of {name} is not that of {file.name}.")
    return faults


def _check_psnr(manifest: Manifest, split: str, data: str, report: SplitReport) -> None:
    """Draws networks as they are stored, and compares their PSNR with the one that is stored with them."""
    networks = WeightSet(manifest, split, "phi" if manifest.has_base else manifest.values)
    source = open_split(data, split, device=torch.device("cpu"))
    places = torch.linspace(0, len(networks) - 1, min(RENDERED, len(networks))).round().long().unique()
    for place in places.tolist():
        stored = networks.batch([place])
        position, copy = int(stored.index[0]), int(stored.copies[0])
        batch = next(source.batches(batch_size=1, start=position), None)
        if batch is None:
            report.faults.append(f"Network {place} of {split!r}: {data} has no sample {position} there.")
            continue
        if int(batch.labels[0]) != int(stored.labels[0]):
            report.faults.append(f"Network {place} of {split!r}: label {int(stored.labels[0])}, its signal's is "
                                 f"{int(batch.labels[0])}.")  # fmt: skip
        if copy:
            how = manifest.augment
            batch = augment(batch, how["kind"], seed=how["seed"], epoch=copy, padding=how["padding"])
        apart = abs(float(networks_psnr(manifest.layout, stored.weights, batch)[0]) - float(stored.psnr[0]))
        report.worst, report.drawn = max(report.worst, apart), report.drawn + 1
        if apart > PSNR_TOLERANCE[manifest.dtype]:
            report.faults.append(
                f"Network {place} of {split!r} (sample {position}, copy {copy}) differs by {apart:.2g} dB from the "
                "PSNR that is stored with it."
            )


def source_data(manifest: Manifest, given: str | None) -> tuple[str | None, str]:
    """The signals that the networks show, or None where they are not at hand; and a sentence about that.

    Raises:
        InputError: data was named that is not what the networks were fitted to.
    """
    if manifest.signal.kind != "image":
        return None, "Distances of points have no PSNR: no network was drawn."
    if not manifest.source:
        return None, "Which signals they show is not known: no network was drawn."
    path = given or str(manifest.source.get("path", ""))
    is_here = given is not None or path.startswith(BUILTIN_PREFIX) or (Path(path) / "dataset.json").is_file()
    if not is_here:
        return None, f"Their signals, {path}, are not at hand: no network was drawn. Name them with --data DIR."
    found = describe_source(read_info(path), DataConfig(path=path))
    if found["sha256"] != manifest.source["sha256"]:
        if given is not None:
            raise InputError(f"{path} is not the data that the networks were fitted to: its dataset.json is another.")
        return None, f"{path} has changed since the networks were fitted to it: none was drawn."
    return path, f"Drawn and compared with {path}."


def base_faults(manifest: Manifest) -> list[str]:
    """What is wrong with the base."""
    try:
        file = manifest.folder / BASE_FILE
        if manifest.has_base and not bool(read_networks(file, manifest.layout).flat().isfinite().all()):
            return [f"{file} holds numbers that are not finite."]
    except InputError as error:
        return [str(error)]
    return []
