"""Two ways of being early: decoding in threads, and making the next item while this one is used.

Neither changes the order of things, so neither changes a result.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


def ordered_map(function: Callable[[Any], Any], items: Iterable[Any], *, workers: int) -> Iterator[Any]:
    """`map(function, items)` in `workers` threads; results in order, at most a few items per worker held at a time.

    With `workers` 0 it works in the calling thread. An exception of `function` comes out at its item's place.
    """
    if workers == 0:
        yield from map(function, items)
        return
    pending: deque[Future[Any]] = deque()
    executor = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        for item in items:
            pending.append(executor.submit(function, item))
            if len(pending) > 4 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def prefetch(items: Iterator[Any], *, depth: int = 2) -> Iterator[Any]:
    """The same items, made in a background thread up to `depth` ahead of their use.

    An exception in the making comes out at its place. Leaving the loop early ends the thread.
    """
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    stop = threading.Event()

    def put(kind: str, value: Any) -> bool:
        while not stop.is_set():
            try:
                ready.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            for item in items:
                if not put("item", item):
                    return
            put("end", None)
        except BaseException as error:  # handed over to the consumer
            put("error", error)
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                close()

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stop.set()
        thread.join()
