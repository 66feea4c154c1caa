"""ASMR: against the formulas in NumPy, every way of computing it against the others, bases, refusals, fits."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import asmr as benchmark
from mwt.cost import asmr_angle_macs, counted_macs
from mwt.errors import InputError, NotDefinedError
from mwt.fields import ASMRConfig, FieldConfig, Frame, WithOffsets, build_field, evaluate, load_field, save_field
from mwt.fields.asmr import ASMR
from mwt.fields.asmr_bases import bases_for, choose_bases, factorisations
from mwt.fit_config import FitOptimConfig
from mwt.fitting import SignalFit, fields_for
from mwt.observe import grid
from mwt.signals import TASKS, Sampler
from mwt.signals.image import ImageTask
from mwt.signals.task import Task

CPU = torch.device("cpu")
BASES = {
    "sound": ((2, 3, 5),),
    "picture": ((2, 3, 4), (3, 2, 5)),
    "two layers": ((3, 4), (2, 5)),
    "volume": ((2, 3, 2), (3, 2, 2), (2, 2, 3)),
    "a level of ones": ((1, 3, 1, 2), (2, 1, 2, 3)),
}
TRIMMED = {"picture": (22, 30), "volume": (11, 12, 10)}
"""Sizes that their bases pad."""


def build(
    bases: tuple[tuple[int, ...], ...], size: tuple[int, ...] | None = None, *, channels: int = 2, **options: Any
) -> ASMR:
    """In float64. Coordinates from -1 to 1."""
    size = size or tuple(math.prod(axis) for axis in bases)
    config = FieldConfig(name="asmr", asmr=ASMRConfig(bases=bases, width=7, size=size))
    field = build_field(config, coordinate_dims=len(size), channels=channels, seed=1, **options).double()
    assert isinstance(field, ASMR)
    return field


def coordinates(size: tuple[int, ...]) -> Tensor:
    return torch.cartesian_prod(*(torch.linspace(-1, 1, n, dtype=torch.float64) for n in size)).reshape(-1, len(size))


def by_formula(field: ASMR, bases: tuple[tuple[int, ...], ...], numbers: np.ndarray) -> np.ndarray:
    """The published equations, a sample at a time, in NumPy; numbers [P, D] to [P, C]."""
    own = {name: value.detach().numpy() for name, value in field.state_dict().items()}
    layers, omega, found = len(bases[0]), 30.0, []
    for place in numbers:
        u = np.zeros((layers, len(bases)))
        for axis, sides in enumerate(bases):
            rest = math.prod(sides)
            for level, side in enumerate(sides):
                rest //= side
                u[level, axis] = place[axis] // rest % side / max(side - 1, 1)
        z = u[0]
        for i in range(layers - 1):
            name = "first" if i == 0 else f"hidden.{i - 1}"
            modulation = omega * u[i + 1] @ own[f"modulators.{i}.weight"]
            z = np.sin(omega * (z @ own[f"{name}.weight"] + own[f"{name}.bias"] + modulation))
        found.append(z @ own["last.weight"] + own["last.bias"])
    return np.array(found)


# ---- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trimmed", [False, True])
@pytest.mark.parametrize("name", list(BASES))
def test_every_way_gives_the_published_values(name: str, trimmed: bool) -> None:
    """The whole grid with and without angle addition, samples that share and that do not: 1-D, 2-D, 3-D."""
    bases = BASES[name]
    size = TRIMMED.get(name) if trimmed else None
    if trimmed and size is None:
        size = tuple(math.prod(axis) - 1 for axis in bases)
    field = build(bases, size)
    size = field.size
    numbers = np.stack(np.unravel_index(np.arange(math.prod(size)), size), -1)
    expected = by_formula(field, bases, numbers)
    assert expected.std() > 0.01
    ways = {
        "whole": field.whole(),
        "plain": field.whole(angle_addition=False),
        "shared": field.samples(torch.from_numpy(numbers)),
        "alone": field.samples(torch.from_numpy(numbers), shared=False),
        "coords": field(coordinates(size)),
        "again": field(coordinates(size)),
    }
    for way, values in ways.items():
        np.testing.assert_allclose(values.detach().numpy(), expected, rtol=0, atol=1e-12, err_msg=way)


@pytest.mark.parametrize("name", ["sound", "picture", "volume"])
def test_batches_of_any_samples(name: str) -> None:
    """Few (one by one), most of the grid in any order (by tiles), whole tiles, rows, one sample."""
    field = build(BASES[name], TRIMMED.get(name))
    coords = coordinates(field.size)
    whole, count = field.whole(), len(coords)
    order = torch.randperm(count)
    sampler = Sampler(count, 2 * math.prod(field.tile), 0, CPU, (field.size, field.tile))
    batches = {
        "few": order[:5], "many": order[: count // 2], "all": order, "one": order[:1], "twice": order[:4].repeat(9),
        "rows": torch.arange(count // 3, count - 1), "tiles": sampler.index(0), "more tiles": sampler.index(1),
    }  # fmt: skip
    kinds = set()
    for batch, index in batches.items():
        assert index is not None
        own = coords[index].clone()
        kinds.add(type(field._plan(own)))
        torch.testing.assert_close(field(own), whole[index], rtol=0, atol=1e-12, msg=lambda m, b=batch: f"{b}: {m}")
    assert len(kinds) == (1 if name == "sound" else 2)  # tiles, and samples; a tile of 5 is always worth it


@pytest.mark.parametrize("copies", [None, 3])
@pytest.mark.parametrize("name", ["sound", "picture", "volume"])
def test_gradients_of_all_ways_agree(name: str, copies: int | None) -> None:
    field = build(BASES[name], TRIMMED.get(name), copies=copies)
    coords = coordinates(field.size)
    numbers = torch.from_numpy(np.stack(np.unravel_index(np.arange(len(coords)), field.size), -1))
    target = torch.randn(*field.whole().shape, dtype=torch.float64)
    order = torch.randperm(len(coords))

    def gradients(values: Tensor, wanted: Tensor = target) -> list[Tensor]:
        return list(torch.autograd.grad((values - wanted).square().mean(), list(field.parameters())))

    expected = gradients(field.samples(numbers, shared=False))
    assert all(gradient.abs().max() > 1e-6 for gradient in expected)
    for values, wanted in (
        (field(coords), target),
        (field.whole(angle_addition=False), target),
        (field.samples(numbers), target),
        (field(coords[order]), target[..., order, :]),
    ):
        for found, right in zip(gradients(values, wanted), expected, strict=True):
            torch.testing.assert_close(found, right, rtol=0, atol=1e-10 * float(right.abs().max()))


def test_copies_are_networks_of_their_own() -> None:
    bases = BASES["picture"]
    several = build(bases, copies=3)
    coords = coordinates(several.size)
    own = torch.stack([coords[torch.randperm(len(coords))[:50]] for _ in range(3)])
    for i in range(3):
        alone = build(bases, position=i)
        torch.testing.assert_close(several(coords)[i], alone(coords), rtol=0, atol=1e-12)
        torch.testing.assert_close(several(own)[i], alone(own[i]), rtol=0, atol=1e-12)


def test_coordinates_that_are_changed_in_place_are_looked_at_again() -> None:
    field = build(BASES["picture"])
    coords = coordinates(field.size)
    whole = field(coords)
    coords.copy_(coords.flip(0))
    torch.testing.assert_close(field(coords), whole.flip(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda field: pickle.loads(pickle.dumps(field))])
def test_a_field_that_has_been_evaluated_is_copied(again: Callable[[ASMR], ASMR]) -> None:
    """It remembers the whole grid, of which its copy knows nothing; the copy's weights are its own."""
    field = build(BASES["picture"])
    coords = coordinates(field.size)
    expected = field(coords)
    other = again(field)
    torch.testing.assert_close(other(coords), expected, rtol=0, atol=0)
    with torch.no_grad():
        other.last.weight.zero_()
    assert not torch.equal(other(coords), field(coords))
    torch.testing.assert_close(other(coords.flip(0)), other(coords).flip(0), rtol=0, atol=1e-12)


def test_evaluation_in_rows_of_tiles() -> None:
    field = build(BASES["picture"], TRIMMED["picture"])
    coords = coordinates(field.size)
    parts = field.split(coords, 1)
    assert [len(part) for part in parts] == [120] * 5 + [60]  # 4 rows of 30, the last one cut off
    assert len(field.split(coords[:7], 2)) == 4
    torch.testing.assert_close(evaluate(field, coords, chunk=1), field.whole(), rtol=0, atol=1e-12)


def test_initial_values_and_sizes_are_the_published_ones() -> None:
    """Cameraman with four layers: 134,145 parameters (table 2)."""
    config = FieldConfig(name="asmr", asmr=ASMRConfig(bases=((4, 4, 4, 8),), size=(512,)))
    field = build_field(config, coordinate_dims=2, channels=1, seed=0)
    assert isinstance(field, ASMR)
    assert field.num_parameters == 134_145
    ends = {"first": 1 / 2, "hidden.0": (6 / 256) ** 0.5 / 30, "last": (6 / 256) ** 0.5 / 30}
    for name, end in ends.items():
        for part in ("weight", "bias"):
            largest = float(field.get_parameter(f"{name}.{part}").detach().abs().max())
            assert largest <= end
            assert largest > 0.9 * end or (name == "last" and part == "bias")
    assert 0.7 < field.get_parameter("modulators.2.weight").detach().abs().max() <= 2**-0.5
    assert [name for name, _, _ in field.muon_parameters()] == ["hidden.0.weight", "hidden.1.weight"]
    with FlopCounterMode(display=False) as counter:  # the published count: 1,344.2 a sample
        field.whole(angle_addition=False)
    assert counter.get_total_flops() / 2 / 512**2 == pytest.approx(1344.2, abs=0.05)
    assert field.macs_per_point() == pytest.approx(1344.2, abs=0.05)
    computed = counted_macs(field.whole) / 512**2
    assert computed == pytest.approx(asmr_angle_macs(field.bases, 256, 1)) == pytest.approx(1600.2, abs=0.05)


# ---- bases -------------------------------------------------------------------------------------------------------


def test_chosen_bases() -> None:
    assert choose_bases(512, 4) == (4, 4, 4, 8)
    assert choose_bases(768, 4) == (4, 4, 6, 8)
    assert choose_bases(8192, 6) == (2, 4, 4, 4, 4, 16)
    for samples in [*range(1, 130), 257, 511, 1001, 32000, 65537, 4194301]:
        for layers in (2, 4, 7):
            bases = choose_bases(samples, layers)
            assert len(bases) == layers
            assert list(bases) == sorted(bases)
            assert samples <= math.prod(bases) <= max(1.25 * samples, samples + 2)
    assert sorted(factorisations(12, 3)) == [(1, 1, 12), (1, 2, 6), (1, 3, 4), (2, 2, 3)]


@pytest.mark.parametrize("name", list(TRIMMED))
def test_padding_is_counted(name: str) -> None:
    """The work of the padded grid, for each sample that there is; torch counts the same."""
    field = build(BASES[name], TRIMMED[name])
    counted = counted_macs(lambda: field.whole(angle_addition=False)) / math.prod(field.size)
    assert field.macs_per_point() == pytest.approx(counted, rel=1e-12)
    assert field.macs_per_point() > build(BASES[name]).macs_per_point()


def test_given_bases() -> None:
    assert bases_for((512, 768), ((4, 4, 4, 8), (4, 4, 6, 8)), None) == ((4, 4, 4, 8), (4, 4, 6, 8))
    assert bases_for((768, 512), ((4, 4, 4, 8), (4, 4, 6, 8)), None) == ((4, 4, 6, 8), (4, 4, 4, 8))  # portrait
    assert bases_for((9, 768, 512), ((9,), (512,), (768,)), None) == ((9,), (768,), (512,))
    assert bases_for((64, 60), ((4, 4, 4),), None) == ((4, 4, 4),) * 2
    with pytest.raises(InputError, match=r"\[4, 4\] count to 16, and axis 1 has 17 samples; 3 x 6 would do"):
        bases_for((16, 17), ((4, 4),), None)
    with pytest.raises(InputError, match="2 lists for 3 axes"):
        bases_for((4, 4, 4), ((2, 2), (2, 2)), None)
    for options, message in (
        ({"bases": ((4, 4), (4, 4, 1))}, "has 2, 3 numbers; every axis needs as many"),
        ({"bases": ((4,),)}, "has 1 numbers"),
        ({"bases": ()}, "has no numbers"),
        ({"bases": ((4, 0),)}, "below 1"),
        ({"bases": ((4, 4),), "layers": 3}, "layers is 3, and asmr.bases has 2 digits"),
        ({"layers": 1}, "layers is 1"),
        ({"width": 0}, "width is 0"),
        ({"omega": 0.0}, "omega is 0"),
        ({"size": (0,)}, "asmr.size"),
        ({"coordinate_range": (1.0, 1.0)}, "must rise"),
    ):
        with pytest.raises(InputError, match=message):
            ASMRConfig(**options)  # type: ignore[arg-type]


def test_the_size_is_the_signals() -> None:
    frame = Frame(kind="audio", axes=("t",), coordinate_range=((-100.0, 100.0),), size=(30,))
    config = FieldConfig(name="asmr", asmr=ASMRConfig(width=5))
    field = build_field(config, coordinate_dims=1, channels=1, seed=0, frame=frame)
    assert isinstance(field, ASMR)
    assert field.size == (30,)
    assert field.detail.startswith("bases ")
    torch.testing.assert_close(field(frame.grid()), field.whole())
    half_open = Frame(kind="x", axes=("t",), coordinate_range=((0.0, 3.0),), size=(30,), endpoint=False)
    other = build_field(config, coordinate_dims=1, channels=1, seed=0, frame=half_open)
    torch.testing.assert_close(other(half_open.grid()), field.whole())
    padded = FieldConfig(name="asmr", asmr=ASMRConfig(width=5, size=(13,), layers=2))
    assert build_field(padded, coordinate_dims=1, channels=1, seed=0).detail == "bases 2 x 7, 13 samples padded to 14"
    with pytest.raises(InputError, match=r"asmr\.size is \[13\], and the signal has \[30\]"):
        build_field(padded, coordinate_dims=1, channels=1, seed=0, frame=frame)
    with pytest.raises(InputError, match=r"asmr\.size is null"):
        build_field(config, coordinate_dims=1, channels=1, seed=0)
    with pytest.raises(InputError, match="frame has 1 axes and the field 2"):
        build_field(config, coordinate_dims=2, channels=1, seed=0, frame=frame)


@pytest.mark.parametrize("copies", [None, 2])
def test_round_trip_on_disk(copies: int | None, tmp_path: Path) -> None:
    frame = Frame(kind="image", axes=("y", "x"), coordinate_range=((-1.0, 1.0), (-0.5, 0.5)), size=(13, 8))
    config = FieldConfig(name="asmr", asmr=ASMRConfig(width=5))
    field = build_field(config, coordinate_dims=2, channels=3, seed=0, copies=copies, frame=frame)
    save_field(field, frame, tmp_path)
    loaded, found = load_field(tmp_path)
    assert found == frame
    assert torch.equal(evaluate(loaded, found.grid()), evaluate(field, frame.grid()))
    with pytest.raises(NotDefinedError, match="13 x 8 samples alone"):
        evaluate(loaded, found.grid((26, 16)))


# ---- what is not defined -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:FutureWarning")  # torch's own, where forward mode begins
def test_places_that_are_no_samples_are_refused() -> None:
    field = build(BASES["picture"])
    for place in ([0.0, 0.0], [-1.0, 1.001], [-1.1, 1.0], [float("nan"), 1.0], [1.0 + 2 / 23, 1.0]):
        with pytest.raises(NotDefinedError, match=r"24 x 30 samples alone, and .* is none"):
            field(torch.tensor([[1.0, 1.0], place], dtype=torch.float64))
    with pytest.raises(NotDefinedError, match="no gradient with respect to coordinates"):
        field(coordinates(field.size).requires_grad_())
    seen = coordinates(field.size)
    field(seen)  # now known to be the whole grid
    with pytest.raises(NotDefinedError, match="no gradient with respect to coordinates"):
        field(seen.requires_grad_())
    for derivative in (torch.func.jacrev, torch.func.jacfwd):
        with pytest.raises(NotDefinedError, match="no gradient with respect to coordinates"):
            derivative(field)(coordinates(field.size)[:2])
    with pytest.raises(NotDefinedError, match="no gradient with respect to coordinates"):
        torch.func.jvp(field, (coordinates(field.size),), (torch.ones(24 * 30, 2, dtype=torch.float64),))
    with pytest.raises(InputError, match=r"takes coordinates \[P, 2\]"):
        field(torch.zeros(4, 3, dtype=torch.float64))
    assert issubclass(NotDefinedError, InputError)


def test_coordinates_in_float32_are_recognised_in_long_signals() -> None:
    for samples in (32_000, 1_000_000):
        config = FieldConfig(name="asmr", asmr=ASMRConfig(width=2, size=(samples,)))
        field = build_field(config, coordinate_dims=1, channels=1, seed=0)
        assert isinstance(field, ASMR)
        coords = torch.linspace(-1, 1, samples)[:, None]
        assert torch.equal(field._numbers(coords)[:, 0], torch.arange(samples))
        with pytest.raises(NotDefinedError):
            field(torch.linspace(-1, 1, 2 * samples)[:, None])


def picture(folder: Path, height: int = 26, width: int = 22) -> Path:
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    shown = np.round(127 + 60 * np.sin(9 * x + 4 * y) + 50 * np.cos(7 * y)).astype(np.uint8)
    Image.fromarray(shown).save(folder / "picture.png")
    return folder / "picture.png"


SMALL = FieldConfig(name="asmr", asmr=ASMRConfig(width=24))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("poisson", {}, "needs derivatives of order 1 .* defined on whole samples only"),
        ("super_resolution", {"factor": 2}, "between the samples"),
        ("tomography", {}, "between the samples"),
        ("image", {"scale": 2}, "between the samples"),
    ],
)
def test_tasks_that_are_not_defined(name: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    kind = TASKS[name]
    task = kind([picture(tmp_path)], kind.Options(**options), CPU)
    with pytest.raises(NotDefinedError, match=message):
        fields_for(SMALL, task, seed=0)


def test_tasks_that_ask_between_samples() -> None:
    between = {name for name, kind in TASKS.items() if kind.between}
    assert between == {"super_resolution", "tomography", "shape", "radiance"}


# ---- fits --------------------------------------------------------------------------------------------------------


def fitted(task: Task, seed: int = 0, **options: Any) -> SignalFit:
    fit = SignalFit(task, fields_for(SMALL, task, seed=seed), FitOptimConfig(**options), seed, evaluations=2)
    fit.run(lambda: False, lambda _: None, lambda: None)
    return fit


@pytest.mark.parametrize("points", [None, 200])
def test_a_fit_is_that_of_the_published_form(points: int | None, tmp_path: Path) -> None:
    """Steps on the whole picture, or on tiles, against torch's Adam on samples that share nothing."""
    task = ImageTask([picture(tmp_path)], ImageTask.Options(low=0.0), CPU)
    fit = fitted(task, steps=12, points=points, lr=1e-3, lr_min=1e-4)
    field = fields_for(SMALL, task, seed=0)
    assert isinstance(field, ASMR)
    adam = torch.optim.Adam(field.parameters(), lr=1e-3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, T_max=12, eta_min=1e-4)
    for step in range(12):
        index = fit.sampler.index(step)
        assert (index is None) == (points is None)
        chosen = torch.arange(task.points) if index is None else index
        numbers = torch.stack(torch.unravel_index(chosen, (26, 22)), -1)
        adam.zero_grad()
        (field.samples(numbers, shared=False) - task.values[0, chosen]).square().mean().backward()
        adam.step()
        cosine.step()
    for ours, theirs in zip(fit.fields.parameters(), field.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_a_fit_learns_and_several_at_once(tmp_path: Path) -> None:
    path = picture(tmp_path)
    alone = fitted(ImageTask([path], ImageTask.Options(low=0.0), CPU), steps=150, lr=2e-3)
    assert alone.curve[-1]["psnr"] > 30
    both = fitted(ImageTask([path, path], ImageTask.Options(low=0.0), CPU), steps=3, lr=2e-3)
    for value in both.fields.state_dict().values():
        torch.testing.assert_close(value[0], value[1])


def test_tiles_come_once_each() -> None:
    size, tile = (10, 7), (4, 3)  # 3 x 3 tiles, those at the edges cut off
    sampler = Sampler(70, 40, 0, CPU, (size, tile))
    seen: list[int] = []
    for step in range(3):
        index = sampler.index(step)
        assert index is not None
        cells = {(int(i) // 7 // 4, int(i) % 7 // 3) for i in index}
        assert len(cells) == 3
        seen += index.tolist()
    assert sorted(seen) == list(range(70))
    other = Sampler(70, 40, 0, CPU, (size, tile))
    assert torch.equal(other.index(5), sampler.index(5))  # type: ignore[arg-type]
    assert len(Sampler(70, 2, 0, CPU, (size, tile)).index(0)) in (2, 3, 4, 6, 8, 12)  # type: ignore[arg-type]


def test_in_the_inner_loop() -> None:
    """Under vmap over signals: shared coordinates, and each signal's own."""
    field = build(BASES["picture"], channels=1)
    wrapped = WithOffsets(field)
    coords = grid(24, 30).double()
    offsets = 1e-3 * torch.randn(3, wrapped.adapted_size, dtype=torch.float64)
    expected = wrapped(offsets, coords)
    assert not torch.equal(expected[0], expected[1])
    shared = torch.func.vmap(lambda own: wrapped(own[None], coords)[0])(offsets)
    torch.testing.assert_close(shared, expected, rtol=0, atol=1e-12)
    index = torch.stack([torch.randperm(720)[:40] for _ in range(3)])

    def loss(own: Tensor, places: Tensor) -> Tensor:
        return wrapped(own[None], places)[0].square().sum()

    found = torch.func.vmap(torch.func.grad(loss))(offsets, coords[index])
    for i in range(3):
        right = torch.func.grad(loss)(offsets[i], coords[index[i]])
        torch.testing.assert_close(found[i], right, rtol=1e-8, atol=1e-9)
    whole = torch.func.grad(loss)(offsets[0], coords)  # as an argument, and within the function
    torch.testing.assert_close(whole, torch.func.grad(lambda own: loss(own, coords))(offsets[0]), rtol=0, atol=1e-12)
    own = offsets[0].clone().requires_grad_()
    (by_autograd,) = torch.autograd.grad(loss(own, coords), own)
    torch.testing.assert_close(whole, by_autograd, rtol=1e-10, atol=1e-12)


# ---- the benchmark -----------------------------------------------------------------------------------------------


def test_the_benchmark_prints_quotients(capsys: pytest.CaptureFixture[str]) -> None:
    """In one row a size; no time is asserted."""
    assert benchmark.main(["--sizes", "24,31", "--width", "16", "--rounds", "1", "--channels", "2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["size"] for row in rows] == [24, 31]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["siren_ms"] / row["asmr_ms"])
        assert row["siren_macs"] == 2 * 16 + 2 * 16 * 16 + 16 * 2
        assert row["mac_ratio"] == pytest.approx(row["siren_macs"] / row["macs"])
        assert row["bound_share"] > 0
    published = FieldConfig(name="asmr", asmr=ASMRConfig(width=16, size=(24,)))
    field = build_field(published, coordinate_dims=2, channels=2, seed=0)
    assert isinstance(field, ASMR)
    terms = [math.prod(level) for level in field.cells]
    digits = [math.prod(axis[i] for axis in field.bases) for i in (1, 2, 3)]
    by_hand = 2 * 16 * terms[0] + 256 * (terms[1] + terms[2]) + 32 * terms[3] + 2 * 16 * sum(digits)
    assert rows[0]["plain_macs"] * 24**2 == pytest.approx(by_hand)


def test_the_benchmark_refuses_to_time_what_differs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    by_tiles = ASMR._by_tiles
    monkeypatch.setattr(ASMR, "_by_tiles", lambda self, phase: 1.01 * by_tiles(self, phase))
    assert benchmark.main(["--sizes", "24", "--width", "8", "--rounds", "1"]) == 1
    assert "angle addition differs by" in capsys.readouterr().err
