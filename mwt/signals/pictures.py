"""Pictures from files, and as arrays for people: shared by the tasks that see images."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from matplotlib import colormaps
from PIL import Image, ImageFile, ImageOps
from PIL.TiffImagePlugin import BITSPERSAMPLE, TiffImageFile
from torch import Tensor

from mwt.errors import InputError

PICTURES: tuple[str, ...] = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp", ".gif", ".npy")
"""Endings that `read_picture` takes."""
ORIENTATION = 0x0112
"""The tag of EXIF."""


def in_order(path: Path) -> tuple[list[int | str], str]:
    """What to sort ordered files by: their names, numbers in them as numbers, so that frame2 comes before frame10."""
    parts = re.split(r"(\d+)", path.name)  # text and digits by turns
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], path.name


def read_picture(path: Path, *, grey: bool = False) -> Float[Tensor, "h w C"]:
    """An image file as numbers in [0, 1]: grey or RGB of 8 bits, of 16 (PNG, TIFF), floats (grey TIFF), or .npy.

    Transparency is dropped; the orientation that a camera notes (EXIF) is applied.

    Raises:
        InputError: no such file, not an image, an array of another form, or RGB of 16 bits that no library here reads.
    """
    if not path.is_file():
        raise InputError(f"There is no file {path}.")
    array = _read_array(path) if path.suffix.lower() == ".npy" else _read_image(path, grey=grey)
    if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
        raise InputError(f"{path} holds numbers outside [0, 1]; scale them first.")
    picture = torch.from_numpy(np.ascontiguousarray(array))
    picture = picture[..., None] if picture.ndim == 2 else picture
    if grey and picture.shape[-1] > 1:
        picture = picture @ picture.new_tensor([[0.299], [0.587], [0.114]])
    return picture


def _read_image(path: Path, *, grey: bool) -> np.ndarray:
    """[h, w] or [h, w, 3]."""
    try:
        with Image.open(path) as opened:
            if _has_wide_colours(opened):
                return _turned(_read_wide(path, opened.format), opened.getexif().get(ORIENTATION, 1))
            opened.load()
            image = ImageOps.exif_transpose(opened)
            if image.mode == "F":
                return np.asarray(image, dtype=np.float32)
            if image.mode.startswith("I"):
                array = np.asarray(image, dtype=np.float32)
                # `I;16` says 16 bits, however dark the picture; `I` has room for 32 and says nothing
                wide = image.mode != "I" or array.max() > 255
                return array / np.float32(65535 if wide else 255)
            wanted = "L" if grey or image.mode in ("L", "LA", "1") else "RGB"
            return np.asarray(image.convert(wanted), dtype=np.float32) / np.float32(255)
    except InputError:
        raise
    except Exception as error:  # Pillow's plug-ins raise many kinds
        raise InputError(f"{path} is not an image that can be read ({error}).") from error


def _has_wide_colours(image: ImageFile.ImageFile) -> bool:
    """Whether a PNG or TIFF file, opened and not loaded, has more than 8 bits a channel, of which Pillow keeps 8."""
    if image.mode.startswith(("I", "F")):
        return False
    if image.format == "PNG":
        return any(";16" in str(tile.args) for tile in image.tile)
    return isinstance(image, TiffImageFile) and max(image.tag_v2.get(BITSPERSAMPLE, (8,))) > 8


def _read_wide(path: Path, kind: str | None) -> np.ndarray:
    """[h, w] or [h, w, 3] of 16 bits a channel."""
    try:
        array = _wide_png(path) if kind == "PNG" else _wide_tiff(path)
    except ImportError as error:
        way = "PNG: save it as TIFF, " if kind == "PNG" else "TIFF, of which all are read through tifffile: "
        raise InputError(
            f"{path} has more than 8 bits a colour, of which Pillow would keep 8, and nothing here reads all of a "
            f"{way}pip install tifffile."
        ) from error
    colours = array[..., 0] if array.shape[-1] == 2 else array[..., :3]
    return colours.astype(np.float32) / np.float32(np.iinfo(array.dtype).max)


def _wide_png(path: Path) -> np.ndarray:
    """[h, w, C]: through torchvision, as long as it has a decoder (it says that a release to come has none)."""
    from torchvision.io import ImageReadMode, decode_image

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The image decoding and encoding capabilities")
        found: np.ndarray = decode_image(str(path), ImageReadMode.UNCHANGED).movedim(0, -1).numpy()
    return found


def _wide_tiff(path: Path) -> np.ndarray:
    """[h, w, 3] or [h, w, 4]: the first page, through tifffile."""
    from tifffile import PHOTOMETRIC, TiffFile

    with TiffFile(path) as file:
        page = file.pages.first
        array = page.asarray()
        if page.axes == "SYX":  # plane after plane
            array = np.moveaxis(array, 0, -1)
        if page.photometric != PHOTOMETRIC.RGB or array.ndim != 3 or array.dtype.kind != "u":
            kind = PHOTOMETRIC(page.photometric).name
            raise InputError(f"{path} is a TIFF file of {kind} {array.dtype}; save it as RGB.")
    return array


def _turned(array: np.ndarray, orientation: int) -> np.ndarray:
    """Upright, as Pillow's `exif_transpose` does it."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    return array[:, ::-1] if orientation in (2, 3, 6, 7) else array


def _read_array(path: Path) -> np.ndarray:
    """[h, w] or [h, w, C]."""
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{path} is not an array that can be read ({error}).") from error
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (1, 3))) or array.size == 0:
        raise InputError(f"{path} holds an array of shape {array.shape}; an image is [h, w], [h, w, 1] or [h, w, 3].")
    if array.dtype in (np.uint8, np.uint16):
        array = array / np.iinfo(array.dtype).max
    elif array.dtype.kind not in "fb":  # of what is white in 64 bits nothing is known
        raise InputError(f"{path} holds {array.dtype}; save uint8, uint16, or floats in [0, 1].")
    return array.astype(np.float32)


def centre(picture: Float[Tensor, "h w C"], size: int | None, name: str) -> Float[Tensor, "H W C"]:
    """The square in the middle.

    Raises:
        InputError: the picture is smaller.
    """
    if size is None:
        return picture
    height, width = picture.shape[:2]
    if not 1 <= size <= min(height, width):
        raise InputError(
            f"signal.crop is {size}; {name} is {height} x {width}, of which 1 to {min(height, width)} can be used."
        )
    top, left = (height - size) // 2, (width - size) // 2
    return picture[top : top + size, left : left + size]


def read_pictures(paths: Sequence[Path], *, grey: bool = False, crop: int | None = None) -> Float[Tensor, "N h w C"]:
    """Several pictures of one size, or the squares of `crop` pixels in their middles.

    Raises:
        InputError: as of `read_picture`, smaller than `crop`, or sizes differ; names the file.
    """
    pictures = [centre(read_picture(path, grey=grey), crop, str(path)) for path in paths]
    for path, picture in zip(paths, pictures, strict=True):
        if picture.shape != pictures[0].shape:
            raise InputError(
                f"{path} is {describe(picture)} and {paths[0]} is {describe(pictures[0])}; pictures of one batch "
                "have one size and one number of channels."
            )
    return torch.stack(pictures)


def describe(picture: Float[Tensor, "h w C"]) -> str:
    """Its size for people."""
    height, width, channels = picture.shape
    return f"{height} x {width}{', grey' if channels == 1 else ''}"


def to_bytes(picture: Float[Tensor, "h w C"]) -> UInt8[Tensor, "C h w"]:
    """Numbers in [0, 1] (clamped) as grey levels 0 to 255, channels first."""
    return (picture.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).permute(2, 0, 1).cpu()


def error_map(shown: Float[Tensor, "h w C"], truth: Float[Tensor, "h w C"]) -> UInt8[Tensor, "3 h w"]:
    """Absolute error, its mean over channels, black at 0 to yellow at 0.1 and more (matplotlib's inferno)."""
    size = (shown - truth).detach().float().abs().mean(-1).cpu() / 0.1
    colours = colormaps["inferno"](size.clamp(0, 1).numpy(), bytes=True)[..., :3]
    return torch.from_numpy(np.ascontiguousarray(colours)).permute(2, 0, 1)


def write_picture(path: Path, picture: UInt8[Tensor, "C h w"]) -> Path:
    """Write a PNG file."""
    array = picture[0] if picture.shape[0] == 1 else picture.permute(1, 2, 0)
    Image.fromarray(array.contiguous().numpy()).save(path, "PNG")
    return path


def write_shown(path: Path, picture: Float[Tensor, "h w C"], truth: Float[Tensor, "h w C"]) -> list[Path]:
    """Write NAME.png of 8 bits for people, and where the truth has more than that, NAME.npy of 16 beside it.

    The array is uint16 [h, w, C], 65535 is white; `read_picture` takes it. (No library here writes such RGB as PNG.)
    """
    files = [write_picture(path, to_bytes(picture))]
    levels = truth.detach().cpu() * 255
    if float((levels - levels.round()).abs().max()) > 1e-3:  # a step of 16 bits is 4e-3
        wide = (picture.detach().cpu().double().clamp(0, 1) * 65535).round().numpy().astype(np.uint16)
        files.append(path.with_suffix(".npy"))
        np.save(files[-1], wide)
    return files


STRIP = 2**20
"""Pixels that `psnr` and `ssim` see at once, about: their intermediate pictures are no larger."""


def psnr(shown: Float[Tensor, "N P C"], truth: Float[Tensor, "N P C"]) -> Float[Tensor, " N"]:
    """Peak signal-to-noise ratio in dB of numbers in [0, 1]; what is shown is clamped, as a screen does."""
    total = torch.zeros(len(truth), dtype=torch.float64, device=truth.device)
    for own, right in zip(shown.split(STRIP, 1), truth.split(STRIP, 1), strict=True):
        total += (own.clamp(0, 1) - right).double().square().sum((-2, -1))
    error = total / truth[0].numel()
    return (-10 * error.clamp_min(1e-12).log10()).float()


def ssim(shown: Float[Tensor, "N h w C"], truth: Float[Tensor, "N h w C"]) -> Float[Tensor, " N"]:
    """Structural similarity (Wang et al. 2004) with an 11 x 11 Gaussian window of deviation 1.5, numbers in [0, 1].

    Computed a strip of rows after the other, each with the five rows beside it that its windows reach.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    height = shown.shape[1]
    rows, reach = max(1, STRIP // shown.shape[2]), 5
    total = torch.zeros(len(shown), device=shown.device)
    for top in range(0, height, rows):
        first, end = max(0, top - reach), min(height, top + rows + reach)
        pair = [part[:, first:end].movedim(-1, 1) for part in (shown, truth)]
        _, similar = structural_similarity_index_measure(
            pair[0].clamp(0, 1), pair[1], data_range=1.0, reduction="none", return_full_image=True
        )
        total += similar[..., top - first : top - first + rows, :].sum((1, 2, 3))
    return total / truth[0].numel()
