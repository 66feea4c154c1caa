"""Pictures: tensors in, figures, arrays and PNG bytes out. Matplotlib's objects only, no global state."""

from __future__ import annotations

import base64
import io
import math
import warnings
from collections.abc import Collection, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

BLUE, ORANGE, GREY = "#2a6fbb", "#d9702b", "#8a919c"
MARGIN = 6
"""Pixels between the frames of a film strip."""
LINE = 15
"""Pixels that a line of caption takes."""


# ---- images ----------------------------------------------------------------------------------------------------------


def to_pixels(values: Float[Tensor, "*B C h w"]) -> UInt8[Tensor, "*B C h w"]:
    """Values in [-1, 1] (clamped) as grey levels 0 to 255, on the CPU: the inverse of `mwt.observe.pixels`."""
    return ((values.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def _pil(image: UInt8[Tensor, "C h w"]) -> Image.Image:
    array = image[0] if image.shape[0] == 1 else image.permute(1, 2, 0)
    return Image.fromarray(array.contiguous().numpy())


def png_bytes(image: UInt8[Tensor, "C h w"]) -> bytes:
    """A grey or RGB image on the CPU as a PNG file."""
    stream = io.BytesIO()
    _pil(image).save(stream, "PNG")
    return stream.getvalue()


def data_uri(png: bytes) -> str:
    """A PNG file as a data URI, for pages that load nothing."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def enlarge(image: UInt8[Tensor, "C h w"], factor: int) -> UInt8[Tensor, "C H W"]:
    """Every pixel as a square of `factor` x `factor`: nothing is smoothed."""
    return image.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)


def resized(image: UInt8[Tensor, "C h w"], height: int, width: int) -> UInt8[Tensor, "C H W"]:
    """Exactly `height` x `width`: by squares where that goes in whole factors, else smoothly."""
    factor = height // image.shape[1]
    if factor >= 1 and (image.shape[1] * factor, image.shape[2] * factor) == (height, width):
        return enlarge(image, factor)
    array = torch.from_numpy(np.array(_pil(image).resize((width, height), Image.Resampling.LANCZOS)))
    return array[None] if image.shape[0] == 1 else array.permute(2, 0, 1).contiguous()


def thumbnail(image: UInt8[Tensor, "C h w"], longest: int) -> UInt8[Tensor, "C H W"]:
    """The image with its longer side at most `longest` pixels; smaller images are left alone."""
    ratio = longest / max(image.shape[1:])
    if ratio >= 1:
        return image
    return resized(image, max(1, round(image.shape[1] * ratio)), max(1, round(image.shape[2] * ratio)))


def frame_zoom(height: int, width: int, *, least: int = 96) -> int:
    """The whole factor at which an image's shorter side has at least `least` pixels: small images become visible."""
    return max(1, math.ceil(least / min(height, width)))


def film_strip(
    frames: Sequence[UInt8[Tensor, "_C _h _w"]], captions: Sequence[str], *, zoom: int = 1
) -> UInt8[Tensor, "3 H W"]:
    """Frames side by side on white, each with its caption (lines divided by newlines) below.

    The first frame, `zoom` times enlarged, gives the size; frames of another resolution are brought to it. So frame i
    begins MARGIN pixels from the top and `MARGIN + i * (width + MARGIN)` from the left.
    """
    height, width = frames[0].shape[1] * zoom, frames[0].shape[2] * zoom
    lines = max(caption.count("\n") + 1 for caption in captions)
    total = (height + 2 * MARGIN + lines * LINE, MARGIN + len(frames) * (width + MARGIN))
    canvas = Image.new("RGB", (total[1], total[0]), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(11)
    for i, (frame, caption) in enumerate(zip(frames, captions, strict=True)):
        left = MARGIN + i * (width + MARGIN)
        canvas.paste(_pil(resized(frame, height, width)), (left, MARGIN))
        pen.multiline_text((left, MARGIN + height + 2), caption, fill="black", font=font, spacing=2)
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1).contiguous()


def sheet(strips: Sequence[UInt8[Tensor, "3 _H _W"]]) -> UInt8[Tensor, "3 H W"]:
    """Pictures of any size below one another on white."""
    width = max(strip.shape[2] for strip in strips)
    return torch.cat(
        [torch.nn.functional.pad(strip, (0, width - strip.shape[2]), value=255) for strip in strips], dim=1
    )


# ---- figures ---------------------------------------------------------------------------------------------------------


def figure_png(figure: Figure, *, dpi: int = 144) -> bytes:
    """A figure as a PNG file. Equal figures give equal bytes."""
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # class names in scripts that the font lacks
        figure.savefig(stream, format="png", dpi=dpi, metadata={"Software": None})
    return stream.getvalue()


def _figure(width: float, height: float, dpi: int = 144) -> Figure:
    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _plain(axes: Axes) -> Axes:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


def _name(text: str, longest: int = 20) -> str:
    """A class name as a label: matplotlib reads `$` as mathematics and hides what begins with an underscore."""
    text = text if len(text) <= longest else text[: longest - 1] + "…"
    return (" " + text if text.startswith("_") else text).replace("$", r"\$")


def confusion_figure(matrix: Int[Tensor, "K K"], classes: Sequence[str]) -> Figure:
    """The confusion matrix: rows true classes, columns predicted, colours shares of a row, counts up to 20 classes."""
    count = len(classes)
    shares = (matrix / matrix.sum(1, keepdim=True).clamp_min(1)).numpy()
    size = min(9.0, 3.2 + 0.36 * count)
    figure = _figure(size, 0.86 * size)  # the colour bar stands beside it
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted class", ylabel="true class")
    if count <= 60:
        names = [_name(name) for name in classes]
        font = 9 if count <= 20 else 6
        axes.set_xticks(range(count), names, rotation=90 if max(map(len, names)) > 2 else 0, fontsize=font)
        axes.set_yticks(range(count), names, fontsize=font)
    if count <= 20:
        for i in range(count):
            for j in range(count):
                if matrix[i, j]:
                    colour = "white" if shares[i, j] > 0.55 else "#333333"
                    axes.text(j, i, str(int(matrix[i, j])), ha="center", va="center", fontsize=8, color=colour)
    figure.colorbar(image, ax=axes, shrink=0.7, label="share of the true class")
    return figure


Line = tuple[str, Sequence[float | int], Sequence[float | int]]
"""Name, x and y of a curve."""


def curves_figure(
    panels: Sequence[tuple[str, Sequence[Line]]],
    *,
    xlabel: str,
    whole_numbers: bool = False,
    columns: int | None = None,
    log_y: Collection[str] = (),
) -> Figure:
    """One panel for each (title, lines); the first line of a panel is blue, the next orange.

    Args:
        columns: panels side by side; None: all.
        log_y: titles of panels with a logarithmic axis.
    """
    columns = columns or len(panels)
    rows = math.ceil(len(panels) / columns)
    figure = _figure(3.4 * columns, 2.7 * rows)
    for i, (title, lines) in enumerate(panels):
        axes = _plain(figure.add_subplot(rows, columns, i + 1))
        if title in log_y:
            axes.set_yscale("log")
        for (name, x, y), colour in zip(lines, (BLUE, ORANGE, GREY), strict=False):
            marker = "o" if len(x) <= 12 else None
            axes.plot(x, y, color=colour, linewidth=1.4, marker=marker, markersize=3.5, label=name)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(xlabel, fontsize=9)
        axes.tick_params(labelsize=8)
        if whole_numbers:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(lines) > 1:
            axes.legend(fontsize=8, frameon=False)
    return figure


Tradeoff = Sequence[tuple[str, float, float]]
"""A name, x and y of each point of a curve, in order."""


def tradeoff_figure(
    panels: Sequence[tuple[str, Tradeoff]], *, xlabel: str, ylabel: str, line: bool = True, log_x: bool = False
) -> Figure:
    """One panel for each (title, points): two quantities against each other, each point with its name beside it."""
    figure = _figure(4.2 * len(panels), 3.4)
    for i, (title, points) in enumerate(panels):
        axes = _plain(figure.add_subplot(1, len(panels), i + 1))
        x, y = [point[1] for point in points], [point[2] for point in points]
        axes.plot(x, y, "o-" if line else "o", color=(ORANGE, BLUE)[i % 2], linewidth=1.2, markersize=5)
        for name, *place in points:
            axes.annotate(_name(name), (place[0], place[1]), xytext=(5, 5), textcoords="offset points", fontsize=8)
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel, xscale="log" if log_x else "linear")
        axes.margins(0.12)
    return figure


def family_figure(
    panels: Sequence[tuple[str, Sequence[tuple[str, Tradeoff]]]], *, xlabel: str, ylabel: str, log_x: bool = False
) -> Figure:
    """Panels (title, curves) with one vertical axis, each with several curves (name, points) from dark to light."""
    figure = _figure(6.2 * len(panels), 3.6)
    first, shades = None, colormaps["viridis"]
    for number, (title, curves) in enumerate(panels):
        axes = _plain(figure.add_subplot(1, len(panels), number + 1, sharey=first))
        first = first or axes
        for i, (name, points) in enumerate(curves):
            x, y = [point[1] for point in points], [point[2] for point in points]
            colour = shades(0.9 * i / max(len(curves) - 1, 1))
            axes.plot(x, y, "o-", color=colour, linewidth=1.4, markersize=4, label=_name(name))
        axes.set(xlabel=xlabel, ylabel=ylabel, xscale="log" if log_x else "linear")
        axes.set_title(title if len(panels) > 1 else "", fontsize=10)
        axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def class_colours(count: int) -> list[tuple[float, float, float, float]]:
    """A colour for each class: distinct ones up to 20, beyond that around the colour circle."""
    if count <= 20:
        palette = colormaps["tab10" if count <= 10 else "tab20"]
        return [palette(k) for k in range(count)]
    return [colormaps["hsv"](k / count) for k in range(count)]


def scatter_figure(
    points: Float[Tensor, "n 2"], labels: Int[Tensor, " n"], classes: Sequence[str], explained: Float[Tensor, " 2"]
) -> Figure:
    """Points of a projection coloured by class; the axes carry the share of the variance that they explain."""
    figure = _figure(6.6, 4.8)
    axes = _plain(figure.add_subplot())
    colours = class_colours(len(classes))
    axes.scatter(
        points[:, 0].numpy(),
        points[:, 1].numpy(),
        c=[colours[k] for k in labels.tolist()],
        s=9,
        alpha=0.75,
        linewidths=0,
    )
    axes.set(
        xlabel=f"first component ({float(explained[0]):.1%} of the variance)",
        ylabel=f"second component ({float(explained[1]):.1%})",
    )
    if len(classes) <= 20:
        dots = [Line2D([], [], marker="o", linestyle="", color=colour, markersize=5) for colour in colours]
        names = [_name(name) for name in classes]
        axes.legend(dots, names, fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def reliability(
    probabilities: Float[Tensor, "n K"], labels: Int[Tensor, " n"], bins: int = 15
) -> tuple[Float[Tensor, " bins"], Float[Tensor, " bins"], Int[Tensor, " bins"]]:
    """Mean confidence, accuracy and number of samples in `bins` equal bins (l, r] of confidence (Guo et al. 2017).

    Empty bins hold 0.
    """
    confidence, predicted = probabilities.max(-1)
    place = (confidence * bins).ceil().long().sub(1).clamp(0, bins - 1)
    counts = torch.bincount(place, minlength=bins)

    def mean(values: Tensor) -> Tensor:
        return torch.zeros(bins).index_add_(0, place, values.float()) / counts.clamp_min(1)

    return mean(confidence), mean(predicted == labels), counts


def reliability_figure(probabilities: Float[Tensor, "n K"], labels: Int[Tensor, " n"], bins: int = 15) -> Figure:
    """Reliability diagram: accuracy over confidence, and below how many samples have that confidence."""
    confidence, accuracy, counts = reliability(probabilities, labels, bins)
    figure = _figure(4.6, 4.8)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    centres, width = (torch.arange(bins) + 0.5) / bins, 0.9 / bins
    used = counts > 0
    _plain(above).plot([0, 1], [0, 1], color="#555555", linewidth=1, linestyle="--", zorder=3, label="calibrated")
    x, y = confidence[used].numpy(), accuracy[used].numpy()
    above.bar(centres[used].numpy(), y, width, color=BLUE, alpha=0.75, label="accuracy in the bin")
    above.plot(x, y, "o", color=ORANGE, markersize=4, label="at mean confidence")
    above.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.04))
    above.legend(fontsize=8, frameon=False, loc="upper left")
    _plain(below).bar(centres.numpy(), counts.numpy(), width, color=GREY)
    below.set(xlabel="confidence of the prediction", ylabel="samples")
    return figure
