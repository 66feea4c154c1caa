"""Image files, alone or inside of tar files -> samples of one size and one kind."""

from __future__ import annotations

import io
import tarfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from data_pipes.decode import encode_png, image_to_tensor, open_image, resize
from data_pipes.write import Sample
from mwt.errors import InputError

FITS = ("squash", "crop")
KEPT = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp"}  # MPO: JPEG as telephones write it


@dataclass(frozen=True, slots=True)
class ImageFile:
    """Where an image lies: a file, or a stretch of a tar file. `name` is its path within the data set."""

    path: str
    name: str
    label: int
    offset: int | None = None
    size: int | None = None

    @property
    def where(self) -> str:
        """What messages call it."""
        return self.path if self.offset is None else f"{self.path}: {self.name}"

    def read(self) -> bytes:
        """Its bytes.

        Raises:
            InputError: it cannot be read, or the tar file ends within it.
        """
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset or 0)
                data = file.read() if self.size is None else file.read(self.size)
        except OSError as error:
            raise InputError(f"{self.where} cannot be read: {error.strerror}.") from error
        if self.size is not None and len(data) != self.size:
            raise InputError(f"{self.where}: the tar file ends within it; get the whole file again.")
        return data


@dataclass(frozen=True)
class ImageMaker:
    """Makes the sample of an image file.

    With `size` (height, width) images are brought to it: `fit` squash resizes both ways (the aspect ratio is lost, as
    in the paper), crop resizes until the image covers the size and cuts off what is over on both sides alike. They
    are stored as JPEG of `quality` without chroma subsampling, or, if that is 100, as PNG without any loss. Without
    `size`, PNG, JPEG and WebP files keep their own bytes.
    """

    channels: int
    size: tuple[int, int] | None = None
    fit: str = "squash"
    quality: int = 100

    @property
    def imports(self) -> tuple[str, ...]:
        """What every process that calls this imports; see `ordered_processes`."""
        return () if self.size is None else ("torchvision.transforms.v2",)

    def __call__(self, file: ImageFile) -> Sample:
        """One sample; what the file holds counts, not what it is called (a PNG may be named .JPEG).

        Raises:
            InputError: the image cannot be decoded; the message names the file.
        """
        data = file.read()
        pixels, kind = decode(data, self.channels, file.where)
        if kind in KEPT and self.size is None:
            return Sample(extension=KEPT[kind], data=data, label=file.label)
        if self.size is not None:
            pixels = fit_to(pixels, self.size, self.fit)
        if self.quality == 100:
            return Sample(extension="png", data=encode_png(pixels), label=file.label)
        return Sample(extension="jpg", data=encode_jpeg(pixels, self.quality), label=file.label)


def decode(data: bytes, channels: int, where: str) -> tuple[UInt8[Tensor, "C h w"], str]:
    """Pixels of an encoded image, upright, CMYK and palettes turned to RGB or grey, and the name of its format.

    EXIF data that cannot be read (ImageNet has some) is ignored.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Corrupt EXIF data", UserWarning)
        warnings.filterwarnings("ignore", "Truncated File Read", UserWarning)
        with open_image(io.BytesIO(data), where) as opened:
            try:
                opened.getexif()
            except Exception:  # PIL's parser raises many kinds
                opened.info.pop("exif", None)
                opened._exif = None  # half-read
            return image_to_tensor(opened, channels, where), opened.format or ""


def fit_to(image: UInt8[Tensor, "C h w"], size: tuple[int, int], fit: str) -> UInt8[Tensor, "C H W"]:
    """An image of exactly `size`, squashed or cropped to it; see `ImageMaker`."""
    height, width = size
    if fit == "crop":
        scale = max(height / image.shape[1], width / image.shape[2])
        covering = max(height, round(image.shape[1] * scale)), max(width, round(image.shape[2] * scale))
        from torchvision.transforms.v2 import functional as v2  # as in `resize`

        return v2.center_crop(resize(image, *covering), [height, width])
    return resize(image, height, width)


def encode_jpeg(image: UInt8[Tensor, "C h w"], quality: int) -> bytes:
    """A grey or RGB image as JPEG, all channels at full resolution."""
    pixels = image[0] if image.shape[0] == 1 else image.permute(1, 2, 0)
    stream = io.BytesIO()
    Image.fromarray(pixels.contiguous().numpy()).save(stream, "JPEG", quality=quality, subsampling=0)
    return stream.getvalue()


def tar_members(path: Path, start: int = 0) -> Iterator[tuple[str, int, int]]:
    """(name, offset in the file, size) of every file in a plain tar file, which may begin at `start` of another file.

    Raises:
        InputError: no tar file, or one that is cut off or compressed.
    """
    try:
        with open(path, "rb") as file:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined] # it would keep a million of them
                    if member.isreg():
                        # offset_data counts from the beginning of the whole file: tarfile asks it where it stands
                        yield member.name, member.offset_data, member.size
    except (OSError, tarfile.TarError, EOFError) as error:
        raise InputError(f"{path} cannot be read as a tar file: {error}; get the whole file again.") from error
