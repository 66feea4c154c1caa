"""Pieces of a self-contained HTML page: text and figures in, escaped HTML with inline pictures out."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from matplotlib.figure import Figure
from torch import Tensor

from mwt import plots

SHOWN = 88
"""Width or height, whichever is larger, of an image on the page, in CSS pixels."""
STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5d6877; --page: #f6f7f9; --card: #fff; --line: #dfe3e8;
  --accent: #2a6fbb; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #9aa5b4; --page: #12161c; --card: #1b2129;
  --line: #303945; --accent: #7fb2ea; } img.chart { filter: invert(.9) hue-rotate(180deg); } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1020px; padding: 24px 16px 64px; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 6px; }
p { margin: 0 0 12px; max-width: 72ch; } .soft { color: var(--soft); font-size: .92rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px; }
section { margin-top: 18px; }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 10px; margin-top: 18px; }
.numbers div { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px; }
.numbers b { display: block; font-size: 1.5rem; line-height: 1.3; color: var(--accent); }
.numbers span { color: var(--soft); font-size: .85rem; }
img { max-width: 100%; height: auto; display: block; } img.chart { border-radius: 6px; }
img.pixels { image-rendering: pixelated; border: 1px solid var(--line); }
@media (max-width: 520px) { .strip img.pixels { max-width: 17.5vw; } }
.strip { display: flex; flex-wrap: wrap; gap: 10px; padding: 10px 0; }
.charts { display: flex; flex-wrap: wrap; gap: 8px; }
.strip + .strip { border-top: 1px solid var(--line); }
figure { margin: 0; } figcaption { font-size: .78rem; line-height: 1.35; color: var(--soft); margin-top: 3px; }
.pair { display: flex; gap: 4px; } .grid { display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fill, minmax(186px, 1fr)); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 3px 14px 3px 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 500; }
pre { overflow-x: auto; font-size: .82rem; line-height: 1.45; margin: 8px 0;
  white-space: pre-wrap; overflow-wrap: anywhere; } summary { cursor: pointer; }
"""


def section(title: str, text: str, *bodies: str) -> str:
    """A box with a heading and an explanation for somebody who sees such a picture for the first time."""
    return f'<section><h2>{escape(title)}</h2><p class="soft">{escape(text)}</p>{"".join(bodies)}</section>'


def chart(figure: Figure, alt: str) -> str:
    """A figure, in its own size or as wide as the page."""
    width = round(figure.get_size_inches()[0] * 90)
    uri = plots.data_uri(plots.figure_png(figure))
    return f'<img class="chart" alt="{escape(alt)}" width="{width}" src="{uri}">'


def charts(panels: Sequence[tuple[str, list[plots.Line]]], *, xlabel: str, whole_numbers: bool = False) -> str:
    """Curves, each panel an image of its own: side by side, or below one another on a phone."""
    images = [
        chart(plots.curves_figure([panel], xlabel=xlabel, whole_numbers=whole_numbers), f"{panel[0]} over {xlabel}")
        for panel in panels
    ]
    return f'<div class="charts">{"".join(images)}</div>'


def pixels(image: Tensor, alt: str) -> str:
    """A small image, its pixels as squares; a large one made smaller."""
    height, width = image.shape[1:]
    shown = max(8, round(SHOWN * width / max(height, width)))
    uri = plots.data_uri(plots.png_bytes(plots.thumbnail(image, 2 * SHOWN)))
    return f'<img class="pixels" alt="{escape(alt)}" style="width:{shown}px" src="{uri}">'


def frame(image: Tensor, *lines: str) -> str:
    """An image with lines of text below."""
    return f"<figure>{pixels(image, lines[0])}<figcaption>{'<br>'.join(map(escape, lines))}</figcaption></figure>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls sideways where the page is narrow."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def folded(summary: str, body: str) -> str:
    """Something long, closed at first."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def percent(share: float | None) -> str:
    """A share in percent; a dash where there is nothing to measure."""
    return "–" if share is None else f"{share:.1%}"
