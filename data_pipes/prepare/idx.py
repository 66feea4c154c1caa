"""The IDX files of MNIST and its relatives: a short big-endian header, then bytes."""

from __future__ import annotations

import gzip
import math
import re
import struct
import zlib
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor

from mwt.errors import InputError

_NAME = re.compile(r"^(train|t10k)-(images|labels)[-.]idx([13])[-.]ubyte(\.gz)?$")
_MAX_BYTES = 2**32
PARTS = (("train", "images"), ("train", "labels"), ("t10k", "images"), ("t10k", "labels"))


def read_idx(path: Path, dims: int) -> UInt8[Tensor, "..."]:
    """An IDX file of unsigned bytes with `dims` dimensions, gzipped if its name ends in .gz.

    Raises:
        InputError: no such file, another kind of content, or another length than the header says.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            header = file.read(4 + 4 * dims)
            if len(header) < 4 + 4 * dims:
                raise InputError(f"{path} ends within its header; it is not a whole IDX file.")
            magic, *shape = struct.unpack(f">{1 + dims}I", header)
            if magic != 0x0800 + dims:
                raise InputError(
                    f"{path} starts with {magic:#010x}, not {0x0800 + dims:#010x}; "
                    f"it is no IDX file of bytes with {dims} dimensions."
                )
            count = math.prod(shape)
            if count > _MAX_BYTES:
                raise InputError(f"{path} claims a shape of {shape}, which is too large to be true.")
            data = file.read(count + 1)  # one more, to notice what should not be there
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read: {error}.") from error
    if len(data) != count:
        raise InputError(
            f"{path} holds {'more than ' if len(data) > count else ''}{min(len(data), count)} bytes of data, "
            f"its header says {count} ({' x '.join(map(str, shape))})."
        )
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).reshape(shape)


def find_idx(src: Path, preferred: str) -> dict[tuple[str, str], Path]:
    """The four files of a data set: (train | t10k, images | labels) -> path, all from one folder.

    They are looked for in `src`/`preferred`/raw (torchvision's layout), in `src` itself, then one level below.

    Raises:
        InputError: no folder holds all four, or several below `src` do.
    """
    if not src.is_dir():
        raise InputError(f"No folder at {src} (--src).")
    best: dict[tuple[str, str], Path] = {}
    for group in ([src / preferred / "raw"], [src], sorted(path for path in src.iterdir() if path.is_dir())):
        found = [parts for folder in group if (parts := _parts(folder))]
        whole = [parts for parts in found if len(parts) == len(PARTS)]
        if len(whole) > 1:
            places = ", ".join(str(next(iter(parts.values())).parent) for parts in whole)
            raise InputError(f"Several folders below {src} hold IDX files: {places}. Give one of them as --src.")
        if whole:
            return whole[0]
        best = max([best, *found], key=len)
    missing = ", ".join(f"{part}-{what}-idx{3 if what == 'images' else 1}-ubyte[.gz]" for part, what in PARTS
                        if (part, what) not in best)  # fmt: skip
    raise InputError(f"{src} (--src) does not hold all IDX files, nor do the folders in it; missing: {missing}.")


def _parts(folder: Path) -> dict[tuple[str, str], Path]:
    if not folder.is_dir():
        return {}
    matches = ((path, _NAME.match(path.name)) for path in sorted(folder.iterdir(), reverse=True) if path.is_file())
    # reverse, so that of two forms of one file the unpacked one stays
    return {(match[1], match[2]): path for path, match in matches if match}
