"""Readers that first learn to redraw a field from a code of its weights, and then classify the codes."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mwt.readers.interface import Reader
from mwt.weight_space import Weights, render


class TwoPhaseReader(Reader):
    """An encoder of weights, a decoder of its codes at coordinates, and a classifier of codes.

    A subclass makes `encoder` (weights after `reader.input` -> code), `decoder` (code, coords [P, D] -> values
    [B, P, C]) and `classifier` (code -> logits). Trained end to end, or without a first phase, the decoder rests.
    """

    pretrains = True
    encoder: nn.Module
    decoder: nn.Module
    classifier: nn.Module

    frozen = False

    def encode(self, weights: Weights) -> Tensor:
        """The code of each network of a batch; without a graph where the encoder is frozen."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.encoder(self.inputs(weights))

    def forward(self, weights: Weights) -> Float[Tensor, "B K"]:
        """Class logits of a batch of networks, or of their offsets."""
        return self.classifier(self.encode(weights))

    def pretraining_loss(self, weights: Weights, phi: Weights, coords: Float[Tensor, "P D"]) -> Float[Tensor, ""]:
        """Mean squared error between what the decoder draws and what the networks themselves do.

        Args:
            weights: what the reader reads: whole networks, or their offsets.
            phi: the whole networks.
            coords: where they are compared.
        """
        with torch.no_grad(), torch.autocast(coords.device.type, enabled=False):
            values = render(self.layout, phi, coords)
        return (self.decoder(self.encode(weights), coords).float() - values).square().mean()

    def freeze_encoder(self) -> None:
        """Encoder and decoder learn no more, the running means of the encoder's batch norm included."""
        self.frozen = True
        self.encoder.requires_grad_(False).eval()
        self.decoder.requires_grad_(False)

    def train(self, mode: bool = True) -> TwoPhaseReader:
        """As of any module, but a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self
