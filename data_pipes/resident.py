"""A split that is decoded once and lies on the device; a batch is a choice of rows."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor

from data_pipes.split import Epoch, Row, Split, as_batch, check_one_size, in_row, replacements
from mwt.errors import InputError
from mwt.structs import Batch


class ResidentSplit(Split):
    """All of another split's samples, read once, in its order."""

    reader = "resident"
    resident = True

    def __init__(self, source: Split) -> None:
        super().__init__(source.info, source.name, device=source.device, workers=source.workers, limit=len(source))
        self.bad, self._source = source.bad, source
        labels = torch.full((len(self),), -1)
        stored: Tensor | None = None
        first: Tensor | None = None
        for position, row in enumerate(source.stored_rows()):
            if row is None:
                continue
            if first is None or stored is None:
                first = row.signal
                stored = first.new_zeros(len(self), *in_row(first).shape)
            check_one_size(first, row)
            stored[position].copy_(in_row(row.signal))
            labels[position] = row.label
        if stored is None:
            raise InputError(f"Split {self.name!r} of {self.info.folder} has no samples that can be used.")
        self._good = labels >= 0
        self._stored = stored.to(self.device)
        self._labels = labels.to(self._stored.device)

    def key(self, position: int) -> str:  # noqa: D102 inherited
        return self._source.key(position)

    def locate(self, position: int) -> dict[str, str | int]:  # noqa: D102 inherited
        return self._source.locate(position)

    def _walk(self, shares: list[range], epoch: Epoch) -> Iterator[Batch]:
        order, all_good = self._good_order(epoch).to(self.device), bool(self._good.all())
        for share in shares:
            positions = order[share.start : share.stop : share.step]
            if not all_good:
                positions = positions[positions >= 0]
            if len(positions):
                signals, labels = self._stored.index_select(0, positions), self._labels.index_select(0, positions)
                yield as_batch(signals, labels, positions)

    def _good_order(self, epoch: Epoch) -> Tensor:
        """The order of an epoch with bad samples replaced, or -1 in their places."""
        order = self.order(epoch)
        for place in (~self._good[order]).nonzero().flatten().tolist():
            others = replacements(int(order[place]), epoch, len(self)) if epoch.whole_batches else iter(())
            order[place] = next((other for other in others if self._good[other]), -1)
        if epoch.whole_batches and bool((order < 0).any()):
            raise InputError(f"Split {self.name!r} of {self.info.folder} has too few samples that can be used.")
        return order

    def _rows(self, shares: list[range], epoch: Epoch, *, workers: int) -> Iterator[Row | None]:
        order = self._good_order(epoch)
        places = chain.from_iterable(shares)
        for position in (int(order[place]) for place in places):
            yield None if position < 0 else self._row(position)

    def _row(self, position: int) -> Row:
        stored = self._stored[position].cpu()
        signal = stored.permute(2, 0, 1) if stored.dtype == torch.uint8 else stored
        return Row(position=position, signal=signal, label=int(self._labels[position]), where=self.key(position))
