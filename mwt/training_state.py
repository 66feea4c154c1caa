"""What a training run changes as it goes, and how it gets into a checkpoint and out of it again."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mwt.checkpoint import find_checkpoint, resume, save_checkpoint
from mwt.config import ClassifyConfig
from mwt.errors import InputError
from mwt.memory import peak
from mwt.model import MetaWeightTransformer
from mwt.optim import make_optimizer, make_schedule
from mwt.tracking import MetricsLog
from mwt.training import Meter


@dataclass(kw_only=True)
class TrainingState:
    """Everything that a checkpoint must bring back for a run to go on as if nothing had happened."""

    model: MetaWeightTransformer
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    meter: Meter
    scaler: Any
    """Of the loss (fp16), or None."""
    steps_per_epoch: int
    total_steps: int
    """Optimizer steps of the whole run."""
    log: MetricsLog | None = None
    """Of the main process alone, which alone writes checkpoints."""
    step: int = 0
    best: float = -1.0
    """Accuracy of the checkpoint `best` (of a reconstruction alone: its negative squared error)."""
    monitored_step: int = 0
    """The step of the last evaluation."""
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
            model=model,
            optimizer=optimizer,
            schedule=make_schedule(optimizer, config.optim, total_steps=total_steps),
            meter=Meter(model.siren.out_scale.device, scaled_loss=config.run.precision == "fp16"),
            scaler=scaler,
            steps_per_epoch=steps_per_epoch,
            total_steps=total_steps,
        )

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
        numbers = self.meter.read()
        step, since = self._logged
        self._logged = (self.step, time.monotonic())
        return numbers | {
            "images_per_second": (self.step - step) * batch_size / (self._logged[1] - since),
            "seconds": self.seconds,
            "lr_siren": float(self.schedule.get_last_lr()[0]),
            "peak_memory_gb": peak(device) / 1e9,
        }

    def save(self, run: Path, name: str) -> None:
        """A checkpoint `name` ("last" or "best") in a run directory. Every process calls it, one writes.

        Raises:
            TrainingError: a step since the last one was not finite.
            OSError: disk full, no permission.
        """
        self.meter.check()
        meter = self.meter.state()
        if self.log is None:
            return
        state = {
            "step": self.step,
            "total_steps": self.total_steps,
            "best": self.best,
            "monitored_step": self.monitored_step,
            "seconds": self.seconds,
            "meter": meter,
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            "metrics_position": self.log.position,
        }
        save_checkpoint(run, name=name, model=self.model, optimizer=self.optimizer, state=state)

    def restore(self, run: Path) -> None:
        """Go back to the last checkpoint of a run directory, the log of metrics too.

        Raises:
            InputError: no checkpoint, one of another model, or of a run of another length.
        """
        state = resume(find_checkpoint(run), model=self.model, optimizer=self.optimizer)
        if state["total_steps"] != self.total_steps:
            raise InputError(
                f"{run} was to train for {state['total_steps']} steps, this configuration asks for {self.total_steps}; "
                "the schedule cannot be continued. Keep optim.epochs, data.batch_size and the data."
            )
        for name in ("step", "best", "seconds", "monitored_step"):
            setattr(self, name, state[name])
        self.meter.restore(state["meter"])
        if self.scaler is not None and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.schedule.load_state_dict(state["schedule"])
        if self.log is not None:
            self.log.truncate(state["metrics_position"])
