"""Bytes on disk <-> `mwt.structs.Batch`: shards of samples, how they are written, read, checked and augmented."""

from __future__ import annotations

from data_pipes.decode import load_image
from data_pipes.read import Split, open_split
from data_pipes.schema import DatasetInfo, list_builtin, read_info

__all__ = ["DatasetInfo", "Split", "list_builtin", "load_image", "open_split", "read_info"]
