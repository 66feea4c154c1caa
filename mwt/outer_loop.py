"""The outer loop of a training run: epochs, checkpoints, evaluations, and stopping when asked to.

The signals come in as an object that makes batches, so that nothing here knows how they are read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from accelerate import Accelerator

from mwt.config import ClassifyConfig
from mwt.evaluation import Evaluation, autocast, evaluate
from mwt.model import MetaWeightTransformer
from mwt.runtime import StopRequested
from mwt.structs import Batch
from mwt.training import train_step
from mwt.training_state import TrainingState

MONITOR_SEED = 0
"""Of the subset that `run.monitor_limit` evaluates: the same in all runs, so that they can be compared."""

OnStep = Callable[[dict[str, float] | None], None]
"""Called after every step; with the numbers of the line where one was logged."""


@runtime_checkable
class Signals(Protocol):
    """A split of a data set, as the outer loop uses it."""

    name: str
    bad: Any
    """Its `report()` is a sentence about samples that could not be used, or empty; `gather()` makes it that of all
    processes."""

    def __len__(self) -> int: ...

    def batches(
        self,
        *,
        batch_size: int,
        epoch: int = 0,
        seed: int = 0,
        shuffle: bool = False,
        drop_last: bool = False,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
        prepare: Callable[[Batch], Batch] | None = None,
    ) -> Iterator[Batch]:
        """This rank's batches of one epoch, from global batch `start` on; those of all ranks make what one would see.

        A global batch is dealt out to the ranks in turn: rank r has every `world`-th sample from its r-th on. `prepare`
        is called with each of them while the one before is used.
        """


class _Stopped(Exception):
    """A stop was asked for within an evaluation."""


@dataclass(kw_only=True)
class OuterLoop:
    """Everything that a run holds while it runs."""

    config: ClassifyConfig
    accelerator: Accelerator
    train: Signals
    prepare: Callable[[Batch, int], Batch]
    """Makes of a batch what training sees in an epoch: augmented."""
    prepare_ahead: bool = False
    """Whether that takes long enough to be done while the step before runs."""
    monitored: Signals | None
    may_choose: bool
    """Whether `best` may be chosen on the monitored split: only on `val`, never on what is reported."""
    model: MetaWeightTransformer
    forward: Any
    """The model as accelerate prepared it."""
    optimizer: Any
    """The optimizer likewise."""
    state: TrainingState

    @property
    def directory(self) -> Path:
        """The run directory."""
        return self.state.directory

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.state.total_steps

    def run(self, stop: StopRequested, on_step: OnStep) -> bool:
        """All epochs from where the run stands. Returns whether it came to its end; if not, it is saved where it is."""
        state = self.state
        self._monitor(stop)  # where a run died between an epoch's end and its evaluation
        if stop.vote(0, self.accelerator.device)[0]:
            return self._finished
        for epoch in range(state.step // state.steps_per_epoch, self.config.optim.epochs):
            self._epoch(epoch, stop, on_step)
            self._save("last")
            self._monitor(stop)
            if stop.vote(0, self.accelerator.device)[0]:
                break
        return self._finished

    @property
    def _finished(self) -> bool:
        return self.state.step == self.state.total_steps and not self._evaluation_due

    @property
    def _evaluation_due(self) -> bool:
        return self.monitored is not None and self.state.evaluation_due(self.config.run.monitor_every)

    def _save(self, name: str) -> None:
        self.state.save(name)
        self.accelerator.wait_for_everyone()

    def _record(self, split: str, numbers: dict[str, Any]) -> None:
        """A line of metrics.jsonl, and the same to the other trackers."""
        state = self.state
        if state.log is not None:
            state.log.write(step=state.step, epoch=state.epoch, split=split, **numbers)
            self.accelerator.log({f"{split}/{key}": value for key, value in numbers.items()}, step=state.step)

    def _epoch(self, epoch: int, stop: StopRequested, on_step: OnStep) -> None:
        """The rest of one epoch; returns early where a stop was asked for."""
        config, state, accelerator, device = self.config, self.state, self.accelerator, self.accelerator.device

        def prepare(batch: Batch) -> Batch:
            return self.prepare(batch, epoch)

        batches = self.train.batches(
            batch_size=config.data.batch_size // accelerator.num_processes,
            epoch=epoch,
            seed=config.run.seed,
            shuffle=True,
            drop_last=True,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            start=state.step - epoch * state.steps_per_epoch,
            prepare=prepare if self.prepare_ahead else None,
        )
        saved_at = time.monotonic()
        state.start_clock()
        for batch in batches:
            state.step += 1
            train_step(
                self.forward,
                batch if self.prepare_ahead else prepare(batch),
                step=state.step,
                epoch=epoch,
                seed=config.run.seed,
                inner_loop=config.inner_loop,
                optimizer=self.optimizer,
                clip_norm=config.optim.clip_norm,
                autocast=autocast(device, config.run.precision),
                backward=accelerator.backward,
                unscale=lambda: accelerator.unscale_gradients(self.optimizer),
                meter=state.meter,
                accumulate=config.optim.accumulate,
                no_sync=lambda: accelerator.no_sync(self.forward),
            )
            state.advance()
            state.stop_clock()
            numbers = None
            if state.step % config.run.log_every == 0 or state.step == state.total_steps:
                numbers = state.numbers(config.data.batch_size, device)
                self._record(self.train.name, numbers)
            elif state.meter.full:
                state.check()
            on_step(numbers)
            due = time.monotonic() - saved_at > 60 * config.run.checkpoint_minutes
            stopping, saving = stop.vote(state.step, device, save=due)
            if stopping:
                return
            if saving:
                self._save("last")
                saved_at = time.monotonic()

    def _monitor(self, stop: StopRequested) -> None:
        """After an epoch that asks for it, evaluate the monitored split, and keep the best model where that is allowed.

        A stop leaves the evaluation for the resumed run to make: the epoch's end is saved already.
        """
        state, split, limit = self.state, self.monitored, self.config.run.monitor_limit
        if split is None or not self._evaluation_due:
            return
        limit = None if limit is None or limit >= len(split) else limit
        try:
            chosen_by = result = self._evaluate(split, limit, stop)
            if limit is not None and state.step == state.total_steps:  # `best` is chosen on the same subset throughout
                result = self._evaluate(split, None, stop)
        except _Stopped:
            return
        state.monitored_step = state.step
        self._record(split.name, {k: v for k, v in result.summary().items() if isinstance(v, float | int)})
        summary = chosen_by.summary()
        score = -summary["mse"] if self.config.run.stage == "reconstruction" else summary["accuracy"]
        if self.may_choose and (state.best is None or score > state.best):
            state.best = score
            self._save("best")
        self._save("last")  # the same step, with what the evaluation has added

    def _evaluate(self, split: Signals, limit: int | None, stop: StopRequested) -> Evaluation:
        size, world = self.config.run.eval_batch_size, self.accelerator.num_processes
        rank = self.accelerator.process_index
        batches = split.batches(batch_size=size, rank=rank, world=world, shuffle=limit is not None, seed=MONITOR_SEED)
        if limit is not None:
            batches = share_of_first(batches, limit, size=size, rank=rank, world=world)
        whole = (len(split) if limit is None else limit) // (size * world)  # batches that every rank has a share of
        if world > 1 and self.config.data.on_bad_sample == "skip":
            whole = 0  # a rank whose whole share is bad has a batch less; without counting alike no vote is possible

        def until_stopped() -> Iterator[Batch]:
            for number, batch in enumerate(batches):
                if number < whole and stop.vote(number, self.accelerator.device)[0]:
                    raise _Stopped
                yield batch

        model, precision = self.state.evaluated_model, self.config.run.precision
        return evaluate(model, until_stopped(), precision=precision, whole_signal=False)


def share_of_first(batches: Iterator[Batch], limit: int, *, size: int, rank: int, world: int) -> Iterator[Batch]:
    """A rank's share of the first `limit` samples of an order, from its batches of the whole of it.

    Args:
        size: samples of a batch and rank, dealt out as `Signals.batches` says. Where samples that cannot be used are
            left out of batches, later ones move up.
    """
    for number, batch in enumerate(batches):
        left = limit - number * size * world - rank  # places of the order from this rank's first one on
        if left <= 0:
            return
        kept = min(len(batch), -(-left // world))
        fields = {name: field[:kept] for name, field in vars(batch).items() if field is not None}
        yield Batch(**fields)
