"""One-run audit: a lower bound on epsilon from one training run with many canaries.

Steinke, Nasr, Jagielski, "Privacy Auditing with One (1) Training Run", NeurIPS 2023, arXiv 2305.08846, appendix D:
each of m canaries is included by a fair coin of its own, the auditor guesses r coins and abstains on the
others, and no (epsilon, delta)-DP training allows v or more right guesses with a probability above ``p_value``. What
holds of any training is a bound. ``gaussian_bound`` adds an assumption and says so in its result.

Decided here: the k canaries with the lowest scores are guessed in, the k with the highest out, and r = 2 k is fixed
before the scores are seen (a best k picked afterwards raised alarms on 25 to 35 % of runs without a leak). A tie goes
against the auditor. **The coins must be independent and fair.** A fixed half of the canaries, or a sample of half of
them, is outside the theorem, whatever the scores; the result records what the caller says of its coins.

A lower score is more memorised. **What a bound is not:** a low one is no proof of privacy, for m canaries certify at
most ``epsilon_bound(m, m, m, delta)`` (5.78 for a thousand), however complete the leak. Several targets, each audited
at 95 %, raise false alarms at up to 5 % each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.special import bdtrc, expit, log_ndtr, ndtr, ndtri

from fedkd.errors import ConfigError

Guesses = int | Sequence[int] | None
OneRunMethod = Literal["one run", "one run, assuming Gaussian"]

_TOLERANCE = 1e-6  # of epsilon and mu; the lower end is returned
_UNFAIR = 1e-9  # probability of so many or so few included canaries below which the coins are not fair
_SHARES = (0.02, 0.05, 0.1, 0.2)  # of m guessed in, and as many out, where several k are tried
_FEWEST = 5  # guessed in, and as many out, where there are so many canaries; four right guesses can certify nothing


@dataclass(frozen=True)
class OneRunResult:
    """A lower bound on epsilon from one training run.

    Attributes:
        method: What was computed.
        epsilon: Lower bound; 0 says that nothing was certified.
        delta: The delta that it goes with.
        confidence: Probability that the bound holds.
        m: Number of canaries.
        guesses: Number r of guesses that gave the bound; the others were abstentions.
        correct: Number v of right guesses among them.
        tried: All r that were tried, each at its share of the error probability (Bonferroni).
        fair_coins: Whether the caller says that each canary was included by a fair coin of its own.
    """

    method: OneRunMethod
    epsilon: float
    delta: float
    confidence: float
    m: int
    guesses: int
    correct: int
    tried: tuple[int, ...]
    fair_coins: bool

    @property
    def caveat(self) -> str | None:
        """Return why the figure is no bound on any training's epsilon; None if it is one."""
        if not self.fair_coins:
            return "the canaries were not included by independent fair coins, so that the theorem does not apply"
        return None if self.method == "one run" else "it assumes that the trade-off curve is Gaussian"

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {**asdict(self), "tried": list(self.tried), "caveat": self.caveat}


def one_run_bound(
    scores: npt.ArrayLike,
    included: npt.ArrayLike,
    delta: float,
    *,
    fair_coins: bool,
    k: Guesses = None,
    confidence: float = 0.95,
) -> OneRunResult:
    """Return the lower bound on epsilon that one run's scores give, whatever the training.

    Args:
        scores: (m,) scores of the canaries, lower is more memorised.
        included: (m,) bool, whether each canary was in the training data.
        delta: The delta that epsilon goes with, in [0, 1).
        fair_coins: Whether each canary was included by a fair coin of its own.
        k: How many canaries to guess in, and as many out: chosen before the scores are seen. Several numbers are all
            tried, and pay for it (``several``). None: a tenth of m, but 5 where there are as many.
        confidence: Probability that the bound holds, in [0.5, 1).

    Raises:
        ConfigError: A score is NaN, the shapes differ, there are too few canaries for k, fair coins are claimed that
            cannot have been, or a number is outside its range.

    Example:
        >>> coins = np.arange(100) % 3 > 0
        >>> found = one_run_bound(np.where(coins, 0.0, 1.0), coins, 1e-5, fair_coins=True)
        >>> found.guesses, found.correct, round(found.epsilon, 3)
        (20, 20, 1.82)
    """
    return _audit("one run", epsilon_bound, scores, included, delta, fair_coins, k, confidence)


def gaussian_bound(
    scores: npt.ArrayLike,
    included: npt.ArrayLike,
    delta: float,
    *,
    fair_coins: bool,
    k: Guesses = None,
    confidence: float = 0.95,
) -> OneRunResult:
    """Return the lower bound that one run's scores give if the training is mu-Gaussian-DP for some mu.

    Mahloujifar, Melis, Chaudhuri, "Auditing f-Differential Privacy in One Run", 2024, arXiv 2410.22235. It is higher
    than ``one_run_bound``, and no bound where the trade-off curve is not Gaussian: training that is epsilon-DP by
    another mechanism can be accused falsely. Report it beside the other, never alone.

    Args:
        scores: As ``one_run_bound``.
        included: As ``one_run_bound``.
        delta: The delta that epsilon goes with, in (0, 1).
        fair_coins: As ``one_run_bound``.
        k: As ``one_run_bound``.
        confidence: As ``one_run_bound``.

    Raises:
        ConfigError: As ``one_run_bound``; or delta is 0, where a Gaussian has no epsilon.
    """
    method: OneRunMethod = "one run, assuming Gaussian"
    return _audit(method, gaussian_epsilon_bound, scores, included, delta, fair_coins, k, confidence)


def several(m: int) -> tuple[int, ...]:
    """Return up to four k for ``one_run_bound`` to try on m canaries: 2, 5, 10 and 20 % of them, at least 5.

    One k suits leaks of a few canaries, another of all; four leave each a quarter of the error probability.
    """
    return tuple(sorted({_within(share, m) for share in _SHARES}))


def chosen(m: int, k: Guesses) -> tuple[int, ...]:
    """Return the k to try on m canaries: those asked for, or the one that is the default.

    Raises:
        ConfigError: A k is not from 1 to m / 2, or there is none.
    """
    each = (_within(0.1, m),) if k is None else (k,) if isinstance(k, int) else tuple(k)
    if not each or not all(1 <= one <= m // 2 for one in each):
        raise ConfigError(f"k should be from 1 to half of the {m} canaries, got {each}; plant more canaries")
    return each


def p_value(m: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Return the largest probability of so many right guesses under (epsilon, delta)-DP.

    beta + 2 m delta alpha, with X ~ Binomial(r, e^epsilon / (1 + e^epsilon)), beta = P[X >= v] and
    alpha = max over i = 1 to v of P[v > X >= v - i] / i. It is m that multiplies delta, not r: a canary on which the
    auditor abstains may be the one that failed.

    Args:
        m: Number of canaries.
        guesses: Number r of guesses.
        correct: Number v of right guesses.
        epsilon: From 0.
        delta: In [0, 1).

    Example:
        >>> round(p_value(1000, 100, 75, 0.5, 1e-4), 6)
        0.014587
    """
    if correct == 0:
        return 1.0
    right = float(expit(epsilon))
    beta = float(_at_least(correct, guesses, right))
    if delta == 0:
        return beta
    i = np.arange(1, correct + 1)
    alpha = float(((_at_least(correct - i, guesses, right) - beta) / i).max())
    return min(1.0, beta + 2 * m * delta * alpha)


@lru_cache(maxsize=4096)
def epsilon_bound(m: int, guesses: int, correct: int, delta: float, confidence: float = 0.95) -> float:
    """Return the largest epsilon, to 1e-6, that v right of r guesses reject: its ``p_value`` is below 1 - confidence.

    Args:
        m: Number of canaries.
        guesses: Number r of guesses, from 1 to m.
        correct: Number v of right guesses, from 0 to r.
        delta: In [0, 1).
        confidence: Probability that the bound holds, in [0.5, 1).

    Returns:
        Epsilon; 0 where nothing is rejected.

    Raises:
        ConfigError: A number is outside its range.

    Example:
        >>> round(epsilon_bound(1000, 100, 75, 1e-4), 4)
        0.673
    """
    _check(m, guesses, correct, delta, confidence)
    return _largest(lambda epsilon: p_value(m, guesses, correct, epsilon, delta) < 1 - confidence)


@lru_cache(maxsize=4096)
def gaussian_epsilon_bound(m: int, guesses: int, correct: int, delta: float, confidence: float = 0.95) -> float:
    """Return the epsilon at ``delta`` of the largest mu, to 1e-6, that v right of r guesses reject as mu-Gaussian-DP.

    Algorithm "audit_rh_with_cap" of arXiv 2410.22235: rejects mu if right and wrong guesses of that curve cannot make
    up r / m.

    Args:
        m: Number of canaries.
        guesses: Number r of guesses, from 1 to m.
        correct: Number v of right guesses, from 0 to r.
        delta: In (0, 1).
        confidence: Probability that the bound holds, in [0.5, 1).

    Raises:
        ConfigError: A number is outside its range.

    Example:
        >>> round(gaussian_epsilon_bound(1000, 100, 75, 1e-4), 4)
        0.8417
    """
    _check(m, guesses, correct, delta, confidence)
    if delta == 0:
        raise ConfigError("a Gaussian trade-off has no epsilon at delta 0, got delta 0; give one above 0")
    return gaussian_epsilon(_largest(lambda mu: _rejects(mu, m, guesses, correct, 1 - confidence)), delta)


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Return the least delta with which mu-Gaussian-DP is (epsilon, delta)-DP.

    Dong, Roth, Su, "Gaussian Differential Privacy", 2022, arXiv 1905.02383, corollary 2.13.

    Args:
        mu: Distance of the two Gaussians in standard deviations, from 0.
        epsilon: From 0.
    """
    if mu == 0:
        return 0.0
    high, low = mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu
    return float(ndtr(high) - math.exp(min(0.0, epsilon + float(log_ndtr(low)))))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return the epsilon, to 1e-6, with which mu-Gaussian-DP is (epsilon, delta)-DP.

    Args:
        mu: Distance of the two Gaussians in standard deviations, from 0.
        delta: In (0, 1).

    Example:
        >>> round(gaussian_epsilon(1.0, 1e-5), 4)
        4.3772
    """
    return _largest(lambda epsilon: gaussian_delta(mu, epsilon) > delta)


def gaussian_mu(epsilon: float, delta: float) -> float:
    """Return the largest mu, to 1e-6, with which a Gaussian is (epsilon, delta)-DP.

    Args:
        epsilon: From 0.
        delta: In (0, 1).
    """
    return _largest(lambda mu: gaussian_delta(mu, epsilon) <= delta)


def right_guesses(scores: npt.ArrayLike, included: npt.ArrayLike, k: Sequence[int]) -> tuple[int, ...]:
    """Return how many of 2 k guesses are right, for each k: the k lowest scores are guessed in, the k highest out.

    Args:
        scores: (m,) scores, lower is more memorised; ties are resolved against the auditor.
        included: (m,) bool.
        k: Numbers from 1 to m / 2.
    """
    coins = np.asarray(included)
    by_score = coins[np.lexsort((coins, np.asarray(scores)))]  # of equal scores, excluded first: wrong at both ends
    return tuple(int(by_score[:each].sum() + (~by_score[-each:]).sum()) for each in k)


def _audit(
    method: OneRunMethod,
    bound: Callable[[int, int, int, float, float], float],
    scores: npt.ArrayLike,
    included: npt.ArrayLike,
    delta: float,
    fair_coins: bool,
    k: Guesses,
    confidence: float,
) -> OneRunResult:
    values, coins = scored(scores, included)
    m = values.size
    each = chosen(m, k)
    less_likely = min(int(coins.sum()), int((~coins).sum()))
    if fair_coins and 2 * (1 - float(_at_least(less_likely + 1, m, 0.5))) < _UNFAIR:
        raise ConfigError(f"{int(coins.sum())} of {m} canaries are included, which fair coins do not do; toss them")
    share = 1 - (1 - confidence) / len(each)
    correct = right_guesses(values, coins, each)
    epsilons = [bound(m, 2 * one, v, delta, share) for one, v in zip(each, correct, strict=True)]
    best = int(np.argmax(epsilons))
    return OneRunResult(
        method=method,
        epsilon=epsilons[best],
        delta=delta,
        confidence=confidence,
        m=m,
        guesses=2 * each[best],
        correct=correct[best],
        tried=tuple(2 * one for one in each),
        fair_coins=bool(fair_coins),
    )


def scored(scores: npt.ArrayLike, included: npt.ArrayLike) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Scores (m,) and whether each canary, or run, was in (m,).

    Raises:
        ConfigError: The shapes differ, or a score is NaN.
    """
    values, coins = np.asarray(scores, dtype=np.float64), np.asarray(included)
    if values.ndim != 1 or coins.shape != values.shape or coins.dtype != np.bool_:
        raise ConfigError(
            f"scores should be (m,) and included (m,) bool, got {values.shape} and {coins.shape} {coins.dtype}"
        )
    if np.isnan(values).any():
        raise ConfigError(f"{int(np.isnan(values).sum())} of {values.size} scores are NaN; did training diverge?")
    return values, coins


def _within(share: float, m: int) -> int:
    return min(max(_FEWEST, int(share * m)), max(1, m // 2))


def _check(m: int, guesses: int, correct: int, delta: float, confidence: float) -> None:
    if not 0 <= correct <= guesses <= m or guesses < 1:
        raise ConfigError(f"need 0 <= correct <= guesses <= m and a guess, got {correct}, {guesses} and {m}")
    if not 0 <= delta < 1 or not 0.5 <= confidence < 1:
        raise ConfigError(f"delta should be in [0, 1) and confidence in [0.5, 1), got {delta} and {confidence}")


def _at_least(v: Any, n: int, p: float) -> Any:
    """P[Binomial(n, p) >= v], v at most n."""
    return np.where(np.equal(v, 0), 1.0, bdtrc(np.maximum(np.subtract(v, 1), 0), n, p))


def _rejects(mu: float, m: int, guesses: int, correct: int, alpha: float) -> bool:
    """Whether mu-Gaussian-DP, for which right guesses of probability r need wrong ones of F(r) = Phi(Phi^-1(r) - mu).

    r and h are the shares of canaries guessed right and wrong in the part of the outcomes where i guesses are right.
    """
    r, h, all_guesses = alpha * correct / m, alpha * (guesses - correct) / m, guesses / m
    for i in range(correct - 1, -1, -1):
        wrong = float(ndtr(float(ndtri(r)) - mu))
        if wrong <= h:  # then neither changes any more
            break
        r, h = min(1.0, r + i / (guesses - i) * (wrong - h)), wrong
        if r + h > all_guesses:  # both only grow
            return True
    return r + h > all_guesses


def _largest(holds: Callable[[float], bool]) -> float:
    """The largest x from 0, to 1e-6 and rounded down, at which a condition that fails for large x holds; 0 if none."""
    low, high = 0.0, 1.0
    if not holds(low):
        return 0.0
    while holds(high):
        low, high = high, 2 * high
    while high - low > _TOLERANCE:
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
