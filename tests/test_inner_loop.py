"""The inner loop against the paper's formulation (`benchmarks.paper`), autograd and finite differences, in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from benchmarks import paper
from mwt.config import InnerLoopConfig, LossConfig, ModelConfig, ReaderConfig, SirenConfig
from mwt.engines import analytic
from mwt.inner_loop import fit
from mwt.losses import outer_losses
from mwt.meta_sgd import MetaSGD
from mwt.model import MetaWeightTransformer
from mwt.observe import grid, random_subsets
from mwt.siren import LayerTensors, Siren
from mwt.structs import Observations, SignalFacts
from tests.inner_gradient import loss_and_gradient

GOLDEN = Path(__file__).parent / "golden"
B, K, C = 2, 3, 2


def assert_equal(name: str, actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    """Equal relative to the largest value; float64 keeps 1e-16 an operation, chains of them stay far below 1e-9."""
    assert actual.shape == expected.shape, name
    error, size = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert error <= tolerance * size, f"{name}: differs by {error:.2e}, largest value {size:.2e}"


def published(name: str) -> str:
    """timm's names as the paper's formulation here calls them."""
    return name.removesuffix(".gamma")


# ---- the oracle itself -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rgb_permuted", "gray_subsampled_two_heads", "udf_points"])
def test_the_oracle_reproduces_the_golden_vectors(name: str) -> None:
    with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
        config = json.loads(file.metadata()["config"])
        vector = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if "image" in vector:
        coords = grid(*vector["image"].shape[-2:], dtype=torch.float64)[vector["index"]]
        pixels = vector["image"].flatten(2).mT
        values = torch.stack([pixels[b][vector["index"][b]] for b in range(len(pixels))])
    else:
        coords, values = vector["coords"], vector["values"]
    settings = paper.Settings(
        omega=config["omega"],
        steps=config["inner_steps"],
        token_scale=config["token_scale"],
        classification_weight=config["classification_weight"],
    )
    parameters = {key.removeprefix("param."): v for key, v in vector.items() if key.startswith("param.")}
    result = paper.training_gradients(parameters, coords, values, vector["labels"], settings)
    assert_equal("offsets", result.offsets, vector["out.offset"], 1e-12)
    assert_equal("losses", result.losses, vector["out.losses_per_step"], 1e-12)
    assert_equal("prediction", result.prediction, vector["out.prediction"], 1e-12)
    assert_equal("logits", result.logits, vector["out.logits"], 1e-12)
    assert_equal("classification", result.classification_loss, vector["out.classification_loss"], 1e-12)
    assert_equal("reconstruction", result.reconstruction_loss, vector["out.reconstruction_loss"], 1e-12)
    for key, gradient in result.gradients.items():
        assert_equal(key, gradient, vector[f"grad.{key}"], 1e-10)


# ---- the model (against the oracle: test_engines.py) -------------------------------------------------------------


def observations(kind: str, steps: int) -> tuple[Observations, Tensor, Tensor]:
    """What `mwt` is given, and the same spread out: coordinates [B, S + 1, P, D] and values [B, S + 1, P, C]."""
    if kind == "points":
        coords = torch.rand(B, 11, 3, dtype=torch.float64) * 2 - 1
        values = torch.rand(B, 11, C, dtype=torch.float64)
    else:
        coords = grid(4, 5, dtype=torch.float64)
        values = torch.rand(B, 20, C, dtype=torch.float64) * 2 - 1
    count = values.shape[1]
    if kind == "grid":
        seen = Observations(coords=coords, values=values)
        index = torch.arange(count).expand(B, steps + 1, count)
    else:
        index = random_subsets(torch.arange(B), draws=steps + 1, points=7, count=count, seed=0, purpose="test", epoch=0)
        seen = Observations(coords=coords, values=values, index=index)
    own = coords.expand(B, *coords.shape[-2:])
    spread = [torch.stack([source[b][index[b]] for b in range(B)]) for source in (own, values)]
    return seen, spread[0], spread[1]


def build(
    width: int, scale: float, ratio: float, shared: bool, weight: float, kind: str, engine: str = "analytic"
) -> MetaWeightTransformer:
    model = MetaWeightTransformer(
        ModelConfig(
            siren=SirenConfig(hidden=width, hidden_layers=1 if width > 64 else 2),
            inner_loop=InnerLoopConfig(steps=2, shared_alpha=shared, engine=engine),
            reader=ReaderConfig(token_scale=scale, blocks=1 if width > 64 else 2, mlp_ratio=ratio),
            loss=LossConfig(classification_weight=weight),
            signal=SignalFacts(
                kind="points" if kind == "points" else "image",
                channels=C,
                height=None,
                width=None,
                classes=("a", "b", "c"),
            ),
        )
    ).double()
    with torch.no_grad():  # zeros and ones hide mistakes
        for name, parameter in model.named_parameters():
            if name == "reader.base":
                parameter.normal_(0, 0.01)
            elif parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def test_the_classification_weight_reaches_the_fit_but_not_the_reader() -> None:
    """Ten times w_cls: the reader's gradients stay, the SIREN's classification part grows tenfold."""
    grads = {}
    for weight in (0.0, 0.01, 0.1):
        torch.manual_seed(5)
        model = build(64, 500.0, 1.0, False, weight, "grid")
        seen, _, _ = observations("grid", 2)
        outer_losses(model(seen), torch.tensor([1, 2])).total.backward()
        grads[weight] = {name: p.grad for name, p in model.named_parameters()}
    for name in grads[0.0]:
        if name.startswith("reader."):
            assert_equal(name, grads[0.1][name], grads[0.0][name], 1e-12)
        else:
            small, large = grads[0.01][name] - grads[0.0][name], grads[0.1][name] - grads[0.0][name]
            assert small.abs().max() > 0 or "head" in name or "scale" in name
            if small.abs().max() > 0:
                assert_equal(name, large, 10 * small, 1e-8)  # the difference of two numbers loses a few digits


# ---- the written-out gradient ------------------------------------------------------------------------------------


def tiny(width: int = 4, dims: int = 2, channels: int = 3) -> Siren:
    siren = Siren(
        SirenConfig(hidden=width, hidden_layers=2, omega=3.0), coordinate_dims=dims, channels=channels
    ).double()
    with torch.no_grad():
        for parameter in siren.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return siren


def batched(layers: LayerTensors) -> LayerTensors:
    return [(w.expand(B, *w.shape) + 0, b.expand(B, *b.shape) + 0) for w, b in layers]


@pytest.mark.parametrize("own_coords", [False, True])
@pytest.mark.parametrize("own_layers", [False, True])
def test_loss_and_gradient_against_autograd(own_coords: bool, own_layers: bool) -> None:
    siren = tiny()
    coords = torch.rand(B, 9, 2, dtype=torch.float64) if own_coords else torch.rand(9, 2, dtype=torch.float64)
    values = torch.rand(B, 9, 3, dtype=torch.float64)
    layers = batched(siren.base())
    if own_layers:
        layers = [(w + 0.1 * torch.randn_like(w), b + 0.1 * torch.randn_like(b)) for w, b in layers]
    layers = [(w.detach().requires_grad_(), b.detach().requires_grad_()) for w, b in layers]
    prediction = siren.render(layers, coords)
    expected_loss = (prediction - values).pow(2).mean((1, 2))
    leaves = [tensor for pair in layers for tensor in pair]
    expected = torch.autograd.grad(expected_loss.sum(), leaves)

    loss, gradients = loss_and_gradient(siren, layers if own_layers else siren.base(), coords, values)
    assert_equal("loss", loss, expected_loss, 1e-12)
    for i, (ours, theirs) in enumerate(zip([t for pair in gradients for t in pair], expected, strict=True)):
        assert_equal(f"gradient {i}", ours, theirs, 1e-12)


def test_loss_and_gradient_against_finite_differences() -> None:
    siren = tiny(channels=1)
    coords, values = torch.rand(6, 2, dtype=torch.float64), torch.rand(B, 6, 1, dtype=torch.float64)
    base = siren.flatten([(w.detach(), b.detach()) for w, b in batched(siren.base())])
    _, gradients = loss_and_gradient(siren, siren.unflatten(base), coords, values)
    ours, h = siren.flatten(gradients), 1e-6
    with torch.no_grad():
        for place in range(base.shape[1]):
            nudge = torch.zeros_like(base)
            nudge[:, place] = h
            up, _ = loss_and_gradient(siren, siren.unflatten(base + nudge), coords, values)
            down, _ = loss_and_gradient(siren, siren.unflatten(base - nudge), coords, values)
            # The central difference errs by h^2 f'''/6 (about 1e-11) and by rounding 1e-16 / h.
            torch.testing.assert_close((up - down) / (2 * h), ours[:, place], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("form", ["grid", "subset"])
def test_gradcheck_of_the_fit(shared: bool, form: str) -> None:
    """Outer gradients of offsets, prediction and losses, with respect to every parameter of the SIREN and the rates."""
    siren = Siren(SirenConfig(hidden=4, hidden_layers=1, omega=2.0), coordinate_dims=2, channels=1).double()
    alpha = MetaSGD(InnerLoopConfig(steps=2, shared_alpha=shared), siren.adapted_size).double()
    coords, values = torch.rand(5, 2, dtype=torch.float64), torch.rand(B, 5, 1, dtype=torch.float64)
    index = None if form == "grid" else torch.randint(5, (B, 3, 3))
    seen = Observations(coords=coords, values=values, index=index)
    names = [f"siren.{n}" for n, _ in siren.named_parameters()] + [f"alpha.{n}" for n, _ in alpha.named_parameters()]
    module = torch.nn.ModuleDict({"siren": siren, "alpha": alpha})

    class Run(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.siren, self.alpha = module["siren"], module["alpha"]

        def forward(self) -> tuple[Tensor, Tensor, Tensor]:
            fitted = fit(self.siren, self.alpha, seen, steps=2)
            return fitted.offsets, fitted.prediction, fitted.losses

    run = Run()
    leaves = tuple(run.get_parameter(name).detach().clone().requires_grad_() for name in names)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        return torch.func.functional_call(run, dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(function, leaves)


def test_the_shared_first_step_equals_an_explicitly_batched_one() -> None:
    siren = tiny(width=8)
    coords, values = torch.rand(9, 2, dtype=torch.float64), torch.rand(B, 9, 3, dtype=torch.float64)
    loss, gradients = loss_and_gradient(siren, siren.base(), coords, values)
    own = coords.expand(B, 9, 2)
    loss_batched, gradients_batched = loss_and_gradient(siren, batched(siren.base()), own, values)
    assert_equal("loss", loss, loss_batched, 1e-13)
    for (w, b), (w_batched, b_batched) in zip(gradients, gradients_batched, strict=True):
        assert_equal("weight", w, w_batched, 1e-12)
        assert_equal("bias", b, b_batched, 1e-12)


def test_a_signal_s_fit_does_not_depend_on_its_company() -> None:
    """The inner gradient is of the sum over the batch, not of its mean."""
    siren = tiny(width=8)
    alpha = MetaSGD(InnerLoopConfig(steps=3), siren.adapted_size).double()
    coords, values = torch.rand(9, 2, dtype=torch.float64), torch.rand(5, 9, 3, dtype=torch.float64)
    together = fit(siren, alpha, Observations(coords=coords, values=values), steps=3)
    alone = fit(siren, alpha, Observations(coords=coords, values=values[3:4]), steps=3)
    assert_equal("offsets", together.offsets[3:4], alone.offsets, 1e-12)


@pytest.mark.parametrize("form", ["grid", "subset", "points"])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_fitting_in_parts_changes_nothing(form: str, checkpoint: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and outer gradients of five signals fitted two or one at a time, and together."""
    siren = tiny(width=8)
    alpha = MetaSGD(InnerLoopConfig(steps=3), siren.adapted_size).double()
    coords = torch.rand(*(5, 4, 9, 2) if form == "points" else (9, 2), dtype=torch.float64)
    values = torch.rand(*(5, 4, 9, 3) if form == "points" else (5, 9, 3), dtype=torch.float64)
    index = torch.rand(5, 4, 9).topk(6).indices if form == "subset" else None
    options = InnerLoopConfig(steps=3, checkpoint=checkpoint)
    results = []
    for size, parts in ((2**40, [5]), (2 * 8 * 8 * (6 if form == "subset" else 9), [1, 2, 2]), (1, [1] * 5)):
        monkeypatch.setattr(analytic, "PART_BYTES", size)
        seen = Observations(coords=coords, values=values, index=index)
        assert analytic._sizes(siren, seen) == parts
        fitted = fit(siren, alpha, seen, steps=3, options=options)
        loss = fitted.offsets.square().sum() + fitted.losses.sum() + fitted.prediction.square().sum()
        gradients = torch.autograd.grad(loss, [*siren.parameters(), *alpha])
        results.append([fitted.offsets, fitted.prediction, fitted.losses, *gradients])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def with_rates(shared: bool) -> Callable[[int], Tensor]:
    siren = tiny()
    alpha = MetaSGD(InnerLoopConfig(steps=2, shared_alpha=shared), siren.adapted_size).double()
    seen = Observations(coords=torch.rand(4, 2, dtype=torch.float64), values=torch.rand(B, 4, 3, dtype=torch.float64))
    return lambda steps: fit(siren, alpha, seen, steps=steps).losses


def test_more_steps_than_learned_rates() -> None:
    with pytest.raises(ValueError, match="3 inner steps asked for, but rates were learned for 2"):
        with_rates(shared=False)(3)
    assert with_rates(shared=True)(5).shape == (B, 6)


def test_fewer_steps_are_the_beginning_of_more() -> None:
    run = with_rates(shared=False)
    assert torch.equal(run(1)[:, :1], run(2)[:, :1])


@pytest.mark.parametrize("residual", [1.0, 0.01])
def test_half_precision_keeps_the_inner_gradient_of_many_points(residual: float) -> None:
    """float16 ends at 6e-8. The gradient of a mean over 100,000 points is made of terms divided by 300,000, which
    vanish in it; that of the sum, divided at the end in float32, does not. Autocast on the CPU rounds as on a GPU.

    float16 has 11 bits; the errors of the summands are random, so 1 % of the whole gradient is generous, and no more
    entries may be exactly 0 than in float32.
    """
    siren = Siren(SirenConfig(hidden=64, hidden_layers=1, omega=30.0), coordinate_dims=2, channels=3)
    coords = grid(320, 320)
    with torch.no_grad():
        prediction = siren.render(siren.base(), coords)
        y, x = coords.unbind(-1)
        values = (prediction + residual * torch.stack([(3 * y + x).sin(), (2 * x).cos(), (4 * y).sin()], -1))[None]
        _, expected = loss_and_gradient(siren, siren.base(), coords, values)
        with torch.autocast("cpu", dtype=torch.float16):
            _, half = loss_and_gradient(siren, siren.base(), coords, values)
    for (weight, bias), (weight_half, bias_half) in zip(expected, half, strict=True):
        for full, rounded in ((weight, weight_half), (bias, bias_half)):
            assert (rounded.float() - full).norm() < 0.01 * full.norm()
            assert (rounded == 0).sum() <= (full == 0).sum()
