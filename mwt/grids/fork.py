"""Programs without the seconds that each takes to import torch: one process imports everything and forks the others.

    server = ForkServer(["train.fit"], environment, pass_fds=())
    process = server.start("train.fit", ["--config", "F.yaml"], log=Path("log"))
    process.poll()

Each forked process runs its program as `python -m PROGRAM` would, in a session of its own, with nothing on its
standard input and what it says appended to a log. The server has one thread and never asks for a GPU, so that forking
it is safe. It ends when whoever started it does; programs on their way go on. Linux only: elsewhere libraries do not
survive a fork.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mwt.errors import InputError

PAUSE = 0.02
"""Seconds between looks for processes that have ended."""


class Forked:
    """A forked process, as far as `subprocess.Popen` is asked here."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        self._server, self.pid = server, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit status, negative where a signal ended it; None while it runs."""
        if self.returncode is None:
            self._server.listen(0.0)
        return self.returncode

    def wait(self) -> int:
        """Wait for the end; the exit status."""
        while self.returncode is None:
            self._server.listen(PAUSE)
        return self.returncode


class ForkServer:
    """The process that forks, as its user sees it."""

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str], *, pass_fds: Sequence[int]) -> None:
        """Start it; it imports the modules while its user goes on.

        Args:
            pass_fds: files that forked processes hold open too.
        """
        self._modules = tuple(modules)
        self._processes: dict[int, Forked] = {}
        self._said = b""
        self._started: list[Forked] = []
        self._server = subprocess.Popen(
            [sys.executable, "-m", "mwt.grids.fork", *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(environment),
            start_new_session=True,
            pass_fds=tuple(pass_fds),
        )

    @property
    def ended(self) -> bool:
        """Whether it can fork no more."""
        return self._server.poll() is not None

    def start(self, program: str, words: Sequence[str], *, log: Path) -> Forked:
        """Fork a process that runs `python -m PROGRAM WORDS`.

        Raises:
            InputError: the server has ended, as it does where a module cannot be imported; stderr has its error.
        """
        assert self._server.stdin is not None
        order = {"program": program, "words": list(words), "log": str(log), "cwd": os.getcwd()}
        with suppress(BrokenPipeError):
            self._server.stdin.write(json.dumps(order).encode() + b"\n")
            self._server.stdin.flush()
        while not self._started:
            if not self.listen(1.0):
                raise InputError(
                    f"The process that was to import {', '.join(self._modules)} and fork {program} has ended; its "
                    "error stands above. Without `preload` in the grid's stage, each job imports by itself."
                )
        return self._started.pop()

    def listen(self, seconds: float) -> bool:
        """Take in what the server says within so many seconds. Returns whether it is still there."""
        assert self._server.stdout is not None
        handle = self._server.stdout.fileno()
        if not select.select([handle], [], [], seconds)[0]:
            return True
        said = os.read(handle, 65536)
        if not said:  # it has ended, and nobody can say how those that it forked will
            for process in self._processes.values():
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.returncode = -signal.SIGKILL
            self._processes.clear()
            return False
        *lines, self._said = (self._said + said).split(b"\n")
        for line in lines:
            heard = json.loads(line)
            if "started" in heard:
                process = Forked(self, heard["started"])
                self._processes[process.pid] = process  # its end may stand in the next line
                self._started.append(process)
            else:
                self._processes.pop(heard["ended"]).returncode = heard["status"]
        return True

    def close(self) -> None:
        """End the server; it has nothing to tidy up."""
        self._server.kill()
        self._server.communicate()


# ---- in the process that forks ---------------------------------------------------------------------------------------


def serve(modules: Sequence[str]) -> dict[str, Any]:
    """Import, then fork for each order on stdin. Returns, in each forked process alone, its order."""
    for name in modules:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # so that collecting in a forked process does not copy what it shares
    children: set[int] = set()
    rest = b""
    while True:
        if select.select([0], [], [], PAUSE if children else None)[0]:
            read = os.read(0, 65536)
            if not read:
                os._exit(0)  # whoever started this has ended
            *lines, rest = (rest + read).split(b"\n")
            for line in lines:
                child = os.fork()
                if child == 0:
                    order: dict[str, Any] = json.loads(line)
                    return order
                children.add(child)
                answer({"started": child})
        for child in list(children):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                children.remove(child)
                answer({"ended": child, "status": os.waitstatus_to_exitcode(status)})


def answer(what: dict[str, int]) -> None:
    """One line to whoever has started this."""
    os.write(1, json.dumps(what).encode() + b"\n")


def become(order: dict[str, Any]) -> None:
    """Run the program of an order as if this process had been started for it, and end.

    The interpreter is not taken down, which with all that was imported takes a second: what programs want done at the
    end (`atexit`) is done, and what is buffered is written.
    """
    try:
        status = _run(order)
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _run(order: dict[str, Any]) -> int:
    """The exit status of the program."""
    os.setsid()
    for number, path, flags in ((0, os.devnull, os.O_RDONLY), (1, order["log"], os.O_WRONLY | os.O_APPEND)):
        handle = os.open(path, flags)
        os.dup2(handle, number)
        os.close(handle)
    os.dup2(1, 2)
    os.chdir(order["cwd"])
    fresh_random_numbers()
    sys.argv = [order["program"], *order["words"]]
    sys.modules.pop(order["program"], None)  # it is run as a program, not imported
    try:
        runpy.run_module(order["program"], run_name="__main__", alter_sys=True)
    except SystemExit as left:
        if left.code is None or isinstance(left.code, int):
            return (left.code or 0) & 0xFF
        sys.stderr.write(f"{left.code}\n")
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def fresh_random_numbers() -> None:
    """Seed what a new process would seed from the system; torch's own generator begins with a constant."""
    if "random" in sys.modules:
        sys.modules["random"].seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()


if __name__ == "__main__":
    become(serve(sys.argv[1:]))
