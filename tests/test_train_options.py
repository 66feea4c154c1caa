"""What the options of training do (schedules, micro batches, averaged weights, subsets to monitor), and that each of
them survives an interruption."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import eval.classify
import train.classify as program
from mwt.checkpoint import find_checkpoint
from mwt.errors import InputError
from mwt.outer_loop import share_of_first
from mwt.structs import Batch
from mwt.tracking import read_metrics
from tests.process_state import reset

DIGITS = Path(__file__).parents[1] / "data_pipes" / "builtin" / "digits"
MACHINE = {"images_per_second", "seconds", "peak_memory_gb"}
LONGER = ("data.limit=40", "optim.epochs=2", "run.log_every=1")  # 5 steps an epoch


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits, their test images as a validation split too."""
    folder = tmp_path_factory.mktemp("data") / "digits"
    shutil.copytree(DIGITS, folder)
    info = json.loads((folder / "dataset.json").read_text())
    info["splits"]["val"] = info["splits"]["test"]
    (folder / "dataset.json").write_text(json.dumps(info))
    return folder


def train(run: Path, *arguments: str) -> int:
    reset()
    return program.main(["--debug", f"run.dir={run}", *LONGER, *arguments])


def rows(run: Path, split: str | None = None) -> list[dict[str, Any]]:
    found = [{k: v for k, v in row.items() if k not in MACHINE} for row in read_metrics(run / "metrics.jsonl")]
    return [row for row in found if split in (None, row["split"])]


def tensors(run: Path, file: str = "model") -> dict[str, torch.Tensor]:
    return load_file(find_checkpoint(run) / f"{file}.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Callable[..., Path]:
    """Runs that nothing disturbs, made once for each set of options."""
    made: dict[tuple[str, ...], Path] = {}

    def make(*options: str) -> Path:
        if options not in made:
            made[options] = tmp_path_factory.mktemp("undisturbed") / "run"
            assert train(made[options], f"data.path={data}", *options) == 0
        return made[options]

    return make


OPTIONS = (
    ("optim.schedule=cosine", "optim.warmup=0.3"), ("optim.schedule=constant",), ("optim.accumulate=2",),
    ("optim.ema=0.9", "optim.accumulate=4"), ("run.monitor_limit=7",), ("optim.ema=0.5", "run.monitor_limit=7"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("options", "step"),
    [(OPTIONS[0], 3), (OPTIONS[3], 3), (OPTIONS[-1], 5),
     *(pytest.param(OPTIONS[i], 3, marks=pytest.mark.slow) for i in (1, 2, 4, 5)),
     *(pytest.param(options, 5, marks=pytest.mark.slow) for options in OPTIONS[:-1])],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else f"step {value}",
)  # fmt: skip
def test_interrupted_and_resumed_it_ends_like_an_undisturbed_run(
    tmp_path: Path, data: Path, undisturbed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...], step: int,
) -> None:  # fmt: skip
    """Within an epoch and, step 5, at its end."""
    one, two = undisturbed(*options), tmp_path / "two"

    def vote(stop: Any, number: int, device: Any, *, save: bool = False) -> tuple[bool, bool]:
        if number == step:
            stop.signal = signal.SIGTERM
        return stop.signal is not None, save

    with monkeypatch.context() as patch:
        patch.setattr(program.StopRequested, "vote", vote)
        assert train(two, f"data.path={data}", *options) == 143
    reset()
    assert program.main(["--resume", f"run.dir={two}"]) == 0
    assert rows(one) == rows(two)
    files = [path.stem for path in find_checkpoint(one).glob("*.safetensors")]
    assert ("raw" in files) == any("ema" in option for option in options)
    for file in files:
        assert same(tensors(one, file), tensors(two, file)), file
    assert (one / "checkpoints" / "best.json").read_text() == (two / "checkpoints" / "best.json").read_text()
    assert rows(undisturbed()) != rows(one), "the option did nothing"


def test_micro_batches_change_nothing_but_rounding_and_may_be_changed_by_a_resume(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(whole) == 0
    assert train(parts, "optim.accumulate=4") == 0
    for a, b in zip(rows(whole), rows(parts), strict=True):
        assert b == {k: pytest.approx(v, rel=1e-5, abs=1e-6) if isinstance(v, float) else v for k, v in a.items()}
    theirs = tensors(parts)
    for name, value in tensors(whole).items():
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=1e-6, msg=name)
    reset()
    assert program.main(["--resume", f"run.dir={parts}", "optim.accumulate=1"]) == 0


def test_micro_batches_that_do_not_divide_the_batch_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"batch_size is 8, which 1 process.* times 3 micro batches \(optim\.accum"):
        train(tmp_path / "run", "optim.accumulate=3")
    assert not (tmp_path / "run").exists()


def test_what_is_logged_of_the_rate_follows_the_schedule(tmp_path: Path) -> None:
    for name in ("cosine", "constant"):
        assert train(tmp_path / name, f"optim.schedule={name}", "optim.warmup=0.2") == 0
    rates = {name: [row["lr_siren"] for row in rows(tmp_path / name)] for name in ("cosine", "constant")}
    assert rates["constant"] == pytest.approx([1e-4 * 2 / 3] + 9 * [1e-4])  # of the step to come
    assert rates["cosine"][1] == pytest.approx(1e-4)
    assert rates["cosine"][-1] == pytest.approx(0, abs=1e-18)


def test_the_average_is_monitored_saved_and_evaluated_unless_the_raw_weights_are_asked_for(
    tmp_path: Path, data: Path
) -> None:
    run, plain = tmp_path / "run", tmp_path / "plain"
    options = (f"data.path={data}", "optim.lr_reader=1e-2")
    assert train(run, *options, "optim.ema=0.5") == 0
    assert train(plain, *options) == 0
    assert rows(run, "train") == rows(plain, "train"), "the average entered the training"
    assert same(tensors(run, "raw"), tensors(plain)), "the average entered the training"
    found = {}
    for weights in (None, "ema", "raw"):
        choice = [] if weights is None else ["--weights", weights]
        assert eval.classify.main(["--run", str(run), "--no-curve", "--split", "val", "data.limit=40", *choice]) == 0
        suffix = "_raw" if weights == "raw" else ""
        document = json.loads((run / "eval" / f"classify_val{suffix}_altered.json").read_text())
        found[weights] = document["cross_entropy"]
    assert found[None] == found["ema"] == pytest.approx(rows(run, "val")[-1]["cross_entropy"], rel=1e-5)
    assert found["raw"] == pytest.approx(rows(plain, "val")[-1]["cross_entropy"], rel=1e-5)
    assert found["raw"] != pytest.approx(found["ema"], rel=1e-3)
    with pytest.raises(InputError, match=r"no average of the weights; it was trained without optim\.ema"):
        eval.classify.main(["--run", str(plain), "--no-curve", "--weights", "ema"])


def test_a_subset_is_monitored_always_the_same_and_all_at_the_end(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mwt.outer_loop

    seen: list[list[int]] = []
    evaluate = mwt.outer_loop.evaluate

    def noted(*args: Any, **kwargs: Any) -> Any:
        result = evaluate(*args, **kwargs)
        seen.append(result.positions.tolist())
        return result

    monkeypatch.setattr(mwt.outer_loop, "evaluate", noted)
    options = (f"data.path={data}", "optim.epochs=3", "run.monitor_limit=11", "run.eval_batch_size=4")
    assert train(tmp_path / "run", *options) == 0
    assert train(tmp_path / "other", *options, "run.seed=5") == 0
    for first, second, chosen_by, last in (seen[:4], seen[4:]):
        assert first == second == chosen_by
        assert len(set(first)) == 11
        assert last == list(range(40))
    assert seen[0] == seen[4], "runs of other seeds cannot be compared"
    assert seen[0] != list(range(11))
    assert [row["count"] for row in rows(tmp_path / "run", "val")] == [11, 11, 40]
    assert [row["step"] for row in rows(tmp_path / "run", "val")] == [5, 10, 15]


@pytest.mark.parametrize(("count", "size", "world"), [(10, 2, 1), (10, 2, 2), (11, 2, 3), (5, 4, 3), (3, 4, 2)])
def test_the_ranks_share_the_share_of_first_of_an_order(count: int, size: int, world: int) -> None:
    """Against the definition: global batches of an order, dealt out in turn, then cut."""
    order = torch.randperm(count)
    for limit in range(1, count + 1):
        found = []
        for rank in range(world):
            shares = []
            for first in range(0, count, size * world):
                part = order[first : first + size * world]
                share = part[rank::world]
                if len(share):
                    shares.append(Batch(labels=share, positions=share))
            kept = share_of_first(iter(shares), limit, size=size, rank=rank, world=world)
            found += [position for batch in kept for position in batch.positions.tolist()]
        assert sorted(found) == sorted(order[:limit].tolist())
