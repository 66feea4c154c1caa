"""The fits of one run, step by step together: a batch of signals for each shape that they have."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mwt.errors import InputError
from mwt.fitting import Going, Row, SignalFit
from mwt.rank import QUANTITIES, RankRow
from mwt.runtime import sync
from mwt.signals.task import Evaluation

MEMBERS = ("step", "seconds", "loss")
"""What an entry of a curve has beside metrics."""


class GroupedFit(Going):
    """Fits by the shape of their signals ("512x768x3"; "" where there is one), all at the same step at any time.

    Each has its own fields, optimizer and points, as if it were a run by itself. Numbers over all are means over
    signals, of the metrics that all shapes have.
    """

    def __init__(self, fits: Mapping[str, SignalFit]) -> None:
        self.fits = dict(fits)
        self.names = tuple(name for fit in self.fits.values() for name in fit.task.names)
        """Of all signals."""
        self.first = next(iter(self.fits.values()))
        """That of the first signal."""

    @property
    def step(self) -> int:
        """Steps made so far."""
        return self.first.step

    @property
    def finished(self) -> bool:
        """Whether all steps have been made."""
        return self.first.finished

    @property
    def metric(self) -> str:
        """What decides what is best."""
        return self.first.task.metric

    @property
    def seconds(self) -> float:
        """Spent in steps."""
        return sum(fit.seconds for fit in self.fits.values())

    def advance(self) -> Evaluation | None:
        """One step of each; the evaluation is that of the first signal's batch. See `Going`."""
        first, *_ = [fit.advance() for fit in self.fits.values()]
        return first

    # ---- numbers over all --------------------------------------------------------------------------------------------

    def mean(self, numbers: Sequence[float]) -> float:
        """Over signals, of a number for each fit."""
        if len(numbers) == 1:
            return numbers[0]
        counts = [fit.task.count for fit in self.fits.values()]
        return sum(count * number for count, number in zip(counts, numbers, strict=True)) / sum(counts)

    def means(self, each: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """`mean` of each number that all fits have."""
        names = [name for name in each[0] if all(name in one for one in each)]
        return {name: self.mean([one[name] for one in each]) for name in names}

    def partial(self) -> dict[str, list[str]]:
        """Metrics that some shapes do not have, such as SSIM of tiny pictures, with those shapes."""
        own = {shape: set(fit.last) for shape, fit in self.fits.items()}
        names = sorted(set().union(*own.values()))
        found = {name: [shape for shape, metrics in own.items() if name not in metrics] for name in names}
        return {name: shapes for name, shapes in found.items() if shapes}

    def row(self, number: int) -> Row:
        """An entry of the curve: step, seconds of all, loss and metrics."""
        each = [fit.curve[number] for fit in self.fits.values()]
        seconds = round(sum(row["seconds"] for row in each), 3)
        numbers = [{name: value for name, value in row.items() if name not in ("step", "seconds")} for row in each]
        return {"step": each[0]["step"], "seconds": seconds, **self.means(numbers)}

    @property
    def curve(self) -> list[Row]:
        """One entry an evaluation."""
        return [self.row(number) for number in range(len(self.first.curve))]

    @property
    def rates(self) -> list[float] | dict[str, list[float]]:
        """Of the optimizer's groups at the first step; by shape where they differ."""
        own = {shape: fit.rates for shape, fit in self.fits.items()}
        return own if any(rates != self.first.rates for rates in own.values()) else self.first.rates

    @property
    def final(self) -> dict[str, float]:
        """The metrics of the last evaluation."""
        return {name: value for name, value in self.row(-1).items() if name not in MEMBERS}

    @property
    def best(self) -> dict[str, Any]:
        """The metrics of each signal's best evaluation; `step` is the one at which the last of them was reached."""
        own = [fit.best for fit in self.fits.values()]
        found = self.means([{name: fmean(values) for name, values in one.metrics.items()} for one in own])
        return {**found, "step": max(step for one in own for step in one.steps)}

    @property
    def baselines(self) -> dict[str, dict[str, float]]:
        """Metrics of simple methods, by name."""
        own = [fit.baselines for fit in self.fits.values()]
        names = [name for name in own[0] if all(name in one for one in own)]
        return {name: self.means([one[name] for one in own]) for name in names}

    @property
    def ranks(self) -> list[RankRow]:
        """Of the hidden matrices, means over signals; empty where they are not followed."""
        return list(self._mean_ranks())

    def _mean_ranks(self) -> Iterator[RankRow]:
        followed = [fit.ranks.rows for fit in self.fits.values() if fit.ranks is not None]
        for rows in zip(*followed, strict=True):
            each: list[dict[str, Any]] = [asdict(row) for row in rows]
            finite = {name: None not in [one[name] for one in each] for name in QUANTITIES}
            numbers = {name: self.mean([one[name] for one in each]) if finite[name] else None for name in QUANTITIES}
            yield RankRow(step=rows[0].step, layer=rows[0].layer, **numbers)

    def signals(self) -> dict[str, dict[str, Any]]:
        """Of each signal the metrics of the last evaluation, and under `best` those of its best one with its step."""
        found = {}
        for fit in self.fits.values():
            for i, name in enumerate(fit.task.names):
                last, best = ({key: values[i] for key, values in part.items()} for part in (fit.last, fit.best.metrics))
                found[name] = {**last, "best": {**best, "step": fit.best.steps[i]}}
        return found if len(self.fits) == 1 else dict(sorted(found.items()))

    def facts(self) -> dict[str, Any]:
        """What a result file says of the signals; by shape what differs between shapes, or is a list over signals."""
        own = {shape: fit.task.facts() for shape, fit in self.fits.items()}
        merged: dict[str, Any] = {}
        for key, value in next(iter(own.values())).items():
            alike = not isinstance(value, list) and all(facts[key] == value for facts in own.values())
            merged[key] = value if alike or len(own) == 1 else {shape: facts[key] for shape, facts in own.items()}
        return {**merged, "signals": len(self.names)}

    # ---- on disk -----------------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write all that the fits need to go on, in one file: the old one or the whole new one.

        Raises:
            OSError: disk full, no permission.
        """
        contents, tensors = [], dict[str, Tensor]()
        for number, fit in enumerate(self.fits.values()):
            content, own = fit.state()
            contents.append(content)
            tensors |= {f"{number}.{name}": value.detach().cpu().contiguous() for name, value in own.items()}
        temporary = path.with_name(f".{path.name}")
        try:
            save_file(tensors, temporary, metadata={"fits": json.dumps(contents)})
            sync(temporary)
            temporary.replace(path)
        except SafetensorError as error:  # wraps the system's errors, whose text alone names them
            raise OSError(errno.EIO, f"the checkpoint could not be written ({error})", str(path)) from error
        finally:
            temporary.unlink(missing_ok=True)

    def restore(self, path: Path) -> None:
        """Go on from what `save` wrote.

        Raises:
            InputError: a damaged file, one of another fit, or of other signals.
        """
        fits = list(self.fits.values())
        try:
            with safe_open(path, "pt") as file:
                contents = json.loads(file.metadata()["fits"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            before = [name for content in contents for name in content["signals"]]
            now = [name for fit in fits for name in fit.task.names]
            others = sorted(set(before) ^ set(now))
            moved = [tuple(content["signals"]) for content in contents] != [fit.task.names for fit in fits]
            if not others and not moved:
                for number, (fit, content) in enumerate(zip(fits, contents, strict=True)):
                    mine = f"{number}."
                    own = {key.removeprefix(mine): value for key, value in tensors.items() if key.startswith(mine)}
                    fit.take(content, own)
        except (SafetensorError, OSError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{path} is damaged, or of another fit ({error}).") from error
        if others:
            raise InputError(
                f"signal.path names other signals than when {path.parent} was started: {', '.join(others[:5])}"
                f"{', …' * (len(others) > 5)} came or went. Put the files back as they were, or begin a new run."
            )
        if moved:
            raise InputError(
                f"The signals of signal.path have other shapes than when {path.parent} was started. Put the files back "
                "as they were, or begin a new run."
            )
