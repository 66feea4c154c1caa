"""eval.spectrum end to end: models, runs and a grid, its page, and numbers that are computed again from its files."""

from __future__ import annotations

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image, ImageSequence
from scipy import stats

from eval import spectrum
from eval.spectrum import exit_status, main
from mwt.config_files import load_config
from mwt.errors import InputError, NotDefinedError, TrainingError
from mwt.fields import Field, Frame, build_field, load_field
from mwt.fit_config import FitOptimConfig
from mwt.fit_run import FitRun, read_fit_run
from mwt.ntk import kernel
from mwt.signals import TASKS
from mwt.spectra.config import SpectrumConfig, SpectrumRunConfig, SpectrumSignalConfig
from mwt.spectra.models import grid_models, model_overrides, models, run_looks
from mwt.spectra.study import Study, correlations, first_look, held_out_from, make_task, study
from train.fit import main as fit

SMALL = ["signal.size=24", "signal.frequencies=[2,6]", "field.mlp.width=8", "field.mlp.hidden_layers=1"]
SMALL += ["field.mfn.width=8", "optim.steps=8", "run.records=4", "run.looks=2", "run.device=cpu"]
CPU = torch.device("cpu")


class Balance(HTMLParser):
    """Tags close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_page(path: Path) -> str:
    html = path.read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,20})', html)
    assert sources
    assert all(source.startswith("data:") for source in sources)
    parser = Balance()
    parser.feed(html)
    assert parser.open == []
    return html


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def test_models_on_one_signal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["sine,mfn:gabor", "mlp.activation.name=tanh mlp.width=6"]
    assert main(["--models", *texts, "--encodings", "nerf", "--out", str(tmp_path), *SMALL]) == 0
    content, printed = result(tmp_path), capsys.readouterr().out
    names = [model["name"] for model in content["models"]]
    assert names == ["nerf+sine", "mfn:gabor", "mlp.activation.name=tanh mlp.width=6"]
    for model in content["models"]:
        assert [look["step"] for look in model["kernels"]] == [0, 8]
        for look in model["kernels"]:
            values = np.array(look["relative_eigenvalues"])
            assert (values[0], len(values)) == (1, 24)
            assert (np.diff(values) <= 0).all()
            assert look["effective_rank"] == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=1e-9)
            assert sum(look["residual_energy"]) == pytest.approx(1)
        assert all(sum(shares) == pytest.approx(1) for shares in model["residual_energy_by_frequency"])
        assert model["frequencies"] == [2, 6]
        assert model["steps"][0] == 0
        assert model["steps"][-1] == 8
        assert np.shape(model["relative_error"]) == (len(model["steps"]), 2)
    ranks = [model["kernels"][0]["effective_rank"] for model in content["models"]]
    metric = [model["final"]["psnr"] for model in content["models"]]
    (row,) = [row for row in content["correlations"]["psnr"] if row["summary"] == "effective_rank"]
    assert row["spearman"] == pytest.approx(stats.spearmanr(ranks, metric).statistic)
    assert row["pearson"] == pytest.approx(np.corrcoef(ranks, metric)[0, 1])
    assert "Spearman" in printed
    html = check_page(tmp_path / "spectrum.html")
    assert all(name in html for name in names)


def test_response_needs_no_kernel_and_knows_what_is_held_out(tmp_path: Path) -> None:
    options = ["signal.keep=0.25", "signal.frequencies=[2,4,9]", "signal.size=40", "field.mlp.activation.name=finer"]
    assert main(["--response", "--models", "config", "--out", str(tmp_path), *SMALL, *options]) == 0
    content = result(tmp_path)
    (model,) = content["models"]
    assert (model["name"], model["kernels"]) == ("finer", [])
    assert content["held_out_from"] == 5
    errors = model["relative_error"][-1]
    assert content["final"]["error_seen"] == pytest.approx((errors[0] + errors[1]) / 2)
    assert content["final"]["error_held_out"] == pytest.approx(errors[2])
    assert "psnr_held_out" in content["final"]
    check_page(tmp_path / "spectrum.html")


def test_errors_by_frequency_are_numpys(tmp_path: Path) -> None:
    """At the beginning, from a field that is built here."""
    config = load_config(SpectrumConfig, None, SMALL)
    task = make_task(config.signal, 0, CPU)
    found = study("x", config.field, task, FitOptimConfig(steps=1), SpectrumRunConfig(records=1, looks=1))
    field = build_field(config.field, coordinate_dims=1, channels=1, seed=0)
    truth = np.fft.rfft(task.values[0, :, 0].double().numpy())
    shown = np.fft.rfft(field(task.coords)[:, 0].double().detach().numpy())
    wanted = np.abs(shown - truth)[[2, 6]] / np.abs(truth)[[2, 6]]
    np.testing.assert_allclose(found.errors[0].numpy(), wanted, rtol=1e-4)
    torch.testing.assert_close(found.looks[0].kernel, kernel(field, task.coords))


def test_a_sine_network_learns_low_frequencies_first() -> None:
    """Rahaman et al. 2019, by ReLU: of 1 and 12 periods with equal amplitude, the first is learned earlier."""
    signal = SpectrumSignalConfig(size=64, frequencies=(1, 12))
    config = load_config(SpectrumConfig, None, ["field.mlp.activation.name=relu", "field.mlp.width=64"])
    task = make_task(signal, 0, CPU)
    found = study("relu", config.field, task, FitOptimConfig(steps=150, lr=5e-3), SpectrumRunConfig(looks=0))
    low, high = found.learned()
    assert low is not None
    assert high is None or high > low
    assert found.errors[-1][0] < 0.3 < found.errors[-1][1]


def test_learned_is_when_the_error_stays_below() -> None:
    errors = [torch.tensor(row) for row in ([1.0, 0.9, 0.4], [0.4, 0.8, 0.3], [0.6, 0.4, 0.2], [0.3, 0.6, 0.1])]
    found = Study(name="x", steps=[0, 1, 5, 9], errors=errors, frequencies=[1, 2, 3])
    assert found.learned() == [9, None, 0]


def test_correlations_of_known_orders() -> None:
    summaries = [{"effective_rank": x, "decay": 1.0, "alignment": -(x**3)} for x in (1.0, 2.0, 4.0, 8.0)]
    rank, decay, alignment = correlations(summaries, [10.0, 20.0, 25.0, 26.0])
    assert (rank["spearman"], alignment["spearman"]) == (1, -1)
    assert 0 < rank["pearson"] < 1
    assert (decay["spearman"], decay["models"]) == (None, 4)
    assert correlations(summaries[:2], [1.0, 2.0])[0]["spearman"] is None


def test_a_fit_that_is_not_finite_is_told_of(tmp_path: Path) -> None:
    options = [*SMALL, "optim.lr=1e30", "field.mlp.activation.name=relu"]
    assert main(["--models", "config", "--out", str(tmp_path), *options]) == 4
    (model,) = result(tmp_path)["models"]
    assert model["problem"].startswith("not finite")
    assert model["final"] == {}
    assert "not finite" in check_page(tmp_path / "spectrum.html")


def test_what_came_of_the_models_is_the_exit_status() -> None:
    """A grid of spectra tells by it what has diverged and what is not defined from what has failed."""
    ends = {"fine": "", "undefined": "not defined: no", "diverged": "not finite: at step 3"}
    for names, status in ((("fine", "diverged"), 0), (("undefined",), 3), (("diverged",) * 2, 4),
                          (("undefined", "diverged"), 1), ((), 0)):  # fmt: skip
        assert exit_status([Study(name=name, problem=ends[name]) for name in names]) == status


def test_a_signal_without_frequencies_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((40, 40), 77, np.uint8)).save(tmp_path / "grey.png")
    with pytest.raises(InputError, match="the same everywhere"):
        main(["--models", "config", "--out", str(tmp_path / "out"), *SMALL, f"signal.name={tmp_path / 'grey.png'}"])


def test_one_kernel_that_is_not_finite_ends_one_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The squares of its derivatives are beyond float64."""
    sharp = "mlp.activation.name=sine mlp.activation.first_omega=1e200"
    assert main(["--models", "sine", sharp, "relu", "--out", str(tmp_path), *SMALL]) == 0
    content, printed = result(tmp_path), capsys.readouterr().out
    one, failed, two = content["models"]
    assert (failed["name"], failed["final"], failed["kernels"]) == (sharp, {}, [])
    assert failed["problem"].startswith("not finite: At step 0: The kernel")
    assert [[look["step"] for look in model["kernels"]] for model in (one, two)] == [[0, 8], [0, 8]]
    assert [model["problem"] for model in (one, two)] == ["", ""]
    assert {row["models"] for row in content["correlations"]["psnr"]} == {2}
    assert f"{sharp}: not finite: At step 0" in printed
    html = check_page(tmp_path / "spectrum.html")
    assert "1 of them came to nothing" in html
    assert "<td>not finite</td>" in html
    assert html.count("not finite: At step 0: The kernel") == 1


def test_kernels_of_runs_that_are_not_finite(grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object, **__: object) -> None:
        raise TrainingError("At step 0: no <number>")

    monkeypatch.setattr(spectrum, "run_looks", none)
    monkeypatch.setattr(spectrum, "first_look", none)
    runs = ["--run", f"{grid}/jobs/0", "--grid", str(grid), "--out", str(tmp_path)]
    assert main([*runs, "run.device=cpu"]) == 0
    content = result(tmp_path)
    assert (content["runs"][0]["problem"], content["grid"]) == ("not finite: At step 0: no <number>", {})
    assert sorted(content["left_out"]) == ["image: relu", "image: sine", "image: tanh"]
    html = (tmp_path / "spectrum.html").read_text()
    assert html.count("At step 0: no &lt;number&gt;") == 4


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What eval.grid leaves of three fits, one that was stopped, a row that is another's equal, and a run of no row."""
    folder = tmp_path_factory.mktemp("grid")
    Image.fromarray((np.arange(144).reshape(12, 12) * 1.5).astype(np.uint8)).save(folder / "ramp.png")
    for i, name in enumerate(("sine", "relu", "tanh")):
        words = [f"run.dir={folder}/jobs/{i}", f"signal.path={folder}/ramp.png", f"field.mlp.activation.name={name}"]
        assert fit(["--debug", "field.mlp.hidden_layers=1", "run.film=false", "run.ranks=false", *words]) == 0
    (folder / "jobs" / "9").mkdir()
    shutil.copy(folder / "jobs" / "0" / "config.yaml", folder / "jobs" / "9")
    stray = [f"run.dir={folder}/jobs/stray", f"signal.path={folder}/ramp.png", "field.mlp.activation.name=elu"]
    assert fit(["--debug", "field.mlp.hidden_layers=1", "run.film=false", "run.ranks=false", *stray]) == 0
    rows = [{"jobs": {"0": {"fit": job}}} for job in ("0", "1", "2", "9")]
    (folder / "cells.json").write_text(json.dumps({"rows": [*rows, rows[0]]}))
    return folder


def test_a_grid_and_its_runs(grid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = ["--run", f"{grid}/jobs/0", "--grid", str(grid), "--metric", "psnr", "--out", str(tmp_path)]
    assert main([*runs, "run.points=25", "run.device=cpu"]) == 0
    content, printed = result(tmp_path), capsys.readouterr().out
    assert "1 runs of" in printed
    found = content["grid"]["image"]
    metrics = {m["name"]: m["metric"] for m in found["models"]}
    stored = [json.loads((grid / "jobs" / str(i) / "result.json").read_text())["final"]["psnr"] for i in range(3)]
    assert metrics == dict(zip(("sine", "relu", "tanh"), stored, strict=True))
    assert [row["models"] for row in found["correlations"]] == [3] * len(found["correlations"])
    (run,) = content["runs"]
    field, frame = load_field(grid / "jobs" / "0" / "field")
    matrix = kernel(field, frame.grid((5, 5)))
    values = torch.linalg.eigvalsh(matrix).flip(0)
    np.testing.assert_allclose(run["kernels"]["in the end"]["relative"], (values / values[0]).clamp_min(0), atol=1e-9)
    assert all(sum(shares) == pytest.approx(1) for shares in run["residual_energy_by_frequency"].values())
    assert set(run["residual_energy_by_frequency"]) == {"0", "4"}
    check_page(tmp_path / "spectrum.html")
    with pytest.raises(InputError, match="there is no iou; there are psnr"):
        main(["--grid", str(grid), "--metric", "iou", "--out", str(tmp_path)])


@pytest.fixture(scope="module")
def signals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound, a picture in colours, and a film, all small."""
    folder = tmp_path_factory.mktemp("signals")
    rng = np.random.default_rng(0)
    soundfile.write(folder / "a.wav", 0.4 * rng.standard_normal(50).clip(-2, 2), 8000, subtype="FLOAT")
    Image.fromarray(rng.integers(0, 256, (8, 12, 3), dtype=np.uint8)).save(folder / "a.png")
    frames = [Image.fromarray(rng.integers(0, 256, (6, 7), dtype=np.uint8)) for _ in range(4)]
    frames[0].save(folder / "a.gif", save_all=True, append_images=frames[1:])
    return folder


def samples(path: Path) -> np.ndarray:
    """What a field is to show [*size, C], between -1 and 1."""
    if path.suffix == ".wav":
        sound = soundfile.read(path, always_2d=True)[0]
        return sound / np.abs(sound).max()
    with Image.open(path) as image:
        if path.suffix == ".png":
            return np.asarray(image) / 127.5 - 1
        frames = [np.asarray(frame.convert("L")) for frame in ImageSequence.Iterator(image)]
    return np.stack(frames)[..., None] / 127.5 - 1


def shares(values: np.ndarray) -> np.ndarray:
    """Of the energy at 0, 1, 2, ... periods over a signal [*size, C], by NumPy."""
    axes = tuple(range(values.ndim - 1))
    power = (np.abs(np.fft.fftn(values, axes=axes)) ** 2).sum(-1)
    lines = np.meshgrid(*(np.fft.fftfreq(n, 1 / n) for n in power.shape), indexing="ij")
    bins = np.sqrt(sum(line**2 for line in lines)).round().astype(int)
    return np.bincount(bins.ravel(), power.ravel()) / power.sum()


def residual_by_hand(field: Field, frame: Frame, path: Path, task: str) -> np.ndarray:
    """Of what a field shows; derivatives say nothing of the mean."""
    truth = samples(path)
    residual = field(frame.grid()).detach().double().numpy().reshape(truth.shape) - truth
    return residual - residual.mean((0, 1)) if task == "poisson" else residual


@pytest.mark.parametrize(
    ("name", "file", "options"),
    [
        ("audio", "a.wav", {"channel": "mono"}),
        ("image", "a.png", {}),
        ("poisson", "a.png", {"given": "gradient"}),
        ("poisson", "a.png", {"given": "laplacian"}),
        ("denoising", "a.png", {"sigma": 0.5}),
        ("super_resolution", "a.png", {"factor": 2}),
        ("video", "a.gif", {"grey": True}),
    ],
)
def test_residuals_are_against_the_signal_itself(name: str, file: str, options: dict[str, Any], signals: Path) -> None:
    """And not against derivatives, noise or a small picture."""
    task = TASKS[name]([signals / file], TASKS[name].Options(**options), CPU)
    field = build_field(
        SpectrumConfig().field, coordinate_dims=task.frame.coordinate_dims, channels=task.channels, seed=0
    )
    found = task.residual(field)
    assert found is not None
    by_hand = residual_by_hand(field, task.frame, signals / file, name)
    np.testing.assert_allclose(found[0].numpy().reshape(by_hand.shape), by_hand, atol=1e-5)


@pytest.mark.parametrize(("name", "file"), [("poisson", "a.png"), ("audio", "a.wav")])
def test_the_residual_of_a_run(name: str, file: str, signals: Path, tmp_path: Path) -> None:
    words = [f"task={name}", f"signal.path={signals / file}", f"run.dir={tmp_path}/run", "field.mlp.hidden_layers=1"]
    assert fit(["--debug", *words, "run.film=false", "run.ranks=false"]) == 0
    _, energy = run_looks(read_fit_run(tmp_path / "run"), SpectrumRunConfig(points=9), CPU)
    field, frame = load_field(tmp_path / "run" / "field")
    by_hand = residual_by_hand(field, frame, signals / file, name)
    np.testing.assert_allclose(energy[4].numpy(), shares(by_hand), atol=1e-5)


def test_a_field_on_samples_alone(grid: Path, tmp_path: Path) -> None:
    """ASMR: its kernel is taken at some of its samples, each once, by a run and by a grid."""
    words = [f"run.dir={tmp_path}/jobs/0", f"signal.path={grid}/ramp.png", "field.name=asmr", "field.asmr.width=6"]
    assert fit(["--debug", *words, "field.asmr.layers=2", "run.film=false", "run.ranks=false"]) == 0
    (tmp_path / "cells.json").write_text(json.dumps({"rows": [{"jobs": {"0": {"fit": "0"}}}]}))
    (model,), _, left_out = grid_models(tmp_path, None)
    assert left_out == {}
    field, _ = load_field(tmp_path / "jobs" / "0" / "field")
    for points, every, side in ((25, 2, 5), (1000, 1, 12)):
        settings = SpectrumRunConfig(points=points)
        (first, last), _ = run_looks(read_fit_run(tmp_path / "jobs" / "0"), settings, CPU)
        place = -1 + 2 / 11 * every * torch.arange(side)
        torch.testing.assert_close(last.kernel, kernel(field, torch.cartesian_prod(place, place)))
        again = first_look(model.config, model.frame, model.channels, settings, seed=model.seed)
        torch.testing.assert_close(again.kernel, first.kernel)


def test_a_run_that_is_not_defined_leaves_the_others(
    grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def second_alone(run: FitRun, *arguments: Any) -> Any:
        if run.folder.name == "0":
            raise NotDefinedError("there is nothing there")
        return run_looks(run, *arguments)

    monkeypatch.setattr(spectrum, "run_looks", second_alone)
    runs = ["--run", f"{grid}/jobs/0", f"{grid}/jobs/1", "--out", str(tmp_path), "run.points=9", "run.device=cpu"]
    assert main(runs) == 0
    first, second = result(tmp_path)["runs"]
    assert first["problem"] == "not defined: there is nothing there"
    assert set(second["kernels"]) == {"at the beginning", "in the end"}
    assert "not defined: there is nothing there" in check_page(tmp_path / "spectrum.html")


def test_a_metric_that_fits_do_not_have(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--metric psnrr: there is none of this name; there are loss, psnr, error_se"):
        main(["--models", "sine,relu", "--metric", "psnrr", "--out", str(tmp_path), *SMALL])
    assert main(["--models", "sine,relu", "--metric", "loss", "--out", str(tmp_path), *SMALL]) == 0
    assert list(result(tmp_path)["correlations"]) == ["loss"]


def test_texts_of_models() -> None:
    assert model_overrides("kan:fourier") == ["name=kan", "kan.basis=fourier"]
    assert model_overrides("fourier_kan+gaussian") == [
        "mlp.activation.name=gaussian",
        "mlp.encoding.name=fourier_kan",
    ]
    assert model_overrides("grid") == ["name=grid"]
    both = models(["sine,mfn"], ["identity", "nerf"], None, ["field.mlp.width=9"])
    assert list(both) == ["sine", "nerf+sine", "mfn"]
    assert both["nerf+sine"].field.mlp.encoding.name == "nerf"
    assert {config.field.mlp.width for config in both.values()} == {9}
    for wrong in ("sinus", "nerv+sine", "mlp:sine"):
        with pytest.raises(InputError, match=wrong.replace("+", r"\+")):
            model_overrides(wrong)


def test_what_cannot_be_looked_at(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to look at"):
        main(["--out", str(tmp_path)])
    with pytest.raises(InputError, match="not a run"):
        main(["--run", str(tmp_path), "--out", str(tmp_path)])
    with pytest.raises(InputError, match=r"cells\.json"):
        main(["--grid", str(tmp_path), "--out", str(tmp_path)])
    with pytest.raises(InputError, match="too large"):
        main(["--models", "sine", "--out", str(tmp_path), *SMALL, "signal.size=5000"])
    with pytest.raises(InputError, match="sierpinski"):
        make_task(SpectrumSignalConfig(name="sinus"), 0, CPU)


def test_signals_and_what_they_hold_out() -> None:
    for name in ("noise", "spheres", "sierpinski", "skimage:camera"):
        task = make_task(SpectrumSignalConfig(name=name, keep=0.25), 0, CPU)
        assert task.size == (32, 32)
        assert held_out_from(task) == pytest.approx(8)
    assert make_task(SpectrumSignalConfig(name="noise", dims=3), 0, CPU).size == (10, 10, 10)
    assert held_out_from(make_task(SpectrumSignalConfig(), 0, CPU)) == math.inf
