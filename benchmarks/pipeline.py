"""Reading: samples per second from shards to batches on the device, beside bare decoding and torchvision's loaders.

    python -m benchmarks.pipeline                        all cases (some minutes)
    python -m benchmarks.pipeline --cases jpeg320_indexed --workers 4
    python -m benchmarks.pipeline --json                 and a last line {"rows": [...]}

Shards, an `ImageFolder` tree and CIFAR-10's own files are made in a temporary folder from the same images: 32 x 32 RGB
as PNG, as `data_pipes.prepare cifar10` stores them, and 320 x 320 JPEG. Each round runs, one after the other and with
`--workers` threads or processes each, one epoch of every side; medians over the rounds count.

* The decode limit is the bare loop: PIL's decoding of bytes that lie in memory to arrays that nobody keeps, in threads
  and in processes; the faster of the two is the limit.
* torchvision is its `ImageFolder` or `CIFAR10` with `PILToTensor` in torch's DataLoader with persistent workers,
  shuffled, and each batch copied to the device. No augmentation on either side.
* Ours is `data_pipes.open_split`, shuffled, with all its checks of the bytes. `resident` splits are decoded when they
  are opened, which is shown apart (`open`) and not part of the rate.

`waiting_share` is the time that a training step of ours waits for its batch, over all of the time: steps of the
published configuration of that size run in bf16 on random data of the batch's shape, while batches are made beside
them: at most 20 steps or half a minute.
"""

from __future__ import annotations

import argparse
import io
import itertools
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR10, ImageFolder, VisionDataset
from torchvision.transforms.v2 import PILToTensor

from benchmarks import measure
from benchmarks.cases import CASES as STEPS
from benchmarks.measure import quotient
from benchmarks.sides import Ours, may_compile
from data_pipes.read import Reader, Split, open_split
from data_pipes.write import Sample, write_dataset
from mwt.errors import InputError
from mwt.runtime import run_program
from mwt.structs import SignalFacts

CLASSES = tuple(f"class{number}" for number in range(10))
BATCH = 64
WAITING_STEPS, WAITING_SECONDS = 20, 30.0


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Images of one size: how many, how they are stored, and whose training step waits for them."""

    side: int
    count: int
    extension: str
    step: str
    """Of `benchmarks.cases.CASES`."""


KINDS = {
    "cifar": Kind(side=32, count=10_000, extension="png", step="cifar_s01"),
    "jpeg320": Kind(side=320, count=600, extension="jpg", step="imagenette"),
}
CASES: dict[str, tuple[str, Reader]] = {
    "cifar_resident": ("cifar", "resident"),
    "cifar_indexed": ("cifar", "indexed"),
    "jpeg320_indexed": ("jpeg320", "indexed"),
    "jpeg320_stream": ("jpeg320", "stream"),
}


# ---- the data ----------------------------------------------------------------------------------------------------


def make_images(kind: Kind) -> Iterator[np.ndarray]:
    """Images [h, w, 3] with large shapes and some grain, so that files are about as long as those of photographs."""
    source = np.random.default_rng(0)
    for _ in range(kind.count):
        coarse = source.integers(0, 256, (max(4, kind.side // 16),) * 2 + (3,), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((kind.side, kind.side), Image.Resampling.BICUBIC))
        yield (smooth + source.normal(0, 12, smooth.shape)).clip(0, 255).astype(np.uint8)


def encoded(image: np.ndarray, extension: str) -> bytes:
    """One image as a file."""
    stream = io.BytesIO()
    Image.fromarray(image).save(
        stream, {"png": "PNG", "jpg": "JPEG"}[extension], **({"quality": 90} if extension == "jpg" else {})
    )
    return stream.getvalue()


@dataclass(frozen=True, kw_only=True)
class Data:
    """The same images as bytes in memory, as shards, and for torchvision."""

    files: list[bytes]
    shards: Path
    torchvision: Callable[[], Any]


def make_data(name: str, kind: Kind, folder: Path) -> Data:
    """Writes everything below `folder`."""
    images = list(make_images(kind))
    files = [encoded(image, kind.extension) for image in images]
    labels = [number % len(CLASSES) for number in range(kind.count)]
    facts = SignalFacts(kind="image", channels=3, height=kind.side, width=kind.side, classes=CLASSES)
    samples = [
        Sample(extension=kind.extension, data=data, label=label) for data, label in zip(files, labels, strict=True)
    ]
    write_dataset(
        folder / "shards", name=name, facts=facts, licence="", splits={"train": samples},
        shard_bytes=sum(map(len, files)) // 16,
    )  # fmt: skip
    if name == "cifar":
        return Data(files=files, shards=folder / "shards", torchvision=partial(cifar10, images, labels))
    for number, (data, label) in enumerate(zip(files, labels, strict=True)):
        path = folder / "tree" / CLASSES[label] / f"{number:06d}.{kind.extension}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return Data(
        files=files,
        shards=folder / "shards",
        torchvision=partial(ImageFolder, str(folder / "tree"), transform=PILToTensor()),
    )


def cifar10(images: list[np.ndarray], labels: list[int]) -> CIFAR10:
    """torchvision's CIFAR10 with these images, as it holds them once its files are read: an array in memory."""
    made = CIFAR10.__new__(CIFAR10)
    VisionDataset.__init__(made, root="", transform=PILToTensor())
    made.train, made.data, made.targets, made.classes = True, np.stack(images), labels, list(CLASSES)
    return made


# ---- the sides ---------------------------------------------------------------------------------------------------


def decode_bare(files: Iterable[bytes]) -> int:
    """The least that can be done: every file to an array. Returns how many."""
    return sum(np.asarray(Image.open(io.BytesIO(data))).ndim > 1 for data in files)


_own: list[list[bytes]] = []  # what a bare process finds in its memory: nothing is sent to it


def decode_own(number: int) -> int:
    """The same, of the part `number`, in a process that was forked with all of them."""
    return decode_bare(_own[number])


def slices(files: list[bytes], workers: int) -> list[list[bytes]]:
    """An equal part for each worker."""
    return [files[number::workers] for number in range(workers)]


def run_epoch(batches: Iterable[Any]) -> int:
    """Take every batch; returns the samples seen."""
    return sum(len(batch) for batch in batches)


def of_torchvision(loader: DataLoader[Any], device: torch.device) -> Iterator[torch.Tensor]:
    """One epoch of its batches on the device."""
    for images, labels in loader:
        labels.to(device, non_blocking=True)
        yield images.to(device, non_blocking=True)


def of_ours(split: Split, epochs: Iterator[int]) -> Iterator[Any]:
    """One epoch, another each time."""
    return split.batches(batch_size=BATCH, shuffle=True, epoch=next(epochs))


def waiting_share(split: Split, step_name: str, device: torch.device) -> float:
    """The share of the time in which training steps wait for their batches."""
    case = STEPS[step_name].case()
    side = Ours(case, "bf16", device, compile_it=may_compile(device, device.type == "cuda"))
    batches = split.batches(batch_size=case.batch_size, shuffle=True, drop_last=True)
    side.step()
    next(batches)
    waited, number = 0.0, 0
    began = time.perf_counter()
    while number < WAITING_STEPS and time.perf_counter() - began < WAITING_SECONDS:
        before = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - before
        measure.seconds_of(side.step, device)
        number += 1
    return waited / (time.perf_counter() - began)


# ---- measuring ---------------------------------------------------------------------------------------------------


def measure_kind(
    name: str, readers: dict[str, Reader], folder: Path, arguments: argparse.Namespace, device: torch.device
) -> list[dict[str, Any]]:
    """Rows of all cases of one kind of images."""
    kind, workers = KINDS[name], arguments.workers
    measure.progress(f"{name}: making {kind.count} images")
    data = make_data(name, kind, folder)
    _own[:] = parts = slices(data.files, workers)
    with multiprocessing.get_context("fork").Pool(workers) as pool, ThreadPoolExecutor(workers) as threads:
        loader = DataLoader(
            data.torchvision(), batch_size=BATCH, shuffle=True, num_workers=workers, persistent_workers=True,
            pin_memory=device.type == "cuda",
        )  # fmt: skip
        actions: dict[str, Callable[[], object]] = {
            "bare threads": lambda: sum(threads.map(decode_bare, parts)),
            "bare processes": lambda: sum(pool.map(decode_own, range(workers))),
            "torchvision": lambda: run_epoch(of_torchvision(loader, device)),
        }
        splits, opening = {}, {}
        for case, reader in readers.items():
            began = time.perf_counter()
            splits[case] = open_split(data.shards, "train", device=device, reader=reader, workers=workers)
            opening[case] = time.perf_counter() - began
            actions[case] = partial(
                lambda split, epochs: run_epoch(of_ours(split, epochs)), splits[case], itertools.count()
            )
        measure.progress(f"{name}: {arguments.rounds} rounds")
        seconds = measure.interleaved(actions, rounds=arguments.rounds, device=device, warm_up=1)
        rates = {key: kind.count / value for key, value in seconds.items()}
    limit = max(rates["bare threads"], rates["bare processes"])
    rows = []
    for case, split in splits.items():
        measure.progress(f"{case}: training steps")
        rows.append(
            {
                "case": case,
                "samples_per_second": rates[case],
                "decode_limit": limit,
                "share_of_limit": quotient(rates[case], limit),
                "torchvision": rates["torchvision"],
                "ratio": quotient(rates[case], rates["torchvision"]),
                "waiting_share": None if arguments.no_steps else waiting_share(split, kind.step, device),
                "opening_seconds": opening[case],
                "bare_threads": rates["bare threads"],
                "bare_processes": rates["bare processes"],
            }
        )
    return rows


COLUMNS = (
    ("case", "case", ""),
    ("samples/s", "samples_per_second", ".0f"),
    ("decode limit", "decode_limit", ".0f"),
    ("share", "share_of_limit", ".2f"),
    ("torchvision", "torchvision", ".0f"),
    ("ratio", "ratio", ".2f"),
    ("waiting", "waiting_share", ".2%"),
    ("open s", "opening_seconds", ".2f"),
)


def main(argv: list[str] | None = None) -> int:
    """Measure and print; see the module's text. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="benchmarks.pipeline", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES), help=f"of {','.join(CASES)} (default: all)")
    parser.add_argument("--workers", type=int, default=2, help="decoding threads, or processes (default: 2)")
    parser.add_argument("--no-steps", action="store_true", help="leave out the training steps that wait")
    measure.common_arguments(parser)
    arguments = parser.parse_args(argv)
    if arguments.workers < 1:
        raise InputError(f"--workers is {arguments.workers}; it must be at least 1.")
    device = measure.set_up(arguments)
    chosen = measure.parse_list(arguments.cases, list(CASES), "--cases")
    print(f"{measure.machine(device)}; {arguments.workers} workers")
    rows: list[dict[str, Any]] = []
    for name in KINDS:
        readers = {case: CASES[case][1] for case in chosen if CASES[case][0] == name}
        if readers:
            with tempfile.TemporaryDirectory() as folder:
                rows += measure_kind(name, readers, Path(folder), arguments, device)
    print(
        f"\nFrom shards to batches of {BATCH} on {device.type}; share: of the decode limit; ratio: over torchvision\n"
    )
    print(measure.table(COLUMNS, rows))
    if arguments.json:
        measure.print_json(rows)
    return 0


if __name__ == "__main__":
    run_program(main)
