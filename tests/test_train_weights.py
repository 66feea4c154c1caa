"""train.weights: a reader on a set of fitted networks, from the beginning to the numbers."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data_pipes.decode import encode_png
from data_pipes.read import open_split
from data_pipes.schema import read_info
from data_pipes.weight_examples import Part, choose_networks
from data_pipes.weights import load_weight_set
from data_pipes.write import Sample, write_dataset
from mwt.config_files import load_config
from mwt.errors import InputError, TrainingError
from mwt.observe import pixels
from mwt.reader_training import ReaderTraining
from mwt.readers import load_reader
from mwt.symmetry import WeightAugmentation
from mwt.tracking import read_metrics
from mwt.weights_config import WeightsAugmentConfig, WeightsConfig
from tests.digits_weights import write_digits
from train.weights import build, main, make_augmentation

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
SMALL_INR2VEC = (
    "reader.name=inr2vec", "reader.options.width=8", "reader.options.code=16", "reader.options.decoder_width=8",
    "optim.pretrain_epochs=2", "optim.epochs=2", "data.batch_size=32", "run.log_every=3",
)  # fmt: skip


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("sets") / "digits", {"train": 128, "test": 40})


def run(networks: Path, folder: Path, *overrides: str) -> int:
    return main([f"data.path={networks}", f"run.dir={folder}", "run.device=cpu", *overrides])


def configured(networks: Path, *overrides: str) -> WeightsConfig:
    return load_config(WeightsConfig, None, [f"data.path={networks}", *overrides])


def test_a_linear_probe_learns_and_says_so(networks: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "run"
    assert run(networks, folder, "reader.name=linear", "optim.epochs=8", "data.holdout=0.25", "run.log_every=3") == 0
    numbers = json.loads((folder / "eval" / "classify.json").read_text())
    assert numbers["accuracy"] > 0.6
    assert numbers["count"] == 40 == sum(row["count"] for row in numbers["per_class"].values())
    assert numbers["parameters"] == load_weight_set(networks).layout.count * 10 + 10
    assert {"ece", "seconds", "confusion", "step"} <= set(numbers)
    lines = read_metrics(folder / "metrics.jsonl")
    val = [line for line in lines if line["split"] == "val"]
    assert len(val) == 8
    assert [line["count"] for line in val] == [32] * 8
    best = max(val, key=lambda line: line["accuracy"])
    assert numbers["step"] == best["step"]
    assert f"accuracy {numbers['accuracy']:.2%}" in capsys.readouterr().out
    assert (folder / "env.json").is_file()

    # The saved reader says the same by itself.
    reader = load_reader(folder)
    batch = load_weight_set(networks, "test", "delta").batch(range(40))
    assert float((reader(batch.weights).argmax(-1) == batch.labels).float().mean()) == pytest.approx(
        numbers["accuracy"]
    )
    assert run(networks, folder, "--evaluate", "data.test_split=train") == 0
    assert json.loads((folder / "eval" / "classify_train.json").read_text())["count"] == 128
    assert run(networks, folder, "--evaluate", "data.limit=7") == 0
    assert json.loads((folder / "eval" / "classify_test.json").read_text())["count"] == 7
    assert json.loads((folder / "eval" / "classify.json").read_text()) == numbers


@pytest.mark.parametrize(
    "options",
    [("reader.name=knn",), ("reader.name=wt", "reader.blocks=1"),
     ("reader.name=mlp", "reader.options.width=8", "reader.input=standardise", "augment.noise=0.1"),
     ("reader.name=inr2array", "reader.options.width=8", "reader.options.heads=1", "reader.options.blocks=1",
      "reader.options.patches=2", "reader.options.classifier_width=8", "reader.options.classifier_blocks=1",
      "optim.pretrain_epochs=1", "optim.pretrain_points=10", "data.limit=8", "data.batch_size=4"),
     ("reader.name=pixel_cnn", "reader.options.width=4", "reader.options.stages=2")],
    ids=lambda options: options[0].split("=")[1],
)  # fmt: skip
def test_every_kind_of_reader_goes_through(networks: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    assert run(networks, tmp_path / "run", "--debug", *options) == 0
    numbers = json.loads((tmp_path / "run" / "eval" / "classify.json").read_text())
    assert numbers["count"] == (8 if "data.limit=8" in options else 16)
    assert numbers["reader"] == options[0].split("=")[1]


def test_stopped_and_resumed_is_as_if_never_stopped(
    networks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert run(networks, tmp_path / "whole", *SMALL_INR2VEC) == 0
    step = ReaderTraining._train_step
    for stop_at in (5, 8, 13):  # in the first phase, where it ends, and in the second

        def stopping(self: ReaderTraining, rows: torch.Tensor, stop_at: int = stop_at) -> None:
            step(self, rows)
            if self.step == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)

        folder = tmp_path / f"stopped{stop_at}"
        monkeypatch.setattr(ReaderTraining, "_train_step", stopping)
        assert run(networks, folder, *SMALL_INR2VEC) == 143
        assert f"Stopped at step {stop_at} of 16" in capsys.readouterr().err
        monkeypatch.setattr(ReaderTraining, "_train_step", step)
        assert main(["--resume", f"run.dir={folder}"]) == 0
        one, other = (load_file(path / "checkpoints" / "step-00000016" / "model.safetensors")
                      for path in (tmp_path / "whole", folder))  # fmt: skip
        assert all(torch.equal(one[name], other[name]) for name in one)
        lines = [[{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(path / "metrics.jsonl")]
                 for path in (tmp_path / "whole", folder)]  # fmt: skip
        assert lines[0] == lines[1]
        assert {"reconstruction_loss", "classification_loss"} <= {key for line in lines[0] for key in line}


def test_a_run_goes_on_with_its_own_networks_only(networks: Path, tmp_path: Path) -> None:
    folder, moved = tmp_path / "run", tmp_path / "moved"
    assert run(networks, folder, "--debug", "reader.name=linear") == 0
    shutil.copytree(networks, moved)
    assert main(["--resume", f"run.dir={folder}", f"data.path={moved}"]) == 0
    other = write_digits(tmp_path / "other", {"train": 129, "test": 40})
    with pytest.raises(InputError, match="was trained on another set of networks"):
        main(["--resume", f"run.dir={folder}", f"data.path={other}"])


def test_images_are_those_that_the_networks_were_fitted_to(networks: Path, tmp_path: Path) -> None:
    config = configured(networks, "reader.name=pixel_cnn")
    part = Part(config, "test", CPU, images=True)
    [batch] = open_split("builtin:digits", "test", device=CPU, limit=40).batches(batch_size=40)
    places = torch.tensor([3, 39, 0])
    sample = part.read(places)
    assert batch.images is not None
    torch.testing.assert_close(sample.inputs, pixels(batch.images).mT.unflatten(2, (8, 8))[places])
    assert torch.equal(sample.labels, batch.labels[places])
    other = tmp_path / "other"
    facts = read_info("builtin:digits").facts
    image = Sample(extension="png", data=encode_png(torch.zeros(1, 8, 8, dtype=torch.uint8)), label=0)
    write_dataset(other, name="o", facts=facts, licence="", splits={"test": [image] * 40})
    unknown = tmp_path / "unknown"
    shutil.copytree(networks, unknown)
    manifest = json.loads((unknown / "manifest.json").read_text())
    (unknown / "manifest.json").write_text(json.dumps({**manifest, "source": {}}))
    with pytest.raises(InputError, match=r"does not say which its networks were fitted to; .* data\.images"):
        Part(configured(unknown, "reader.name=pixel_cnn"), "test", CPU, images=True)
    with pytest.raises(InputError, match="have other labels in 'test'"):
        Part(configured(networks, "reader.name=pixel_cnn", f"data.images={other}"), "test", CPU, images=True)


def test_what_does_not_fit_into_memory_is_read_as_needed(
    networks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    options = ("reader.name=mlp", "reader.input=standardise", "data.values=phi", "optim.epochs=2", "data.holdout=0.25")
    assert run(networks, tmp_path / "kept", *options) == 0
    said = capsys.readouterr().out
    size = 128 * load_weight_set(networks).manifest.network_bytes
    assert f"memory    {size / 1e6:.1f} MB of networks kept in memory, " in said
    monkeypatch.setattr("data_pipes.weight_examples.available", lambda device: 2 * 40 * size // 128 - 1)
    monkeypatch.setattr("data_pipes.weights.WeightSet.resident", None)  # whoever calls it fails
    assert run(networks, tmp_path / "mapped", *options) == 0
    assert "are more than 50% of the memory that is left: read from their files as needed" in capsys.readouterr().out
    ours, theirs = (json.loads((tmp_path / name / "eval" / "classify.json").read_text()) for name in ("mapped", "kept"))
    assert ours["accuracy"] == theirs["accuracy"]
    assert ours["confusion"] == theirs["confusion"]
    assert 0 < ours["peak_memory_gb"] < 4


def test_the_peak_of_memory_is_that_of_this_program(networks: Path, tmp_path: Path) -> None:
    """A reader of 40 million parameters: they, gradients and two moments are 640 MB."""
    options = ("reader.options.width=3000", "reader.options.depth=1", "data.batch_size=8", "data.limit=8")
    assert run(networks, tmp_path / "run", "reader.name=mlp", *options, "optim.epochs=1") == 0
    numbers = json.loads((tmp_path / "run" / "eval" / "classify.json").read_text())
    assert 16 * numbers["parameters"] / 1e9 < numbers["peak_memory_gb"] < 16 * numbers["parameters"] / 1e9 + 0.6


def test_amsgrad_is_torch_s(networks: Path) -> None:
    for chosen in (False, True):
        training = build(configured(networks, "reader.name=linear", f"optim.amsgrad={chosen}"), CPU)
        training._train_step(torch.arange(64))
        state = training.optimizer.state[training.reader.get_parameter("logits.weight")]
        assert ("max_exp_avg_sq" in state) == chosen


def test_copies_of_a_signal_are_held_out_together(tmp_path: Path) -> None:
    out = write_digits(tmp_path / "set", {"train": 20, "test": 4}, copies=2)
    config = configured(out, "data.holdout=0.25")
    part = Part(config, "train", CPU, images=False)
    index, copies = part.set.column("index"), part.set.column("copy")
    train, val = choose_networks(config, part)
    assert len(train) == 15 * 3
    assert len(val) == 5
    assert not set(index[train].tolist()) & set(index[val].tolist())
    assert not copies[val].any()
    one, _ = choose_networks(configured(out, "data.copies=1"), part)
    assert sorted(copies[one].unique().tolist()) == [0, 1]
    assert len(one) == 40


def test_augmentation_moves_whole_networks_and_disturbs_what_is_read(networks: Path) -> None:
    part = Part(configured(networks, "data.values=delta"), "train", CPU, images=False)
    sample = part.read(torch.arange(6))
    moved = make_augmentation(WeightsAugmentConfig(rotation=20.0), part, seed=1)(sample, 7)
    torch.testing.assert_close(part.phi(moved.inputs).flat(), moved.phi.flat(), atol=1e-6, rtol=0)
    phi = part.phi(sample.inputs)
    assert float((moved.phi.weights[0] - phi.weights[0]).abs().max()) > 0.01
    assert torch.equal(moved.phi.weights[1], phi.weights[1])
    again = make_augmentation(WeightsAugmentConfig(rotation=20.0), part, seed=1)(sample, 7)
    other = make_augmentation(WeightsAugmentConfig(rotation=20.0), part, seed=1)(sample, 8)
    assert torch.equal(again.inputs.flat(), moved.inputs.flat())
    assert not torch.equal(other.inputs.flat(), moved.inputs.flat())
    noisy = make_augmentation(WeightsAugmentConfig(noise=0.5), part, seed=1)(sample, 7)
    torch.testing.assert_close(noisy.phi.flat(), phi.flat(), atol=1e-6, rtol=0)
    change = (noisy.inputs.weights[1] - sample.inputs.weights[1]).std((1, 2))
    torch.testing.assert_close(change, 0.5 * sample.inputs.weights[1].std((1, 2)), rtol=0.1, atol=0)
    assert make_augmentation(WeightsAugmentConfig(), part, seed=1) is None
    names = set(vars(WeightsAugmentConfig())) - {"permute"}
    assert names == set(vars(WeightAugmentation()))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("data.path=/nowhere",), "No set of fitted networks at /nowhere"),
        (("data.train_split=nosuch",), "has no split 'nosuch'"),
        (("data.test_split=val",), "has no split 'val'; it has train, test"),
        (("reader.name=wt", "reader.head_dim=48"), "is 64 wide, .*reader.head_dim, 48.*; set reader.head_dim=32,"),
        (("reader.name=nosuch",), "reader.name is 'nosuch'; there are"),
        (("reader.name=mlp", "optim.pretrain_epochs=1"), "has no first phase; set optim.pretrain_epochs=0"),
        (("reader.name=linear", "augment.permute=true"), "set data.values=phi"),
        (("reader.name=pixel_cnn", "augment.noise=1"), "this reader reads images"),
        (("reader.name=linear", "data.batch_size=129"), "fewer than one batch of 129"),
        (("reader.name=dws", "data.batch_size=1"), "has batch norm; data.batch_size must be 2"),
        (("reader.name=ng_gnn", "reader.options.probes=4", "data.values=delta"), "set data.values=phi"),
        (("reader.name=ng_t", "reader.options.heads=0"), "reader.name=ng_t cannot be made with"),
        (("reader.name=mlp", "reader.options.width=-1"), "reader.name=mlp cannot be made with"),
        (("reader.name=scalegmn", "reader.options.dropout=1.5"), "reader.options.dropout is 1.5"),
        (("reader.name=linear", "data.val_split=test", "data.holdout=0.1"), "set one of them"),
        (("reader.name=linear", "data.val_split=test"), "chosen on what it is tested on"),
        (("reader.name=linear", "optim.lrr=1"), "lrr"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_mistakes_are_sentences(networks: Path, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(configured(networks, *overrides), CPU)


def test_networks_of_another_layout_are_refused(networks: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run(networks, folder, "--debug", "reader.name=linear") == 0
    file = next((folder / "checkpoints").glob("step-*")) / "reader.json"
    content = json.loads(file.read_text())
    content["layout"]["omegas"][0] = 30.0
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"do not fit the reader: layout \[2, 64, 64, 64, 1\], .*trained .*30.0"):
        run(networks, folder, "--evaluate")
    with pytest.raises(InputError, match=r"exists already.*train.weights --resume"):
        run(networks, folder, "reader.name=linear")


def test_offsets_from_another_base_are_refused(networks: Path, tmp_path: Path) -> None:
    """Of the same layout and classes; another set from the same base, and whole networks of another, are welcome."""
    counts = {"train": 16, "test": 8}
    same, other = write_digits(tmp_path / "same", counts), write_digits(tmp_path / "other", counts, moved=0.01)
    for values in ("delta", "phi"):
        folder = tmp_path / values
        assert run(networks, folder, "--debug", "reader.name=linear", f"data.values={values}") == 0
        assert run(same, folder, "--evaluate") == 0
        if values == "phi":
            assert run(other, folder, "--evaluate") == 0
            continue
        with pytest.raises(InputError, match=r"The offsets of .*other are from another base than .*data\.values=phi"):
            run(other, folder, "--evaluate")


def test_the_factor_for_offsets_on_whole_networks_is_warned_of(
    networks: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for number, (warned, *options) in enumerate([
        (True, "data.values=phi"), (False, "data.values=phi", "reader.input=standardise"),
        (False, "data.values=phi", "reader.input=raw"), (False, "data.values=delta"),
    ]):  # fmt: skip
        assert run(networks, tmp_path / str(number), "--debug", "reader.name=linear", *options) == 0
        said = "warning: reader.input=scale multiplies what is read by 500, which suits offsets; these are whole"
        assert (said in capsys.readouterr().err) == warned, options


def test_the_mean_and_deviation_of_a_set_are_needed_to_standardise(networks: Path, tmp_path: Path) -> None:
    copy = tmp_path / "set"
    shutil.copytree(networks, copy)
    (copy / "statistics.safetensors").unlink()
    with pytest.raises(InputError, match=r"statistics.safetensors is missing"):
        build(configured(copy, "reader.name=linear", "reader.input=standardise"), CPU)


@pytest.mark.parametrize("values", ["phi", "delta"])
def test_networks_held_out_are_not_in_the_statistics(networks: Path, values: str) -> None:
    options = (f"data.values={values}", "reader.name=linear", "reader.input=standardise")
    training = build(configured(networks, *options, "data.holdout=0.25"), CPU)
    rows = load_weight_set(networks, "train", values).batch(training.train.places).weights.flat().double().numpy()
    assert len(rows) == 96
    standard = training.reader.standardise
    assert standard is not None
    np.testing.assert_allclose(standard.mean, rows.mean(0), rtol=0, atol=1e-6)
    std = rows.std(0)
    sine = std >= 1e-4  # the others, those of the shared output layer, are not scaled
    np.testing.assert_allclose(standard.std[sine], std[sine], rtol=1e-4)
    whole = build(configured(networks, *options), CPU).reader.standardise
    assert whole is not None
    np.testing.assert_allclose(whole.mean, load_weight_set(networks, "train", values).statistics()[0].flat()[0])
    assert not torch.equal(whole.mean, standard.mean)


def test_a_loss_that_is_not_finite_names_its_step(networks: Path, tmp_path: Path) -> None:
    config = configured(networks, "reader.name=linear", f"run.dir={tmp_path / 'run'}", "run.log_every=4")
    training = build(config, CPU)
    before = training.reader.logits.weight.clone()
    training._train_step(torch.arange(64))
    with torch.no_grad():
        training.reader.logits.bias[0] = torch.nan
    after = training.reader.logits.weight.clone()
    training._train_step(torch.arange(64))
    assert torch.equal(training.reader.logits.weight, after)
    assert not torch.equal(before, after)
    with pytest.raises(TrainingError, match="not finite at step 2"):
        training._flush()


CONFIGS = sorted((ROOT / "configs" / "weights").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_makes_a_reader_of_its_size(path: Path, networks: Path) -> None:
    config = load_config(WeightsConfig, path, [f"data.path={networks}", "run.device=cpu"])
    text = path.read_text()
    assert f"--config configs/weights/{path.name}" in text
    assert all(f"# {what}:" in text for what in ("Data", "Paper", "Time"))
    assert config.run.dir == f"runs/weights_{path.stem}"
    [quickstart] = re.findall(r"^RUN \?= (\S+)", (ROOT / "Makefile").read_text(), re.M)
    made = load_config(WeightsConfig, path).data.path
    assert f"# Data:    python -m eval.export --run {quickstart} --out {made} " in text
    assert path.stem in ("digits", config.reader.name)
    training = build(config, CPU)
    assert sum(p.numel() for p in training.reader.parameters()) <= 300_000
