"""Make shards from a data set or a folder of images, or a signal for `train.fit`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import PIL
from tqdm import tqdm

from data_pipes.prepare import (
    bunny,
    digits,
    folder,
    imagenet1k,
    imagenette,
    modelnet40,
    photographs,
    synthetic_scene,
)
from data_pipes.prepare.images import FITS
from data_pipes.prepare.source import Part, Request, Source, check_fraction
from data_pipes.processes import available_cores
from data_pipes.schema import DatasetInfo
from data_pipes.write import SHARD_BYTES, Sample, check_new, finished_shards, partial_folder, write_dataset
from mwt.errors import InputError
from mwt.runtime import run_program


def _later(module: str, function: str, *first: str) -> Callable[[Request], Source]:
    """A function of a module that is imported when it is called: torchvision's readers take seconds to import."""

    def load(request: Request) -> Source:
        source: Source = getattr(import_module(f"data_pipes.prepare.{module}"), function)(*first, request)
        return source

    return load


SOURCES: dict[str, Callable[[Request], Source]] = {
    "digits": digits.load,
    "mnist": _later("mnist", "load", "mnist"),
    "fashion_mnist": _later("mnist", "load", "fashion_mnist"),
    "cifar10": _later("cifar10", "load"),
    "cifar10_trainval": _later("cifar10", "load_trainval"),
    "imagenette": imagenette.load,
    "imagenet1k": imagenet1k.load,
    "modelnet40": modelnet40.load,
    "folder": folder.load,
}
SIGNALS = ("bunny", "synthetic_scene", "photographs", "mosaic")
"""No data sets: a mesh, a scene, pictures, for `train.fit`."""
IN_MEMORY = {"digits", "mnist", "fashion_mnist", "cifar10", "cifar10_trainval"}
"""Encoded faster than other processes start."""
_MAX_WORKERS = 16


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_pipes.prepare", description=__doc__)
    parser.add_argument("name", choices=[*SOURCES, *SIGNALS], metavar="NAME", help=", ".join([*SOURCES, *SIGNALS]))
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for the shards")
    parser.add_argument(
        "--src", type=Path, metavar="DIR",
        help="folder (or archive) with the original files, instead of a download. "
        f"imagenet1k: {imagenet1k.LAYOUT}. modelnet40: {modelnet40.LAYOUT}. folder: {folder.LAYOUT}. "
        f"bunny: {bunny.LAYOUT}",
    )  # fmt: skip
    parser.add_argument(
        "--size", metavar="N|HxW",
        help="resize to N x N, or H x W (imagenette, imagenet1k: 320); of photographs and mosaic what is written: "
        "256x384, 4096",
    )  # fmt: skip
    parser.add_argument(
        "--fit", choices=FITS, default="squash",
        help="how: squash does not keep the aspect ratio, as the paper; crop keeps it and cuts off what is over",
    )  # fmt: skip
    parser.add_argument(
        "--quality", type=int, metavar="Q",
        help="resized images are stored as JPEG of this quality; 100: as PNG, without loss "
        f"(imagenette, imagenet1k: {imagenette.QUALITY}; folder: 100)",
    )  # fmt: skip
    parser.add_argument("--val-fraction", type=float, metavar="F", help="make a val split of this share of train")
    parser.add_argument(
        "--test-fraction", type=float, metavar="F",
        help="`folder` only: make a test split of this share (default 0.2 where SRC has no splits)",
    )  # fmt: skip
    parser.add_argument("--views", type=int, metavar="N", help="`synthetic_scene` only: cameras (default 40)")
    parser.add_argument(
        "--channels", type=int, choices=(1, 3), help="`folder` only: grey or RGB (default: grey if every image is)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of splits and surface points made here (default 0)")
    parser.add_argument(
        "--shard-mib", type=float, metavar="M", default=SHARD_BYTES / 2**20,
        help="size at which a shard is closed, in MiB (default %(default)g)",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=int, metavar="N",
        help="processes that read and encode (default: the cores, for large data sets); the result is the same",
    )  # fmt: skip
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
    if options.name in SIGNALS:
        _make_signal(options)
        return
    check_fraction("val-fraction", options.val_fraction)
    check_fraction("test-fraction", options.test_fraction)
    if options.workers is not None and options.workers < 0:
        raise InputError(f"--workers is {options.workers}; it cannot be negative.")
    if not options.shard_mib > 0:
        raise InputError(f"--shard-mib is {options.shard_mib}; it must be positive.")
    if options.quality is not None and not 1 <= options.quality <= 100:
        raise InputError(f"--quality is {options.quality}; it must lie between 1 and 100.")
    request = Request(
        src=None if options.src is None else options.src.expanduser(), size=_size(options.size), fit=options.fit,
        quality=options.quality, channels=options.channels, val_fraction=options.val_fraction,
        test_fraction=options.test_fraction, seed=options.seed,
    )  # fmt: skip
    source = SOURCES[options.name](request)
    for note in source.notes:
        print(note)
    workers = _workers(options.name, source, options.workers)
    _report(_write(options.out.expanduser(), source, request, workers, round(options.shard_mib * 2**20)))


def _make_signal(options: argparse.Namespace) -> None:
    out = options.out.expanduser()
    if options.name == "bunny":
        made, task = bunny.make(None if options.src is None else options.src.expanduser(), out), "shape"
    elif options.name == "photographs":
        made, task = photographs.make(out, _size(options.size) or (256, 384)), "image"
    elif options.name == "mosaic":
        made, task = photographs.make_mosaic(out, _size(options.size) or (4096, 4096)), "image"
    else:
        size = _size(options.size) or (64, 64)
        if size[0] != size[1]:
            raise InputError(f"--size is {options.size}; the pictures of synthetic_scene are square.")
        made, task = synthetic_scene.make(out, size[0], 40 if options.views is None else options.views), "radiance"
    print(f"Written: {made}. Next: python -m train.fit --config configs/fit/{task}.yaml signal.path={made}")


def _workers(name: str, source: Source, wanted: int | None) -> int:
    if wanted is not None:
        return wanted
    enough = sum(map(len, source.splits.values())) // 500  # a process takes seconds to start
    return 0 if name in IN_MEMORY else min(available_cores(), _MAX_WORKERS, enough)


def _write(out: Path, source: Source, request: Request, workers: int, shard_bytes: int) -> DatasetInfo:
    begun: list[str] = []

    def samples(split: str, part: Part, start: int) -> Iterator[Sample]:
        begun.append(split)
        return _samples(split, part, workers, start)

    try:
        return write_dataset(
            out, name=source.name, facts=source.facts, licence=source.licence,
            splits={split: partial(samples, split, part) for split, part in source.splits.items()},
            shard_bytes=shard_bytes, arguments=_arguments(source, request),
        )  # fmt: skip
    except BaseException as error:
        # What is said of a full disk says it already; where nothing was begun, the shards are not this command's.
        if begun and not isinstance(error.__cause__, OSError):
            _say_what_is_kept(partial_folder(out))
        raise


def _say_what_is_kept(partial_out: Path) -> None:
    try:
        kept = sum(map(len, finished_shards(partial_out).values()))
    except InputError:  # a journal that cannot be read; the first error is the one to be told
        return
    if kept:
        sys.stderr.write(f"{kept} finished shards are kept in {partial_out}; the same command goes on from there.\n")


def _arguments(source: Source, request: Request) -> dict[str, Any]:
    """Whatever the samples depend on."""
    names = ("size", "fit", "quality", "channels", "val_fraction", "test_fraction", "seed")
    return {
        **{name: getattr(request, name) for name in names},
        "src": None if request.src is None else str(request.src.resolve()),
        "list of files": source.content,
        "version of Pillow": PIL.__version__,  # another may decode, resize and encode to other bytes
    }


def _samples(split: str, part: Part, workers: int, start: int) -> Iterator[Sample]:
    # a generator, so that a bar appears when its split's turn comes
    if 0 < start < len(part):
        print(f"{split}: {start} samples are finished already; going on after them.")
    samples = part.samples(start, workers)
    yield from tqdm(samples, initial=start, total=len(part), desc=split, unit="sample", disable=None)


def _report(info: DatasetInfo) -> None:
    print(f"{'split':<8}{'samples':>10}{'shards':>8}{'MiB':>10}")
    for name, split in info.splits.items():
        mib = sum(shard.bytes for shard in split.shards) / 2**20
        print(f"{name:<8}{split.count:>10}{len(split.shards):>8}{mib:>10.1f}")
    if info.signal == "points":
        kind = "points on surfaces"
    else:
        size = "differing sizes" if info.height is None else f"{info.height} x {info.width} pixels"
        kind = f"{'grey' if info.channels == 1 else 'RGB'}, {size}"
    print(f"{len(info.classes)} classes, {kind}. Licence: {info.licence}.")
    print(f"Next: python -m train.classify data.path={info.folder}")


if __name__ == "__main__":
    run_program(main)
