"""Rendering a picture with ASMR against a SIREN of equal width and depth, interleaved in one process.

    python -m benchmarks.asmr                           512 x 512 with bases 4 4 4 8, and 2048 x 2048 with 4 4 8 16
    python -m benchmarks.asmr --sizes 768 --channels 3
    python -m benchmarks.asmr --json                    and a last line {"rows": [...]}

All are networks of four linear layers, 256 wide, as they are made, and draw all pixels of one grey picture. SIREN is
this project's, evaluated in the chunks that suit it. `plain` is ASMR with activations shared as published: a sine for
every pixel and unit in the last hidden layer. `asmr` is what the project does: that sine by angle addition
(`mwt.fields.asmr`), the same values, which is checked first. Each round runs all in turn; medians count.

`ratio` is SIREN's time over ours. What could be had: `MACs` is SIREN's multiply-adds over ours (`published` over those
of the published form, which has fewer, and sines in their place). `bound` is what our form cannot do without on this
machine, measured in the same rounds: its products, its sines, and one pass over the values, from tiles into rows, each
at the rate of the bare operation of that size; `near` is its share of our time.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.agreement import Disagreement
from mwt.cost import counted_macs
from mwt.fields import ActivationConfig, ASMRConfig, FieldConfig, MLPConfig, build_field, evaluate
from mwt.fields.asmr import ASMR
from mwt.observe import grid
from mwt.runtime import run_program

CHUNK = 8192
"""Points of the SIREN, and of plain sharing, at once: their activations stay in the caches."""
TOLERANCE = 1e-3
"""Of the largest value: float32 has seven digits of phases of hundreds of radians."""


class Case:
    """The networks of one size, and what is timed."""

    def __init__(self, size: int, arguments: argparse.Namespace, device: torch.device) -> None:
        self.size, self.width, self.device = size, arguments.width, device
        asmr = ASMRConfig(width=self.width, layers=arguments.layers, size=(size,))
        activation = ActivationConfig(name="sine", omega=30.0)
        mlp = MLPConfig(width=self.width, hidden_layers=arguments.layers - 2, activation=activation)
        sizes = {"coordinate_dims": 2, "channels": arguments.channels, "seed": 0}
        field = build_field(FieldConfig(name="asmr", asmr=asmr), **sizes).to(device)
        assert isinstance(field, ASMR)
        self.asmr, self.siren = field, build_field(FieldConfig(mlp=mlp), **sizes).to(device)
        self.coords = grid(size, size, device=device)

    @torch.no_grad()
    def plain(self) -> Tensor:
        """Activations shared as published; a number of tiles at a time, for the last ones fill gigabytes."""
        field, before = self.asmr, self.asmr.layers - 2
        phase, modulation = field._shared(before), field._modulation(before)
        parts = phase.split(max(1, CHUNK // len(modulation)))
        return torch.cat([field.last((part[:, None] + modulation).sin()) for part in parts])

    def ours(self) -> Tensor:
        """All pixels by angle addition."""
        return evaluate(self.asmr, self.coords)

    def check(self) -> None:
        """Refuse to time what is not the same.

        Raises:
            Disagreement: angle addition against every sample and unit's own sine.
        """
        ours = self.ours()
        chosen = torch.arange(0, len(ours), max(1, len(ours) // 4096), device=self.device)
        ours = ours[chosen]
        with torch.no_grad():
            theirs = self.asmr.samples(torch.stack(torch.unravel_index(chosen, self.asmr.size), -1), shared=False)
        difference = float((ours - theirs).abs().max() / theirs.abs().max())
        if not difference <= TOLERANCE:
            raise Disagreement(f"at {self.size} x {self.size} angle addition differs by {difference:.2g} of the values")

    def bound(self) -> dict[str, Callable[[], object]]:
        """The bare operations of our form: products, sines, a pass over the values."""
        field, last = self.asmr, self.asmr.layers - 2
        cells = [math.prod(level) for level in field.cells]
        places, width = math.prod(field.tile) * field.channels, self.width
        device = self.device
        hidden = [torch.randn(cells[i], width, device=device) for i in range(1, last + 1)]
        square, weights = torch.randn(width, width, device=device), torch.randn(width, places, device=device)
        outs = [torch.empty_like(part) for part in hidden]
        values = torch.empty(cells[last], places, device=device)

        def products() -> None:
            for part, out in zip(hidden, outs, strict=True):
                torch.mm(part, square, out=out)
            for _ in range(2):
                torch.mm(hidden[-1], weights, out=values)

        def sines() -> None:
            for part, out in zip(hidden, outs, strict=True):
                torch.sin(part, out=out)
            for _ in range(2):
                torch.sin(hidden[-1], out=outs[-1])

        return {"products": products, "sines": sines, "passes": lambda: torch.empty_like(values).copy_(values)}


def measure_case(size: int, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """A row of the result."""
    case = Case(size, arguments, device)
    measure.progress(f"{size} x {size}: comparing, then {arguments.rounds} rounds")
    case.check()
    actions: dict[str, Callable[[], object]] = {
        "asmr": case.ours, "plain": case.plain,
        "siren": lambda: evaluate(case.siren, case.coords, chunk=CHUNK), **case.bound(),
    }  # fmt: skip
    with torch.no_grad():
        seconds = measure.interleaved(actions, rounds=arguments.rounds, device=device, warm_up=1)
        points = len(case.coords)
        siren = counted_macs(lambda: case.siren(case.coords[:16])) / 16
        ours, plain = counted_macs(case.ours) / points, counted_macs(case.plain) / points
    bound = seconds["products"] + seconds["sines"] + seconds["passes"]
    return {
        "size": size, "bases": " ".join(map(str, case.asmr.bases[0])), "width": case.width,
        "channels": arguments.channels, "asmr_ms": 1e3 * seconds["asmr"], "plain_ms": 1e3 * seconds["plain"],
        "siren_ms": 1e3 * seconds["siren"], "ratio": seconds["siren"] / seconds["asmr"],
        "plain_ratio": seconds["siren"] / seconds["plain"], "macs": ours, "plain_macs": plain, "siren_macs": siren,
        "mac_ratio": siren / ours, "published_mac_ratio": siren / plain,
        "products_ms": 1e3 * seconds["products"], "sines_ms": 1e3 * seconds["sines"],
        "passes_ms": 1e3 * seconds["passes"], "bound_ms": 1e3 * bound, "bound_share": bound / seconds["asmr"],
        "threads": torch.get_num_threads(), "rounds": arguments.rounds,
    }  # fmt: skip


COLUMNS = (
    ("size", "size", ""),
    ("bases", "bases", ""),
    ("asmr ms", "asmr_ms", ".1f"),
    ("plain ms", "plain_ms", ".1f"),
    ("SIREN ms", "siren_ms", ".0f"),
    ("ratio", "ratio", ".1f"),
    ("plain", "plain_ratio", ".1f"),
    ("MACs", "mac_ratio", ".0f"),
    ("published", "published_mac_ratio", ".0f"),
    ("products ms", "products_ms", ".1f"),
    ("sines ms", "sines_ms", ".1f"),
    ("passes ms", "passes_ms", ".1f"),
    ("near", "bound_share", ".2f"),
)


def main(argv: list[str] | None = None) -> int:
    """Measure and print; see the module's text. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="benchmarks.asmr", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", default="512,2048", help="comma-separated; pixels along both axes")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4, help="linear layers of both networks (default: 4)")
    parser.add_argument("--channels", type=int, default=1)
    measure.common_arguments(parser)
    arguments = parser.parse_args(argv)
    device = measure.set_up(arguments)
    sizes = measure.parse_integers(arguments.sizes, "--sizes")
    print(measure.machine(device))
    try:
        rows = [measure_case(size, arguments, device) for size in sizes]
    except Disagreement as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\nAll pixels of one picture; ratio: SIREN's time over ours\n")
    print(measure.table(COLUMNS, rows))
    if arguments.json:
        measure.print_json(rows)
    return 0


if __name__ == "__main__":
    run_program(main)
