"""Ranks of one training, real processes each: damaged data, stages, numbers that are not finite, a resumption with more
or fewer of them, and subsets to monitor come out as in one process."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipes.decode import encode_png
from data_pipes.write import Sample, write_dataset
from mwt.structs import SignalFacts
from tests.fork_server import Server
from tests.runs import check_alike, last_step, rows, tensors

TWENTY = ("--debug", "data.limit=80", "optim.epochs=2", "data.monitor_split=test")
"""20 steps of 8 signals, each step of the inner loop on 16 of 64 points."""
FACTS = SignalFacts(kind="image", channels=1, height=8, width=8, classes=tuple("abcde"))
COUNTS = {"train": 42, "val": 20}
BAD = {"train": (5, 17, 30), "val": (0, 3, 6, 19)}
"""Positions of damaged images. Of three processes that evaluate two at a time, one finds none good at first."""

# Notes the positions of all batches that a process trains on or evaluates.
NOTING = """
import json, os, mwt.evaluation, mwt.training
from torch._subclasses.fake_tensor import FakeTensor

def noting(module):
    observe = module.observe
    def noted(batch, *args, **kwargs):
        if not isinstance(batch.positions, FakeTensor):  # those are of the memory estimate
            line = [module.__name__, kwargs.get("epoch", 0), batch.positions.tolist()]
            with open(f"{NOTES}-{os.environ.get('RANK', 0)}", "a") as file:
                file.write(json.dumps(line) + "\\n")
        return observe(batch, *args, **kwargs)
    module.observe = noted

noting(mwt.evaluation)
noting(mwt.training)
"""


# Fields, their fits and all parameters in float64, where only differences in what is computed are larger than 1e-12. In
# float32 the third of a gradient is rounded, and Adam makes of a gradient near 0 a step of the rates' large size.
DOUBLE = """
import torch, mwt.evaluation, mwt.training
from dataclasses import replace

torch.set_default_dtype(torch.float64)

def in_double(module):
    observe = module.observe
    def seen(*args, **kwargs):
        found = observe(*args, **kwargs)
        return replace(found, coords=found.coords.double(), values=found.values.double())
    module.observe = seen

in_double(mwt.evaluation)
in_double(mwt.training)
"""


def noting(notes: Path) -> str:
    return f"NOTES = {str(notes)!r}\n{NOTING}"


def noted(notes: Path, module: str) -> list[list[tuple[int, list[int]]]]:
    """Of each rank, the epochs and positions of its batches."""
    ranks = []
    for file in sorted(notes.parent.glob(f"{notes.name}-*")):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        ranks.append([(epoch, positions) for name, epoch, positions in lines if name == module])
    return ranks


# ---- damaged data ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards in which some images cannot be decoded."""
    out = tmp_path_factory.mktemp("damaged") / "data"
    source = np.random.default_rng(0)
    splits = {}
    for name, count in COUNTS.items():
        images = torch.from_numpy(source.integers(0, 256, (count, 1, 8, 8), dtype=np.uint8))
        splits[name] = [
            Sample(extension="png", data=b"no image" if i in BAD[name] else encode_png(images[i]), label=i % 5)
            for i in range(count)
        ]
    write_dataset(out, name="t", facts=FACTS, licence="", splits=splits, shard_bytes=8000)
    return out


def train_on_damaged(server: Server, damaged: Path, out: Path, reader: str, ranks: int) -> Path:
    run = out / f"run{ranks}"
    server.run(
        "--debug", f"run.dir={run}", f"data.path={damaged}", "data.limit=null", "data.batch_size=6", "optim.epochs=2",
        "data.on_bad_sample=skip", "data.max_bad=0.5", f"data.reader={reader}", "run.eval_batch_size=2",
        code=noting(out / f"notes{ranks}"), ranks=ranks,
    )  # fmt: skip
    return run


@pytest.mark.parametrize(
    "reader",
    ["indexed", pytest.param("resident", marks=pytest.mark.slow), pytest.param("stream", marks=pytest.mark.slow)],
)
def test_damaged_samples_are_skipped_and_counted_once(
    damaged: Path, tmp_path: Path, server: Server, reader: str
) -> None:
    """Three processes: whole batches of good samples in training, in evaluation each good sample once."""
    run = train_on_damaged(server, damaged, tmp_path, reader, ranks=3)
    good = {name: set(range(count)) - set(BAD[name]) for name, count in COUNTS.items()}
    batches = noted(tmp_path / "notes3", "mwt.training")
    for epoch in range(2):
        seen = Counter(p for rank in batches for number, positions in rank if number == epoch for p in positions)
        assert set(seen) == good["train"]
        assert seen.total() == COUNTS["train"]  # those that take the places of three come twice
    assert {len(positions) for rank in batches for _, positions in rank} == {2}
    evaluated = Counter(p for rank in noted(tmp_path / "notes3", "mwt.evaluation") for _, ps in rank for p in ps)
    assert evaluated == dict.fromkeys(good["val"], 2)  # once after each epoch
    assert [row["count"] for row in rows(run) if row["split"] == "val"] == [len(good["val"])] * 2
    said = server.said()
    for name, count in COUNTS.items():
        report = f"warning: {len(BAD[name])} bad samples of the {count} of split '{name}' were skipped:"
        assert said.count(report) == said.count(f"of split '{name}' were skipped:") == 1, said
    if reader != "stream":  # there it is the next good sample of the same process
        check_alike(train_on_damaged(server, damaged, tmp_path, reader, ranks=1), run)


# ---- stages ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_stages_one_after_the_other_come_out_as_in_one_process(tmp_path: Path, server: Server) -> None:
    """Only the SIREN learns and then only the reader, whose gradients alone are exchanged."""
    for ranks in (1, 2):
        first, second = tmp_path / f"reconstruction{ranks}", tmp_path / f"classifier{ranks}"
        server.run(*TWENTY, "run.stage=reconstruction", f"run.dir={first}", ranks=ranks)
        server.run(*TWENTY, "run.stage=classifier", f"run.init_from={first}", f"run.dir={second}", ranks=ranks)
        trained, read = tensors(first), tensors(second)
        for name, value in trained.items():
            assert torch.equal(read[name], value) == (not name.startswith("reader")), name
    for stage in ("reconstruction", "classifier"):
        check_alike(tmp_path / f"{stage}1", tmp_path / f"{stage}2")


# ---- not finite --------------------------------------------------------------------------------------------------

NONFINITE = """
import os, mwt.training
from torch._subclasses.fake_tensor import FakeTensor
from mwt.observe import observe

def poisoned(batch, *args, **kwargs):
    seen = observe(batch, *args, **kwargs)
    calls.append(not isinstance(batch.labels, FakeTensor))  # those are of the memory estimate
    if sum(calls) == 3 and os.environ["RANK"] == "1":
        seen.values[:] = float("nan")
    return seen

calls = []
mwt.training.observe = poisoned
"""


@pytest.mark.parametrize("policy", [pytest.param("skip", marks=pytest.mark.slow), "raise"])
def test_one_process_meets_nan_and_both_do_the_same(tmp_path: Path, server: Server, policy: str) -> None:
    """The step is skipped in both, or their weights would part, or both end; the report names the samples of both."""
    run = tmp_path / "run"
    server.start(
        *TWENTY[:3], f"run.on_nonfinite={policy}", f"run.dir={run}", "run.log_every=2", code=NONFINITE, ranks=2
    )
    status = 0 if policy == "skip" else 1
    assert server.statuses() == [status, status], server.said()[-3000:]
    [report] = (run / "nonfinite").iterdir()
    found = json.loads(report.read_text())
    assert found["step"] == 3
    assert len(found["samples"]) == 8
    assert len({sample["key"] for sample in found["samples"]}) == 8
    if policy == "skip":
        assert "Step 3 was skipped" in server.said()
        assert rows(run)[-1]["skipped"] == 1
        assert all(value.isfinite().all() for value in tensors(run).values())
    else:
        said = server.said()  # two processes write: their lines may run into each other
        assert said.count("error: The loss") == 2
        assert said.count(f"not finite at step 3; {report} names its samples") == 2
        assert "Traceback" not in server.said()


# ---- another number of processes ---------------------------------------------------------------------------------

STOPPING = """
import os, signal, mwt.training_state
add = mwt.training_state.Meter.add

def stopping(meter, step, *rest):
    add(meter, step, *rest)
    if step == 8:
        os.kill(os.getpid(), signal.SIGTERM)

mwt.training_state.Meter.add = stopping
"""


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_run_goes_on_with_another_number_of_processes(
    tmp_path: Path, server: Server, before: int, after: int
) -> None:
    """In the middle of an epoch, with the very next sample."""
    options = (*TWENTY, "data.augment=crop", "data.crop_padding=1", "data.reader=indexed", "optim.ema=0.9")
    whole, run = tmp_path / "whole", tmp_path / "run"
    server.run(*options, f"run.dir={whole}", code=noting(tmp_path / "whole-notes"))
    server.start(*options, f"run.dir={run}", ranks=before, code=noting(tmp_path / "first") + STOPPING)
    assert server.statuses() == [143] * before, server.said()[-3000:]
    assert last_step(run) == 8
    server.run("--resume", f"run.dir={run}", ranks=after, code=noting(tmp_path / "second"))
    check_alike(whole, run)
    [undisturbed] = noted(tmp_path / "whole-notes", "mwt.training")
    met = []
    for notes in ("first", "second"):
        ranks = noted(tmp_path / notes, "mwt.training")
        for batches in zip(*ranks, strict=True):
            met.append((batches[0][0], sorted(p for _, positions in batches for p in positions)))
    assert met == [(epoch, sorted(positions)) for epoch, positions in undisturbed]


# ---- a subset to monitor -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_the_subset_to_monitor_is_the_same_however_many_processes(tmp_path: Path, server: Server, world: int) -> None:
    """13 of 42, two at a time: whole batches for all, then an uneven rest; at the end all. In float64: see DOUBLE."""
    evaluated, numbers = [], []
    for ranks in (1, world):
        run, notes = tmp_path / f"run{ranks}", tmp_path / f"notes{ranks}"
        server.run(
            "--debug", "data.limit=42", "data.batch_size=6", "optim.epochs=2", "data.monitor_split=test",
            "run.monitor_limit=13", "run.eval_batch_size=2", f"run.dir={run}",
            code=noting(notes) + DOUBLE, ranks=ranks,
        )  # fmt: skip
        evaluated.append(Counter(p for rank in noted(notes, "mwt.evaluation") for _, ps in rank for p in ps))
        numbers.append([row for row in rows(run) if row["split"] == "test"])
    assert Counter(evaluated[0].values()) == {3: 13, 1: 42 - 13}  # after either epoch, and all of the split at the end
    assert evaluated[1] == evaluated[0]
    assert [row["count"] for row in numbers[0]] == [13, 42]
    one, many = tmp_path / "run1", tmp_path / f"run{world}"
    check_alike(one, many)  # the log has some numbers in float32
    found = tensors(many)
    for name, value in tensors(one).items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12, msg=name)
