"""What a fit leaves for people: a film, curves, a table, and the same numbers for programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxtyping import UInt8
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from mwt.fit_config import FitConfig
from mwt.fit_groups import GroupedFit
from mwt.fitting import Row
from mwt.plots import curves_figure

LARGEST = 384
"""Pixels along the longer side of the film."""
LISTED = 40
"""Signals that are shown one by one."""


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
        """All frames as a GIF, a quarter of a second each, the last for two."""
        files = sorted(self.folder.glob("*.png"))
        frames = []
        for file in files:
            with Image.open(file) as image:
                frames.append(image.copy())
        if frames:
            times = [250] * (len(frames) - 1) + [2000]
            frames[0].save(path, save_all=True, append_images=frames[1:], duration=times, loop=0)

    def remove(self) -> None:
        """The frames, once nothing can ask for them again."""
        for file in self.folder.glob("*.png"):
            file.unlink()
        self.folder.rmdir()


def curve_figure(curve: list[Row], metric: str) -> Figure:
    """Loss and the task's first metric over the steps."""
    steps = [row["step"] for row in curve]
    panels = [("loss", [row["loss"] for row in curve]), (metric, [row[metric] for row in curve])]
    return curves_figure([(name, [("", steps, values)]) for name, values in panels], xlabel="step")


def shape_folder(folder: Path, shape: str) -> Path:
    """Where the fields of a shape lie: the folder itself where all signals have one."""
    return folder / shape if shape else folder


def result(going: GroupedFit, config: FitConfig) -> dict[str, Any]:
    """result.json: the last and the best evaluation, baselines, and what it took."""
    fits = going.fits.values()
    return {
        "task": config.task,
        "field": config.field.name,
        "optimizer": config.optim.name,
        "final": going.final,
        "best": going.best,
        "baselines": going.baselines,
        "signals": going.signals(),
        "fields": {str(shape_folder(Path("field"), shape)): list(fit.task.names) for shape, fit in going.fits.items()},
        "steps": going.step,
        "seconds": round(going.seconds, 2),
        "rates": going.rates,
        "parameters": round(going.mean([float(fit.fields.num_parameters) for fit in fits])),
        "macs_per_point": round(going.mean([float(fit.fields.macs_per_point()) for fit in fits]), 1),
        "signal": going.facts(),
    }


def result_table(going: GroupedFit) -> str:
    """The last and the best metrics and the baselines, in columns; of several signals also those of each."""
    best = {name: value for name, value in going.best.items() if name != "step"}
    until = "step" if len(going.names) == 1 else "each its own, to step"
    rows = [("final", going.final), (f"best ({until} {going.best['step']})", best), *going.baselines.items()]
    names = list(going.final)
    signals = going.signals() if len(going.names) > 1 else {}
    if signals:
        rows += [("", {}), *list(signals.items())[:LISTED]]
    width = max(len(title) for title, _ in rows)
    lines = [" " * width + "".join(f"{name:>14}" for name in names)]
    for title, metrics in rows:
        cells = (f"{metrics[name]:>14.4g}" if name in metrics else f"{'':>14}" for name in names)
        lines.append(f"{title:<{width}}{''.join(cells)}".rstrip())
    if len(signals) > LISTED:
        lines.append(f"… and {len(signals) - LISTED} more in result.json")
    return "\n".join(lines)
