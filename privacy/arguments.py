"""Checks of arguments that accounting shares: one line, expected and got."""

from __future__ import annotations

import math
import operator
from typing import Any

from fedkd.errors import ConfigError


def require(holds: bool, name: str, expected: str, value: object) -> None:
    """Raise `ConfigError` unless ``holds``."""
    if not holds:
        raise ConfigError(f"{name} should be {expected}, got {value!r}")


def number(name: str, value: Any) -> float:
    """A finite plain float, whatever numpy type it came as."""
    try:
        plain = float(value)
    except (TypeError, ValueError):
        plain = math.nan
    require(math.isfinite(plain), name, "a finite number", value)
    return plain


def positive(name: str, value: Any) -> float:
    """A finite plain float above 0."""
    plain = number(name, value)
    require(plain > 0, name, "positive", value)
    return plain


def integer(name: str, value: Any, least: int) -> int:
    """A plain int of at least ``least``."""
    try:
        plain = operator.index(value)
    except TypeError:
        raise ConfigError(f"{name} should be a whole number, got {value!r}") from None
    require(plain >= least, name, f"{least} or more", value)
    return plain


def choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise `ConfigError` unless ``value`` is one of ``choices``."""
    require(value in choices, name, " or ".join(map(repr, choices)), value)


def check_delta(delta: float, units: int | None = None) -> None:
    """Raise `ConfigError` unless delta is in (0, 1), and below one over the number of protected units if that is known.

    At delta = 1/n, publishing one unit picked at random in full would be allowed.
    """
    require(0 < delta < 1, "delta", "in (0, 1), best below 1 / number of units", delta)
    if units is not None:
        require(delta < 1 / units, "delta", f"below 1/{units}, one over the number of units, or it says nothing", delta)
