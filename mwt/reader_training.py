"""Training a reader on a split of fitted networks, without fitting any: the second stage of the two.

The networks come in as functions from places in a split to tensors, so that nothing here knows how they are read.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mwt.checkpoint import find_checkpoint, has_checkpoint, restore, save_checkpoint
from mwt.errors import InputError, TrainingError
from mwt.evaluation import Classification, autocast
from mwt.optim import clip_gradients, make_schedule, step_if_finite
from mwt.readers.interface import Reader
from mwt.readers.knn import KNNReader
from mwt.readers.saved import load_reader
from mwt.readers.two_phase import TwoPhaseReader
from mwt.rng import derived_seed, permutation
from mwt.runtime import StopRequested
from mwt.tracking import MetricsLog
from mwt.weight_space import Weights
from mwt.weights_config import WeightsConfig


class Sample(NamedTuple):
    """Some networks of a split, on the device."""

    inputs: Weights | Tensor
    """What the reader reads: networks, their offsets, or images."""
    labels: Int[Tensor, " B"]
    phi: Weights | None = None
    """The whole networks, where a first phase needs them."""


@dataclass(frozen=True, kw_only=True)
class Examples:
    """A split, or a part of it."""

    name: str
    places: Int[Tensor, " n"]
    """In the split of the set."""
    read: Callable[[Int[Tensor, " B"]], Sample]
    """The networks at places of the split."""
    held: str = ""
    """Where they are, in words."""

    def __len__(self) -> int:
        return len(self.places)


@torch.no_grad()
def evaluate_reader(
    reader: Reader, examples: Examples, classes: tuple[str, ...], *, batch_size: int, precision: str = "fp32"
) -> Classification:
    """What a reader says of every network of a split, in order."""
    was_training = reader.training
    reader.eval()
    rows = []
    for places in examples.places.split(batch_size):
        sample = examples.read(places)
        with autocast(sample.labels.device, precision):
            logits = reader(sample.inputs)
        rows.append((sample.labels.cpu(), logits.float().softmax(-1).cpu()))
    reader.train(was_training)
    labels, probabilities = (torch.cat(column) for column in zip(*rows, strict=True))
    return Classification(classes=classes, positions=examples.places.cpu(), labels=labels, probabilities=probabilities)


@dataclass(kw_only=True)
class ReaderTraining:
    """Everything that a run holds while it runs: one or two phases, each with an optimizer and schedule of its own."""

    config: WeightsConfig
    reader: Reader
    train: Examples
    monitored: Examples | None
    """Where `best` is chosen."""
    classes: tuple[str, ...]
    augment: Callable[[Sample, int], Sample] | None = None
    """Makes of networks what training sees at a step."""
    coords: Callable[[int], Float[Tensor, "P D"]] | None = None
    """Where the first phase compares fields at a step."""
    log: MetricsLog | None = None
    step: int = 0
    best: float | None = None
    """Accuracy of the checkpoint `best`."""
    seconds: float = 0.0
    """Time spent training, evaluations excepted, over all resumptions."""
    optimizer: torch.optim.Optimizer = field(init=False)
    schedule: torch.optim.lr_scheduler.LRScheduler = field(init=False)
    _pending: list[Tensor] = field(init=False, default_factory=list)
    """Loss, share of hits and gradient norm of the steps since the last line of the log."""
    _codes: Tensor | None = field(init=False, default=None)
    _labels: Tensor = field(init=False)

    def __post_init__(self) -> None:
        if not self.steps_per_epoch:
            raise InputError(
                f"The split {self.train.name!r} has {len(self.train)} networks to train on, fewer than one batch of "
                f"{self.config.data.batch_size}; choose a smaller data.batch_size."
            )
        self._begin_phase()

    @property
    def directory(self) -> Path:
        """The run directory."""
        return Path(self.config.run.dir)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch; which networks fill none changes with the epoch."""
        return len(self.train) // self.config.data.batch_size

    @property
    def pretrain_steps(self) -> int:
        """Steps of the first phase."""
        return self.config.optim.pretrain_epochs * self.steps_per_epoch

    @property
    def total_steps(self) -> int:
        """Steps of both phases; none where nothing is learned by gradients."""
        return 0 if self.reader.memorises else self.pretrain_steps + self.config.optim.epochs * self.steps_per_epoch

    @property
    def pretraining(self) -> bool:
        """Whether the next step belongs to the first phase."""
        return self.step < self.pretrain_steps

    def _begin_phase(self) -> None:
        """Optimizer and schedule of the phase that the next step belongs to."""
        optim, first = self.config.optim, self.pretraining
        if self.pretrain_steps and not first:
            assert isinstance(self.reader, TwoPhaseReader)
            self.reader.freeze_encoder()
        rate = optim.pretrain_lr if first and optim.pretrain_lr else optim.lr
        steps = self.pretrain_steps if first else self.total_steps - self.pretrain_steps
        parameters = [p for p in self.reader.parameters() if p.requires_grad] or [nn.Parameter(torch.zeros(0))]
        groups = [{"params": parameters, "name": "reader"}]
        self.optimizer = torch.optim.AdamW(
            groups, lr=rate, weight_decay=optim.weight_decay, amsgrad=optim.amsgrad, fused=True
        )
        self.schedule = make_schedule(self.optimizer, optim, total_steps=max(1, steps))

    def run(self, stop: StopRequested, on_step: Callable[[dict[str, float] | None], None]) -> bool:
        """All steps from where the run stands. Returns whether it came to its end; if not, it is saved where it is."""
        if isinstance(self.reader, KNNReader):
            began = time.monotonic()
            samples = (self.train.read(part) for part in self.train.places.split(self.config.run.eval_batch_size))
            self.reader.memorise((sample.inputs, sample.labels) for sample in samples)  # type: ignore[misc]
            self.seconds = time.monotonic() - began
        saved_at = time.monotonic()
        self.reader.train()
        while self.step < self.total_steps and not self._stopped(stop):
            epoch = self.step // self.steps_per_epoch
            order = permutation(len(self.train), seed=self.config.run.seed, purpose="order", epoch=epoch)
            batches = order.split(self.config.data.batch_size)[: self.steps_per_epoch]
            for rows in batches[self.step - epoch * self.steps_per_epoch :]:
                began = time.monotonic()
                self._train_step(rows)
                if self.step == self.pretrain_steps:
                    self._flush()
                    self._begin_phase()
                due = self.step % self.config.run.log_every == 0 or self.step == self.total_steps
                on_step(self._flush() if due else None)
                self.seconds += time.monotonic() - began
                if self._stopped(stop):
                    break
            self._monitor()
            if time.monotonic() - saved_at > 60 * self.config.run.checkpoint_minutes:
                self.save("last")
                saved_at = time.monotonic()
        self.save("last")
        return self.step == self.total_steps

    @staticmethod
    def _stopped(stop: StopRequested) -> bool:
        return stop.signal is not None

    def _train_step(self, rows: Int[Tensor, " B"]) -> None:
        config, first = self.config, self.pretraining
        self.step += 1
        torch.manual_seed(derived_seed(config.run.seed, "step", self.step))  # dropout: resumed runs see the same
        forward, sample = self._read(rows)
        device = sample.labels.device
        self.optimizer.zero_grad(set_to_none=True)
        hits = torch.zeros((), device=device)
        with autocast(device, config.run.precision):
            if first:
                assert self.coords is not None, "whoever asks for a first phase gives coordinates"
                loss = self.reader.pretraining_loss(sample.inputs, sample.phi, self.coords(self.step))  # type: ignore[operator]
            else:
                logits = forward(sample.inputs).float()
                loss = F.cross_entropy(logits, sample.labels, label_smoothing=config.optim.label_smoothing)
                hits = (logits.detach().argmax(-1) == sample.labels).float().mean()
        loss.backward()
        norms = clip_gradients(self.optimizer, config.optim.clip_norm)
        step_if_finite(self.optimizer, torch.stack([*norms, loss.detach()]))
        self.schedule.step()
        self._pending.append(torch.stack([loss.detach(), hits, norms[0]]))

    def _read(self, rows: Int[Tensor, " B"]) -> tuple[Callable[..., Tensor], Sample]:
        """What a step reads, and with what: of a frozen encoder the codes, made once, where they stay the same."""
        places = self.train.places[rows]
        if not (isinstance(self.reader, TwoPhaseReader) and self.reader.frozen and self.augment is None):
            sample = self.train.read(places)
            return self.reader, sample if self.augment is None else self.augment(sample, self.step)
        if self._codes is None:
            parts = self.train.places.split(self.config.run.eval_batch_size)
            with torch.no_grad(), autocast(next(self.reader.parameters()).device, self.config.run.precision):
                samples = [self.train.read(part) for part in parts]
                self._codes = torch.cat([self.reader.encode(sample.inputs).float() for sample in samples])  # type: ignore[arg-type]
                self._labels = torch.cat([sample.labels for sample in samples])
        rows = rows.to(self._codes.device)
        return self.reader.classifier, Sample(self._codes[rows], self._labels[rows])

    def _flush(self) -> dict[str, float] | None:
        """A line of the log: means since the last one. This is where the device is read and waited for.

        Raises:
            TrainingError: a loss or its gradient was not finite; nothing was updated then. Names the step.
        """
        if not self._pending:
            return None
        rows = torch.stack(self._pending)
        first = self.step - len(rows) + 1
        for bad in (~rows.isfinite().all(1)).nonzero().flatten().tolist():
            raise TrainingError(
                f"The loss or its gradient is not finite at step {first + bad}. Begin a new run with a smaller "
                "optim.lr, or with run.precision=fp32."
            )
        self._pending = []
        loss, accuracy, norm = rows.double().mean(0).tolist()
        phase = self.step <= self.pretrain_steps
        numbers = {"reconstruction_loss": loss} if phase else {"classification_loss": loss, "accuracy": accuracy}
        numbers |= {"norm": norm, "lr": float(self.schedule.get_last_lr()[0]), "seconds": self.seconds}
        self._record("train", numbers)
        return numbers

    def _record(self, split: str, numbers: dict[str, Any]) -> None:
        if self.log is not None:
            self.log.write(step=self.step, epoch=self.step / self.steps_per_epoch, split=split, **numbers)

    def _monitor(self) -> None:
        """After an epoch that asks for it, evaluate the held-out networks, and keep the best reader."""
        epochs, rest = divmod(self.step, self.steps_per_epoch)
        due = rest == 0 and not self.pretraining and self.step > self.pretrain_steps
        if self.monitored is None or not due or epochs % self.config.run.monitor_every:
            return
        numbers = self.evaluate(self.monitored).summary()
        self._record("val", numbers)
        if self.best is None or numbers["accuracy"] > self.best:
            self.best = numbers["accuracy"]
            self.save("best")

    def evaluate(self, examples: Examples) -> Classification:
        """What the reader says of a split as it stands."""
        run = self.config.run
        return evaluate_reader(
            self.reader, examples, self.classes, batch_size=run.eval_batch_size, precision=run.precision
        )

    def save(self, name: str) -> None:
        """A checkpoint `name` ("last" or "best") in the run directory.

        Raises:
            OSError: disk full, no permission.
        """
        state = {
            "step": self.step, "total_steps": self.total_steps, "best": self.best, "seconds": self.seconds,
            "pending": [row.tolist() for row in self._pending], "schedule": self.schedule.state_dict(),
            "metrics_position": self.log.position if self.log else 0,
        }  # fmt: skip
        save_checkpoint(self.directory, name=name, model=self.reader, optimizer=self.optimizer, state=state)

    def restore(self) -> None:
        """Go back to the last checkpoint of the run, its log of metrics too; to its beginning if there is none yet.

        Raises:
            InputError: a checkpoint of other networks, or of a run of another length.
        """
        state: dict[str, Any] = {"metrics_position": 0}
        newest = [name for name in ("best", "last") if has_checkpoint(self.directory, name)]
        if newest:
            folder = max(find_checkpoint(self.directory, name) for name in newest)
            trained_on = load_reader(folder).facts.get("set")
            if trained_on != self.reader.facts.get("set"):
                raise InputError(
                    f"{self.directory} was trained on another set of networks than this data.path holds. Resume it "
                    "with its own, or begin a new run in another run.dir."
                )
            self.step = int(folder.name.rpartition("-")[2])
            self._begin_phase()
            state = restore(folder, model=self.reader, optimizer=self.optimizer)
            if state["total_steps"] != self.total_steps:
                raise InputError(
                    f"{self.directory} was to train for {state['total_steps']} steps, this configuration asks for "
                    f"{self.total_steps}; the schedule cannot be continued. Keep optim, data.batch_size and the data."
                )
            self.best, self.seconds = state["best"], state["seconds"]
            self.schedule.load_state_dict(state["schedule"])
            device = self.train.read(self.train.places[:1]).labels.device
            self._pending = [torch.tensor(row, device=device) for row in state["pending"]]
        if self.log is not None:
            self.log.truncate(state["metrics_position"])
