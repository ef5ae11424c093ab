"""Divide a whole number of images into whole shares."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


def apportion(
    weights: NDArray[np.int64] | FloatArray,
    total: int,
    rng: np.random.Generator,
    *,
    low: int = 0,
    cap: IntArray | None = None,
) -> IntArray:
    """Return whole shares of ``total``, as near to the weights as the bounds allow.

    What a share may not hold goes to the others in proportion, so with equal weights the shares fill up like glasses
    at one water level. Largest remainders are rounded up, ties drawn.

    Args:
        weights: (k,) non-negative, not all 0.
        total: What the shares sum to, between the sums of the bounds.
        rng: Breaks ties.
        low: Smallest share.
        cap: (k,) largest shares, at least ``low`` each; None for no bound.

    Example:
        >>> apportion(np.ones(3), 10, np.random.default_rng(0), cap=np.array([2, 9, 9])).tolist()
        [2, 4, 4]
    """
    high = np.full(len(weights), total, np.float64) if cap is None else cap.astype(np.float64)
    exact = weights * (total / weights.sum())
    if np.any(exact < low) or np.any(exact > high):
        exact = _level(lambda scale: np.clip(weights * scale, low, high), total)
    return _rounded(exact, total, high, rng)


def fill(base: FloatArray, total: int) -> FloatArray:
    """Return what to pour on levels ``base`` (k,) so that they end as equal as can be, at least 1 (real) on each.

    Args:
        base: (k,) levels.
        total: What is poured, at least k.
    """
    return _level(lambda level: np.maximum(1.0, level - base), total)


def _level(shares: Callable[[float], FloatArray], total: int) -> FloatArray:
    """Return the shares whose sum is ``total``; each of them grows with the level."""
    low, high = 0.0, 1.0
    while shares(high).sum() < total and high < 2.0**200:
        high *= 2
    while True:  # bisection, down to neighbouring numbers
        middle = (low + high) / 2
        if middle in (low, high):
            return shares(high)
        low, high = (middle, high) if shares(middle).sum() < total else (low, middle)


def _rounded(exact: FloatArray, total: int, high: FloatArray, rng: np.random.Generator) -> IntArray:
    whole = np.floor(exact + 1e-9).astype(np.int64)
    rest = exact - whole
    rest[whole >= high] = -1  # full
    order = np.lexsort((rng.random(len(rest)), -np.round(rest, 9)))
    whole[order[: total - int(whole.sum())]] += 1
    return whole
