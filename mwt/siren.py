"""SIREN (Sitzmann et al. 2020) with weights per signal: a shared base theta plus offsets, one vector a signal.

Facts of the published model (Gielisse and van Gemert, CVPR 2025, and their released code): omega multiplies only the
first layer's pre-activation; the other sine layers are sin(x W + b); the linear head and the output scale are shared
by all signals and never adapted. Coordinates are (y, x), or (x, y, z), in [-1, 1].
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mwt.config import SirenConfig
from mwt.weight_space import Layout, Weights

LayerTensors = list[tuple[Tensor, Tensor]]
"""Weight [..., in, out] and bias [..., out] of each sine layer."""


class SineLayer(nn.Module):
    """The shared part theta of one layer: weight [in, out] and bias [out]."""

    def __init__(self, inputs: int, outputs: int, bound: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(outputs))


class Siren(nn.Module):
    """A field: coordinates in, channels out, with L + 1 sine layers that can differ from signal to signal.

    Initialised as released: first layer U(+-1/in), hidden layers U(+-sqrt(6/in)) without division by omega, biases 0.
    """

    def __init__(self, config: SirenConfig, *, coordinate_dims: int, channels: int) -> None:
        super().__init__()
        hidden = config.hidden
        self.omega = config.omega
        self.hidden = hidden
        self.hidden_layers = config.hidden_layers
        bounds = [(coordinate_dims, 1 / coordinate_dims)] + [(hidden, (6 / hidden) ** 0.5)] * config.hidden_layers
        self.layers = nn.ModuleList(SineLayer(inputs, hidden, bound) for inputs, bound in bounds)
        self.head = nn.Linear(hidden, channels)
        self.out_scale = nn.Parameter(torch.full((channels,), config.out_scale))
        self.compiled = False
        """Whether training goes through torch.compile; see `MetaWeightTransformer.compile_parts`."""

    @property
    def sine_layers(self) -> list[SineLayer]:
        """The layers that are adapted, first to last."""
        return list(self.layers)  # type: ignore[arg-type]

    def muon_parameters(self) -> list[tuple[str, nn.Parameter, str]]:
        """The matrices [in, out] between two sine layers, for `mwt.muon_groups`."""
        hidden = enumerate(self.sine_layers[1:], start=1)
        return [(f"layers.{i}.weight", layer.weight, "in_out") for i, layer in hidden]

    @property
    def adapted_shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the adapted tensors, in the order in which they lie in an offset vector."""
        return [
            (f"layers.{i}.{name}", tuple(p.shape))
            for i, m in enumerate(self.layers)
            for name, p in m.named_parameters()
        ]

    @property
    def adapted_size(self) -> int:
        """W, the length of an offset vector."""
        return sum(p.numel() for p in self.layers.parameters())

    def init_offsets(self, batch_size: int) -> Float[Tensor, "B W"]:
        """Where every fit starts: zero offsets, the base itself."""
        return self.out_scale.new_zeros(batch_size, self.adapted_size)

    def base(self) -> LayerTensors:
        """theta: weight [in, out] and bias [out] of each sine layer, without a batch dimension."""
        return [(layer.weight, layer.bias) for layer in self.sine_layers]

    def unflatten(self, flat: Float[Tensor, "*B W"]) -> LayerTensors:
        """Views of flat vectors as layers: weight [*B, in, out] and bias [*B, out].

        The only place, with `flatten`, that knows the layout: layer by layer, weight row-major, then bias.
        """
        batch = flat.shape[:-1]
        parts = iter(flat.split([p.numel() for p in self.layers.parameters()], dim=-1))
        return [(next(parts).reshape(*batch, *layer.weight.shape), next(parts)) for layer in self.sine_layers]

    def flatten(self, layers: LayerTensors) -> Float[Tensor, "*B W"]:
        """The inverse of `unflatten`."""
        return torch.cat([part for weight, bias in layers for part in (weight.flatten(-2), bias)], dim=-1)

    def adapted(self, offsets: LayerTensors) -> LayerTensors:
        """phi = theta + offsets, layer by layer."""
        return [(w + dw, b + db) for (w, b), (dw, db) in zip(self.base(), offsets, strict=True)]

    @property
    def layout(self) -> Layout:
        """The same network as `mwt.weight_space` sees it."""
        sizes = (self.sine_layers[0].weight.shape[0], *[self.hidden] * (self.hidden_layers + 1), len(self.out_scale))
        return Layout(sizes=sizes, omegas=(self.omega, *[1.0] * self.hidden_layers), shared_output=True)

    def network_weights(self, offsets: Float[Tensor, "B W"], values: Literal["phi", "delta"] = "delta") -> Weights:
        """The networks theta + offsets as `Weights`, output layer times output scale; or their offsets, 0 there.

        Differentiable. The output layer, the same for all, is expanded over the batch, not copied.
        """
        layers = self.unflatten(offsets)
        weight, bias = self.head.weight * self.out_scale[:, None], self.head.bias * self.out_scale
        if values == "phi":
            layers = self.adapted(layers)
        else:
            weight, bias = torch.zeros_like(weight), torch.zeros_like(bias)
        count = len(offsets)
        return Weights(
            (*(w.mT for w, _ in layers), weight.expand(count, -1, -1)),
            (*(b for _, b in layers), bias.expand(count, -1)),
        )

    def forward(
        self, offsets: Float[Tensor, "B W"], coords: Float[Tensor, "P D"] | Float[Tensor, "B P D"]
    ) -> Float[Tensor, "B P C"]:
        """The values of the fields theta + offsets at any coordinates, on the training grid or between its points."""
        return self.render(self.adapted(self.unflatten(offsets)), coords)

    def render(self, layers: LayerTensors, coords: Tensor) -> Tensor:
        """The values at coordinates [P, D] or [B, P, D] of a field with the given sine layers: [..., P, C]."""
        weight, bias = layers[0]
        # Coordinates times omega needs more digits than bf16 has (320 columns, omega 30): always full precision.
        with torch.autocast(coords.device.type, enabled=False):
            hidden = (self.omega * (coords @ weight + bias[..., None, :])).sin()
        for weight, bias in layers[1:]:
            hidden = (hidden @ weight + bias[..., None, :]).sin()
        return self.head(hidden) * self.out_scale
