"""Many independent SIRENs fitted at once, each as if it were alone: the protocol of the weight-space literature.

All networks have one layout and see the same coordinates; each has its own weights, values, optimizer state and number
of steps. Their weights lie as rows of one tensor [G, W], so that a step of all is a handful of batched products. The
gradient of the mean squared error is written out: for one network, in columns of points,

    z_0 = omega_0 (W_0 x + b_0),  z_i = omega_i (W_i s_(i-1) + b_i),  s_i = sin z_i,  c_i = cos z_i
    r = W_L s_(L-1) + b_L - values,   q_L = 2 r / (C P),   q_i = omega_i c_i (W_(i+1)^T q_(i+1))
    gradients: W_i: q_i s_(i-1)^T,  b_i: sum q_i

G networks, the slots, are in work at a time, so few that what a step touches stays in the cache. A slot whose network
is done takes the next one that waits: no network waits for the slowest of its group.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mwt.errors import InputError
from mwt.fit_set_config import FitConfig
from mwt.muon import ADJUST, newton_schulz
from mwt.muon_groups import RELATIVE_LR
from mwt.observe import random_subsets
from mwt.rng import uniform
from mwt.weight_space import Layout, Weights, render


@dataclass(frozen=True, kw_only=True)
class Fits:
    """N fitted networks. Made by `fit_many`."""

    weights: Weights
    """[N, out, in] and [N, out]"""
    steps: Int[Tensor, " N"]
    """How many each took; fewer than configured where it reached the target."""
    error: Float[Tensor, " N"]
    """Mean squared error over all points, in the scale of the values."""


class State(NamedTuple):
    """G networks in work and their optimizers, a row each; changed in place by every step."""

    flat: Float[Tensor, "G W"]
    """The weights, as `Weights.flat` has them."""
    first: Float[Tensor, "G W"]
    """First moments; Muon's momentum for its matrices."""
    second: Float[Tensor, "G W"]
    """Second moments; unused for Muon's matrices."""
    taken: Float[Tensor, " G"]
    """Steps taken so far; float64, for the powers of the moments' decay."""


# ---- one step ----------------------------------------------------------------------------------------------------


def sincos(z: Tensor) -> tuple[Tensor, Tensor]:
    """(sin z, cos z); compiled for the CPU in fp32 by polynomials, to 2e-7 for |z| below a thousand.

    The rounding of arguments near 30 changes them by ten times as much. The library's two functions, which know nothing
    of each other, take most of a step.
    """
    if z.dtype != torch.float32 or z.device.type != "cpu" or not torch.compiler.is_compiling():
        return z.sin(), z.cos()
    turns = torch.round(z * (1 / math.pi))
    # The first part of pi has eight bits: its product with `turns`, and the difference, are exact.
    x = (z - turns * 3.140625) - turns * (math.pi - 3.140625)
    half = 0.5 * turns
    sign = 1 - 4 * (half - torch.floor(half))
    square = x * x
    return sign * (x + x * square * _polynomial(square, _SIN)), sign * (1 + square * _polynomial(square, _COS))


# (sin(x) / x - 1) / x^2 and (cos(x) - 1) / x^2 as polynomials in x^2 on [-pi/2, pi/2]: Taylor's, to 7e-10 and 5e-10.
_SIN = tuple((-1) ** (k + 1) / math.factorial(2 * k + 3) for k in range(6))
_COS = tuple((-1) ** (k + 1) / math.factorial(2 * k + 2) for k in range(7))


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    result = x * coefficients[-1] + coefficients[-2]
    for coefficient in coefficients[-3::-1]:
        result = result * x + coefficient
    return result


def _columns(coords: Float[Tensor, "*G D P"]) -> list[Float[Tensor, "*G 1 P"]]:
    return [coords[..., d, None, :] for d in range(coords.shape[-2])]


def gradient(
    layout: Layout,
    net: Weights,
    coords: Float[Tensor, "D P"] | Float[Tensor, "G D P"],
    values: Float[Tensor, "G C P"],
) -> tuple[Float[Tensor, " G"], Weights]:
    """Mean squared error of each network at its points, and its derivatives by the weights."""
    columns, last = _columns(coords), len(layout.omegas)
    sin: list[Tensor] = []
    cos: list[Tensor] = []
    for i, omega in enumerate(layout.omegas):
        if i:
            z = net.weights[i] @ sin[-1]
        else:  # two or three columns: as a sum it fuses with what follows
            z = sum((net.weights[0][..., d, None] * x for d, x in enumerate(columns[1:], 1)),
                    net.weights[0][..., 0, None] * columns[0])  # fmt: skip
        s, c = sincos(omega * (z + net.biases[i][..., None]))
        sin.append(s)
        cos.append(c)
    residual = net.weights[last] @ sin[-1] + net.biases[last][..., None] - values
    error = residual.square().mean((-2, -1))
    q = residual * (2 / values[0].numel())
    weights, biases = [q @ sin[-1].mT], [q.sum(-1)]
    for i in range(last - 1, -1, -1):
        upper = net.weights[i + 1]
        if upper.shape[-2] <= 4:  # few channels: again a sum
            u = sum((upper[:, c, :, None] * q[:, c, None] for c in range(1, upper.shape[-2])),
                    upper[:, 0, :, None] * q[:, 0, None])  # fmt: skip
        else:
            u = upper.mT @ q
        q = layout.omegas[i] * (u * cos[i])
        weights.append(q @ sin[i - 1].mT if i else torch.stack([(q * x).sum(-1) for x in columns], dim=-1))
        biases.append(q.sum(-1))
    return error, Weights(tuple(weights[::-1]), tuple(biases[::-1]))


def step(
    layout: Layout,
    config: FitConfig,
    state: State,
    coords: Tensor,
    values: Tensor,
    target: float,
    full_error: Tensor | None = None,
) -> Bool[Tensor, " G"]:
    """One step of every network, in place; returns which did not move, having reached the target before it.

    Args:
        target: error at or below which a network stops; looked at before every `check_every`-th step.
        full_error: [G], what is compared to it; None: the error at the points of this step.
    """
    error, gradients = gradient(layout, Weights.unflatten(state.flat, layout), coords, values)
    done = ((error if full_error is None else full_error) <= target) & (state.taken % config.check_every == 0)
    update = _update(layout, config, state, gradients)
    state.flat.sub_(torch.where(done[:, None], 0.0, update))
    state.taken.add_(1.0)
    return done


def _update(layout: Layout, config: FitConfig, state: State, gradients: Weights) -> Float[Tensor, "G W"]:
    """What is taken off the weights; moves the moments. Adam (Kingma and Ba 2015) as `torch.optim.Adam` computes it.

    With Muon, its own update of the matrices between hidden layers (Jordan et al. 2024) takes the place of Adam's.
    """
    (b1, b2), grad, kind = config.betas, gradients.flat(), state.flat.dtype
    rate = torch.ones_like(state.taken)
    if config.schedule == "cosine":
        rate = 0.5 + 0.5 * torch.cos(state.taken * (math.pi / config.steps))
    rows = state.taken[:, None] + 1
    # Muon's momentum has the form of a first moment: where the decays differ, each entry has its own.
    weight = 1 - b1 if config.optimizer == "adam" else 1 - _decays(layout, config, grad)
    state.first.lerp_(grad, weight)
    state.second.mul_(b2).addcmul_(grad, grad, value=1 - b2)
    size, root = config.lr * rate[:, None] / (1 - b1**rows), (1 - b2**rows).sqrt()
    update = size.to(kind) * state.first / (state.second.sqrt() / root.to(kind) + config.eps)
    if config.optimizer == "adam":
        return update
    own, momenta = Weights.unflatten(update, layout), Weights.unflatten(state.first, layout)
    matrices = list(own.weights)
    for i in range(1, len(matrices) - 1):
        mixed = gradients.weights[i].lerp(momenta.weights[i], config.momentum)  # Nesterov
        scale = (config.muon_lr or muon_lr(layout, i)) * ADJUST["original"](*mixed.shape[-2:])
        matrices[i] = (scale * rate[:, None, None]).to(kind) * newton_schulz(mixed)
    return Weights(tuple(matrices), own.biases).flat()


def muon_lr(layout: Layout, i: int) -> float:
    """Muon's rate for matrix i: RELATIVE_LR times its expected spectral norm at the start, 2.8 / omega where square.

    A matrix [m, n] of independent entries has the norm sd (sqrt m + sqrt n) for large m and n; here sd is that of
    U(+-sqrt(6 / n) / omega). `mwt.muon_groups.default_lr` measures it instead, but no network may depend on the others.
    """
    outputs, inputs = layout.shapes[i]
    return RELATIVE_LR * (2 / inputs) ** 0.5 * (outputs**0.5 + inputs**0.5) / layout.omegas[i]


def _decays(layout: Layout, config: FitConfig, like: Tensor) -> Float[Tensor, " W"]:
    """Decay of the first moment of each entry of a row."""
    parts = []
    for i, (outputs, inputs) in enumerate(layout.shapes):
        hidden = 0 < i < len(layout.shapes) - 1
        parts.append(like.new_full((outputs * inputs,), config.momentum if hidden else config.betas[0]))
        parts.append(like.new_full((outputs,), config.betas[0]))
    return torch.cat(parts)


@cache
def compiled_step() -> Callable[..., Tensor]:
    """`step` through torch.compile; once for the whole process."""
    return torch.compile(step, dynamic=False, fullgraph=True)


# ---- all of them -------------------------------------------------------------------------------------------------


def initial_weights(
    layout: Layout, positions: Int[Tensor, " N"], *, seed: int, copy: int = 0, scheme: str = "sitzmann"
) -> Float[Tensor, "N W"]:
    """Where fits begin, as flat rows: a function of seed, position and copy alone.

    Args:
        positions: of the networks in their set; the same position for all gives a shared initialisation.
        scheme: sitzmann: weights of the first layer U(+-1/in), of the others U(+-sqrt(6/in)/omega), biases
            U(+-1/sqrt(in)) as in `nn.Linear` (Sitzmann et al. 2020, nfn). dws: all weights U(+-sqrt(6/in)/omega),
            biases 0 (Navon et al. 2023).
    """
    flat = uniform(positions, layout.count, seed=seed, purpose="initialisation", epoch=copy) * 2 - 1
    net, omegas = Weights.unflatten(flat, layout), (*layout.omegas, layout.omegas[-1])
    bounds = [(6 / inputs) ** 0.5 / omega for (_, inputs), omega in zip(layout.shapes, omegas, strict=True)]
    if scheme == "sitzmann":
        bounds[0] = 1 / layout.coordinate_dims
    around = [inputs**-0.5 if scheme == "sitzmann" else 0.0 for _, inputs in layout.shapes]
    return Weights(
        tuple(w * bound for w, bound in zip(net.weights, bounds, strict=True)),
        tuple(b * bound for b, bound in zip(net.biases, around, strict=True)),
    ).flat()


def slots_for(points: int, device: torch.device) -> int:
    """How many networks to have in work: on a CPU, some megabytes of activations; a GPU wants to be filled."""
    return 4096 if device.type == "cuda" else max(8, min(64, 8192 // points))


def fit_many(
    layout: Layout,
    start: Float[Tensor, "N W"],
    coords: Float[Tensor, "P D"],
    values: Float[Tensor, "N P C"],
    config: FitConfig,
    *,
    keys: Int[Tensor, " N"] | None = None,
    seed: int = 0,
    peak: float = 2.0,
    slots: int | None = None,
    compiled: bool = False,
    on_done: Callable[[int], None] | None = None,
) -> Fits:
    """Fits N networks to N signals; what becomes of one does not depend on the others.

    Args:
        start: weights that they begin with.
        keys: number of each network, which with `seed` says what random points it sees; by default 0 to N - 1.
        peak: length of the range of the values, which decibels are measured by.
        slots: how many to have in work at a time; see the module's text and `slots_for`.
        compiled: whether steps go through torch.compile; worth its time from some seconds of work.
        on_done: told how many networks have been finished since it was last called.

    Raises:
        InputError: more random points asked for than there are.
    """
    if config.points is not None and config.points > len(coords):
        raise InputError(f"fit.points is {config.points}, but these signals have {len(coords)} points; null means all.")
    count = len(start)
    work = _Work(layout, start, coords, values, config, torch.arange(count) if keys is None else keys, seed)
    slots = slots or slots_for(config.points or len(coords), start.device)
    # Compiled, it is for one number of slots: better some stay empty than that it is compiled again.
    work.begin(slots if compiled else min(slots, count))
    act = compiled_step() if compiled else step
    target = peak**2 * 10 ** (-config.target_psnr / 10) if config.target_psnr is not None else -1.0
    while work.slots:
        points, seen, full_error = work.observe(target)
        done = act(layout, config, work.state, points, seen, target, full_error)
        finished = work.finished(done)
        if finished:
            work.replace(finished)
            if on_done is not None:
                on_done(len(finished))
    weights = Weights.unflatten(work.results, layout)
    return Fits(weights=weights, steps=work.steps, error=squared_errors(layout, weights, coords, values))


def squared_errors(layout: Layout, weights: Weights, coords: Tensor, values: Tensor) -> Float[Tensor, " N"]:
    """Mean squared error of each network over all points."""
    parts = [
        (render(layout, weights.map(lambda w, at=at: w[at : at + 64]), coords) - values[at : at + 64])  # type: ignore[misc]
        for at in range(0, len(values), 64)
    ]
    return torch.cat([part.square().mean((-2, -1)) for part in parts])


class _Work:
    """The networks of one call: waiting, in a slot, or done."""

    def __init__(
        self, layout: Layout, start: Tensor, coords: Tensor, values: Tensor, config: FitConfig, keys: Tensor, seed: int
    ) -> None:
        self.layout, self.start, self.config, self.keys, self.seed = layout, start, config, keys, seed
        self.coords, self.values = coords.mT.contiguous(), values.mT.contiguous()
        self.results, self.steps = start.clone(), torch.zeros(len(start), dtype=torch.int64)
        self.next = 0
        self.slots: dict[int, int] = {}
        """Slot -> network, of those in work."""
        self.age: list[int] = []
        """Steps of each slot's network so far, as `State.taken` has it on the device."""

    def begin(self, slots: int) -> None:
        """Fill the slots."""
        first = torch.arange(slots, device=self.start.device) % len(self.start)
        flat, self.seen = self.start[first], self.values[first]
        zeros = torch.zeros_like(flat)
        self.state = State(flat, zeros, zeros.clone(), zeros.new_zeros(slots, dtype=torch.float64))
        self.next = min(slots, len(self.start))
        self.slots, self.age = {i: i for i in range(self.next)}, [0] * slots

    def observe(self, target: float) -> tuple[Tensor, Tensor, Tensor | None]:
        """Coordinates and values of this step; with random points, the error over all where it is looked at."""
        points = self.config.points
        if points is None:
            return self.coords, self.seen, None
        steps = torch.tensor(self.age) % self.config.steps
        owners = torch.tensor([self.slots.get(slot, 0) for slot in range(len(self.age))])
        index = random_subsets(
            (self.keys[owners] * self.config.steps + steps).to(self.seen.device), draws=1, points=points,
            count=self.seen.shape[-1], seed=self.seed, purpose="points of a fit", epoch=0,
        )  # fmt: skip
        full = torch.full_like(self.state.taken, math.inf)
        if target >= 0 and self._looks():
            net = Weights.unflatten(self.state.flat, self.layout)
            full = squared_errors(self.layout, net, self.coords.mT, self.seen.mT)
        coords = self.coords[:, index[:, 0]].transpose(0, 1)
        return coords, self.seen.gather(-1, index.expand(-1, self.seen.shape[1], -1)), full

    def _looks(self) -> bool:
        """Whether some network is compared to the target at this step."""
        return any(self.age[slot] % self.config.check_every == 0 for slot in self.slots)

    def finished(self, done: Tensor) -> list[int]:
        """After a step: the slots whose networks are done."""
        reached = done.tolist() if self.config.target_psnr is not None and self._looks() else [False] * len(done)
        finished = []
        for slot, network in self.slots.items():
            if not reached[slot]:
                self.age[slot] += 1
            if reached[slot] or self.age[slot] == self.config.steps:
                self.steps[network] = self.age[slot]
                finished.append(slot)
        return finished

    def replace(self, finished: list[int]) -> None:
        """Put away what is done, and go on with what waits."""
        device = self.start.device
        rows, networks = (torch.tensor(part, device=device) for part in (finished, [self.slots[s] for s in finished]))
        self.results[networks] = self.state.flat[rows]
        for slot in finished:
            del self.slots[slot]
        taken = min(len(finished), len(self.start) - self.next)
        rows = rows[:taken]
        new = torch.arange(self.next, self.next + taken, device=device)
        self.state.flat[rows], self.seen[rows] = self.start[new], self.values[new]
        self.state.first[rows], self.state.second[rows], self.state.taken[rows] = 0.0, 0.0, 0.0
        for slot in finished[:taken]:
            self.slots[slot], self.age[slot] = self.next, 0
            self.next += 1
