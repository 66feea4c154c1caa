"""What a fit leaves for people: a film, curves, a table, and the same numbers for programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxtyping import UInt8
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from mwt.fit_config import FitConfig
from mwt.fitting import Row, SignalFit
from mwt.plots import curves_figure

LARGEST = 384
"""Pixels along the longer side of the film."""
MEMBERS = ("step", "seconds", "loss")
"""What an entry of a curve has beside metrics."""


class Film:
    """Frames of a fit on disk, step by step, so that a resumed fit has the earlier ones; a GIF in the end."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    def add(self, step: int, picture: UInt8[Tensor, "C h w"]) -> None:
        """Keep the picture of a step, as small as it will be in the GIF."""
        array = (picture[0] if len(picture) == 1 else picture.permute(1, 2, 0)).contiguous().numpy()
        factor = min(1.0, LARGEST / max(array.shape[:2]))
        width, height = (max(1, round(side * factor)) for side in array.shape[1::-1])
        Image.fromarray(array).resize((width, height), Image.Resampling.BOX).save(self.folder / f"{step:08d}.png")

    def write(self, path: Path) -> None:
        """All frames as a GIF, a quarter of a second each, the last for two; the frames are removed."""
        files = sorted(self.folder.glob("*.png"))
        frames = []
        for file in files:
            with Image.open(file) as image:
                frames.append(image.copy())
        if frames:
            times = [250] * (len(frames) - 1) + [2000]
            frames[0].save(path, save_all=True, append_images=frames[1:], duration=times, loop=0)
        for file in files:
            file.unlink()
        self.folder.rmdir()


def metrics_of(row: Row) -> dict[str, float]:
    """The task's metrics of an entry of a curve."""
    return {name: value for name, value in row.items() if name not in MEMBERS}


def curve_figure(curve: list[Row], metric: str) -> Figure:
    """Loss and the task's first metric over the steps."""
    steps = [row["step"] for row in curve]
    panels = [("loss", [row["loss"] for row in curve]), (metric, [row[metric] for row in curve])]
    return curves_figure([(name, [("", steps, values)]) for name, values in panels], xlabel="step")


def result(going: SignalFit, config: FitConfig) -> dict[str, Any]:
    """result.json: the last and the best evaluation, baselines, and what it took."""
    task, fields = going.task, going.fields
    every = going.metrics or task.evaluate(fields).metrics  # a fit resumed at its last step has not looked
    return {
        "task": config.task,
        "field": config.field.name,
        "optimizer": config.optim.name,
        "final": metrics_of(going.curve[-1]),
        "best": {**metrics_of(going.best), "step": going.best["step"]},
        "baselines": going.baselines,
        "signals": {
            name: {key: float(values[i]) for key, values in every.items()} for i, name in enumerate(task.names)
        },
        "steps": going.step,
        "seconds": round(going.seconds, 2),
        "rates": going.rates,
        "parameters": fields.num_parameters,
        "macs_per_point": round(fields.macs_per_point(), 1),
        "signal": task.facts(),
    }


def result_table(going: SignalFit) -> str:
    """The last and the best metrics and the baselines, in columns."""
    rows = [("final", metrics_of(going.curve[-1])), (f"best (step {going.best['step']})", metrics_of(going.best))]
    rows += list(going.baselines.items())
    names = list(rows[0][1])
    width = max(len(title) for title, _ in rows)
    lines = [" " * width + "".join(f"{name:>14}" for name in names)]
    for title, metrics in rows:
        cells = (f"{metrics[name]:>14.4g}" if name in metrics else f"{'':>14}" for name in names)
        lines.append(f"{title:<{width}}{''.join(cells)}")
    return "\n".join(lines)
