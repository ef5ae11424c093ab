"""The max-min game of Robust Active Distillation, solved exactly. NumPy only.

Robust Active Distillation (Baykal, Trinh, Iliopoulos, Menghani, Vee; ICLR 2023; arXiv 2210.01213). Evidence: proved.
The closed form is checked against linear programs; the paper's theorem itself could not be read, so its constant (a
wrong answer earns 0, or costs the gain) is left as ``penalty``. The solution depends on ``penalty * m`` alone.

There are n candidates with gains g. The learner draws a candidate from p. An adversary, who knows p, makes the
teacher's answers wrong on a set S of at most m candidates. With the penalty c::

    V = max_p min_S  sum_i p_i g_i (1 - c [i in S])

Sort g in descending order and put H_k = sum_{i <= k} 1 / g_i. Then V = max_k (k - c m) / H_k, and p draws from the k
largest gains with p_i = 1 / (g_i H_k): every candidate of the support is worth the same, so the adversary has no
favourite among them.
"""

from __future__ import annotations

import math
import warnings
from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedkd.errors import ConfigError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

FLOOR = 1e-6
"""Least gain, as a share of the largest: 1 / g must be finite. Gains below V are never drawn, so it seldom matters."""

TIE = 1e-12
"""Relative gap below which a gain counts as equal to the value, so that rounding does not widen the support."""


@dataclass(frozen=True, eq=False)
class Game:
    """A solved game.

    Attributes:
        value: V, what a draw is worth against the worst errors, in units of gain.
        k: Size of the support.
        p: (n,) probability to draw each candidate; sums to 1.
        correctness: (n,) ``min(1, V / g)``, what the worst adversary leaves of each gain: it proves that no p is worth
            more than V, as no candidate is. ``1 - correctness`` sums to ``penalty * m`` where that is below n.
    """

    value: float
    k: int
    p: FloatArray
    correctness: FloatArray


def gain(probs: ArrayLike) -> FloatArray:
    """Return 1 - (largest - second largest) of each row (n,) in [0, 1], of a student's probabilities (n, K), K >= 2."""
    top = np.partition(np.asarray(probs, np.float64), -2, axis=1)[:, -2:]
    return np.clip(1.0 - (top[:, 1] - top[:, 0]), 0.0, 1.0)


def solve(gains: ArrayLike, m: float, penalty: float = 1.0) -> Game:
    """Solve the game in O(n log n).

    Where ``penalty * m >= n`` the adversary wins: at penalty 1 every p is worth 0. Then p is uniform, with a warning,
    and ``value`` still is the game's, ``max((n - penalty m) / H_n, -(penalty - 1) min g)``.

    Args:
        gains: (n,) non-negative, in any unit: p does not depend on it. Below `FLOOR` of the largest they count as that.
        m: Errors that the adversary may make, 0 to n; a fraction is an adversary who draws lots and makes m on average.
        penalty: c, at least 1. A wrong answer earns ``1 - c`` times the gain: 1 nothing, 2 its loss.

    Returns:
        The game; of equal gains the support takes those of smallest index.

    Raises:
        ConfigError: A gain is negative or not finite, there are none, or m or penalty is out of range.

    Example:
        >>> game = solve([1, 0.5, 0.25], m=1)
        >>> game.k, round(game.value, 6), game.p.round(6).tolist()
        (2, 0.333333, [0.333333, 0.666667, 0.0])
    """
    g = floored(gains)
    n = len(g)
    if not 0 <= m <= n:
        raise ConfigError(f"m: expected 0 to {n} errors among {n} candidates, got {m}; give a rate times {n}")
    if not 1 <= penalty < math.inf:
        raise ConfigError(f"penalty: expected 1 or more, got {penalty}; 1 lets a wrong answer earn nothing")
    if penalty * m >= n:
        return _lost(g, m, penalty)
    order = np.argsort(-g, kind="stable")
    k = support(g[order], totals(g[order]), penalty * m)
    chosen = order[:k]
    total = float(np.sum(1 / g[chosen]))
    value = (k - penalty * m) / total
    p = np.zeros(n)
    p[chosen] = 1 / (g[chosen] * total)
    return Game(value, k, p, np.minimum(1.0, value / g))


def worst_case(p: ArrayLike, gains: ArrayLike, m: float, penalty: float = 1.0) -> float:
    """Return what drawing from p (n,) is worth against the m worst errors: the game's payoff at its minimum over S.

    Args:
        p: (n,) probabilities, or inclusion probabilities of a batch.
        gains: (n,) as they are, without a floor.
        m: Errors, 0 to n, fractions allowed.
        penalty: As in `solve`.
    """
    worth = np.sort(np.asarray(p, np.float64) * np.asarray(gains, np.float64))[::-1]
    wrong = np.clip(m - np.arange(len(worth)), 0.0, 1.0)
    return float(worth @ (1.0 - penalty * wrong))


def floored(gains: ArrayLike) -> FloatArray:
    """Return the gains (n,) as float64, checked, none below `FLOOR` of the largest (of 1, if all are 0)."""
    g = np.asarray(gains, np.float64)
    if g.ndim != 1 or not len(g):
        raise ConfigError(f"gains: expected one number for each candidate, got shape {g.shape}; give at least one")
    bad = np.flatnonzero(~(np.isfinite(g) & (g >= 0)))
    if len(bad):
        raise ConfigError(
            f"gains: expected finite numbers of at least 0, got {g[bad[0]]} at {bad[0]} ({len(bad)} such); "
            "did the student diverge?"
        )
    return np.maximum(g, FLOOR * (g.max() or 1.0))


def totals(ranked: FloatArray) -> FloatArray:
    """Return H_0 = 0, H_1, ..., H_n (n + 1,) of gains in descending order."""
    return np.concatenate([[0.0], np.cumsum(1 / ranked)])


def support(ranked: FloatArray, total: FloatArray, lost: float, start: int = 0) -> int:
    """Return k, the smallest maximiser of ``(k - lost) / H_k``, for the candidates from rank ``start`` on.

    Taking one more candidate raises the quotient just while its gain is above it, and once it is not, no later one is:
    the end of the scan can be found by bisection.

    Args:
        ranked: (n,) gains in descending order.
        total: Their `totals`.
        lost: ``penalty * m``, less than ``n - start``.
        start: How many candidates are left out, the best ones.
    """

    def ends(k: int) -> bool:
        value = (k - lost) / (total[start + k] - total[start])
        return bool(ranked[start + k] <= value * (1 + TIE))

    return 1 + bisect_left(range(1, len(ranked) - start), True, key=ends)


def _lost(g: FloatArray, m: float, penalty: float) -> Game:
    n = len(g)
    warnings.warn(
        f"rad: expected fewer than {n / penalty:g} errors among {n} candidates at penalty {penalty:g}, got m = {m:g}; "
        "no choice is safe against so many, so candidates are drawn uniformly",
        UserWarning,
        stacklevel=3,
    )
    value = max((n - penalty * m) / float(np.sum(1 / g)), (1 - penalty) * float(g.min()))
    return Game(value, n, np.full(n, 1 / n), np.minimum(1.0, value / g))
