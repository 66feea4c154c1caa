"""Forward models and baselines of the tasks on pictures, against scipy, Pillow and closed forms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchmetrics.functional.image import structural_similarity_index_measure

from mwt.errors import InputError
from mwt.fields import Field, FieldConfig, build_field
from mwt.fields.config import MLPConfig
from mwt.signals import pictures, poisson, restoration
from mwt.signals.image import ImageTask, image_frame
from mwt.signals.restoration import DenoisingTask, InpaintingTask, SuperResolutionTask

CPU = torch.device("cpu")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    y, x = np.mgrid[0:1:32j, 0:1:40j]
    waves = np.stack([0.5 + 0.4 * np.sin(9 * x + 4 * y), 0.5 + 0.4 * np.cos(7 * y), x * y], -1)
    Image.fromarray(np.round(255 * waves).astype(np.uint8)).save(tmp_path / "waves.png")
    return tmp_path / "waves.png"


def test_psnr_and_ssim_against_scikit_image() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(2, 40, 30, 3, generator=generator)
    shown = (truth + 0.1 * torch.randn(truth.shape, generator=generator)).clamp(0, 1)
    ours = pictures.psnr(shown.flatten(1, 2), truth.flatten(1, 2)), pictures.ssim(shown, truth)
    for i in range(2):
        a, b = truth[i].numpy(), shown[i].numpy()
        assert ours[0][i] == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1), abs=1e-3)
        theirs = structural_similarity(
            a, b, channel_axis=-1, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert ours[1][i] == pytest.approx(theirs, abs=5e-3)  # they crop the border, torchmetrics pads


def test_ssim_and_psnr_in_strips_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    truth = torch.rand(2, 60, 30, 3, generator=torch.Generator().manual_seed(0))
    shown = truth * 0.9
    pair = (shown.movedim(-1, 1), truth.movedim(-1, 1))
    whole = structural_similarity_index_measure(*pair, data_range=1.0, reduction="none")
    for rows in (1, 7, 25, 60):
        monkeypatch.setattr(pictures, "STRIP", 30 * rows + 5)
        torch.testing.assert_close(pictures.ssim(shown, truth), whole, rtol=0, atol=1e-6)
        ours = pictures.psnr(shown.flatten(1, 2), truth.flatten(1, 2))
        theirs = [
            peak_signal_noise_ratio(*pair, data_range=1) for pair in zip(truth.numpy(), shown.numpy(), strict=True)
        ]
        np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-4)


def test_a_field_that_is_the_picture_has_no_error(path: Path) -> None:
    """Also between the rows and columns: the axes are not swapped, and black and white are where they belong."""
    task = ImageTask([path], ImageTask.Options(low=-1.0, high=1.0), CPU)

    class Exact(Field):
        def __init__(self) -> None:
            super().__init__(coordinate_dims=2, channels=3, copies=None, derivatives=0)

        def values(self, coords: torch.Tensor) -> torch.Tensor:
            rows, columns = ((coords + 1) / 2 * torch.tensor([31, 39])).round().long().T
            return task.truth[0][rows, columns] * 2 - 1

    assert float(task.evaluate(Exact()).metrics["psnr"]) > 100
    index = torch.tensor([0, 41, 1279])
    assert float(task.loss(Exact(), index, torch.Generator())) < 1e-10


def test_the_square_in_the_middle() -> None:
    picture = torch.arange(5 * 8.0).view(5, 8, 1)
    assert pictures.centre(picture, 3, "it")[..., 0].tolist() == [[10, 11, 12], [18, 19, 20], [26, 27, 28]]
    assert torch.equal(pictures.centre(picture, None, "it"), picture)


@pytest.mark.parametrize(("height", "width"), [(100, 200), (7, 3), (2, 9), (5, 5)])
def test_aspect_keeps_pixels_square(height: int, width: int) -> None:
    """From pixel to pixel it is as far down as it is to the right."""
    frame = image_frame(height, width, ImageTask.Options(aspect="keep"))
    grid = frame.grid(dtype=torch.float64).view(height, width, 2)
    down, right = grid[1, 0, 0] - grid[0, 0, 0], grid[0, 1, 1] - grid[0, 0, 1]
    torch.testing.assert_close(down, right)
    assert float(grid.max()) == 1
    torch.testing.assert_close(grid.flip(0, 1), -grid)


def test_a_line_of_pixels_lies_in_the_middle() -> None:
    line = image_frame(1, 4, ImageTask.Options(aspect="keep")).grid()
    assert line.tolist() == [[0, -1], [0, pytest.approx(-1 / 3)], [0, pytest.approx(1 / 3)], [0, 1]]
    assert image_frame(1, 1, ImageTask.Options(aspect="keep")).grid().tolist() == [[0, 0]]


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_making_small_against_pillow(factor: int) -> None:
    """Pillow's bicubic resizing is the antialiased one of the literature."""
    image = np.random.default_rng(0).random((24, 36), dtype=np.float32)
    ours = restoration.downsample(torch.from_numpy(image)[None, ..., None], factor)[0, ..., 0]
    theirs = Image.fromarray(image).resize((36 // factor, 24 // factor), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(ours.numpy(), np.asarray(theirs), atol=2e-5)


def test_the_bicubic_baseline_is_pillows() -> None:
    image = np.random.default_rng(0).random((9, 7), dtype=np.float32)
    ours = restoration.upsample(torch.from_numpy(image)[None, ..., None], 3)[0, ..., 0]
    theirs = Image.fromarray(image).resize((21, 27), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(ours.numpy(), np.asarray(theirs), atol=2e-5)


def test_super_resolution_crops_and_measures(path: Path) -> None:
    task = SuperResolutionTask([path], SuperResolutionTask.Options(factor=3), CPU)
    assert task.truth.shape == (1, 30, 39, 3)
    assert task.small.shape == (1, 10, 13, 3)
    assert task.baselines()["bicubic"]["psnr"] > 20


def test_masks() -> None:
    options = InpaintingTask.Options(keep=0.25)
    known = restoration.known_pixels(40, 50, options)
    assert int(known.sum()) == 500
    assert torch.equal(known, restoration.known_pixels(40, 50, options))
    box = restoration.known_pixels(40, 50, InpaintingTask.Options(box=(5, 6, 7, 8)))
    assert not box[5:12, 6:14].any()
    assert int((~box).sum()) == 56
    text = restoration.known_pixels(80, 100, InpaintingTask.Options(text="mwt"))
    assert 0.02 < float((~text).float().mean()) < 0.5


def test_what_is_missing_is_not_seen(path: Path) -> None:
    """The loss does not change with the picture's missing pixels, and does with the known ones."""
    task = InpaintingTask([path], InpaintingTask.Options(box=(4, 4, 10, 10)), CPU)
    field = build_field(FieldConfig(mlp=MLPConfig(width=8, hidden_layers=1)), coordinate_dims=2, channels=3, seed=0)

    @torch.no_grad()
    def loss() -> float:
        return float(task.loss(field, None, torch.Generator()))

    before = loss()
    missing = (~task.known).flatten()
    task.values[:, missing] += 1
    assert loss() == before
    task.values[:, ~missing] += 1
    assert loss() != before
    assert task.baselines()["linear"]["psnr"] > task.baselines()["linear"]["psnr_missing"] > 15


def test_known_pixels_on_a_line_have_a_baseline(path: Path) -> None:
    """There are no triangles between them: every missing pixel is the nearest known one."""
    task = InpaintingTask([path], InpaintingTask.Options(box=(1, 0, 31, 40)), CPU)
    filled = restoration._interpolated(task.truth[0], task.known)
    torch.testing.assert_close(filled, task.truth[0][:1].expand(32, 40, 3))
    assert task.baselines()["linear"]["psnr"] > 5


def test_noise_has_the_size_that_is_said() -> None:
    flat = torch.full((200, 200, 1), 0.5)
    gaussian = restoration.add_noise(flat, DenoisingTask.Options(sigma=0.1), "a.png") - flat
    assert float(gaussian.std()) == pytest.approx(0.1, rel=0.02)
    photons = restoration.add_noise(flat, DenoisingTask.Options(photons=40.0, readout=2.0), "a.png") - flat
    assert float(photons.std()) == pytest.approx((0.5 * 40 + 4) ** 0.5 / 40, rel=0.02)
    assert abs(float(photons.mean())) < 0.005
    other = restoration.add_noise(flat, DenoisingTask.Options(sigma=0.1), "b.png") - flat
    assert not torch.equal(gaussian, other)


def test_derivatives_of_a_known_function() -> None:
    """y^2 x + 3 x: gradient (2 y x, y^2 + 3), Laplacian 2 x."""

    class Known(Field):
        def __init__(self) -> None:
            super().__init__(coordinate_dims=2, channels=1, copies=None, derivatives=2)

        def values(self, coords: torch.Tensor) -> torch.Tensor:
            y, x = coords.unbind(-1)
            return (y**2 * x + 3 * x)[..., None]

    coords = torch.rand(50, 2, dtype=torch.float64) * 2 - 1
    y, x = coords.T
    gradient = poisson.field_gradient(Known(), coords, 1, laplacian=False)
    torch.testing.assert_close(gradient[0, :, 0], torch.stack([2 * y * x, y**2 + 3], -1))
    laplacian = poisson.field_gradient(Known(), coords, 1, laplacian=True)
    torch.testing.assert_close(laplacian[0, :, 0], 2 * x)
    grid = torch.cartesian_prod(
        torch.linspace(-1, 1, 9, dtype=torch.float64), torch.linspace(-1, 1, 11, dtype=torch.float64)
    )
    spacing = (2 / 8, 2 / 10)
    values = Known()(grid).view(1, 9, 11, 1)
    y, x = grid.view(9, 11, 2).unbind(-1)
    inner = (slice(None), slice(1, -1), slice(1, -1), 0)  # central differences are exact for squares
    torch.testing.assert_close(poisson.finite_gradient(values, spacing)[inner][0, ..., 0], (2 * y * x)[1:-1, 1:-1])
    torch.testing.assert_close(poisson.finite_laplacian(values, spacing)[inner][0], 2 * x[1:-1, 1:-1])


@pytest.mark.parametrize("given", ["gradient", "laplacian"])
def test_what_is_given_says_everything_but_the_mean(path: Path, given: str) -> None:
    """A linear solver gets the picture back, so the derivatives are those of the picture, in the field's units."""
    task = poisson.PoissonTask([path], poisson.PoissonTask.Options(given=given), CPU)
    assert task.baselines()["linear solver"]["psnr"] > 40


def test_pictures_of_two_sizes_are_refused(path: Path, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(tmp_path / "small.png")
    with pytest.raises(InputError, match="5 x 5, grey"):
        pictures.read_pictures([path, tmp_path / "small.png"])
