"""Bytes on disk <-> `mwt.structs.Batch`: shards of samples, how they are written, read, checked and augmented."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipes.decode import load_image
    from data_pipes.read import Split, open_split
    from data_pipes.schema import DatasetInfo, list_builtin, read_info
    from data_pipes.weights import load_weight_set

__all__ = ["DatasetInfo", "Split", "list_builtin", "load_image", "load_weight_set", "open_split", "read_info"]

_HOME = {
    "data_pipes.decode": ("load_image",),
    "data_pipes.read": ("Split", "open_split"),
    "data_pipes.schema": ("DatasetInfo", "list_builtin", "read_info"),
    "data_pipes.weights": ("load_weight_set",),
}


def __getattr__(name: str) -> Any:
    # Imported when first asked for, as in `mwt`.
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
