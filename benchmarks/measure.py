"""What the measuring programs share: interleaved timings, the machine's peak, peak memory, child processes, tables."""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch

from mwt import runtime
from mwt.errors import InputError

ROOT = Path(__file__).parents[1]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRODUCT_SIZES = {"cpu": (1024, 2048, 4096), "cuda": (2048, 4096, 8192)}
"""Sides of the square matrices whose product gives the machine's peak: the best of them counts."""

Key = TypeVar("Key", bound=Hashable)


# ---- arguments that the programs share ---------------------------------------------------------------------------


def common_arguments(parser: argparse.ArgumentParser) -> None:
    """--rounds, --device, --threads and --json."""
    parser.add_argument("--rounds", type=int, default=5, help="timings of each; the median counts (default: 5)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads; by default torch's own choice")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def set_up(arguments: argparse.Namespace) -> torch.device:
    """Do to the process what training does: allocator, threads, device.

    Raises:
        InputError: an impossible number of rounds or threads, or no such device.
    """
    for name in ("rounds", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} is {value}; it must be at least 1.")
    runtime.keep_freed_memory()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    return runtime.choose_device(arguments.device)


def parse_list(text: str, allowed: Sequence[str], what: str) -> list[str]:
    """A comma-separated choice out of `allowed`.

    Raises:
        InputError: names what is not among them.
    """
    names = [name for name in text.split(",") if name]
    unknown = [name for name in names if name not in allowed]
    if unknown or not names:
        raise InputError(f"{what} {', '.join(unknown) or '(none given)'}: there are {', '.join(allowed)}.")
    return names


def parse_precisions(text: str, device: torch.device) -> list[str]:
    """Precision names; fp16 on CUDA only, as in training."""
    names = parse_list(text, list(PRECISIONS), "--precision")
    if "fp16" in names and device.type == "cpu":
        raise InputError("--precision fp16 needs a CUDA device; use bf16 or fp32 on the CPU.")
    return names


def parse_integers(text: str, what: str) -> list[int]:
    """Comma-separated positive integers."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise InputError(f"{what} is {text!r}; it takes positive integers with commas between them.")
    return numbers


def machine(device: torch.device) -> str:
    """One line that says what the numbers were measured on."""
    facts = runtime.environment()
    where = facts["gpus"][0] if device.type == "cuda" else f"{facts['cpu']}, {torch.get_num_threads()} thread(s)"
    return f"{where}; torch {torch.__version__}; commit {(facts['commit'] or 'unknown')[:7]}"


# ---- time --------------------------------------------------------------------------------------------------------


def seconds_of(action: Callable[[], object], device: torch.device) -> float:
    """How long one call takes, until the device has done it."""
    _wait(device)
    began = time.perf_counter()
    action()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    actions: dict[Key, Callable[[], object]], *, rounds: int, device: torch.device, warm_up: int = 2
) -> dict[Key, float]:
    """Median seconds of each action over `rounds` rounds, each of which runs all of them in turn.

    A machine that slows down or speeds up in the meantime does so for all alike.
    """
    for action in actions.values():
        for _ in range(warm_up):
            action()
    times: dict[Key, list[float]] = {key: [] for key in actions}
    for _ in range(rounds):
        for key, action in actions.items():
            times[key].append(seconds_of(action, device))
    return {key: median(values) for key, values in times.items()}


# ---- the machine's peak ------------------------------------------------------------------------------------------


class Product:
    """The product of two square matrices, some times over: an action to be timed."""

    def __init__(self, size: int, precision: str, device: torch.device) -> None:
        kind: dict[str, Any] = {"dtype": PRECISIONS[precision], "device": device}
        self._left, self._right = torch.randn(size, size, **kind), torch.randn(size, size, **kind)
        self._out = torch.empty(size, size, **kind)
        # A single one is too short to be timed where it is small, or on a GPU.
        self._times = (1 if size >= 2048 else 8) * (20 if device.type == "cuda" else 1)
        self.gflop = self._times * 2 * size**3 / 1e9

    def __call__(self) -> None:
        """Compute it."""
        for _ in range(self._times):
            torch.mm(self._left, self._right, out=self._out)


def products(precision: str, device: torch.device) -> dict[int, Product]:
    """The products whose best rate is the peak of a precision, to be timed among the rest."""
    return {size: Product(size, precision, device) for size in PRODUCT_SIZES[device.type]}


# ---- memory ------------------------------------------------------------------------------------------------------


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held so far: resident on the CPU, allocated by torch on a GPU.

    Linux lets a child begin with its parent's `ru_maxrss`; VmHWM is the same number without that.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def run_child(
    arguments: Sequence[str], *, processes: int | None = None, environment: dict[str, str] | None = None
) -> dict[str, Any] | None:
    """Run a program of this folder in a process of its own, and read the JSON in the last line that it prints.

    Args:
        arguments: what comes after `python -m`.
        processes: start so many of it by torchrun; None starts one without it.

    Returns:
        None where the system ended the child, which for these programs means too little memory.

    Raises:
        RuntimeError: it failed otherwise; with the end of what it said.
    """
    launcher = []
    if processes is not None:
        launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, *arguments],
        cwd=ROOT, env={**os.environ, **(environment or {})}, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode < 0:
        return None
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        raise RuntimeError(f"python -m {' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(lines[-1])
    return result


# ---- what people read --------------------------------------------------------------------------------------------


Column = tuple[str, str, str]
"""Its head, the key of the rows that it shows, and the format; MiB for a number of bytes."""


def shown(value: Any, form: str) -> str:
    """A value in a format, or a dash for what was not measured."""
    if value is None:
        return "-"
    return f"{value / 2**20:.1f}" if form == "MiB" else f"{value:{form}}"


def table(columns: Sequence[Column], rows: Sequence[dict[str, Any]]) -> str:
    """Columns as wide as they need to be, words to the left, numbers to the right."""
    lines = [""] * (1 + len(rows))
    for head, key, form in columns:
        cells = [head, *(shown(row[key], form) for row in rows)]
        width = max(map(len, cells))
        words = any(isinstance(row[key], str) for row in rows)
        lines = [f"{line}  {cell:{'<' if words else '>'}{width}}" for line, cell in zip(lines, cells, strict=True)]
    return "\n".join(line[2:].rstrip() for line in lines)


def print_json(rows: list[dict[str, Any]]) -> None:
    """The last line of `--json`."""
    print(json.dumps({"rows": rows}))


def progress(message: str) -> None:
    """One line on stderr, so that nobody takes minutes of silence for an end."""
    print(message, file=sys.stderr, flush=True)


def quotient(above: float | None, below: float | None) -> float | None:
    """A ratio, where both were measured."""
    return None if above is None or not below else above / below
