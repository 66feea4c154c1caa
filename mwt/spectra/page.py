"""Figures and the HTML page of `eval.spectrum`: numbers of studies in, pictures out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from mwt.page import STYLE, chart, folded, section, table
from mwt.plots import _figure, _plain, class_colours
from mwt.spectra.study import FLAT, Look, Study

OPEN = 6
"""Models whose pictures are shown at once; those of the others unfold."""
LOWEST = 1e-16
"""Relative eigenvalues that a figure shows."""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
TITLES = {
    "effective_rank": "effective rank",
    "above_1e-2": "above 1e-2",
    "above_1e-4": "above 1e-4",
    "above_1e-6": "above 1e-6",
    "decay": "decay",
    "log10_trace": "log10 trace",
    "flat_energy": "residual along flat",
    "alignment": "alignment",
}


def eigenvalue_figure(looks: Mapping[str, Look]) -> Figure:
    """Eigenvalues over the largest, falling, logarithmic, a line for each name."""
    figure = _figure(7.4, max(3.6, 0.17 * len(looks)))
    axes = _plain(figure.add_subplot())
    for (name, look), colour in zip(looks.items(), class_colours(len(looks)), strict=True):
        shown = np.maximum(look.relative.numpy(), LOWEST)
        axes.semilogy(np.arange(1, len(shown) + 1), shown, color=colour, linewidth=1.3, label=name.replace("_", " "))
    axes.set(xlabel="eigenvalue, largest first", ylabel="over the largest", ylim=(LOWEST, 2))
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def kernel_figure(looks: Sequence[Look]) -> Figure:
    """Kernels as heat maps, each over its largest entry, and where the eigenvectors' frequencies lie."""
    figure = _figure(2.6 * len(looks) + 3.0, 2.7)
    panels = figure.subplots(1, len(looks) + 1, squeeze=False)[0]
    for axes, look in zip(panels, looks, strict=False):
        matrix = look.kernel / look.kernel.abs().max().clamp_min(1e-300)
        axes.imshow(matrix.numpy(), cmap="inferno", vmin=min(0.0, float(matrix.min())), vmax=1)
        axes.set_title(f"kernel at step {look.step:,}", fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
    axes = _plain(panels[-1])
    for look, colour in zip(looks, class_colours(len(looks)), strict=True):
        order = np.arange(1, len(look.vectors_frequency) + 1)
        axes.plot(order, look.vectors_frequency.numpy(), ".", color=colour, markersize=2.5, label=f"step {look.step:,}")
    axes.set_title("mean frequency of eigenvectors", fontsize=9)
    axes.set_xlabel("eigenvalue, largest first", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7, frameon=False, markerscale=3)
    return figure


def _map(axes: Axes, values: np.ndarray, study: Study, frequencies: Sequence[int], **shown: Any) -> Any:
    """Frequency upwards, recorded steps to the right."""
    image = axes.imshow(values.T, aspect="auto", origin="lower", interpolation="nearest", **shown)
    places = np.unique(np.linspace(0, len(study.steps) - 1, 6).round().astype(int))
    axes.set_xticks(places, [f"{study.steps[i]:,}" for i in places], fontsize=7)
    rows = np.unique(np.linspace(0, len(frequencies) - 1, 8).round().astype(int))
    axes.set_yticks(rows, [str(frequencies[i]) for i in rows], fontsize=7)
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel("periods over the signal", fontsize=8)
    return image


def response_figure(study: Study, limit: float = float("inf")) -> Figure:
    """Learned frequency response: the relative error at each of the signal's frequencies along the fit, and where the
    energy of the residual lies. A line marks the frequencies above which nothing was seen."""
    figure = _figure(8.2, 2.9)
    left, right = figure.subplots(1, 2)
    errors = torch.stack(study.errors).numpy()
    norm = LogNorm(vmin=1e-2, vmax=2)
    image = _map(left, np.clip(errors, 1e-2, 2), study, study.frequencies, cmap="viridis", norm=norm)
    left.set_title("error over amplitude, frequency by frequency", fontsize=9)
    if study.frequencies and limit < study.frequencies[-1]:
        above = next(i for i, frequency in enumerate(study.frequencies) if frequency > limit)
        left.axhline(above - 0.5, color="white", linewidth=1.2, linestyle="--")
    figure.colorbar(image, ax=left)
    top = min(len(study.shares[0]), 2 * (study.frequencies[-1] if study.frequencies else 8) + 1)
    shares = torch.stack(study.shares)[:, :top].numpy()
    image = _map(right, np.clip(shares, 1e-5, 1), study, range(top), cmap="inferno", norm=LogNorm(vmin=1e-5, vmax=1))
    right.set_title("share of the residual's energy", fontsize=9)
    figure.colorbar(image, ax=right)
    return figure


def link_figure(
    names: Sequence[str], values: Sequence[float], metric: Sequence[float], title: str, unit: str
) -> Figure:
    """A summary of the spectrum against the metric, a point for each model."""
    figure = _figure(5.2, 3.6)
    axes = _plain(figure.add_subplot())
    axes.scatter(values, metric, s=18, c=class_colours(len(names)))
    for name, x, y in zip(names, values, metric, strict=True):
        axes.annotate(name, (x, y), xytext=(4, 3), textcoords="offset points", fontsize=7)
    axes.set(xlabel=title, ylabel=unit)
    axes.margins(0.12)
    return figure


# ---- tables, for the page and for terminals --------------------------------------------------------------------------

Table = tuple[list[str], list[list[str]]]
"""Head and rows."""


def number(value: float | None, digits: int = 3) -> str:
    """A few digits; a dash where there is nothing."""
    return "–" if value is None else f"{value:.{digits}g}"


def study_table(studies: Sequence[Study]) -> Table:
    """Each model's spectrum at the beginning and its result in the end."""
    keys = list(next((study.looks[0].summary for study in studies if study.looks), {}))
    finals = list(dict.fromkeys(key for study in studies for key in study.final if key != "loss"))
    rows = []
    for study in studies:
        first = study.looks[0].summary if study.looks else {}
        cells = [study.name, f"{study.parameters:,}", *(number(study.final.get(key), 4) for key in finals)]
        rows.append([*cells, *(number(first.get(key)) for key in keys), study.outcome])
    return ["model", "parameters", *(key.replace("_", " ") for key in finals), *(TITLES[key] for key in keys), ""], rows


def correlation_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Correlations of each summary with the metric."""
    lines = []
    for row in rows:
        numbers = (number(row[key], 2) for key in ("spearman", "spearman_p", "pearson", "pearson_p"))
        lines.append([TITLES[row["summary"]], str(row["models"]), *numbers])
    return ["at the beginning", "models", "Spearman", "p", "Pearson", "p"], lines


def as_text(shown: Table) -> str:
    """A table for a terminal."""
    lines = [shown[0], *shown[1]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(shown[0]))]
    rows = []
    for line in lines:
        cells = [line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]
        rows.append("  ".join(cells).rstrip())
    return "\n".join(rows)


# ---- the page --------------------------------------------------------------------------------------------------------


def correlation_section(title: str, names: list[str], looks: list[Look], metric: list[float], rows: Any) -> str:
    """Whether the spectrum says how good the fit will be."""
    text = (
        "Spearman's (order) and Pearson's (line) correlation over the models between numbers of the kernel's spectrum "
        "before the fit and the metric after it, with two-sided p-values. Few models, one signal: a hint, not a law."
    )
    ranks = [look.summary["effective_rank"] for look in looks]
    figure = link_figure(names, ranks, metric, "effective rank at the beginning", "metric in the end")
    body = f'<div class="charts">{chart(figure, "effective rank against the metric")}</div>'
    return section(title, text, table(*correlation_table(rows)), body)


def study_section(study: Study, limit: float) -> str:
    """The pictures of a model."""
    if study.problem:
        return f'<p class="soft">{escape(study.problem)}</p>'
    images = chart(kernel_figure(study.looks), f"kernels of {study.name}") if study.looks else ""
    if study.errors:
        images += chart(response_figure(study, limit), f"learned frequency response of {study.name}")
    learned = [str(step) if step is not None else "never" for step in study.learned()]
    facts = folded(
        "Step from which half of each frequency is learned",
        table(["periods", *map(str, study.frequencies)], [["step", *learned]]),
    )
    return images + facts


def page(title: str, about: str, studies: Sequence[Study], limit: float, links: Sequence[str], settings: str) -> str:
    """The whole page; it loads nothing."""
    parts = [section("Models", MODELS, table(*study_table(studies)))] if studies else []
    first = {study.name: study.looks[0] for study in studies if study.looks}
    if first:
        parts.append(section("Eigenvalues before the fit", EIGENVALUES, chart(eigenvalue_figure(first), "eigenvalues")))
    parts += links
    for i, study in enumerate(studies):
        body = study_section(study, limit)
        parts.append(section(study.name, RESPONSE if i == 0 else "", body if i < OPEN else folded("Pictures", body)))
    parts.append(section("Settings", "", folded("All of them", f"<pre>{escape(settings)}</pre>")))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><h1>{escape(title)}</h1><p>{escape(about)}</p>{''.join(parts)}</body></html>\n"
    )


MODELS = (
    "Numbers of the tangent kernel before the fit, and the result after it. Effective rank: (sum of eigenvalues)^2 "
    "over sum of squares, out of as many as there are samples. Above 1e-k: share of eigenvalues above 1e-k of the "
    "largest. Decay: a where eigenvalue i falls like i^-a. Residual along flat: share of what is to be learned along "
    f"eigenvectors below {FLAT:g} of the largest. Errors are over the signal's amplitude, mean over its frequencies."
)
EIGENVALUES = (
    "Gradient descent learns along an eigenvector at a rate in proportion to its eigenvalue. Where the line falls "
    "steeply, some directions are learned at once and the others hardly ever."
)
RESPONSE = (
    "Kernels (samples against samples, over the largest entry) and the mean frequency of each eigenvector; then the "
    "error at each frequency of the signal, dark is learned, and where the energy of the residual lies. A field with a "
    "spectral bias darkens from the bottom upwards. Above a dashed line frequencies are held out."
)
