"""Making a weight set of a data set: shard after shard, in one or several processes, that stop and go on as asked."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor
from tqdm import tqdm

from data_pipes.augment import augment
from data_pipes.read import Split, open_configured
from data_pipes.weight_manifest import Manifest
from data_pipes.weight_shard import ShardTask
from data_pipes.weight_write import WeightSetWriter
from mwt.config import DataConfig
from mwt.evaluation import networks_psnr
from mwt.runtime import StopRequested
from mwt.structs import Batch
from mwt.weight_space import Weights


class Stopped(Exception):
    """Somebody wants the program to end."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far the fits have come, on a bar, and whether to go on."""

    stop: StopRequested
    bar: tqdm

    def add(self, fits: int) -> None:
        """So many more are done.

        Raises:
            Stopped: a signal has come; the shard that is being filled is left out.
        """
        if self.stop.signal is not None:
            raise Stopped
        if rate := self.bar.format_dict["rate"]:
            self.bar.set_postfix_str(f"{60 * rate:,.0f} fits/minute", refresh=False)
        self.bar.update(fits)


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """The networks of a batch of B signals, as they go into the set."""

    weights: Weights
    losses: Tensor
    """[B, S]: of each fit along its way."""
    steps: Tensor | None = None
    """[B]: that each took, where they differ."""


Fit = Callable[[Batch, str, int, Progress], Fitted]
"""Fits a batch of a split, the copy of that number (0: the signals themselves), and tells the progress."""


def patient_accelerator(*, cpu: bool) -> Accelerator:
    """Processes that wait for each other for a day: shards take minutes, and who has fewer waits for the others."""
    return Accelerator(cpu=cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))])


def make_set(
    writer: WeightSetWriter, data: DataConfig, fit: Fit, accelerator: Accelerator, announce: Callable[[], None]
) -> Manifest | None:
    """Write what is missing of the set, together with the other processes; None in all but the first of them.

    Args:
        announce: says what is about to happen, in the first process; it sees the folder as it was found.

    Raises:
        SystemExit: stopped by a signal, with its exit status.
    """
    rank, world, main = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    with StopRequested() as stop, writer:
        if main:
            announce()
        accelerator.wait_for_everyone()  # the folder is there
        tasks = writer.missing(rank=rank, world=world)
        accelerator.wait_for_everyone()  # all know their share before anybody writes
        total, what = sum(task.count for task in tasks), f"process 1 of {world}" if world > 1 else None
        with tqdm(total=total, unit="fit", desc=what, dynamic_ncols=True, disable=None if main else True) as bar:
            try:
                _write(writer, tasks, data, fit, Progress(stop=stop, bar=bar), accelerator.device)
            except Stopped as error:
                done = len(writer.tasks) - len(writer.missing())
                sys.stderr.write(f"\nStopped; {done} of {len(writer.tasks)} shards of {writer.out} are finished. The "
                                 "same command goes on.\n")  # fmt: skip
                raise SystemExit(stop.exit_status) from error
        accelerator.wait_for_everyone()
        return writer.finish() if main else None


def _write(
    writer: WeightSetWriter, tasks: list[ShardTask], data: DataConfig, fit: Fit, progress: Progress,
    device: torch.device,
) -> None:  # fmt: skip
    description = writer.description
    changes, opened = description.augment, dict[str, Split]()
    for task in tasks:
        if task.split not in opened:
            opened[task.split] = open_configured(data, task.split, device)
        split, found = opened[task.split], 0
        with writer.shard(task) as shard:
            for batch in _signals(split, task):
                found += len(batch)
                keys = [str(split.locate(position).get("key", "")) for position in batch.positions.tolist()]
                for copy in range(1 + task.copies):
                    progress.add(0)
                    seen = batch
                    if copy:
                        kind, seed = changes["kind"], changes["seed"]
                        seen = augment(batch, kind, seed=seed, epoch=copy, padding=changes["padding"])
                    fitted = fit(seen, task.split, copy, progress)
                    quality = networks_psnr(description.layout, writer.stored(fitted.weights), seen)
                    shard.add(
                        fitted.weights, labels=batch.labels, index=batch.positions, psnr=quality,
                        losses=fitted.losses, copy=copy, keys=keys, steps=fitted.steps,
                    )  # fmt: skip
            shard.skipped = task.stop - task.start - found
    for split in opened.values():
        if skipped := split.bad.report():
            sys.stderr.write(f"warning: {skipped}\n")


def _signals(split: Split, task: ShardTask) -> Iterator[Batch]:
    """The signals of a shard, in batches that are the same whoever writes it."""
    for batch in split.batches(batch_size=task.batch, start=task.start // task.batch):
        if int(batch.positions[0]) >= task.stop:
            return
        yield batch
