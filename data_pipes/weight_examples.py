"""A split of a weight set as a reader reads it: offsets or whole networks, or the images that they were fitted to."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from data_pipes.read import open_split
from data_pipes.weight_moments import Moments
from data_pipes.weights import WeightSet, load_weight_set
from mwt.errors import InputError
from mwt.memory import available, readable
from mwt.observe import pixels
from mwt.reader_training import Examples, Sample
from mwt.rng import permutation
from mwt.weight_space import Weights
from mwt.weights_config import WeightsConfig

SHARE = 0.5
"""Of the memory that is left, what a split may take: the training needs some too."""


class Part:
    """A split of the set on the device, as a reader reads it."""

    def __init__(self, config: WeightsConfig, split: str, device: torch.device, *, images: bool) -> None:
        """Read it.

        Args:
            images: the reader reads what the networks were fitted to.
        """
        self.set: WeightSet = load_weight_set(config.data.path, split, config.data.values).mapped(device)
        self.split, self.device = split, device
        need, room = self.set.resident_bytes, available(device)
        self.held = f"{readable(need)} of networks"
        """Where they are, in words."""
        if images:
            self.held += ", of which none is read"
        elif room is None or need <= SHARE * room:
            self.set = self.set.resident(device)
            self.held += " kept in memory"
        else:
            self.held += f" are more than {SHARE:.0%} of the memory that is left: read from their files as needed"
        if room is not None:
            self.held += f", {readable(room)} available before"
        self.images = self._images(config) if images else None
        self._labels, self._index = self.set.column("label"), self.set.column("index")

    def _images(self, config: WeightsConfig) -> Tensor:
        """The signals that the networks show, [n, C, h, w] in [-1, 1], by their place in the split."""
        path = config.data.images or str(self.set.manifest.source.get("path", ""))
        if not path:
            raise InputError(
                f"reader.name={config.reader.name} reads images, and {self.set.path} does not say which its networks "
                "were fitted to; name their data set with data.images."
            )
        source = open_split(path, self.split, device=self.device, reader="resident")
        found, labels = [], []
        for batch in source.batches(batch_size=1024):
            if batch.images is None:
                raise InputError(f"reader.name={config.reader.name} reads images; {path} holds point sets.")
            found.append(pixels(batch.images).mT.unflatten(2, batch.images.shape[-2:]))
            labels.append(batch.labels)
        images, index = torch.cat(found), self.set.column("index")
        if len(images) <= int(index.max()):
            raise InputError(
                f"{path} has {len(images)} images in {self.split!r}, fewer than the networks of {self.set.path} were "
                "fitted to; name their data set with data.images."
            )
        if not torch.equal(torch.cat(labels)[index], self.set.column("label")):
            raise InputError(
                f"The images of {path} have other labels in {self.split!r} than the networks of {self.set.path}: they "
                "are not those that these were fitted to. Name their data set with data.images."
            )
        return images

    def read(self, places: Tensor, *, whole: bool = False) -> Sample:
        """The networks at places of the split; with `whole`, phi beside what is read."""
        if self.images is not None:
            places = places.to(self.device)
            return Sample(self.images[self._index[places]], self._labels[places])
        batch = self.set.batch(places)
        return Sample(batch.weights, batch.labels, self.phi(batch.weights) if whole else None)

    def phi(self, weights: Weights) -> Weights:
        """The whole networks."""
        if self.set.values == "phi":
            return weights
        assert self.set.base is not None, "offsets have a base"
        return combine(weights, self.set.base, 1)

    def delta(self, phi: Weights) -> Weights:
        """What the reader reads of whole networks."""
        if self.set.values == "phi":
            return phi
        assert self.set.base is not None, "offsets have a base"
        return combine(phi, self.set.base, -1)

    def statistics(self, places: Tensor) -> tuple[Weights, Weights]:
        """Mean and deviation of every weight over these networks, each [1, …]: the set's own where it is these."""
        if len(places) == len(self.set) and self.split == self.set.manifest.statistics["split"]:
            return self.set.statistics()
        moments = [Moments.of(self.set.batch(some).weights.flat()) for some in places.split(256)]
        total = sum(moments[1:], start=moments[0])
        mean, std = (Weights.unflatten(x[None].float(), self.set.layout) for x in (total.mean, total.std))
        return mean, std

    def examples(self, places: Tensor, *, name: str, whole: bool = False) -> Examples:
        """Some networks of the split."""
        return Examples(name=name, places=places, read=partial(self.read, whole=whole), held=self.held)


def combine(x: Weights, y: Weights, sign: int) -> Weights:
    """x + sign y."""
    return Weights(*(tuple(a + sign * b for a, b in zip(*parts, strict=True)) for parts in zip(x, y, strict=True)))


def choose_networks(config: WeightsConfig, part: Part) -> tuple[Tensor, Tensor]:
    """Places of the networks to train on, and of those held out: all networks of a signal are on one side."""
    data, copies, index = config.data, part.set.column("copy").cpu(), part.set.column("index").cpu()
    most = 0 if part.images is not None else data.copies
    kept = torch.ones_like(copies, dtype=torch.bool) if most is None else copies <= most
    signals = index.unique()
    order = signals[permutation(len(signals), seed=config.run.seed, purpose="holdout")]
    held = torch.isin(index, order[: round(data.holdout * len(signals))])
    train, val = (kept & ~held).nonzero().flatten(), ((copies == 0) & held).nonzero().flatten()
    return train[: data.limit], val[: data.limit]
