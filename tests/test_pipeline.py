"""benchmarks.pipeline: all sides see all samples, and the JSON says what was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from benchmarks import pipeline
from data_pipes.read import open_split

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["cifar", "jpeg320"])
def test_all_sides_read_the_same_images(tmp_path: Path, name: str) -> None:
    kind = replace(pipeline.KINDS[name], count=23)
    data = pipeline.make_data(name, kind, tmp_path)
    images = list(pipeline.make_images(kind))
    split = open_split(data.shards, "train", device=CPU, reader="indexed")
    ours = next(split.batches(batch_size=23))
    theirs, labels = next(iter(DataLoader(data.torchvision(), batch_size=23)))
    order = labels.argsort(stable=True) if name == "cifar" else torch.arange(23)
    mine = ours.labels.argsort(stable=True)
    assert ours.images is not None
    assert torch.equal(ours.images[mine], theirs[order])
    if kind.extension == "png":
        assert np.array_equal(ours.images.permute(0, 2, 3, 1).numpy(), np.stack(images))
    assert sum(map(pipeline.decode_bare, pipeline.slices(data.files, 3))) == 23


def test_the_program(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "KINDS", {key: replace(kind, count=70) for key, kind in pipeline.KINDS.items()})
    assert pipeline.main(["--json", "--rounds", "1", "--workers", "1", "--no-steps", "--device", "cpu"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["case"] for row in rows] == list(pipeline.CASES)
    for row in rows:
        assert row["samples_per_second"] > 0
        assert row["ratio"] == pytest.approx(row["samples_per_second"] / row["torchvision"])
        assert row["share_of_limit"] == pytest.approx(row["samples_per_second"] / row["decode_limit"])
        assert row["decode_limit"] == max(row["bare_threads"], row["bare_processes"])
        assert row["waiting_share"] is None
