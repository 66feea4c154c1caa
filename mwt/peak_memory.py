"""How much memory a part of a program took at most, however its process was started."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import torch

from mwt.memory import peak
from mwt.runtime import give_back_freed_memory

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """The most bytes since it was made, beyond those held then.

    CUDA: of tensors, torch's own count. Linux: of memory that is not a mapped file. The system's ru_maxrss will not do:
    a forked process has its parent's, a started one that of the process before exec, and libraries that are read page
    by page count as they are touched. Elsewhere it is ru_maxrss nevertheless.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._linux = device.type != "cuda" and sys.platform == "linux"
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        if self._linux:
            give_back_freed_memory()  # what is used again would not count
            with suppress(OSError):  # read-only in some containers: the peak is then that of the whole process
                CLEAR.write_text("5")
        self._before = _kilobytes("RssAnon") * 1024 if self._linux else peak(device)

    def read(self) -> int:
        """Bytes."""
        if not self._linux:
            return max(0, peak(self._device) - self._before)
        return max(0, 1024 * (_kilobytes("VmHWM") - _kilobytes("RssFile") - _kilobytes("RssShmem")) - self._before)


def _kilobytes(name: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    return 0
