"""How often a teacher errs, from its answers on held-out labelled data."""

from __future__ import annotations

from typing import Literal

from scipy.special import betaincinv

from fedkd.errors import ConfigError

Estimator = Literal["plugin", "upper"]


def error_rate(right: int, tested: int, estimator: Estimator = "plugin", level: float = 0.95) -> float:
    """Return the share of wrong answers to reckon with, in [0, 1].

    Args:
        right: Correct answers.
        tested: Answers.
        estimator: ``"plugin"`` is the share seen. ``"upper"`` is the one-sided upper bound of Clopper and Pearson
            (Biometrika, 1934): the true rate is above it in at most ``1 - level`` of all tests. It matters where few
            answers were tested, and is the only one that never says 0.
        level: Confidence of ``"upper"``, in (0, 1).

    Raises:
        ConfigError: Nothing was tested, or a number is out of range.

    Example:
        >>> round(error_rate(20, 20, "upper"), 3)
        0.139
    """
    if not 0 <= right <= tested or tested == 0:
        raise ConfigError(f"right: expected 0 to {tested} of at least one tested answer, got {right}; test the teacher")
    if not 0 < level < 1:
        raise ConfigError(f"level: expected a confidence in (0, 1), got {level}; 0.95 is usual")
    wrong = tested - right
    if estimator == "plugin":
        return wrong / tested
    return float(betaincinv(wrong + 1, right, level)) if right else 1.0


def errors(right: int, tested: int, n: int, estimator: Estimator = "plugin", level: float = 0.95) -> float:
    """Return m, the errors to reckon with among n candidates, not rounded: n times `error_rate`."""
    return n * error_rate(right, tested, estimator, level)
