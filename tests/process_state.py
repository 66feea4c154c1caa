"""What programs set in the process that runs them, and how a test goes back to a fresh process without starting one."""

from __future__ import annotations

from accelerate.state import AcceleratorState, GradientState, PartialState


def reset() -> None:
    """Let accelerate forget its devices, ranks and precision, so that a program can be started again."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
