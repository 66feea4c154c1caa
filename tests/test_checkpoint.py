"""Checkpoints: exact, never half written, never unpickled, and refused with a sentence."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import mwt.checkpoint as checkpoint
from mwt.checkpoint import find_checkpoint, load_model, load_run, resume, save_checkpoint
from mwt.config import ClassifyConfig, model_config
from mwt.config_files import config_yaml, load_config
from mwt.errors import InputError
from mwt.model import MetaWeightTransformer
from mwt.optim import make_optimizer
from mwt.runtime import run_program
from mwt.structs import SignalFacts

ROOT = Path(__file__).parents[1]
SMALL = ("siren.hidden=64", "siren.hidden_layers=1", "inner_loop.steps=2", "reader.blocks=1")
CONFIG = load_config(ClassifyConfig, None, SMALL)
FACTS = SignalFacts(kind="image", channels=1, height=4, width=4, classes=("a", "b"))


def build(*overrides: str) -> tuple[MetaWeightTransformer, torch.optim.Optimizer]:
    config = load_config(ClassifyConfig, None, [*SMALL, *overrides])
    model = MetaWeightTransformer(model_config(config, FACTS))
    return model, make_optimizer(model, config.optim)


def step(model: MetaWeightTransformer, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(config_yaml(CONFIG))
    return folder


def save(
    run: Path, number: int, model: MetaWeightTransformer, optimizer: torch.optim.Optimizer, name: str = "last"
) -> Path:
    return save_checkpoint(run, name=name, model=model, optimizer=optimizer, state={"step": number, "best": 0.5})


def folders(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize("override", ["optim.name=adamw", "optim.name=muon"])
def test_a_round_trip_is_exact_and_training_goes_on_alike(run: Path, override: str) -> None:
    model, optimizer = build(override)
    step(model, optimizer)
    step(model, optimizer)
    folder = save(run, 2, model, optimizer)
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "optimizer.safetensors", "state.json",
    ]  # fmt: skip

    other, other_optimizer = build(override)
    state = resume(find_checkpoint(run), model=other, optimizer=other_optimizer)
    assert (state["step"], state["best"]) == (2, 0.5)
    for pair in ((model, optimizer), (other, other_optimizer)):
        torch.manual_seed(8)
        step(*pair)
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
    for ours, theirs in zip(optimizer.param_groups, other_optimizer.param_groups, strict=True):
        assert {k: v for k, v in ours.items() if k != "params"} == {k: v for k, v in theirs.items() if k != "params"}


def test_last_and_best_and_what_nothing_points_at_any_more(run: Path) -> None:
    model, optimizer = build()
    step(model, optimizer)
    save(run, 1, model, optimizer, "best")
    save(run, 1, model, optimizer)
    assert folders(run) == ["best.json", "last.json", "step-00000001"]
    save(run, 2, model, optimizer)
    save(run, 3, model, optimizer)
    assert folders(run) == ["best.json", "last.json", "step-00000001", "step-00000003"]
    assert find_checkpoint(run, "best").name == "step-00000001"
    assert find_checkpoint(run).name == "step-00000003"
    save(run, 3, model, optimizer, "best")
    assert folders(run) == ["best.json", "last.json", "step-00000003"]


def test_only_what_it_wrote_is_removed(run: Path) -> None:
    """A copy that somebody keeps beside the checkpoints is theirs."""
    model, optimizer = build()
    step(model, optimizer)
    save(run, 1, model, optimizer)
    kept = run / "checkpoints" / "my-copy-of-step-1"
    kept.mkdir()
    (kept / "model.safetensors").write_bytes(b"precious")
    (run / "checkpoints" / ".step-00000002.12345").mkdir()  # what a killed process left behind goes
    save(run, 3, model, optimizer)
    assert (kept / "model.safetensors").is_file()
    assert not (run / "checkpoints" / ".step-00000002.12345").exists()


FAILURES = {"optimizer": "save_file", "state": "write_json", "sync": "sync"}


@pytest.mark.parametrize(
    ("place", "wrapped"),
    [*((place, False) for place in FAILURES), ("optimizer", True)],
    ids=[*FAILURES, "as safetensors reports it"],
)
def test_a_full_disk_leaves_the_previous_checkpoint(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: str, wrapped: bool
) -> None:
    model, optimizer = build()
    step(model, optimizer)
    save(run, 1, model, optimizer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step(model, optimizer)

    def full(*_: object, **__: object) -> None:
        if wrapped:  # as safetensors words it
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, FAILURES[place], full)
    with pytest.raises(OSError, match=r"step 2 .*No space left on device.*step-00000001, is untouched.*--resume"):
        save(run, 2, model, optimizer)
    assert folders(run) == ["last.json", "step-00000001"]

    def program(_: list[str] | None) -> int:
        save(run, 2, model, optimizer)
        return 0

    with pytest.raises(SystemExit) as left:  # a sentence, not a traceback
        run_program(program)
    assert left.value.code not in (0, None)
    assert "No space left on device" in capsys.readouterr().err

    monkeypatch.undo()
    restored = load_model(find_checkpoint(run))
    for name, value in before.items():
        assert torch.equal(restored.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("override", "key"),
    [("siren.hidden=128", r"siren\.hidden is 64 there and 128 here"),
     ("siren.hidden_layers=2", r"siren\.hidden_layers"),
     ("inner_loop.steps=3", r"inner_loop\.steps"), ("inner_loop.shared_alpha=true", r"inner_loop\.shared_alpha"),
     ("reader.mlp_ratio=4", r"reader\.mlp_ratio"), ("siren.omega=30", r"siren\.omega")],
)  # fmt: skip
def test_another_architecture_is_refused_and_the_key_named(run: Path, override: str, key: str) -> None:
    model, optimizer = build()
    step(model, optimizer)
    folder = save(run, 1, model, optimizer)
    other, other_optimizer = build(override)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(InputError, match=key):
        resume(folder, model=other, optimizer=other_optimizer)
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())


@pytest.mark.parametrize("size", [0, 4, 100, 5000])
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors"])
def test_truncated_tensors_are_refused_with_a_sentence(run: Path, file: str, size: int) -> None:
    model, optimizer = build()
    step(model, optimizer)
    folder = save(run, 1, model, optimizer)
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[:size])
    if file == "model.safetensors":
        with pytest.raises(InputError, match=re.escape(str(folder))):
            load_model(folder)
    with pytest.raises(InputError, match=re.escape(str(folder))):
        resume(folder, model=model, optimizer=optimizer)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "optimizer.safetensors", "state.json"])
def test_missing_files_are_named(run: Path, file: str) -> None:
    model, optimizer = build()
    step(model, optimizer)
    folder = save(run, 1, model, optimizer)
    (folder / file).unlink()
    with pytest.raises(InputError, match=file.replace(".", r"\.")):
        resume(folder, model=model, optimizer=optimizer)
    if file in ("config.json", "model.safetensors"):
        with pytest.raises(InputError, match=file.replace(".", r"\.")):
            load_model(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"siren": {}}', '{"siren": {"hiden": 3}}'])
def test_a_damaged_config_is_refused_with_a_sentence(run: Path, content: str) -> None:
    model, optimizer = build()
    step(model, optimizer)
    folder = save(run, 1, model, optimizer)
    (folder / "config.json").write_text(content)
    with pytest.raises(InputError, match=re.escape(str(folder))):
        load_model(folder)
    with pytest.raises(InputError, match=re.escape(str(folder))):
        resume(folder, model=model, optimizer=optimizer)


def test_averaged_weights_are_the_model_and_the_trained_ones_lie_beside_it(run: Path) -> None:
    (model, optimizer), (average, _) = build(), build()
    step(model, optimizer)
    state = {"step": 1}
    folder = save_checkpoint(run, name="last", model=model, optimizer=optimizer, state=state, average=average)
    for weights, expected in ((None, average), ("ema", average), ("raw", model)):
        loaded = load_model(folder, weights=weights)
        for (name, a), b in zip(loaded.named_parameters(), expected.parameters(), strict=True):
            assert torch.equal(a, b), (weights, name)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), average.parameters(), strict=True))
    (resumed, its_optimizer), (its_average, _) = build(), build()
    resume(folder, model=resumed, optimizer=its_optimizer, average=its_average)
    for one, other in ((resumed, model), (its_average, average)):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert load_run(run, weights="raw")[1].siren.out_scale.equal(model.siren.out_scale)


def test_an_average_that_there_is_not(run: Path) -> None:
    model, optimizer = build()
    folder = save(run, 1, model, optimizer)
    assert load_model(folder, weights="raw").siren.out_scale.equal(model.siren.out_scale)
    with pytest.raises(InputError, match=r"no average of the weights; it was trained without optim\.ema"):
        load_model(folder, weights="ema")


def test_what_killed_processes_left_is_cleared_away(run: Path) -> None:
    model, optimizer = build()
    save(run, 1, model, optimizer)
    (run / "checkpoints" / ".last.json.123").write_text('{"fol')
    (run / "checkpoints" / ".step-00000002.123").mkdir()
    save(run, 3, model, optimizer)
    assert folders(run) == ["last.json", "step-00000003"]


def test_finding_a_checkpoint(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"not a run directory.*config\.yaml"):
        find_checkpoint(tmp_path)
    with pytest.raises(InputError, match="no checkpoint 'last'; training has not written any yet"):
        find_checkpoint(run)
    model, optimizer = build()
    save(run, 1, model, optimizer)
    with pytest.raises(InputError, match="no checkpoint 'best'; it has last"):
        find_checkpoint(run, "best")
    (run / "checkpoints" / "last.json").write_text(json.dumps({"folder": "step-00000009"}))
    with pytest.raises(InputError, match="points at step-00000009, which is not there"):
        find_checkpoint(run)


def test_a_run_can_be_loaded(run: Path) -> None:
    model, optimizer = build()
    save(run, 1, model, optimizer)
    config, loaded = load_run(run)
    assert config == CONFIG
    assert loaded.config == model.config
    assert not loaded.training


def test_nothing_is_unpickled() -> None:
    """Design: safetensors and JSON. Whoever adds an exception names it here."""
    calls = (
        r"torch\.load\(", r"\bpickle\b", r"\bdill\b", r"joblib\.load", r"np\.load\((?!.*allow_pickle=False)",
        r"yaml\.(unsafe_)?load\(", r"\.(save|load)_state\(",
    )  # fmt: skip
    pattern = re.compile("|".join(calls))
    allowed = {  # trees of other code bases, which the user names
        'data_pipes/foreign_read.py: content = torch.load(item.path, map_location="cpu", weights_only=True)',
        # a copy of what this process has made itself, which never leaves it
        "mwt/config_files.py: import pickle",
        "mwt/config_files.py: return pickle.dumps(OmegaConf.structured(schema))",
        'mwt/config_files.py: merged, where = pickle.loads(_defaults(known)), "defaults"',
    }
    found = {
        f"{path.relative_to(ROOT)}: {line.split('#')[0].strip()}"
        for package in ("mwt", "data_pipes", "train", "eval", "benchmarks")
        for path in (ROOT / package).rglob("*.py")
        for line in path.read_text().splitlines()
        if pattern.search(line.split("#")[0]) and not line.strip().startswith(('"', "#", "*", ":"))
    }
    assert found == allowed
