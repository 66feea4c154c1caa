"""Check a folder of shards: counts, sizes, checksums, and whether every sample decodes and has a label in range."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

from tqdm import tqdm

from data_pipes.decode import decode_sample
from data_pipes.schema import DatasetInfo, ShardInfo, read_info
from data_pipes.shards import iterate_shard
from mwt.errors import InputError
from mwt.runtime import run_program

_FAULTS_SHOWN = 10


def shard_faults(info: DatasetInfo, shard: ShardInfo) -> list[str]:
    """What is wrong with one shard, one sentence each; empty if nothing is."""
    path = info.folder / shard.file
    if not path.is_file():
        return [f"Shard {path} is missing."]
    faults = []
    if path.stat().st_size != shard.bytes:
        faults.append(f"Shard {path} has {path.stat().st_size} bytes, not the {shard.bytes} recorded.")
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
            faults.append(f"Shard {path} has another sha256 than recorded.")
    found = 0
    try:
        for sample in iterate_shard(path, None):
            found += 1
            try:
                decode_sample(sample, info.facts, f"Sample {sample['__key__']} of shard {path}")
            except InputError as error:
                faults.append(str(error))
    except InputError as error:
        faults.append(str(error))
    if found != shard.count:
        faults.append(f"Shard {path} holds {found} samples, not the {shard.count} recorded.")
    return faults


def main(argv: list[str] | None = None) -> None:
    """Prints a table; raises InputError with the first faults if there are any."""
    parser = argparse.ArgumentParser(prog="python -m data_pipes.verify", description=__doc__)
    parser.add_argument("path", metavar="DIR", help="folder made by data_pipes.prepare, or builtin:NAME")
    info = read_info(parser.parse_args(argv).path)
    faults: list[str] = []
    rows = []
    for name, split in info.splits.items():
        before = len(faults)
        for shard in tqdm(split.shards, desc=name, unit="shard", disable=None):
            faults += shard_faults(info, shard)
        rows.append((name, split.count, len(split.shards), len(faults) - before))
    print(f"{'split':<8}{'samples':>10}{'shards':>8}{'faults':>8}")
    for name, count, shards, wrong in rows:
        print(f"{name:<8}{count:>10}{shards:>8}{wrong:>8}")
    if faults:
        more = f"\n… and {len(faults) - _FAULTS_SHOWN} more" if len(faults) > _FAULTS_SHOWN else ""
        raise InputError(f"{len(faults)} faults in {info.folder}:\n" + "\n".join(faults[:_FAULTS_SHOWN]) + more)
    print(f"{Path(info.folder)} is in order.")


if __name__ == "__main__":
    run_program(main)
