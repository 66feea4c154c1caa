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
import torch
from PIL import Image
from scipy import stats

from eval import spectrum
from eval.spectrum import main
from mwt.config_files import load_config
from mwt.errors import InputError, TrainingError
from mwt.fields import load_field
from mwt.fit_config import FitOptimConfig
from mwt.ntk import kernel
from mwt.spectra.config import SpectrumConfig, SpectrumRunConfig, SpectrumSignalConfig
from mwt.spectra.models import model_overrides, models
from mwt.spectra.study import Study, correlations, held_out_from, make_task, study
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
    from mwt.fields import build_field

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
    assert main(["--models", "config", "--out", str(tmp_path), *options]) == 1
    (model,) = result(tmp_path)["models"]
    assert model["problem"].startswith("not finite")
    assert model["final"] == {}
    assert "not finite" in check_page(tmp_path / "spectrum.html")


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
    assert (content["runs"][0]["problem"], content["grid"]) == ("At step 0: no <number>", {})
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
