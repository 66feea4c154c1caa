"""The whole model as its users meet it: build, predict, reconstruct, save, load, refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mwt
from mwt.config import InnerLoopConfig, LossConfig, ModelConfig, ReaderConfig, SirenConfig
from mwt.errors import InputError
from mwt.model import MetaWeightTransformer, list_builtin_models
from mwt.observe import observe
from mwt.structs import Batch, SignalFacts


def build(
    *, channels: int = 1, points: int | None = None, hidden: int = 64, reader: str = "transformer", shared: bool = False
) -> MetaWeightTransformer:
    return MetaWeightTransformer(
        ModelConfig(
            siren=SirenConfig(hidden=hidden, hidden_layers=1, omega=12.5),
            inner_loop=InnerLoopConfig(steps=2, points=points, shared_alpha=shared),
            reader=ReaderConfig(name=reader, blocks=1, mlp_ratio=2.0),
            loss=LossConfig(classification_weight=0.02),
            signal=SignalFacts(kind="image", channels=channels, height=6, width=5, classes=("cat", "dog", "owl")),
        )
    )


def images(count: int = 4, channels: int = 1) -> torch.Tensor:
    return torch.randint(256, (count, channels, 6, 5), dtype=torch.uint8)


def test_the_public_names_are_these() -> None:
    assert mwt.__all__ == [
        "Batch", "ClassifyConfig", "Fit", "InputError", "Losses",
        "MetaWeightTransformer", "ModelConfig", "Observations", "Output", "Prediction",
        "SignalFacts", "TrainingError", "list_builtin_models", "list_readers", "list_variants",
        "load_config",
    ]  # fmt: skip
    assert all(hasattr(mwt, name) for name in mwt.__all__)
    assert mwt.list_readers()[0] == "transformer"
    assert mwt.list_variants() == ["MWT", "MWT-L", "WT", "MWT-W"]


def test_a_width_that_the_heads_do_not_divide_is_refused() -> None:
    for hidden in (32, 100):
        with pytest.raises(InputError, match=rf"is {hidden} wide, .*siren\.hidden.*not a multiple.*64"):
            build(hidden=hidden)


def test_an_unknown_reader_is_refused() -> None:
    with pytest.raises(InputError, match=r"reader\.name is 'cnn'; there are transformer"):
        build(reader="cnn")


def test_a_round_trip_through_a_folder_is_exact(tmp_path: Path) -> None:
    model = build(points=7)
    model.save_pretrained(tmp_path / "m")
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    again = MetaWeightTransformer.from_pretrained(tmp_path / "m")
    assert again.config == model.config
    assert not again.training
    assert list(again.state_dict()) == list(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    shown = images()
    assert again.predict(shown) == model.eval().predict(shown)


def test_config_json_and_the_model_card_say_what_it_is(tmp_path: Path) -> None:
    model = build(points=7)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["siren"] == {"hidden": 64, "hidden_layers": 1, "omega": 12.5, "out_scale": 0.1}
    assert stored["inner_loop"]["points"] == 7
    assert stored["signal"]["classes"] == ["cat", "dog", "owl"]
    assert set(stored) == {"siren", "inner_loop", "reader", "loss", "signal", "field"}
    card = (tmp_path / "README.md").read_text()
    library = "library_name: meta-weight-transformer"
    for text in ("license: mit", library, "cat, dog, owl", "6 x 5", "omega 12.5", "2 steps"):
        assert text in card
    count = sum(p.numel() for p in model.reader.parameters())
    assert f"reader {count:,}" in card
    assert str(tmp_path) not in card


def test_a_folder_with_a_tensor_missing_is_refused(tmp_path: Path) -> None:
    """Loaded leniently, it would classify with random weights."""
    build().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["reader.logits.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(Exception, match=r"reader\.logits\.weight"):
        MetaWeightTransformer.from_pretrained(tmp_path)


def test_a_tensor_too_many_is_refused(tmp_path: Path) -> None:
    build(shared=True).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "alpha.1": tensors["alpha.0"].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(Exception, match=r"alpha\.1"):
        MetaWeightTransformer.from_pretrained(tmp_path)


def test_a_builtin_model_that_there_is_not() -> None:
    with pytest.raises(InputError, match="There is no model 'builtin:nothing'; there are"):
        MetaWeightTransformer.from_pretrained("builtin:nothing")
    assert all(name.startswith("builtin:") for name in list_builtin_models())


def test_a_folder_that_there_is_not(tmp_path: Path) -> None:
    """Not a word about repository ids to somebody who mistyped a path."""
    with pytest.raises(InputError, match="nothing"):
        MetaWeightTransformer.from_pretrained(tmp_path / "nothing")


def test_predictions() -> None:
    model = build().eval()
    shown = images()
    result = model.predict(shown)
    batch = Batch(images=shown, labels=torch.zeros(4).long(), positions=torch.arange(4))
    output = model(observe(batch, model.config.inner_loop, seed=0))
    for prediction, logits in zip(result, output.logits, strict=True):
        assert list(prediction.probabilities) == ["cat", "dog", "owl"]
        assert sum(prediction.probabilities.values()) == pytest.approx(1, abs=1e-6)
        assert prediction.label == ("cat", "dog", "owl")[int(logits.argmax())]
        assert 0 <= prediction.psnr <= 100
    [alone] = model.predict(shown[0])
    assert alone.psnr == pytest.approx(result[0].psnr, abs=1e-4)
    assert model.predict(shown) == result


def test_a_prediction_does_not_depend_on_the_place_in_the_batch() -> None:
    """With random subsets too: whoever classifies a folder of images must get for each what it gets alone."""
    model = build(points=5).eval()
    shown = images()
    together = model.predict(shown)
    for image, prediction in zip(shown, together, strict=True):
        [alone] = model.predict(image)
        assert alone.psnr == pytest.approx(prediction.psnr, abs=1e-3)
        assert list(alone.probabilities.values()) == pytest.approx(list(prediction.probabilities.values()), abs=1e-4)


@pytest.mark.parametrize(("trained", "given"), [(3, 1), (1, 3), (3, 4)])
def test_images_with_other_channels_are_refused(trained: int, given: int) -> None:
    """A grey image would be spread over an RGB model's channels by broadcasting, with a loss three times too large."""
    with pytest.raises(InputError, match="channel"):
        build(channels=trained).predict(images(channels=given))


def test_reconstruct_is_the_field_on_a_grid_of_any_size() -> None:
    model = build(channels=3)
    offsets = torch.randn(2, model.siren.adapted_size) * 0.01
    shown = model.reconstruct(offsets, 4, 9)
    assert shown.shape == (2, 3, 4, 9)
    y, x = torch.linspace(-1, 1, 4)[2], torch.linspace(-1, 1, 9)[7]
    pixel = model.siren(offsets, torch.stack([y, x])[None])[:, 0]
    torch.testing.assert_close(shown[:, :, 2, 7], pixel)
    large = model.reconstruct(offsets, 10, 25)  # the grids of n and 3 n - 2 points share every third
    torch.testing.assert_close(large[:, :, ::3, ::3], shown, rtol=1e-4, atol=1e-5)


def test_fused_and_plain_attention_agree() -> None:
    model = build().double()
    tokens = torch.randn(2, 64, 65, dtype=torch.float64)
    results = []
    for fused in (False, True):
        for block in model.reader.blocks:
            block.attn.fused_attn = fused
        x = model.reader.embed((tokens + model.reader.base) * model.reader.token_scale)
        for block in model.reader.blocks:
            x = block(x)
        results.append(x)
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


@pytest.mark.parametrize("half", [False, True])
def test_attention_is_fused_but_for_half_precision_on_the_cpu(half: bool) -> None:
    model = build()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        model.reader.read_tokens(torch.randn(2, 64, 65))
    assert all(block.attn.fused_attn is not half for block in model.reader.blocks)


def test_the_first_normalisation_keeps_its_gradient_in_half_precision() -> None:
    model = build()
    tokens = torch.randn(8, 64, 65)
    norm = model.reader.blocks[0].norm1

    def gradient(half: bool) -> torch.Tensor:
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            logits = model.reader.read_tokens(tokens)
        torch.nn.functional.cross_entropy(logits.float(), torch.zeros(8, dtype=torch.int64)).backward()
        return torch.cat([norm.weight.grad, norm.bias.grad])

    exact, rounded = gradient(False), gradient(True)
    assert (rounded - exact).norm() < 0.03 * exact.norm()


def test_parameter_groups_share_nothing_and_leave_nothing_out() -> None:
    model = build()
    groups = model.parameter_groups()
    assert list(groups) == ["siren", "alpha", "reader"]
    grouped = [id(p) for group in groups.values() for p in group]
    assert len(grouped) == len(set(grouped)) == len(list(model.parameters()))
