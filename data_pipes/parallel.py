"""Three ways of being early: decoding in threads, making the next item while this one is used, and copying it to the
device meanwhile.

None changes the order of things, so none changes a result.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from mwt.structs import Batch


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


def copied_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches on `device`, made and copied there in a background thread.

    On CUDA the copies come from pinned memory and run on a stream of their own, beside the computation with earlier
    batches. The device waits for a copy before it uses the batch; the caller waits for nothing.
    """
    if device.type != "cuda":
        yield from prefetch(batch.to(device) for batch in batches)
        return
    stream = torch.cuda.Stream(device)

    def copied() -> Iterator[tuple[Batch, torch.cuda.Event]]:
        for batch in batches:
            pinned = {name: _dense(field).pin_memory() for name, field in _fields(batch)}
            with torch.cuda.stream(stream):
                moved = Batch(**pinned).to(device)
            yield moved, stream.record_event()

    for batch, done in prefetch(copied()):
        user = torch.cuda.current_stream(device)
        user.wait_event(done)
        for _, field in _fields(batch):
            field.record_stream(user)  # the copying stream, which owns the memory, must not have it back too early
        yield batch


def _dense(field: Tensor) -> Tensor:
    """The field, copied if there are gaps in its memory: images may lie with their channels together."""
    return field if field.ndim == 4 and field.is_contiguous(memory_format=torch.channels_last) else field.contiguous()


def _fields(batch: Batch) -> list[tuple[str, Tensor]]:
    return [(name, field) for name, field in vars(batch).items() if isinstance(field, Tensor)]
