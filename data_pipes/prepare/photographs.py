"""Photographs that scikit-image brings: some of one size, or one large picture made of their parts.

The large one is for fits of many megapixels: blocks of 256 x 256 pixels at the photographs' own resolution, each turned
or mirrored, in an order that is the same every time. Where a picture needs more blocks than there are in eight
positions, they come again.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mwt.errors import InputError
from mwt.rng import permutation
from mwt.signals import skimage_picture

NAMES = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "motorcycle_left", "rocket")
BLOCK = 256
"""Side of the mosaic's blocks."""
LARGEST = 16_384
"""Side of the largest mosaic: it is put together in memory, three bytes a pixel."""


def read(name: str) -> UInt8[np.ndarray, "h w 3"]:
    """A photograph of scikit-image in RGB.

    Raises:
        InputError: scikit-image, or this picture, is not there.
    """
    with Image.open(skimage_picture(name)) as image:
        return np.asarray(image.convert("RGB"))


def make(out: Path, size: tuple[int, int]) -> Path:
    """Write the middle `size` (height, width) of each photograph to `out`/NAME.png; returns `out`.

    Raises:
        InputError: a photograph is smaller; names the largest size.
    """
    pictures = {name: read(name) for name in NAMES}
    largest = tuple(min(picture.shape[axis] for picture in pictures.values()) for axis in (0, 1))
    if size[0] > largest[0] or size[1] > largest[1]:
        raise InputError(
            f"--size is {size[0]}x{size[1]}; photographs have at most {largest[0]}x{largest[1]} in common."
        )
    out.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        top, left = ((whole - part) // 2 for whole, part in zip(picture.shape[:2], size, strict=True))
        Image.fromarray(picture[top : top + size[0], left : left + size[1]]).save(out / f"{name}.png")
    return out


def make_mosaic(out: Path, size: tuple[int, int]) -> Path:
    """Write `out`/mosaic.png of `size` (height, width); returns it.

    Raises:
        InputError: sides that are no multiples of the block, or too large.
    """
    if any(side % BLOCK or not BLOCK <= side <= LARGEST for side in size):
        raise InputError(
            f"--size is {size[0]}x{size[1]}; the sides of a mosaic are multiples of {BLOCK}, to {LARGEST}."
        )
    parts = [block for name in NAMES for block in blocks(read(name))]
    rows, columns = size[0] // BLOCK, size[1] // BLOCK
    order = permutation(8 * len(parts), seed=0, purpose="mosaic", epoch=0).tolist()
    canvas = np.empty((*size, 3), dtype=np.uint8)
    for cell in range(rows * columns):
        part, turn = divmod(order[cell % len(order)], 8)
        block = np.rot90(parts[part], turn % 4)
        top, left = cell // columns * BLOCK, cell % columns * BLOCK
        canvas[top : top + BLOCK, left : left + BLOCK] = block if turn < 4 else block[:, ::-1]
    out.mkdir(parents=True, exist_ok=True)
    path = out / "mosaic.png"
    Image.fromarray(canvas).save(path)
    return path


def blocks(picture: UInt8[np.ndarray, "h w 3"]) -> list[UInt8[np.ndarray, "_b _b 3"]]:
    """All whole blocks of a picture, next to each other from the top left."""
    height, width = picture.shape[0] // BLOCK, picture.shape[1] // BLOCK
    return [
        picture[y * BLOCK : (y + 1) * BLOCK, x * BLOCK : (x + 1) * BLOCK] for y in range(height) for x in range(width)
    ]
