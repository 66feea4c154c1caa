"""The yardstick: a small convolutional network on the images themselves."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from mwt.config import ReaderConfig
from mwt.errors import InputError
from mwt.readers.interface import Reader
from mwt.weight_space import Layout, Weights


class PixelCNN(Reader):
    """What pixels give: `stages` times two 3 x 3 convolutions with batch norm and ReLU, halved between, then a mean.

    It reads images [B, C, h, w] in [-1, 1] where others read weights; train.weights brings the images that the
    networks were fitted to. No published model: it is there to be compared with.

    Parameters: stage s of width w_s = width 2^s on c inputs has 9 c w_s + 2 w_s + 9 w_s^2 + 2 w_s (convolutions
    without bias, batch norm), the logits w K + K.
    """

    reads_images = True

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Sizes."""

        width: int = 32
        """Channels of the first stage; each next one has twice as many."""
        stages: int = 3

    def __init__(self, config: ReaderConfig, *, layout: Layout, classes: int) -> None:
        super().__init__(config, layout=layout, classes=classes)
        layers: list[nn.Module] = []
        inputs = layout.channels
        for stage in range(self.options.stages):
            width = self.options.width * 2**stage
            if stage:
                layers.append(nn.MaxPool2d(2, ceil_mode=True))
            for before in (inputs, width):
                layers += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            inputs = width
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))

    def forward(self, images: Float[Tensor, "B C h w"] | Weights) -> Float[Tensor, "B K"]:
        """Class logits of a batch of images.

        Raises:
            InputError: weights, as end to end.
        """
        if isinstance(images, tuple):
            raise InputError(
                "reader.name=pixel_cnn reads images and not weights; it is for train.weights, which shows it those "
                "that the networks were fitted to."
            )
        return self.layers(images)
