"""eval.classify, eval.predict, eval.reconstruct and eval.report, each as a user calls it, on a tiny trained run."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from data_pipes.decode import encode_png
from data_pipes.read import open_split
from data_pipes.write import Sample, write_dataset
from eval import classify, predict, reconstruct, report
from mwt import inspection, plots
from mwt.checkpoint import save_checkpoint
from mwt.config import ClassifyConfig, model_config
from mwt.config_files import config_yaml, load_config
from mwt.errors import InputError
from mwt.losses import outer_losses
from mwt.model import MetaWeightTransformer
from mwt.observe import observe
from mwt.optim import make_optimizer
from mwt.runtime import write_json
from mwt.structs import SignalFacts
from mwt.tracking import MetricsLog

CLASSES = ("dark <b>", "left & right", "$bright_")
"""Names that would break a page or a plot that does not escape them."""
HEIGHT, WIDTH, COUNT, STEPS, UPDATES = 6, 9, 21, 3, 30


def image(facts: SignalFacts, label: int, seed: int) -> Tensor:
    """A noisy non-square image whose class can be learned."""
    noise = torch.randint(0, 60, (facts.channels, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(seed))
    noise[:, :, : WIDTH // 2] += 90 * (label == 1)
    return (noise + 180 * (label == 2)).clamp(0, 255).to(torch.uint8)


def write_images(folder: Path, facts: SignalFacts) -> Path:
    """Three splits; one image in seven has a wrong label, so that there are mistakes to show."""
    splits = {
        name: [
            Sample(extension="png", data=encode_png(image(facts, (i + (i % 7 == 3)) % 3, first + i)), label=i % 3)
            for i in range(count)
        ]
        for name, first, count in (("train", 0, 48), ("test", 1000, COUNT), ("val", 2000, 6))
    }
    write_dataset(folder, name="tiny", facts=facts, licence="none", splits=splits)
    return folder


def train(run: Path, data: Path, facts: SignalFacts, *overrides: str, updates: int = UPDATES) -> Path:
    """A run directory as train.classify leaves it, after a few updates."""
    torch.manual_seed(0)
    config = load_config(
        ClassifyConfig, None,
        ["siren.hidden=64", "siren.hidden_layers=1", f"inner_loop.steps={STEPS}", "reader.blocks=1",
         "optim.lr_siren=3e-3", "optim.lr_reader=3e-3", f"data.path={data}", f"run.dir={run}",
         "run.eval_batch_size=8", "data.workers=0", *overrides],
    )  # fmt: skip
    model = MetaWeightTransformer(model_config(config, facts))
    optimizer = make_optimizer(model, config.optim)
    run.mkdir(parents=True)
    log = MetricsLog(run / "metrics.jsonl")
    (batch,) = open_split(data, "train", device=torch.device("cpu")).batches(batch_size=48)
    for step in range(1, updates + 1):
        optimizer.zero_grad()
        losses = outer_losses(model(observe(batch, config.inner_loop, seed=0)), batch.labels)
        losses.total.backward()
        optimizer.step()
        numbers = {
            "classification_loss": losses.classification.item(),
            "accuracy": 0.5,
            "images_per_second": 16.0,
            "seconds": float(step),
        }
        numbers["reconstruction_loss"] = losses.reconstruction.item()
        log.write(step=step, epoch=float(step), split="train", **numbers)
    log.close()
    (run / "config.yaml").write_text(config_yaml(config))
    (run / "overrides.txt").write_text("--config\nsome config.yaml\n")
    write_json(run / "env.json", {"commit": "abc", "command": ["<script>alert(1)</script>"]})
    save_checkpoint(run, name="last", model=model, optimizer=optimizer, state={"step": updates})
    return run


@pytest.fixture(scope="module")
def facts() -> SignalFacts:
    return SignalFacts(kind="image", channels=1, height=HEIGHT, width=WIDTH, classes=CLASSES)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, facts: SignalFacts) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "grey", facts)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data: Path, facts: SignalFacts) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "whole", data, facts)


@pytest.fixture(scope="module")
def trained_on_subsets(tmp_path_factory: pytest.TempPathFactory, data: Path, facts: SignalFacts) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "subsets"
    return train(folder, data, facts, "inner_loop.fraction=0.4", "inner_loop.shared_alpha=true")


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy to write into."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def subset_run(trained_on_subsets: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained_on_subsets, tmp_path / "subset_run"))


def evaluated(run: Path, *arguments: str, name: str = "classify") -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    assert classify.main(["--run", str(run), *arguments]) == 0
    predictions = run / "eval" / f"{name.replace('classify', 'predictions')}.npz"
    with np.load(predictions, allow_pickle=False) as archive:
        columns = {key: archive[key] for key in archive.files}
    return json.loads((run / "eval" / f"{name}.json").read_text()), columns


def calibration_by_hand(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    confidence = probabilities.max(1)
    right = probabilities.argmax(1) == labels
    error = 0.0
    for k in range(bins):
        inside = (confidence > k / bins) & (confidence <= (k + 1) / bins)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return float(error)


# ---- eval.classify ---------------------------------------------------------------------------------------------------


def test_the_numbers_are_those_of_the_predictions(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers, columns = evaluated(run)
    labels, probabilities = columns["label"], columns["probabilities"]
    assert set(numbers) == {
        "accuracy", "psnr", "psnr_pooled", "psnr_subset", "ece", "per_class", "split", "checkpoint", "count",
        "inner_steps", "cross_entropy", "mse", "confusion", "classes", "curve", "step", "seconds", "images_per_second",
        "precision", "device", "data", "parameters",
    }  # fmt: skip
    assert columns["position"].tolist() == list(range(COUNT))
    assert labels.tolist() == [i % 3 for i in range(COUNT)]
    assert np.array_equal(columns["predicted"], probabilities.argmax(1))
    assert numbers["accuracy"] == pytest.approx((probabilities.argmax(1) == labels).mean())
    assert numbers["ece"] == pytest.approx(calibration_by_hand(probabilities, labels), abs=1e-6)
    assert numbers["cross_entropy"] == pytest.approx(-np.log(probabilities[np.arange(COUNT), labels]).mean(), rel=1e-5)
    assert numbers["psnr"] == pytest.approx(columns["psnr"].mean(), rel=1e-6)
    assert numbers["mse"] == pytest.approx(columns["mse"].mean(), rel=1e-6)
    confusion = np.zeros((3, 3), dtype=int)
    np.add.at(confusion, (labels, columns["predicted"]), 1)
    assert numbers["confusion"] == confusion.tolist()
    assert [row["accuracy"] for row in numbers["per_class"].values()] == pytest.approx(np.diag(confusion) / 7)
    assert (numbers["count"], numbers["split"], numbers["checkpoint"]) == (COUNT, "test", "last")
    assert (numbers["inner_steps"], numbers["step"], numbers["classes"]) == (STEPS, UPDATES, list(CLASSES))
    printed = capsys.readouterr().out
    assert f"{numbers['accuracy']:.2%}" in printed
    assert f"{numbers['psnr']:.2f} dB" in printed


@pytest.mark.parametrize("name", ["run", "subset_run"])
def test_psnr_is_that_of_torchmetrics_over_all_pixels(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    numbers, columns = evaluated(folder, "--no-curve")
    opened = inspection.open_trained(folder)
    expected, errors = [], []
    batches = open_split(opened.config.data.path, "test", device=torch.device("cpu")).batches(batch_size=COUNT)
    (batch,) = batches
    assert batch.images is not None
    with torch.no_grad():
        offsets = opened.model(observe(batch, opened.model.config.inner_loop, seed=0, purpose="evaluate")).fit.offsets
        shown = opened.model.reconstruct(offsets, HEIGHT, WIDTH).clamp(-1, 1)
    for reconstruction, original in zip(shown, batch.images.float() / 255 * 2 - 1, strict=True):
        expected.append(float(peak_signal_noise_ratio(reconstruction, original, data_range=2.0)))
        errors.append(float((reconstruction - original).square().mean()) / 4)
    assert columns["psnr"] == pytest.approx(expected, abs=2e-3)
    assert numbers["psnr_pooled"] == pytest.approx(-10 * np.log10(np.mean(errors)), abs=2e-3)
    assert (numbers["psnr_subset"] == numbers["psnr"]) == (name == "run")


@pytest.mark.parametrize("name", ["run", "subset_run"])
def test_two_evaluations_are_equal_and_the_curve_ends_in_the_result(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    first, _ = evaluated(folder)
    stored = (folder / "eval" / "predictions.npz").read_bytes()
    second, _ = evaluated(folder)
    assert (folder / "eval" / "predictions.npz").read_bytes() == stored
    for document in (first, second):
        del document["seconds"], document["images_per_second"]
    assert json.dumps(first) == json.dumps(second)
    assert [row["steps"] for row in first["curve"]] == list(range(1, STEPS + 1))
    for key, value in first["curve"][-1].items():
        if key != "steps":
            assert value == first[key], key
    assert first["curve"][0]["psnr"] < first["curve"][-1]["psnr"]
    assert not list((folder / "eval").glob(".*"))


def test_results_do_not_depend_on_the_batch_size(subset_run: Path) -> None:
    _, one = evaluated(subset_run, "--no-curve", "run.eval_batch_size=1")
    _, many = evaluated(subset_run, "--no-curve", "run.eval_batch_size=64")
    np.testing.assert_allclose(one["probabilities"], many["probabilities"], atol=1e-4)
    np.testing.assert_allclose(one["psnr"], many["psnr"], atol=1e-2)


def test_the_curve_of_a_part_is_that_of_its_first_samples(run: Path) -> None:
    opened = inspection.open_trained(run)
    split = open_split(opened.config.data.path, "test", device=opened.device)
    numbers, result = inspection.evaluate_run(opened, "test", lambda _: split.batches(batch_size=8), curve=10)
    assert [row["count"] for row in numbers["curve"]] == [10] * STEPS
    assert numbers["curve"][-1]["psnr"] == pytest.approx(float(result.psnr[:10].mean()), abs=1e-3)


def test_another_split_gets_its_own_files(run: Path) -> None:
    numbers, columns = evaluated(run, "--split", "val", "--no-curve", name="classify_val")
    assert (numbers["split"], numbers["count"], numbers["curve"], len(columns["label"])) == ("val", 6, [], 6)
    assert not (run / "eval" / "classify.json").exists()


def test_overrides_of_data_and_run(run: Path) -> None:
    numbers, _ = evaluated(run, "data.limit=5", "run.precision=bf16", "run.device=cpu", name="classify_altered")
    assert (numbers["count"], numbers["precision"], numbers["device"]) == (5, "bf16", "cpu")


def test_more_inner_steps_with_shared_rates(subset_run: Path) -> None:
    numbers, _ = evaluated(subset_run, "--steps", str(STEPS + 2), name=f"classify_steps{STEPS + 2}")
    assert numbers["inner_steps"] == STEPS + 2
    assert len(numbers["curve"]) == STEPS + 2
    fewer, _ = evaluated(subset_run, "--steps", "1", name="classify_steps1")
    assert fewer["accuracy"] == numbers["curve"][0]["accuracy"]
    assert fewer["psnr"] == pytest.approx(numbers["curve"][0]["psnr"], abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "best"], "no checkpoint 'best'; it has last"),
        (["--split", "valid"], "no split 'valid'; it has train, test, val"),
        (["--steps", "9"], "learned its rates for 3 inner steps.*shared_alpha"),
        (["--steps", "0"], "at least one inner step"),
        (["siren.hidden=128"], "siren.hidden cannot be changed here"),
        (["inner_loop.steps=2"], "inner_loop.steps cannot be changed here"),
        (["data.limits=3"], "limits"),
        (["data.limit"], "not of the form key=value"),
        (["run.precision=fp16", "run.device=cpu"], "fp16.*needs a CUDA device"),
        (["data.path=nowhere"], "No data folder at nowhere"),
    ],
)
def test_refusals(trained: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        classify.main(["--run", str(trained), *arguments])


@pytest.mark.parametrize("program", [classify, predict, reconstruct, report])
def test_what_is_no_run_is_refused(program: Any, tmp_path: Path) -> None:
    files = ["image.png"] if program is predict else []
    with pytest.raises(InputError, match="is not a run directory"):
        program.main(["--run", str(tmp_path), *files])


@pytest.mark.parametrize("program", [classify, reconstruct, report])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 3}, "channels 3 there, 1 in training"),
        ({"classes": ("a", *CLASSES[1:])}, "class 0 'a' there, 'dark <b>' in training"),
        ({"classes": (*CLASSES, "more")}, "number of classes 4 there, 3 in training"),
        ({"height": None, "width": None}, "size that varies there, 6 x 9 in training"),
    ],
)
def test_data_that_does_not_fit_is_refused(
    program: Any, change: dict[str, Any], message: str, trained: Path, tmp_path: Path, facts: SignalFacts
) -> None:
    other = write_images(tmp_path / "other", replace(facts, **change))
    with pytest.raises(InputError, match=message) as caught:
        program.main(["--run", str(trained), f"data.path={other}"])
    assert str(other) in str(caught.value)


# ---- eval.predict ----------------------------------------------------------------------------------------------------


def test_predict_says_what_classify_says(
    run: Path, facts: SignalFacts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, columns = evaluated(run, "--no-curve")
    files = []
    for i in range(3):
        files.append(str(tmp_path / f"{i}.png"))
        Path(files[-1]).write_bytes(encode_png(image(facts, i % 3, 1000 + i)))
    capsys.readouterr()
    assert predict.main(["--run", str(run), *files, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["image"] for row in rows] == files
    for i, row in enumerate(rows):
        assert row["class"] == CLASSES[columns["predicted"][i]]
        assert row["psnr"] == pytest.approx(columns["psnr"][i], abs=1e-2)
        assert [row["probabilities"][name] for name in CLASSES] == pytest.approx(columns["probabilities"][i], abs=1e-4)
        assert row["probability"] == max(row["probabilities"].values())


def test_predict_takes_images_of_any_size_and_colour_and_model_folders(
    trained_on_subsets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder,) = (trained_on_subsets / "checkpoints").glob("step-*")
    Image.new("RGBA", (31, 17), (200, 10, 30, 128)).save(tmp_path / "colour.webp")
    assert predict.main(["--run", str(folder), str(tmp_path / "colour.webp"), "--top", "2", "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)[0]
    assert len(alone["probabilities"]) == 2
    # in company and from the run directory the same image gets the same answer, also where each step sees a subset
    twice = [str(tmp_path / "colour.webp")] * 2
    assert predict.main(["--run", str(trained_on_subsets), *twice, "--top", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [alone, alone]


def test_one_bad_file_does_not_stop_the_others(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("L", (9, 6)).save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    files = [str(tmp_path / name) for name in ("broken.png", "good.png", "missing.png")]
    assert predict.main(["--run", str(trained), *files]) == 2
    printed = capsys.readouterr()
    assert files[0] in printed.err
    assert f"No image file at {files[2]}" in printed.err
    assert files[1] in printed.out
    assert files[0] not in printed.out


def test_predict_refusals(trained: Path) -> None:
    with pytest.raises(InputError, match="There is no model 'builtin:nothing'"):
        predict.main(["--run", "builtin:nothing", "x.png"])
    with pytest.raises(InputError, match="--top is 0"):
        predict.main(["--run", str(trained), "x.png", "--top", "0"])


# ---- eval.reconstruct ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_film_strips(channels: int, data: Path, trained: Path, tmp_path: Path, facts: SignalFacts) -> None:
    if channels == 3:
        facts = replace(facts, channels=3)
        data = write_images(tmp_path / "rgb", facts)
        folder = train(tmp_path / "run", data, facts, updates=2)
    else:
        folder = Path(shutil.copytree(trained, tmp_path / "run"))
    assert reconstruct.main(["--run", str(folder), "--count", "2", "--scale", "3"]) == 0
    split = open_split(data, "test", device=torch.device("cpu"))
    batch = next(split.batches(batch_size=2, shuffle=True))
    assert batch.images is not None
    opened = inspection.open_trained(folder)
    with torch.no_grad():
        offsets = opened.model(observe(batch, opened.model.config.inner_loop, seed=0)).fit.offsets
    zoom = 18  # 96 / 6 = 16, and then a multiple of the scale
    heights = 0
    for i, position in enumerate(batch.positions.tolist()):
        strip = np.array(Image.open(folder / "figures" / f"strip_{position:06d}.png"))
        scaled = np.array(Image.open(folder / "figures" / f"scaled_{position:06d}.png"))
        heights += strip.shape[0]
        assert scaled.shape == ((3 * HEIGHT, 3 * WIDTH) if channels == 1 else (3 * HEIGHT, 3 * WIDTH, 3))
        assert strip.shape[1] == plots.MARGIN + (STEPS + 3) * (zoom * WIDTH + plots.MARGIN)

        def frame_number(k: int, strip: np.ndarray = strip) -> np.ndarray:
            left = plots.MARGIN + k * (zoom * WIDTH + plots.MARGIN)
            return strip[plots.MARGIN :, left:][: zoom * HEIGHT : zoom, : zoom * WIDTH : zoom].transpose(2, 0, 1)

        final = plots.to_pixels(opened.model.reconstruct(offsets[i : i + 1], HEIGHT, WIDTH).detach())[0]
        base = opened.model.reconstruct(torch.zeros_like(offsets[:1]), HEIGHT, WIDTH).detach()
        assert np.array_equal(frame_number(0), batch.images[i].expand(3, -1, -1))
        assert np.abs(frame_number(1) - plots.to_pixels(base)[0].expand(3, -1, -1).numpy().astype(int)).max() <= 1
        assert np.abs(frame_number(STEPS + 1) - final.expand(3, -1, -1).numpy().astype(int)).max() <= 1
    assert np.array(Image.open(folder / "figures" / "strips.png")).shape[0] == heights


def test_the_psnr_of_a_strip_is_that_of_the_evaluation(subset_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, columns = evaluated(subset_run, "--no-curve")
    capsys.readouterr()
    reconstruct.main(["--run", str(subset_run), "--count", "1"])
    row = capsys.readouterr().out.splitlines()[3].split()
    assert float(row[-1]) == pytest.approx(columns["psnr"][int(row[0])], abs=0.02)


def test_pictures_need_pixels_and_numbers_that_make_sense(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--scale is 0"):
        reconstruct.main(["--run", str(trained), "--scale", "0"])
    points = SignalFacts(kind="points", channels=1, height=None, width=None, classes=CLASSES)
    config = load_config(ClassifyConfig, None, ["siren.hidden=64", "siren.hidden_layers=1", "reader.blocks=1"])
    model = MetaWeightTransformer(model_config(config, points))
    (tmp_path / "config.yaml").write_text(config_yaml(config))
    save_checkpoint(
        tmp_path, name="last", model=model, optimizer=make_optimizer(model, config.optim), state={"step": 1}
    )
    with pytest.raises(InputError, match="Pictures are for images"):
        reconstruct.main(["--run", str(tmp_path)])


# ---- eval.report -----------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Collects what a page would load, its text, and whether its tags close."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, f"left open: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_stands_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--run", str(run)]) == 0
    assert str(run / "report.html") in capsys.readouterr().out
    text = (run / "report.html").read_text()
    page = Page(text)
    assert page.loads
    assert all(load.startswith("data:image/png;base64,") for load in page.loads)
    assert not {"link", "script", "iframe"} & set(page.tags)
    for word in ("http://", "https://", "url(", "@import"):
        assert word not in text
    numbers = json.loads((run / "eval" / "classify.json").read_text())  # made on the way
    titles = ("Training", "After each inner step", "Confusion matrix", "Classes", "Calibration", "Film strips",
              "Worst mistakes", "The space of weights", "Between two images", "To make this again")  # fmt: skip
    for expected in (f"{numbers['accuracy']:.1%}", f"{numbers['psnr']:.1f} dB", *titles, *CLASSES):
        assert expected in page.text
    assert "python -m train.classify --config 'some config.yaml'" in page.text
    assert "<script>alert(1)</script>" in page.text  # as text, from env.json
    assert f"{UPDATES} s" in page.text  # steps of 16 images at 16 images a second
    assert page.text.count("predicted: ") == sum(map(sum, numbers["confusion"])) - np.trace(numbers["confusion"]) > 0
    assert "57%" in page.text  # the fifth of eight frames between two images


def test_the_report_uses_a_stored_evaluation_only_of_the_same_checkpoint(run: Path) -> None:
    evaluated(run)
    stored = run / "eval" / "classify.json"
    document = json.loads(stored.read_text()) | {"accuracy": 0.125}
    write_json(stored, document)
    report.main(["--run", str(run)])
    assert "12.5%" in (run / "report.html").read_text()
    write_json(stored, document | {"step": UPDATES - 1})
    report.main(["--run", str(run)])
    assert json.loads(stored.read_text())["step"] == UPDATES
    assert "12.5%" not in Page((run / "report.html").read_text()).text


# ---- the space of weights --------------------------------------------------------------------------------------------


def test_principal_components_are_those_of_an_exact_decomposition() -> None:
    vectors = torch.randn(50, 30, generator=torch.Generator().manual_seed(1)) * torch.linspace(3, 0.1, 30)
    state = torch.get_rng_state()
    points, explained = inspection.principal_components(vectors)
    assert torch.equal(torch.get_rng_state(), state)
    centred = vectors - vectors.mean(0)
    left, strength, _ = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(explained, (strength.square() / strength.square().sum())[:2], rtol=1e-3, atol=0)
    torch.testing.assert_close(points.abs(), (left * strength)[:, :2].abs(), rtol=0.02, atol=0.02)
    assert (points.gather(0, points.abs().argmax(0, keepdim=True)) > 0).all()


def test_interpolation_begins_and_ends_with_the_two_signals(trained: Path) -> None:
    opened = inspection.open_trained(trained)
    split = open_split(opened.config.data.path, "test", device=opened.device)
    batch = next(split.batches(batch_size=2))
    with torch.no_grad():
        output = opened.model(observe(batch, opened.model.config.inner_loop, seed=0))
    offsets, shares = inspection.interpolate(opened.model, output.fit.offsets, 5)
    torch.testing.assert_close(shares[[0, -1]], output.logits.softmax(-1))
    torch.testing.assert_close(offsets[2], output.fit.offsets.mean(0))


def test_collected_offsets_are_those_of_the_fit(trained: Path) -> None:
    opened = inspection.open_trained(trained)
    split = open_split(opened.config.data.path, "test", device=opened.device)
    offsets, labels, positions = inspection.collect_offsets(opened.model, split.batches(batch_size=4), count=6)
    (batch,) = inspection.first_samples(split.batches(batch_size=COUNT), 6)
    with torch.no_grad():
        fitted = opened.model(observe(batch, opened.model.config.inner_loop, seed=0)).fit.offsets
    torch.testing.assert_close(offsets, fitted, rtol=1e-3, atol=1e-5)
    assert labels.tolist() == batch.labels.tolist()
    assert positions.tolist() == list(range(6))
