"""Configuration: precedence, refusals with a sentence, and that nothing can be written into it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from mwt.config import DEBUG, VARIANTS, ClassifyConfig, model_config
from mwt.config_files import config_yaml, list_configs, load_config
from mwt.errors import InputError
from mwt.model import MetaWeightTransformer
from mwt.structs import SignalFacts


def load(*overrides: str, path: Path | None = None) -> ClassifyConfig:
    return load_config(ClassifyConfig, path, overrides)


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_the_defaults_are_section_4_of_the_paper() -> None:
    config = load()
    assert (config.siren.hidden, config.siren.hidden_layers, config.siren.omega) == (128, 4, 10.0)
    assert (config.inner_loop.steps, config.inner_loop.alpha_min, config.inner_loop.alpha_max) == (6, 0.1, 1.0)
    assert (config.reader.blocks, config.reader.head_dim, config.reader.layer_scale) == (10, 64, 0.1)
    assert (config.reader.token_scale, config.reader.mlp_ratio) == (500.0, 1.0)
    assert config.loss.classification_weight == 0.01
    assert (config.optim.lr_siren, config.optim.lr_alpha, config.optim.lr_reader) == (1e-4, 1e-2, 1e-4)
    assert (config.optim.weight_decay, config.optim.clip_norm, config.data.batch_size) == (1e-4, 1.0, 16)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_a_variant_sets_its_values(variant: str) -> None:
    config = load(f"variant={variant}")
    expected = {"MWT": (128, 1, 0.01), "MWT-L": (256, 1, 0.01), "WT": (128, 1, 0), "MWT-W": (128, 4, 0.01)}[variant]
    assert (config.siren.hidden, config.reader.mlp_ratio, config.loss.classification_weight) == expected


def test_precedence_defaults_base_file_command_line(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "variant: WT\nsiren: {hidden: 64, omega: 30.0}\noptim: {epochs: 3}\n")
    path = write(tmp_path, "own.yaml", "base: base.yaml\noptim: {epochs: 4, warmup: 0.1}\n")
    config = load("optim.warmup=0.2", path=path)
    assert config.variant == "WT"
    assert config.loss.classification_weight == 0.0
    assert (config.siren.hidden, config.siren.omega) == (64, 30.0)
    assert (config.optim.epochs, config.optim.warmup) == (4, 0.2)
    # A variant beside other keys is overridden by them; at a later level it overrides the earlier one.
    assert load("siren.hidden=192", "variant=MWT-L").siren.hidden == 192
    assert load("variant=MWT-L", path=path).siren.hidden == 256
    assert load("variant=MWT-L", path=path).loss.classification_weight == 0.01
    assert load("variant=MWT-L", path=path).siren.omega == 30.0


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-4 as text."""
    path = write(tmp_path, "a.yaml", "optim:\n  lr_siren: 1e-4\n  lr_alpha: 1\n")
    config = load("optim.lr_reader=2e-3", "run.dir=2024", path=path)
    assert (config.optim.lr_siren, config.optim.lr_alpha, config.optim.lr_reader) == (1e-4, 1.0, 2e-3)
    assert all(isinstance(value, float) for value in (config.optim.lr_siren, config.optim.lr_alpha))
    assert config.run.dir == "2024"
    assert load("inner_loop.points=null", "optim.clip_norm=null").optim.clip_norm is None
    assert load("run.trackers=[tensorboard,wandb]").run.trackers == ("tensorboard", "wandb")


def test_what_is_printed_can_be_read(tmp_path: Path) -> None:
    config = load("variant=MWT-W", "siren.hidden=64", "run.trackers=[wandb]", "inner_loop.points=12")
    assert load(path=write(tmp_path, "c.yaml", config_yaml(config))) == config


def test_nothing_writes_into_a_config() -> None:
    config = load()
    for target, name in ((config, "variant"), (config.siren, "hidden"), (config.run, "trackers")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(target, name, 1)
    assert isinstance(config.run.trackers, tuple)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("siren.hiden=64", r"Key 'hiden' .*hidden.*siren\.hiden"),
        ("inner_lop.steps=3", r"'inner_lop'.*inner_loop"),
        ("siren.hidden=wide", r"'wide'.*siren\.hidden"),
        ("siren.hidden=64.5", r"64\.5.*siren\.hidden"),
        ("siren=64", "siren|Siren"),
        ("run.precision=fp64", r"fp64.*'fp32', 'bf16', 'fp16'"),
        ("data.augment=flip", r"flip.*'none'"),
        ("variant=MWT-XL", "variant 'MWT-XL' is not known; choose one of MWT, MWT-L, WT, MWT-W"),
        ("nonsense", "'nonsense' is not of the form key=value"),
        ("inner_loop.steps=0", r"inner_loop\.steps is 0; it must be at least 1"),
        ("inner_loop.fraction=0", r"inner_loop\.fraction is 0"),
        ("inner_loop.fraction=1.5", r"inner_loop\.fraction is 1\.5"),
        ("reader.token_scale=-1", r"reader\.token_scale"),
        ("data.batch_size=0", r"data\.batch_size"),
        ("optim.epochs=0", r"optim\.epochs"),
        ("run.log_every=0", r"run\.log_every"),
        ("run.max_skipped=0", r"run\.max_skipped is 0; it must be at least 1"),
        ("run.monitor_limit=0", r"run\.monitor_limit must be at least 1, or null"),
        ("run.on_nonfinite=ignore", r"ignore.*raise.*skip"),
        ("optim.accumulate=0", r"optim\.accumulate is 0; it must be at least 1"),
        ("optim.ema=1.0", r"optim\.ema is 1\.0; it must lie in \(0, 1\), or be null"),
        ("optim.ema=0", r"optim\.ema is 0"),
        ("optim.schedule=linear", r"linear.*onecycle.*cosine.*constant"),
    ],
)
def test_refusals_name_the_key(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load(override)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override",
    ["inner_loop.alpha_min=2", "optim.warmup=1.5", "optim.lr_siren=-1", "reader.head_dim=0", "reader.mlp_ratio=0",
     "loss.classification_weight=-0.01", "run.threads=-1", "data.crop_padding=-1", "optim.clip_norm=-1"],
)  # fmt: skip
def test_values_that_would_fail_or_mislead_later_are_refused_at_once(override: str) -> None:
    with pytest.raises(InputError, match=override.split("=")[0].replace(".", r"\.")):
        load(override)


def test_a_missing_file_and_a_broken_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"No config file at .*nothing\.yaml"):
        load(path=tmp_path / "nothing.yaml")
    with pytest.raises(InputError, match=r"broken\.yaml is not valid YAML"):
        load(path=write(tmp_path, "broken.yaml", "siren: [1, 2"))
    with pytest.raises(InputError, match=r"list\.yaml must hold `key: value` lines"):
        load(path=write(tmp_path, "list.yaml", "- a\n- b\n"))
    with pytest.raises(InputError, match=r"typo\.yaml: .*'sirn'"):
        load(path=write(tmp_path, "typo.yaml", "sirn: {hidden: 3}\n"))
    write(tmp_path, "one.yaml", "base: two.yaml\n")
    write(tmp_path, "two.yaml", "base: one.yaml\n")
    with pytest.raises(InputError, match="only one level is allowed"):
        load(path=tmp_path / "one.yaml")


def test_debug_is_a_valid_config_and_small() -> None:
    config = load(*DEBUG)
    assert config.data.limit == 2 * config.data.batch_size
    assert (config.optim.epochs, config.run.device) == (1, "cpu")


def test_the_model_config_survives_json() -> None:
    facts = SignalFacts(kind="image", channels=3, height=8, width=9, classes=("a", "b"))
    config = model_config(load("siren.hidden=64", "reader.blocks=1"), facts)
    stored = json.loads(json.dumps(dataclasses.asdict(config)))
    assert MetaWeightTransformer(stored).config == config


def test_list_configs(tmp_path: Path) -> None:
    write(tmp_path, "b.yaml", "# What it is\n# more\nvariant: MWT\n")
    write(tmp_path, "a.yaml", "variant: WT\n")
    write(tmp_path, "c.yaml", "")
    assert list_configs(tmp_path) == [("a", ""), ("b", "What it is"), ("c", "")]
