"""Do both sides compute the same? Asked before anything is timed: times of different things are not compared."""

from __future__ import annotations

import math

from benchmarks.sides import Gradients, Ours, Paper

FP32_TOLERANCE = 1e-3
"""How far a parameter's gradient may be from the paper's in fp32, relative to its norm; 1e-6 is usual."""
HALF_TOLERANCE = 0.3
"""The same in half precision against the paper's fp32, as a mean over the parameters: a few hundredths are usual."""


class Disagreement(Exception):
    """The two sides do not compute the same: there is nothing to compare."""


def differences(actual: Gradients, expected: Gradients) -> dict[str, float]:
    """Of every parameter: the norm of the difference relative to the norm of the gradient.

    Raises:
        Disagreement: the two do not have the same parameters.
    """
    if actual.keys() != expected.keys():
        raise Disagreement(f"The two sides have other parameters: {sorted(actual.keys() ^ expected.keys())}.")
    errors = {}
    for name, wanted in expected.items():
        error, size = (actual[name] - wanted).norm(), wanted.norm()
        errors[name] = float(error / size) if size else float(error)
    return errors


def mean_difference(actual: Gradients, expected: Gradients) -> float:
    """The same of all parameters together: the root mean square."""
    squares = [error**2 for error in differences(actual, expected).values()]
    return float((sum(squares) / len(squares)) ** 0.5)


def check_gradients(case: str, precision: str, ours: Gradients, theirs: Gradients) -> None:
    """Refuse to compare two sides that do not compute the same; `theirs` are always in fp32.

    In fp32 the gradient of each parameter must agree; in half precision they must be alike on the whole.

    Raises:
        Disagreement: says what differs, and by how much.
    """
    if precision == "fp32":
        errors = differences(ours, theirs)
        worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
        found, limit, what = errors[worst], FP32_TOLERANCE, worst
    else:
        found, limit, what = mean_difference(ours, theirs), HALF_TOLERANCE, "all parameters"
    if not found <= limit:  # not a number is refused as well
        raise Disagreement(
            f"{case}, {precision}: the gradient of {what} differs from the paper's by {found:.1e} of its norm, more "
            f"than {limit:.1e}. Two sides that do not compute the same are not compared."
        )


def compare(name: str, ours: dict[str, Ours], theirs: dict[str, Paper]) -> dict[tuple[str, str], float]:
    """How far the gradients of each (side, precision) are from the paper's in fp32; nothing without the paper's side.

    Raises:
        Disagreement: ours are too far.
    """
    if not theirs:
        return {}
    expected = theirs["fp32"].gradients()
    errors = {}
    for precision, side in ours.items():
        gradients = side.gradients()
        check_gradients(name, precision, gradients, expected)
        errors["ours", precision] = mean_difference(gradients, expected)
        errors["paper", precision] = mean_difference(theirs[precision].gradients(), expected)
    return errors
