"""Line integrals against closed forms and scikit-image's radon; DICOM; fits of a scan."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydicom import dcmread
from pydicom.data import get_testdata_file
from skimage.transform import radon

from mwt.errors import InputError
from mwt.fields import Field, FieldConfig
from mwt.fields.config import MLPConfig
from mwt.fit_config import FitOptimConfig
from mwt.fitting import SignalFit, fields_for
from mwt.signals import signal_paths
from mwt.signals.dicom import read_dicom
from mwt.signals.tomography import Scan, TomographyTask, add_noise
from train.fit import main

CPU = torch.device("cpu")


def phantom(size: int, seed: int = 0) -> np.ndarray:
    """Smooth blobs within the disc."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] - size // 2
    y, x = y / (size // 2), x / (size // 2)
    blobs = np.zeros((size, size))
    for _ in range(5):
        a, b = rng.uniform(-0.4, 0.4, 2)
        blobs += rng.uniform(0.3, 1) * np.exp(-((x - a) ** 2 + (y - b) ** 2) / (2 * 0.1**2))
    return blobs / blobs.max() * (np.hypot(x, y) < 0.95)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(2):
        np.save(tmp_path / f"{i}.npy", phantom(32, i).astype(np.float32))
    return tmp_path


@pytest.mark.parametrize("size", [63, 64])
def test_sinogram_of_a_picture_against_scikit_image(size: int) -> None:
    """Both interpolate linearly, at other points along the rays: a thousandth of the largest integral apart."""
    picture = phantom(size)
    angles = np.linspace(0, 180, 11, endpoint=False)
    scan = Scan(size, torch.from_numpy(np.deg2rad(angles)), 2 * size)
    ours = scan.of_pictures(torch.from_numpy(picture)[None])[0] * (size // 2)
    theirs = radon(picture, theta=angles, circle=True).T
    np.testing.assert_allclose(ours.numpy(), theirs, atol=2e-3 * theirs.max())


def test_integrals_of_a_gaussian_and_of_a_disc() -> None:
    """Gaussian at (y0, x0): a Gaussian of the ray's distance. Disc of radius r: chord 2 sqrt(r^2 - distance^2)."""
    scan = Scan(101, torch.linspace(0, math.pi, 7, dtype=torch.float64), 2000)
    y0, x0, width, radius = 0.2, -0.3, 0.08, 0.25
    rays = torch.arange(scan.rays)
    u = ((rays % 101) - 50) / 50
    angles = scan.angles[rays // 101]
    distance = u - (x0 * angles.cos() - y0 * angles.sin())

    def away(coords: torch.Tensor) -> torch.Tensor:
        return (coords[:, 0] - y0).square() + (coords[:, 1] - x0).square()

    gaussian = scan.integrals(lambda coords: (-away(coords) / (2 * width**2)).exp()[None], rays)[0]
    expected = math.sqrt(2 * math.pi) * width * (-(distance**2) / (2 * width**2)).exp()
    torch.testing.assert_close(gaussian, expected, atol=1e-6, rtol=1e-5)
    disc = scan.integrals(lambda coords: (away(coords) < radius**2).double()[None], rays)[0]
    chord = 2 * (radius**2 - distance**2).clamp_min(0).sqrt()
    torch.testing.assert_close(disc, chord, atol=3e-3, rtol=0)


def test_an_exact_field_has_no_error(folder: Path) -> None:
    """The picture, interpolated, as a field: its integrals are what was measured, and nothing is mirrored."""
    task = TomographyTask([folder / "0.npy"], TomographyTask.Options(views=9, samples=64, low=-1.0), CPU)

    class Exact(Field):
        def __init__(self) -> None:
            super().__init__(coordinate_dims=2, channels=1, copies=None, derivatives=0)

        def values(self, coords: torch.Tensor) -> torch.Tensor:
            found = torch.nn.functional.grid_sample(
                task.truth.movedim(-1, 1), coords.flip(-1)[None, None], align_corners=True
            )
            return found[0, 0, 0, :, None] * 2 - 1

    assert float(task.loss(Exact(), None, torch.Generator())) < 1e-10
    found = task.evaluate(Exact()).metrics
    assert float(found["psnr"]) > 80
    assert float(found["ssim"]) > 0.999


def test_what_is_outside_the_disc_does_not_count(folder: Path) -> None:
    task = TomographyTask([folder / "0.npy"], TomographyTask.Options(views=4), CPU)
    shown = task.truth.clone()
    shown[:, ~task.disc] = 1.0
    assert float(task.judge(shown)["psnr"]) > 100
    assert float(task.disc.float().mean()) == pytest.approx(math.pi / 4, abs=0.03)


def test_angles() -> None:
    def angles(path: Path, *, endpoint: bool) -> list[float]:
        return (
            TomographyTask([path], TomographyTask.Options(views=4, endpoint=endpoint), CPU)
            .scan.angles.rad2deg()
            .tolist()
        )

    [path] = signal_paths("pydicom:CT_small", TomographyTask)
    assert angles(path, endpoint=False) == pytest.approx([0, 45, 90, 135])
    assert angles(path, endpoint=True) == pytest.approx([0, 60, 120, 180])


def test_noise_has_the_size_that_is_said() -> None:
    flat = torch.full((200, 200), 0.5)
    gaussian = add_noise(flat, TomographyTask.Options(sigma=0.1), "a.png") - flat
    assert float(gaussian.std()) == pytest.approx(0.05, rel=0.02)
    # Counts I0 exp(-d) with d = 3 have a variance of their mean + readout^2; d(log) = dI / I
    options = TomographyTask.Options(photons=1e5, readout=20.0)
    photons = add_noise(flat, options, "a.png") - flat
    counts = 1e5 * math.exp(-3)
    assert float(photons.std()) == pytest.approx(math.sqrt(counts + 400) / counts * 0.5 / 3, rel=0.03)
    assert abs(float(photons.mean())) < 1e-4
    assert torch.equal(add_noise(flat, TomographyTask.Options(), "a.png"), flat)


def test_dicom_is_scaled_and_windowed() -> None:
    """Stored numbers times RescaleSlope plus RescaleIntercept, then low to 0 and high to 1."""
    path = Path(get_testdata_file("CT_small.dcm"))
    content = dcmread(path)
    units = content.pixel_array.astype(float) * content.RescaleSlope + content.RescaleIntercept
    whole = read_dicom(path)[..., 0].numpy()
    np.testing.assert_allclose(whole, (units - units.min()) / (units.max() - units.min()), atol=1e-6)
    window = read_dicom(path, (-160.0, 240.0))[..., 0].numpy()
    np.testing.assert_allclose(window, np.clip((units + 160) / 400, 0, 1), atol=1e-6)


@pytest.mark.parametrize("window", [(), (-160.0, 240.0)])
def test_a_radiograph_whose_least_number_is_white_is_no_negative(tmp_path: Path, window: tuple[float, ...]) -> None:
    """MONOCHROME1 of numbers turned round is the same picture."""
    content = dcmread(get_testdata_file("CT_small.dcm"))
    expected = read_dicom(Path(content.filename), window)
    content.PhotometricInterpretation = "MONOCHROME1"
    content.PixelData = (-content.pixel_array).tobytes()
    content.RescaleIntercept, content.RescaleSlope = -content.RescaleIntercept, content.RescaleSlope
    content.save_as(tmp_path / "a.dcm")
    found = read_dicom(tmp_path / "a.dcm", tuple(-number for number in reversed(window)))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("tags", [("RescaleSlope", "RescaleIntercept"), ("WindowCenter", "WindowWidth")])
def test_an_empty_tag_is_one_that_is_absent(tmp_path: Path, tags: tuple[str, str]) -> None:
    content = dcmread(get_testdata_file("CT_small.dcm"))
    expected = content.pixel_array.astype(float)
    for tag in ("RescaleSlope", "RescaleIntercept", *tags):
        setattr(content, tag, None)
    content.save_as(tmp_path / "a.dcm")
    found = read_dicom(tmp_path / "a.dcm")[..., 0].numpy()
    np.testing.assert_allclose(found, (expected - expected.min()) / np.ptp(expected), atol=1e-6)


def test_dicom_is_known_by_its_marker(tmp_path: Path) -> None:
    """Files of archives have no ending, or the last number of an identifier; the list beside them is no slice."""
    content = Path(get_testdata_file("CT_small.dcm"))
    for name in ("IM0001", "1.2.840.10008", "DICOMDIR"):
        (tmp_path / name).write_bytes(content.read_bytes())
    (tmp_path / "README").write_text("a disc of pictures" * 20)
    (tmp_path / "short").write_bytes(b"DICM")
    paths = signal_paths(str(tmp_path), TomographyTask)
    assert [path.name for path in paths] == ["1.2.840.10008", "IM0001"]
    task = TomographyTask(paths, TomographyTask.Options(views=4), CPU)
    expected = TomographyTask([content], TomographyTask.Options(views=4), CPU)
    for truth in task.truth:
        torch.testing.assert_close(truth, expected.truth[0])


def test_several_slices_are_fitted_as_each_alone(folder: Path) -> None:
    config = FieldConfig(mlp=MLPConfig(width=16, hidden_layers=1))

    def fitted(paths: list[Path]) -> SignalFit:
        task = TomographyTask(paths, TomographyTask.Options(views=6, samples=24), CPU)
        fit = SignalFit(task, fields_for(config, task, seed=1), FitOptimConfig(steps=8, points=40), 1, 2)
        fit.run(lambda: False, lambda _: None, lambda: None)
        return fit

    paths = [folder / "0.npy", folder / "1.npy"]
    together = fitted(paths)
    for i, path in enumerate(paths):
        for key, value in fitted([path]).fields.state_dict().items():
            torch.testing.assert_close(together.fields.state_dict()[key][i], value, rtol=1e-4, atol=1e-6)


def test_a_noisy_scan_of_a_smooth_slice(folder: Path) -> None:
    """Through the program: better than filtered back-projection, which makes noise larger."""
    out = folder / "run"
    arguments = ["task=tomography", f"signal.path={folder}/0.npy", "signal.views=16", f"run.dir={out}",
                 "signal.sigma=0.1", "run.device=cpu", "field.mlp.width=48", "field.mlp.hidden_layers=2",
                 "field.mlp.activation.omega=10", "run.film=false", "optim.steps=150", "optim.points=64",
                 "run.evaluations=3"]  # fmt: skip
    assert main(arguments) == 0
    found = json.loads((out / "result.json").read_text())
    assert found["final"]["psnr"] > found["baselines"]["filtered back-projection"]["psnr"] + 1.5
    assert found["signal"]["views"] == 16
    for ending in ("png", "truth.png", "error.png", "fbp.png", "sinogram.png"):
        assert (out / f"reconstruction/0.{ending}").is_file()
    with Image.open(out / "reconstruction/0.sinogram.png") as picture:
        assert picture.size == (32, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["signal.path={folder}/text.dcm"], "text.dcm is not a DICOM file that can be read"),
        (["signal.path=pydicom:rtplan"], "rtplan.dcm is a DICOM file without pixels"),
        (["signal.path=pydicom:CT_smal"], "pydicom brings no file 'CT_smal'; there are .*CT_small"),
        (["signal.path=pydicom:CT_small", "signal.window=[5,5]"], "the window is 5 to 5; it must rise"),
        (["signal.path=pydicom:CT_small", "signal.window=[5]"], "signal.window has 1 numbers"),
        (["signal.path=pydicom:CT_small", "signal.views=0"], "signal.views must be at least 1"),
        (["signal.path=pydicom:CT_small", "signal.sigma=-1"], "signal.sigma and signal.readout cannot be negative"),
        (["signal.path=pydicom:CT_small", "signal.photons=9", "signal.sigma=1"], "instead of signal.sigma"),
        (["signal.path=pydicom:CT_small", "signal.scale=0"], "signal.scale is 0; it must be at least 1"),
        (["signal.path={folder}/a.png"], "is black inside the disc"),
    ],
)
def test_bad_slices_get_a_sentence(folder: Path, arguments: list[str], message: str) -> None:
    (folder / "text.dcm").write_text("no slice")
    Image.fromarray(np.zeros((12, 14), np.uint8)).save(folder / "a.png")
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(folder / "b.png")
    with pytest.raises(InputError, match=message):
        main(["--debug", "task=tomography", *(a.format(folder=folder) for a in arguments), f"run.dir={folder / 'run'}"])


def test_without_pydicom_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    with pytest.raises(InputError, match=r"pip install 'meta-weight-transformer\[medical\]'"):
        read_dicom(Path("slice.dcm"))
