"""Drawing: sizes, pixels, and numbers behind the pictures, against plain computations."""

from __future__ import annotations

import io

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from mwt import plots
from mwt.metrics import calibration_error
from mwt.observe import pixels


def decoded(png: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(png)))


@pytest.mark.parametrize("channels", [1, 3])
def test_png_holds_the_pixels_as_they_are(channels: int) -> None:
    image = torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8)
    expected = image[0] if channels == 1 else image.permute(1, 2, 0)
    assert np.array_equal(decoded(plots.png_bytes(image)), expected.numpy())


def test_to_pixels_inverts_the_scale_of_observations_and_clamps() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    values = pixels(levels).mT.reshape(1, 1, 16, 16)
    assert torch.equal(plots.to_pixels(values), levels)
    assert plots.to_pixels(torch.tensor([[[-3.0, 3.0]]])).tolist() == [[[0, 255]]]


def test_enlarged_pixels_are_squares() -> None:
    image = torch.tensor([[[1, 2], [3, 4]]], dtype=torch.uint8)
    assert torch.equal(plots.enlarge(image, 3), torch.kron(image, torch.ones(1, 3, 3, dtype=torch.uint8)))
    assert torch.equal(plots.resized(image, 6, 6), plots.enlarge(image, 3))


@pytest.mark.parametrize(("height", "width"), [(40, 10), (10, 40), (33, 20)])
def test_resizing_to_any_size_and_thumbnails(height: int, width: int) -> None:
    image = torch.full((3, 20, 30), 90, dtype=torch.uint8)
    assert torch.equal(plots.resized(image, height, width), torch.full((3, height, width), 90, dtype=torch.uint8))
    assert plots.thumbnail(image, 15).shape == (3, 10, 15)
    assert plots.thumbnail(image, 30) is image


@pytest.mark.parametrize(
    ("height", "width", "zoom"), [(8, 8, 12), (28, 28, 4), (96, 200, 1), (320, 320, 1), (5, 50, 20)]
)
def test_small_images_are_enlarged(height: int, width: int, zoom: int) -> None:
    assert plots.frame_zoom(height, width) == zoom


@pytest.mark.parametrize("channels", [1, 3])
def test_film_strip_frames_lie_where_it_says(channels: int) -> None:
    frames = [torch.randint(0, 256, (channels, 4, 6), dtype=torch.uint8) for _ in range(3)]
    frames.append(torch.randint(0, 256, (channels, 8, 12), dtype=torch.uint8))  # twice the resolution
    strip = plots.film_strip(frames, ["a", "b\nc", "d", "e"], zoom=4)
    height, width = 16, 24
    expected = (3, height + 2 * plots.MARGIN + 2 * plots.LINE, plots.MARGIN + 4 * (width + plots.MARGIN))
    assert tuple(strip.shape) == expected
    for i, frame in enumerate(frames):
        left = plots.MARGIN + i * (width + plots.MARGIN)
        found = strip[:, plots.MARGIN : plots.MARGIN + height, left : left + width]
        assert torch.equal(found, plots.resized(frame, height, width).expand(3, -1, -1))
    assert (strip[:, plots.MARGIN + height :] < 128).any()  # captions


def test_a_sheet_puts_strips_below_one_another() -> None:
    strips = [torch.zeros(3, 4, 6, dtype=torch.uint8), torch.zeros(3, 2, 9, dtype=torch.uint8)]
    whole = plots.sheet(strips)
    assert whole.shape == (3, 6, 9)
    assert whole[:, :4, 6:].eq(255).all()
    assert whole[:, :4, :6].eq(0).all()
    assert whole[:, 4:].eq(0).all()


def test_reliability_gives_the_calibration_error_of_torchmetrics() -> None:
    probabilities = (3 * torch.randn(400, 5)).softmax(-1)
    labels = torch.randint(0, 5, (400,))
    confidence, accuracy, counts = plots.reliability(probabilities, labels)
    error = float((counts / 400 * (confidence - accuracy).abs()).sum())
    assert int(counts.sum()) == 400
    assert error == pytest.approx(calibration_error(probabilities, labels), abs=1e-6)


AWKWARD = ["$x$", "_hidden", "<b>&", "猫", "a very long name of a class indeed"]


def test_figures_draw_with_any_class_names_and_leave_matplotlib_alone() -> None:
    before = dict(matplotlib.rcParams)
    labels = torch.randint(0, 5, (60,))
    probabilities = torch.randn(60, 5).softmax(-1)
    matrix = torch.randint(0, 9, (5, 5))
    matrix[2] = 0  # a class without samples
    panels = [("loss", [("train", [1, 2], [3.0, 2.0]), ("val", [1], [4.0])]), ("time", [("a", [1.0], [2.0])])]
    makers = {
        "confusion": lambda: plots.confusion_figure(matrix, AWKWARD),
        "scatter": lambda: plots.scatter_figure(torch.eye(60)[:, :2], labels, AWKWARD, torch.tensor([0.5, 0.25])),
        "reliability": lambda: plots.reliability_figure(probabilities, labels),
        "curves": lambda: plots.curves_figure(panels, xlabel="epoch", whole_numbers=True),
    }
    for name, make in makers.items():
        png = plots.figure_png(make(), dpi=50)
        width, height = make().get_size_inches() * 50
        image = decoded(png)
        assert image.shape[:2] == pytest.approx((height, width), abs=1), name
        assert image[..., :3].min() < 100, f"{name} is blank"
        assert plots.figure_png(make(), dpi=50) == png, name
    assert dict(matplotlib.rcParams) == before


def test_many_classes_get_many_colours_and_no_crowded_labels() -> None:
    assert len(set(plots.class_colours(100))) == 100
    names = [f"class {k}" for k in range(100)]
    figure = plots.confusion_figure(torch.eye(100, dtype=torch.int64), names)
    assert len(decoded(plots.figure_png(figure, dpi=40)).shape) == 3
    assert "class 7" not in [text.get_text() for text in figure.axes[0].get_yticklabels()]


def test_the_reliability_diagram_has_a_bar_for_each_bin_in_use() -> None:
    probabilities, labels = torch.tensor([[0.9, 0.1], [0.35, 0.65], [0.95, 0.05]]), torch.tensor([0, 0, 0])
    above, below = plots.reliability_figure(probabilities, labels, bins=10).axes
    assert sorted(bar.get_height() for bar in above.patches) == [0.0, 1.0, 1.0]
    assert sum(bar.get_height() for bar in below.patches) == 3


def test_data_uri_is_a_png() -> None:
    uri = plots.data_uri(plots.png_bytes(torch.zeros(1, 2, 2, dtype=torch.uint8)))
    assert uri.startswith("data:image/png;base64,iVBOR")


@pytest.mark.parametrize(("line", "log_x"), [(True, False), (False, True)])
def test_tradeoffs_with_and_without_a_line(line: bool, log_x: bool) -> None:
    panels = [("ours", [("a", 1.0, 2.0), ("b", 100.0, 3.0)])]
    axes = plots.tradeoff_figure(panels, xlabel="x", ylabel="y", line=line, log_x=log_x).axes[0]
    assert axes.get_xscale() == ("log" if log_x else "linear")
    assert axes.lines[0].get_linestyle() == ("-" if line else "None")
    assert axes.lines[0].get_xydata().tolist() == [[1.0, 2.0], [100.0, 3.0]]
