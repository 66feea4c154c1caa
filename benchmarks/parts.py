"""Where the time of one training step goes: its parts, each timed alone, with their arithmetic.

    python -m benchmarks.parts                                      the CIFAR-sized step, fp32 and bf16
    python -m benchmarks.parts --cases digits --precision bf16 --no-compile
    python -m benchmarks.parts --json                               and a last line {"rows": [...]}

Each part runs on what the part before it gives; backward parts are the time of forward and backward together less
that of the forward part. The reader's parts hold the tokens and the cross entropy. `share` is of the whole step, which
is timed in the same rounds; what the parts leave over stands in the row "rest". GFLOP are those of the matrix products
(attention counted as plain products); `peak_share` is their rate over that of large matrix products, measured in the
same rounds. On a GPU each part waits for the device, so the sum hides what overlaps in a step.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import measure
from benchmarks.cases import Case, case_arguments, chosen_cases
from benchmarks.sides import Ours, may_compile
from mwt.evaluation import autocast
from mwt.inner_loop import fit
from mwt.observe import observe
from mwt.optim import clip_gradients, make_optimizer
from mwt.runtime import run_program

Action = Callable[[], object]

COLUMNS = (
    ("case", "case", ""),
    ("precision", "precision", ""),
    ("part", "part", ""),
    ("ms", "milliseconds", ".1f"),
    ("share", "share", ".2f"),
    ("GFLOP", "gflop", ".3g"),
    ("GFLOP/s", "gflops_per_second", ".0f"),
    ("of peak", "peak_share", ".2f"),
)


def parts(side: Ours, case: Case, precision: str, device: torch.device) -> dict[str, Action]:
    """The parts of a step as actions; those named `... and back` hold the part before them."""
    model, config = side.model, case.config
    batch = case.random_batch(device)
    observations = observe(batch, config.inner_loop, seed=0)
    optimizer = make_optimizer(model, config.optim)
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # the same work, and the other parts keep their parameters
    field = [*model.siren.parameters(), *model.alpha]

    def fitted() -> Any:
        with autocast(device, precision):
            return fit(model.siren, model.alpha, observations, steps=config.inner_loop.steps, options=config.inner_loop)

    offsets = fitted().offsets.detach().requires_grad_()
    noise = torch.randn_like(offsets)

    def read() -> Tensor:
        with autocast(device, precision):
            return model.read(offsets)

    def fit_and_back() -> None:
        result = fitted()
        torch.autograd.grad((result.offsets * noise).sum() + result.losses[:, -1].mean(), field)

    def read_and_back() -> None:
        loss = torch.nn.functional.cross_entropy(read().float(), batch.labels)
        torch.autograd.grad(loss, [offsets, *model.reader.parameters()])

    side.gradients()
    for name, parameter in model.named_parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert parameter.grad is not None, name

    def update() -> None:
        clip_gradients(optimizer, config.optim.clip_norm)
        optimizer.step()

    return {
        "subsets": lambda: observe(batch, config.inner_loop, seed=0),
        "fit": fitted,
        "fit and back": fit_and_back,
        "reader": read,
        "reader and back": read_and_back,
        "clip and update": update,
        "step": side.step,
    }


def counted(action: Action) -> float:
    """GFLOP of the matrix products of an action that is not compiled."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops() / 1e9


def measure_case(
    name: str, case: Case, precision: str, *, device: torch.device, rounds: int, compile_it: bool
) -> list[dict[str, Any]]:
    """A row for each part."""
    torch.compiler.reset()
    measure.progress(f"{name}, {precision}")
    plain = parts(Ours(case, precision, device, compile_it=False), case, precision, device)
    gflop = {part: counted(action) for part, action in plain.items()}
    actions: dict[str, Action] = dict(
        parts(Ours(case, precision, device, compile_it=compile_it), case, precision, device)
    )
    products = measure.products(precision, device)
    actions |= {f"peak {size}": product for size, product in products.items()}
    seconds = measure.interleaved(actions, rounds=rounds, device=device)
    peak = max(product.gflop / seconds[f"peak {size}"] for size, product in products.items())

    def less(table: dict[str, float], part: str) -> float:
        return table[f"{part} and back"] - table[part]

    found = {
        "subsets": (seconds["subsets"], gflop["subsets"]),
        "fit, forward": (seconds["fit"], gflop["fit"]),
        "fit, backward": (less(seconds, "fit"), less(gflop, "fit")),
        "reader, forward": (seconds["reader"], gflop["reader"]),
        "reader, backward": (less(seconds, "reader"), less(gflop, "reader")),
        "clip and update": (seconds["clip and update"], 0.0),
    }
    found["rest"] = (seconds["step"] - sum(time for time, _ in found.values()), 0.0)
    found["step"] = (seconds["step"], gflop["step"])
    return [
        {
            "case": name,
            "precision": precision,
            "part": part,
            "milliseconds": 1000 * time,
            "share": time / seconds["step"],
            "gflop": arithmetic,
            "gflops_per_second": arithmetic / time if arithmetic and time > 0 else None,
            "peak_share": arithmetic / time / peak if arithmetic and time > 0 else None,
        }
        for part, (time, arithmetic) in found.items()
    ]


def main(argv: list[str] | None = None) -> int:
    """Measure and print; see the module's text. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="benchmarks.parts", description=(__doc__ or "").splitlines()[0])
    case_arguments(parser, "cifar_s1")
    parser.add_argument("--precision", default="fp32,bf16", help="of fp32,bf16,fp16 (default: fp32,bf16)")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    measure.common_arguments(parser)
    arguments = parser.parse_args(argv)
    device = measure.set_up(arguments)
    precisions = measure.parse_precisions(arguments.precision, device)
    print(measure.machine(device))
    rows: list[dict[str, Any]] = []
    for name, case in chosen_cases(arguments).items():
        for precision in precisions:
            compile_it = may_compile(device, not arguments.no_compile)
            rows += measure_case(name, case, precision, device=device, rounds=arguments.rounds, compile_it=compile_it)
    print(measure.table(COLUMNS, rows))
    if arguments.json:
        measure.print_json(rows)
    return 0


if __name__ == "__main__":
    run_program(main)
