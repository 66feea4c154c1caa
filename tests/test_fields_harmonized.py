"""INCODE's field beside the released code's formula, written with torch's own layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from mwt.errors import InputError
from mwt.fields import FieldConfig, build_field, evaluate, load_field, save_field
from mwt.fields.config_harmonized import HarmonizedConfig
from mwt.fields.harmonized import HarmonizedSiren
from mwt.fit_config import FitOptimConfig
from mwt.fitting import SignalFit, fields_for
from mwt.signals.synthetic import SampledTask, sines

CONFIG = FieldConfig(
    name="harmonized", harmonized=HarmonizedConfig(width=16, hidden_layers=2, first_omega=12.0, latent=8)
)


def built(copies: int | None = None, config: FieldConfig = CONFIG, position: int = 0) -> HarmonizedSiren:
    field = build_field(config, coordinate_dims=2, channels=3, seed=1, copies=copies, position=position)
    assert isinstance(field, HarmonizedSiren)
    return field


def plain(own: nn.Module) -> nn.Linear:
    linear = nn.Linear(*own.weight.shape)
    with torch.no_grad():
        linear.weight.copy_(own.weight.mT)
        linear.bias.copy_(own.bias)
    return linear


def test_values_are_those_of_the_released_formula() -> None:
    field = built()
    with torch.no_grad():
        for layer in field.harmonizer:  # far from where all biases are alike
            layer.weight.add_(0.1 * torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(0)))
    harmonizer = nn.Sequential()
    for layer in field.harmonizer:
        harmonizer.extend([plain(layer), nn.SiLU()])
    a, b, c, d = harmonizer[:-1](field.latent)
    assert len({round(number.item(), 3) for number in (a, b, c, d)}) == 4
    coords = torch.rand(50, 2, generator=torch.Generator().manual_seed(1)) * 2 - 1
    x = coords
    for omega, layer in ((12.0, field.first), *((30.0, layer) for layer in field.hidden)):
        x = torch.exp(a) * torch.sin(torch.exp(b) * omega * plain(layer)(x) + c) + d
    torch.testing.assert_close(field(coords), plain(field.last)(x), rtol=1e-4, atol=1e-5)


def test_it_begins_as_released() -> None:
    """The published sizes: 64 features, layers of 64, 32 and 4, weights of 0.001, biases of 0.312."""
    field = built(config=FieldConfig(name="harmonized"))
    assert [tuple(layer.weight.shape) for layer in field.harmonizer] == [(64, 64), (64, 32), (32, 4)]
    assert all(0.0008 < layer.weight.std().item() < 0.0012 for layer in field.harmonizer)
    torch.testing.assert_close(field.coefficients(), torch.full((4,), 0.312), rtol=0, atol=0.01)
    assert field.hidden[0].weight.abs().max().item() == pytest.approx((6 / 256) ** 0.5 / 30, rel=1e-3)
    assert field.first.weight.abs().max().item() == pytest.approx(1 / 2, rel=1e-2)
    assert field.macs_per_point() == 2 * 256 + 3 * 256 * 256 + 256 * 3


def test_copies_are_single_networks() -> None:
    several, coords = built(copies=3), torch.rand(20, 2) * 2 - 1
    for i in range(3):
        alone = built(position=i)
        torch.testing.assert_close(several(coords)[i], alone(coords), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        several.harmonizer[-1].bias.copy_(-torch.arange(12.0).view_as(several.harmonizer[-1].bias))
    weights, penalties = torch.tensor([0.1993, 0.0196, 0.0588, 0.0269]), several.penalty()
    for i in range(3):
        torch.testing.assert_close(penalties[i], (torch.arange(4.0) + 4 * i) @ weights, rtol=1e-2, atol=1e-2)


def test_the_penalty_is_of_negative_numbers_and_is_learned_from() -> None:
    """One step of a fit changes biases of the harmonizer by the penalty's gradient alone, where the loss has none."""
    field = built()
    assert field.penalty().item() == 0
    with torch.no_grad():
        field.harmonizer[-1].weight.zero_()
        field.harmonizer[-1].bias.copy_(torch.tensor([-1.0, 2.0, -3.0, -4.0]))
    assert field.penalty().item() == pytest.approx(0.1993 * 1 + 0.0588 * 3 + 0.0269 * 4)
    assert built(config=FieldConfig(name="harmonized", harmonized=HarmonizedConfig(penalty=0.0))).penalty() is None
    task = SampledTask(sines(32, (1, 3), seed=0)[:, None], "sines", torch.device("cpu"))
    fields = fields_for(CONFIG, task, seed=0)
    with torch.no_grad():
        fields.harmonizer[-1].bias.fill_(-1.0)
        fields.last.weight.zero_()  # the values do not depend on a, b, c, d
    fit = SignalFit(task, fields, FitOptimConfig(steps=1), seed=0, evaluations=1)
    fit.make_step()
    expected = -torch.tensor([0.1993, 0.0196, 0.0588, 0.0269])
    torch.testing.assert_close(fields.harmonizer[-1].bias.grad, expected)


def test_it_is_fitted_and_read_again(tmp_path: Path) -> None:
    task = SampledTask(sines(64, (1, 5), seed=0)[:, None], "sines", torch.device("cpu"))
    for name in ("adam", "muon"):
        fields = fields_for(CONFIG, task, seed=0)
        before = fields.coefficients().detach().clone()
        fit = SignalFit(task, fields, FitOptimConfig(name=name, steps=150), seed=0, evaluations=3)
        fit.run(lambda: False, lambda _: None, lambda: None)
        assert fit.curve[-1]["psnr"] > 30
        assert not torch.allclose(fields.coefficients(), before)
    save_field(fields, task.frame, tmp_path)
    read, frame = load_field(tmp_path)
    assert torch.equal(read.latent, fields.latent)
    torch.testing.assert_close(evaluate(read, frame.grid()), evaluate(fields, task.coords))


def test_derivatives_are_right() -> None:
    field = built().double()
    coords = torch.rand(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(field, coords)
    assert torch.autograd.gradgradcheck(field, coords)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "harmonized.width is 0"),
        ({"omega": -1.0}, "harmonized.omega is -1.0"),
        ({"harmonizer": (4, 0)}, "harmonized.harmonizer must be widths"),
        ({"penalty": -1.0}, "harmonized.penalty is -1.0"),
    ],
)
def test_settings_that_will_not_do(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        HarmonizedConfig(**options)
