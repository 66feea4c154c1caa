"""Make shards from a data set, or from a folder of images."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tqdm import tqdm

from data_pipes.prepare import cifar10, digits, folder, mnist
from data_pipes.prepare.source import Request, Source, check_fraction
from data_pipes.schema import DatasetInfo
from data_pipes.write import Sample, check_new, write_dataset
from mwt.errors import InputError
from mwt.runtime import run_program

SOURCES: dict[str, Callable[[Request], Source]] = {
    "digits": digits.load,
    "mnist": partial(mnist.load, "mnist"),
    "fashion_mnist": partial(mnist.load, "fashion_mnist"),
    "cifar10": cifar10.load,
    "folder": folder.load,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_pipes.prepare", description=__doc__)
    parser.add_argument("name", choices=list(SOURCES), metavar="NAME", help=", ".join(SOURCES))
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for the shards")
    parser.add_argument(
        "--src", type=Path, metavar="DIR",
        help=f"folder with the original files, instead of a download; for `folder`: the images, {folder.LAYOUT}",
    )  # fmt: skip
    parser.add_argument("--size", metavar="N|HxW", help="resize to N x N, or H x W; the aspect ratio is not kept")
    parser.add_argument("--val-fraction", type=float, metavar="F", help="make a val split of this share of train")
    parser.add_argument(
        "--test-fraction", type=float, metavar="F",
        help="`folder` only: make a test split of this share (default 0.2 where SRC has no splits)",
    )  # fmt: skip
    parser.add_argument(
        "--channels", type=int, choices=(1, 3), help="`folder` only: grey or RGB (default: grey if every image is)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the splits made here (default 0)")
    return parser


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text)
    if match is None:
        raise InputError(f"--size is {text!r}; give a number of pixels (32) or height x width (32x48).")
    return int(match[1]), int(match[2] or match[1])


def main(argv: list[str] | None = None) -> None:
    """Runs the program. Raises InputError for whatever the person can mend."""
    options = _parser().parse_args(argv)
    check_new(options.out.expanduser())  # before the work, not after
    check_fraction("val-fraction", options.val_fraction)
    check_fraction("test-fraction", options.test_fraction)
    request = Request(
        src=None if options.src is None else options.src.expanduser(), size=_size(options.size),
        channels=options.channels, val_fraction=options.val_fraction, test_fraction=options.test_fraction,
        seed=options.seed,
    )  # fmt: skip
    source = SOURCES[options.name](request)
    for note in source.notes:
        print(note)
    splits = {split: _with_progress(split, count, make) for split, (count, make) in source.splits.items()}
    info = write_dataset(options.out, name=source.name, facts=source.facts, licence=source.licence, splits=splits)
    _report(info)


def _with_progress(split: str, count: int, make: Callable[[], Iterator[Sample]]) -> Iterator[Sample]:
    # a generator, so that a bar appears when its split's turn comes
    yield from tqdm(make(), total=count, desc=split, unit="sample", disable=None)


def _report(info: DatasetInfo) -> None:
    print(f"{'split':<8}{'samples':>10}{'shards':>8}{'MiB':>10}")
    for name, split in info.splits.items():
        mib = sum(shard.bytes for shard in split.shards) / 2**20
        print(f"{name:<8}{split.count:>10}{len(split.shards):>8}{mib:>10.1f}")
    size = "differing sizes" if info.height is None else f"{info.height} x {info.width} pixels"
    print(f"{len(info.classes)} classes, {'grey' if info.channels == 1 else 'RGB'}, {size}. Licence: {info.licence}.")
    print(f"Next: python -m train.classify data.path={info.folder}")


if __name__ == "__main__":
    run_program(main)
