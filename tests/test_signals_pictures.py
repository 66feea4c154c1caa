"""Pictures of 16 bits against arrays written by other means, frames in order, and names of what is written."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageOps

from mwt.errors import InputError
from mwt.fields import Field
from mwt.signals import make_tasks, pictures
from mwt.signals.image import ImageTask
from mwt.signals.pictures import read_picture
from mwt.signals.poisson import PoissonTask
from mwt.signals.restoration import DenoisingTask, InpaintingTask, SuperResolutionTask
from mwt.signals.task import BESIDE, Task, signal_names
from mwt.signals.tomography import TomographyTask
from mwt.signals.video import VideoTask, read_video

CPU = torch.device("cpu")
KINDS = {1: 0, 2: 4, 3: 2, 4: 6}
"""PNG's colour types by the number of channels: grey, grey and alpha, RGB, RGBA."""


def levels(channels: int, height: int = 12, width: int = 16) -> np.ndarray:
    """All of 16 bits: neighbours differ in the lower byte."""
    return np.random.default_rng(channels).integers(0, 65536, (height, width, channels), dtype=np.uint16)


def write_png(path: Path, array: np.ndarray) -> None:
    """The format's specification, without a library: header, unfiltered rows, end."""
    height, width, channels = array.shape

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 16, KINDS[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


class Exact(Field):
    """What a task's pictures show, at their pixels."""

    def __init__(self, task: ImageTask) -> None:
        super().__init__(coordinate_dims=2, channels=task.channels, copies=None, derivatives=2)
        self.task = task

    def values(self, coords: torch.Tensor) -> torch.Tensor:
        height, width = self.task.truth.shape[1:3]
        places = ((coords.clamp(-1, 1) + 1) / 2 * torch.tensor([height - 1, width - 1])).round().long()
        found = self.task.frame.to_values(self.task.truth[0][places[:, 0], places[:, 1]])
        return found + 0 * coords.sum(-1, keepdim=True)  # with a derivative, for those who ask


# ---- 16 bits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", KINDS)
def test_png_of_16_bits_loses_nothing(tmp_path: Path, channels: int) -> None:
    array = levels(channels)
    write_png(tmp_path / "a.png", array)
    expected = array[..., : 1 if channels < 3 else 3] / 65535
    np.testing.assert_allclose(read_picture(tmp_path / "a.png").numpy(), expected, atol=1e-7)
    if channels == 3:
        grey = expected @ [[0.299], [0.587], [0.114]]
        np.testing.assert_allclose(read_picture(tmp_path / "a.png", grey=True).numpy(), grey, atol=1e-6)


@pytest.mark.parametrize("order", ["contig", "separate"])
@pytest.mark.parametrize("channels", [3, 4])
def test_tiff_of_16_bits_loses_nothing(tmp_path: Path, channels: int, order: str) -> None:
    array = levels(channels)
    stored = array if order == "contig" else np.moveaxis(array, -1, 0)
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb", planarconfig=order)
    np.testing.assert_allclose(read_picture(tmp_path / "a.tif").numpy(), array[..., :3] / 65535, atol=1e-7)


def test_colours_of_16_bits_without_their_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is lost silently; grey needs no further library."""
    tifffile.imwrite(tmp_path / "a.tif", levels(3), photometric="rgb")
    tifffile.imwrite(tmp_path / "grey.tif", levels(1)[..., 0])
    tifffile.imwrite(tmp_path / "print.tif", levels(4), photometric="separated")
    with pytest.raises(InputError, match=r"print.tif is a TIFF file of SEPARATED uint16; save it as RGB"):
        read_picture(tmp_path / "print.tif")
    write_png(tmp_path / "a.png", levels(3))
    for module, name in (("tifffile", "a.tif"), ("torchvision.io", "a.png")):
        monkeypatch.setitem(__import__("sys").modules, module, None)
        with pytest.raises(InputError, match=f"{name} has more than 8 bits a colour.*pip install tifffile"):
            read_picture(tmp_path / name)
    np.testing.assert_allclose(read_picture(tmp_path / "grey.tif").numpy(), levels(1) / 65535, atol=1e-7)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_by_hand_as_pillow_turns(orientation: int) -> None:
    array = np.arange(24, dtype=np.uint8).reshape(4, 6)
    image = Image.fromarray(array)
    image.getexif()[pictures.ORIENTATION] = orientation
    np.testing.assert_array_equal(pictures._turned(array, orientation), np.asarray(ImageOps.exif_transpose(image)))


def test_a_turned_picture_of_16_bits(tmp_path: Path) -> None:
    array = levels(3)
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="rgb", extratags=[(274, 3, 1, 6, True)])
    np.testing.assert_allclose(read_picture(tmp_path / "a.tif").numpy(), np.rot90(array, -1) / 65535, atol=1e-7)


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_written_of_16_bits_has_16_bits(tmp_path: Path, channels: int) -> None:
    """And can be read again; of a picture of 8 bits there is no second file."""
    write_png(tmp_path / "a.png", levels(channels))
    task = ImageTask([tmp_path / "a.png"], ImageTask.Options(), CPU)
    files = task.write(Exact(task), tmp_path)
    assert tmp_path / "a.npy" in files
    written = np.load(tmp_path / "a.npy")
    assert written.dtype == np.uint16
    np.testing.assert_allclose(written.astype(int), levels(channels).astype(int), atol=1)
    np.testing.assert_allclose(read_picture(tmp_path / "a.npy").numpy(), levels(channels) / 65535, atol=2e-5)
    Image.fromarray((levels(3) >> 8).astype(np.uint8)).save(tmp_path / "b.png")
    task = ImageTask([tmp_path / "b.png"], ImageTask.Options(), CPU)
    assert [path.name for path in task.write(Exact(task), tmp_path)] == ["b.png", "b.error.png", "b.truth.png"]


# ---- frames ----------------------------------------------------------------------------------------------------------


def test_frames_come_by_their_numbers(tmp_path: Path) -> None:
    """frame1, frame2, ..., frame11, also where some have leading zeros; `frames` takes the first of these."""
    for number in range(1, 12):
        name = f"frame{number:02d}" if number == 3 else f"frame{number}"
        Image.fromarray(np.full((4, 5), 10 * number, np.uint8)).save(tmp_path / f"{name}.png")
    video = read_video(tmp_path, grey=True, limit=None)
    assert (video[:, 0, 0, 0] * 255).round().tolist() == [10.0 * number for number in range(1, 12)]
    assert len(read_video(tmp_path, grey=True, limit=2)) == 2
    names = ["10", "9a", "9", "b1", "2", "a"]
    paths = sorted((tmp_path / name for name in names), key=pictures.in_order)
    assert [path.name for path in paths] == ["2", "9", "9a", "10", "a", "b1"]


def test_a_film_of_the_error(tmp_path: Path) -> None:
    """Black where the field is right, yellow in the quarter where it is wrong."""
    truth = np.zeros((3, 8, 8), np.uint8)
    for i, frame in enumerate(truth):
        Image.fromarray(frame).save(tmp_path / f"{i}.png")
    task = VideoTask([tmp_path], VideoTask.Options(), CPU)

    class Wrong(Field):
        def __init__(self) -> None:
            super().__init__(coordinate_dims=3, channels=1, copies=None, derivatives=0)

        def values(self, coords: torch.Tensor) -> torch.Tensor:
            return torch.where((coords[:, 1:] < 0).all(-1, keepdim=True), 1.0, -1.0)

    out = tmp_path / "out"
    out.mkdir()
    assert out / "video.error.gif" in task.write(Wrong(), out)
    with Image.open(out / "video.error.gif") as film:
        assert film.n_frames in (1, 3)  # Pillow joins frames that are alike
        array = np.asarray(film.convert("RGB")).astype(int).sum(-1)
    assert (array[:4, :4] > 400).all()
    assert (array[4:] < 10).all()


def test_how_good_each_frame_is(tmp_path: Path) -> None:
    """Frames of one grey, shown as black: -20 log10(grey)."""
    greys = np.array([60, 120, 30])
    for i, grey in enumerate(greys):
        Image.fromarray(np.full((8, 8), grey, np.uint8)).save(tmp_path / f"{i}.png")
    task = VideoTask([tmp_path], VideoTask.Options(), CPU)

    class Black(Field):
        def __init__(self) -> None:
            super().__init__(coordinate_dims=3, channels=1, copies=None, derivatives=0)

        def values(self, coords: torch.Tensor) -> torch.Tensor:
            return torch.full_like(coords[:, :1], -1.0)

    out = tmp_path / "out"
    out.mkdir()
    assert {out / "psnr.json", out / "psnr.png"} <= set(task.write(Black(), out))
    by_frame = json.loads((out / "psnr.json").read_text())
    np.testing.assert_allclose(by_frame, -20 * np.log10(greys / 255), atol=1e-4)
    found = task.evaluate(Black()).metrics
    assert [float(found[name]) for name in ("psnr", "psnr_worst")] == pytest.approx([np.mean(by_frame), by_frame[1]])
    with Image.open(out / "psnr.png") as curve:
        assert min(curve.size) > 100


# ---- names -----------------------------------------------------------------------------------------------------------


def test_names_that_would_overwrite_each_other(tmp_path: Path) -> None:
    """The outcome of a fit, fitted again as a folder, is refused before anything is fitted."""
    for name in ("a.png", "a.truth.png", "a.error.png"):
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / name)
    with pytest.raises(InputError, match=r"a.png and .*a.truth.png cannot be fitted together: the truth of the one"):
        make_tasks(ImageTask, [tmp_path / "a.png", tmp_path / "a.truth.png"], ImageTask.Options(), CPU)
    apart = [Path("v1.png"), Path("v1.0.png"), Path("truth.png"), Path("b.truth.png")]
    assert signal_names(apart) == ("v1.png", "v1.0.png", "truth.png", "b.truth.png")
    assert signal_names([Path("a.png"), Path("b/a.jpg")]) == ("000-a.png", "001-a.jpg")


@pytest.mark.parametrize(
    "kind", [ImageTask, SuperResolutionTask, InpaintingTask, DenoisingTask, PoissonTask, TomographyTask]
)
def test_what_is_written_beside_is_known(tmp_path: Path, kind: type[Task]) -> None:
    Image.fromarray((levels(3, 12, 12) >> 8).astype(np.uint8)).save(tmp_path / "a.png")
    given = {"box": (1, 1, 3, 3)} if kind is InpaintingTask else {"factor": 2} if kind is SuperResolutionTask else {}
    task = kind([tmp_path / "a.png"], kind.Options(**given), CPU)
    assert isinstance(task, ImageTask)
    names = {path.name for path in task.write(Exact(task), tmp_path)}
    assert names - {"a.png"} <= {f"a.{part}.png" for part in BESIDE}
    assert {"a.png", "a.error.png", "a.truth.png"} <= names
