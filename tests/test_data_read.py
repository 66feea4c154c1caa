"""data_pipes.read: every sample once, in an order that depends on (seed, epoch) alone; and data_pipes.parallel."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipes import read, streaming
from data_pipes.decode import encode_png
from data_pipes.parallel import ordered_map, prefetch
from data_pipes.read import IndexedSplit, ResidentSplit, Split, StreamingSplit, open_split
from data_pipes.write import Sample, write_dataset
from mwt.config import ClassifyConfig
from mwt.config_files import load_config
from mwt.errors import InputError
from mwt.structs import Batch, SignalFacts

CPU = torch.device("cpu")
COUNT = 23
FACTS = SignalFacts(kind="image", channels=1, height=1, width=2, classes=tuple("abcde"))


def picture(value: int, width: int = 2) -> bytes:
    return encode_png(torch.full((1, 1, width), value, dtype=torch.uint8))


def make(out: Path, samples: list[Sample], facts: SignalFacts = FACTS, shard_bytes: int = 4096) -> Path:
    write_dataset(out, name="t", facts=facts, licence="", splits={"train": samples}, shard_bytes=shard_bytes)
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 images whose value is their position, in shards of two or three."""
    samples = [Sample(extension="png", data=picture(i), label=i % 5) for i in range(COUNT)]
    return make(tmp_path_factory.mktemp("read") / "data", samples)


READERS: dict[str, type[Split]] = {"resident": ResidentSplit, "indexed": IndexedSplit, "stream": StreamingSplit}


def open_all(folder: Path, **options: Any) -> list[Split]:
    splits = [open_split(folder, "train", device=CPU, reader=reader, **options) for reader in READERS]
    for split, (reader, kind) in zip(splits, READERS.items(), strict=True):
        assert isinstance(split, kind)
        assert split.reader == reader
        assert split.resident == (reader == "resident")
    return splits


def test_the_reader_is_chosen_by_size(folder: Path) -> None:
    assert open_split(folder, "train", device=CPU).reader == "resident"
    assert open_split(folder, "train", device=CPU, resident_mb=0).reader == "indexed"
    assert open_split(folder, "train", device=CPU, resident_mb=0, reader="resident").reader == "resident"


def check_content(batch: Batch) -> list[int]:
    positions = batch.positions.tolist()
    assert batch.images is not None
    assert batch.images.dtype == torch.uint8
    assert batch.images.shape == (len(positions), 1, 1, 2)
    assert batch.images[:, 0, 0, 1].tolist() == positions
    assert batch.labels.tolist() == [position % 5 for position in positions]
    return positions


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_all_ranks_together_see_the_global_order(folder: Path, data: st.DataObject) -> None:
    """Against a few lines of plain list slicing."""
    limit = data.draw(st.sampled_from([None, 1, 7, 22]))
    world, size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    drop_last, shuffle, start = data.draw(st.booleans()), data.draw(st.booleans()), data.draw(st.integers(0, 4))
    for split in open_all(folder, limit=limit, workers=data.draw(st.sampled_from([0, 2]))):
        count = COUNT if limit is None else limit
        assert len(split) == count
        common: dict[str, Any] = {"epoch": 3, "seed": 5, "shuffle": shuffle}
        order = [p for b in split.batches(batch_size=count, **common) for p in check_content(b)]
        assert sorted(order) == list(range(count))
        groups = [order[i : i + size * world] for i in range(0, count, size * world)]
        if drop_last and len(groups[-1]) < size * world:
            groups.pop()
        assert split.steps(size, drop_last, world) == len(groups)
        shares = [
            [
                check_content(batch)
                for batch in split.batches(
                    batch_size=size, drop_last=drop_last, rank=rank, world=world, start=start, **common
                )
            ]
            for rank in range(world)
        ]
        for group in groups[start:]:
            for rank in range(world):
                if group[rank::world]:  # in an incomplete last batch a rank may have no share
                    assert shares[rank].pop(0) == group[rank::world]
        assert shares == [[]] * world
        assert split.dropped(size, world) == count - size * world * (count // (size * world))


def test_orders_differ_between_epochs_and_seeds(folder: Path) -> None:
    for split in open_all(folder):
        orders = [
            torch.cat([b.positions for b in split.batches(batch_size=5, shuffle=shuffle, seed=seed, epoch=epoch)])
            for shuffle, seed, epoch in [(False, 0, 0), (True, 0, 0), (True, 0, 1), (True, 1, 0), (True, 0, 0)]
        ]
        assert orders[0].tolist() == list(range(COUNT))
        assert len({tuple(order.tolist()) for order in orders}) == 4
        assert torch.equal(orders[1], orders[4])


def test_a_small_buffer_still_shuffles_everything(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "SHUFFLE_BUFFER", 4)
    split = open_split(folder, "train", device=CPU, reader="stream")
    order = [p for b in split.batches(batch_size=4, shuffle=True) for p in check_content(b)]
    assert sorted(order) == list(range(COUNT))
    assert order != sorted(order)


def test_keys(folder: Path) -> None:
    for split in open_all(folder):
        assert [split.key(position) for position in (0, 9, 22)] == ["00000000", "00000009", "00000022"]
        with pytest.raises(IndexError):
            split.key(COUNT)


def test_arguments_that_make_no_sense(folder: Path) -> None:
    split = open_split(folder, "train", device=CPU)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        split.batches(batch_size=1, rank=2, world=2)
    with pytest.raises(ValueError, match="limit must be at least 1"):
        open_split(folder, "train", device=CPU, limit=0)


def test_leaving_a_stream_early_ends_its_thread(folder: Path) -> None:
    split = open_split(folder, "train", device=CPU, workers=2, reader="indexed")
    batches = split.batches(batch_size=1)
    next(batches)
    assert any(thread.name == "prefetch" for thread in threading.enumerate())
    batches.close()  # type: ignore[attr-defined]
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())


def test_points(tmp_path: Path) -> None:
    arrays = [np.random.default_rng(i).normal(size=(6, 4)).astype(np.float32) for i in range(3)]
    samples = []
    for label, array in enumerate(arrays):
        stream = io.BytesIO()
        np.save(stream, array)
        samples.append(Sample(extension="npy", data=stream.getvalue(), label=label))
    facts = SignalFacts(kind="points", channels=1, height=None, width=None, classes=("a", "b", "c"))
    for split in open_all(make(tmp_path / "data", samples, facts)):
        assert split.facts == facts
        batch = next(split.batches(batch_size=3))
        assert batch.images is None
        assert batch.coords is not None
        assert batch.values is not None
        assert np.array_equal(batch.coords.numpy(), np.stack(arrays)[..., :3])
        assert np.array_equal(batch.values.numpy(), np.stack(arrays)[..., 3:])


def test_sizes_that_differ(tmp_path: Path) -> None:
    samples = [Sample(extension="png", data=picture(1, width), label=0) for width in (2, 2, 3)]
    free = SignalFacts(kind="image", channels=1, height=None, width=None, classes=("a",))
    folder = make(tmp_path / "free", samples, free)
    message = r"Sample 00000002 of shard .*tar has 1 x 3 pixels, others have 1 x 2; .*data_pipes\.prepare folder"
    with pytest.raises(InputError, match=message):
        open_split(folder, "train", device=CPU)
    for reader in ("indexed", "stream"):
        split = open_split(folder, "train", device=CPU, reader=reader)
        with pytest.raises(InputError, match=message):
            list(split.batches(batch_size=3))
        assert [len(batch) for batch in split.batches(batch_size=1)] == [1, 1, 1]
    fixed = SignalFacts(kind="image", channels=1, height=1, width=2, classes=("a",))
    with pytest.raises(InputError, match=r"Sample 00000002 .* has 1 x 3 pixels, but the data set says 1 x 2"):
        open_split(make(tmp_path / "fixed", samples, fixed), "train", device=CPU)


def test_surfaces_and_points_with_values_do_not_go_together(tmp_path: Path) -> None:
    samples = []
    for columns in (4, 3):
        stream = io.BytesIO()
        np.save(stream, np.ones((6, columns), np.float32))
        samples.append(Sample(extension="npy", data=stream.getvalue(), label=0))
    facts = SignalFacts(kind="points", channels=1, height=None, width=None, classes=("a",))
    with pytest.raises(InputError, match=r"00000001 of .* has 3 numbers for each point, others have 4; surfaces"):
        open_split(make(tmp_path / "data", samples, facts), "train", device=CPU)


def test_bad_samples_are_named(tmp_path: Path) -> None:
    good = Sample(extension="png", data=picture(1), label=0)
    folder = make(tmp_path / "data", [good, Sample(extension="png", data=b"no image", label=0)])
    message = r"Sample 00000001 of shard .*train-000000\.tar cannot be read as an image \(PNG\): unknown or damaged"
    for reader in READERS:
        with pytest.raises(InputError, match=message):
            list(open_split(folder, "train", device=CPU, reader=reader).batches(batch_size=1))
    empty = make(tmp_path / "empty", [])
    with pytest.raises(InputError, match=r"Split 'train' of .*empty has no samples"):
        open_split(empty, "train", device=CPU)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_ordered_map(workers: int) -> None:
    def slow_square(x: int) -> int:
        time.sleep(0.002 * (x % 3))
        if x == 30:
            raise KeyError(x)
        return x * x

    results = ordered_map(slow_square, range(40), workers=workers)
    assert [next(results) for _ in range(30)] == [x * x for x in range(30)]
    with pytest.raises(KeyError):
        next(results)


def test_prefetch_is_bounded_and_passes_errors_on() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for i in range(5):
            made.append(i)
            yield i
        raise KeyError("the end")

    results = prefetch(items(), depth=1)
    assert next(results) == 0
    assert len(made) <= 3  # one taken, one ready, one in the hand
    assert [next(results) for _ in range(4)] == [1, 2, 3, 4]
    with pytest.raises(KeyError, match="the end"):
        next(results)


def test_everything_that_a_configuration_says_arrives(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"reader": "stream", "resident_mb": 3, "workers": 1, "limit": 9, "on_bad_sample": "skip", "max_bad": 0.5}
    overrides = [
        f"data.path={folder}",
        "data.schemes=[http,pipe]",
        *(f"data.{key}={value}" for key, value in values.items()),
    ]
    data = load_config(ClassifyConfig, None, overrides).data
    seen: dict[str, Any] = {}
    opened = read.open_split

    def noted(path: Any, split: str, **options: Any) -> Split:
        seen.update(options, path=path, split=split)
        return opened(path, split, **options)

    monkeypatch.setattr(read, "open_split", noted)
    assert len(read.open_configured(data, "train", CPU)) == 9
    assert seen == {**values, "path": str(folder), "split": "train", "device": CPU, "schemes": ("http", "pipe")}
    with pytest.raises(InputError, match=r"data\.max_bad is 2\.0; it must lie in \[0, 1\]"):
        load_config(ClassifyConfig, None, ["data.max_bad=2"])
