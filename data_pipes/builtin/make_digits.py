"""Makes `data_pipes/builtin/digits` again from scikit-learn: python -m data_pipes.builtin.make_digits --out DIR."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from data_pipes.prepare.source import Request, from_arrays, split_off
from data_pipes.write import write_dataset
from mwt.errors import InputError
from mwt.runtime import run_program

LICENCE = "CC BY 4.0 (E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits, UCI ML Repository, 1998)"
TEST_FRACTION = 0.2
SEED = 0


def main(argv: list[str] | None = None) -> None:
    """Writes the shards to a new folder: 1,437 images for training and 360 for testing, split by class."""
    parser = argparse.ArgumentParser(prog="python -m data_pipes.builtin.make_digits", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="new folder for the shards")
    out = parser.parse_args(argv).out
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError("scikit-learn is needed to make the digits again: pip install scikit-learn") from error
    digits = load_digits()
    images = torch.from_numpy((digits.images * 255 / 16).round()).to(torch.uint8)[:, None]  # counts 0 … 16 of ink
    labels = torch.from_numpy(digits.target).long()
    train, test = split_off(labels, TEST_FRACTION, SEED)
    source = from_arrays(
        "digits",
        {"train": images[train], "test": images[test]},
        {"train": labels[train], "test": labels[test]},
        classes=tuple(str(digit) for digit in range(10)),
        licence=LICENCE,
        request=Request(),
    )
    write_dataset(
        out,
        name=source.name,
        facts=source.facts,
        licence=source.licence,
        splits={split: part.samples for split, part in source.splits.items()},
    )


if __name__ == "__main__":
    run_program(main)
