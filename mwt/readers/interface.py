"""What every weight-space classifier has in common: its options, and what is done to the weights before it reads them.

class MyReader(Reader):
    @dataclass(frozen=True, kw_only=True)
    class Options: width: int = 64                               reader.options.width=...
    def __init__(self, config, *, layout, classes): super().__init__(config, layout=layout, classes=classes) ...
    def forward(self, weights: Weights) -> logits [B, K]:        weights = self.inputs(weights)
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from mwt.config import ReaderConfig
from mwt.config_files import read_options
from mwt.errors import InputError
from mwt.weight_space import Layout, Weights

CONFIG_FILE, TENSORS_FILE = "reader.json", "model.safetensors"

LEAST_STD = 1e-5
"""A weight that varies less over the training split is not scaled: the shared output layer's would give NaN."""


class Standardise(nn.Module):
    """(weight - mean) / std, with the statistics of a training split. They are kept with the reader."""

    mean: Tensor
    std: Tensor

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.register_buffer("mean", torch.full((layout.count,), torch.nan))
        self.register_buffer("std", torch.full((layout.count,), torch.nan))
        self._known = False

    def learn(self, mean: Weights, std: Weights, *, by_layer: bool) -> None:
        """Take the statistics of a training split, each of one network's shapes [1, ...].

        `by_layer` pools them: one mean and one standard deviation for a layer's weights, one for its biases.
        """
        if by_layer:
            second = Weights.unflatten(std.flat() ** 2 + mean.flat() ** 2, self.layout)
            flat_mean, flat_second = (part.map(lambda x: x.mean().expand_as(x)).flat()[0] for part in (mean, second))
            flat_std = (flat_second - flat_mean**2).clamp_min(0).sqrt()
        else:
            flat_mean, flat_std = mean.flat()[0], std.flat()[0]
        self.mean.copy_(flat_mean)
        self.std.copy_(torch.where(flat_std < LEAST_STD, 1.0, flat_std))

    def forward(self, weights: Weights) -> Weights:
        """The same weights, standardised.

        Raises:
            InputError: no statistics have been learned or loaded.
        """
        if not self._known:
            if not bool(self.mean.isfinite().all() & self.std.isfinite().all()):
                raise InputError(
                    "reader.input=standardise needs the mean and deviation of every weight over a training split, and "
                    "there are none: a set of fitted networks brings them (train.weights). End to end, use "
                    "reader.input=scale."
                )
            self._known = True
        means, stds = (Weights.unflatten(x[None], self.layout) for x in (self.mean, self.std))
        return Weights(
            *(
                tuple((x - m) / s for x, m, s in zip(*parts, strict=True))
                for parts in zip(weights, means, stds, strict=True)
            )
        )


def pooled_standardiser(features: int, on: bool) -> nn.Module:
    """Standardises [B, features] over the networks of a batch, in evaluation as the running mean says; or nothing."""
    return nn.BatchNorm1d(features, affine=False) if on else nn.Identity()


class Reader(nn.Module):
    """A weight-space classifier: `forward(weights)` gives the logits [B, K] of B networks of one layout."""

    pretrains = False
    """Whether it has a first phase without labels (`mwt.readers.two_phase`)."""
    memorises = False
    """Whether it keeps the training networks (`memorise`) and learns nothing by gradients."""
    reads_images = False
    """Whether it reads the images that networks were fitted to instead of the networks."""

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """What `reader.options` may hold; a reader with options of its own overrides it."""

    def __init__(self, config: ReaderConfig, *, layout: Layout, classes: int) -> None:
        super().__init__()
        self.config = config
        self.facts: dict[str, Any] = {}
        """What it was trained on, JSON-able: kept with it."""
        self.layout = layout
        self.classes = classes
        self.options: Any = read_options(self.Options, config.options, f"reader.options of {config.name}")
        if not 0 <= (dropout := getattr(self.options, "dropout", 0.0)) < 1:
            raise InputError(f"reader.options.dropout is {dropout}; it must be at least 0 and below 1.")
        self.compiled = False
        """Whether training may go through torch.compile; see `MetaWeightTransformer.compile_parts`."""
        self.input = config.input
        self.scale = config.token_scale
        self.standardise = Standardise(layout) if config.input.startswith("standardise") else None

    def learn_statistics(self, mean: Weights, std: Weights) -> None:
        """Take the statistics of the training split, where this reader's input is standardised; else nothing."""
        if self.standardise is not None:
            self.standardise.learn(mean, std, by_layer=self.input == "standardise_layers")

    def inputs(self, weights: Weights) -> Weights:
        """The weights as `reader.input` asks for them: scaled, standardised or raw. The first line of a `forward`."""
        if self.standardise is not None:
            return self.standardise(weights)
        if self.input == "raw":
            return weights
        if self.scale:
            return weights.map(lambda x: x * self.scale)
        return Weights.unflatten(F.layer_norm(weights.flat(), (self.layout.count,), eps=1e-5), self.layout)

    def forward(self, weights: Weights) -> Float[Tensor, "B K"]:
        """Class logits of a batch of networks, or of their offsets."""
        raise NotImplementedError

    def save_pretrained(self, folder: Path) -> None:
        """Write the reader into a folder, for `mwt.readers.load_reader`."""
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "reader": asdict(self.config), "layout": asdict(self.layout), "classes": self.classes, "facts": self.facts
        }  # fmt: skip
        (folder / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, folder / TENSORS_FILE)
