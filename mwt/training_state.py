"""What a training run changes as it goes, and how it gets into a checkpoint and out of it again."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.utils.model_ema import ModelEmaV3

from mwt.checkpoint import find_checkpoint, has_checkpoint, resume, save_checkpoint
from mwt.config import ClassifyConfig
from mwt.errors import InputError, TrainingError
from mwt.memory import peak
from mwt.model import MetaWeightTransformer
from mwt.optim import make_optimizer, make_schedule
from mwt.runtime import write_json
from mwt.tracking import MetricsLog
from mwt.training import Meter


@dataclass(kw_only=True)
class TrainingState:
    """Everything that a checkpoint must bring back for a run to go on as if nothing had happened."""

    directory: Path
    """The run directory."""
    model: MetaWeightTransformer
    average: ModelEmaV3 | None
    """Moving average of the model's weights, where the run keeps one."""
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    meter: Meter
    scaler: Any
    """Of the loss (fp16), or None."""
    steps_per_epoch: int
    total_steps: int
    """Optimizer steps of the whole run."""
    may_skip: int = 0
    """Steps that may turn out not finite before the run is stopped."""
    locate: Callable[[int], dict[str, Any]] = lambda position: {}
    """Where the sample at a position of the training split lies: its key and its shard."""
    log: MetricsLog | None = None
    """Of the main process alone, which alone writes checkpoints."""
    step: int = 0
    best: float | None = None
    """Accuracy of the checkpoint `best` (of a reconstruction alone: its negative squared error)."""
    monitored_step: int = 0
    """The step of the last evaluation."""
    skipped: int = 0
    """Steps that were not finite and updated nothing."""
    seconds: float = 0.0
    """Time spent training, over all resumptions."""

    _clock: float = field(init=False, default=0.0)
    _logged: tuple[int, float] = field(init=False, default=(0, 0.0))

    @classmethod
    def begin(
        cls, model: MetaWeightTransformer, config: ClassifyConfig, *, steps_per_epoch: int, scaler: Any = None
    ) -> TrainingState:
        """The state of a run before its first step: a fresh optimizer and schedule for `model`."""
        optimizer = make_optimizer(model, config.optim)
        total_steps = steps_per_epoch * config.optim.epochs
        return cls(
            directory=Path(config.run.dir),
            model=model,
            average=None if config.optim.ema is None else ModelEmaV3(model, decay=config.optim.ema),
            optimizer=optimizer,
            schedule=make_schedule(optimizer, config.optim, total_steps=total_steps),
            meter=Meter(model.device, scaled_loss=config.run.precision == "fp16"),
            scaler=scaler,
            steps_per_epoch=steps_per_epoch,
            total_steps=total_steps,
            may_skip=config.run.max_skipped if config.run.on_nonfinite == "skip" else 0,
        )

    @property
    def evaluated_model(self) -> MetaWeightTransformer:
        """The model to evaluate: the average of the weights where the run keeps one."""
        model: MetaWeightTransformer = self.model if self.average is None else self.average.module
        return model

    def advance(self) -> None:
        """What follows each optimizer step: the schedule moves, the average takes in the new weights."""
        self.schedule.step()
        if self.average is not None:
            self.average.update(self.model)

    @property
    def epoch(self) -> float:
        """Epochs done, with the part of the present one."""
        return self.step / self.steps_per_epoch

    def evaluation_due(self, every: int) -> bool:
        """Whether an epoch has just ended after which an evaluation is asked for, `every` so many, and not yet made."""
        epochs, rest = divmod(self.step, self.steps_per_epoch)
        return self.step > 0 == rest and epochs % every == 0 and self.monitored_step != self.step

    def start_clock(self) -> None:
        """Training begins, or goes on after something that is not to be counted (an evaluation, a resumption)."""
        self._clock = time.monotonic()
        self._logged = (self.step, self._clock)

    def stop_clock(self) -> None:
        """Add the time since the last call, or since `start_clock`, to `seconds`."""
        now = time.monotonic()
        self.seconds += now - self._clock
        self._clock = now

    def numbers(self, batch_size: int, device: torch.device) -> dict[str, float]:
        """A line of the log: means since the last one, images a second (`batch_size` a step), rate, time, memory.

        This is where the device is read and waited for.
        """
        self.check()
        numbers = self.meter.read()
        step, since = self._logged
        self._logged = (self.step, time.monotonic())
        if self.may_skip:
            numbers["skipped"] = self.skipped
        if self.scaler is not None:
            numbers["loss_scale"] = self.scaler.get_scale()
            if numbers["loss_scale"] < 1:  # halved at each overflow; single ones are what it is there for
                raise TrainingError(
                    f"At step {self.step} the gradients overflow in fp16 however small the loss is scaled. Go on from "
                    "the last checkpoint with --resume run.precision=bf16 or fp32."
                )
        return numbers | {
            "images_per_second": (self.step - step) * batch_size / (self._logged[1] - since),
            "seconds": self.seconds,
            "lr_siren": float(self.schedule.get_last_lr()[0]),
            "peak_memory_gb": peak(device) / 1e9,
        }

    def check(self) -> None:
        """Wait for the device, and write down each step since the last look whose loss or gradient was not finite.

        RUN/nonfinite/step-….json then holds its number and its samples. Every process calls it, one writes.

        Raises:
            TrainingError: there were more such steps than the run may skip; names the step.
        """
        for step, positions in self.meter.bad_steps().items():
            self.skipped += 1
            report = self.directory / "nonfinite" / f"step-{step:08d}.json"
            if self.log is not None:
                samples = [{"position": position, **self.locate(position)} for position in positions]
                report.parent.mkdir(exist_ok=True)
                write_json(report, {"step": step, "epoch": (step - 1) // self.steps_per_epoch, "samples": samples})
            if self.skipped > self.may_skip:
                what = f"The loss or its gradient is not finite at step {step}"
                if self.may_skip:
                    what = (
                        f"{self.skipped} steps were not finite, of which run.max_skipped allows {self.may_skip}; the "
                    )
                    what += f"last is step {step}"
                raise TrainingError(
                    f"{what}; {report} names its samples. The last checkpoint is from before it: go on from there with "
                    "--resume run.precision=fp32, or with --resume run.on_nonfinite=skip, or begin a new run with "
                    "smaller optim.lr_siren, optim.lr_alpha and optim.lr_reader."
                )
            if self.log is not None:
                warnings.warn(
                    f"Step {step} was skipped: its loss or gradient is not finite; {report} names its samples.",
                    stacklevel=2,
                )

    def save(self, name: str) -> None:
        """A checkpoint `name` ("last" or "best") in the run directory. Every process calls it, one writes.

        Raises:
            TrainingError: more steps were not finite than may be.
            OSError: disk full, no permission.
        """
        self.check()
        meter = self.meter.state()
        if self.log is None:
            return
        state = {
            "step": self.step,
            "total_steps": self.total_steps,
            "best": self.best,
            "monitored_step": self.monitored_step,
            "skipped": self.skipped,
            "seconds": self.seconds,
            "meter": meter,
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            "metrics_position": self.log.position,
        }
        average = None if self.average is None else self.average.module
        save_checkpoint(
            self.directory, name=name, model=self.model, average=average, optimizer=self.optimizer, state=state
        )

    def restore(self) -> None:
        """Go back to the last checkpoint of the run, its log of metrics too; to its beginning if there is none yet.

        Raises:
            InputError: a checkpoint of another model, or of a run of another length.
        """
        if not has_checkpoint(self.directory):
            if self.log is not None:
                self.log.truncate(0)
            return
        average = None if self.average is None else self.average.module
        state = resume(find_checkpoint(self.directory), model=self.model, average=average, optimizer=self.optimizer)
        if state["total_steps"] != self.total_steps:
            raise InputError(
                f"{self.directory} was to train for {state['total_steps']} steps, this configuration asks for "
                f"{self.total_steps}; the schedule cannot be continued. Keep optim.epochs, data.batch_size and "
                "the data."
            )
        for name in ("step", "best", "seconds", "monitored_step", "skipped"):
            setattr(self, name, state[name])
        self.meter.restore(state["meter"])
        if self.scaler is not None and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.schedule.load_state_dict(state["schedule"])
        if self.log is not None:
            self.log.truncate(state["metrics_position"])
