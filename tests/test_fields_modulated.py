"""Modulated fields: the formulas in NumPy, the inner loop by finite differences and written out, and whole programs."""

from __future__ import annotations

import json
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from eval import classify, export, reconstruct
from mwt import memory
from mwt.config import DEBUG, ClassifyConfig, InnerLoopConfig, ModelConfig, model_config
from mwt.config_files import load_config
from mwt.errors import InputError, NotDefinedError
from mwt.fields import AdaptedField
from mwt.fields.modulated import ModulatedASMR, ModulatedSiren
from mwt.inner_loop import fit
from mwt.meta_sgd import MetaSGD
from mwt.model import MetaWeightTransformer
from mwt.model_field import make_field
from mwt.observe import grid
from mwt.readers import TokenReader
from mwt.stages import begin_stage
from mwt.structs import Batch, Observations, SignalFacts
from mwt.tokens import chunks
from train import classify as train

DIGITS = Path(__file__).parents[1] / "configs" / "classify" / "digits.yaml"
SIZE = (8, 16)
HASH_GRID = (
    "field.name=hash_grid", "field.adapted=[table]", "field.options.levels=2", "field.options.log2_table=4",
    "field.options.base_resolution=[3]", "field.options.finest_resolution=[7]", "field.options.decoder.width=8",
)  # fmt: skip
ASMR = ("field.name=asmr_modulated", "data.augment=none")
KINDS = {
    "modulated": ("field.name=modulated",),
    "asmr": ASMR,
    "hash grid": HASH_GRID,
    "modulations": ("field.name=modulated", "field.tokens=modulations", "inner_loop.learn_alpha=false"),
}


def load(*overrides: str, size: tuple[int | None, int | None] = SIZE) -> ModelConfig:
    facts = SignalFacts(kind="image", channels=2, height=size[0], width=size[1], classes=("a", "b"))
    small = ("siren.hidden=5", "siren.hidden_layers=2", "field.latent=3", "reader.head_dim=5", "reader.blocks=1")
    return model_config(load_config(ClassifyConfig, None, [*small, *overrides]), facts)


def small_field(name: str, *overrides: str) -> Any:
    options = ("field.options.omega=2",) if "asmr" in name else ()
    torch.manual_seed(3)
    return make_field(load(f"field.name={name}", *options, *overrides)).double()


def numpy_of(field: Any) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in field.named_parameters()}


# ---- the formulas ------------------------------------------------------------------------------------------------


def test_a_modulated_siren_is_the_formula() -> None:
    field = small_field("modulated")
    assert isinstance(field, ModulatedSiren)
    assert isinstance(field, AdaptedField)
    own, coords, latents = numpy_of(field), grid(*SIZE, dtype=torch.float64), torch.randn(2, 3).double()
    actual = field(latents, coords)
    shifts = (latents.numpy() @ own["mapping"]).reshape(2, 3, 5)
    for b in range(2):
        hidden = coords.numpy()
        for i, omega in enumerate((10.0, 1.0, 1.0)):
            phase = hidden @ own[f"siren.layers.{i}.weight"] + own[f"siren.layers.{i}.bias"] + shifts[b, i]
            hidden = np.sin(omega * phase)
        values = (hidden @ own["siren.head.weight"].T + own["siren.head.bias"]) * own["siren.out_scale"]
        np.testing.assert_allclose(actual[b].detach().numpy(), values, rtol=1e-12, atol=1e-12)
    each = torch.stack([coords, coords.flip(0)])
    torch.testing.assert_close(field(latents, each)[1], actual[1].flip(0), rtol=1e-12, atol=1e-12)
    assert not field.init_offsets(2).any()


BASES = ((1, 2, 2, 2), (2, 2, 2, 2))
"""Chosen for 8 and 16 pixels."""


def asmr_value(own: dict[str, np.ndarray], shifts: np.ndarray, pixel: tuple[int, int], omega: float) -> np.ndarray:
    """One sample, digit by digit, as the paper writes it."""
    digits = []
    for x, bases in zip(pixel, BASES, strict=True):
        places = [int(np.prod(bases[i + 1 :])) for i in range(4)]
        digits.append([(x // g % b) / max(b - 1, 1) for g, b in zip(places, bases, strict=True)])
    u = np.array(digits).T
    hidden = u[0]
    for i, name in enumerate(("first", "hidden.0", "hidden.1")):
        phase = hidden @ own[f"asmr.{name}.weight"] + own[f"asmr.{name}.bias"] + shifts[i]
        hidden = np.sin(omega * (phase + omega * u[i + 1] @ own[f"asmr.modulators.{i}.weight"]))
    return hidden @ own["asmr.last.weight"] + own["asmr.last.bias"]


def test_a_modulated_asmr_is_the_formula_and_shares_activations() -> None:
    field = small_field("asmr_modulated")
    assert isinstance(field, ModulatedASMR)
    assert field.asmr.bases == BASES
    own, coords, latents = numpy_of(field), grid(*SIZE, dtype=torch.float64), torch.randn(2, 3).double()
    actual = field(latents, coords)
    shifts = (latents.numpy() @ own["mapping"]).reshape(2, 3, 5)
    expected = [[asmr_value(own, s, (y, x), 2.0) for y in range(SIZE[0]) for x in range(SIZE[1])] for s in shifts]
    np.testing.assert_allclose(actual.detach().numpy(), np.array(expected), rtol=1e-11, atol=1e-11)
    order = torch.randperm(len(coords))  # one by one instead of the whole grid
    some = torch.stack([coords[order[:7]], coords[order[-7:]]])
    ones = field(latents, some)
    torch.testing.assert_close(ones[0], actual[0, order[:7]], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ones[1], actual[1, order[-7:]], rtol=1e-12, atol=1e-12)
    with pytest.raises(NotDefinedError, match="its own size only"):
        field(latents, grid(16, 24, dtype=torch.float64))


@pytest.mark.parametrize("name", ["modulated", "asmr_modulated"])
def test_the_latent_begins_to_move_all_phases_alike(name: str) -> None:
    field = make_field(load(f"field.name={name}", "siren.hidden=64", "field.latent=48"))
    omegas = torch.tensor([10.0, 1.0, 1.0] if name == "modulated" else [30.0] * 3)
    phases = field.modulations(torch.randn(400, 48)) * omegas[:, None]  # type: ignore[operator]
    torch.testing.assert_close(phases.std((0, 2)), torch.ones(3), rtol=0.1, atol=0)


# ---- in the inner loop -------------------------------------------------------------------------------------------


def observations(kind: str) -> Observations:
    coords, values = grid(*SIZE, dtype=torch.float64), torch.rand(2, SIZE[0] * SIZE[1], 2).double()
    index = torch.stack([torch.randperm(len(coords))[:27].view(3, 9) for _ in range(2)])
    return Observations(coords=coords, values=values, index=index if kind == "subsets" else None)


@pytest.mark.parametrize("seen", ["grid", "subsets"])
@pytest.mark.parametrize("name", ["modulated", "asmr_modulated"])
def test_the_inner_loop_is_gradient_descent_on_the_latent(name: str, seen: str) -> None:
    field, signals = small_field(name), observations(seen)
    options = InnerLoopConfig(steps=2, engine="func")
    alpha = MetaSGD(options, 3).double()
    fitted = fit(field, alpha, signals, steps=2, options=options)
    higher = fit(field, alpha, signals, steps=2, options=InnerLoopConfig(steps=2, engine="higher"))
    torch.testing.assert_close(higher.prediction, fitted.prediction, rtol=1e-9, atol=1e-11)
    for b in range(2):
        latent = torch.zeros(1, 3, dtype=torch.float64)
        for step in range(2):
            coords, values = signals.at(step)
            latent.requires_grad_()
            own = coords if coords.ndim == 2 else coords[b : b + 1]
            loss = (field(latent, own) - values[b]).square().mean()
            latent = (latent - alpha.rates(step) * torch.autograd.grad(loss, latent)[0]).detach()
        torch.testing.assert_close(fitted.offsets[b : b + 1], latent, rtol=1e-9, atol=1e-12)
        assert float(latent.abs().min()) > 1e-6


@pytest.mark.parametrize("name", ["modulated", "asmr_modulated"])
def test_the_outer_gradient_is_that_of_finite_differences(name: str) -> None:
    field, signals = small_field(name), observations("grid")
    options = InnerLoopConfig(steps=2, engine="func")
    alpha = MetaSGD(options, 3).double()
    projection = torch.randn(2, SIZE[0] * SIZE[1], 2).double()

    def loss() -> Tensor:
        fitted = fit(field, alpha, signals, steps=2, options=options)
        return (fitted.prediction * projection).sum() + fitted.offsets.square().sum()

    parameters = {**dict(field.named_parameters()), **{f"alpha.{n}": p for n, p in alpha.named_parameters()}}
    gradients = torch.autograd.grad(loss(), list(parameters.values()))
    for (label, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        direction = torch.randn_like(parameter)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * 1e-6)
                ends.append(loss())
                parameter.add_(direction, alpha=-sign * 1e-6)
        slope = (ends[0] - ends[1]) / 2e-6
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=2e-5, atol=1e-6, msg=label)


def test_the_vector_in_pieces() -> None:
    pieces = chunks(torch.arange(1.0, 11.0).view(2, 5), 2)
    assert pieces.tolist() == [[[1, 2], [3, 4], [5, 0]], [[6, 7], [8, 9], [10, 0]]]


def test_a_model_reads_the_latent_or_the_modulations() -> None:
    for tokens, shape in (("vector", (2, 2)), ("modulations", (3, 5))):
        overrides = ("field.name=modulated", f"field.tokens={tokens}", "field.token_size=2", "reader.options.width=10")
        model = MetaWeightTransformer(load(*overrides))
        assert isinstance(model.reader, TokenReader)
        assert model.reader.base.shape[1:] == shape
        assert model.reader.embed.out_features == 10
        offsets = torch.randn(4, 3)
        assert model.read(offsets).shape == (4, 2)
        assert not torch.allclose(model.read(offsets), model.read(offsets.flip(1)))
        assert MetaWeightTransformer(json.loads(json.dumps(asdict(model.config)))).config == model.config


def test_rates_may_stay_as_they_begin() -> None:
    for learn in (True, False):
        model = MetaWeightTransformer(load("field.name=modulated", f"inner_loop.learn_alpha={learn}"))
        begin_stage(model, "joint")
        assert all(p.requires_grad == learn for p in model.alpha)
        assert all(p.requires_grad for part in (model.siren, model.reader) for p in part.parameters())


def test_a_step_has_a_known_size() -> None:
    labels = torch.zeros(1, dtype=torch.int64)
    example = Batch(images=torch.zeros(1, 2, *SIZE, dtype=torch.uint8), labels=labels, positions=labels)
    need = memory.estimate(
        load("field.name=modulated"), example, batch_size=4, precision="fp32", device=torch.device("cpu")
    )
    assert need is not None
    assert need.total > 0


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("field.name=modulate",), r"field\.name is 'modulate'.*'modulated'"),
        (("field.latent=0",), r"field\.latent is 0"),
        (("field.token_size=0",), r"field\.token_size is 0"),
        (("field.tokens=modulations",), r"field\.tokens=modulations is for .*field\.name is siren"),
        (("field.adapted=[table]",), r"field\.adapted .* field\.name=siren"),
        (("field.name=modulated", "field.options.width=3"), r"field\.options has width.*block siren"),
        (("field.name=asmr_modulated", "field.options.width=3"), r"field\.options\.width.*siren\.hidden"),
        (("field.name=hash_grid", "field.options.level=3"), r"field\.options: .*'level'.*levels"),
        (("field.name=grid", "field.adapted=[table]"), "No parameter begins with table"),
        (("field.name=harmonized",), r"adds no penalty .*field\.options\.penalty=0"),
        (("field.name=modulated", "reader.name=mlp"), r"reader\.name=mlp reads the weights of networks"),
        (("field.name=modulated", "reader.input=standardise"), r"reader\.input=standardise"),
        (("field.name=modulated", "reader.options.depth=2"), r"reader\.options of tokens: .*'depth'"),
        (("field.name=modulated", "reader.head_dim=4"), "not a multiple"),
    ],
)
def test_wrong_settings_get_a_sentence(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        MetaWeightTransformer(load(*overrides))
    assert "\n" not in str(caught.value)


def test_asmr_is_not_defined_between_pixels() -> None:
    with pytest.raises(NotDefinedError, match=r"data\.augment=coords moves the pixels"):
        load("field.name=asmr_modulated", "data.augment=coords")
    with pytest.raises(NotDefinedError, match="samples of a grid"):
        make_field(load("field.name=asmr_modulated", size=(None, None)))


# ---- whole programs ----------------------------------------------------------------------------------------------


def run_debug(run: Path, *overrides: str) -> int:
    settings = (*DEBUG, "siren.hidden=16", "reader.head_dim=16", "run.threads=1", f"run.dir={run}")
    return train.main(["--config", str(DIGITS), *settings, *overrides])


def tensors(run: Path) -> dict[str, Tensor]:
    folder = json.loads((run / "checkpoints" / "last.json").read_text())["folder"]
    return load_file(run / "checkpoints" / folder / "model.safetensors")


SLOW = pytest.param("modulations", marks=pytest.mark.slow)


@pytest.mark.parametrize("kind", ["modulated", "asmr", "hash grid", SLOW])
def test_train_and_look_at_it(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert run_debug(run, *KINDS[kind]) == 0
    data = ["data.limit=16", "run.threads=1"]
    assert classify.main(["--run", str(run), *data]) == 0
    found = json.loads((run / "eval" / "classify_altered.json").read_text())
    assert np.isfinite([found["psnr"], found["accuracy"]]).all()
    assert len({row["psnr"] for row in found["curve"]}) == 2  # the fit moves
    on_pixels = kind == "asmr"
    if on_pixels:
        with pytest.raises(NotDefinedError, match="add --scale 1"):
            reconstruct.main(["--run", str(run), "--count", "1", *data])
    assert reconstruct.main(["--run", str(run), "--count", "1", "--scale", "1" if on_pixels else "2", *data]) == 0
    with pytest.raises(InputError, match=r"field\.name=.*hold the layers of SIRENs"):
        export.main(["--run", str(run), "--out", str(tmp_path / "set"), *data])
    assert not (tmp_path / "set").exists()
    if kind == "modulations":
        rates = tensors(run)["alpha.0"]
        assert ((rates >= 0.1) & (rates <= 1)).all()
        other = tmp_path / "other"
        assert run_debug(other, *KINDS[kind], "optim.lr_alpha=1") == 0
        assert torch.equal(tensors(other)["alpha.0"], rates)
    capsys.readouterr()


@pytest.mark.slow
def test_an_interrupted_run_goes_on_and_fields_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    longer = ("field.name=modulated", "optim.epochs=2")
    assert run_debug(whole, *longer) == 0

    def vote(stop: Any, step: int, device: Any, *, save: bool = False) -> tuple[bool, bool]:
        if step == 3:
            stop.signal = signal.SIGTERM
        return stop.signal is not None, save

    with monkeypatch.context() as patched:
        patched.setattr(train.StopRequested, "vote", vote)
        assert run_debug(parts, *longer) == 143
    assert train.main(["--resume", f"run.dir={parts}"]) == 0
    ours, theirs = tensors(whole), tensors(parts)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    model = MetaWeightTransformer.from_pretrained(whole / "checkpoints" / "step-00000004")
    assert model.config.field.name == "modulated"
    with pytest.raises(InputError, match=r"field\.latent is 64 there and 8 here"):
        run_debug(tmp_path / "next", "field.name=modulated", "field.latent=8", f"run.init_from={whole}")
    with pytest.raises(InputError, match=r"field\.name is 'modulated' there and 'siren' here"):
        run_debug(tmp_path / "again", f"run.init_from={whole}")
