"""The outer loop's step, and what it measures, without reading the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mwt.config import InnerLoopConfig
from mwt.errors import TrainingError
from mwt.losses import outer_losses
from mwt.observe import observe
from mwt.optim import clip_gradients
from mwt.structs import Batch, Output


class Meter:
    """Running sums over training steps that stay on the device until `read`, so that logging costs no waiting."""

    NAMES = ("classification_loss", "reconstruction_loss", "accuracy", "norm_siren", "norm_alpha", "norm_reader")

    def __init__(self, device: torch.device, *, scaled_loss: bool = False) -> None:
        """With a scaled loss (fp16) single overflowing gradients are normal: those steps are skipped, not refused."""
        self._checked = 2 if scaled_loss else len(self.NAMES)
        self._sums = torch.zeros(len(self.NAMES), device=device, dtype=torch.float64)
        self._first_bad = torch.full((), torch.iinfo(torch.int64).max, device=device)
        self._steps = 0

    def add(self, step: int, values: list[Tensor]) -> None:
        """The values of NAMES for step number `step`, as scalars on the device."""
        numbers = torch.stack([value.detach().double() for value in values])
        bad = ~numbers[: self._checked].isfinite().all()
        self._first_bad = torch.where(bad, self._first_bad.clamp(max=step), self._first_bad)
        self._sums += numbers.nan_to_num(0.0, 0.0, 0.0)
        self._steps += 1

    def check(self) -> None:
        """Wait for the device and refuse to go on after a loss or gradient that is not finite.

        Raises:
            TrainingError: names the first such step.
        """
        first_bad = self._first_bad.clone()
        if _several_processes():
            torch.distributed.all_reduce(first_bad, op=torch.distributed.ReduceOp.MIN)
        bad = int(first_bad)
        if bad < torch.iinfo(torch.int64).max:
            raise TrainingError(
                f"The loss or its gradient is not finite at step {bad}. The last checkpoint is from before it: go on "
                "from there with --resume run.precision=fp32, or begin a new run with smaller optim.lr_siren, "
                "optim.lr_alpha and optim.lr_reader."
            )

    def read(self) -> dict[str, float]:
        """Means since the last `read`, after a `check`."""
        self.check()
        sums = self.state()["sums"]
        means = [value / max(1, self._steps) for value in sums]
        self._sums.zero_()
        self._steps = 0
        return dict(zip(self.NAMES, means, strict=True))

    def state(self) -> dict[str, Any]:
        """The sums so far, over all processes, for a checkpoint."""
        sums = self._sums.clone()
        if _several_processes():
            torch.distributed.all_reduce(sums)
            sums /= torch.distributed.get_world_size()
        return {"sums": sums.tolist(), "steps": self._steps}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from the sums of a checkpoint."""
        self._sums.copy_(torch.tensor(state["sums"], dtype=torch.float64))
        self._steps = state["steps"]


def _several_processes() -> bool:
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


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
) -> None:
    """One step of the outer loop (paper, algorithm 1, lines 4 to 16): fit, read, one backward pass, clip, update.

    Args:
        forward: the model, compiled or wrapped for several processes or as it is.
        autocast: context manager of the precision.
        backward: `Tensor.backward`, or accelerate's with its loss scaling.
        unscale: takes loss scaling out of the gradients before they are clipped.
    """
    observations = observe(batch, inner_loop, seed=seed, epoch=epoch)
    optimizer.zero_grad(set_to_none=True)
    with autocast:
        output = forward(observations)
    losses = outer_losses(output, batch.labels)
    backward(losses.total)
    unscale()
    norms = clip_gradients(optimizer, clip_norm)
    optimizer.step()
    correct = (output.logits.detach().argmax(-1) == batch.labels).float().mean()
    meter.add(step, [losses.classification, losses.reconstruction, correct, *norms])
