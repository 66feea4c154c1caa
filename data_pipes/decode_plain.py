"""PNG and JPEG files that nothing has to be done to, by torchvision's libpng and libjpeg: the pixels that PIL gives.

They take two thirds of PIL's time or less, and run beside other threads, which PIL's Python holds up. Only where the
process has loaded torchvision already (whatever has a model has): it takes seconds. What is not plain, or not sound, is
left to PIL and its messages.
"""

from __future__ import annotations

import io
import struct
import sys
import zlib
from functools import cache

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

MAX_PIXELS = 2**26
"""Images above 67 megapixels are refused before they are decompressed."""
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
_PNG_HEADER = struct.Struct(">16sIIBBBBB")
_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_JPEG_FRAMES = (0xC0, 0xC1, 0xC2)
"""Baseline, extended and progressive."""
_JPEG_HARMLESS = (0xDB, 0xC4, 0xDD, 0xE0, 0xFE)
"""Tables, restarts, JFIF and comments. Anything else may say how the pixels are to be seen: EXIF, ICC, Adobe."""


def plain_size(data: bytes, extension: str, channels: int) -> tuple[int, int] | None:
    """(height, width) of a file that `decode_plain` may be asked for: grey or RGB of 8 bits as asked for, and whole."""
    if "torchvision" not in sys.modules or channels not in (1, 3):
        return None
    look = {"png": _plain_png, "jpg": _plain_jpeg, "jpeg": _plain_jpeg}.get(extension)
    found = None if look is None else look(data, channels)
    return None if found is None or found[0] * found[1] > MAX_PIXELS else found


def decode_plain(data: bytes, extension: str) -> UInt8[Tensor, "C h w"] | None:
    """The pixels of a plain file, a permuted [h, w, C]; None where it is damaged, or decoded otherwise than by PIL."""
    if extension == "png":
        return _decoded("decode_png", data)
    return _decoded("decode_jpeg", data) if _jpegs_agree() else None


def _decoded(operator: str, data: bytes) -> Tensor | None:
    if not hasattr(torch.ops.image, operator):
        return None
    try:
        pixels: Tensor = getattr(torch.ops.image, operator)(
            torch.frombuffer(bytearray(data), dtype=torch.uint8), 0, False
        )
    except RuntimeError:
        return None
    return pixels


@cache
def _jpegs_agree() -> bool:
    """Whether PIL and torchvision decode alike: both bring a libjpeg, and these may differ in the last bit."""
    noise = np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8)
    for pixels, options in (
        (noise, {"quality": 90}),
        (noise, {"quality": 60, "progressive": True}),
        (noise[..., 0], {}),
    ):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", **options)
        ours, theirs = _decoded("decode_jpeg", file.getvalue()), np.asarray(Image.open(file))
        if ours is None or not np.array_equal(ours.permute(1, 2, 0).numpy().squeeze(), theirs):
            return False
    return True


def _plain_png(data: bytes, channels: int) -> tuple[int, int] | None:
    """Whole and sound chunks that hold pixels and nothing else, not interlaced."""
    if len(data) < _PNG_HEADER.size:
        return None
    signature, width, height, *form = _PNG_HEADER.unpack_from(data)
    if signature != _PNG_SIGNATURE or form != [8, channels - 1, 0, 0, 0]:
        return None
    place, kinds = 8, []
    while place + 12 <= len(data):
        end = place + 8 + int.from_bytes(data[place : place + 4])
        if zlib.crc32(data[place + 4 : end]) != int.from_bytes(data[end : end + 4]):
            return None
        kinds.append(data[place + 4 : place + 8])
        place = end + 4
    body = kinds[1:-1]
    sound = place == len(data) and kinds[-1] == b"IEND" and len(body) > 0 and set(body) == {b"IDAT"}
    return (height, width) if sound else None


def _plain_jpeg(data: bytes, channels: int) -> tuple[int, int] | None:
    """Not cut off, and with no word before the pixels about anything but them."""
    if not (data.startswith(_JPEG_START) and data.endswith(_JPEG_END)):
        return None
    place, size = 2, None
    while place + 10 <= len(data) and data[place] == 0xFF:
        kind = data[place + 1]
        if kind == 0xDA:  # the pixels
            return size
        if kind in _JPEG_FRAMES:
            if data[place + 4] != 8 or data[place + 9] != channels:
                return None
            size = int.from_bytes(data[place + 5 : place + 7]), int.from_bytes(data[place + 7 : place + 9])
        elif kind not in _JPEG_HARMLESS:
            return None
        place += 2 + int.from_bytes(data[place + 2 : place + 4])
    return None
