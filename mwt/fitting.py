"""Ordinary fitting: gradient steps on the parameters of a field, or of N at once, until they show their signals."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from mwt.errors import DivergedError, InputError, NotDefinedError
from mwt.fields import Field, build_field
from mwt.fields.config import FieldConfig
from mwt.fields.grid import Grid
from mwt.fields.registry import ON_SAMPLES
from mwt.fit_best import Best
from mwt.fit_config import FitOptimConfig
from mwt.muon import Muon
from mwt.muon_groups import split_parameters
from mwt.rank import RankRow, RankTracker
from mwt.signals.task import Evaluation, Sampler, Task, means


def fields_for(config: FieldConfig, task: Task, *, seed: int) -> Field:
    """A field for the task's signal, or one for each of its signals, all beginning as a single one would.

    Raises:
        InputError: settings that do not go together.
        NotDefinedError: a field on whole samples whose task asks for values between them, or a field whose derivatives
            will not do for the task.
    """
    name = f"task={type(task).__name__.removesuffix('Task').lower()}"
    if config.name in ON_SAMPLES and task.between:
        raise NotDefinedError(
            f"{name} asks for values between the samples of its signal, and field.name={config.name} is "
            "defined on the samples only: choose another field."
        )
    sizes = {"coordinate_dims": task.frame.coordinate_dims, "channels": task.channels, "seed": seed}
    build = partial(build_field, config, frame=task.frame, **sizes)
    single = build()
    single.require_derivatives(task.derivatives, name)
    if task.count == 1:
        return single
    several = build(copies=task.count)
    alike = build(copies=1).state_dict()
    several.load_state_dict({name: value.expand_as(several.state_dict()[name]) for name, value in alike.items()})
    return several


def make_fit_optimizer(fields: Field, config: FitOptimConfig) -> torch.optim.Optimizer:
    """Adam, Muon with Adam, or L-BFGS, over all parameters of the fields.

    Raises:
        InputError: Muon for a field without hidden matrices; L-BFGS for several fields, which it would couple.
    """
    if config.name == "lbfgs":
        if fields.copies is not None:
            raise InputError("optim.name=lbfgs takes one signal at a time: its line search would couple several.")
        return torch.optim.LBFGS(
            fields.parameters(), lr=1.0, max_iter=20, history_size=100, line_search_fn="strong_wolfe"
        )
    decay = config.weight_decay
    adam: dict[str, Any] = {"betas": config.betas, "eps": config.eps}
    if config.name == "muon":
        own = asdict(config.muon)
        split = split_parameters(fields, muon_first=own.pop("first"), exclude=own.pop("exclude"))
        groups = split.groups(lr=config.lr_muon, lr_adam=config.lr, relative=fields.relative_lr)
        return Muon([{**group, "weight_decay": decay, **(own if group["use_muon"] else adam)} for group in groups])
    return torch.optim.AdamW(fields.parameters(), lr=config.lr, weight_decay=decay, **adam)  # decay 0: Adam


def rate_factor(config: FitOptimConfig, step: int) -> float:
    """What all rates are multiplied with at a step, counted from 0: 1 at first, lr_min / lr after the last."""
    least, done = config.lr_min / config.lr, step / config.steps
    match config.schedule:
        case "cosine":
            return least + (1 - least) * (1 + math.cos(math.pi * done)) / 2
        case "exponential":
            return float(least**done)
    return 1.0


def evaluation_steps(steps: int, count: int) -> list[int]:
    """`count` steps, the last among them, dense at the beginning, where most happens; fewer where steps are few."""
    return sorted({max(1, round(steps * ((i + 1) / count) ** 2)) for i in range(count)})


Row = dict[str, Any]
"""An entry of a curve: step, seconds, loss, and the metrics' means."""


class Going(ABC):
    """What is made step by step, with evaluations on the way."""

    @property
    @abstractmethod
    def finished(self) -> bool:
        """Whether all steps have been made."""

    @abstractmethod
    def advance(self) -> Evaluation | None:
        """One step, and the evaluation after it where it is time for one.

        Raises:
            DivergedError: a loss or a weight that is not finite at an evaluation; names the step and the signal.
        """

    def run(
        self, stop: Callable[[], bool], on_evaluation: Callable[[Evaluation], None], on_step: Callable[[], None]
    ) -> bool:
        """Go on to the last step, or until `stop` says so after one. Returns whether the last step was made.

        Raises:
            DivergedError: as of `advance`.
        """
        while not self.finished:
            found = self.advance()
            if found is not None:
                on_evaluation(found)
            on_step()
            if stop():
                return self.finished
        return True


@dataclass
class SignalFit(Going):
    """A fit on its way: fields, optimizer, and what has been seen so far. `run` goes on from `step`."""

    task: Task
    fields: Field
    config: FitOptimConfig
    seed: int
    evaluations: int
    ranks: RankTracker | None = None
    compare: bool = True
    """With simple methods, the task's baselines."""
    step: int = 0
    curve: list[Row] = field(default_factory=list)
    """One entry an evaluation."""
    last: dict[str, list[float]] = field(default_factory=dict)
    """The metrics of the last evaluation, a number a signal."""
    best: Best = field(default_factory=lambda: Best([], {}, {}))
    seconds: float = 0.0
    """Spent in steps; evaluations are left out."""

    def __post_init__(self) -> None:
        self.optimizer = make_fit_optimizer(self.fields, self.config)
        self.rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        device = next(self.fields.parameters()).device
        size, tiles = self.task.frame.size, None
        if size is not None and self.fields.tile is not None and math.prod(size) == self.task.points:
            tiles = (size, self.fields.tile)
        self.looks = frozenset(evaluation_steps(self.config.steps, self.evaluations))
        self.sampler = Sampler(self.task.points, self.config.points, self.seed, device, tiles)
        if self.ranks is not None:
            self.ranks.record(0)

    @property
    def finished(self) -> bool:
        """Whether all steps have been made."""
        return self.step >= self.config.steps

    @cached_property
    def baselines(self) -> dict[str, dict[str, float]]:
        """Metrics of simple methods, by name; large signals take their time. Empty without `compare`."""
        return self.task.baselines() if self.compare else {}

    def advance(self) -> Evaluation | None:
        """One step, and the evaluation after it where it is time for one; see `Going`."""
        began = time.perf_counter()
        losses = self.make_step()
        self.step += 1
        due = self.step in self.looks
        loss = self._checked(losses) if due else 0.0  # waits for the device
        self.seconds += time.perf_counter() - began
        return self._look(loss) if due else None

    def make_step(self) -> Tensor:
        """One optimizer step; the losses [N] before it, without penalties of parameters.

        The sum over signals is minimised: they do not meet.
        """
        if self.config.name != "lbfgs":
            factor = rate_factor(self.config, self.step)
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * factor
        index, seen = self.sampler.index(self.step), []

        def closure() -> Tensor:
            self.optimizer.zero_grad(set_to_none=True)
            losses = self.task.loss(self.fields, index, self.sampler.generator(self.step))
            total: Tensor = losses.sum()
            penalty = self.fields.penalty()
            if penalty is not None:
                total = total + penalty.sum()
            if self.config.total_variation:
                total = total + self.config.total_variation * self.total_variation()
            total.backward()
            seen.append(losses.detach())
            return total

        if self.config.name == "lbfgs":
            self.optimizer.step(closure)  # type: ignore[arg-type]
        else:
            closure()
            self.optimizer.step()
        return seen[0]

    def total_variation(self) -> Tensor:
        """The sum over fields, to be added to the loss; what is reported as loss is without it.

        Raises:
            NotDefinedError: fields that are no grids of values.
        """
        if not isinstance(self.fields, Grid):
            raise NotDefinedError(
                "optim.total_variation is for grids of values (field.name=grid), not "
                f"field.name={self.fields.config.name}."
            )
        return self.fields.total_variation().sum()

    def _checked(self, losses: Tensor) -> float:
        finite = losses.isfinite()
        for parameter in self.fields.parameters():  # the losses are those before the step
            finite = finite & parameter.detach().isfinite().reshape(len(finite), -1).all(1)
        if not bool(finite.all()):
            name = self.task.names[int((~finite).nonzero()[0])]
            rates = ", ".join(f"{rate:.3g}" for rate in self.rates)
            raise DivergedError(
                f"The fit of {name} was not finite at step {self.step}: the rates ({rates}) are too large for this "
                "field. Nothing of this fit can be used."
            )
        return float(losses.mean())

    def _look(self, loss: float) -> Evaluation:
        found = self.task.evaluate(self.fields)
        row = {"step": self.step, "seconds": round(self.seconds, 3), "loss": loss, **means(found.metrics)}
        self.curve.append(row)
        self.last = {name: values.tolist() for name, values in found.metrics.items()}
        self.best.look(self.step, self.last, self.task.metric, self.fields)
        if self.ranks is not None:
            self.ranks.record(self.step)
        return found

    # ---- on disk (mwt.fit_groups) ------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All that the fit needs to go on: what JSON can hold, and tensors by name."""
        tensors = {f"field.{name}": value for name, value in self.fields.state_dict().items()}
        tensors |= {f"best.{name}": value for name, value in self.best.weights.items()}
        moments = _without_tensors(self.optimizer.state_dict()["state"], "optimizer", tensors)
        content = {name: getattr(self, name) for name in ("step", "seconds", "rates", "curve", "last")}
        content |= {
            "best": [self.best.steps, self.best.metrics],
            "moments": moments,
            "ranks": self.ranks.as_json() if self.ranks else [],
        }
        return content | {"signals": list(self.task.names)}, tensors

    def take(self, content: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Go on from what `state` gave.

        Raises:
            LookupError, TypeError, ValueError, RuntimeError: it is of another fit.
        """
        parts: dict[str, dict[str, Tensor]] = {"field": {}, "best": {}}
        for name, value in tensors.items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = value
        self.fields.load_state_dict(parts["field"])
        steps, metrics = content["best"]
        self.best = Best(steps, metrics, {name: value.clone() for name, value in parts["best"].items()})
        device = next(self.fields.parameters()).device
        counters = device if isinstance(self.optimizer, Muon) else torch.device("cpu")  # where torch's AdamW has them
        tensors = {  # copies: out of the file's alignment
            name: value.to(counters if name.endswith(".step") else device, copy=True)
            for name, value in tensors.items()
            if name.startswith("optimizer.")
        }
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for index, values in content["moments"].items():  # not `load_state_dict`, which rounds L-BFGS's scalars
            self.optimizer.state[parameters[int(index)]] = _with_tensors(values, tensors)
        for name in ("step", "seconds", "rates", "curve", "last"):
            setattr(self, name, content[name])
        if self.ranks is not None:
            self.ranks.rows = [RankRow(**row) for row in content["ranks"]]


def _without_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The same for JSON: each tensor goes into `tensors`, and {"tensor": its name} stands in its place."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {str(key): _without_tensors(item, f"{name}.{key}", tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_tensors(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
    return value


def _with_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `_without_tensors`."""
    if isinstance(value, dict):
        if value.keys() == {"tensor"}:
            return tensors[value["tensor"]]
        return {key: _with_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_tensors(item, tensors) for item in value]
    return value
