"""The stages of training: what stays, what learns, what a later stage takes over, and what it refuses."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import train.classify as program
from data_pipes.schema import read_info
from eval import classify
from mwt import memory
from mwt.config import ClassifyConfig, model_config
from mwt.config_files import load_config
from mwt.engines import list_engines
from mwt.errors import InputError
from mwt.evaluation import Evaluation
from mwt.losses import outer_losses
from mwt.model import MetaWeightTransformer
from mwt.observe import observe
from mwt.optim import clip_gradients, make_optimizer
from mwt.stages import LEARNS, begin_stage, load_field, rest_unread
from mwt.structs import Batch, SignalFacts
from mwt.tracking import read_metrics
from tests.fork_server import Server

ROOT = Path(__file__).parents[1]
FACTS = SignalFacts(kind="image", channels=1, height=6, width=7, classes=("a", "b", "c"))
SMALL = ["siren.hidden=8", "siren.hidden_layers=1", "inner_loop.steps=2", "reader.blocks=1", "reader.head_dim=4"]


def debug(run: Path, *arguments: str) -> int:
    return program.main(["--debug", f"run.dir={run}", "data.limit=32", *arguments])


def parameters(run: Path) -> dict[str, Tensor]:
    folder = json.loads((run / "checkpoints" / "last.json").read_text())["folder"]
    return load_file(run / "checkpoints" / folder / "model.safetensors")


def field(run: Path) -> dict[str, Tensor]:
    return {name: value for name, value in parameters(run).items() if not name.startswith("reader.")}


def reader(run: Path) -> dict[str, Tensor]:
    return {name: value for name, value in parameters(run).items() if name.startswith("reader.")}


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[bool]:
    assert ours.keys() == theirs.keys()
    assert ours
    return [torch.equal(ours[name], theirs[name]) for name in ours]


@pytest.fixture(scope="module")
def reconstruction(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished first stage."""
    run = tmp_path_factory.mktemp("stages") / "reconstruction"
    assert debug(run, "run.stage=reconstruction", "run.seed=5") == 0
    return run


def small_model(*overrides: str) -> tuple[ClassifyConfig, MetaWeightTransformer]:
    config = load_config(ClassifyConfig, None, [*SMALL, *overrides])
    return config, MetaWeightTransformer(model_config(config, FACTS))


def batch() -> Batch:
    images = torch.randint(0, 256, (6, 1, 6, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Batch(images=images, labels=torch.arange(6) % 3, positions=torch.arange(6))


def kept_for_backward(model: MetaWeightTransformer, config: ClassifyConfig) -> int:
    """Numbers that a forward pass keeps for the backward pass, parameters left out."""
    own = {parameter.data_ptr() for parameter in model.parameters()}
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.numel() if tensor.data_ptr() not in own else 0
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outer_losses(model(observe(batch(), config.inner_loop, seed=0)), batch().labels)
    return total


# ---- reconstruction ----------------------------------------------------------------------------------------------


def test_a_reconstruction_learns_what_the_simultaneous_wt_learns(reconstruction: Path, tmp_path: Path) -> None:
    """WT's SIREN learns from the reconstruction alone, so leaving the reader out changes nothing of it."""
    wt, mwt = tmp_path / "wt", tmp_path / "mwt"
    assert debug(wt, "loss.classification_weight=0", "run.seed=5") == 0
    assert debug(mwt, "loss.classification_weight=0.01", "run.seed=5") == 0
    assert all(equal(field(reconstruction), field(wt)))
    assert not all(equal(field(reconstruction), field(mwt)))  # such a small difference would be seen
    numbers = []
    for run in (reconstruction, wt):
        assert classify.main(["--run", str(run), "--no-curve"]) == 0
        numbers.append(json.loads((run / "eval" / "classify.json").read_text()))
    assert numbers[0]["psnr"] == numbers[1]["psnr"] > 3
    assert [row["reconstruction_loss"] for row in read_metrics(reconstruction / "metrics.jsonl")] == [
        row["reconstruction_loss"] for row in read_metrics(wt / "metrics.jsonl")
    ]


def test_in_a_reconstruction_the_reader_takes_no_part(reconstruction: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    assert debug(other, "run.stage=reconstruction", "run.seed=5", "optim.epochs=2") == 0
    assert all(equal(reader(reconstruction), reader(other)))  # as it began, weight decay or not
    assert not any(equal(field(reconstruction), field(other)))
    losses = [row["classification_loss"] for row in read_metrics(other / "metrics.jsonl")]
    assert losses == pytest.approx([math.log(10)] * 8)
    folder = json.loads((other / "checkpoints" / "last.json").read_text())["folder"]
    state = load_file(other / "checkpoints" / folder / "optimizer.safetensors")
    assert {name.split(".")[0] for name in state} == {"siren", "alpha"}


def test_a_reconstruction_does_not_call_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    config, model = small_model()
    begin_stage(model, "reconstruction")
    called = []
    monkeypatch.setattr(model.reader, "forward", lambda *_: called.append(1))
    output = model(observe(batch(), config.inner_loop, seed=0))
    assert (called, output.logits.shape) == ([], (6, 3))
    assert output.fit.offsets.requires_grad


def test_the_best_reconstruction_is_the_one_with_the_smallest_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accuracies of a reader that does not learn say nothing; here they would choose another checkpoint."""
    numbers = iter([(0.9, 1.5), (0.1, 1.2), (0.95, 1.3)])
    known: dict[int, dict[str, float]] = {}

    def summary(self: Evaluation) -> dict[str, float]:
        if id(self.labels) not in known:
            known[id(self.labels)] = dict(zip(("accuracy", "mse"), next(numbers), strict=True))
            kept.append(self.labels)  # or its address would be another's
        return known[id(self.labels)]

    kept: list[torch.Tensor] = []

    monkeypatch.setattr(Evaluation, "summary", summary)
    data = tmp_path / "data"
    digits = ROOT / "data_pipes" / "builtin" / "digits"
    data.mkdir()
    info = json.loads((digits / "dataset.json").read_text())
    info["splits"]["val"] = info["splits"]["test"]
    (data / "dataset.json").write_text(json.dumps(info))
    for shard in digits.glob("*.tar"):
        (data / shard.name).symlink_to(shard)
    run = tmp_path / "run"
    assert debug(run, f"data.path={data}", "optim.epochs=3", "run.stage=reconstruction") == 0
    assert json.loads((run / "checkpoints" / "best.json").read_text()) == {"folder": "step-00000008"}


# ---- classifier --------------------------------------------------------------------------------------------------


def test_the_classifier_s_stage_leaves_the_siren_as_it_was(reconstruction: Path, tmp_path: Path) -> None:
    """Bit by bit: no gradient, and no weight decay either, which alone would change every number."""
    run = tmp_path / "classifier"
    arguments = ["run.stage=classifier", f"run.init_from={reconstruction}", "optim.weight_decay=0.1"]
    assert debug(run, *arguments, "optim.epochs=3", "reader.blocks=2", "reader.token_scale=100") == 0
    assert all(equal(field(run), field(reconstruction)))
    rows = read_metrics(run / "metrics.jsonl")
    assert {row["norm_siren"] for row in rows} == {row["norm_alpha"] for row in rows} == {0.0}
    assert min(row["norm_reader"] for row in rows) > 0
    before = MetaWeightTransformer(model_config(load_config(ClassifyConfig, run / "config.yaml"), digits_facts()))
    moved = [name for name, value in reader(run).items() if not torch.equal(value, before.state_dict()[name])]
    assert len(moved) == len(reader(run))
    for one in (reconstruction, run):
        assert classify.main(["--run", str(one), "--no-curve"]) == 0
    ours, theirs = (json.loads((one / "eval" / "classify.json").read_text()) for one in (run, reconstruction))
    assert ours["psnr"] == theirs["psnr"]


def digits_facts() -> SignalFacts:
    return read_info("builtin:digits").facts


def test_the_classifier_s_stage_resumes_without_the_run_it_began_with(
    reconstruction: Path, tmp_path: Path, server: Server
) -> None:
    """What it began with is in its own checkpoint, so a removed first stage is no loss."""
    first = tmp_path / "first"
    assert debug(first, "run.stage=reconstruction", "run.seed=1") == 0
    arguments = ["run.stage=classifier", f"run.init_from={first}", "optim.epochs=2"]
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    assert debug(whole, *arguments) == 0
    code = (
        "import os, signal, mwt.training_state as t\n"
        "add = t.Meter.add\n"
        "t.Meter.add = lambda s, step, *v: (add(s, step, *v), step == 3 and os.kill(os.getpid(), signal.SIGTERM))[0]\n"
    )
    server.start("--debug", f"run.dir={halved}", "data.limit=32", *arguments, code=code)
    assert server.status() == 143, server.said()[-3000:]
    first.rename(tmp_path / "gone")
    assert program.main(["--resume", f"run.dir={halved}"]) == 0
    assert len(read_metrics(halved / "metrics.jsonl")) == 8
    assert all(equal(parameters(whole), parameters(halved)))


@pytest.mark.parametrize("engine", list_engines())
def test_fits_of_a_frozen_siren_keep_nothing_for_the_backward_pass(engine: str) -> None:
    config, model = small_model(f"inner_loop.engine={engine}")
    observations = observe(batch(), config.inner_loop, seed=0)
    whole = model(observations)
    begin_stage(model, "classifier")
    frozen = model(observations)
    assert torch.equal(frozen.logits, whole.logits)
    assert not frozen.fit.offsets.requires_grad
    assert not frozen.fit.losses.requires_grad
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = make_optimizer(model, config.optim)
    outer_losses(frozen, batch().labels).total.backward()
    norms = clip_gradients(optimizer, 1.0)
    optimizer.step()
    assert norms.tolist()[:2] == [0.0, 0.0]
    assert norms[2] > 0
    stayed = {name.split(".")[0] for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    assert stayed == {"siren", "alpha"}


def test_each_stage_keeps_less_than_all_at_once() -> None:
    config, model = small_model("siren.hidden=16")
    kept = {}
    for stage in LEARNS:
        begin_stage(model, stage)
        kept[stage] = kept_for_backward(model, config)
    # The two halves together are the whole, but for the few tensors at their border.
    assert kept["reconstruction"] + kept["classifier"] == pytest.approx(kept["joint"], rel=0.1)
    example = batch()
    needs = {
        stage: memory.follow_step(
            model.config, example, batch_size=6, precision="fp32", device=torch.device("cpu"), stage=stage
        )
        for stage in LEARNS
    }
    assert needs["classifier"].activations < 0.6 * needs["joint"].activations
    assert needs["reconstruction"].gradients + needs["classifier"].gradients == needs["joint"].gradients


def test_a_stage_can_be_left_again() -> None:
    _, model = small_model()
    for stage, learns in LEARNS.items():
        begin_stage(model, stage)
        groups = model.parameter_groups()
        assert {name for name in groups if all(p.requires_grad for p in groups[name])} == set(learns)
        assert {name for name in groups if not any(p.requires_grad for p in groups[name])} == {*groups} - {*learns}


# ---- beginning with what another run has learned -----------------------------------------------------------------


def test_a_joint_run_may_begin_with_a_trained_siren(reconstruction: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    slow = [f"optim.lr_{name}=1e-12" for name in ("siren", "alpha", "reader")]
    assert debug(run, f"run.init_from={reconstruction}", *slow, "optim.weight_decay=0") == 0
    theirs = field(reconstruction)
    for name, value in field(run).items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("siren.hidden_layers=2", "siren.hidden_layers is 1 there and 2 here"),
        ("siren.hidden=64", "siren.hidden is 128 there and 64 here"),
        ("siren.omega=30", "siren.omega is 10.0 there and 30.0 here"),
        ("inner_loop.steps=3", "inner_loop.steps is 2 there and 3 here"),
        ("inner_loop.shared_alpha=true", "inner_loop.shared_alpha is False there and True here"),
    ],
)
def test_a_siren_of_another_form_is_refused(reconstruction: Path, tmp_path: Path, override: str, said: str) -> None:
    run = tmp_path / "run"
    with pytest.raises(InputError, match=re.escape(said)):
        debug(run, "run.stage=classifier", f"run.init_from={reconstruction}", override)
    assert not run.exists()


def test_other_channels_are_refused(reconstruction: Path) -> None:
    config = load_config(ClassifyConfig, reconstruction / "config.yaml")
    colour = SignalFacts(kind="image", channels=3, height=8, width=8, classes=("a", "b"))
    with pytest.raises(InputError, match="channels is 1 there and 3 here"):
        load_field(MetaWeightTransformer(model_config(config, colour)), reconstruction)


def test_other_classes_are_not(reconstruction: Path) -> None:
    """The SIREN knows nothing of classes: one trained on one data set serves a reader of another."""
    config = load_config(ClassifyConfig, reconstruction / "config.yaml")
    grey = SignalFacts(kind="image", channels=1, height=28, width=28, classes=("a", "b"))
    model = MetaWeightTransformer(model_config(config, grey))
    load_field(model, reconstruction)
    assert all(equal({f"siren.{k}": v for k, v in model.siren.state_dict().items()},
                     {k: v for k, v in field(reconstruction).items() if k.startswith("siren.")}))  # fmt: skip


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"run\.init_from"):
        load_config(ClassifyConfig, None, ["run.stage=classifier"])
    with pytest.raises(InputError, match="nothing is not a run directory"):
        debug(tmp_path / "run", "run.stage=classifier", f"run.init_from={tmp_path / 'nothing'}")
    with pytest.raises(InputError, match="reconstuction"):
        load_config(ClassifyConfig, None, ["run.stage=reconstuction"])


# ---- readers end to end ------------------------------------------------------------------------------------------

READERS: dict[str, tuple[str, ...]] = {
    "mlp": ("width=4", "depth=1"),
    "linear": (),
    "inr2vec": ("width=4", "code=8", "decoder_width=4"),
    "inr2array": ("width=8", "heads=1", "blocks=1", "patches=2", "classifier_width=16", "classifier_blocks=1"),
    "ng_gnn": ("width=4", "layers=2", "frequencies=4", "readout=output"),
    "ng_t": ("node_width=4", "edge_width=4", "attention_width=4", "heads=2", "layers=2", "frequencies=4"),
    "scalegmn": ("width=4", "mlp_width=4", "layers=2", "plain_ends=true"),
    "scalegmn_b": ("width=4", "mlp_width=4", "layers=1", "plain_ends=true", "readout=output"),
}


def end_to_end(name: str) -> list[str]:
    return [f"reader.name={name}", *(f"reader.options.{option}" for option in READERS[name])]


@pytest.mark.parametrize("name", READERS)
def test_everything_that_learns_end_to_end_gets_a_gradient_and_what_rests_would_get_none(name: str) -> None:
    config = load_config(ClassifyConfig, None, [*SMALL, *end_to_end(name)])
    torch.manual_seed(0)
    model = MetaWeightTransformer(model_config(config, FACTS))
    begin_stage(model, "joint")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rest_unread(model)
    assert model.reader.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    images = torch.randint(0, 256, (4, 1, 6, 7), dtype=torch.uint8)
    batch = Batch(images=images, labels=torch.tensor([0, 1, 2, 0]), positions=torch.arange(4))
    learning = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    begin_stage(model, "joint")  # everything learns again: which of it is reached?
    optimizer = make_optimizer(model, config.optim)
    output = model(observe(batch, config.inner_loop, seed=0))
    outer_losses(output, batch.labels).total.backward()
    reached = {key for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == learning
    resting = {key.split(".")[1] for key in set(before) & {k for k, _ in model.named_parameters()} - learning}
    assert resting >= ({"decoder"} if name.startswith("inr2") else {"layers"} if name.startswith("scale") else set())
    optimizer.step()
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["inr2vec", "scalegmn"])
def test_two_processes_train_readers_of_which_a_part_rests(tmp_path: Path, name: str) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m", "train.classify",
        "--debug", "data.limit=32", *end_to_end(name), f"run.dir={tmp_path / 'run'}",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] >= 2


@pytest.mark.parametrize(
    ("options", "said"),
    [(("reader.name=knn",), "End to end it cannot be used"), (("reader.name=pixel_cnn",), "it is for train.weights"),
     (("reader.name=mlp", "reader.input=standardise"), "end to end, use")],
)  # fmt: skip
def test_a_reader_that_cannot_work_end_to_end_leaves_no_run_directory(
    tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    with pytest.raises(InputError, match=re.compile(said, re.IGNORECASE)):
        debug(tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()
