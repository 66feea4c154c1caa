"""Work dealt out to processes; what comes back is in order, so that it does not depend on their number."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import BaseContext
from typing import Any

import torch

from mwt.errors import InputError

_AHEAD = 3
"""Pieces of work that wait for each process; more would only fill the memory."""

_function: Callable[[Any], Any]


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_processes(
    function: Callable[[Any], Any], items: Sequence[Any], *, workers: int, piece: int = 16
) -> Iterator[Any]:
    """`map(function, items)` in `workers` processes that take `piece` items at a time; results in order.

    With `workers` 0 (or nothing to do) it works in this process. `function` and the items are pickled, `function` once
    per process; what it imports only when called it may name in `function.imports`. An exception comes out at its
    place. The processes end with this one, however it ends.

    Raises:
        InputError: a process was killed, most often for want of memory.
    """
    if workers == 0 or not items:
        yield from map(function, items)
        return
    pending: deque[Future[list[Any]]] = deque()
    executor = ProcessPoolExecutor(workers, _context(function), initializer=_begin, initargs=(function,))
    try:
        for start in range(0, len(items), piece):
            pending.append(executor.submit(_run, items[start : start + piece]))
            if len(pending) > _AHEAD * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool as error:
        raise InputError(
            "A worker process was killed, perhaps for want of memory; run the same command with fewer --workers."
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _context(function: Callable[[Any], Any]) -> BaseContext:
    # Never plain forks: a child would inherit torch's threads in whatever state they are. A fork server has none, and
    # imports once what each spawned process would have to import again (seconds).
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    module = getattr(function, "__module__", None) or getattr(getattr(function, "func", None), "__module__", None)
    context.set_forkserver_preload([__name__, module or __name__, *getattr(function, "imports", ())])
    return context


def _begin(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one decides
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])  # a parent that was killed cannot say goodbye
    os._exit(1)


def _run(items: Sequence[Any]) -> list[Any]:
    return [_function(item) for item in items]
