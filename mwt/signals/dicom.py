"""Slices from DICOM files, as numbers in [0, 1]."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mwt.errors import InputError

PYDICOM = "pydicom:"


def pydicom_library() -> Any:
    """The library that reads DICOM.

    Raises:
        InputError: it is not installed.
    """
    try:
        import pydicom
    except ImportError as error:
        raise InputError("DICOM is read through pydicom: pip install 'meta-weight-transformer[medical]'.") from error
    return pydicom


def pydicom_file(name: str) -> Path:
    """A file that pydicom brings, such as CT_small.

    Raises:
        InputError: it brings none of this name, or is not installed.
    """
    folder = Path(pydicom_library().__file__).parent / "data" / "test_files"
    found = sorted(folder.glob("*.dcm"))
    for path in found:
        if path.stem == name:
            return path
    raise InputError(f"pydicom brings no file {name!r}; there are {', '.join(path.stem for path in found)}.")


def read_dicom(path: Path, window: tuple[float, ...] = ()) -> Float[Tensor, "h w 1"]:
    """One slice: stored numbers times slope plus intercept (Hounsfield units of a CT), the window to [0, 1], clamped.

    Args:
        path: the file.
        window: (low, high), what becomes 0 and 1. (): the file's own window, or, where it has none, least and greatest.

    Raises:
        InputError: not DICOM, no pixels, several frames, colours, or a window that does not rise.
    """
    library = pydicom_library()
    if not path.is_file():
        raise InputError(f"There is no file {path}.")
    try:
        content = library.dcmread(path)
    except (library.errors.InvalidDicomError, OSError, EOFError, ValueError) as error:
        raise InputError(f"{path} is not a DICOM file that can be read ({error}).") from error
    if "PixelData" not in content:
        raise InputError(f"{path} is a DICOM file without pixels (a report, a plan, ...); take one that has an image.")
    try:
        stored = content.pixel_array.astype(np.float64)
    except Exception as error:  # decoders raise many kinds
        raise InputError(f"{path}: its pixels cannot be decoded ({error}).") from error
    if stored.ndim != 2:
        raise InputError(f"{path} holds an array of shape {stored.shape}; one slice of grey levels is expected.")
    units = stored * float(content.get("RescaleSlope", 1)) + float(content.get("RescaleIntercept", 0))
    low, high = window or _own_window(content, units)
    if not low < high:
        raise InputError(f"{path}: the window is {low:g} to {high:g}; it must rise (signal.window).")
    return torch.from_numpy(np.clip((units - low) / (high - low), 0, 1)).float()[..., None]


def _own_window(content: Any, units: Float[np.ndarray, "h w"]) -> tuple[float, float]:
    centre, width = content.get("WindowCenter"), content.get("WindowWidth")
    if centre is None or width is None:
        return float(units.min()), float(units.max())
    centre, width = (float(np.atleast_1d(value)[0]) for value in (centre, width))  # several windows: the first
    return centre - width / 2, centre + width / 2
