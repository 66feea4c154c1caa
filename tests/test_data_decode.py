"""data_pipes.decode: formats, orientation, transparency, depth; and what is said about files that cannot be used."""

from __future__ import annotations

import contextlib
import io
import re
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, PngImagePlugin
from torchvision.transforms import v2

from data_pipes import decode, decode_plain
from data_pipes.decode import (
    decode_image,
    decode_label,
    decode_points,
    decode_sample,
    decode_signal,
    encode_png,
    load_image,
    resize,
)
from mwt.errors import InputError
from mwt.structs import SignalFacts
from tests.fork_server import Server

RGB = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 5, 7), dtype=np.uint8))
GREY = RGB[:1]
FREE = SignalFacts(kind="image", channels=3, height=None, width=None, classes=("a", "b"))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pil(tensor: torch.Tensor) -> Image.Image:
    return Image.fromarray(tensor.permute(1, 2, 0).squeeze(-1).contiguous().numpy())


@pytest.mark.parametrize("image", [RGB, GREY])
@pytest.mark.parametrize(("extension", "kind", "options"), [("png", "PNG", {}), ("webp", "WEBP", {"lossless": True})])
def test_lossless_formats(image: torch.Tensor, extension: str, kind: str, options: dict[str, Any]) -> None:
    assert torch.equal(decode_image(encoded(pil(image), kind, **options), extension, image.shape[0], "x"), image)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_plain_pngs_are_decoded_as_pil_decodes_them(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By torchvision where it is loaded, in the same layout; PIL opens none of them, and all others."""
    channels = {"L": 1, "RGB": 3}[mode]
    source = np.random.default_rng(3)
    files = []
    for height, width in ((1, 1), (7, 5), (32, 32), (300, 200)):
        smooth = np.arange(width)[:, None] * np.ones(channels) + np.arange(height)[:, None, None]
        noise = source.integers(0, 256, (height, width, channels))
        for array in (smooth, noise):
            image = Image.fromarray(array.astype(np.uint8).squeeze(-1) if mode == "L" else array.astype(np.uint8))
            for level in (0, 9):
                stream = io.BytesIO()
                image.save(stream, "PNG", compress_level=level)
                files.append((stream.getvalue(), np.asarray(image.convert(mode))))
    opened = []
    true_open = decode.open_image
    monkeypatch.setattr(decode, "open_image", lambda *a, **k: opened.append(a) or true_open(*a, **k))
    for data, pixels in files:
        found = decode_image(data, "png", channels, "x", pixels.shape[:2])
        expected = torch.from_numpy(pixels.copy()).view(*pixels.shape[:2], channels).permute(2, 0, 1)
        assert torch.equal(found, expected)
        assert found.permute(1, 2, 0).is_contiguous()
    assert opened == []
    data, pixels = files[4]
    text = io.BytesIO()
    info = PngImagePlugin.PngInfo()
    info.add_text("a", "b")
    Image.fromarray(pixels).save(text, "PNG", pnginfo=info)
    interlaced = bytearray(data)
    interlaced[28] = 1
    interlaced[29:33] = zlib.crc32(bytes(interlaced[12:29])).to_bytes(4, "big")
    for other in (text.getvalue(), data + b"x", data[:-1], bytes(interlaced), data.replace(b"IDAT", b"IDAX")):
        with contextlib.suppress(InputError):
            assert decode_image(other, "png", channels, "x").shape == (channels, *pixels.shape[:2])
    with pytest.raises(InputError, match=r"x has 7 x 5 pixels, but the data set says 8 x 5"):
        decode_image(data, "png", channels, "x", (8, 5))
    assert decode_image(data, "png", 4 - channels, "x").shape[0] == 4 - channels
    assert len(opened) == 7


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_plain_jpegs_are_decoded_as_pil_decodes_them(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As PNGs are; whatever has a word of EXIF, ICC or Adobe, another number of channels or no end is left to PIL."""
    channels = {"L": 1, "RGB": 3}[mode]
    noise = np.random.default_rng(4).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    photograph = Image.fromarray(noise).resize((211, 160), Image.Resampling.BICUBIC).convert(mode)
    opened: list[Any] = []
    true_open = decode.open_image
    monkeypatch.setattr(decode, "open_image", lambda *a, **k: opened.append(a) or true_open(*a, **k))
    assert decode_plain._jpegs_agree()  # here; where they do not, PIL decodes them all
    for options in (
        {},
        {"quality": 95, "subsampling": 0},
        {"quality": 30, "progressive": True},
        {"restart_marker_rows": 1},
    ):
        data = encoded(photograph, "JPEG", **options)
        expected = torch.from_numpy(np.array(Image.open(io.BytesIO(data)))).view(160, 211, channels).permute(2, 0, 1)
        found = decode_image(data, "jpg", channels, "x", (160, 211))
        assert torch.equal(found, expected)
        assert found.permute(1, 2, 0).is_contiguous()
    assert opened == []
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    turned = decode_image(encoded(photograph, "JPEG", exif=exif), "jpg", channels, "x")
    assert turned.shape == (channels, 211, 160)
    for other in (data[:-1], encoded(photograph, "JPEG", icc_profile=b"x" * 200), data[:50]):
        with contextlib.suppress(InputError):
            assert decode_image(other, "jpg", channels, "x").shape == (channels, 160, 211)
    assert decode_image(data, "jpg", 4 - channels, "x").shape[0] == 4 - channels
    with pytest.raises(InputError, match=r"x has 160 x 211 pixels, but the data set says 160 x 212"):
        decode_image(data, "jpg", channels, "x", (160, 212))
    assert len(opened) == 6
    monkeypatch.setattr(decode_plain, "_jpegs_agree", lambda: False)
    decode_image(data, "jpg", channels, "x")
    assert len(opened) == 7


def test_encode_png_is_undone() -> None:
    for image in (RGB, GREY):
        assert torch.equal(decode_image(encode_png(image), "png", image.shape[0], "x"), image)


def test_channels_are_as_asked() -> None:
    grey = decode_image(encode_png(RGB), "png", 1, "x")
    assert torch.equal(grey[0], torch.from_numpy(np.array(pil(RGB).convert("L"))))
    assert torch.equal(decode_image(encode_png(GREY), "png", 3, "x"), GREY.expand(3, -1, -1))
    with pytest.raises(InputError, match=r"x: images with 2 channels are not supported"):
        decode_image(encode_png(RGB), "png", 2, "x")


@pytest.mark.parametrize(
    ("orientation", "undo"),
    [(1, lambda x: x), (3, lambda x: x.rot90(2, (1, 2))), (6, lambda x: x.rot90(-1, (1, 2))), (2, lambda x: x.flip(2))],
)
def test_exif_orientation(orientation: int, undo: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(pil(RGB), "PNG", exif=exif)
    assert torch.equal(decode_image(data, "png", 3, "x"), undo(RGB))


def test_transparency_lies_over_white() -> None:
    rgba = np.concatenate([RGB.permute(1, 2, 0).numpy(), np.full((5, 7, 1), 255, np.uint8)], axis=2)
    rgba[0, 0] = (10, 20, 30, 0)
    result = decode_image(encoded(Image.fromarray(rgba), "PNG"), "png", 3, "x")
    expected = RGB.clone()
    expected[:, 0, 0] = 255
    assert torch.equal(result, expected)
    palette = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    data = encoded(palette, "PNG", transparency=0)
    assert decode_image(data, "png", 3, "x")[:, 0].T.tolist() == [[255, 255, 255], [40, 50, 60]]


def test_sixteen_bits_and_two_levels() -> None:
    values = np.array([[0, 128, 257 * 100, 65535]], np.uint16)
    assert decode_image(encoded(Image.fromarray(values), "PNG"), "png", 1, "x").flatten().tolist() == [0, 0, 100, 255]
    bits = Image.fromarray(np.array([[True, False]]))
    assert decode_image(encoded(bits, "PNG"), "png", 3, "x")[:, 0].T.tolist() == [[255] * 3, [0] * 3]


def test_values_without_a_range(tmp_path: Path) -> None:
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "x.tiff")
    with pytest.raises(InputError, match=r"x\.tiff cannot be decoded: it has 32-bit values, for which no range"):
        load_image(tmp_path / "x.tiff", FREE)


def test_only_the_format_of_the_extension() -> None:
    with pytest.raises(InputError, match=r"^sample 1 cannot be read as an image \(PNG\): unknown or damaged"):
        decode_image(encoded(pil(RGB), "BMP"), "png", 3, "sample 1")
    with pytest.raises(InputError, match=r"^sample 1 cannot be decoded: "):
        decode_image(encode_png(RGB)[:-40], "png", 3, "sample 1")


def huge_png(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [8193, 10_000, 100_000])  # above our limit; PIL would warn; PIL would refuse
def test_bombs_are_refused_unopened(side: int) -> None:
    with pytest.raises(InputError, match=rf"^x: the image .* {decode.MAX_PIXELS}"):
        decode_image(huge_png(side, side), "png", 1, "x")


def npy(array: np.ndarray, **options: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def test_points() -> None:
    array = np.random.default_rng(0).normal(size=(5, 4))
    result = decode_points(npy(array), 1, "x")
    assert result.dtype == torch.float32
    assert np.array_equal(result.numpy(), array.astype(np.float32))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "x cannot be read as npy"),
        (b"PK\x03\x04", "x cannot be read as npy"),
        (npy(np.array([{}]), allow_pickle=True), "x cannot be read as npy: Object arrays cannot be loaded"),
        (npy(np.zeros((5, 2))), r"x holds float64 values of shape \[5, 2\]; points need float32 of shape \[N, 4\]"),
        (npy(np.zeros((0, 4))), r"x holds float64 values of shape \[0, 4\]"),
        (npy(np.zeros((5, 4), int)), "x holds int64 values"),
        (npy(np.full((5, 4), np.nan)), "x holds values that are not finite"),
        (npy(np.zeros((5, 4)))[:-8], "x cannot be read as npy"),
    ],
)
def test_bad_points(data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        decode_points(data, 1, "x")


def test_labels() -> None:
    assert decode_label(b" 7\n", 10, "x") == 7
    for bad in (b"10", b"-1", b"cat", b"", b"\xff", b"1.0", b"1" * 5000, b"000000007"):  # int() refuses 4,301 digits
        with pytest.raises(InputError, match=r"^x: label .* is not a class number in 0 … 9\.$"):
            decode_label(bad, 10, "x")


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"png": b""}, r"x has no label \(KEY\.cls\)"),
        ({"cls": b"0"}, r"x must hold exactly one of jpeg, jpg, png, webp beside its label; it holds nothing"),
        ({"cls": b"0", "txt": b"", "__key__": "1"}, r"it holds txt\."),
        ({"cls": b"0", "png": b"", "jpg": b""}, r"it holds jpg, png\."),
    ],
)
def test_bad_samples(sample: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        decode_sample(sample, FREE, "x")


@pytest.mark.parametrize("name", ["x.png", "x.bmp", "x.gif", "x.tif"])
def test_load_image_equals_torchvision(tmp_path: Path, name: str) -> None:
    pil(GREY).save(tmp_path / name)
    facts = SignalFacts(kind="image", channels=1, height=4, width=9, classes=("a",))
    expected = v2.Resize((4, 9), antialias=True)(GREY)
    assert torch.equal(load_image(tmp_path / name, facts), expected)
    assert load_image(str(tmp_path / name), FREE).shape == (3, 5, 7)
    assert resize(GREY, 5, 7) is GREY


def test_load_image_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(f"No image file at {tmp_path / 'none.png'}.")):
        load_image(tmp_path / "none.png", FREE)
    with pytest.raises(InputError, match=r"^No image file at"):
        load_image(tmp_path, FREE)
    (tmp_path / "x.png").write_text("hello")
    with pytest.raises(InputError, match=r"x\.png cannot be read as an image: unknown or damaged content"):
        load_image(tmp_path / "x.png", FREE)
    points = SignalFacts(kind="points", channels=1, height=None, width=None, classes=("a",))
    with pytest.raises(InputError, match="the model was made for points, not for images"):
        load_image(tmp_path / "x.png", points)


def test_another_size_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 67 megapixels nothing is decompressed where the data set says 5 x 7; an upright image may lie on its side."""
    facts = SignalFacts(kind="image", channels=3, height=5, width=7, classes=("a",))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert torch.equal(decode_signal(encoded(pil(RGB.rot90(1, (1, 2))), "PNG", exif=exif), "png", facts, "x"), RGB)
    with pytest.raises(InputError, match=r"^x has 7 x 5 pixels, but the data set says 5 x 7\."):
        decode_signal(encode_png(RGB.mT), "png", facts, "x")
    monkeypatch.setattr(decode, "image_to_tensor", lambda *_: pytest.fail("decoded"))
    with pytest.raises(InputError, match=r"^x has 8000 x 7 pixels, but the data set says 5 x 7\."):
        decode_signal(huge_png(7, 8000), "png", facts, "x")


# ---- files made to do harm ---------------------------------------------------------------------------------------


def peak_of(action: Any) -> int:
    """The most memory that Python and NumPy took in an action that is refused."""
    tracemalloc.start()
    try:
        with pytest.raises(InputError):
            action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", [b"zTXt", b"iCCP", b"iTXt"])
def test_compressed_text_in_a_png_is_bounded(name: bytes) -> None:
    """100 kB that would become 100 MB."""
    bomb = zlib.compress(bytes(100_000_000), 9)
    head = {b"zTXt": b"k\0\0", b"iCCP": b"k\0\0", b"iTXt": b"k\0\1\0\0\0"}[name] + bomb
    chunk = struct.pack(">I", len(head)) + name + head + struct.pack(">I", zlib.crc32(name + head))
    data = encode_png(RGB)
    data = data[:33] + chunk + data[33:]
    tracemalloc.start()
    try:
        with contextlib.suppress(InputError):  # an oversized colour profile is passed over, a text is refused
            assert torch.equal(decode_image(data, "png", 3, "x"), RGB)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("shape", ["(1000000000000, 4)", "(2, 4)", "(-1, 4)", "(-1, -4)", "(4,)", "(True, 4)"])
def test_invented_shapes_take_no_memory(shape: str) -> None:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    data = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + bytes(16)
    assert peak_of(lambda: decode_points(data, 1, "x")) < 1_000_000


@pytest.mark.parametrize("length", [60_000, 10_000_000])
def test_long_headers_are_not_evaluated(length: int) -> None:
    header = ("(" * length).encode()
    data = b"\x93NUMPY\x02\x00" + struct.pack("<I", len(header)) + header
    with pytest.raises(InputError, match=r"^x cannot be read as npy: "):
        decode_points(data, 1, "x")
    with pytest.raises(InputError, match=r"^x cannot be read as npy: "):
        decode_points(b"\x93NUMPY\x02\x00\xff\xff\xff\xff", 1, "x")


@pytest.mark.parametrize("extension", ["pkl", "pyd", "pth", "gif", "json"])
def test_other_extensions_are_not_looked_at(extension: str) -> None:
    with pytest.raises(InputError, match=r"^x must hold exactly one of jpeg, jpg, png, webp beside its label"):
        decode_sample({"cls": b"0", extension: b"\x80\x04cos\nsystem\n."}, FREE, "x")


def test_damaged_images_never_end_the_process(server: Server) -> None:
    """Random changes of real files, in a process of its own: decoded or refused, whatever they are."""
    program = """
import io, warnings
import numpy as np
from PIL import Image, PngImagePlugin
from data_pipes.decode import decode_image
from mwt.errors import InputError

warnings.simplefilter("ignore")
source = np.random.default_rng(0)
files = []
for kind, extension in (("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")):
    image = Image.fromarray(source.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((40, 30))
    stream = io.BytesIO()
    image.save(stream, kind)
    files.append((extension, stream.getvalue()))
refused = 0
for number in range(1500):
    extension, data = files[number % 3]
    changed = bytearray(data)
    for place in source.integers(0, len(data), size=1 + number % 4):
        changed[place] = source.integers(256)
    end = source.integers(1, len(data) + 1) if number % 5 == 0 else None
    try:
        decode_image(bytes(changed[:end]), extension, 3, "x")
    except InputError:
        refused += 1
print(refused)
"""
    said = server.run(program="", code=program)
    assert 250 < int(said.splitlines()[-1]) < 1500  # libjpeg has its say before
