"""The written-out gradient of a SIREN and its derivative: right in every form, in half precision, and compiled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mwt.config import SirenConfig
from mwt.observe import grid
from mwt.siren import LayerTensors, Siren
from tests.fork_server import Server
from tests.inner_gradient import loss_and_gradient


def make(hidden: int = 5, layers: int = 2, dims: int = 2, channels: int = 2, omega: float = 3.0) -> Siren:
    siren = Siren(
        SirenConfig(hidden=hidden, hidden_layers=layers, omega=omega), coordinate_dims=dims, channels=channels
    )
    for parameter in siren.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return siren


FORMS = [(False, False), (False, True), (True, False), (True, True)]
"""Coordinates of each signal, weights of each signal; without either it is the shared first step."""


@pytest.mark.parametrize(("own_coords", "own_layers"), FORMS)
@pytest.mark.parametrize("batch", [1, 3])  # below the number of channels the shared sweep is left out
def test_the_derivative_against_finite_differences(own_coords: bool, own_layers: bool, batch: int) -> None:
    siren = make().double()
    coords = torch.rand(*([batch] if own_coords else []), 7, 2, dtype=torch.float64) * 2 - 1
    values = torch.rand(batch, 7, 2, dtype=torch.float64)
    tensors = [t.detach() for layer in siren.base() for t in layer]
    if own_layers:
        tensors = [t + 0.1 * torch.randn(batch, *t.shape, dtype=torch.float64) for t in tensors]
    tensors = [t.clone().requires_grad_() for t in tensors]

    def results(*tensors: Tensor) -> tuple[Tensor, ...]:
        layers: LayerTensors = list(zip(tensors[::2], tensors[1::2], strict=False))[:3]
        loss, gradients = loss_and_gradient(siren, layers, coords, values)
        return loss, *[t for pair in gradients for t in pair]

    shared = [siren.head.weight, siren.head.bias, siren.out_scale]  # perturbed in place by gradcheck
    assert torch.autograd.gradcheck(results, (*tensors, *shared))


def outer_gradients(siren: Siren, coords: Tensor, values: Tensor, keep: bool = True) -> list[Tensor]:
    """Gradients of a loss that looks at errors and gradients alike, larger where the mean made them smaller."""
    for parameter in siren.parameters():
        parameter.grad = None
    loss, gradients = loss_and_gradient(siren, siren.base(), coords, values, keep=keep)
    size = sum((g.square().sum() for pair in gradients for g in pair), loss.sum())
    size.backward()
    return [parameter.grad for parameter in siren.parameters() if parameter.grad is not None]


def test_the_shared_sweep_equals_that_of_each_signal() -> None:
    siren = make().double()
    coords = torch.rand(9, 2, dtype=torch.float64)
    values = torch.rand(4, 9, 2, dtype=torch.float64)
    together = outer_gradients(siren, coords, values)
    apart = outer_gradients(siren, coords.expand(4, -1, -1), values)
    assert len(together) == len(list(siren.parameters()))
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("own_coords", [False, True])
def test_recomputed_states_give_the_very_same_gradients(own_coords: bool) -> None:
    siren = make()
    coords = torch.rand(9, 2).expand(4, -1, -1) if own_coords else torch.rand(9, 2)
    values = torch.rand(4, 9, 2)
    for a, b in zip(*(outer_gradients(siren, coords, values, keep) for keep in (True, False)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("own_coords", [False, True])
def test_outer_gradients_in_half_precision(dtype: torch.dtype, own_coords: bool) -> None:
    """Neither rounds away what matters nor underflows, also with the 25,600 points of a quarter of 320 x 320 pixels."""
    torch.manual_seed(0)
    siren = Siren(SirenConfig(hidden=64, hidden_layers=2, omega=30.0), coordinate_dims=2, channels=3)
    coords = grid(160, 160)
    y, x = coords.unbind(-1)
    values = torch.stack([torch.stack([(k * y + x).sin(), (2 * x).cos(), (k * y).sin()], -1) for k in (1, 2, 3, 4)])
    if own_coords:
        coords = coords.expand(4, -1, -1)
    exact = outer_gradients(siren, coords, values)
    with torch.autocast("cpu", dtype=dtype):
        rounded = outer_gradients(siren, coords, values)
    for a, b in zip(exact, rounded, strict=True):
        assert (a - b).norm() < (0.03 if dtype == torch.bfloat16 else 0.005) * a.norm()


def test_a_third_derivative_is_refused() -> None:
    siren = make()
    _, gradients = loss_and_gradient(siren, siren.base(), torch.rand(9, 2), torch.rand(4, 9, 2))
    (second,) = torch.autograd.grad(gradients[0][0].square().sum(), siren.out_scale, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        second.sum().backward()


# ---- compiled ----------------------------------------------------------------------------------------------------

COMPILED = """
import torch
from torch._dynamo.utils import counters
from mwt.config import InnerLoopConfig, LossConfig, ModelConfig, ReaderConfig, SirenConfig
from mwt.engines.sweeps import sincos
from mwt.losses import outer_losses
from mwt.model import MetaWeightTransformer
from mwt.observe import grid
from mwt.structs import Observations, SignalFacts

# The polynomials of half precision: their own error is far below the rounding to fp16, also for large angles.
z = torch.cat([torch.linspace(-k, k, 4001) for k in (0.1, 4.0, 50.0, 1000.0)])
for ours, exact in zip(torch.compile(sincos)(z, torch.float16), (z.double().sin(), z.double().cos())):
    assert ours.dtype == torch.float16
    error, rounding = (ours.double() - exact).abs(), 2.0**-11 * exact.abs().clamp_min(2.0**-13)
    assert (error <= rounding + 2e-6).all(), (error - rounding).max()

torch.manual_seed(0)
facts = SignalFacts(kind="image", channels=1, height=8, width=8, classes=("a", "b"))
model = MetaWeightTransformer(ModelConfig(
    siren=SirenConfig(hidden=64, hidden_layers=1), inner_loop=InnerLoopConfig(steps=3), reader=ReaderConfig(blocks=2),
    loss=LossConfig(), signal=facts,
))

def gradients(subsets):
    torch.manual_seed(1)
    index = torch.rand(2, 4, 64).topk(32).indices if subsets else None
    model.zero_grad()
    seen = Observations(coords=grid(8, 8), values=torch.rand(2, 64, 1), index=index)
    outer_losses(model(seen), torch.tensor([0, 1])).total.backward()
    return [p.grad.clone() for p in model.parameters()]

plain = [gradients(subsets) for subsets in (False, True)]
model.compile_parts()
counters.clear()
for expected, subsets in zip(plain, (False, True)):
    for a, b in zip(expected, gradients(subsets), strict=True):
        assert (a - b).norm() <= 1e-4 * a.norm()
graphs = counters["stats"]["unique_graphs"]
for subsets in (False, True):
    gradients(subsets)
assert counters["stats"]["unique_graphs"] == graphs, "compiled again in a later step"
model.eval()
with torch.no_grad():  # evaluation, whose last batch is smaller, does not compile
    for count in (2, 1):
        model(Observations(coords=grid(8, 8), values=torch.rand(count, 64, 1)))
assert counters["stats"]["unique_graphs"] == graphs
print("graphs", graphs)
"""


@pytest.mark.slow
def test_compiled_training_equals_plain_and_compiles_once(server: Server) -> None:
    """In a process of its own: the shape-checking hook and torch.compile do not go together."""
    said = server.run(program="", code=COMPILED)
    # On the grid the first step and the others, on subsets the first and the others, and the rendering of each, all of
    # these forward and backward; one block of the reader for all.
    assert int(said.split()[-1]) == 13
