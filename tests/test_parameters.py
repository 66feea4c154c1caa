"""Numbers of parameters beside those that the paper prints (thousands cut off, millions rounded to one decimal)."""

from __future__ import annotations

import pytest
import torch

from mwt.config import InnerLoopConfig, LossConfig, ModelConfig, ReaderConfig, SirenConfig
from mwt.model import MetaWeightTransformer
from mwt.structs import SignalFacts

# (table, what varies, width, hidden layers, k, shared alpha, blocks, classes, channels, SIREN + alpha, Transformer)
ROWS = [
    ("4", "default", 128, 4, 6, False, 10, 10, 3, "465K", "1.1M"),
    ("4", "k = 1", 128, 4, 1, False, 10, 10, 3, "133K", "1.1M"),
    ("4", "k = 2", 128, 4, 2, False, 10, 10, 3, "199K", "1.1M"),
    ("4", "k = 4", 128, 4, 4, False, 10, 10, 3, "332K", "1.1M"),
    ("4", "k = 8", 128, 4, 8, False, 10, 10, 3, "598K", "1.1M"),
    ("4", "k = 10", 128, 4, 10, False, 10, 10, 3, "731K", "1.1M"),
    ("4", "SIREN depth 2", 128, 2, 6, False, 10, 10, 3, "234K", "1.0M"),
    ("4", "SIREN depth 6", 128, 6, 6, False, 10, 10, 3, "696K", "1.1M"),
    ("4", "SIREN depth 8", 128, 8, 6, False, 10, 10, 3, "927K", "1.1M"),
    ("4", "width 64", 64, 4, 6, False, 10, 10, 3, "118K", "273K"),
    ("4", "width 256", 256, 4, 6, False, 10, 10, 3, "1.8M", "4.3M"),
    ("4", "5 blocks", 128, 4, 6, False, 5, 10, 3, "465K", "581K"),
    ("4", "15 blocks", 128, 4, 6, False, 15, 10, 3, "465K", "1.6M"),
    ("4", "20 blocks", 128, 4, 6, False, 20, 10, 3, "465K", "2.1M"),
    ("4", "shared alpha", 128, 4, 6, True, 10, 10, 3, "133K", "1.1M"),
    ("5", "WT, CIFAR-10", 128, 4, 6, False, 10, 10, 3, "465K", "1.1M"),
    ("2", "MWT, Imagenette", 128, 4, 4, False, 10, 10, 3, "332K", "1.1M"),
    ("2", "MWT-L, Imagenette", 256, 4, 4, False, 10, 10, 3, "1.3M", "4.3M"),
    ("3", "MWT-L, ImageNet", 256, 4, 4, False, 10, 1000, 3, "1.3M", "4.5M"),
]


def as_printed(count: int) -> str:
    return f"{count // 1000}K" if count < 1_000_000 else f"{count / 1e6:.1f}M"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"table {row[0]}: {row[1]}")
def test_parameter_counts_are_the_paper_s(row: tuple) -> None:
    _, _, width, depth, steps, shared, blocks, classes, channels, field, transformer = row
    with torch.device("meta"):
        model = MetaWeightTransformer(
            ModelConfig(
                siren=SirenConfig(hidden=width, hidden_layers=depth),
                inner_loop=InnerLoopConfig(steps=steps, shared_alpha=shared),
                reader=ReaderConfig(blocks=blocks),
                loss=LossConfig(),
                signal=SignalFacts(
                    kind="image", channels=channels, height=32, width=32, classes=tuple(map(str, range(classes)))
                ),
            )
        )
    counts = {name: sum(p.numel() for p in group) for name, group in model.parameter_groups().items()}
    assert as_printed(counts["siren"] + counts["alpha"]) == field
    assert as_printed(counts["reader"]) == transformer
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())  # no parameter without a group


def test_the_count_that_the_released_code_prints() -> None:
    """465,414: 7 x 66,432 adapted weights (base and six rates), a head of 387 and an output scale of 3."""
    width, depth, steps, dims, channels = 128, 4, 6, 2, 3
    adapted = dims * width + width + depth * (width * width + width)
    assert adapted == 66_432
    assert adapted * (1 + steps) + width * channels + channels + channels == 465_414
    assert as_printed(465_414) == "465K"
