"""Muon: torch.optim.Muon and a plain loop as references, singular values by NumPy, torch's AdamW for the rest."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mwt.errors import InputError
from mwt.muon import Muon, newton_schulz
from mwt.muon_groups import cosine_to_zero, split_parameters
from mwt.rank import stable_rank

SHAPES = [(64, 64), (128, 32), (32, 128), (256, 256)]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(0.05 * torch.randn(shape, dtype=dtype))


def muon(*parameters: Any, lr: float = 0.02, **options: Any) -> Muon:
    return Muon([{"params": list(parameters), "use_muon": True, "lr": lr, **options}])


def take_steps(optimizer: torch.optim.Optimizer, gradients: list[list[Tensor]]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step in gradients:
        for p, gradient in zip(parameters, step, strict=True):
            p.grad = gradient.clone()
        optimizer.step()


def plain_loop(weight: Tensor, gradients: list[Tensor], *, lr: float, decay: float, nesterov: bool) -> Tensor:
    """Facts of Jordan's reference, one matrix [out, in] at a time, nothing shared with the module."""
    rows, columns = weight.shape
    momentum = torch.zeros_like(weight)
    for gradient in gradients:
        momentum = 0.95 * momentum + 0.05 * gradient
        x = 0.95 * momentum + 0.05 * gradient if nesterov else momentum
        x = x / max(float((x**2).sum()) ** 0.5, 1e-7)
        for _ in range(5):
            x = 3.4445 * x - 4.7750 * (x @ x.T @ x) + 2.0315 * (x @ x.T @ x @ x.T @ x)
        weight = (1 - lr * decay) * weight - lr * max(1.0, rows / columns) ** 0.5 * x
    return weight


# ---- the step ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_torch(shape: tuple[int, int], adjust: str) -> None:
    """torch rounds to bfloat16 within; measured 1.2 to 1.8 % after one step and 0.3 to 0.5 % after 50."""
    ours, theirs = parameter(*shape), parameter(*shape)
    theirs.data.copy_(ours.data)
    start = ours.detach().clone()
    one = muon(ours, adjust=adjust)
    two = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.0, adjust_lr_fn=adjust)
    gradients = [[torch.randn(shape)] for _ in range(50)]
    for first, last, bound in ((0, 1, 0.05), (1, 50, 0.015)):
        take_steps(one, gradients[first:last])
        take_steps(two, gradients[first:last])
        assert (ours - theirs).norm() < bound * (theirs - start).norm()


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(64, 64), (48, 20), (20, 48)])
def test_against_a_plain_loop(shape: tuple[int, int], nesterov: bool) -> None:
    weight = parameter(*shape, dtype=torch.float64)
    gradients = [torch.randn(shape, dtype=torch.float64) for _ in range(10)]
    expected = plain_loop(weight.detach(), gradients, lr=0.02, decay=0.1, nesterov=nesterov)
    take_steps(muon(weight, weight_decay=0.1, nesterov=nesterov), [[g] for g in gradients])
    torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-13)


def test_in_single_precision_against_the_plain_loop() -> None:
    weight = parameter(64, 32)
    gradients = [torch.randn(64, 32) for _ in range(5)]
    expected = plain_loop(weight.detach(), gradients, lr=0.02, decay=0.0, nesterov=True)
    take_steps(muon(weight), [[g] for g in gradients])
    torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=2e-7)


@pytest.mark.parametrize("ns_dtype", ["fp32", "bf16"])
def test_a_stack_is_its_matrices_one_by_one(ns_dtype: str) -> None:
    """Three forms: one parameter of several axes, several parameters that are stacked inside, and each by itself."""
    gradients = [[torch.randn(2, 3, 24, 40)] for _ in range(5)]
    stack = parameter(2, 3, 24, 40)
    many = [nn.Parameter(matrix.clone()) for matrix in stack.detach().flatten(0, 1)]
    singles = [nn.Parameter(matrix.clone()) for matrix in stack.detach().flatten(0, 1)]
    take_steps(muon(stack, layout="out_in", ns_dtype=ns_dtype), gradients)
    take_steps(muon(*many, ns_dtype=ns_dtype), [list(g.flatten(0, 1)) for [g] in gradients])
    for index, single in enumerate(singles):
        take_steps(muon(single, ns_dtype=ns_dtype), [[g.flatten(0, 1)[index]] for [g] in gradients])
    for form in (many, singles):
        torch.testing.assert_close(stack.detach().flatten(0, 1), torch.stack(form).detach(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw", "spectral"])
def test_transposed_storage_is_the_same_network(adjust: str) -> None:
    """[in, out] beside [out, in]: the scale follows fan_out and fan_in, not the order of the axes."""
    stored = parameter(3, 20, 50)
    turned = nn.Parameter(stored.detach().mT.clone())
    gradients = [[torch.randn(3, 20, 50)] for _ in range(3)]
    take_steps(muon(stored, layout="in_out", adjust=adjust), gradients)
    take_steps(muon(turned, layout="out_in", adjust=adjust), [[g.mT] for [g] in gradients])
    torch.testing.assert_close(stored, turned.mT, rtol=0, atol=1e-7)


def test_complex_numbers_as_pairs_are_those_numbers() -> None:
    """Complex WIRE keeps its weights [in, out, 2]; beside complex parameters [out, in] of the same values."""
    pairs = parameter(3, 20, 50, 2)
    turned = nn.Parameter(torch.view_as_complex(pairs.detach()).mT.clone())
    gradients = [[torch.randn(3, 20, 50, 2)] for _ in range(3)]
    take_steps(muon(pairs, layout="complex_in_out", weight_decay=0.1), gradients)
    take_steps(muon(turned, layout="out_in", weight_decay=0.1), [[torch.view_as_complex(g).mT] for [g] in gradients])
    torch.testing.assert_close(torch.view_as_complex(pairs), turned.mT, rtol=0, atol=1e-7)


def test_kernels_and_packed_queries_keys_values() -> None:
    kernel, flat = parameter(16, 3, 5, 5), parameter(16, 75)
    packed = parameter(3 * 24, 24)
    parts = [nn.Parameter(part.clone()) for part in packed.detach().split(24)]
    flat.data.copy_(kernel.data.flatten(1))
    g, h = torch.randn(16, 3, 5, 5), torch.randn(72, 24)
    take_steps(muon(kernel, layout="conv"), [[g]])
    take_steps(muon(flat), [[g.flatten(1)]])
    take_steps(muon(packed, layout="qkv"), [[h]])
    take_steps(muon(*parts), [list(h.split(24))])
    torch.testing.assert_close(kernel.flatten(1), flat)
    torch.testing.assert_close(packed, torch.cat(parts))  # each with the scale of its own, square, shape


@pytest.mark.parametrize("space", [(3,), (3, 2)])
def test_a_kernel_tap_by_tap(space: tuple[int, ...]) -> None:
    """Each tap, a matrix [out, in], by the plain loop; as one matrix they would move otherwise."""
    kernel, flat = (parameter(12, 5, *space, dtype=torch.float64) for _ in range(2))
    start = kernel.detach().clone()
    flat.data.copy_(start)
    gradients = [torch.randn(kernel.shape, dtype=torch.float64) for _ in range(5)]
    take_steps(muon(kernel, layout="stack", weight_decay=0.1), [[g] for g in gradients])
    take_steps(muon(flat, layout="conv", weight_decay=0.1), [[g] for g in gradients])
    for tap in np.ndindex(*space):
        place = (slice(None), slice(None), *tap)
        alone = plain_loop(start[place], [g[place] for g in gradients], lr=0.02, decay=0.1, nesterov=True)
        torch.testing.assert_close(kernel.detach()[place], alone, rtol=0, atol=1e-13)
    assert (kernel - flat).norm() > 0.1 * (kernel - start).norm()


@pytest.mark.parametrize(("adjust", "scale"), [("original", 2**0.5), ("match_rms_adamw", 1.6), ("spectral", 2**0.5)])
def test_singular_values_of_an_update(adjust: str, scale: float) -> None:
    """Of a matrix [64, 32] whose singular values lie within a factor of 10, by NumPy."""
    left, right = (torch.linalg.qr(torch.randn(n, 32)).Q for n in (64, 32))
    gradient = left @ torch.linspace(0.1, 1, 32).diag() @ right.mT
    weight = parameter(64, 32)
    before = weight.detach().clone()
    take_steps(muon(weight, lr=0.1, adjust=adjust), [[gradient]])
    values = np.linalg.svd((before - weight.detach()).numpy(), compute_uv=False) / (0.1 * scale)
    assert 0.65 < values.min() < values.max() < 1.25


def test_complex_matrices_keep_their_imaginary_part() -> None:
    """Conjugate transposes: the same as the real matrix [[A, -B], [B, A]] of twice the size, up to its norm."""
    z = torch.complex(torch.randn(24, 24), torch.randn(24, 24))
    result = newton_schulz(z, dtype=torch.bfloat16)  # not for them
    assert result.dtype == z.dtype
    values = np.linalg.svd(result.numpy(), compute_uv=False)
    assert values.max() < 1.25
    assert np.median(values) > 0.65
    left, _, right = np.linalg.svd(z.numpy())
    middle = left.conj().T @ result.numpy() @ right.conj().T  # the singular vectors stayed: this is diagonal
    np.testing.assert_allclose(middle, np.diag(np.diagonal(middle).real), atol=2e-5)
    weight = parameter(24, 24, dtype=torch.complex64)
    take_steps(muon(weight), [[z]])
    assert weight.imag.abs().max() > 1e-3


@pytest.mark.parametrize("factor", [1e3, 1e-3])
def test_the_length_of_the_gradient_does_not_matter(factor: float) -> None:
    one, two = parameter(32, 48), parameter(32, 48)
    two.data.copy_(one.data)
    start, gradients = one.detach().clone(), [[torch.randn(32, 48)] for _ in range(3)]
    take_steps(muon(one), gradients)
    take_steps(muon(two), [[factor * g] for [g] in gradients])
    torch.testing.assert_close(two - start, one - start, rtol=0, atol=1e-6)


def test_gradients_of_zero_and_none() -> None:
    still, skipped, moving = (parameter(8, 8) for _ in range(3))
    vector = parameter(8)
    optimizer = Muon([{"params": [still, skipped, moving], "use_muon": True, "lr": 0.1, "weight_decay": 0.5},
                      {"params": [vector], "use_muon": False, "weight_decay": 0.5}])  # fmt: skip
    before = [p.detach().clone() for p in (still, skipped, vector)]
    still.grad, moving.grad = torch.zeros(8, 8), torch.randn(8, 8)
    optimizer.step()
    assert torch.equal(still, before[0] * (1 - 0.1 * 0.5))  # the decay alone
    assert torch.equal(skipped, before[1])
    assert torch.equal(vector, before[2])
    assert skipped not in optimizer.state
    assert moving.isfinite().all()


def test_gradients_stay_as_they_are() -> None:
    net = small_network()
    optimizer = Muon(split_parameters(net).groups(lr=0.1))
    gradients = {name: torch.randn_like(p) for name, p in net.named_parameters()}
    for name, p in net.named_parameters():
        p.grad = gradients[name].clone()
    optimizer.step()
    for name, p in net.named_parameters():
        assert torch.equal(p.grad, gradients[name]), name


# ---- Adam beside it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adam_groups_are_torchs_bit_for_bit(decay: float, dtype: torch.dtype) -> None:
    """torch.optim.Adam where nothing decays, AdamW where something does; stacks and scalars as they come."""
    shapes = [(5,), (4, 3, 2), (), (64, 2)]
    ours, theirs = ([parameter(*shape, dtype=dtype) for shape in shapes] for _ in range(2))
    for a, b in zip(ours, theirs, strict=True):
        b.data.copy_(a.data)
    options: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.99), "weight_decay": decay}
    kind = torch.optim.AdamW if decay else torch.optim.Adam
    gradients = [[torch.randn(shape, dtype=dtype) for shape in shapes] for _ in range(20)]
    take_steps(Muon([{"params": ours, "use_muon": False, **options}]), gradients)
    take_steps(kind(theirs, **options, fused=True), gradients)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_complex_parameters_of_adam() -> None:
    ours, theirs = (nn.Parameter(torch.ones(4, dtype=torch.complex64)) for _ in range(2))
    gradients = [[torch.randn(4, dtype=torch.complex64)] for _ in range(5)]
    take_steps(Muon([{"params": [ours], "use_muon": False}]), gradients)
    take_steps(torch.optim.Adam([theirs], fused=False), gradients)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


# ---- state, schedules, loss scaling ------------------------------------------------------------------------------


def small_network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(2, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 3)
    )


def test_a_state_goes_on_where_it_was() -> None:
    net = small_network()
    optimizer = Muon(split_parameters(net).groups(lr=0.05, weight_decay=0.1))
    gradients = [[torch.randn_like(p) for group in optimizer.param_groups for p in group["params"]] for _ in range(6)]
    take_steps(optimizer, gradients[:3])
    other_net = copy.deepcopy(net)
    other = Muon(split_parameters(other_net).groups(lr=9.0))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    take_steps(optimizer, gradients[3:])
    take_steps(other, gradients[3:])
    for a, b in zip(net.parameters(), other_net.parameters(), strict=True):
        assert torch.equal(a, b)
    assert {key for state in optimizer.state.values() for key in state} == {
        "momentum_buffer", "step", "exp_avg", "exp_avg_sq",
    }  # fmt: skip


def test_a_cosine_to_zero_over_the_steps_that_are_run() -> None:
    optimizer = Muon(split_parameters(small_network()).groups(lr=0.05, lr_adam=1e-3))
    schedule = cosine_to_zero(optimizer, 40)
    rates = []
    for _ in range(40):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    share = (1 + np.cos(np.pi * np.arange(40) / 40)) / 2
    np.testing.assert_allclose(rates, np.outer(share, [0.05, 1e-3]), rtol=1e-9)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0, 0], abs=1e-12)


def test_a_scaled_loss_gives_the_same_step_and_an_infinite_one_none() -> None:
    """What torch's gradient scaler hands to optimizers that take it: the flag found_inf and the scale."""
    plain, scaled = small_network(), small_network()
    scaled.load_state_dict(plain.state_dict())
    one, two = (Muon(split_parameters(net).groups(lr=0.05)) for net in (plain, scaled))
    gradients = [[torch.randn_like(p) for group in one.param_groups for p in group["params"]] for _ in range(3)]
    take_steps(one, gradients)
    two.grad_scale, two.found_inf = torch.tensor(8.0), torch.tensor(0.0)  # type: ignore[attr-defined]
    take_steps(two, [[8 * g for g in step] for step in gradients])
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)
    before = copy.deepcopy([*scaled.parameters(), *(v for state in two.state.values() for v in state.values())])
    two.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    take_steps(two, [[torch.full_like(g, float("nan")) for g in gradients[0]]])
    after = [*scaled.parameters(), *(v for state in two.state.values() for v in state.values())]
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [((8,), {}, r"layer\.w \(8,\) is not a matrix"),
     ((4, 8, 8), {}, r"layer\.w \(4, 8, 8\) has 3 axes; say in its group"),
     ((8, 8, 3, 3), {}, r"layer\.w .* has 4 axes.*'stack', one for each tap"),
     ((8, 8), {"layout": "conv"}, r"layer\.w \(8, 8\) is no kernel"),
     ((8, 8), {"layout": "stack"}, r"layout='stack', but layer\.w \(8, 8\) is no kernel"),
     ((8, 8), {"layout": "qkv"}, r"8 rows of layer\.w"),
     ((8, 8, 3), {"layout": "complex_in_out"}, r"layer\.w \(8, 8, 3\) does not end in pairs"),
     ((8, 8), {"layout": "rows"}, r"layout is 'rows' for layer\.w; there are out_in, in_out"),
     ((8, 8), {"betas": (0.9, 0.99)}, r"betas is no key of a Muon group"),
     ((8, 8), {"use_muon": False, "momentum": 0.9, "layout": "out_in"}, r"layout, momentum is no key of an Adam"),
     ((8, 8), {"adjust": "muP"}, r"adjust is 'muP'; there are original"),
     ((8, 8), {"ns_dtype": "half"}, r"ns_dtype is 'half'")],
)  # fmt: skip
def test_refusals_name_the_parameter_or_the_key(shape: tuple[int, ...], options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Muon([{"params": [("layer.w", parameter(*shape))], "use_muon": True, "lr": 0.1, **options}])


def test_groups_must_say_what_they_are() -> None:
    with pytest.raises(InputError, match="use_muon=True or False"):
        Muon([{"params": [parameter(8, 8)]}])
    with pytest.raises(InputError, match="needs its lr"):
        Muon([{"params": [parameter(8, 8)], "use_muon": True}])


@pytest.mark.parametrize("use_muon", [True, False])
def test_sparse_gradients_are_refused(use_muon: bool) -> None:
    table = nn.Embedding(8, 4, sparse=True)
    optimizer = Muon([{"params": [("table.weight", table.weight)], "use_muon": use_muon, "lr": 0.1}])
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(InputError, match=r"gradient of table\.weight is sparse"):
        optimizer.step()


# ---- what it is for ----------------------------------------------------------------------------------------------


def test_a_relu_network_fits_an_image_two_decibels_better_than_with_adam() -> None:
    """McGinnis et al. 2026; best of two rates of Adam against one of Muon, 200 steps down a cosine each."""
    skimage = pytest.importorskip("skimage")
    from skimage.transform import resize

    image = torch.from_numpy(resize(skimage.data.astronaut(), (64, 64), anti_aliasing=True)).float().reshape(-1, 3)
    axis = torch.linspace(-1, 1, 64)
    coords = torch.cartesian_prod(axis, axis)

    def fit(make: Any) -> tuple[float, float]:
        """PSNR, and the mean stable rank of the hidden matrices, 64 / 4 at the beginning."""
        torch.manual_seed(0)
        widths = (2, 64, 64, 64, 3)
        layers = [part for i, o in pairwise(widths) for part in (nn.Linear(i, o), nn.ReLU())]
        net = nn.Sequential(*layers[:-1])
        optimizer = make(net)
        schedule = cosine_to_zero(optimizer, 200)
        for _ in range(200):
            batch = torch.randperm(64 * 64)[:1024]
            optimizer.zero_grad()
            (net(coords[batch]) - image[batch]).square().mean().backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            psnr = float(-10 * (net(coords) - image).square().mean().log10())
        return psnr, float(stable_rank(torch.stack([role.matrices for role in split_parameters(net).muon])).mean())

    adam = max(fit(lambda net, lr=lr: torch.optim.Adam(net.parameters(), lr=lr)) for lr in (3e-3, 1e-2))
    ours = fit(lambda net: Muon(split_parameters(net).groups(lr=0.1)))
    assert ours[0] > adam[0] + 2, (ours, adam)
    assert ours[1] > 1.5 * adam[1], (ours, adam)
