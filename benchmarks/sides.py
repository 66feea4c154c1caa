"""The two sides of the comparison: a training step in the paper's formulation, and the same step in ours.

Both start from the same parameters, see the same subsets of the same batch, clip each group, and update by AdamW in
the same groups. `benchmarks.agreement` holds them to each other before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import paper
from benchmarks.cases import Case
from mwt import runtime
from mwt.config import ModelConfig
from mwt.errors import InputError
from mwt.evaluation import autocast
from mwt.model import MetaWeightTransformer
from mwt.observe import observe
from mwt.optim import make_optimizer
from mwt.structs import Observations, Output
from mwt.training import Meter, train_step

Gradients = dict[str, Tensor]


def make_model(config: ModelConfig, device: torch.device) -> MetaWeightTransformer:
    """A fresh model, always with the same parameters."""
    torch.manual_seed(0)
    return MetaWeightTransformer(config).to(device)


def compiled(model: MetaWeightTransformer) -> MetaWeightTransformer:
    """The model with its training step compiled as `train.classify` compiles it."""
    model.compile_parts()
    return model


def published(name: str) -> str:
    """timm's names of parameters as `benchmarks.paper` calls them."""
    return name.removesuffix(".gamma")


def paper_parameters(model: MetaWeightTransformer) -> paper.Parameters:
    """A copy of a model's parameters for the paper's formulation."""
    return {published(name): value.detach().clone() for name, value in model.named_parameters()}


def paper_settings(config: ModelConfig) -> paper.Settings:
    """What the paper's formulation needs to know of a configuration beside the parameters."""
    return paper.Settings(
        omega=config.siren.omega,
        steps=config.inner_loop.steps,
        token_scale=config.reader.token_scale,
        classification_weight=config.loss.classification_weight,
        head_dim=config.reader.head_dim,
    )


def spread(observations: Observations, steps: int) -> tuple[Tensor, Tensor]:
    """Coordinates [B, S + 1, P, D] and values [B, S + 1, P, C] of every step, as the paper's formulation takes them."""
    seen = [observations.at(step) for step in range(steps + 1)]
    values = torch.stack([values for _, values in seen], dim=1)
    coords = torch.stack([c if c.ndim == 3 else c.expand(len(values), *c.shape) for c, _ in seen], dim=1)
    return coords, values


class ScaledOptimizer(torch.optim.Optimizer):
    """An optimizer whose steps go through a gradient scaler, as accelerate's do (outside of fp16 it does nothing)."""

    def __init__(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        self.optimizer, self.scaler = optimizer, scaler  # a wrapper: nothing of the base class is set up
        self.param_groups = optimizer.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The optimizer's own."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def unscale(self) -> None:
        """Take the scale out of the gradients, before they are clipped."""
        self.scaler.unscale_(self.optimizer)

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update, unless a scaled gradient has overflowed."""
        self.scaler.step(self.optimizer)
        self.scaler.update()


def make_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """Loss scaling for fp16, for others one that does nothing; a modest scale, which the first step survives."""
    return torch.amp.GradScaler(device.type, init_scale=1024.0, enabled=precision == "fp16")


class Paper:
    """A training step in the paper's formulation.

    Its coordinates and values for every inner step are made beforehand, outside of the timing, and its AdamW is the
    fused one; both favour it.
    """

    def __init__(self, case: Case, precision: str, device: torch.device) -> None:
        config, optim = case.model, case.config.optim
        if config.reader.name != "transformer":
            raise InputError(
                f"The paper's formulation has no reader {config.reader.name!r}; choose reader.name=transformer."
            )
        self._device, self._precision, self._clip_norm = device, precision, optim.clip_norm
        self._settings = paper_settings(config)
        self.parameters = paper_parameters(make_model(config, device))
        batch = case.random_batch(device)
        self._coords, self._values = spread(observe(batch, config.inner_loop, seed=0), config.inner_loop.steps)
        self._labels = batch.labels
        rates = {"siren": optim.lr_siren, "alpha": optim.lr_alpha, "reader": optim.lr_reader}
        groups = [
            {"params": [p for name, p in self.parameters.items() if name.startswith(f"{group}.")], "lr": rate}
            for group, rate in rates.items()
        ]
        adamw = torch.optim.AdamW(groups, weight_decay=optim.weight_decay, fused=True)
        self._optimizer = ScaledOptimizer(adamw, make_scaler(device, precision))

    def gradients(self) -> Gradients:
        """The gradient of every parameter, before clipping."""
        scaler = self._optimizer.scaler
        scale = scaler.scale(torch.ones((), device=self._device))
        return {name: gradient / scale for name, gradient in self._scaled_gradients().items()}

    def step(self) -> None:
        """Fit, read, two backward passes, clip, update."""
        for name, gradient in self._scaled_gradients().items():
            self.parameters[name].grad = gradient
        self._optimizer.unscale()
        if self._clip_norm is not None:
            for group in self._optimizer.param_groups:
                nn.utils.clip_grad_norm_(group["params"], self._clip_norm)
        self._optimizer.step()

    def _scaled_gradients(self) -> Gradients:
        with autocast(self._device, self._precision):
            return paper.training_gradients(
                self.parameters,
                self._coords,
                self._values,
                self._labels,
                self._settings,
                scale=self._optimizer.scaler.scale,
            ).gradients


class Ours:
    """`mwt.training.train_step`, driven as `train.classify` drives it: from a batch on the device to the update."""

    def __init__(self, case: Case, precision: str, device: torch.device, *, compile_it: bool) -> None:
        self._case, self._precision, self._device = case, precision, device
        self.model = make_model(case.model, device)
        self.forward: Callable[..., Output] = compiled(self.model) if compile_it else self.model
        self._batch = case.random_batch(device)
        self._optimizer = ScaledOptimizer(make_optimizer(self.model, case.config.optim), make_scaler(device, precision))
        self.meter = Meter(device, scaled_loss=precision == "fp16")

    @property
    def images(self) -> int:
        """Signals in a step."""
        return self._case.batch_size

    def gradients(self) -> Gradients:
        """The gradient of every parameter, before clipping, from the very step that is timed."""
        groups = [{"params": parameters} for parameters in self.model.parameter_groups().values()]
        still = torch.optim.SGD(groups, lr=0.0)
        self._run(ScaledOptimizer(still, make_scaler(self._device, self._precision)), None)
        gradients = {}
        for name, parameter in self.model.named_parameters():
            gradient = parameter.grad
            gradients[published(name)] = torch.zeros_like(parameter) if gradient is None else gradient.clone()
        return gradients

    def step(self) -> None:
        """Observe, fit, read, backward, clip, update."""
        self._run(self._optimizer, self._case.config.optim.clip_norm)

    def _run(self, optimizer: ScaledOptimizer, clip_norm: float | None) -> None:
        train_step(
            self.forward,
            self._batch,
            step=0,
            epoch=0,
            seed=0,
            inner_loop=self._case.config.inner_loop,
            optimizer=optimizer,
            clip_norm=clip_norm,
            autocast=autocast(self._device, self._precision),
            backward=lambda loss: optimizer.scaler.scale(loss).backward(),
            unscale=optimizer.unscale,
            meter=self.meter,
        )


# ---- arithmetic --------------------------------------------------------------------------------------------------


def count_flop(side: Paper | Ours) -> int:
    """Floating-point operations of the matrix products in one step: two for each multiplication and addition.

    Attention counts as plain products: what a fused kernel computes twice to save memory is nobody's achievement.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        side.gradients()
    return counter.get_total_flops()


def fewest_gflop(case: Case, device: torch.device, *, paper_too: bool = True) -> float:
    """GFLOP of a step in the formulation that needs fewer; ours not compiled, since kernels hide what they do.

    Batches above eight are counted from seven and eight: every further signal adds what the eighth did.
    """

    def count(size: int) -> int:
        small = case.with_batch_size(size)
        sides: list[Paper | Ours] = [Ours(small, "fp32", device, compile_it=False)]
        sides += [Paper(small, "fp32", device)] if paper_too else []
        return min(count_flop(side) for side in sides)

    if case.batch_size <= 8:
        return count(case.batch_size) / 1e9
    seven, eight = count(7), count(8)
    return (eight + (case.batch_size - 8) * (eight - seven)) / 1e9


def may_compile(device: torch.device, wanted: bool) -> bool:
    """Whether our side is compiled: where it is wanted and can be."""
    return wanted and runtime.can_compile(device)
