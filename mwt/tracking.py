"""metrics.jsonl: one JSON object a line, always written, never torn or doubled by a resume."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any


class MetricsLog:
    """Appends lines to a metrics.jsonl. `position` is what a checkpoint stores; `truncate` returns to it on resume."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("ab", buffering=0)

    @property
    def position(self) -> int:
        """Bytes written so far, all of them on disk."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def truncate(self, position: int) -> None:
        """Forget what was logged after a checkpoint."""
        self._file.truncate(min(position, os.fstat(self._file.fileno()).st_size))
        self._file.seek(0, os.SEEK_END)

    def write(self, *, step: int, epoch: float, split: str, **numbers: float | int) -> None:
        """One line: step, epoch, split, then named numbers.

        Raises:
            OSError: disk full; nothing of the line is then written.
        """
        line = json.dumps({"step": step, "epoch": round(epoch, 4), "split": split, **numbers}).encode() + b"\n"
        before = self._file.tell()
        try:
            if self._file.write(line) < len(line):  # the disk took a part
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self.truncate(before)
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All lines of a metrics.jsonl; a last line that a crash tore is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def last_training_table(path: Path) -> str | None:
    """The last training line of a metrics.jsonl as a table for people; None where there is none."""
    rows = [row for row in read_metrics(path) if "classification_loss" in row]
    if not rows:
        return None
    step, loss, accuracy, mse = (
        rows[-1][key] for key in ("step", "classification_loss", "accuracy", "reconstruction_loss")
    )
    return (
        f"{'step':>8} {'loss':>8} {'accuracy':>9} {'mse':>9}   (the last training batches)\n"
        f"{step:>8} {loss:>8.4f} {accuracy:>9.4f} {mse:>9.5f}"
    )
