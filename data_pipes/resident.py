"""A split that is decoded once and lies on the device; a batch is a choice of rows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from data_pipes.parallel import copied_ahead, ordered_map
from data_pipes.signals import is_fixed
from data_pipes.split import Epoch, Row, Split, as_batch, batch_of, check_one_size, in_row, replacements
from mwt.errors import InputError
from mwt.structs import Batch


class ResidentSplit(Split):
    """All of another split's samples, read once, in its order.

    Where each epoch makes new signals of what is stored (`data_pipes.signals`), what is stored stays on the CPU.
    """

    reader = "resident"

    def __init__(self, source: Split) -> None:
        super().__init__(source.info, source.name, device=source.device, workers=source.workers, limit=len(source))
        self.bad, self._source = source.bad, source
        self._fixed = is_fixed(self.info)
        self.resident = self._fixed
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
        self._stored = stored.to(self.device) if self._fixed else stored
        self._labels = labels.to(self._stored.device)

    def key(self, position: int) -> str:  # noqa: D102 inherited
        return self._source.key(position)

    def _walk(self, shares: list[range], epoch: Epoch) -> Iterator[Batch]:
        order = self._good_order(epoch)
        if not self._fixed:
            return copied_ahead(self._fresh(shares, order, epoch), self.device)
        return self._chosen(shares, order.to(self.device))

    def _good_order(self, epoch: Epoch) -> Tensor:
        """The order of an epoch with bad samples replaced, or -1 in their places."""
        order = self.order(epoch)
        for place in (~self._good[order]).nonzero().flatten().tolist():
            others = replacements(int(order[place]), epoch, len(self)) if epoch.whole_batches else iter(())
            order[place] = next((other for other in others if self._good[other]), -1)
        if epoch.whole_batches and bool((order < 0).any()):
            raise InputError(f"Split {self.name!r} of {self.info.folder} has too few samples that can be used.")
        return order

    def _positions(self, share: range, order: Tensor) -> Tensor:
        positions = order[share.start : share.stop : share.step]
        return positions if bool(self._good.all()) else positions[positions >= 0]

    def _chosen(self, shares: list[range], order: Tensor) -> Iterator[Batch]:
        for share in shares:
            positions = self._positions(share, order)
            if len(positions):
                yield as_batch(
                    self._stored.index_select(0, positions), self._labels.index_select(0, positions), positions
                )

    def _fresh(self, shares: list[range], order: Tensor, epoch: Epoch) -> Iterator[Batch]:
        for share in shares:
            positions = self._positions(share, order).tolist()
            if positions:
                rows = ordered_map(partial(self._row, epoch=epoch), positions, workers=self.workers)
                yield batch_of(list(rows))

    def _rows(self, shares: list[range], epoch: Epoch, *, workers: int) -> Iterator[Row | None]:
        order = self._good_order(epoch)
        places = chain.from_iterable(shares)
        for position in (int(order[place]) for place in places):
            yield None if position < 0 else self._row(position, epoch)

    def _row(self, position: int, epoch: Epoch) -> Row:
        stored = self._stored[position].cpu()
        stored = stored.permute(2, 0, 1) if stored.dtype == torch.uint8 else stored
        signal = self._signal(stored, position, epoch)
        return Row(position=position, signal=signal, label=int(self._labels[position]), where=self.key(position))
