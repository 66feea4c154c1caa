"""The trained model that comes with the package, on the data that comes with it."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import torch

from data_pipes.read import open_split
from mwt import MetaWeightTransformer, list_builtin_models
from mwt.evaluation import evaluate


def test_the_digits_model_reads_the_test_digits() -> None:
    assert "builtin:digits" in list_builtin_models()
    model = MetaWeightTransformer.from_pretrained("builtin:digits")
    split = open_split("builtin:digits", "test", device=torch.device("cpu"))
    numbers = evaluate(model, split.batches(batch_size=120)).summary()
    assert numbers["count"] == 360
    assert numbers["accuracy"] >= 0.97
    assert numbers["psnr"] >= 30


def test_it_is_small() -> None:
    folder = Path(str(files("mwt") / "builtin" / "digits"))
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2 * 2**20
