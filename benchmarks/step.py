"""One training step: the paper's formulation against ours, interleaved in one process.

    python -m benchmarks.step                                       all cases, fp32 and bf16 (many minutes)
    python -m benchmarks.step --cases cifar_s1,digits --precision bf16
    python -m benchmarks.step --config configs/classify/digits.yaml that configuration, on random data of its size
    python -m benchmarks.step --json                                and a last line {"rows": [...]}

A step goes from a batch on the device to the update: observe, fit, read, backward, clip, AdamW. Each round runs, one
after the other, the paper's formulation (`benchmarks.paper`) and ours (`mwt.training.train_step` as `train.classify`
drives it, compiled) in each precision, and the matrix products whose best rate is called the machine's peak; medians
over the rounds count. The allocator is tuned for both sides. What favours the baseline: the coordinates and values of
its inner steps are made beforehand, outside of the timing, and its AdamW is the fused one.

`ratio` is the paper's time in fp32 over ours, `ratio_same_precision` its time in the same precision over ours. There is
none where the gradients differ, which is looked at first; how far each side's are from the paper's in fp32 stands in
the last columns (root mean square over the parameters, relative to their norms). FLOPs are those of the matrix products
in the formulation that needs fewer. Peak memory is that of a process of its own for each variant, in its first three
steps, less what it held after its imports.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import measure
from benchmarks.agreement import Disagreement, compare
from benchmarks.cases import CASES, Case, case_arguments, chosen_cases
from benchmarks.measure import quotient
from benchmarks.sides import Ours, Paper, fewest_gflop, may_compile
from mwt.runtime import run_program

VARIANTS = ("paper", "ours", "checkpoint")
STEPS_FOR_MEMORY = 3


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured, and how."""

    cases: dict[str, Case]
    precisions: list[str]
    rounds: int
    device: torch.device
    compile: bool
    memory: list[str] | None
    """Arguments with which a child process comes to the same plan; None: no memory."""
    paper: bool = True


# ---- arguments ---------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The program's arguments."""
    parser = argparse.ArgumentParser(prog="benchmarks.step", description=(__doc__ or "").splitlines()[0])
    case_arguments(parser, ",".join(CASES))
    parser.add_argument("--precision", default="fp32,bf16", help="of fp32,bf16,fp16 (default: fp32,bf16)")
    parser.add_argument("--no-compile", action="store_true", help="ours without torch.compile")
    parser.add_argument("--no-memory", action="store_true", help="leave out the child processes that measure memory")
    parser.add_argument(
        "--no-paper", action="store_true", help="ours alone, unchecked: batches too large for the other"
    )
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)  # CASE PRECISION VARIANT: what a child does
    measure.common_arguments(parser)
    return parser


def make_plan(arguments: argparse.Namespace, device: torch.device) -> Plan:
    """The plan that the arguments describe.

    Raises:
        InputError: a case, precision, batch size or configuration that cannot be measured.
    """
    again = ["--device", device.type, "--threads", str(torch.get_num_threads())]
    again += ["--config", *(str(path.absolute()) for path in arguments.config)] if arguments.config else []
    for name in ("cases", "signal", "batch"):
        value = getattr(arguments, name)
        again += [f"--{name}", str(value)] if value is not None else []
    again += ["--no-compile"] if arguments.no_compile else []
    return Plan(
        cases=chosen_cases(arguments),
        precisions=measure.parse_precisions(arguments.precision, device),
        rounds=arguments.rounds,
        device=device,
        compile=may_compile(device, not arguments.no_compile),
        memory=None if arguments.no_memory else again,
        paper=not arguments.no_paper,
    )


# ---- memory ------------------------------------------------------------------------------------------------------


def peak_of(case: Case, precision: str, variant: str, plan: Plan) -> int:
    """In a process of its own: the peak of a few steps of one variant, less what was held before anything was built."""
    if variant != "paper" and plan.compile:  # the compiler's own modules are imports too
        import torch._dynamo
        import torch._inductor.compile_fx  # noqa: F401
    before = measure.peak_memory(plan.device)
    side: Paper | Ours
    if variant == "paper":
        side = Paper(case, precision, plan.device)
    else:
        case = case.with_recomputation() if variant == "checkpoint" else case
        side = Ours(case, precision, plan.device, compile_it=plan.compile)
    for _ in range(STEPS_FOR_MEMORY):
        side.step()
    return measure.peak_memory(plan.device) - before


def memory_of(name: str, precision: str, plan: Plan) -> dict[str, int | None]:
    """Peak bytes of each variant, each from a child process; None where it did not fit, or was not asked for."""
    found: dict[str, int | None] = dict.fromkeys(VARIANTS)
    if plan.memory is None:
        return found
    for variant in VARIANTS if plan.paper else VARIANTS[1:]:
        measure.progress(f"{name}, {precision}: memory of {variant}")
        result = measure.run_child(["benchmarks.step", *plan.memory, "--memory-of", name, precision, variant])
        if result is None:
            measure.progress(f"{name}, {precision}: {variant} did not fit into memory")
        found[variant] = None if result is None else result["bytes"]
    return found


# ---- time --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Timed:
    """What the rounds of one case gave."""

    seconds: dict[tuple[str, str], float]
    """Of a step, by side and precision."""
    peaks: dict[str, float]
    """The machine's peak in GFLOP/s by precision, from the same rounds."""
    errors: dict[tuple[str, str], float]
    """How far the gradients of each are from the paper's in fp32."""


def time_case(name: str, case: Case, plan: Plan) -> Timed:
    """Run the rounds of a case, after its sides have been compared."""
    torch.compiler.reset()
    measure.progress(f"{name}: building, comparing gradients")
    order = list(dict.fromkeys(["fp32", *plan.precisions]))
    theirs = {precision: Paper(case, precision, plan.device) for precision in order if plan.paper}
    ours = {precision: Ours(case, precision, plan.device, compile_it=plan.compile) for precision in plan.precisions}
    errors = compare(name, ours, theirs)
    products = {precision: measure.products(precision, plan.device) for precision in plan.precisions}
    actions: dict[tuple[str, ...], Callable[[], object]] = {}
    for precision in order:
        if precision in theirs:
            actions["paper", precision] = theirs[precision].step
        if precision in ours:
            actions["ours", precision] = ours[precision].step
            for size, product in products[precision].items():
                actions["peak", precision, str(size)] = product
    measure.progress(f"{name}: {plan.rounds} rounds")
    seconds = measure.interleaved(actions, rounds=plan.rounds, device=plan.device)
    for side in ours.values():
        side.meter.check()
    return Timed(
        seconds={(key[0], key[1]): value for key, value in seconds.items() if len(key) == 2},
        peaks={
            precision: max(product.gflop / seconds["peak", precision, str(size)] for size, product in sizes.items())
            for precision, sizes in products.items()
        },
        errors=errors,
    )


def measure_case(name: str, case: Case, plan: Plan) -> list[dict[str, Any]]:
    """A row of the result for each precision."""
    measure.progress(f"{name}: counting floating-point operations")
    gflop = fewest_gflop(case, plan.device, paper_too=plan.paper)
    timed = time_case(name, case, plan)
    rows = []
    for precision in plan.precisions:
        own, same = timed.seconds["ours", precision], timed.seconds.get(("paper", precision))
        memory = memory_of(name, precision, plan)
        rows.append(
            {
                "case": name,
                "precision": precision,
                "seconds": own,
                "paper_seconds": same,
                "ratio": quotient(timed.seconds.get(("paper", "fp32")), own),
                "ratio_same_precision": quotient(same, own),
                "images_per_second": case.batch_size / own,
                "gflop": gflop,
                "gflops_per_second": gflop / own,
                "peak_gflops": timed.peaks[precision],
                "peak_share": gflop / own / timed.peaks[precision],
                "memory_bytes": memory["ours"],
                "paper_memory_bytes": memory["paper"],
                "memory_ratio": quotient(memory["ours"], memory["paper"]),
                "checkpoint_memory_bytes": memory["checkpoint"],
                "checkpoint_memory_ratio": quotient(memory["checkpoint"], memory["paper"]),
                "gradient_error": timed.errors.get(("ours", precision)),
                "paper_gradient_error": timed.errors.get(("paper", precision)),
                "compiled": plan.compile,
                "rounds": plan.rounds,
                "batch_size": case.batch_size,
            }
        )
    return rows


# ---- what people read --------------------------------------------------------------------------------------------


TIME_COLUMNS = (
    ("case", "case", ""),
    ("precision", "precision", ""),
    ("batch", "batch_size", ""),
    ("paper s", "paper_seconds", ".4f"),
    ("ours s", "seconds", ".4f"),
    ("images/s", "images_per_second", ".4g"),
    ("ratio", "ratio", ".2f"),
    ("same precision", "ratio_same_precision", ".2f"),
    ("GFLOP", "gflop", ".3g"),
    ("GFLOP/s", "gflops_per_second", ".0f"),
    ("peak", "peak_gflops", ".0f"),
    ("share", "peak_share", ".2f"),
    ("error", "gradient_error", ".0e"),
    ("paper's", "paper_gradient_error", ".0e"),
)
MEMORY_COLUMNS = (
    ("case", "case", ""),
    ("precision", "precision", ""),
    ("paper MiB", "paper_memory_bytes", "MiB"),
    ("ours MiB", "memory_bytes", "MiB"),
    ("ratio", "memory_ratio", ".2f"),
    ("recomputing MiB", "checkpoint_memory_bytes", "MiB"),
    ("ratio", "checkpoint_memory_ratio", ".2f"),
)


def main(argv: list[str] | None = None) -> int:
    """Measure and print; see the module's text. Returns the exit status."""
    arguments = parser().parse_args(argv)
    device = measure.set_up(arguments)
    plan = make_plan(arguments, device)
    if arguments.memory_of:
        name, precision, variant = arguments.memory_of
        print(json.dumps({"bytes": peak_of(plan.cases[name], precision, variant, plan)}))
        return 0
    print(measure.machine(device))
    rows: list[dict[str, Any]] = []
    try:
        for name, case in plan.cases.items():
            rows += measure_case(name, case, plan)
    except Disagreement as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"\nA training step, {'compiled' if plan.compile else 'not compiled'}; ratio: the paper's fp32 over ours\n")
    print(measure.table(TIME_COLUMNS, rows))
    if plan.memory is not None:
        print("\nPeak memory of a process\n")
        print(measure.table(MEMORY_COLUMNS, rows))
    if arguments.json:
        measure.print_json(rows)
    return 0


if __name__ == "__main__":
    run_program(main)
