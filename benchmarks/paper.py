"""The paper's formulation, as it stands there: the baseline that measurements compare with, and the oracle of tests.

Gielisse and van Gemert (CVPR 2025), algorithm 1, with the choices of their released code: an offset for every image,
inner gradients from `torch.autograd.grad(..., create_graph=True)`, attention by einsum, and two backward passes. It
shares no code with `mwt`; parameters are a plain dict of tensors by name:

    siren.layers.{i}.weight [in, out] and .bias, i = 0 ... L; siren.head.weight [out, in], .bias; siren.out_scale [C];
    alpha.{j} [1, W]; reader.base [1, T, H + 1]; reader.embed.*; reader.blocks.{i}.{norm1, attn.qkv, attn.proj, ls1,
    norm2, mlp.fc1, mlp.fc2, ls2}; reader.logits.*
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Parameters = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the parameters' shapes do not say."""

    omega: float = 10.0
    """Frequency of the first layer; the others have none."""
    steps: int = 6
    """Inner steps; more than there are rates only where one vector of rates is shared."""
    token_scale: float = 500.0
    """lambda; 0 means layer norm over tokens and features together."""
    classification_weight: float = 0.01
    """w_cls; 0 detaches the offsets from the reader."""
    head_dim: int = 64


@dataclass(frozen=True, kw_only=True)
class Result:
    """Everything that one batch gives."""

    offsets: Tensor
    """[B, W]: of each layer the weight [in, out] row by row, then the bias."""
    losses: Tensor
    """[B, S + 1]: before each inner step and after the last."""
    prediction: Tensor
    """[B, P, C] at the points of the final loss."""
    logits: Tensor
    classification_loss: Tensor
    reconstruction_loss: Tensor
    gradients: Parameters
    """Of every parameter, as the optimizer is to see them before clipping."""


def count_layers(parameters: Parameters, prefix: str) -> int:
    """How many numbered layers the names with this prefix have."""
    return len({name.removeprefix(prefix).split(".")[0] for name in parameters if name.startswith(prefix)})


def split_offsets(parameters: Parameters, offsets: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Weight [B, in, out] and bias [B, out] offsets of each sine layer."""
    layers, start = [], 0
    for i in range(count_layers(parameters, "siren.layers.")):
        inputs, outputs = parameters[f"siren.layers.{i}.weight"].shape
        middle, end = start + inputs * outputs, start + inputs * outputs + outputs
        layers.append((offsets[:, start:middle].reshape(-1, inputs, outputs), offsets[:, middle:end]))
        start = end
    return layers


def render(parameters: Parameters, offsets: Tensor, coords: Tensor, omega: float) -> Tensor:
    """Values [B, P, C] of each image's field at its own coordinates [B, P, D]."""
    hidden = coords
    for i, (weight_offset, bias_offset) in enumerate(split_offsets(parameters, offsets)):
        weight = parameters[f"siren.layers.{i}.weight"] + weight_offset
        bias = parameters[f"siren.layers.{i}.bias"] + bias_offset
        before = torch.einsum("bpi,bio->bpo", hidden, weight) + bias.unsqueeze(1)
        hidden = torch.sin(omega * before if i == 0 else before)
    values = torch.einsum("bph,ch->bpc", hidden, parameters["siren.head.weight"]) + parameters["siren.head.bias"]
    return values * parameters["siren.out_scale"]


def mean_squared_error(prediction: Tensor, values: Tensor) -> Tensor:
    """Of each image: mean over points and channels."""
    return ((prediction - values) ** 2).flatten(1).mean(1)


def adapt(parameters: Parameters, coords: Tensor, values: Tensor, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets, losses and final prediction; `coords` [B, S + 1, P, D] and `values` [B, S + 1, P, C]."""
    size = parameters["alpha.0"].shape[1]
    shared = count_layers(parameters, "alpha.") == 1
    offsets = torch.zeros(len(coords), size, dtype=coords.dtype, device=coords.device, requires_grad=True)
    losses = []
    for step in range(settings.steps):
        loss = mean_squared_error(render(parameters, offsets, coords[:, step], settings.omega), values[:, step])
        # The sum over the batch, so that the batch size does not change the inner rate.
        (gradient,) = torch.autograd.grad(loss.sum(), offsets, create_graph=True)
        offsets = offsets - parameters["alpha.0" if shared else f"alpha.{step}"] * gradient
        losses.append(loss)
    prediction = render(parameters, offsets, coords[:, settings.steps], settings.omega)
    losses.append(mean_squared_error(prediction, values[:, settings.steps]))
    return offsets, torch.stack(losses, dim=1), prediction


def make_tokens(parameters: Parameters, offsets: Tensor) -> Tensor:
    """One token for each output neuron of the layers 1 to L: its incoming weights' offsets, then its bias's."""
    layers = split_offsets(parameters, offsets)[1:]
    return torch.cat([torch.cat([weight.transpose(1, 2), bias.unsqueeze(2)], dim=2) for weight, bias in layers], dim=1)


def linear(parameters: Parameters, name: str, x: Tensor) -> Tensor:
    """x W^T + b, or without b where there is none."""
    result = torch.einsum("btf,of->bto", x, parameters[f"{name}.weight"])
    return result + parameters[f"{name}.bias"] if f"{name}.bias" in parameters else result


def layer_norm(parameters: Parameters, name: str, x: Tensor) -> Tensor:
    """Layer norm over features, with the learned gain and bias, epsilon 1e-5."""
    gain, bias = parameters[f"{name}.weight"], parameters[f"{name}.bias"]
    return F.layer_norm(x.to(gain.dtype), x.shape[-1:], gain, bias, eps=1e-5)


def attention(parameters: Parameters, name: str, x: Tensor, head_dim: int) -> Tensor:
    """Multi-head attention; the rows of qkv are [q | k | v], each [heads, head_dim]."""
    batch, tokens, width = x.shape
    query, key, value = linear(parameters, f"{name}.qkv", x).split(width, dim=-1)
    query, key, value = (y.reshape(batch, tokens, width // head_dim, head_dim) for y in (query, key, value))
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(head_dim)
    weights = scores.softmax(-1)
    mixed = torch.einsum("bhqk,bkhd->bqhd", weights, value).reshape(batch, tokens, width)
    return linear(parameters, f"{name}.proj", mixed)


def read(parameters: Parameters, offsets: Tensor, settings: Settings) -> Tensor:
    """Logits [B, K] from offsets [B, W]: pre-norm blocks with LayerScale, mean over tokens, no final norm."""
    x = make_tokens(parameters, offsets) + parameters["reader.base"]
    x = x * settings.token_scale if settings.token_scale else F.layer_norm(x, x.shape[1:], eps=1e-5)
    x = linear(parameters, "reader.embed", x)
    for i in range(count_layers(parameters, "reader.blocks.")):
        name = f"reader.blocks.{i}"
        attended = attention(parameters, f"{name}.attn", layer_norm(parameters, f"{name}.norm1", x), settings.head_dim)
        x = x + parameters[f"{name}.ls1"] * attended
        inner = F.gelu(linear(parameters, f"{name}.mlp.fc1", layer_norm(parameters, f"{name}.norm2", x)))
        x = x + parameters[f"{name}.ls2"] * linear(parameters, f"{name}.mlp.fc2", inner)
    return linear(parameters, "reader.logits", x.mean(1, keepdim=True))[:, 0]


def training_gradients(
    parameters: Parameters,
    coords: Tensor,
    values: Tensor,
    labels: Tensor,
    settings: Settings,
    scale: Callable[[Tensor], Tensor] | None = None,
) -> Result:
    """Algorithm 1 up to the optimizer: fit, read, the two backward passes and their weighted sum (equations 3 to 6).

    Args:
        coords: [B, S + 1, P, D], the points of each inner step and, last, of the final loss.
        values: [B, S + 1, P, C].
        scale: multiplies both losses before their backward passes, as fp16 asks for; the gradients keep the factor.
    """
    parameters = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    fitting = {name: value for name, value in parameters.items() if not name.startswith("reader.")}
    reading = {name: value for name, value in parameters.items() if name.startswith("reader.")}
    offsets, losses, prediction = adapt(parameters, coords, values, settings)
    end_to_end = settings.classification_weight != 0
    logits = read(parameters, offsets if end_to_end else offsets.detach(), settings)
    classification = F.cross_entropy(logits.to(offsets.dtype), labels)
    reconstruction = losses[:, -1].mean()

    # First pass: the classification loss; what it sends to the SIREN's side is scaled afterwards.
    (classification if scale is None else scale(classification)).backward(retain_graph=True)
    for value in fitting.values():
        if value.grad is not None:
            value.grad.mul_(settings.classification_weight)
    # Second pass: the reconstruction loss, on top of it.
    (reconstruction if scale is None else scale(reconstruction)).backward()

    return Result(
        offsets=offsets.detach(),
        losses=losses.detach(),
        prediction=prediction.detach(),
        logits=logits.detach(),
        classification_loss=classification.detach(),
        reconstruction_loss=reconstruction.detach(),
        gradients={
            name: torch.zeros_like(value) if value.grad is None else value.grad
            for name, value in {**fitting, **reading}.items()
        },
    )
