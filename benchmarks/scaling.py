"""How the cost of a training step grows: with inner steps, points, width and batch, and over two processes.

    python -m benchmarks.scaling                        all axes, a few minutes on two cores
    python -m benchmarks.scaling --axes k,width --precision bf16
    python -m benchmarks.scaling --json                 and a last line {"rows": [...]}

Each axis changes one thing of a small default (4 inner steps, 256 points, width 128, batch 16; 2 hidden layers, 2
blocks) and leaves the rest. Steps are ours, not compiled (every size would have to be), timed in turn; medians count.
The exponent is the slope of a straight line through the logarithms of value and time: 1 is proportional.

With two processes each has a batch of its own, so the images of a step double: efficiency is their images/s over twice
those of one process. On the CPU each process has one thread and gradients travel by gloo, on GPUs each has a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from benchmarks import measure
from benchmarks.cases import Case, parse_signal
from benchmarks.measure import quotient
from benchmarks.sides import Ours
from mwt.config import ClassifyConfig
from mwt.config_files import load_config
from mwt.errors import InputError
from mwt.runtime import run_program

AXES = {"k": (1, 2, 4, 8), "points": (64, 256, 576, 1024), "width": (64, 128, 256), "batch": (1, 4, 16, 32)}
PROCESSES = (1, 2)


@dataclass(frozen=True, kw_only=True)
class Size:
    """What the axes change, at its default."""

    k: int = 4
    points: int = 256
    width: int = 128
    batch: int = 16

    def case(self) -> Case:
        """As a case: grey images in one row of pixels, all of which every inner step sees."""
        values = {
            "siren.hidden": self.width,
            "siren.hidden_layers": 2,
            "inner_loop.steps": self.k,
            "reader.blocks": 2,
            "reader.head_dim": math.gcd(64, self.width),
            "data.batch_size": self.batch,
        }
        config = load_config(ClassifyConfig, None, [f"{key}={value}" for key, value in values.items()])
        facts, _ = parse_signal(f"1x1x{self.points}x10")
        return Case(config=config, facts=facts)


def slope(values: Sequence[float], times: Sequence[float]) -> float | None:
    """Of the straight line through the logarithms, by least squares; None for a single value."""
    if len(values) < 2:
        return None
    x, y = ([math.log(number) for number in numbers] for numbers in (values, times))
    middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - middle_x) ** 2 for a in x)


def measure_axis(
    axis: str, values: Sequence[int], *, precision: str, rounds: int, device: torch.device
) -> list[dict[str, Any]]:
    """A row for each value of one axis."""
    measure.progress(f"{axis}: {', '.join(map(str, values))}")
    cases = {value: Size(**{axis: value}).case() for value in values}
    sides = {value: Ours(case, precision, device, compile_it=False) for value, case in cases.items()}
    actions: dict[int, Callable[[], object]] = {value: side.step for value, side in sides.items()}
    seconds = measure.interleaved(actions, rounds=rounds, device=device)
    exponent = slope(values, [seconds[value] for value in values])
    return [
        {
            "axis": axis,
            "value": value,
            "precision": precision,
            "seconds": seconds[value],
            "images_per_second": cases[value].batch_size / seconds[value],
            "exponent": exponent,
            "efficiency": None,
        }
        for value in values
    ]


# ---- several processes -------------------------------------------------------------------------------------------


def work(precision: str, rounds: int, device: torch.device) -> None:
    """What each of several processes does: steps of the default size, their gradients averaged over all."""
    accelerator = Accelerator(cpu=device.type == "cpu")
    side = Ours(Size().case(), precision, accelerator.device, compile_it=False)
    side.forward = accelerator.prepare(side.model)
    seconds = measure.interleaved({"step": side.step}, rounds=rounds, device=accelerator.device)["step"]
    if accelerator.is_main_process:
        print(json.dumps({"seconds": seconds, "images": side.images * accelerator.num_processes}))
    accelerator.end_training()


def measure_processes(
    counts: Sequence[int], *, precision: str, rounds: int, device: torch.device
) -> list[dict[str, Any]]:
    """A row for each number of processes; efficiency is relative to the first."""
    rows: list[dict[str, Any]] = []
    for count in counts:
        if device.type == "cuda" and count > torch.cuda.device_count():
            measure.progress(f"processes: {count} need as many GPUs, here are {torch.cuda.device_count()}; left out")
            continue
        measure.progress(f"processes: {count}")
        words = ["benchmarks.scaling", "--worker", "--precision", precision, "--rounds", str(rounds)]
        words += ["--device", device.type, "--threads", "1"]
        found = measure.run_child(words, processes=count if count > 1 else None, environment={"OMP_NUM_THREADS": "1"})
        if found is None:
            raise RuntimeError(f"{count} processes were ended by the system; is there enough memory?")
        rate = found["images"] / found["seconds"]
        alone = rows[0] if rows else {"images_per_second": rate, "value": count}
        rows.append(
            {
                "axis": "processes",
                "value": count,
                "precision": precision,
                "seconds": found["seconds"],
                "images_per_second": rate,
                "exponent": None,
                "efficiency": quotient(rate * alone["value"], alone["images_per_second"] * count),
            }
        )
    return rows


# ---- the program -------------------------------------------------------------------------------------------------

COLUMNS = (
    ("axis", "axis", ""),
    ("value", "value", ""),
    ("precision", "precision", ""),
    ("seconds", "seconds", ".4f"),
    ("images/s", "images_per_second", ".4g"),
    ("exponent", "exponent", ".2f"),
    ("efficiency", "efficiency", ".2f"),
)


def parser() -> argparse.ArgumentParser:
    """The program's arguments."""
    names = ",".join([*AXES, "processes"])
    parser = argparse.ArgumentParser(prog="benchmarks.scaling", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--axes", default=names, help=f"of {names}; by default all")
    for axis, values in {**AXES, "processes": PROCESSES}.items():
        shown = ",".join(map(str, values))
        parser.add_argument(f"--{axis}", default=shown, help=f"values of this axis (default: {shown})")
    parser.add_argument("--precision", default="fp32", help="one of fp32, bf16, fp16 (default: fp32)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # one of several processes
    measure.common_arguments(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measure and print; see the module's text. Returns the exit status."""
    arguments = parser().parse_args(argv)
    device = measure.set_up(arguments)
    precision, *more = measure.parse_precisions(arguments.precision, device)
    if more:
        raise InputError("--precision takes one precision here.")
    settings: dict[str, Any] = {"precision": precision, "rounds": arguments.rounds, "device": device}
    if arguments.worker:
        work(**settings)
        return 0
    axes = measure.parse_list(arguments.axes, [*AXES, "processes"], "--axes")
    values = {axis: measure.parse_integers(getattr(arguments, axis), f"--{axis}") for axis in axes}
    print(measure.machine(device))
    rows: list[dict[str, Any]] = []
    for axis in axes:
        if axis == "processes":
            rows += measure_processes(values[axis], **settings)
        else:
            rows += measure_axis(axis, values[axis], **settings)
    size = Size()
    print(
        f"\nA training step at k {size.k}, {size.points} points, width {size.width}, batch {size.batch}, but for one\n"
    )
    print(measure.table(COLUMNS, rows))
    if arguments.json:
        measure.print_json(rows)
    return 0


if __name__ == "__main__":
    run_program(main)
