"""The running means of training, and one step of the outer loop against the same by hand."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from mwt.config import InnerLoopConfig, LossConfig, ModelConfig, OptimConfig, ReaderConfig, SirenConfig
from mwt.errors import TrainingError
from mwt.losses import outer_losses
from mwt.model import MetaWeightTransformer
from mwt.observe import observe
from mwt.optim import clip_gradients, make_optimizer
from mwt.structs import Batch, SignalFacts
from mwt.training import Meter, train_step


def numbers(*values: float) -> list[torch.Tensor]:
    return [torch.tensor(float(v)) for v in values]


def test_means_since_the_last_reading() -> None:
    meter = Meter(torch.device("cpu"))
    meter.add(1, numbers(1, 2, 0, 1, 1, 1))
    meter.add(2, numbers(3, 4, 1, 1, 3, 1))
    assert meter.read() == dict(zip(Meter.NAMES, [2, 3, 0.5, 1, 2, 1], strict=True))
    meter.add(3, numbers(7, 7, 7, 7, 7, 7))
    assert set(meter.read().values()) == {7}


@pytest.mark.parametrize("place", range(len(Meter.NAMES)))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused_and_the_first_such_step_named(place: int, value: float) -> None:
    meter = Meter(torch.device("cpu"))
    bad = [1.0] * len(Meter.NAMES)
    bad[place] = value
    meter.add(1, numbers(*[1.0] * len(bad)))
    meter.check()
    meter.add(2, numbers(*bad))
    meter.add(3, numbers(*[float("nan")] * len(bad)))
    for refuse in (meter.check, meter.read):
        with pytest.raises(TrainingError, match="not finite at step 2") as caught:
            refuse()
        assert "--resume" in str(caught.value)


def test_with_loss_scaling_an_overflowing_gradient_is_only_skipped() -> None:
    meter = Meter(torch.device("cpu"), scaled_loss=True)
    meter.add(1, numbers(1, 1, 1, float("inf"), float("nan"), 1))
    assert meter.read()["classification_loss"] == 1
    meter.add(2, numbers(float("nan"), 1, 1, 1, 1, 1))
    with pytest.raises(TrainingError, match="step 2"):
        meter.check()


def build() -> MetaWeightTransformer:
    torch.manual_seed(4)
    return MetaWeightTransformer(
        ModelConfig(
            siren=SirenConfig(hidden=64, hidden_layers=1), inner_loop=InnerLoopConfig(steps=2, points=6),
            reader=ReaderConfig(blocks=1), loss=LossConfig(),
            signal=SignalFacts(kind="image", channels=1, height=4, width=4, classes=("a", "b")),
        )
    )  # fmt: skip


def test_a_step_by_hand() -> None:
    images = torch.randint(256, (3, 1, 4, 4), dtype=torch.uint8)
    batch = Batch(images=images, labels=torch.tensor([0, 1, 1]), positions=torch.tensor([5, 9, 2]))
    ours, by_hand = build(), build()
    config, meter = OptimConfig(), Meter(torch.device("cpu"))
    train_step(
        ours, batch, step=1, epoch=3, seed=7, inner_loop=ours.config.inner_loop, optimizer=make_optimizer(ours, config),
        clip_norm=1.0, autocast=nullcontext(), backward=torch.Tensor.backward, unscale=lambda: None, meter=meter,
    )  # fmt: skip

    optimizer = make_optimizer(by_hand, config)
    output = by_hand(observe(batch, by_hand.config.inner_loop, seed=7, epoch=3))
    losses = outer_losses(output, batch.labels)
    (losses.classification + losses.reconstruction).backward()
    norms = clip_gradients(optimizer, 1.0)
    optimizer.step()
    for (name, a), b in zip(ours.named_parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(a, b), name
    read = meter.read()
    assert read["classification_loss"] == losses.classification.item()
    assert read["reconstruction_loss"] == losses.reconstruction.item()
    assert [read["norm_siren"], read["norm_alpha"], read["norm_reader"]] == norms.tolist()
    assert read["accuracy"] == pytest.approx((output.logits.argmax(-1) == batch.labels).float().mean().item())
