"""The check that all settings share."""

from __future__ import annotations

from mwt.errors import InputError


def require(condition: bool, message: str) -> None:
    """Refuse a setting.

    Raises:
        InputError: the condition does not hold.
    """
    if not condition:
        raise InputError(message)
