"""What a fitted field costs: parameters, multiply-adds for a point, time for the whole signal.

    python -m eval.cost --run RUN                        what train.fit wrote to RUN/field
    python -m eval.cost --run RUN --runs 20 --threads 1

Time is the median of several evaluations of the signal's whole grid, after one that does not count. Multiply-adds are
the formula's (`mwt.cost` says what counts) and those that torch counts on the grid. Writes RUN/eval/cost.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from mwt.cost import counted_macs, latency
from mwt.errors import InputError
from mwt.fields import evaluate, load_field
from mwt.runtime import choose_device, keep_freed_memory, run_program, write_json


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(prog="eval.cost", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="run directory that train.fit has made")
    parser.add_argument("--shape", default="", metavar="HxWxC", help="which field, of a run of several shapes")
    parser.add_argument("--runs", type=int, default=10, help="evaluations that are timed (default 10)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, help="of the CPU; by default torch's")
    arguments = parser.parse_args(argv)
    if arguments.runs < 1 or (arguments.threads is not None and arguments.threads < 1):
        raise InputError("--runs and --threads must be at least 1.")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Measure; see the module's text. Returns the exit status."""
    arguments = parse(argv)
    keep_freed_memory()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = choose_device(arguments.device)
    field, frame = load_field(arguments.run / "field" / arguments.shape)
    field = field.to(device)
    if frame.size is None:
        raise InputError(f"{arguments.run}: its signal is no grid, so there is no whole signal to time.")
    coords = frame.grid(device=device)
    points = len(coords) * (field.copies or 1)
    seconds = latency(lambda: evaluate(field, coords), device, runs=arguments.runs)
    found = {
        "parameters": field.num_parameters,
        "macs_per_point": round(field.macs_per_point(), 1),
        "macs_counted": round(counted_macs(lambda: evaluate(field, coords)) / points, 1),
        "latency_ms": round(1000 * seconds, 3),
        "points": points,
        "points_per_second": round(points / seconds),
        "runs": arguments.runs,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }
    folder = arguments.run / "eval"
    folder.mkdir(exist_ok=True)
    write_json(folder / "cost.json", found)
    for name, value in found.items():
        print(f"{name:<20}{value:>16,}" if isinstance(value, int | float) else f"{name:<20}{value:>16}")
    print(f"\nWritten: {folder / 'cost.json'}")
    return 0


if __name__ == "__main__":
    run_program(main)
