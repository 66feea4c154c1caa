"""Check a folder of shards: counts, sizes, checksums, whether every sample decodes and has a label in range, and
whether a signal lies in two splits. Or a set of fitted networks: see `data_pipes.verify_weights`."""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data_pipes.decode import decode_sample
from data_pipes.processes import available_cores, ordered_processes
from data_pipes.remote import shown
from data_pipes.schema import DatasetInfo, ShardInfo, read_info
from data_pipes.shards import iterate_shard
from data_pipes.verify_weights import PSNR_TOLERANCE, base_faults, check_split, source_data
from data_pipes.weight_manifest import is_weight_set, read_manifest
from mwt.errors import InputError
from mwt.runtime import run_program

_FAULTS_SHOWN = 10
_MIN_BYTES = 64 * 2**20
"""Below this size other processes take longer to start than they save."""
_DIGEST_BYTES = 16


@dataclass
class ShardReport:
    """What is wrong with one shard, one sentence each, and (key, digest of the decoded signal) of every sample."""

    faults: list[str] = field(default_factory=list)
    digests: list[tuple[str, bytes]] = field(default_factory=list)


def check_shard(shard: ShardInfo, info: DatasetInfo) -> ShardReport:
    """Reads one local shard from beginning to end."""
    path = Path(info.source(shard))
    report = ShardReport()
    if not path.is_file():
        return ShardReport([f"Shard {path} is missing."])
    try:
        _check_content(path, shard, info, report)
    except OSError as error:
        report.faults.append(f"Shard {path} cannot be read ({error.strerror or error}).")
    return report


def _check_content(path: Path, shard: ShardInfo, info: DatasetInfo, report: ShardReport) -> None:
    if path.stat().st_size != shard.bytes:
        report.faults.append(f"Shard {path} has {path.stat().st_size} bytes, not the {shard.bytes} recorded.")
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
            report.faults.append(f"Shard {path} has another sha256 than recorded.")
    found = 0
    try:
        for sample in iterate_shard(path):
            found += 1
            key = sample["__key__"]
            try:
                signal, _ = decode_sample(sample, info.facts, f"Sample {key} of shard {path}")
                report.digests.append((key, digest(signal)))
            except InputError as error:
                report.faults.append(str(error))
    except InputError as error:
        report.faults.append(str(error))
    if found != shard.count:
        report.faults.append(f"Shard {path} holds {found} samples, not the {shard.count} recorded.")


def digest(signal: Tensor) -> bytes:
    """A hash of a signal's shape and numbers: the same pixels are the same signal, whatever their encoding."""
    hashed = hashlib.blake2b(str((tuple(signal.shape), signal.dtype)).encode(), digest_size=_DIGEST_BYTES)
    hashed.update(signal.contiguous().view(torch.uint8).numpy().data)
    return hashed.digest()


class _Seen:
    """Which signals each split holds, to find those that lie in two."""

    def __init__(self) -> None:
        self._where: dict[bytes, tuple[str, str]] = {}

    def add(self, split: str, shard: ShardInfo, report: ShardReport) -> list[str]:
        """One sentence for each signal that an earlier split holds too."""
        faults = []
        for key, hashed in report.digests:
            first_split, first = self._where.setdefault(hashed, (split, f"{key} of {shard.file}"))
            if first_split != split:
                faults.append(f"Sample {key} of {shard.file} ({split}) is the same signal as {first} ({first_split}).")
        return faults


def main(argv: list[str] | None = None) -> None:
    """Prints a table; raises InputError with the first faults if there are any."""
    parser = argparse.ArgumentParser(prog="python -m data_pipes.verify", description=__doc__)
    parser.add_argument("path", metavar="DIR", help="folder made by data_pipes.prepare or eval.export, or builtin:NAME")
    parser.add_argument("--data", metavar="DIR", help="of fitted networks: their signals, if not where they were")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: the cores, for large data sets)")
    parser.add_argument(
        "--allow-duplicates", action="store_true",
        help="only count signals that lie in two splits; some published data sets have them",
    )  # fmt: skip
    options = parser.parse_args(argv)
    if is_weight_set(options.path):
        verify_weight_set(options.path, options.data)
        return
    if options.data is not None:
        raise InputError(f"--data is for sets of fitted networks, and {options.path} is none.")
    info = read_info(options.path)
    if options.workers is not None and options.workers < 0:
        raise InputError(f"--workers is {options.workers}; it cannot be negative.")
    for shard in (shard for split in info.splits.values() for shard in split.shards):
        if isinstance(source := info.source(shard), str):
            raise InputError(
                f"Only local shards can be verified, but {shown(source)} is not; copy the data here first."
            )
    workers = options.workers
    if workers is None:
        size = sum(shard.bytes for split in info.splits.values() for shard in split.shards)
        workers = available_cores() if size >= _MIN_BYTES else 0
    faults: list[str] = []
    seen = _Seen()
    shards = [(split, shard) for split, part in info.splits.items() for shard in part.shards]
    reports = ordered_processes(partial(check_shard, info=info), [s for _, s in shards], workers=workers, piece=1)
    counts = {split: [0, 0] for split in info.splits}  # faults, signals of an earlier split
    bar = tqdm(zip(shards, reports, strict=True), total=len(shards), desc="verify", unit="shard", disable=None)
    for (split, shard), report in bar:
        duplicates = seen.add(split, shard, report)
        counts[split][0] += len(report.faults)
        counts[split][1] += len(duplicates)
        faults += report.faults + ([] if options.allow_duplicates else duplicates)
    rows = [(name, split.count, len(split.shards), *counts[name]) for name, split in info.splits.items()]
    print(f"{'split':<8}{'samples':>10}{'shards':>8}{'faults':>8}{'duplicates':>12}")
    for name, count, shard_count, wrong, twice in rows:
        print(f"{name:<8}{count:>10}{shard_count:>8}{wrong:>8}{twice:>12}")
    _conclude(faults, info.folder)


def verify_weight_set(path: str, data: str | None) -> None:
    """Prints a table; raises InputError with the first faults if there are any."""
    manifest = read_manifest(path)
    data, about = source_data(manifest, data)
    faults = base_faults(manifest)
    reports = {}
    for split in tqdm(manifest.splits, desc="verify", unit="split", disable=None, leave=False):
        reports[split] = check_split(manifest, split, data)
        faults += reports[split].faults
    print(f"{'split':<8}{'networks':>10}{'shards':>8}{'faults':>8}{'duplicates':>12}{'drawn':>7}{'PSNR within':>15}")
    for name, report in reports.items():
        split_info = manifest.splits[name]
        within = f"{report.worst:.1e} dB" if report.drawn else "-"
        print(f"{name:<8}{split_info.count:>10}{len(split_info.shards):>8}{len(report.faults):>8}"
              f"{report.duplicates:>12}{report.drawn:>7}{within:>15}")  # fmt: skip
    print(f"{about} {manifest.values} in {manifest.dtype}, tolerance {PSNR_TOLERANCE[manifest.dtype]:g} dB.")
    if manifest.left_out:
        print(manifest.left_out)
    _conclude(faults, manifest.folder)


def _conclude(faults: list[str], folder: Path) -> None:
    if faults:
        more = f"\n… and {len(faults) - _FAULTS_SHOWN} more" if len(faults) > _FAULTS_SHOWN else ""
        raise InputError(f"{len(faults)} faults in {folder}:\n" + "\n".join(faults[:_FAULTS_SHOWN]) + more)
    print(f"{folder} is in order.")


if __name__ == "__main__":
    run_program(main)
