"""What programs do to their process: allocator, threads, signals, exit status. Importing it changes nothing."""

from __future__ import annotations

import ctypes
import errno
import gc
import importlib.util
import json
import os
import platform
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from mwt.errors import DivergedError, InputError, NotDefinedError, TrainingError

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # glibc's malloc.h
_PR_SET_PDEATHSIG = 1  # Linux's prctl.h


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory instead of handing every large block back to the system.

    With glibc's defaults each large CPU tensor is mapped and unmapped, and a training step spends most of its time in
    page faults. One arena for all threads: those of further threads are unmapped whenever they fall empty, whatever is
    to be kept. Call it before threads allocate. Elsewhere (musl, macOS, Windows) this silently does nothing. Returns
    whether it took effect.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1) and mallopt(_M_ARENA_MAX, 1))


def give_back_freed_memory() -> None:
    """Hand free pages back to the system, those that `keep_freed_memory` keeps too. Only with glibc; else nothing."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def choose_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` as a device.

    Raises:
        InputError: CUDA asked for where there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("run.device is cuda, but torch sees no CUDA device here; use run.device=cpu or auto.")
    return torch.device(name)


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile can work here; where it cannot, one warning says what is missing."""
    missing = []
    compilers = ("CXX", "g++", "clang++") if device.type == "cpu" else ("CC", "gcc", "clang")  # Inductor's; Triton's
    if not (os.environ.get(compilers[0]) or any(map(shutil.which, compilers[1:]))):
        missing.append("a C++ compiler (Debian: apt install g++)" if device.type == "cpu" else "a C compiler (gcc)")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        missing.append("Python's headers (Debian: apt install python3-dev)")
    if missing:
        warnings.warn(f"torch.compile needs {' and '.join(missing)}; going on without it, slower.", stacklevel=2)
    return not missing


ACCELERATE_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
"""What accelerate calls our precisions."""


def check_trackers(trackers: tuple[str, ...]) -> None:
    """Refuse trackers that are not installed; the message says how to get them."""
    for name in trackers:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"run.trackers names {name}, which is not installed: pip install -e '.[{name}]'.")


def check_launcher(precision: str) -> None:
    """The configuration owns what accelerate's launcher could also set: a contradiction is refused, not resolved."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", ACCELERATE_PRECISION[precision]):
        raise InputError(
            f"accelerate was launched with mixed precision {launched!r}, but run.precision is "
            f"{precision!r}; set run.precision, and leave the launcher's at 'no'."
        )
    if os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") != "1":
        raise InputError("Gradient accumulation is set by optim.accumulate; leave the launcher's at 1.")


def end_with_launcher() -> None:
    """Have the system send SIGTERM when `accelerate launch` ends that has started this process alone (Linux).

    It passes no SIGTERM on: a run would go on in the background after its launcher is gone. Launchers of several
    processes (torchrun) pass signals on, and so need nothing.
    """
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


COMPILING_TAKES = 30.0
"""Seconds, about, until all parts are compiled."""
COMPILING_SAVES = 0.15e-9
"""Seconds a step, on a CPU, for each byte that it keeps for its backward pass (docs/performance.md)."""
COMPILE_PAYS_FROM = 500
"""Steps from which it pays on a GPU."""


def compile_pays(choice: str, device: torch.device, steps: int, kept: int) -> bool:
    """Whether to compile `steps` steps: `always`, `never`, or `auto`, where it wins back its time; if it can work.

    Args:
        kept: bytes that a step keeps for its backward pass (`mwt.memory.estimate`); 0 if that is not known. What
            compiling saves on a CPU are passes over such tensors.
    """
    if choice == "never":
        return False
    on_cpu = device.type == "cpu"
    pays = steps * kept * COMPILING_SAVES > COMPILING_TAKES if on_cpu else steps >= COMPILE_PAYS_FROM
    return (choice == "always" or pays) and can_compile(device)


class StopRequested:
    """Turns SIGINT and SIGTERM into a flag, so that a program can save before it ends; a later second SIGINT ends it.

    Use as a context manager; `signal` is the number that arrived, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequested:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        impatient = number == signal.SIGINT == self.signal and time.monotonic() - self._since > 1
        if impatient:  # launchers repeat a signal in another form at once; a person presses Ctrl-C again
            raise KeyboardInterrupt
        if self.signal is None:
            self.signal, self._since = number, time.monotonic()

    def vote(self, step: int, device: torch.device, *, save: bool = False) -> tuple[bool, bool]:
        """Whether to stop after `step`, and whether to save: together, if one of several processes wants to.

        One process decides at once; several ask each other at every eighth step, so that all do the same.
        """
        if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
            return self.signal is not None, save
        if step % 8:
            return False, False
        flags = torch.tensor([self.signal or 0, int(save)], device=device)
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
        number, save = int(flags[0]), bool(flags[1])
        self.signal = number or None
        return self.signal is not None, save

    @property
    def exit_status(self) -> int:
        """130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + (self.signal or signal.SIGINT)


TO_MEND = {errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.EPERM, errno.EIO, errno.EFBIG}
"""Errors of the system that a person can mend: disk full, quota, file size limit, no permission, broken disk."""


NOBODY_READS = 128 + signal.SIGPIPE
"""What a shell says of a program that the signal ends."""


def run_program(main: Callable[[list[str] | None], int | None], argv: list[str] | None = None) -> None:
    """Run a program's `main` and leave with its exit status.

    0 done, 2 bad input, 3 what is asked for is not defined, 4 a fit has diverged, 5 out of memory, 130 Ctrl-C,
    141 nobody reads the output any more (`| head`), 143 SIGTERM, 1 else.

    Errors that a person can mend are one sentence on stderr without a traceback.
    """
    try:
        status = main(argv) or 0
        _leave_process_group()
    except InputError as error:
        status = _complain(str(error), 3 if isinstance(error, NotDefinedError) else 2)
    except TrainingError as error:
        status = _complain(str(error), 4 if isinstance(error, DivergedError) else 1)
    except KeyboardInterrupt:
        status = _complain("interrupted.", 130)
    except OSError as error:
        if error.errno == errno.EPIPE and _nobody_reads():
            status = NOBODY_READS
        elif error.errno in TO_MEND:
            status = _complain(f"{error.strerror}: {error.filename or 'while writing'}.", 2)
        else:
            raise
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        status = _complain(f"out of memory: {(str(error).splitlines() or ['no more can be had'])[0]}", 5)
    if _nobody_reads():
        status = NOBODY_READS
    raise SystemExit(status)


def _leave_process_group() -> None:
    """End the threads by which processes talk (torch.distributed), if there are any, while Python still runs.

    Gloo's threads let go of tensors after a collective operation is done. One that does so while Python ends aborts
    the process (SIGABRT, "terminate called without an active exception"), and the launcher calls a finished run
    failed. Not after an error: the other processes may still wait for this one, and a group is left by all.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()  # a wrapped model in a cycle would keep the group, and so its threads
        torch.distributed.destroy_process_group()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's, that of torch's CPU allocator, or a GPU's."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


def _nobody_reads() -> bool:
    """Whether the reader of stdout (`| head`) is gone; then nothing goes there any more, not even at Python's end."""
    try:
        sys.stdout.flush()  # fails once: what could not be written is then forgotten
        watched = select.poll()
        watched.register(sys.stdout.fileno(), 0)
        gone = any(event & select.POLLERR for _, event in watched.poll(0))
    except BrokenPipeError:
        gone = True
    except (AttributeError, OSError, ValueError):  # no poll on this system; a stdout that is no file
        gone = False
    if gone:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    return gone


def _complain(message: str, status: int) -> int:
    sys.stderr.write(f"error: {message}\n")
    return status


def environment() -> dict[str, Any]:
    """What a result depends on beside the configuration: commit, versions, hardware."""
    import mwt

    source = Path(mwt.__file__).parent
    ours = _git(source, "ls-files", "--error-unmatch", "__init__.py")  # not some project's that has us installed
    names = ("torch", "torchvision", "timm", "accelerate", "webdataset", "numpy", "meta-weight-transformer")
    return {
        "commit": _git(source, "rev-parse", "HEAD") if ours else None,
        "modified": bool(_git(source, "status", "--porcelain", "--untracked-files=no")) if ours else None,
        "source": str(source),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in names},
        "cpu": _cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "command": sys.argv,
    }


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()


def sync(path: Path) -> None:
    """Return only when a file, or the entries of a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that the file is either the old one or the whole new one."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, content: str) -> None:
    """Write a file so that it is either the old one or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
