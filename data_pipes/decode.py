"""Bytes -> tensors. Only known formats, nothing unpickled; messages name the sample or the file."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from data_pipes.decode_plain import MAX_PIXELS, decode_plain, plain_size
from mwt.errors import InputError
from mwt.structs import SignalFacts

IMAGE_FORMATS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}
"""Extension of a sample -> the only format that PIL may find in it."""
EXTENSIONS = (*IMAGE_FORMATS, "npy")
"""Extensions of the signals that can be stored; nothing else in a shard is looked at."""
POINT_DIMS = 3
"""D of point sets: (x, y, z)."""
_KNOWN_INFO = {
    "JPEG": {"jfif", "jfif_version", "jfif_unit", "jfif_density", "dpi", "progressive", "progression", "comment"},
    "PNG": {"dpi", "gamma", "srgb"},
}
"""What a file may say about its image without changing how it is seen; neither EXIF nor transparency is among it."""
MAX_LABEL_BYTES = 8
"""A label with its line break; a longer one is refused unread."""


def open_image(source: io.BytesIO | Path, where: str, formats: tuple[str, ...] | None = None) -> Image.Image:
    """Opens an image lazily (its header only), after a look at its size. `where` names it in messages.

    Raises:
        InputError: not an image (of one of `formats`, if given), or larger than `MAX_PIXELS`.
    """
    try:
        image = Image.open(source, formats=formats)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{where}: the image is larger than {MAX_PIXELS} pixels; make it smaller first.") from error
    except Exception as error:  # PIL's plug-ins raise many kinds
        raise InputError(f"{where} cannot be read as an image{_format_list(formats)}: {_reason(error)}.") from error
    if image.width * image.height > MAX_PIXELS:
        raise InputError(
            f"{where}: the image has {image.width} x {image.height} pixels, more than {MAX_PIXELS}; "
            "make it smaller first."
        )
    return image


def _format_list(formats: tuple[str, ...] | None) -> str:
    return f" ({', '.join(formats)})" if formats else ""


def _reason(error: Exception) -> str:
    if type(error).__name__ == "UnidentifiedImageError":  # its text is the address of a buffer
        return "unknown or damaged content"
    return (str(error) or type(error).__name__).rstrip(".")


def image_to_tensor(image: Image.Image, channels: int, where: str) -> UInt8[Tensor, "C h w"]:
    """Pixels of an opened image as grey (`channels` 1) or RGB (3).

    EXIF orientation is applied, transparency is laid over white, 16-bit grey is scaled to 8 bits (65535 -> 255),
    of an animation the first frame is taken.

    Raises:
        InputError: a damaged file, or one with 32-bit values, for which no range is known.
    """
    mode = {1: "L", 3: "RGB"}.get(channels)
    if mode is None:
        raise InputError(f"{where}: images with {channels} channels are not supported; 1 (grey) and 3 (RGB) are.")
    try:
        image.load()
        if image.format not in _KNOWN_INFO or not image.info.keys() <= _KNOWN_INFO[image.format]:
            image = _over_white(ImageOps.exif_transpose(image))
        elif image.mode not in ("L", "RGB"):
            image = _over_white(image)
        if image.mode.startswith("I;16") or image.mode in ("I", "F"):
            image = _to_8_bits(image)
        if image.mode != mode:
            image = image.convert(mode)
        pixels = np.array(image)
    except Exception as error:  # PIL's plug-ins raise many kinds
        raise InputError(f"{where} cannot be decoded: {_reason(error)}.") from error
    tensor = torch.from_numpy(pixels)
    return tensor[None] if channels == 1 else tensor.permute(2, 0, 1)


def seen_size(image: Image.Image, where: str) -> tuple[int, int]:
    """(height, width) of an opened image after its EXIF orientation. Reads the header only, except of PNG.

    Raises:
        InputError: a damaged file.
    """
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    except Exception as error:  # PIL's plug-ins raise many kinds
        raise InputError(f"{where} cannot be decoded: {_reason(error)}.") from error
    return (image.width, image.height) if turned else (image.height, image.width)


def _over_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)


def _to_8_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
        raise ValueError("it has 32-bit values, for which no range is known; save it with 8 or 16 bits")
    return Image.fromarray(((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))


def decode_image(
    data: bytes, extension: str, channels: int, where: str, size: tuple[int | None, int | None] = (None, None)
) -> UInt8[Tensor, "C h w"]:
    """The pixels of one stored image: `extension` one of `IMAGE_FORMATS`, `channels` 1 or 3, `size` the (height,
    width) that it must have, as far as they are known.

    In memory the channels lie together, as decoders give them: a permuted [h, w, C].

    Raises:
        InputError: names `where`. Of a size that cannot be right, before anything is decompressed.
    """
    if (found := plain_size(data, extension, channels)) is not None and _fits(found, size):
        pixels = decode_plain(data, extension)
        if pixels is not None:
            return pixels
    with open_image(io.BytesIO(data), where, formats=(IMAGE_FORMATS[extension],)) as image:
        stored = (image.height, image.width)
        if not (_fits(stored, size) or _fits(stored[::-1], size)):  # EXIF may turn it, which only its end may say
            raise _another_size(stored, size, where)
        tensor = image_to_tensor(image, channels, where)
    if not _fits((tensor.shape[1], tensor.shape[2]), size):
        raise _another_size((tensor.shape[1], tensor.shape[2]), size, where)
    return tensor


def _fits(found: tuple[int, int], size: tuple[int | None, int | None]) -> bool:
    return all(wanted in (None, there) for there, wanted in zip(found, size, strict=True))


def _another_size(found: tuple[int, int], size: tuple[int | None, int | None], where: str) -> InputError:
    expected = [wanted or there for there, wanted in zip(found, size, strict=True)]
    return InputError(
        f"{where} has {found[0]} x {found[1]} pixels, but the data set says {expected[0]} x {expected[1]}."
    )


def decode_points(data: bytes, channels: int, where: str) -> Float[Tensor, "N D_plus_C"]:
    """The points of one stored point set: coordinates (D = 3) and then `channels` values per point, float32.

    Coordinates alone are points on a surface, whose one channel is the distance to them.

    Raises:
        InputError: names `where`.
    """
    columns = POINT_DIMS + channels
    array = decode_npy(data, where)
    allowed = (columns, POINT_DIMS) if channels == 1 else (columns,)
    if array.dtype.kind != "f" or array.ndim != 2 or array.shape[0] == 0 or array.shape[1] not in allowed:
        raise InputError(
            f"{where} holds {array.dtype} values of shape {list(array.shape)}; "
            f"points need float32 of shape [N, {columns}] ({POINT_DIMS} coordinates, {channels} values)."
        )
    if not np.isfinite(array).all():
        raise InputError(f"{where} holds values that are not finite.")
    return torch.from_numpy(array.astype(np.float32))


def decode_npy(data: bytes, where: str) -> np.ndarray:
    """The array of an npy file, read-only. Nothing is unpickled, and no more memory taken than `data` has.

    Raises:
        InputError: names `where`.
    """
    stream = io.BytesIO(data)
    try:
        # Not np.load: that also takes zip archives and pickles by their first bytes.
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, column_major, dtype = read(stream)  # of 10,000 bytes at most
        expected = math.prod(shape) * dtype.itemsize
        if dtype.hasobject:
            raise ValueError("Object arrays cannot be loaded, as they are pickles")
        if expected != len(data) - stream.tell():
            raise ValueError(f"{len(data) - stream.tell()} bytes of {dtype} cannot have the shape {list(shape)}")
        array = np.frombuffer(data, dtype, offset=stream.tell())
        return array.reshape(shape, order="F" if column_major else "C")
    except Exception as error:  # ValueError, KeyError of a version, SyntaxError or TokenError of the header
        raise InputError(f"{where} cannot be read as npy: {_reason(error)}.") from error


def decode_label(data: bytes, classes: int, where: str) -> int:
    """The class of a sample, in 0 … `classes` - 1, from its decimal digits.

    Raises:
        InputError: names `where`.
    """
    text = data[: MAX_LABEL_BYTES + 1].decode("ascii", errors="replace").strip()
    if len(data) > MAX_LABEL_BYTES or not text.isdecimal() or int(text) >= classes:
        raise InputError(f"{where}: label {text[:40]!r} is not a class number in 0 … {classes - 1}.")
    return int(text)


def decode_sample(sample: dict[str, Any], facts: SignalFacts, where: str) -> tuple[Tensor, int]:
    """The tensor of a sample (uint8 [C, h, w], or float32 [N, D + C] for point sets) and its label.

    `sample` maps extensions to bytes, as webdataset gives it.

    Raises:
        InputError: names `where`; a missing part, an unknown extension, a label out of range, or another size.
    """
    if "cls" not in sample:
        raise InputError(f"{where} has no label (KEY.cls).")
    label = decode_label(sample["cls"], len(facts.classes), where)
    known = known_extensions(facts)
    found = [name for name in sample if name in known]
    if len(found) != 1:
        others = ", ".join(sorted(name for name in sample if not name.startswith("__") and name != "cls")) or "nothing"
        raise InputError(f"{where} must hold exactly one of {', '.join(known)} beside its label; it holds {others}.")
    return decode_signal(sample[found[0]], found[0], facts, where), label


def known_extensions(facts: SignalFacts) -> tuple[str, ...]:
    """The extensions that a signal of this kind may have."""
    return tuple(sorted(IMAGE_FORMATS)) if facts.kind == "image" else ("npy",)


def decode_signal(data: bytes, extension: str, facts: SignalFacts, where: str) -> Tensor:
    """The tensor of a sample: uint8 [C, h, w], or float32 [N, D + C] for point sets.

    Raises:
        InputError: names `where`; an extension of another kind of signal, damaged contents, or another size.
    """
    if extension not in known_extensions(facts):
        raise InputError(f"{where} must hold exactly one of {', '.join(known_extensions(facts))} beside its label.")
    if facts.kind == "points":
        return decode_points(data, facts.channels, where)
    return decode_image(data, extension, facts.channels, where, size=(facts.height, facts.width))


def resize(image: UInt8[Tensor, "C h w"], height: int, width: int) -> UInt8[Tensor, "C h2 w2"]:
    """Antialiased bilinear resizing to exactly `height` x `width`; the aspect ratio is not kept."""
    if image.shape[1:] == (height, width):
        return image
    from torchvision.transforms.v2 import functional as v2  # two seconds, which most programs never need

    return v2.resize(image, [height, width], antialias=True)


def encode_png(image: UInt8[Tensor, "C h w"]) -> bytes:
    """A grey or RGB image as PNG, without loss."""
    pixels = image[0] if image.shape[0] == 1 else image.permute(1, 2, 0)
    stream = io.BytesIO()
    Image.fromarray(pixels.contiguous().numpy()).save(stream, "PNG")
    return stream.getvalue()


def load_image(path: str | Path, facts: SignalFacts) -> UInt8[Tensor, "C h w"]:
    """Any image file, in the channels of `facts` and, where these are set, resized to their height and width.

    Raises:
        InputError: no such file, not an image, or `facts` of a data set of point sets.
    """
    path = Path(path).expanduser()
    if facts.kind != "image":
        raise InputError(f"{path} cannot be used: the model was made for {facts.kind}, not for images.")
    if not path.is_file():
        raise InputError(f"No image file at {path}.")
    with open_image(path, str(path)) as opened:
        image = image_to_tensor(opened, facts.channels, str(path))
    return resize(image, facts.height or image.shape[1], facts.width or image.shape[2])
