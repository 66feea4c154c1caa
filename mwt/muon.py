"""Muon (Jordan et al. 2024) for matrices and stacks of them, with Adam for everything else, in one optimizer.

The step is that of github.com/KellerJordan/Muon and of `torch.optim.Muon`, against which it is tested; that one takes
single real 2-D matrices only. `mwt.muon_groups` says which parameters of a network go where.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Inexact
from torch import Tensor, nn
from torch.optim.adam import adam

from mwt.errors import InputError

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic polynomial a s + b s^3 + c s^5 that `newton_schulz` applies to the singular values (Jordan 2024)."""

LAYOUTS = ("out_in", "in_out", "complex_in_out", "conv", "stack", "qkv")
"""How a parameter holds its matrices. out_in, in_out: a matrix [out, in] (`nn.Linear`) or [in, out], or a stack of them
whose leading axes are independent networks. complex_in_out: the same of complex numbers as pairs, [in, out, 2]. conv: a
kernel [out, in, *space], one matrix [out, in * space]. stack: the same kernel, a matrix [out, in] for each of its taps
(places). qkv: rows of queries, keys and values, three matrices of equal size [3 * out, in]. None: one matrix [out, in],
nothing else."""

ADJUST: dict[str, Callable[[int, int], float]] = {
    "original": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "spectral": lambda rows, columns: math.sqrt(rows / columns),
}
"""The factor of an orthogonal update, from fan_out and fan_in. original: Jordan 2024; match_rms_adamw: updates as large
as AdamW's (Liu et al. 2025), so that its rates can be used; spectral: Bernstein 2025, `spectral_unclamped` in torch."""

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

MUON_DEFAULTS: dict[str, Any] = {
    "momentum": 0.95,
    "nesterov": True,
    "weight_decay": 0.0,
    "ns_steps": 5,
    "ns_coefficients": COEFFICIENTS,
    "ns_dtype": "auto",
    "eps": 1e-7,
    "adjust": "original",
    "layout": None,
}
ADAM_DEFAULTS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


def newton_schulz(
    matrices: Inexact[Tensor, "*N m n"],
    *,
    steps: int = 5,
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    eps: float = 1e-7,
    dtype: torch.dtype | None = None,
) -> Inexact[Tensor, "*N m n"]:
    """Each matrix made nearly orthogonal: its singular vectors stay, its singular values move to about 1.

    Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". The quintic iteration does not
    converge to 1 and need not: singular values above 0.005 of the Frobenius norm end in [0.68, 1.15] after 5 steps. The
    conjugate transpose is used, so that complex matrices work too. A zero matrix stays zero.

    Args:
        matrices: the last two axes are the matrices, the others a stack; the Frobenius norm is taken of each by itself.
        eps: the least norm that a matrix is divided by.
        dtype: of the products, such as torch.bfloat16; None and complex matrices: their own. The result has their own.
    """
    a, b, c = coefficients
    own = matrices.dtype
    x = matrices if own.itemsize >= 4 else matrices.float()
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(eps)
    x = x.to(own if dtype is None or own.is_complex else dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:  # the products are of the size of the smaller side
        x = x.mH
    for _ in range(steps):
        gram = x @ x.mH
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mH if tall else x).to(own)


def as_matrices(tensor: Tensor, layout: str | None) -> Tensor:
    """A parameter, or its gradient, as matrices [..., fan_out, fan_in]; see LAYOUTS."""
    match layout:
        case "in_out":
            return tensor.mT
        case "complex_in_out":
            return torch.view_as_complex(tensor).mT
        case "conv":
            return tensor.flatten(1)
        case "stack":
            return tensor.flatten(2).movedim(-1, 0)
        case "qkv":
            return tensor.unflatten(-2, (3, -1))
    return tensor


def _from_matrices(matrices: Tensor, layout: str | None, shape: torch.Size) -> Tensor:
    """The inverse of `as_matrices`."""
    match layout:
        case "in_out":
            return matrices.mT
        case "complex_in_out":
            return torch.view_as_real(matrices.mT.resolve_conj())
        case "stack":
            return matrices.movedim(0, -1).reshape(shape)
    return matrices.reshape(shape)


def check_layout(name: str, parameter: Tensor, layout: str | None) -> None:
    """Refuse a parameter whose matrices are not where the layout says, or are not said to be anywhere.

    Raises:
        InputError: names the parameter, and says what to do.
    """
    shape, ndim = tuple(parameter.shape), parameter.ndim
    if layout is not None and layout not in LAYOUTS:
        raise InputError(f"Muon: layout is {layout!r} for {name}; there are {', '.join(LAYOUTS)}.")
    if ndim < 2:
        raise InputError(
            f"Muon: {name} {shape} is not a matrix; give biases, gains and other vectors to a group with "
            "use_muon=False (Adam)."
        )
    if layout is None and ndim > 2:
        raise InputError(
            f"Muon: {name} {shape} has {ndim} axes; say in its group which are the matrices: layout='out_in' or "
            "'in_out' for a stack of matrices; for a kernel [out, in, *space] 'conv', one matrix, or 'stack', one for "
            "each tap."
        )
    if layout in ("conv", "stack") and ndim < 3:
        raise InputError(f"Muon: layout={layout!r}, but {name} {shape} is no kernel [out, in, *space].")
    if layout == "complex_in_out" and (ndim < 3 or shape[-1] != 2):
        raise InputError(f"Muon: layout='complex_in_out', but {name} {shape} does not end in pairs of numbers.")
    if layout == "qkv" and shape[-2] % 3:
        raise InputError(f"Muon: layout='qkv', but the {shape[-2]} rows of {name} {shape} are not three equal parts.")
    if not (parameter.is_floating_point() or parameter.is_complex()):
        raise InputError(f"Muon: {name} holds {parameter.dtype}, not real or complex numbers.")


def _name(group: dict[str, Any], index: int) -> str:
    names = group.get("param_names")
    return str(names[index]) if names else f"parameter {index} of its group"


class Muon(torch.optim.Optimizer):
    """Muon on groups with `use_muon=True`, Adam with decoupled decay (AdamW) on the others; one state for both.

    Keys of a Muon group: lr (to be given: see `mwt.muon_groups.default_lr`), momentum, nesterov, weight_decay,
    ns_steps, ns_coefficients, ns_dtype (bf16 or fp32; auto: bf16 on CUDA, fp32 elsewhere; float64 and complex
    parameters always their own), eps, adjust (one of ADJUST), layout (one of LAYOUTS). The step of a matrix W with
    gradient G:

        M <- momentum M + (1 - momentum) G
        U <- momentum M + (1 - momentum) G  with Nesterov, else M
        W <- W (1 - lr weight_decay) - lr adjust(fan_out, fan_in) newton_schulz(U)

    Its length depends on lr alone, not on the gradient: without rates that fall to about 0 it does not converge.

    Keys of an Adam group: lr, betas, eps, weight_decay, as of torch.optim.AdamW, whose fused kernel computes it. Keys
    of the other kind are refused. Parameters may be given as (name, parameter), for the sake of messages.

    Gradients are not touched; parameters without one are left alone. A `found_inf` set by a gradient scaler, or by
    `mwt.optim.step_if_finite`, makes the step do nothing, without waiting for the device.

    Raises:
        InputError: a parameter without a matrix where one is said to be, a sparse gradient, a key that does not fit.
    """

    def __init__(self, params: Iterable[dict[str, Any]]) -> None:
        self._step_supports_amp_scaling = True  # of torch's gradient scaler: it hands us its flag instead of waiting
        super().__init__(params, {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see the class for its keys."""
        if not isinstance(param_group, dict) or "use_muon" not in param_group:
            raise InputError("Muon: every group is a dict that says use_muon=True or False.")
        group = dict(param_group)
        ours, others = MUON_DEFAULTS, ADAM_DEFAULTS
        if not group["use_muon"]:
            ours, others = others, ours
        kind = "a Muon" if group["use_muon"] else "an Adam"
        if wrong := sorted(group.keys() & (others.keys() - ours.keys() - {"lr"})):
            raise InputError(f"Muon: {', '.join(wrong)} is no key of {kind} group.")
        group = {**ours, **group}
        if group["use_muon"]:
            if "lr" not in group:
                raise InputError("Muon: a Muon group needs its lr; mwt.muon_groups.default_lr gives one to begin with.")
            if group["adjust"] not in ADJUST:
                raise InputError(f"Muon: adjust is {group['adjust']!r}; there are {', '.join(ADJUST)}.")
            if group["ns_dtype"] not in ("auto", *DTYPES):
                raise InputError(f"Muon: ns_dtype is {group['ns_dtype']!r}; there are auto, {', '.join(DTYPES)}.")
        else:
            group["fused"] = True  # torch keeps the step counters beside the parameters where it reads this
        super().add_param_group(group)
        if group["use_muon"]:
            try:
                for index, parameter in enumerate(group["params"]):
                    check_layout(_name(group, index), parameter, group["layout"])
            except InputError:
                self.param_groups.pop()
                raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure` computes the loss again, with gradients, and what it returns is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is not None and parameter.grad.is_sparse:
                    raise InputError(
                        f"Muon: the gradient of {_name(group, index)} is sparse; make it dense (sparse=False)."
                    )
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            if group["use_muon"]:
                self._muon(group, parameters)
            else:
                self._adam(group, parameters)
        return loss

    def _muon(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        """Matrices of one shape are stacked: on a GPU many small ones cost what one does."""
        alike: dict[tuple[Any, ...], list[nn.Parameter]] = {}
        for parameter in parameters:
            alike.setdefault((parameter.shape, parameter.dtype, parameter.device), []).append(parameter)
        for same in alike.values():
            updates = [as_matrices(self._momentum(group, parameter), group["layout"]) for parameter in same]
            stack = torch.stack(updates) if len(updates) > 1 else updates[0][None]
            orthogonal = newton_schulz(
                stack,
                steps=group["ns_steps"],
                coefficients=group["ns_coefficients"],
                eps=group["eps"],
                dtype=_product_dtype(group["ns_dtype"], stack),
            )
            factor = ADJUST[group["adjust"]](*stack.shape[-2:])
            for parameter, update in zip(same, orthogonal, strict=True):
                step = _from_matrices(update, group["layout"], parameter.shape) * (group["lr"] * factor)
                moved = parameter * (1 - group["lr"] * group["weight_decay"]) - step
                parameter.copy_(self._if_finite(moved, parameter))

    def _momentum(self, group: dict[str, Any], parameter: nn.Parameter) -> Tensor:
        """Move the momentum of a parameter by its gradient, and return what is to be orthogonalised."""
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        grad, scale = parameter.grad, getattr(self, "grad_scale", None)
        assert grad is not None
        if scale is not None:
            grad = grad / scale
        momentum = state["momentum_buffer"].lerp(grad, 1 - group["momentum"])
        state["momentum_buffer"].copy_(self._if_finite(momentum, state["momentum_buffer"]))
        return grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum

    def _if_finite(self, new: Tensor, old: Tensor) -> Tensor:
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        return new if found_inf is None else torch.where(found_inf.bool(), old, new)

    def _adam(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter].update(
                    step=torch.zeros((), dtype=torch.float32, device=parameter.device),
                    exp_avg=torch.zeros_like(parameter),
                    exp_avg_sq=torch.zeros_like(parameter),
                )
        states = [self.state[parameter] for parameter in parameters]
        adam(
            [_real(parameter) for parameter in parameters],
            [_real(parameter.grad) for parameter in parameters],  # type: ignore[arg-type]
            [_real(state["exp_avg"]) for state in states],
            [_real(state["exp_avg_sq"]) for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            decoupled_weight_decay=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _product_dtype(name: str, stack: Tensor) -> torch.dtype | None:
    if stack.dtype.itemsize > 4:  # float64: half the digits would be lost; complex numbers keep theirs anyway
        return None
    return DTYPES[("bf16" if stack.is_cuda else "fp32") if name == "auto" else name]


def _real(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs, which is how torch's Adam takes them."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
