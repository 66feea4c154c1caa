"""The inner loop: fit a field to every signal of a batch by a few gradient steps (paper, algorithm 1, lines 5 to 8)."""

from __future__ import annotations

from mwt.config import InnerLoopConfig
from mwt.engines import ENGINES
from mwt.errors import InputError
from mwt.fields import AdaptedField
from mwt.meta_sgd import MetaSGD
from mwt.structs import Fit, Observations


def fit(
    field: AdaptedField,
    alpha: MetaSGD,
    observations: Observations,
    *,
    steps: int,
    options: InnerLoopConfig | None = None,
) -> Fit:
    """Adapt a field to each signal by `steps` gradient steps on its mean squared error, with rates `alpha`.

    Step j subtracts alpha_j times the gradient from a signal's offsets, elementwise. Differentiable with respect to
    every parameter of `field` and `alpha`; call it under `torch.no_grad()` where no gradient is wanted. `steps` may
    exceed the trained number only where the rates are shared.

    Args:
        options: which engine, first order or not, recomputation; the analytic engine by default.

    Raises:
        ValueError: no step, or more steps than there are learned rates.
        InputError: an engine that does not exist, or that cannot fit this field in this way.
    """
    options = InnerLoopConfig() if options is None else options
    if steps < 1:
        raise ValueError(f"a fit takes at least one inner step, not {steps}")
    if not alpha.shared and steps > len(alpha):
        raise ValueError(
            f"{steps} inner steps asked for, but rates were learned for {len(alpha)} (and are not shared)."
        )
    if options.engine not in ENGINES:
        raise InputError(f"inner_loop.engine is {options.engine!r}; there are {', '.join(ENGINES)}.")
    return ENGINES[options.engine](field, alpha, observations, steps, options)
