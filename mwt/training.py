"""The outer loop's step, and what it measures, without reading the device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from mwt.config import InnerLoopConfig
from mwt.errors import TrainingError
from mwt.losses import outer_losses
from mwt.observe import observe
from mwt.optim import clip_gradients, step_if_finite
from mwt.structs import Batch, Output

PENDING = 1000
"""Steps after which `Meter.full` asks for a look at them: bounds what a meter holds."""


class Meter:
    """Running sums over training steps that stay on the device until `read`, so that logging costs no waiting.

    Steps whose loss or gradient is not finite are left out of the means. `bad_steps` tells which they were.
    """

    NAMES = ("classification_loss", "reconstruction_loss", "accuracy", "norm_siren", "norm_alpha", "norm_reader")

    def __init__(self, device: torch.device, *, scaled_loss: bool = False) -> None:
        """With a scaled loss (fp16) single overflowing gradients are normal: those steps are skipped, not refused."""
        self._checked = 2 if scaled_loss else len(self.NAMES)
        self._sums = torch.zeros(len(self.NAMES) + 1, device=device, dtype=torch.float64)  # and the number of steps
        self._pending: list[tuple[int, Tensor, Tensor | None]] = []  # step, whether it was bad, its samples

    def add(self, step: int, values: list[Tensor], positions: Tensor | None = None) -> None:
        """The values of NAMES for step number `step`, as scalars on the device; `positions` of its samples [B]."""
        numbers = torch.stack([value.detach().double() for value in values])
        good = numbers[: self._checked].isfinite().all()
        counted = torch.cat([numbers.nan_to_num(0.0, 0.0, 0.0), torch.ones_like(numbers[:1])])
        self._sums += torch.where(good, counted, 0.0)
        self._pending.append((step, ~good, positions))

    @property
    def full(self) -> bool:
        """Whether `bad_steps` should be called before further steps are added."""
        return len(self._pending) >= PENDING

    def bad_steps(self) -> dict[int, list[int]]:
        """Wait for the device: the steps since the last call whose loss or gradient was not finite, of any process.

        Each with the positions of the samples of its whole batch, of all processes in their order.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return {}
        flags = torch.stack([bad for _, bad, _ in pending]).int()
        if several_processes():
            torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
        bad = [pending[index] for index in flags.nonzero().flatten().tolist()]
        return {step: [] if positions is None else _of_all_processes(positions) for step, _, positions in bad}

    def check(self) -> None:
        """Wait for the device and refuse to go on after a step that was not finite, where none may be.

        Raises:
            TrainingError: names the first such step.
        """
        for step in self.bad_steps():
            raise TrainingError(f"The loss or its gradient is not finite at step {step}.")

    def read(self) -> dict[str, float]:
        """Means since the last `read`."""
        *sums, steps = self.state()
        self._sums.zero_()
        return dict(zip(self.NAMES, [value / max(1.0, steps) for value in sums], strict=True))

    def state(self) -> list[float]:
        """The sums so far, over all processes, for a checkpoint."""
        sums = self._sums.clone()
        if several_processes():
            torch.distributed.all_reduce(sums)
            sums /= torch.distributed.get_world_size()
        numbers: list[float] = sums.tolist()
        return numbers

    def restore(self, state: list[float]) -> None:
        """Go on from the sums of a checkpoint."""
        self._sums.copy_(torch.tensor(state, dtype=torch.float64))


def several_processes() -> bool:
    """Whether this process trains together with others."""
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def _of_all_processes(positions: Tensor) -> list[int]:
    if not several_processes():
        return positions.tolist()
    shares = [torch.empty_like(positions) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(shares, positions)
    return torch.cat(shares).tolist()


def _micro_batches(batch: Batch, count: int) -> list[Batch]:
    """The batch in `count` parts, in order and as even as it goes; none of them empty."""
    fields = {name: field for name, field in vars(batch).items() if isinstance(field, Tensor)}
    parts = {name: field.tensor_split(min(count, len(batch))) for name, field in fields.items()}
    return [Batch(**dict(zip(parts, values, strict=True))) for values in zip(*parts.values(), strict=True)]


def train_step(
    forward: Callable[..., Output],
    batch: Batch,
    *,
    step: int,
    epoch: int,
    seed: int,
    inner_loop: InnerLoopConfig,
    optimizer: torch.optim.Optimizer,
    clip_norm: float | None,
    autocast: Any,
    backward: Callable[[Tensor], None],
    unscale: Callable[[], None],
    meter: Meter,
    accumulate: int = 1,
    no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """One step of the outer loop (paper, algorithm 1, lines 4 to 16): fit, read, one backward pass, clip, update.

    Where the loss or a gradient is not finite, nothing is updated; the device decides, and nothing waits for it.

    Args:
        forward: the model, compiled or wrapped for several processes or as it is.
        autocast: context manager of the precision.
        backward: `Tensor.backward`, or accelerate's with its loss scaling.
        unscale: takes loss scaling out of the gradients before they are clipped.
        accumulate: micro batches that the batch is computed in, one after the other: less memory, the same gradient.
        no_sync: makes contexts in which a backward pass leaves the gradients in their process.
    """
    optimizer.zero_grad(set_to_none=True)
    parts = _micro_batches(batch, accumulate) if accumulate > 1 else [batch]
    sums = torch.zeros(3, device=batch.labels.device)
    for number, part in enumerate(parts, start=1):
        share = len(part) / len(batch)
        observations = observe(part, inner_loop, seed=seed, epoch=epoch)
        with no_sync() if number < len(parts) else nullcontext():
            with autocast:
                output = forward(observations)
            losses = outer_losses(output, part.labels)
            # A loss that is not finite makes every gradient NaN (else the factor is 1): all processes then know.
            backward(losses.total * (losses.total.detach() * 0 + 1) * share)
        correct = (output.logits.detach().argmax(-1) == part.labels).float().mean()
        sums += torch.stack([losses.classification.detach(), losses.reconstruction.detach(), correct]) * share
    unscale()
    norms = clip_gradients(optimizer, clip_norm)
    step_if_finite(optimizer, norms)
    meter.add(step, [*sums, *norms], batch.positions)
