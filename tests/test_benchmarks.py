"""The measuring programs: what they print, that both sides do the same, that counts are right. No time is asserted."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import agreement, engines, measure, parts, scaling, sides, step
from benchmarks.cases import CASES, Case, parse_signal, read_case
from mwt.engines import ENGINES
from mwt.errors import InputError
from mwt.observe import points_per_step

CPU = torch.device("cpu")
SIGNAL = "3x4x5x4"
TINY = """
siren: {hidden: 16, hidden_layers: 2}
inner_loop: {steps: 2}
reader: {blocks: 1, head_dim: 8, mlp_ratio: 2.0}
data: {path: nowhere, batch_size: 4}
"""

STEP_KEYS = {
    "case", "precision", "seconds", "paper_seconds", "ratio", "ratio_same_precision", "images_per_second", "gflop",
    "gflops_per_second", "peak_gflops", "peak_share", "memory_bytes", "paper_memory_bytes", "memory_ratio",
    "checkpoint_memory_bytes", "checkpoint_memory_ratio", "gradient_error", "paper_gradient_error", "compiled",
    "rounds", "batch_size",
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(measure.PRODUCT_SIZES, "cpu", (16, 64))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture
def case(tiny: Path) -> Case:
    return read_case(tiny, SIGNAL)


def flags(tiny: Path, *more: str) -> list[str]:
    return ["--config", str(tiny), "--signal", SIGNAL, "--rounds", "2", "--no-compile", "--json", *more]


def rows(capsys: pytest.CaptureFixture[str]) -> tuple[str, list[dict[str, Any]]]:
    """What stands before the last line, and the rows in it."""
    *text, last = capsys.readouterr().out.splitlines()
    return "\n".join(text), json.loads(last)["rows"]


# ---- benchmarks.step ---------------------------------------------------------------------------------------------


def test_step_prints_rows_whose_ratios_are_quotients(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert step.main(flags(tiny, "--no-memory", "--threads", "1")) == 0
    text, found = rows(capsys)
    assert [(row["case"], row["precision"]) for row in found] == [("tiny", "fp32"), ("tiny", "bf16")]
    fp32 = found[0]
    for row in found:
        assert row.keys() == STEP_KEYS
        assert row["ratio"] == pytest.approx(fp32["paper_seconds"] / row["seconds"])
        assert row["ratio_same_precision"] == pytest.approx(row["paper_seconds"] / row["seconds"])
        assert row["images_per_second"] == pytest.approx(4 / row["seconds"])
        assert row["gflops_per_second"] == pytest.approx(row["gflop"] / row["seconds"])
        assert row["peak_share"] == pytest.approx(row["gflops_per_second"] / row["peak_gflops"])
        assert (row["batch_size"], row["rounds"], row["compiled"]) == (4, 2, False)
        assert all(row[key] is None for key in STEP_KEYS if "memory" in key)
        assert f"{row['seconds']:.4f}" in text
    assert fp32["gradient_error"] < 1e-5
    assert fp32["paper_gradient_error"] == 0


def test_batch_and_ours_alone(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert step.main(flags(tiny, "--no-memory", "--no-paper", "--batch", "9", "--precision", "fp32")) == 0
    _, [row] = rows(capsys)
    assert (row["batch_size"], row["paper_seconds"], row["ratio"], row["gradient_error"]) == (9, None, None, None)
    assert row["images_per_second"] == pytest.approx(9 / row["seconds"])


def test_memory_comes_from_children_with_the_same_plan(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The children are played by this process here; one real child is in the next test."""
    asked = []
    sizes = {"paper": 1000, "ours": 600, "checkpoint": 250}

    def child(words: list[str]) -> dict[str, int]:
        arguments = step.parser().parse_args(words[1:])
        plan = step.make_plan(arguments, CPU)
        assert plan.cases["tiny"] == read_case(tiny, SIGNAL).with_batch_size(3)
        assert not plan.compile
        asked.append(arguments.memory_of)
        return {"bytes": sizes[arguments.memory_of[2]]}

    monkeypatch.setattr(measure, "run_child", child)
    assert step.main(flags(tiny, "--precision", "fp32", "--batch", "3")) == 0
    text, [row] = rows(capsys)
    assert asked == [["tiny", "fp32", variant] for variant in ("paper", "ours", "checkpoint")]
    assert [row[f"{name}memory_bytes"] for name in ("paper_", "", "checkpoint_")] == [1000, 600, 250]
    assert (row["memory_ratio"], row["checkpoint_memory_ratio"]) == (0.6, 0.25)
    assert "Peak memory" in text


@pytest.mark.slow
def test_a_child_measures_its_memory(tiny: Path) -> None:
    words = ["--config", str(tiny), "--signal", SIGNAL, "--no-compile", "--memory-of", "tiny", "bf16", "checkpoint"]
    found = measure.run_child(["benchmarks.step", *words])
    assert found is not None
    assert 2**16 < found["bytes"] < 2**30


@pytest.mark.parametrize("variant", ["paper", "ours"])
def test_a_child_that_the_system_ends_has_no_number(
    variant: str, case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "run_child", lambda words: None if words[-1] == variant else {"bytes": 7})
    plan = step.Plan(
        cases={"tiny": case}, precisions=["fp32"], rounds=1, device=CPU, compile=False, memory=["--batch", "1"]
    )
    found = step.memory_of("tiny", "fp32", plan)
    assert found == {"paper": 7, "ours": 7, "checkpoint": 7, variant: None}
    assert f"{variant} did not fit" in capsys.readouterr().err


def test_the_memory_of_a_process_grows_with_what_it_holds() -> None:
    before = measure.peak_memory(CPU)
    held = torch.ones(2**24)
    assert measure.peak_memory(CPU) - before > 2**25
    assert held.sum() == 2**24


@pytest.mark.slow
def test_step_compiled(tiny: Path) -> None:
    """In a process of its own: the shape-checking hook and torch.compile do not go together."""
    words = [word for word in flags(tiny, "--precision", "bf16") if word != "--no-compile"]
    found = measure.run_child(["benchmarks.step", *words])
    assert found is not None
    [row] = found["rows"]
    assert row["compiled"]
    assert min(row[key] for key in ("memory_bytes", "paper_memory_bytes", "checkpoint_memory_bytes")) > 0


# ---- both sides --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [lambda g: g * 1.002, lambda g: g * math.nan, lambda g: g * 0])
def test_no_ratio_for_a_side_that_computes_something_else(
    change: Callable[[Tensor], Tensor], tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = sides.Ours.gradients

    def perturbed(self: sides.Ours) -> sides.Gradients:
        found = honest(self)
        return found | {"alpha.1": change(found["alpha.1"])}

    monkeypatch.setattr(sides.Ours, "gradients", perturbed)
    assert step.main(flags(tiny, "--no-memory", "--precision", "fp32")) == 1
    said = capsys.readouterr()
    assert "ratio" not in said.out
    assert "tiny, fp32: the gradient of alpha.1 differs from the paper's" in said.err


def test_half_precision_is_to_be_alike_on_the_whole(case: Case) -> None:
    expected = sides.Paper(case, "fp32", CPU).gradients()
    found = sides.Ours(case, "bf16", CPU, compile_it=False).gradients()
    agreement.check_gradients("tiny", "bf16", found, expected)
    with pytest.raises(agreement.Disagreement, match="tiny, bf16: the gradient of all parameters differs"):
        agreement.check_gradients("tiny", "bf16", {name: 2 * g for name, g in found.items()}, expected)
    with pytest.raises(agreement.Disagreement, match=r"other parameters: .'alpha\.0'."):
        agreement.differences({name: g for name, g in found.items() if name != "alpha.0"}, expected)


@pytest.mark.parametrize("signal", [SIGNAL, "1x30x4"])
@pytest.mark.parametrize("fraction", [1.0, 0.4])
def test_both_sides_take_the_same_steps(signal: str, fraction: float, tiny: Path) -> None:
    """Two updates from the same parameters; AdamW's first step is the rate times a sign, so its rounding is small."""
    tiny.write_text(f"{TINY.replace('steps: 2', f'steps: 2, fraction: {fraction}')}\noptim: {{clip_norm: 0.01}}\n")
    case = read_case(tiny, signal)
    ours, theirs = sides.Ours(case, "fp32", CPU, compile_it=False), sides.Paper(case, "fp32", CPU)
    before = sides.paper_parameters(ours.model)
    for _ in range(2):
        ours.step()
        theirs.step()
    after = sides.paper_parameters(ours.model)
    assert after.keys() == theirs.parameters.keys()
    for name, value in theirs.parameters.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-6, msg=name)
        assert not torch.equal(after[name], before[name]), name


def test_asking_for_gradients_moves_nothing(case: Case) -> None:
    ours = sides.Ours(case, "fp32", CPU, compile_it=False)
    before = sides.paper_parameters(ours.model)
    first, second = ours.gradients(), ours.gradients()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(value, before[name]) for name, value in sides.paper_parameters(ours.model).items())


@pytest.mark.parametrize("make", [sides.Paper, partial(sides.Ours, compile_it=False)])
def test_fp16_gradients_are_without_the_scale(make: Callable[..., sides.Paper | sides.Ours], case: Case) -> None:
    """Programs allow fp16 on GPUs only, autocast and loss scaling work here too."""
    expected = make(case, "fp32", CPU).gradients()
    side = make(case, "fp16", CPU)
    assert agreement.mean_difference(side.gradients(), expected) < 0.05
    side.step()
    assert agreement.mean_difference(side.gradients(), expected) > 0


# ---- floating-point operations -----------------------------------------------------------------------------------


def test_operations_of_the_paper_s_formulation_by_hand(case: Case) -> None:
    """B 4, P 20, D 2, C 3, H 16, L 2, S 2; T 32 tokens; MLP ratio 2; K 4. Two for each multiplication and addition."""
    rows_of_points = 4 * 20
    first, hidden, head = 2 * rows_of_points * 2 * 16, 2 * rows_of_points * 16 * 16, 2 * rows_of_points * 16 * 3
    render = first + 2 * hidden + head
    # Of each hidden layer the weight's and the input's gradient, of the first the weight's, of the head the input's.
    inner_gradient = first + 2 * 2 * hidden + head
    # Each product has two gradients, but nobody asks for that of coordinates.
    through_render = first + 2 * 2 * hidden + 2 * head
    through_gradient = first + 2 * 4 * hidden + 2 * head
    fit = 2 * (render + inner_gradient) + render
    two_passes = 2 * 2 * (through_render + through_gradient) + through_render

    rows_of_tokens = 4 * 32
    embed = 2 * rows_of_tokens * 17 * 16
    projections = 2 * rows_of_tokens * 16 * (3 * 16 + 16 + 32 + 32)  # qkv, proj, fc1, fc2
    attention = 2 * (2 * rows_of_tokens * 32 * 16)  # scores and mixture
    logits = 2 * 4 * 16 * 4
    reader = 3 * (embed + projections + attention + logits)

    assert sides.count_flop(sides.Paper(case, "fp32", CPU)) == fit + two_passes + reader
    ours = sides.count_flop(sides.Ours(case, "fp32", CPU, compile_it=False))
    # One pass instead of two; what is not a product of matrices (coordinates, the head's few channels) is not counted.
    assert reader + fit < ours < reader + fit + two_passes
    assert sides.fewest_gflop(case, CPU) == ours / 1e9


def test_operations_grow_by_the_same_with_every_signal(case: Case) -> None:
    large = case.with_batch_size(11)
    counted = min(
        sides.count_flop(sides.Paper(large, "fp32", CPU)),
        sides.count_flop(sides.Ours(large, "fp32", CPU, compile_it=False)),
    )
    assert sides.fewest_gflop(large, CPU) == pytest.approx(counted / 1e9, rel=1e-12)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return x @ y

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        return upstream @ y.mT, x.mT @ upstream


def test_the_counter_sees_into_custom_functions_and_fused_attention() -> None:
    x, y = torch.ones(3, 5, requires_grad=True), torch.ones(5, 7, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        Doubled.apply(x, y).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 3 * 5 * 7
    query = torch.ones(2, 3, 8, 16)
    with FlopCounterMode(display=False) as counter:
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert counter.get_total_flops() == 2 * (2 * 2 * 3 * 8 * 8 * 16)


# ---- cases and arguments -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "width", "layers", "steps", "omega", "blocks", "points"),
    [
        ("cifar_s1", 128, 4, 6, 10, 10, 1024),
        ("cifar_s01", 128, 4, 6, 10, 10, 102),
        ("mwt_l", 256, 4, 6, 10, 10, 1024),
        ("imagenette", 128, 4, 4, 30, 10, 5120),
        ("points", 256, 4, 4, 10, 10, 327),
        ("digits", 64, 2, 4, 10, 3, 64),
    ],
)
def test_the_sizes_of_the_cases(
    name: str, width: int, layers: int, steps: int, omega: float, blocks: int, points: int
) -> None:
    case = CASES[name].case()
    model, batch = case.model, case.with_batch_size(2).random_batch(CPU)
    assert (model.siren.hidden, model.siren.hidden_layers, model.siren.omega) == (width, layers, omega)
    assert (model.inner_loop.steps, model.reader.blocks, model.reader.mlp_ratio) == (steps, blocks, 1)
    pixels = batch.values.shape[1] if batch.images is None and batch.values is not None else 0
    if batch.images is not None:
        pixels = batch.images.shape[-1] * batch.images.shape[-2]
    assert points_per_step(model.inner_loop, pixels) == points
    assert int(batch.labels.max()) < len(model.signal.classes)


def test_recomputation_changes_nothing_else(case: Case) -> None:
    again = case.with_recomputation()
    assert again.config.inner_loop.checkpoint
    assert again.config.reader.checkpoint
    expected = sides.Ours(case, "fp32", CPU, compile_it=False).gradients()
    found = sides.Ours(again, "fp32", CPU, compile_it=False).gradients()
    assert max(agreement.differences(found, expected).values()) < 1e-5


def test_a_configuration_takes_its_sizes_from_its_data(tmp_path: Path) -> None:
    path = tmp_path / "digits.yaml"
    path.write_text("data: {path: builtin:digits}")
    facts = read_case(path, None).facts
    assert (facts.channels, facts.height, facts.width, len(facts.classes)) == (1, 8, 8, 10)


def test_input_that_cannot_be_measured(tiny: Path) -> None:
    for words, message in [
        (["--config", str(tiny)], "Or say how large the signals are: --signal 3x32x32x10"),
        (["--cases", "cifar,digits"], "--cases cifar: there are cifar_s1"),
        (["--precision", "fp16", "--device", "cpu"], "fp16 needs a CUDA device"),
        (["--precision", "fp8"], "--precision fp8: there are fp32, bf16, fp16"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--batch", "0"], "--batch is 0"),
    ]:
        with pytest.raises(InputError, match=message):
            step.main(words)
    for text in ("3x32", "3x32x32xten", "0x8x8x10", ""):
        with pytest.raises(InputError, match="CHANNELSxHEIGHTxWIDTHxCLASSES"):
            parse_signal(text)
    with pytest.raises(InputError, match="--k is '1,x'"):
        scaling.main(["--k", "1,x"])


def test_tables_align_words_left_and_numbers_right() -> None:
    columns = (("case", "case", ""), ("s", "seconds", ".1f"), ("MiB", "bytes", "MiB"))
    rows = [{"case": "a", "seconds": 10.0, "bytes": 2**20}, {"case": "longer", "seconds": 2.0, "bytes": None}]
    assert measure.table(columns, rows).splitlines() == ["case       s  MiB", "a       10.0  1.0", "longer   2.0    -"]


# ---- benchmarks.engines and benchmarks.scaling -------------------------------------------------------------------


def test_engines_prints_a_row_for_each(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert engines.main(flags(tiny)) == 0
    text, found = rows(capsys)
    names = {row["engine"] for row in found}
    assert names >= {"paper", "analytic, first order", "analytic, checkpoint", *ENGINES}
    assert {row["precision"] for row in found} == {"fp32", "bf16"}
    for row in found:
        assert row["ratio"] == pytest.approx(row["paper_seconds"] / row["seconds"])
        assert row["memory_ratio"] == pytest.approx(row["peak_bytes"] / row["paper_peak_bytes"])
        assert row["peak_bytes"] > 4 * 20 * 16 * 4
        limit = 0.1 if row["precision"] == "bf16" else 1e-5
        assert (row["gradient_error"] < limit) == ("first order" not in row["engine"])
        assert row["engine"] in text
    bytes_of = {row["engine"]: row["peak_bytes"] for row in found if row["precision"] == "fp32"}
    assert bytes_of["analytic, first order"] < bytes_of["analytic"]


def test_scaling_fits_an_exponent_to_each_axis(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "Size", partial(scaling.Size, k=1, points=16, width=16, batch=2))
    words = ["--axes", "k,points,width,batch", "--k", "1,2", "--points", "16,32", "--width", "8,16", "--batch", "2"]
    assert scaling.main([*words, "--rounds", "2", "--json"]) == 0
    text, found = rows(capsys)
    assert [(row["axis"], row["value"]) for row in found] == [
        ("k", 1), ("k", 2), ("points", 16), ("points", 32), ("width", 8), ("width", 16), ("batch", 2),
    ]  # fmt: skip
    for axis in ("k", "points", "width"):
        low, high = (row for row in found if row["axis"] == axis)
        expected = math.log(high["seconds"] / low["seconds"]) / math.log(high["value"] / low["value"])
        assert low["exponent"] == pytest.approx(expected) == high["exponent"]
    assert found[-1]["exponent"] is None
    assert found[-1]["images_per_second"] == pytest.approx(2 / found[-1]["seconds"])
    assert "exponent" in text


def test_the_exponent_of_a_power() -> None:
    assert scaling.slope([1, 2, 4, 8], [3.0, 12.0, 48.0, 192.0]) == pytest.approx(2)
    assert scaling.slope([5], [1.0]) is None


def test_the_efficiency_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two take 0.5 s for 32 images where one takes 0.4 s for 16: 64 images/s of 2 x 40."""
    answers = {None: {"seconds": 0.4, "images": 16}, 2: {"seconds": 0.5, "images": 32}}
    monkeypatch.setattr(measure, "run_child", lambda words, processes, environment: answers[processes])
    one, two = scaling.measure_processes([1, 2], precision="fp32", rounds=2, device=CPU)
    assert (one["images_per_second"], one["efficiency"]) == (pytest.approx(40), 1)
    assert (two["images_per_second"], two["efficiency"]) == (pytest.approx(64), pytest.approx(0.8))


def test_what_each_process_does(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "Size", partial(scaling.Size, k=1, points=16, width=16, batch=2))
    assert scaling.main(["--worker", "--device", "cpu", "--rounds", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 2
    assert found["seconds"] > 0


@pytest.mark.slow
def test_two_real_processes() -> None:
    [row] = scaling.measure_processes([2], precision="fp32", rounds=1, device=CPU)
    assert row["value"] == 2
    assert row["images_per_second"] == pytest.approx(2 * 16 / row["seconds"])


# ---- parts -------------------------------------------------------------------------------------------------------


def test_parts_add_up_to_the_step(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parts.main(flags(tiny, "--precision", "fp32")) == 0
    _, found = rows(capsys)
    *pieces, step_row = found
    assert [row["part"] for row in pieces][-1] == "rest"
    assert step_row["part"] == "step"
    assert step_row["share"] == 1
    assert sum(row["milliseconds"] for row in pieces) == pytest.approx(step_row["milliseconds"])
    # A step computes the fit and the reader, forward and back, and no product else.
    assert sum(row["gflop"] for row in pieces) == pytest.approx(step_row["gflop"], rel=1e-6)
