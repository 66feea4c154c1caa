"""Slices from DICOM files, as numbers in [0, 1]."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mwt.errors import InputError

PYDICOM = "pydicom:"
MARKER = 128
"""Byte at which DICOM files say DICM."""


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


def is_dicom(path: Path) -> bool:
    """Whether a file is called .dcm, or has DICOM's marker, as the files of most archives do: IM0001, 1.2.840.10008.

    DICOMDIR, the list of files that lies beside them, has the marker too and is none.
    """
    if path.suffix.lower() == ".dcm":
        return True
    if path.name.upper() == "DICOMDIR" or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return file.read(MARKER + 4)[MARKER:] == b"DICM"
    except OSError:  # not to be read, so not to be fitted
        return False


def read_dicom(path: Path, window: tuple[float, ...] = ()) -> Float[Tensor, "h w 1"]:
    """One slice: stored numbers times slope plus intercept (Hounsfield units of a CT), the window to [0, 1], clamped.

    MONOCHROME1, which many radiographs are, says that the least number is white: there 0 and 1 change places.

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
    try:
        slope, shift = _number(content, "RescaleSlope", 1.0), _number(content, "RescaleIntercept", 0.0)
        units = stored * slope + shift
        low, high = window or _own_window(content, units)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: a tag of its scale or window is no number ({error}); mend the tag.") from error
    if not low < high:
        raise InputError(f"{path}: the window is {low:g} to {high:g}; it must rise (signal.window).")
    levels = np.clip((units - low) / (high - low), 0, 1)
    if content.get("PhotometricInterpretation") == "MONOCHROME1":
        levels = 1 - levels
    return torch.from_numpy(levels).float()[..., None]


def _own_window(content: Any, units: Float[np.ndarray, "h w"]) -> tuple[float, float]:
    centre, width = _number(content, "WindowCenter", math.nan), _number(content, "WindowWidth", math.nan)
    if math.isnan(centre) or math.isnan(width):
        return float(units.min()), float(units.max())
    return centre - width / 2, centre + width / 2


def _number(content: Any, tag: str, absent: float) -> float:
    """The number of a tag, or the first of several; `absent` where it is missing or empty."""
    value = content.get(tag)
    values = [value] if value is None or isinstance(value, str) else np.atleast_1d(value).tolist()
    return absent if not values or values[0] in (None, "") else float(values[0])
