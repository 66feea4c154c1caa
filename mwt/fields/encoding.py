"""Encodings: what coordinates become before the first layer of a coordinate network. For D = 1, 2 and 3.

| name        | features                                             | number      | defaults                     |
|-------------|------------------------------------------------------|-------------|------------------------------|
| identity    | x                                                    | D           |                              |
| nerf        | x, then for i < L, for each axis j:                  | D (1 + 2 L) | L 4 (D = 1, 2), 10 (D = 3);  |
|             | sin(2^i pi x_j), cos(2^i pi x_j)                     |             | or floor(log2(samples / 4))  |
| fourier     | sin(2 pi B x), then cos(2 pi B x); B [m, D] fixed,   | 2 m         | m 128, sigma 10 (images);    |
|             | from N(0, sigma^2)                                   |             | 32 and 100 for audio         |
| fourier_kan | LayerNorm(sum over axes j and k = 1..K of            | outputs     | K 270, 128 outputs; a and b  |
|             | a_jk cos(k x_j) + b_jk sin(k x_j), + bias); learned  |             | N(0, 1 / (D K)), bias 0      |

Sources: nerf Mildenhall et al. 2020, in the order of SIREN's code, with its Nyquist rule; fourier Tancik et al. 2020
(the matrix is a buffer: it is saved and moved with the field); fourier_kan Mehrabian et al. 2024 (FKAN). Its lowest
angular frequency is 1, so that it does not repeat itself on [-1, 1].
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mwt.config_checks import require
from mwt.fields.config import EncodingConfig, choose
from mwt.fields.layers import Initializer, Spread


class Encoding(nn.Module):
    """Coordinates [..., P, D] to features [..., P, outputs]."""

    outputs: int
    macs: int = 0
    """Multiply-adds of matrix products for one point."""

    def __init__(self, config: EncodingConfig, coordinate_dims: int, draws: Initializer) -> None:
        super().__init__()


class Identity(Encoding):
    """The coordinates themselves."""

    def __init__(self, config: EncodingConfig, coordinate_dims: int, draws: Initializer) -> None:
        super().__init__(config, coordinate_dims, draws)
        self.outputs = coordinate_dims

    def forward(self, coords: Tensor) -> Tensor:
        """[..., P, D] as it is."""
        return coords


class Nerf(Encoding):
    """Sines and cosines of frequencies that double."""

    def __init__(self, config: EncodingConfig, coordinate_dims: int, draws: Initializer) -> None:
        super().__init__(config, coordinate_dims, draws)
        if config.samples is not None:
            count = int(math.log2(config.samples / 4))
        else:
            count = config.frequencies or (10 if coordinate_dims == 3 else 4)
        self.outputs = coordinate_dims * (1 + 2 * count)
        self.register_buffer("powers", 2.0 ** torch.arange(count), persistent=False)
        self.powers: Tensor

    def forward(self, coords: Tensor) -> Tensor:
        """[..., P, D] to [..., P, D (1 + 2 L)]."""
        angles = math.pi * self.powers[:, None] * coords[..., None, :]
        waves = torch.stack([angles.sin(), angles.cos()], dim=-1)
        return torch.cat([coords, waves.flatten(-3)], dim=-1)


class Fourier(Encoding):
    """Random Fourier features; with copies, each network has a matrix of its own."""

    def __init__(self, config: EncodingConfig, coordinate_dims: int, draws: Initializer) -> None:
        super().__init__(config, coordinate_dims, draws)
        count = config.frequencies or 128
        self.outputs = 2 * count
        self.macs = count * coordinate_dims
        self.register_buffer("matrix", draws.normal(count, coordinate_dims, std=config.sigma or 10.0))
        self.matrix: Tensor

    def forward(self, coords: Tensor) -> Tensor:
        """[..., P, D] to [..., P, 2 m]."""
        angles = 2 * math.pi * (coords @ self.matrix.mT)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class FourierKan(Encoding):
    """One layer of a Fourier KAN, with layer normalisation; all of it learned."""

    def __init__(self, config: EncodingConfig, coordinate_dims: int, draws: Initializer) -> None:
        super().__init__(config, coordinate_dims, draws)
        count = config.frequencies or 270
        self.outputs = config.outputs or 128
        self.macs = 2 * coordinate_dims * count * self.outputs
        spread = Spread("normal", (coordinate_dims * count) ** -0.5)
        self.cosine = nn.Parameter(draws.draw(spread, coordinate_dims * count, self.outputs))
        self.sine = nn.Parameter(draws.draw(spread, coordinate_dims * count, self.outputs))
        self.bias = nn.Parameter(draws.full(0.0, self.outputs))
        self.norm_weight = nn.Parameter(draws.full(1.0, self.outputs))
        self.norm_bias = nn.Parameter(draws.full(0.0, self.outputs))
        self.register_buffer("orders", torch.arange(1.0, count + 1), persistent=False)
        self.orders: Tensor

    def forward(self, coords: Tensor) -> Tensor:
        """[..., P, D] to [..., P, outputs]."""
        angles = (coords[..., None] * self.orders).flatten(-2)
        features = angles.cos() @ self.cosine + angles.sin() @ self.sine + self.bias[..., None, :]
        features = F.layer_norm(features, (self.outputs,))
        return features * self.norm_weight[..., None, :] + self.norm_bias[..., None, :]


ENCODINGS: dict[str, type[Encoding]] = {
    "identity": Identity,
    "nerf": Nerf,
    "fourier": Fourier,
    "fourier_kan": FourierKan,
}


SETTINGS: dict[str, tuple[str, ...]] = {
    "frequencies": ("nerf", "fourier", "fourier_kan"),
    "samples": ("nerf",),
    "sigma": ("fourier",),
    "outputs": ("fourier_kan",),
}
"""Which encodings have a setting."""


def list_encodings() -> list[str]:
    """Names that `encoding.name` accepts."""
    return list(ENCODINGS)


def make_encoding(config: EncodingConfig, coordinate_dims: int, draws: Initializer) -> Encoding:
    """The encoding of a field.

    Raises:
        InputError: an unknown name, or a setting that this encoding does not have.
    """
    kind = choose(ENCODINGS, config.name, "encoding.name")
    for setting, kinds in SETTINGS.items():
        require(
            getattr(config, setting) is None or config.name in kinds,
            f"encoding.{setting} is set, but encoding.name is {config.name}; it is for {' and '.join(kinds)}. Where a "
            f"config file sets it for another encoding: field.mlp.encoding.{setting}=null.",
        )
    return kind(config, coordinate_dims, draws)
