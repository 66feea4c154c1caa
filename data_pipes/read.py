"""Opening a split of a data set: which way of reading it, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from data_pipes.faults import Policy
from data_pipes.indexed import IndexedSplit
from data_pipes.resident import ResidentSplit
from data_pipes.schema import read_info
from data_pipes.split import Split
from data_pipes.streaming import StreamingSplit
from mwt.config import SAFE_SCHEMES, DataConfig
from mwt.errors import InputError

__all__ = ["IndexedSplit", "ResidentSplit", "Split", "StreamingSplit", "open_configured", "open_split"]

Reader = Literal["auto", "resident", "indexed", "stream"]


def open_split(
    path: str | Path,
    split: str,
    *,
    device: torch.device,
    reader: Reader = "auto",
    resident_mb: int = 4096,
    workers: int = 0,
    limit: int | None = None,
    on_bad_sample: Policy = "raise",
    max_bad: float = 0.01,
    schemes: tuple[str, ...] = SAFE_SCHEMES,
) -> Split:
    """Opens split `split` of the folder or URL `path` (or `builtin:NAME`), for batches on `device`.

    Args:
        path: what holds `dataset.json`.
        split: one of its splits.
        device: where batches come to lie.
        reader: `resident` reads everything at once and keeps it on the device; `indexed` reads samples one by one from
            local shards; `stream` reads shards one after the other, from URLs or files. `auto` is resident up to
            `resident_mb` MiB (decoded); above that, indexed where all shards are local and stream otherwise.
        resident_mb: see there.
        workers: decoding threads; 0 decodes in the calling one.
        limit: use only the first so many samples.
        on_bad_sample: whether a damaged sample or shard raises, or is skipped and counted (`data_pipes.faults`).
        max_bad: the share of the split that may be skipped before that raises, too.
        schemes: the schemes of URLs that may be opened.

    Raises:
        InputError: a folder, split, shard or sample that cannot be used; the message says which.
    """
    info = read_info(path, schemes=schemes)
    shards = info.split(split).shards
    if info.split(split).count == 0:
        raise InputError(f"Split {split!r} of {info.folder} has no samples.")
    remote = any(isinstance(info.source(shard), str) for shard in shards)
    if reader == "indexed" and remote:
        raise InputError(f"data.reader=indexed reads local shards, but those of {info.folder} are not; use stream.")
    options: dict[str, Any] = {
        "device": device, "workers": workers, "limit": limit, "on_bad_sample": on_bad_sample, "max_bad": max_bad
    }  # fmt: skip
    source: Split
    if remote or reader == "stream":
        source = StreamingSplit(info, split, schemes=schemes, **options)
    else:
        source = IndexedSplit(info, split, **options)
    fits = reader == "auto" and len(source) * source.sample_bytes() <= resident_mb * 2**20
    return ResidentSplit(source) if fits or reader == "resident" else source


def open_configured(data: DataConfig, split: str, device: torch.device) -> Split:
    """`open_split` with everything that a configuration says about reading."""
    return open_split(
        data.path,
        split,
        device=device,
        reader=data.reader,
        resident_mb=data.resident_mb,
        workers=data.workers,
        limit=data.limit,
        on_bad_sample=data.on_bad_sample,
        max_bad=data.max_bad,
        schemes=data.schemes,
    )
