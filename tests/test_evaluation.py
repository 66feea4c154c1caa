"""Evaluation: the same numbers whatever the batch size, and each number by another way."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mwt.config import InnerLoopConfig, LossConfig, ModelConfig, ReaderConfig, SirenConfig
from mwt.evaluation import Evaluation, evaluate
from mwt.metrics import psnr
from mwt.model import MetaWeightTransformer
from mwt.observe import observe, whole
from mwt.structs import Batch, SignalFacts

COUNT = 11


def build(points: int | None = None, shared: bool = False, kind: str = "image") -> MetaWeightTransformer:
    return MetaWeightTransformer(
        ModelConfig(
            siren=SirenConfig(hidden=64, hidden_layers=1),
            inner_loop=InnerLoopConfig(steps=2, points=points, shared_alpha=shared),
            reader=ReaderConfig(blocks=1), loss=LossConfig(),
            signal=SignalFacts(kind=kind, channels=1, height=6, width=6, classes=("a", "b", "c")),  # type: ignore[arg-type]
        )
    )  # fmt: skip


@pytest.fixture
def data() -> Batch:
    return Batch(
        images=torch.randint(256, (COUNT, 1, 6, 6), dtype=torch.uint8),
        labels=torch.randint(3, (COUNT,)),
        positions=torch.arange(COUNT),
    )


def cut(batch: Batch, index: torch.Tensor) -> Batch:
    assert batch.images is not None
    return Batch(images=batch.images[index], labels=batch.labels[index], positions=batch.positions[index])


def pieces(batch: Batch, size: int) -> list[Batch]:
    return [cut(batch, part) for part in torch.arange(len(batch)).split(size)]


def assert_alike(one: Evaluation, other: Evaluation) -> None:
    assert torch.equal(one.positions, other.positions)
    assert torch.equal(one.labels, other.labels)
    for name in ("probabilities", "error", "subset_error", "losses"):
        # Batches of other sizes may take other kernels: equal to float32's rounding, not to the bit.
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("points", [None, 7])
def test_it_is_deterministic_and_the_batch_size_does_not_matter(points: int | None, data: Batch) -> None:
    model = build(points)
    first = evaluate(model, [data])
    torch.manual_seed(77)
    again = evaluate(model, [data])
    for name in ("probabilities", "error", "subset_error", "losses"):
        assert torch.equal(getattr(first, name), getattr(again, name)), name
    assert first.summary() == again.summary()
    for size in (1, 4):
        assert_alike(evaluate(model, pieces(data, size)), first)
    assert_alike(evaluate(model, reversed(pieces(data, 3))), first)  # rows come in the order of the split


def test_the_numbers_by_hand(data: Batch) -> None:
    model = build(points=7)
    result = evaluate(model, [data])
    with torch.no_grad():
        seen = observe(data, model.config.inner_loop, seed=0, purpose="evaluate")
        output = model(seen)
        full = whole(data)
        everywhere = psnr(model.siren(output.fit.offsets, full.coords), full.values)
        subset = psnr(output.fit.prediction, seen.at(2)[1])
    torch.testing.assert_close(result.psnr, everywhere)
    torch.testing.assert_close(result.probabilities, output.logits.softmax(-1))
    numbers = result.summary()
    assert numbers["accuracy"] == pytest.approx((output.logits.argmax(-1) == data.labels).sum().item() / COUNT)
    assert numbers["psnr"] == pytest.approx(everywhere.mean().item(), abs=1e-4)
    assert numbers["psnr_subset"] == pytest.approx(subset.mean().item(), abs=1e-4)
    mse = (10 ** (-everywhere.double() / 10)).mean()
    assert numbers["psnr_pooled"] == pytest.approx((-10 * mse.log10()).item(), abs=1e-3)
    assert numbers["cross_entropy"] == pytest.approx(
        torch.nn.functional.cross_entropy(output.logits, data.labels).item(), abs=1e-5
    )
    assert numbers["mse"] == pytest.approx(output.fit.losses[:, -1].mean().item(), rel=1e-5)
    assert numbers["count"] == COUNT
    assert 0 <= numbers["ece"] <= 1


def test_without_subsets_the_two_psnr_are_one(data: Batch) -> None:
    numbers = evaluate(build(), [data]).summary()
    assert numbers["psnr"] == numbers["psnr_subset"]


def test_large_signals_are_measured_in_parts(data: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(points=7)
    expected = evaluate(model, [data]).error
    monkeypatch.setattr("mwt.evaluation.POINTS_AT_ONCE", 5 * COUNT)
    torch.testing.assert_close(evaluate(model, [data]).error, expected)


def test_per_class_counts_and_classes_that_do_not_occur() -> None:
    evaluation = Evaluation(
        classes=("a", "b", "c", "d"),
        positions=torch.arange(4),
        labels=torch.tensor([0, 0, 1, 3]),
        probabilities=torch.eye(4)[[0, 1, 1, 0]],
        error=torch.ones(4), subset_error=torch.ones(4), losses=torch.ones(4, 2),
    )  # fmt: skip
    assert evaluation.per_class() == {
        "a": {"count": 2, "accuracy": 0.5, "precision": 0.5},
        "b": {"count": 1, "accuracy": 1.0, "precision": 0.5},
        "c": {"count": 0, "accuracy": None, "precision": None},
        "d": {"count": 1, "accuracy": 0.0, "precision": None},
    }


@pytest.mark.parametrize("training", [True, False])
def test_the_model_s_mode_and_gradients_are_left_alone(training: bool, data: Batch) -> None:
    model = build().train(training)
    evaluate(model, [data])
    assert model.training == training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_other_numbers_of_steps(data: Batch) -> None:
    model = build(shared=True)
    assert evaluate(model, [data], steps=5).losses.shape == (COUNT, 6)
    assert evaluate(model, [data], steps=1).losses.shape == (COUNT, 2)
    with pytest.raises(ValueError, match="3 inner steps asked for, but rates were learned for 2"):
        evaluate(build(), [data], steps=3)


def test_nothing_to_evaluate_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(build(), [])


@pytest.mark.parametrize("precision", ["bf16"])
def test_lower_precision_gives_float32_results_near_the_full_ones(precision: str, data: Batch) -> None:
    """bf16 has 8 bits: probabilities of an untrained reader stay within 0.05."""
    model = build()
    rounded, full = evaluate(model, [data], precision=precision), evaluate(model, [data])
    assert rounded.probabilities.dtype == rounded.error.dtype == rounded.losses.dtype == torch.float32
    torch.testing.assert_close(rounded.probabilities, full.probabilities, rtol=0, atol=0.05)


def test_evaluation_may_see_more_points_than_training(data: Batch) -> None:
    sparse, full = build(points=7), build()
    full.load_state_dict(sparse.state_dict())
    sparse.config = replace(sparse.config, inner_loop=replace(sparse.config.inner_loop, eval_fraction=1.0))
    for name in ("probabilities", "error", "losses"):
        assert torch.equal(getattr(evaluate(sparse, [data]), name), getattr(evaluate(full, [data]), name))
    assert data.images is not None
    assert sparse.predict(data.images) == full.predict(data.images)
    sparse.config = replace(sparse.config, inner_loop=replace(sparse.config.inner_loop, eval_fraction=None))
    assert not torch.equal(evaluate(sparse, [data]).losses, evaluate(full, [data]).losses)
