"""Real processes without the seconds that each takes to import torch: one has imported everything and forks the others.

What they do together as ranks of a process group (gloo) is what launchers have them do; launchers themselves are
tested in test_train_many_processes.py.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

PROGRAM = """
import importlib, json, os, signal, sys, time
import torch.distributed, torchmetrics.functional, train.classify
from mwt.runtime import run_program

def become(order, environment):
    said = os.open(order["said"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.environ.update(environment)
    sys.argv[1:] = order["arguments"]
    exec(order["code"], {"__name__": "code"})
    if order["program"]:
        run_program(importlib.import_module(order["program"]).main, order["arguments"])
    raise SystemExit

def end_of(child, deadline):
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)

def answer(what):
    print(json.dumps(what), flush=True)

answer([])
children = []
for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
        deadline = time.monotonic() + order["wait"]
        answer([end_of(child, deadline) for child in children])
        children = []
        continue
    for environment in order["environments"]:
        child = os.fork()
        if child == 0:
            sys.stdin.close()
            become(order, environment)
        children.append(child)
    answer(children)
"""


class Server:
    """Starts programs, one after the other, each in one process or in several that form a process group."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._number = folder, 0
        self._errors = (folder / "errors").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PROGRAM],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"},
        )  # fmt: skip
        self._answer()

    def start(self, *arguments: str, program: str = "train.classify", ranks: int = 1, code: str = "") -> int:
        """The id of the (first) process, which stays valid until `statuses`.

        Args:
            program: the module whose `main` gets the arguments; none if empty.
            code: what each process executes first.
        """
        self._number += 1
        order = {"program": program, "arguments": arguments, "code": code, "said": str(self._said)}
        environments = [rank_environment(rank, ranks) for rank in range(ranks)] if ranks > 1 else [{}]
        if ranks > 1:
            port = str(free_port())
            environments = [environment | {"MASTER_PORT": port} for environment in environments]
        return self._ask({**order, "environments": environments})[0]

    def statuses(self, seconds: float = 120) -> list[int]:
        """Wait for all of them: exit statuses, negative where a signal ended it, as it does after so many seconds."""
        return self._ask({"wait": seconds})

    def status(self, seconds: float = 120) -> int:
        """The same of a single one."""
        [status] = self.statuses(seconds)
        return status

    def run(self, *arguments: str, **options: Any) -> str:
        """Start and wait; all must end with status 0. Returns what they said."""
        self.start(*arguments, **options)
        statuses = self.statuses()
        assert set(statuses) == {0}, (statuses, self.said()[-3000:])
        return self.said()

    def said(self) -> str:
        """Everything that those started last have said, on stdout and stderr."""
        return self._said.read_text() if self._said.exists() else ""

    @property
    def _said(self) -> Path:
        return self._folder / f"{self._number}.said"

    def _ask(self, what: dict[str, Any]) -> list[int]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> list[int]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise RuntimeError(self._errors.read()[-3000:])
        numbers: list[int] = json.loads(line)
        return numbers

    def close(self) -> None:
        """End the process that forks."""
        self._process.kill()  # it has nothing to tidy up, for which it would take seconds
        self._process.communicate()
        self._errors.close()


def rank_environment(rank: int, ranks: int) -> dict[str, str]:
    """What torchrun tells a process on a single machine, but for the port."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
    }  # fmt: skip


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
