"""What is stored -> the signal that is trained on: the one place where each epoch may make a new one of a sample."""

from __future__ import annotations

from torch import Tensor

from data_pipes.schema import DatasetInfo


def is_fixed(info: DatasetInfo) -> bool:
    """Whether a sample's signal is what is stored, in every epoch; a split then may be kept on the device."""
    return True


def signal_of(
    stored: Tensor, info: DatasetInfo, *, seed: int, epoch: int, position: int, jitter: float = 0.0
) -> Tensor:
    """The signal of one decoded sample, a function of (seed, epoch, position) alone; runs in the decoding threads.

    Args:
        stored: uint8 [C, h, w], or float32 [N, D + C], as `data_pipes.decode.decode_sample` gives it.
        info: the data set.
        seed, epoch, position: the address of all randomness in it.
        jitter: standard deviation by which points of a surface are moved (`data_pipes.augment.scale_and_jitter`).

    Returns:
        A tensor of one of the same two forms.
    """
    return stored
