"""Engines: ways to compute the same inner loop. Each maps (field, alpha, observations, steps, options) to a Fit.

All give the same values and the same outer gradients (tests hold them to 1e-9 in float64); they differ in what they
can fit and in what they cost:

    analytic   SIREN only. Inner gradient and its derivative written out: fastest and smallest, the default.
    func       any field; torch.func.grad.
    higher     any field, and other inner optimizers than gradient descent; the `higher` library.
"""

from __future__ import annotations

from collections.abc import Callable

from mwt.config import InnerLoopConfig
from mwt.engines.analytic import fit_analytic
from mwt.engines.functional import fit_func
from mwt.engines.higher import fit_higher
from mwt.fields import AdaptedField
from mwt.meta_sgd import MetaSGD
from mwt.structs import Fit, Observations

Engine = Callable[[AdaptedField, MetaSGD, Observations, int, InnerLoopConfig], Fit]

ENGINES: dict[str, Engine] = {"analytic": fit_analytic, "func": fit_func, "higher": fit_higher}


def list_engines() -> list[str]:
    """Names that `inner_loop.engine` accepts."""
    return list(ENGINES)


__all__ = ["ENGINES", "Engine", "fit_analytic", "fit_func", "fit_higher", "list_engines"]
