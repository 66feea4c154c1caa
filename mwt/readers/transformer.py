"""The weight-space Transformer of MWT (paper, sections 3.2 and 4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from jaxtyping import Float
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mwt.config import ReaderConfig
from mwt.config_files import read_options
from mwt.errors import InputError
from mwt.readers.interface import Reader
from mwt.tokens import tokens
from mwt.weight_space import Layout, Weights


def _run_block(block: nn.Module, x: Tensor) -> Tensor:
    return block(x)


@cache
def _compiled_block() -> Callable[[nn.Module, Tensor], Tensor]:
    """One block compiled for all: they differ in their parameters only."""
    return torch.compile(_run_block, dynamic=False)


class _Transformer(nn.Module):
    """Pre-norm Transformer over tokens, mean over tokens, linear logits; no class token, no final norm.

    Tokens are shifted by a learned base beta and scaled by lambda (equation 7), or, with `token_scale` 0, normalised
    over tokens and features together.
    """

    compiled: bool

    def build(self, config: ReaderConfig, *, tokens: int, features: int, width: int, classes: int) -> None:
        """Make the parts, for T tokens of F features; for an `__init__`.

        Raises:
            InputError: a width that the heads do not divide.
        """
        if width % config.head_dim:
            divisors = (size for size in range(1, width // 2 + 1) if width % size == 0 and size <= config.head_dim)
            raise InputError(
                f"The Transformer is {width} wide, as the hidden layers that it reads (end to end: siren.hidden), and "
                f"that is not a multiple of the attention's head dimension (reader.head_dim, {config.head_dim}); set "
                f"reader.head_dim={max(divisors, default=1)}, or another divisor of {width}."
            )
        self.token_scale = config.token_scale if config.input == "scale" else 1.0
        self.checkpoint = config.checkpoint
        self.base = nn.Parameter(torch.zeros(1, tokens, features))
        self.embed = nn.Linear(features, width)
        self.blocks = nn.ModuleList(
            Block(
                width,
                width // config.head_dim,
                mlp_ratio=config.mlp_ratio,
                qkv_bias=False,
                init_values=config.layer_scale,
                norm_layer=partial(nn.LayerNorm, eps=1e-5),  # type: ignore[arg-type]  # timm's own default is 1e-6
            )
            for _ in range(config.blocks)
        )
        self.logits = nn.Linear(width, classes)

    def muon_parameters(self) -> list[tuple[str, nn.Parameter, str]]:
        """The matrices of the blocks, for `mwt.muon_groups`; queries, keys and values apart (Jordan et al. 2024)."""
        layouts = {"attn.qkv": "qkv", "attn.proj": "out_in", "mlp.fc1": "out_in", "mlp.fc2": "out_in"}
        return [
            (f"blocks.{i}.{layer}.weight", block.get_parameter(f"{layer}.weight"), layout)
            for i, block in enumerate(self.blocks)
            for layer, layout in layouts.items()
        ]

    def use_fused_attention(self, fused: bool) -> None:
        """Fused attention (`scaled_dot_product_attention`) or plain products: the same result, different speed."""
        for block in self.blocks:
            block.attn.fused_attn = fused  # type: ignore[union-attr]

    def _choose_attention(self, device: torch.device) -> None:
        """Fused, for speed or at equal speed for memory; not in half precision on CPUs, where it is half as fast."""
        half = torch.is_autocast_enabled(device.type) or self.embed.weight.dtype.itemsize <= 2
        self.use_fused_attention(not (half and device.type == "cpu"))

    def read_tokens(self, tokens: Float[Tensor, "B T F"]) -> Float[Tensor, "B K"]:
        """Class logits of a batch of tokenised networks."""
        x = tokens + self.base
        x = x * self.token_scale if self.token_scale else F.layer_norm(x, x.shape[1:], eps=1e-5)
        # Out of half precision at once: the first addition would do it anyway, and torch's layer norm of bf16 on CPUs
        # sums the gradients of its weights in bf16, a quarter off.
        x = self.embed(x).to(self.base.dtype)
        self._choose_attention(x.device)
        training = torch.is_grad_enabled()
        run = _compiled_block() if self.compiled and self.training else _run_block
        for block in self.blocks:
            x = (
                checkpoint(run, block, x, use_reentrant=False, preserve_rng_state=False)
                if self.checkpoint and training
                else run(block, x)
            )
        return self.logits(x.mean(dim=1))


class TransformerReader(Reader, _Transformer):
    """A Transformer over neuron tokens. It reads the hidden layers, which must be equally wide."""

    def __init__(self, config: ReaderConfig, *, layout: Layout, classes: int) -> None:
        super().__init__(config, layout=layout, classes=classes)
        width = layout.hidden[0]
        if len(layout.hidden) < 2 or set(layout.hidden) != {width}:
            raise InputError(
                f"reader.name=transformer reads hidden layers of one width; these networks are {layout}. It takes two "
                "sine layers or more, all equally wide."
            )
        self.build(config, tokens=sum(layout.hidden[1:]), features=width + 1, width=width, classes=classes)

    def forward(self, weights: Weights) -> Float[Tensor, "B K"]:
        """Class logits of a batch of networks, or of their offsets."""
        if self.standardise is not None:
            weights = self.standardise(weights)
        return self.read_tokens(tokens(weights))


class TokenReader(_Transformer):
    """The same Transformer over tokens [B, T, F] of fields that are no plain network (`mwt.model_field`)."""

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """What `reader.options` may hold."""

        width: int | None = None
        """Of the Transformer; null: siren.hidden."""

    def __init__(self, config: ReaderConfig, *, tokens: int, features: int, width: int, classes: int) -> None:
        """For T tokens of F features, `width` wide if the configuration says nothing else.

        Raises:
            InputError: another reader is asked for, or what it does not have.
        """
        super().__init__()
        if config.name not in ("transformer", "wt"):
            raise InputError(
                f"reader.name={config.name} reads the weights of networks; of a field other than field.name=siren "
                "there are tokens, which reader.name=transformer reads."
            )
        if config.input.startswith("standardise"):
            raise InputError(
                f"reader.input={config.input} is for networks; use scale or raw with other fields than siren."
            )
        options = read_options(self.Options, config.options, "reader.options of tokens")
        self.compiled = False
        self.build(config, tokens=tokens, features=features, width=options.width or width, classes=classes)

    def forward(self, tokens: Float[Tensor, "B T F"]) -> Float[Tensor, "B K"]:
        """Class logits of the tokens of a batch."""
        return self.read_tokens(tokens)
