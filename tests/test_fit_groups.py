"""Signals of several shapes in one run, and the best field of each signal: beside single fits, interrupted or not."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import train.fit
from mwt.errors import InputError
from mwt.fields import Field, FieldConfig, Frame, evaluate, load_field
from mwt.fields.config import MLPConfig
from mwt.fit_best import Best
from mwt.fit_config import FitOptimConfig
from mwt.fit_groups import GroupedFit
from mwt.fitting import SignalFit, fields_for
from mwt.rank import RankTracker
from mwt.runtime import StopRequested
from mwt.signals import TASKS, make_tasks
from train.fit import main

CPU = torch.device("cpu")
SMALL = FieldConfig(mlp=MLPConfig(width=16, hidden_layers=2))
WILD = FitOptimConfig(steps=12, points=100, lr=0.03, schedule="constant")
"""Rates so large that no fit is at its best in the end."""


def picture(seed: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    """Smooth colours."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    waves = [0.5 + 0.5 * np.sin((2 + c + seed) * x + (c + 1) * y * 3) for c in range(channels)]
    return np.round(255 * np.stack(waves, -1)).astype(np.uint8).squeeze()


PICTURES = {
    "0.png": picture(0, 20, 24),
    "1.png": picture(1, 24, 20),
    "2.png": picture(2, 20, 24),
    "3.png": picture(3, 20, 24, channels=1),
    "4.png": picture(4, 24, 20),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mixed").mkdir()
    for name, pixels in PICTURES.items():
        Image.fromarray(pixels).save(tmp_path / "mixed" / name)
    return tmp_path


def started(paths: list[Path], optim: FitOptimConfig = WILD, seed: int = 3) -> GroupedFit:
    kind = TASKS["image"]
    fits = {}
    for shape, task in make_tasks(kind, paths, kind.Options(), CPU).items():
        fields = fields_for(SMALL, task, seed=seed)
        fits[shape] = SignalFit(task, fields, optim, 3, evaluations=6, ranks=RankTracker(fields))
    return GroupedFit(fits)


def done(going: GroupedFit, stop: Callable[[], bool] = lambda: False) -> GroupedFit:
    going.run(stop, lambda _: None, lambda: None)
    return going


def psnrs(field: Field, frame: Frame, names: list[str]) -> list[float]:
    """By NumPy, from what a file shows."""
    values = frame.to_data(evaluate(field, frame.grid())).clamp(0, 1).double().numpy()
    truths = [(PICTURES[name] / 255).reshape(-1, field.channels) for name in names]
    errors = [((shown - truth) ** 2).mean() for shown, truth in zip(values.reshape(len(names), -1, field.channels),
                                                                    truths, strict=True)]  # fmt: skip
    return [-10 * np.log10(error) for error in errors]


# ---- several shapes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adam", "muon"])
def test_signals_of_several_shapes_are_fitted_as_each_alone(folder: Path, name: str) -> None:
    optim = FitOptimConfig(name=name, steps=12, points=100)
    paths = [folder / "mixed" / name for name in PICTURES]
    together = done(started(paths, optim))
    assert {shape: fit.task.names for shape, fit in together.fits.items()} == {
        "20x24x3": ("0.png", "2.png"),
        "24x20x3": ("1.png", "4.png"),
        "20x24x1": ("3.png",),
    }
    alone = {path.name: done(started([path], optim)) for path in paths}
    for fit in together.fits.values():
        for i, own_name in enumerate(fit.task.names):
            for key, value in alone[own_name].first.fields.state_dict().items():
                own = fit.fields.state_dict()[key]
                torch.testing.assert_close(own[i] if fit.task.count > 1 else own, value, rtol=1e-4, atol=1e-6)
    for number, row in enumerate(together.curve):
        singles = [fit.curve[number] for fit in alone.values()]
        assert row["step"] == singles[0]["step"]
        for key in ("loss", "psnr", "ssim"):
            assert row[key] == pytest.approx(np.mean([single[key] for single in singles]), rel=1e-4)
    assert list(together.signals()) == list(PICTURES)
    assert together.signals()["3.png"]["psnr"] == pytest.approx(alone["3.png"].final["psnr"], rel=1e-4)
    assert together.final["psnr"] == pytest.approx(np.mean([fit.final["psnr"] for fit in alone.values()]), rel=1e-4)
    norms = [fit.ranks[-1].spectral_norm for fit in alone.values()]
    assert together.ranks[-1].step == 12
    assert together.ranks[-1].spectral_norm == pytest.approx(np.mean(norms), rel=1e-4)
    assert together.facts()["size"] == {"20x24x3": (20, 24), "24x20x3": (24, 20), "20x24x1": (20, 24)}


def test_pictures_of_several_sizes_cropped_are_one_batch(folder: Path) -> None:
    kind, paths = TASKS["image"], [folder / "mixed" / name for name in ("0.png", "1.png")]
    [(shape, task)] = make_tasks(kind, paths, kind.Options(crop=16), CPU).items()
    assert shape == ""
    for truth, own in zip(
        task.truth.numpy(), (PICTURES["0.png"][2:18, 4:20], PICTURES["1.png"][4:20, 2:18]), strict=True
    ):
        np.testing.assert_allclose(truth, own / 255, atol=1e-6)
    with pytest.raises(InputError, match=r"signal\.crop is 21; .*0\.png is 20 x 24"):
        kind(paths, kind.Options(crop=21), CPU)


@pytest.mark.parametrize("name", ["denoising", "tomography"])
def test_noise_is_the_same_whatever_is_fitted_beside_it(folder: Path, name: str) -> None:
    kind, paths = TASKS[name], [folder / "mixed" / name for name in PICTURES]
    options = kind.Options(sigma=0.1, **({"views": 4} if name == "tomography" else {}))

    def measured(task: Any) -> Any:
        return task.noisy if name == "denoising" else task.measured

    together = {name: own for task in make_tasks(kind, paths, options, CPU).values()
                for name, own in zip(task.names, measured(task), strict=True)}  # fmt: skip
    assert together.keys() == PICTURES.keys()
    for path in paths:
        assert torch.equal(together[path.name], measured(kind([path], options, CPU))[0])
    assert not torch.equal(together["0.png"], together["2.png"])


def test_a_metric_that_some_shapes_lack_is_named(tmp_path: Path) -> None:
    for name, size in (("large.png", 16), ("small.png", 9)):
        Image.fromarray(picture(0, size, size)).save(tmp_path / name)
    going = done(started([tmp_path / "large.png", tmp_path / "small.png"], FitOptimConfig(steps=1)))
    assert list(going.final) == ["psnr"]
    assert going.partial() == {"ssim": ["9x9x3"]}


def test_files_that_changed_their_shapes_are_refused(folder: Path) -> None:
    paths = [folder / "mixed" / name for name in ("0.png", "1.png", "2.png", "4.png")]
    started(paths).save(folder / "state")
    Image.fromarray(PICTURES["1.png"]).save(paths[0])
    Image.fromarray(PICTURES["0.png"]).save(paths[1])
    with pytest.raises(InputError, match="have other shapes than when"):
        started(paths).restore(folder / "state")


def test_signals_of_several_shapes_go_through_the_program(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "run"
    (folder / "mixed/more").mkdir()
    Image.fromarray(PICTURES["1.png"]).save(folder / "mixed/more/0.png")  # of another shape, under a name that is there
    arguments = [f"signal.path={folder}/mixed/**/*.png", f"run.dir={out}", "field.mlp.hidden_layers=1"]
    assert main(["--debug", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "6 signals at once, image, 2 of 20 x 24, 3 of 24 x 20, 1 of 20 x 24" in printed
    found = json.loads((out / "result.json").read_text())
    names = ["000-0.png", "001-1.png", "002-2.png", "003-3.png", "004-4.png", "005-0.png"]
    assert list(found["signals"]) == names
    assert all(name in printed for name in names)
    assert found["signal"]["signals"] == 6
    assert found["final"]["psnr"] == pytest.approx(np.mean([found["signals"][name]["psnr"] for name in names]))
    assert found["fields"] == {
        "field/20x24x3": [names[0], names[2]],
        "field/24x20x3": [names[1], names[4], names[5]],
        "field/20x24x1": [names[3]],
    }
    for name in names:
        assert (out / "reconstruction" / name).is_file()
    field, frame = load_field(out / "field/24x20x3")
    shown = psnrs(field, frame, ["1.png", "4.png", "1.png"])
    assert shown == pytest.approx([found["signals"][names[i]]["psnr"] for i in (1, 4, 5)], abs=1e-3)
    with pytest.raises(InputError, match=r"holds fields of several shapes: load one of .*field/20x24x1, "):
        load_field(out / "field")


class AtOnce(StopRequested):
    """As if SIGTERM had come at the beginning."""

    def __enter__(self) -> StopRequested:
        self.signal = signal.SIGTERM
        return super().__enter__()


def test_an_interrupted_run_of_several_shapes_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--debug", f"signal.path={folder}/mixed", "run.film=false", "run.curves=false"]
    assert main([*arguments, f"run.dir={folder / 'whole'}"]) == 0
    with monkeypatch.context() as changed:
        changed.setattr(train.fit, "StopRequested", AtOnce)
        assert main([*arguments, f"run.dir={folder / 'run'}"]) == 128 + signal.SIGTERM
    assert not (folder / "run/result.json").exists()
    assert main(["--resume", f"run.dir={folder / 'run'}"]) == 0
    whole, found = (json.loads((folder / name / "result.json").read_text()) for name in ("whole", "run"))
    for key in ("final", "best", "signals", "steps"):
        assert found[key] == whole[key]
    steps = [json.loads(line)["step"] for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 4]


def test_files_that_came_or_went_end_a_resumed_fit(folder: Path) -> None:
    paths = [folder / "mixed" / name for name in PICTURES]
    going = done(started(paths), lambda: True)
    going.save(folder / "checkpoint.safetensors")
    with pytest.raises(InputError, match=r"names other signals than when .* was started: 4.png came or went"):
        started(paths[:-1]).restore(folder / "checkpoint.safetensors")


def test_sounds_of_several_lengths(folder: Path) -> None:
    """But of one rate and with equally many channels: else somebody mixed them up."""
    wave = 0.5 * np.sin(np.arange(4000) / 20)
    for name, sound, rate in (("a", wave, 8000), ("b", wave[:3000], 8000), ("c", wave, 8000),
                              ("d", wave[:2000], 16000), ("e", np.stack([wave, wave], 1)[:999], 8000)):  # fmt: skip
        soundfile.write(folder / f"{name}.wav", sound, rate)
    kind = TASKS["audio"]

    def names(files: str, **options: str) -> dict[str, tuple[str, ...]]:
        tasks = make_tasks(kind, [folder / f"{name}.wav" for name in files], kind.Options(**options), CPU)
        return {shape: task.names for shape, task in tasks.items()}

    assert names("abc") == {"4000x1": ("a.wav", "c.wav"), "3000x1": ("b.wav",)}
    assert names("ac") == {"": ("a.wav", "c.wav")}
    assert names("ae") == {"4000x1": ("a.wav",), "999x1": ("e.wav",)}
    with pytest.raises(InputError, match=r"16000 samples a second and .* has 8000; set signal.rate"):
        names("ad")
    with pytest.raises(InputError, match=r"e.wav has 2 channels and .*a.wav has 1: a mix of mono and stereo"):
        names("ae", channel="all")
    with pytest.raises(InputError, match=r"3000 samples and .* has 4000; .* set signal.seconds"):
        kind([folder / "a.wav", folder / "b.wav"], kind.Options(), CPU)


# ---- the best field --------------------------------------------------------------------------------------------------


def test_each_signal_keeps_the_weights_of_its_own_best(folder: Path) -> None:
    """Two networks whose weights are the number of the evaluation."""
    task = started([folder / "mixed" / f"{i}.png" for i in (0, 2)]).first.task
    fields = fields_for(SMALL, task, seed=0)
    best = Best([], {}, {})
    for step, psnr in ((1, [5.0, 5.0]), (2, [4.0, 6.0]), (3, [7.0, 6.0]), (4, [6.9, float("nan")])):
        with torch.no_grad():
            for parameter in fields.parameters():
                parameter.fill_(step)
        best.look(step, {"psnr": psnr, "ssim": [step / 10, step / 5]}, "psnr", fields)
    assert best.steps == [3, 2]
    assert best.metrics == {"psnr": [7.0, 6.0], "ssim": [0.3, 0.4]}
    assert all(value.unique().tolist() == [4] for value in fields.parameters())
    fields.load_state_dict(best.weights)
    for value in fields.parameters():
        assert value[0].unique().tolist() == [3]
        assert value[1].unique().tolist() == [2]


def test_the_best_field_shows_what_is_reported_as_best(folder: Path) -> None:
    """Through the program, with signals that are at their best at different steps, and a single one."""
    common = ["field.mlp.width=16", "optim.steps=24", "run.evaluations=12", "optim.lr=0.03", "optim.schedule=constant",
              "run.film=false", "run.curves=false", "run.ranks=false", "run.device=cpu"]  # fmt: skip
    for path, shapes in (("mixed", ["20x24x3", "24x20x3", "20x24x1"]), ("mixed/0.png", [""])):
        out = folder / f"run{len(shapes)}"
        assert main([f"signal.path={folder}/{path}", f"run.dir={out}", *common]) == 0
        found = json.loads((out / "result.json").read_text())
        seen = []
        for shape in shapes:
            names = found["fields"][f"field/{shape}".removesuffix("/")]
            field, frame = load_field(out / "best_field" / shape)
            shown = psnrs(field, frame, names)
            best = [found["signals"][name]["best"] for name in names]
            assert shown == pytest.approx([one["psnr"] for one in best], abs=1e-3)
            assert all(one["psnr"] >= found["signals"][name]["psnr"] for one, name in zip(best, names, strict=True))
            seen += zip(shown, (one["step"] for one in best), strict=True)
        assert found["best"]["psnr"] == pytest.approx(np.mean([psnr for psnr, _ in seen]), abs=1e-3)
        assert found["best"]["step"] == max(step for _, step in seen)
        assert found["best"]["psnr"] > found["final"]["psnr"]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert max(row["psnr"] for row in rows) == found["best"]["psnr"]


def test_an_interrupted_fit_of_several_shapes_keeps_the_best_bit_for_bit(folder: Path) -> None:
    paths = [folder / "mixed" / name for name in PICTURES]
    whole = done(started(paths))
    first = started(paths)
    done(first, lambda: first.step == 7)
    first.save(folder / "checkpoint.safetensors")
    second = started(paths, seed=99)
    second.restore(folder / "checkpoint.safetensors")
    done(second)
    assert second.best == whole.best
    assert second.signals() == whole.signals()
    assert any(step <= 7 for fit in whole.fits.values() for step in fit.best.steps)  # kept through the interruption
    for a, b in zip(whole.fits.values(), second.fits.values(), strict=True):
        for key, value in a.fields.state_dict().items():
            assert torch.equal(b.fields.state_dict()[key], value)
            assert torch.equal(b.best.weights[key], a.best.weights[key])
    assert [row["step"] for row in second.curve] == [row["step"] for row in whole.curve]
    assert len(second.ranks) == len(whole.ranks)
