"""The jobs of a grid as processes: started, watched, stopped, and recorded beside their run directories."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from mwt.errors import InputError
from mwt.grids.fork import Forked, ForkServer
from mwt.grids.plan import Job
from mwt.grids.table import read_record
from mwt.runtime import write_json

GRACE = 120.0
"""Seconds that a program has to save and end after SIGTERM before it is killed."""


OUTCOMES = {3: "not defined", 4: "diverged", 5: "out of memory", -signal.SIGKILL: "out of memory"}
"""What exit statuses of the project's programs mean (`mwt.runtime.run_program`). SIGKILL is how a system whose memory
runs out ends the largest process; others are failures."""


@dataclass(kw_only=True)
class Child:
    """A job while it runs."""

    job: Job
    process: subprocess.Popen[bytes] | Forked
    record: dict[str, Any]
    began: float
    late: bool = False
    """Whether it was ended at its limit of time."""

    def outcome(self, status: int, *, stopping: bool) -> str:
        """What its record says once it has ended."""
        if status == 0:
            return "done"
        return "interrupted" if stopping else "out of time" if self.late else OUTCOMES.get(status, "failed")


@dataclass(kw_only=True)
class Runner:
    """Starts jobs, as many at a time as there are slots, and keeps their records."""

    folder: Path
    """Where run directories, logs and records are."""
    slots: int
    lock: int
    """A file that the children hold open too: as long as one of them lives, no other runner may use the folder."""
    waiting: list[Job]
    commit: str = ""
    """Of the programs; goes into the records."""
    children: list[Child] = field(default_factory=list)
    undone: list[Job] = field(default_factory=list)
    """Those that have ended and are not done."""
    counts: Counter[str] = field(default_factory=Counter)
    """How many have ended with which outcome."""
    _servers: dict[tuple[str, ...], ForkServer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for job in self.waiting:  # done before, but what it was made from is made again
            if (record := read_record(self.folder, job)).get("status") == "done":
                write_json(self.folder / f"{job.id}.json", record | {"status": "outdated"})

    def start(self, job: Job) -> None:
        """Start a job, or go on with it."""
        place, record = self.folder / job.id, read_record(self.folder, job)
        words = job.arguments(self.folder)
        outdated = record.get("status") == "outdated"  # what it was made from is another now
        if job.resume and not outdated and (place / job.resume_file).is_file():
            words += job.resume
        elif place.exists():
            shutil.rmtree(place)  # what an interrupted attempt left without a checkpoint
        command = [sys.executable, "-m", job.program, *words]
        path = self.folder / f"{job.id}.log"
        with path.open("ab") as log:
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            process = self._process(job, command, words, path, log)
        record = {
            "status": "running",
            "label": job.label,
            "command": command,
            "pid": process.pid,
            "commit": self.commit,
            "attempts": record.get("attempts", 0) + 1,
            "seconds": record.get("seconds", 0.0) if words[-len(job.resume) :] == list(job.resume) else 0.0,
        }
        write_json(self.folder / f"{job.id}.json", record)
        self.children.append(Child(job=job, process=process, record=record, began=time.monotonic()))

    def _process(
        self, job: Job, command: list[str], words: list[str], path: Path, log: IO[bytes]
    ) -> subprocess.Popen[bytes] | Forked:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = {name: str(max(1, cores // self.slots)) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        environment = threads | dict(os.environ)
        if job.preload and sys.platform == "linux":
            server = self._servers.get(job.preload)
            if server is None or server.ended:  # killed, by a system whose memory ran out, say
                server = self._servers[job.preload] = ForkServer(job.preload, environment, pass_fds=(self.lock,))
            return server.start(job.program, words, log=path)
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C is the runner's to pass on
            pass_fds=(self.lock,),
        )

    def fill(self) -> None:
        """Start what can be started; what needs a job that came to nothing never can."""
        lost = {job.id for job in self.undone}
        for job in list(self.waiting):
            if lost & set(job.needs):
                self.waiting.remove(job)
                lost.add(job.id)
        for job in list(self.waiting):
            if len(self.children) >= self.slots:
                return
            open_ids = {child.job.id for child in self.children} | {other.id for other in self.waiting}
            if not open_ids & set(job.needs):
                self.waiting.remove(job)
                self.start(job)

    def reap(self, *, stopping: bool) -> list[Child]:
        """Records of those that have ended since; returns them. Those beyond their limit of time are ended."""
        for child in self.children:
            if child.job.limit is not None and not child.late and time.monotonic() - child.began > child.job.limit:
                child.late = True
                self._signal(child, signal.SIGKILL)
        ended = [child for child in self.children if child.process.poll() is not None]
        for child in ended:
            status = child.process.returncode
            assert status is not None
            child.record |= {
                "status": child.outcome(status, stopping=stopping),
                "exit": status,
                "seconds": round(child.record["seconds"] + time.monotonic() - child.began, 3),
            }
            if status != 0:
                child.record["said"] = last_line(self.folder / f"{child.job.id}.log")
            write_json(self.folder / f"{child.job.id}.json", child.record)
            self.children.remove(child)
            self.counts[child.record["status"]] += 1
            if child.record["status"] not in ("done", "interrupted"):
                self.undone.append(child.job)
        return ended

    def signal(self, number: int) -> None:
        """Send a signal to all that run, with what they have started."""
        for child in self.children:
            self._signal(child, number)

    def _signal(self, child: Child, number: int) -> None:
        with suppress(ProcessLookupError):
            try:
                os.killpg(child.process.pid, number)
            except ProcessLookupError:  # forked a moment ago, and no session of its own yet
                os.kill(child.process.pid, number)

    def seconds_left(self, durations: dict[str, list[float]]) -> float | None:
        """An estimate from what jobs of the same stage have taken; None while there is nothing to go by."""
        if not any(durations.values()):
            return None
        overall = statistics.fmean([s for times in durations.values() for s in times])
        usual = {stage: statistics.fmean(times) for stage, times in durations.items() if times}
        left = sum(usual.get(job.stage, overall) for job in self.waiting)
        now = time.monotonic()
        for child in self.children:
            left += max(0.0, usual.get(child.job.stage, overall) - (now - child.began))
        return left / self.slots

    def stop(self, since: float | None) -> float:
        """Ask all that run to end, once; kill what has not after GRACE. Returns since when they have been asked."""
        if since is None:
            self.signal(signal.SIGTERM)
            return time.monotonic()
        if time.monotonic() - since > GRACE:
            self.signal(signal.SIGKILL)
        return since

    def kill(self) -> None:
        """End at once whatever still runs."""
        self.signal(signal.SIGKILL)
        for child in self.children:
            child.process.wait()
        self.reap(stopping=True)
        for server in self._servers.values():
            server.close()
        self._servers.clear()


def last_line(log: Path) -> str:
    """What a program said last, without what it had on earlier lines of a progress bar."""
    lines = [line.split("\r")[-1].strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


@contextmanager
def own_folder(out: Path) -> Iterator[int]:
    """A lock on the grid's folder, which the programs it starts inherit.

    Raises:
        InputError: another runner is at work there, or a program that a killed one has left behind.
    """
    handle = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"{out} is in use: another eval.grid runs there, or a program that a killed one has started still "
                f"does{_left_running(out / 'jobs')}. Wait for it, or end it; then the same command goes on."
            ) from error
        yield handle
    finally:
        os.close(handle)


def _left_running(jobs: Path) -> str:
    """Process numbers of what the records say is running."""
    found = [json.loads(path.read_text()) for path in jobs.glob("*.json")]
    running = [record for record in found if record["status"] == "running"]
    return f" (process {', '.join(str(record['pid']) for record in running)})" if running else ""
