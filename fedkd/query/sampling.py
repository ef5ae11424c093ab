"""Batches of distinct questions: inclusion probabilities that are worth most, and draws that keep to them exactly.

A batch is drawn without replacement, so candidate i is asked with an inclusion probability pi_i <= 1, and the sum of
pi is the batch size b. A batch is worth the game's payoff (see `fedkd.query.rad`) with pi in place of p.
"""

from __future__ import annotations

import operator
from bisect import bisect_left, bisect_right
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from fedkd.errors import ConfigError
from fedkd.query import rad
from fedkd.query.rad import FloatArray, IntArray

Scheme = Literal["inclusion", "sequential"]

CERTAIN = 1 - 1e-9
"""Inclusion probability from which a candidate is taken without a draw, so that rounding cannot draw it twice."""


def madow(inclusion: FloatArray, rng: np.random.Generator) -> IntArray:
    """Draw distinct candidates, i with probability ``inclusion[i]`` exactly (systematic sampling; Madow, 1949).

    The probabilities are laid end to end on a line, which is read off at u, u + 1, u + 2, ... with one uniform u. The
    candidates are put in random order first: in a fixed one, neighbours would never be drawn together.

    Args:
        inclusion: (n,) in [0, 1], with a whole number b as their sum.
        rng: Gives the order and u.

    Returns:
        (b,) indices in ascending order.

    Raises:
        ConfigError: They are not such probabilities.
    """
    size = float(inclusion.sum())
    if not (np.all((inclusion >= 0) & (inclusion <= 1)) and abs(size - round(size)) <= 1e-6 * max(1.0, size)):
        raise ConfigError(
            f"inclusion: expected probabilities in [0, 1] that sum to a whole number, got {inclusion.min():g} to "
            f"{inclusion.max():g} with sum {size:g}; scale them"
        )
    order = rng.permutation(len(inclusion))
    return np.sort(order[_systematic(inclusion[order], round(size), rng.random())])


def _systematic(inclusion: FloatArray, size: int, start: float) -> IntArray:
    """Return the candidates found at ``start``, ``start + 1``, ... on the line, after the certain ones."""
    certain = np.flatnonzero(inclusion >= CERTAIN)
    open_ = np.flatnonzero((inclusion > 0) & (inclusion < CERTAIN))
    left = size - len(certain)
    if not left:
        return certain
    ends = np.cumsum(inclusion[open_])
    ends *= left / ends[-1]
    at = np.searchsorted(ends, start + np.arange(left), side="right")
    return np.concatenate([certain, open_[np.minimum(at, len(open_) - 1)]])


def inclusion(gains: ArrayLike, m: float, b: int, penalty: float = 1.0) -> FloatArray:
    """Return the inclusion probabilities (n,) of a batch of b that is worth most against the m worst errors.

    While ``b max p <= 1`` they are b times the game's p, and worth b V. Beyond, no candidate can be asked more than
    surely, and the optimum of the capped program is returned::

        max over pi in [0, 1]^n with sum pi = b of  min over S of  sum_i pi_i g_i (1 - penalty [i in S])

    Args:
        gains: (n,) as for `fedkd.query.rad.solve`, which warns where ``penalty * m >= n``; all are then b / n.
        m: Errors, 0 to n.
        b: Batch size, 1 to n.
        penalty: At least 1.

    Raises:
        ConfigError: An argument is out of range.

    Example:
        >>> inclusion([1, 0.5, 0.25], m=1, b=2).tolist()
        [0.5, 1.0, 0.5]
    """
    game = rad.solve(gains, m, penalty)
    _check_size(b, len(game.p))
    uncapped = b * game.p
    if uncapped.max() <= 1 + rad.TIE:
        return np.minimum(uncapped, 1.0)
    g = rad.floored(gains)
    order = np.argsort(-g, kind="stable")
    pi = np.empty(len(g))
    pi[order] = _capped(g[order], m, b, penalty)
    return pi


def _capped(g: FloatArray, m: float, b: int, penalty: float) -> FloatArray:
    """Solve the capped program for gains in descending order.

    The m largest of the worths x_i = pi_i g_i sum to ``min over t of m t + sum_i (x_i - t)_+``. So the program is
    ``max over t`` of a concave function of one level t, and given t every x_i earns 1 up to t and 1 - c, a loss,
    beyond. The maximum is where its slope changes sign; bisection goes down to neighbouring numbers.
    """
    total = rad.totals(g)
    low, high = 0.0, float(g[0])
    while low < (level := (low + high) / 2) < high:
        low, high = (level, high) if _slope(g, total, level, m, b, penalty) > 0 else (low, level)
    return _at_level(g, level, b, penalty)


def _at_level(g: FloatArray, level: float, b: int, penalty: float) -> FloatArray:
    """Return the best pi given the level: first up to it from the largest gain on, then above it where that is least.

    Above the level the loss is (c - 1) g, so the smallest gains come first. At c = 1 the worst case is indifferent, and
    the largest do, which are worth more against fewer errors.
    """
    pi = _fill(np.minimum(1.0, level / g), b)
    rest = max(b - float(pi.sum()), 0.0)
    turn = -1 if penalty > 1 else 1
    pi[::turn] += _fill(1.0 - pi[::turn], rest)
    return np.minimum(pi, 1.0)


def _fill(room: FloatArray, amount: float) -> FloatArray:
    """Pour ``amount`` into the glasses ``room`` (n,), each to the brim before the next."""
    return np.clip(amount - (np.cumsum(room) - room), 0.0, room)


def _slope(g: FloatArray, total: FloatArray, level: float, m: float, b: int, penalty: float) -> float:
    """Return the derivative by the level of what `_at_level` is worth, from prefix sums in O(log n).

    ``price`` is the worth of one more unit of the budget b, the marginal candidate's. Raising the level by 1 lets a
    candidate at the level be worth 1 more for 1 / g_i of the budget, and one above it lose c less.
    """
    n = len(g)
    above = bisect_left(g, -level, key=operator.neg)  # how many gains are greater
    full = level * total[above]
    if full > b:  # the budget ends among those at the level
        at, over = int(np.searchsorted(total, b / level, side="right")) - 1, 0
        price = g[min(at, n - 1)]
    elif full + (n - above) > b:  # among those below it, which are asked surely
        at, over = above, 0
        price = g[min(above + int(b - full), n - 1)]
    else:  # not before all are filled: the smallest of those above the level are asked surely too
        at = bisect_right(range(above + 1), -b, key=lambda j: -(n - j + level * total[j])) - 1
        over = above - at
        price = (1 - penalty) * g[min(at, n - 1)]
    return float(at - price * total[at] + penalty * (over - m))


def draw(
    gains: ArrayLike,
    error_rate: float,
    b: int,
    rng: np.random.Generator,
    penalty: float = 1.0,
    scheme: Scheme = "inclusion",
) -> IntArray:
    """Draw a batch of b distinct candidates.

    Args:
        gains: (n,) as for `fedkd.query.rad.solve`.
        error_rate: Share of the candidates that the teacher errs on, in [0, 1]; m is n times it.
        b: Batch size, 1 to n.
        rng: Randomness.
        penalty: At least 1.
        scheme: ``"inclusion"`` draws once with the probabilities of `inclusion`. ``"sequential"`` follows the game's
            own p: while its support has no more candidates than are wanted, all of it is taken and the game solved
            anew on the rest, with the same error rate; the last batch, smaller than its support, is drawn as above.

    Returns:
        (b,) indices in ascending order.

    Raises:
        ConfigError: An argument is out of range. A batch above the pool is the caller's to cut down.

    Example:
        >>> draw([1, 0.5, 0.25, 0.1], 0.25, 2, np.random.default_rng(0), scheme="sequential").tolist()
        [0, 1]
    """
    g = rad.floored(gains)
    _check_size(b, len(g))
    if not 0 <= error_rate <= 1:
        raise ConfigError(f"error_rate: expected a share in [0, 1], got {error_rate}; give wrong answers / answers")
    order = np.argsort(-g, kind="stable")
    taken = _whole_supports(g[order], penalty * error_rate, b) if scheme == "sequential" else 0
    if taken == b:
        return np.sort(order[:b])
    rest = order[taken:]
    pi = inclusion(g[rest], error_rate * len(rest), b - taken, penalty)
    return np.sort(np.concatenate([order[:taken], rest[madow(pi, rng)]]))


def _whole_supports(ranked: FloatArray, lost_share: float, b: int) -> int:
    """Return how many of the best candidates successive games take whole, up to b."""
    if lost_share >= 1:
        return 0
    total, taken = rad.totals(ranked), 0
    while taken < b:
        k = rad.support(ranked, total, lost_share * (len(ranked) - taken), taken)
        if taken + k > b:
            break
        taken += k
    return taken


def _check_size(b: int, n: int) -> None:
    if not 1 <= b <= n:
        raise ConfigError(f"b: expected 1 to {n} questions, the candidates there are, got {b}; lower the budget")
