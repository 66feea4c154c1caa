"""The engines of the inner loop: forward and backward pass of one fit, against the paper's formulation.

    python -m benchmarks.engines                                     digits and CIFAR-sized fits, fp32 and bf16
    python -m benchmarks.engines --cases cifar_s01 --precision fp32
    python -m benchmarks.engines --json                              and a last line {"rows": [...]}

Only the fit is measured, no reader and no update: the observations of every step are made beforehand, and the loss is
the mean error after the last step plus the offsets times fixed random numbers. Every round runs all engines in turn;
medians count. `ratio` is the time of the paper's formulation (`benchmarks.paper.adapt` and the backward pass through
it) in the same precision over that of the engine. Peak bytes are what torch allocates in the two passes at its most.
`error` is how far the gradients are from the paper's in fp32 (root mean square over the parameters, relative to their
norms): rounding, but for first order, which leaves a part of the gradient out.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import measure, paper
from benchmarks.agreement import mean_difference
from benchmarks.cases import Case, case_arguments, chosen_cases
from benchmarks.measure import quotient
from benchmarks.sides import Gradients, compiled, make_model, may_compile, paper_parameters, paper_settings, spread
from mwt.config import InnerLoopConfig
from mwt.engines import ENGINES
from mwt.evaluation import autocast
from mwt.inner_loop import fit
from mwt.observe import observe
from mwt.runtime import run_program

DEFAULT_CASES = "digits,cifar_s01,cifar_s1"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """An engine and how it is used."""

    engine: str
    compiled: bool = False
    first_order: bool = False
    checkpoint: bool = False

    @property
    def name(self) -> str:
        """As it stands in the table."""
        words = ("compiled", self.compiled), ("first order", self.first_order), ("checkpoint", self.checkpoint)
        return ", ".join([self.engine, *(word for word, used in words if used)])

    def options(self, config: InnerLoopConfig) -> InnerLoopConfig:
        """The same in a configuration."""
        return replace(config, engine=self.engine, first_order=self.first_order, checkpoint=self.checkpoint)


def variants(compile_it: bool) -> list[Variant]:
    """Every engine; of the analytic one, what else it can do."""
    found = []
    for engine in ENGINES:
        found.append(Variant(engine=engine))
        if engine == "analytic":
            found += [Variant(engine=engine, compiled=True)] if compile_it else []
            found += [Variant(engine=engine, first_order=True), Variant(engine=engine, checkpoint=True)]
    return found


# ---- what is timed -----------------------------------------------------------------------------------------------


class Fitting:
    """One fit and the backward pass through it: forward in a precision, then the gradient of every parameter."""

    def __init__(
        self, case: Case, precision: str, device: torch.device, forward: Callable[[], tuple[Tensor, Tensor]]
    ) -> None:
        self._precision, self._device, self._forward = precision, device, forward
        self.parameters: dict[str, Tensor] = {}
        layers, width = case.config.siren.hidden_layers, case.config.siren.hidden
        size = width * (case.facts.coordinate_dims + 1) + layers * width * (width + 1)
        generator = torch.Generator().manual_seed(1)
        self._upstream = torch.randn(case.batch_size, size, generator=generator).to(device)

    def __call__(self) -> None:
        """Both passes."""
        self.forget()
        with autocast(self._device, self._precision):
            offsets, losses = self._forward()
        (losses[:, -1].mean() + (offsets * self._upstream).sum()).backward()

    def forget(self) -> None:
        """Drop the gradients of the last call."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def gradients(self) -> Gradients:
        """The gradients of one call."""
        self()
        return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in self.parameters.items()}


def engine_fitting(case: Case, variant: Variant, precision: str, device: torch.device) -> Fitting:
    """A fit by one of our engines."""
    model = make_model(case.model, device)
    if variant.compiled:
        model = compiled(model)
    config = case.config.inner_loop
    seen = observe(case.random_batch(device), config, seed=0)

    def forward() -> tuple[Tensor, Tensor]:
        fitted = fit(model.siren, model.alpha, seen, steps=config.steps, options=variant.options(config))
        return fitted.offsets, fitted.losses

    fitting = Fitting(case, precision, device, forward)
    fitting.parameters = {name: p for name, p in model.named_parameters() if not name.startswith("reader.")}
    return fitting


def paper_fitting(case: Case, precision: str, device: torch.device) -> Fitting:
    """A fit in the paper's formulation."""
    model = make_model(case.model, device)
    settings = paper_settings(case.model)
    coords, values = spread(observe(case.random_batch(device), case.config.inner_loop, seed=0), settings.steps)
    everything = paper_parameters(model)
    parameters = {name: p.requires_grad_() for name, p in everything.items() if not name.startswith("reader.")}

    def forward() -> tuple[Tensor, Tensor]:
        offsets, losses, _ = paper.adapt(parameters, coords, values, settings)
        return offsets, losses

    fitting = Fitting(case, precision, device, forward)
    fitting.parameters = parameters
    return fitting


def peak_bytes(action: Fitting, device: torch.device) -> int:
    """The most that torch holds in one call, above what it held before."""
    action.forget()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        action()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would report on GPUs that are not there
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    changes, events = [], list(profiler.profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events += event.children
        if event.typed[0].name == "Allocation":
            changes.append((event.start_time_ns, event.typed[1].alloc_size))
    held = most = 0
    for _, change in sorted(changes):
        held += change
        most = max(most, held)
    return most


# ---- the program -------------------------------------------------------------------------------------------------


def measure_case(
    name: str, case: Case, precisions: list[str], *, rounds: int, device: torch.device, compile_it: bool
) -> list[dict[str, Any]]:
    """A row for each engine and precision."""
    torch.compiler.reset()
    measure.progress(f"{name}: building, comparing gradients")
    fittings: dict[tuple[str, str], Fitting] = {}
    for precision in precisions:
        fittings["paper", precision] = paper_fitting(case, precision, device)
        for variant in variants(compile_it):
            fittings[variant.name, precision] = engine_fitting(case, variant, precision, device)
    expected = paper_fitting(case, "fp32", device).gradients()
    errors = {key: mean_difference(fitting.gradients(), expected) for key, fitting in fittings.items()}
    measure.progress(f"{name}: {rounds} rounds")
    seconds = measure.interleaved(dict(fittings), rounds=rounds, device=device, warm_up=1)
    peaks = {key: peak_bytes(fitting, device) for key, fitting in fittings.items()}
    return [
        {
            "case": name,
            "engine": engine,
            "precision": precision,
            "seconds": seconds[engine, precision],
            "paper_seconds": seconds["paper", precision],
            "ratio": quotient(seconds["paper", precision], seconds[engine, precision]),
            "peak_bytes": peaks[engine, precision],
            "paper_peak_bytes": peaks["paper", precision],
            "memory_ratio": quotient(peaks[engine, precision], peaks["paper", precision]),
            "gradient_error": errors[engine, precision],
            "rounds": rounds,
            "batch_size": case.batch_size,
        }
        for engine, precision in fittings
    ]


COLUMNS = (
    ("case", "case", ""),
    ("engine", "engine", ""),
    ("precision", "precision", ""),
    ("seconds", "seconds", ".4f"),
    ("ratio", "ratio", ".2f"),
    ("peak MiB", "peak_bytes", "MiB"),
    ("ratio", "memory_ratio", ".2f"),
    ("error", "gradient_error", ".0e"),
)


def main(argv: list[str] | None = None) -> int:
    """Measure and print; see the module's text. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="benchmarks.engines", description=(__doc__ or "").splitlines()[0])
    case_arguments(parser, DEFAULT_CASES)
    parser.add_argument("--precision", default="fp32,bf16", help="of fp32,bf16,fp16 (default: fp32,bf16)")
    parser.add_argument("--no-compile", action="store_true", help="leave out what is compiled")
    measure.common_arguments(parser)
    arguments = parser.parse_args(argv)
    device = measure.set_up(arguments)
    precisions = measure.parse_precisions(arguments.precision, device)
    compile_it = may_compile(device, not arguments.no_compile)
    print(measure.machine(device))
    rows: list[dict[str, Any]] = []
    for name, case in chosen_cases(arguments).items():
        rows += measure_case(name, case, precisions, rounds=arguments.rounds, device=device, compile_it=compile_it)
    print("\nForward and backward pass of the fit alone; ratio: the paper's time over the engine's\n")
    print(measure.table(COLUMNS, rows))
    if arguments.json:
        measure.print_json(rows)
    return 0


if __name__ == "__main__":
    run_program(main)
