"""Exactly once, with real processes; orders that are good shuffles; and going on in the middle of an epoch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from data_pipes.decode import encode_png
from data_pipes.read import open_split
from data_pipes.split import Epoch
from data_pipes.write import Sample, write_dataset
from mwt.structs import SignalFacts
from tests.fork_server import Server

CPU = torch.device("cpu")
FACTS = SignalFacts(kind="image", channels=1, height=4, width=4, classes=tuple("abc"))
COUNT = 41


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """41 images whose value is their position, in shards of different sizes."""
    out = tmp_path_factory.mktemp("once") / "data"
    source = np.random.default_rng(0)
    samples = []
    for i in range(COUNT):
        image = torch.full((1, 4, 4), i, dtype=torch.uint8)
        samples.append(Sample(extension="png", data=encode_png(image), label=int(source.integers(3))))
    splits = {"train": samples, "test": samples[:19]}
    write_dataset(out, name="t", facts=FACTS, licence="", splits=splits, shard_bytes=9000)
    return out


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    reader=st.sampled_from(["resident", "indexed", "stream"]),
    world=st.integers(1, 8),
    size=st.integers(1, 12),
    workers=st.sampled_from([0, 1, 3]),
    limit=st.integers(1, COUNT),
    epoch=st.integers(0, 2),
    training=st.booleans(),
)
def test_every_sample_once(
    folder: Path, reader: Any, world: int, size: int, workers: int, limit: int, epoch: int, training: bool
) -> None:
    split = open_split(folder, "train", device=CPU, reader=reader, workers=workers, limit=limit)
    seen: list[int] = []
    lengths = []
    for rank in range(world):
        batches = list(
            split.batches(batch_size=size, rank=rank, world=world, epoch=epoch, shuffle=training, drop_last=training)
        )
        lengths.append(len(batches))
        for batch in batches:
            assert batch.images is not None
            assert batch.images[:, 0, 0, 0].tolist() == batch.positions.tolist()
            assert not training or len(batch) == size
            seen += batch.positions.tolist()
    assert len(set(seen)) == len(seen) == limit - (split.dropped(size, world) if training else 0)
    assert set(seen) <= set(range(limit))
    if training:
        assert set(lengths) == {limit // (size * world)}  # no process has a step more than another


def test_every_sample_is_dropped_now_and_then(folder: Path) -> None:
    """What does not fill a batch is other samples in each epoch: over a few epochs all are seen."""
    split = open_split(folder, "train", device=CPU)
    seen = set()
    for epoch in range(6):
        for batch in split.batches(batch_size=16, epoch=epoch, shuffle=True, drop_last=True):
            seen |= set(batch.positions.tolist())
    assert seen == set(range(COUNT))


PROGRAM = """
import json, sys
import torch
from data_pipes.read import open_split
from mwt.config import ClassifyConfig, model_config
from mwt.config_files import load_config
from mwt.evaluation import evaluate
from mwt.model import MetaWeightTransformer

folder, out, world = sys.argv[1], sys.argv[2], int(sys.argv[3])
if world > 1:
    torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank() if world > 1 else 0
results = {}
for reader in ("resident", "indexed", "stream"):
    for size in (3, 8):
        split = open_split(folder, "test", device=torch.device("cpu"), reader=reader, workers=rank)
        small = ["siren.hidden=64", "siren.hidden_layers=1", "inner_loop.steps=1", "reader.blocks=1"]
        config = load_config(ClassifyConfig, None, small)
        torch.manual_seed(0)
        model = MetaWeightTransformer(model_config(config, split.facts))
        found = evaluate(model, split.batches(batch_size=size, rank=rank, world=world))
        results[f"{reader} {size}"] = [found.positions.tolist(), found.labels.tolist(), found.summary()]
if rank == 0:
    with open(out, "w") as file:
        json.dump(results, file)
if world > 1:
    torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_metrics_count_every_sample_once_with_real_processes(folder: Path, tmp_path: Path, server: Server) -> None:
    """19 samples over 1 and 3 processes: the same samples, labels and metrics."""
    results = []
    for world in (1, 3):
        out = tmp_path / f"{world}.json"
        server.run(str(folder), str(out), str(world), program="", code=PROGRAM, ranks=world)
        results.append(json.loads(out.read_text()))
    for result in results:
        for name, (positions, labels, summary) in result.items():
            assert positions == list(range(19)), name
            first = results[0]["resident 3"]
            assert labels == first[1]
            assert summary == pytest.approx(first[2], rel=1e-5)


# ---- the order ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("reader", "limit"), [("indexed", COUNT), ("indexed", 7), ("stream", 7)])
def test_every_order_is_as_probable(folder: Path, reader: Any, limit: int) -> None:
    """Over 1,500 epochs: each sample at each place alike, each next to each other alike, no epoch like its position."""
    split = open_split(folder, "train", device=CPU, reader=reader, limit=limit)
    epochs = 1500
    orders = np.stack([split.order(Epoch(number=epoch, shuffle=True)).numpy() for epoch in range(epochs)])
    assert (np.sort(orders, axis=1) == np.arange(limit)).all()
    places = np.zeros((limit, limit))
    follows = np.zeros((limit, limit))
    for order in orders:
        places[order, np.arange(limit)] += 1
        follows[order[:-1], order[1:]] += 1
    assert stats.chisquare(places.ravel()).pvalue > 1e-4
    assert stats.chisquare(follows[~np.eye(limit, dtype=bool)]).pvalue > 1e-4
    correlations = [stats.spearmanr(order, np.arange(limit)).statistic for order in orders[:500]]
    assert abs(np.mean(correlations)) < 4 / np.sqrt(500 * (limit - 1))
    assert np.std(correlations) == pytest.approx(1 / np.sqrt(limit - 1), rel=0.2)


@pytest.mark.parametrize("reader", ["resident", "indexed", "stream"])
def test_the_order_depends_on_seed_and_epoch_alone(folder: Path, reader: Any) -> None:
    orders = {}
    for workers, world, size in ((0, 1, 4), (3, 1, 4), (2, 2, 2), (0, 4, 3), (1, 3, 1)):
        split = open_split(folder, "train", device=CPU, reader=reader, workers=workers)
        places = [-1] * COUNT
        for rank in range(world):
            batches = split.batches(batch_size=size, shuffle=True, seed=3, epoch=2, rank=rank, world=world)
            for number, batch in enumerate(batches):
                for i, position in enumerate(batch.positions.tolist()):
                    places[number * size * world + rank + i * world] = position
        orders[workers, world, size] = places
    assert len({tuple(order) for order in orders.values()}) == 1


@pytest.mark.parametrize("reader", ["resident", "indexed", "stream"])
@pytest.mark.parametrize("start", [1, 3, 5])
def test_starting_within_an_epoch_gives_the_very_next_sample(folder: Path, reader: Any, start: int) -> None:
    split = open_split(folder, "train", device=CPU, reader=reader, workers=2)
    options = {"batch_size": 4, "shuffle": True, "epoch": 1, "seed": 2, "drop_last": True, "world": 2}
    for rank in range(2):
        whole = list(split.batches(**options, rank=rank))
        rest = list(split.batches(**options, rank=rank, start=start))
        assert len(rest) == max(0, len(whole) - start)
        for a, b in zip(whole[start:], rest, strict=True):
            assert torch.equal(a.positions, b.positions)
            assert torch.equal(a.images, b.images)
            assert torch.equal(a.labels, b.labels)


def test_starting_late_reads_nothing_before(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = open_split(folder, "train", device=CPU, reader="indexed")
    read = []
    true_read = os.pread
    monkeypatch.setattr(os, "pread", lambda *a: read.append(a) or true_read(*a))
    assert len(list(split.batches(batch_size=4, shuffle=True, start=9))) == 2
    assert len(read) == COUNT - 36
