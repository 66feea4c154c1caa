"""Fitting many SIRENs at once against one by one, interleaved in one process.

    python -m benchmarks.fit_set                        [2, 32, 32, 1] at 64 and 784 points (8 x 8 and 28 x 28 pixels)
    python -m benchmarks.fit_set --points 1024 --channels 3 --no-compile
    python -m benchmarks.fit_set --json                 and a last line {"rows": [...]}

One by one is a plain `torch.nn` module, autograd and torch's fused Adam, one network after the other, as scripts of the
literature do. Ours is `mwt.fit_many`, compiled and as it is. All steps are the same: all points, mean squared error and
Adam. Each round runs all sides in turn, each with all threads, the allocator tuned for all; medians over the rounds
count. First it is checked that both sides fit the same: some networks, step for step.

`ratio` is the time of one by one over ours. `bound` is what a step cannot do without on this machine, and its share of
our time: the step's products at the rate of the batched product of that size, its sines and cosines at the rate of the
compiled code for them, both measured in the same rounds. Compiling, seconds once, is not counted.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.agreement import Disagreement
from benchmarks.sides import may_compile
from mwt.fit_many import fit_many, initial_weights, sincos, slots_for
from mwt.fit_set_config import FitConfig
from mwt.observe import grid
from mwt.runtime import run_program
from mwt.weight_space import Layout, Weights

OMEGA = 30.0
CHECKED, CHECK_STEPS, TOLERANCE = 3, 100, 0.05
"""Networks that both sides fit beforehand, for how many steps, and by how many decibels they may differ after."""


class PlainSiren(nn.Module):
    """One network, as anyone would write it."""

    def __init__(self, layout: Layout, weights: Weights, number: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(inputs, outputs) for outputs, inputs in layout.shapes)
        for linear, weight, bias in zip(self.layers, *weights, strict=True):
            linear.load_state_dict({"weight": weight[number], "bias": bias[number]})

    def forward(self, x: Tensor) -> Tensor:
        """Values [P, C] at coordinates [P, D]."""
        for layer in self.layers[:-1]:
            x = torch.sin(OMEGA * layer(x))
        values: Tensor = self.layers[-1](x)
        return values


class Case:
    """Networks and signals of one size, and what is timed."""

    def __init__(self, points: int, arguments: argparse.Namespace, device: torch.device) -> None:
        side, channels, hidden = math.isqrt(points), arguments.channels, arguments.hidden
        self.points, self.device, self.steps = side**2, device, arguments.steps
        self.layout = Layout(sizes=(2, hidden, hidden, channels), omegas=(OMEGA, OMEGA), shared_output=False)
        self.slots = arguments.slots or slots_for(self.points, device)
        count = max(self.slots, CHECKED)
        self.coords = grid(side, side, device=device)
        phase = torch.arange(count * channels, device=device).view(count, 1, channels)
        self.values = (self.coords @ torch.tensor([5.0, 3.0], device=device))[None, :, None].add(phase).sin()
        self.start = initial_weights(self.layout, torch.arange(count, device=device), seed=0)
        self.config = FitConfig(lr=5e-4, steps=self.steps)

    def one(self, number: int = 0, steps: int | None = None) -> Tensor:
        """One network alone: its mean squared error after the steps."""
        net = PlainSiren(self.layout, Weights.unflatten(self.start, self.layout), number).to(self.device)
        optimizer = torch.optim.Adam(net.parameters(), lr=self.config.lr, fused=True)
        target = self.values[number]
        for _ in range(steps or self.steps):
            optimizer.zero_grad()
            nn.functional.mse_loss(net(self.coords), target).backward()
            optimizer.step()
        with torch.no_grad():
            return nn.functional.mse_loss(net(self.coords), target)

    def many(self, compiled: bool, steps: int | None = None) -> Tensor:
        """All slots at once: mean squared error of each."""
        config, n = FitConfig(lr=self.config.lr, steps=steps or self.steps), max(self.slots, CHECKED)
        return fit_many(
            self.layout, self.start[:n], self.coords, self.values[:n], config, slots=self.slots, compiled=compiled
        ).error

    def check(self, compiled: bool) -> float:
        """The largest difference in decibels between the sides.

        Raises:
            Disagreement: above TOLERANCE.
        """
        ours = self.many(compiled, CHECK_STEPS)[:CHECKED]
        theirs = torch.stack([self.one(number, CHECK_STEPS) for number in range(CHECKED)])
        difference = float((10 * (ours / theirs).log10()).abs().max())
        if not difference <= TOLERANCE:
            raise Disagreement(
                f"at {self.points} points the sides differ by {difference:.3g} dB after {CHECK_STEPS} steps, more than "
                f"{TOLERANCE} dB"
            )
        return difference

    @property
    def gflop(self) -> float:
        """Of the products of one step of one network."""
        first, *rest = (outputs * inputs for outputs, inputs in self.layout.shapes)
        return 2 * self.points * (2 * first + 3 * sum(rest)) / 1e9

    @property
    def sines(self) -> int:
        """Pairs of sine and cosine in a step of one network."""
        return self.points * sum(self.layout.hidden)

    def parts(self, compiled: bool) -> dict[str, Callable[[], object]]:
        """Products and sines of the size of a step, to be timed."""
        hidden = self.layout.hidden[0]
        left = torch.randn(self.slots, hidden, hidden, device=self.device)
        right = torch.randn(self.slots, hidden, self.points, device=self.device)
        out = torch.empty_like(right)
        angles = right * OMEGA
        function = torch.compile(sincos, dynamic=False) if compiled else sincos
        return {
            "product": lambda: [torch.bmm(left, right, out=out) for _ in range(20)],
            "sines": lambda: [function(angles) for _ in range(20)],
        }


def measure_case(points: int, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """A row of the result."""
    compiled = may_compile(device, not arguments.no_compile)
    case = Case(points, arguments, device)
    measure.progress(f"{case.points} points: {'compiling, ' if compiled else ''}comparing")
    with torch.no_grad():
        parts = case.parts(compiled)
    difference = case.check(compiled)
    actions: dict[str, Callable[[], object]] = {
        "one": case.one, "ours": lambda: case.many(compiled), "plain": lambda: case.many(False), **parts,
    }  # fmt: skip
    measure.progress(f"{case.points} points: {arguments.rounds} rounds")
    seconds = measure.interleaved(actions, rounds=arguments.rounds, device=device)
    count = max(case.slots, CHECKED)
    own, plain = seconds["ours"] / count / case.steps, seconds["plain"] / count / case.steps
    alone = seconds["one"] / case.steps
    elements = 20 * case.slots * case.points * case.layout.hidden[0]
    rate = 2 * elements * case.layout.hidden[0] / seconds["product"] / 1e9
    products, sines = case.gflop / rate, case.sines * seconds["sines"] / elements
    return {
        "points": case.points, "layout": str(case.layout), "steps": arguments.fit_steps, "slots": case.slots,
        "fits_per_minute": 60 / own / arguments.fit_steps, "one_by_one": 60 / alone / arguments.fit_steps,
        "ratio": alone / own, "uncompiled_ratio": alone / plain, "compiled": compiled,
        "microseconds": own * 1e6, "one_by_one_microseconds": alone * 1e6,
        "gflop": case.gflop, "gflops_of_products": rate, "bound_products_microseconds": products * 1e6,
        "sines_per_second": elements / seconds["sines"], "bound_sines_microseconds": sines * 1e6,
        "bound_share": (products + sines) / own, "psnr_difference": difference, "threads": torch.get_num_threads(),
        "rounds": arguments.rounds,
    }  # fmt: skip


COLUMNS = (
    ("points", "points", ""),
    ("slots", "slots", ""),
    ("fits/min", "fits_per_minute", ",.0f"),
    ("one by one", "one_by_one", ",.0f"),
    ("ratio", "ratio", ".1f"),
    ("uncompiled", "uncompiled_ratio", ".1f"),
    ("step us", "microseconds", ".1f"),
    ("alone us", "one_by_one_microseconds", ".0f"),
    ("GFLOP/s", "gflops_of_products", ".0f"),
    ("products us", "bound_products_microseconds", ".1f"),
    ("sines us", "bound_sines_microseconds", ".1f"),
    ("bound", "bound_share", ".2f"),
    ("differ dB", "psnr_difference", ".0e"),
)


def main(argv: list[str] | None = None) -> int:
    """Measure and print; see the module's text. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="benchmarks.fit_set", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--points", default="64,784", help="comma-separated; pixels of square images")
    parser.add_argument("--hidden", type=int, default=32, help="width of the two sine layers (default: 32)")
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--slots", type=int, help="networks in work at a time; by default mwt.fit_many's choice")
    parser.add_argument("--steps", type=int, default=100, help="of each timing (default: 100)")
    parser.add_argument("--fit-steps", type=int, default=1000, help="of a fit, for fits per minute (default: 1000)")
    parser.add_argument("--no-compile", action="store_true", help="ours without torch.compile")
    measure.common_arguments(parser)
    arguments = parser.parse_args(argv)
    device = measure.set_up(arguments)
    sizes = measure.parse_integers(arguments.points, "--points")
    print(measure.machine(device))
    try:
        rows = [measure_case(points, arguments, device) for points in sizes]
    except Disagreement as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"\nFits of {arguments.fit_steps} steps a minute; ratio: one by one over ours\n")
    print(measure.table(COLUMNS, rows))
    if arguments.json:
        measure.print_json(rows)
    return 0


if __name__ == "__main__":
    run_program(main)
