"""Samples that cannot be used: the run ends there, or goes on without them, counts them and says which they were.

What takes the place of a skipped sample:

* In training (`drop_last`) every batch has `batch_size` samples on every process, so that none waits for another. With
  random access another sample of the split takes the place, drawn from (seed, epoch, position): the same one however
  many processes and workers there are. In a stream it is the next good sample of the same process, or at the end of an
  epoch the last; a run that goes on where a process has only bad ones left of an epoch is refused.
* In evaluation nothing does: the batch is shorter by one, a batch without samples is left out, and the metrics are
  over exactly the good samples, each once; their number is in the result.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from typing import Any, Literal

import torch

from mwt.errors import InputError

logger = logging.getLogger(__name__)

Policy = Literal["raise", "skip"]
_NAMED = 5  # samples, and shards, that the report at the end names


class BadSamples:
    """The bad samples of a split that this process has come upon, each counted once, in whatever epoch.

    Each process counts its own and holds `max_bad` against them alone; `gather` puts them together for a report.
    Safe to be used from several threads.
    """

    def __init__(self, name: str, count: int, policy: Policy = "raise", max_bad: float = 0.01) -> None:
        self.policy = policy
        self.limit = max(1, int(max_bad * count))
        """The most that are skipped before the run stops."""
        self._name, self._count, self._share = name, count, max_bad
        self._found: dict[int, str] = {}
        self._shards: dict[str, None] = {}
        self._lock = threading.Lock()

    def __contains__(self, position: int) -> bool:
        return position in self._found

    def __len__(self) -> int:
        return len(self._found)

    def add(self, position: int, error: InputError) -> None:
        """Note that the sample at `position` cannot be used; `error` says which it is, in which shard, and why.

        Raises:
            InputError: `error` itself under the policy `raise`; or there are too many.
        """
        self.add_all((position,), error)

    def add_all(self, positions: Iterable[int], error: InputError) -> None:
        """The same for several samples that one error makes useless: the rest of a shard that is cut off, say."""
        if self.policy == "raise":
            raise error
        with self._lock:
            new = [position for position in positions if position not in self._found]
            self._found |= dict.fromkeys(new, str(error))
            number = len(self._found)
        if not new:
            return
        if number > self.limit:
            raise InputError(
                f"Too many bad samples: {number} of the {self._count} of split {self._name!r}, more than "
                f"data.max_bad={self._share:g} allows ({self.limit}); the last: {error} "
                "Check the data with `python -m data_pipes.verify DIR`, or raise data.max_bad."
            ) from error
        logger.warning("skipped%s: %s", f" {len(new)} samples" if len(new) > 1 else "", error)

    def add_shard(self, error: InputError) -> None:
        """Note something wrong with a shard as a whole whose samples can still be tried.

        Raises:
            InputError: `error` itself under the policy `raise`.
        """
        if self.policy == "raise":
            raise error
        with self._lock:
            known = str(error) in self._shards
            self._shards[str(error)] = None
        if not known:
            logger.warning("%s Its samples are used as far as they can be.", error)

    def gather(self) -> None:
        """Take in what the other processes of the group have come upon, so that one of them can report all of it once.

        Every process of the group calls it; nothing happens where there is none.
        """
        if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
            return
        everywhere: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everywhere, (self._found, self._shards))
        with self._lock:
            for found, shards in everywhere:
                self._found |= found
                self._shards |= shards

    def report(self) -> str:
        """What was skipped, and which shards have faults, for the end of a run; empty where there is nothing to say."""
        with self._lock:
            found, shards = sorted(self._found.items()), list(self._shards)
        messages = list(dict.fromkeys(message for _, message in found))
        parts = [
            f"{len(found)} bad samples of the {self._count} of split {self._name!r} were skipped:{_listed(messages)}",
            f"{len(shards)} shards of split {self._name!r} are at fault; their samples were used as far as they could "
            f"be:{_listed(shards)}",
        ]
        return "\n".join(part for part, of in zip(parts, (found, shards), strict=True) if of)


def _listed(messages: list[str]) -> str:
    more = f"\n    … and {len(messages) - _NAMED} more" if len(messages) > _NAMED else ""
    return "".join(f"\n    {message}" for message in messages[:_NAMED]) + more
