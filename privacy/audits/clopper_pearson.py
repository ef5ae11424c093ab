"""Audit by repetition: a lower bound on epsilon from independent training runs, with or without the canary.

A threshold on the score accuses a run of having seen the canary. (epsilon, delta)-DP bounds how much more often it may
accuse runs that have than runs that have not (Kairouz, Oh, Viswanath 2015); upper ends of the two error rates, exact
binomial ones (Clopper and Pearson 1934), give the bound (Nasr et al., "Adversary Instantiation: Lower Bounds for
Differentially Private Machine Learning", S&P 2021, arXiv 2101.04535).

**The scores must be independent**: one canary and a training run for each score. Over the canaries of one run they
share the model, the binomial does not hold, and the figure is a heuristic: the result says so. (For one run there is
``privacy.audits.one_run``.) **The threshold must not have seen the scores**: it is fixed beforehand, or chosen on one
half of the runs and used on the other, or several fixed ones share the error probability.

A lower score is more memorised. **What a bound is not:** a low one is no proof of privacy, for n runs of each kind
certify no more than a perfect attack does: 0.81 for ten, 3.28 for a hundred.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from scipy.special import betaincinv, ndtri

from fedkd.errors import ConfigError
from privacy.audits.one_run import gaussian_epsilon, scored


@dataclass(frozen=True)
class RepeatedRunsResult:
    """A lower bound on epsilon from repeated training.

    Attributes:
        epsilon: Lower bound; 0 says that nothing was certified.
        delta: The delta that it goes with.
        confidence: Probability that the bound holds.
        threshold: Scores below it are accused.
        thresholds: How many thresholds share the error probability.
        true_positives: Accused runs with the canary.
        n_in: Runs with the canary that were judged.
        false_positives: Accused runs without it.
        n_out: Runs without the canary that were judged.
        independent_runs: Whether the caller says that each score is of a training run of its own.
    """

    method: ClassVar[str] = "Clopper-Pearson"

    epsilon: float
    delta: float
    confidence: float
    threshold: float
    thresholds: int
    true_positives: int
    n_in: int
    false_positives: int
    n_out: int
    independent_runs: bool

    @property
    def m(self) -> int:
        """Number of scores that were judged."""
        return self.n_in + self.n_out

    @property
    def caveat(self) -> str | None:
        """Return why the figure is a heuristic; None if it is a bound."""
        return None if self.independent_runs else "the scores share a training run, so that they are not independent"

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {**asdict(self), "method": self.method, "caveat": self.caveat}


def repeated_runs_bound(
    scores: npt.ArrayLike,
    included: npt.ArrayLike,
    delta: float,
    threshold: float | Sequence[float],
    *,
    independent_runs: bool,
    confidence: float = 0.95,
) -> RepeatedRunsResult:
    """Return the lower bound on epsilon that thresholds fixed beforehand give.

    Args:
        scores: (n,) score of the canary in each run, lower is more memorised.
        included: (n,) bool, whether the run's training data held the canary.
        delta: The delta that epsilon goes with, in [0, 1).
        threshold: Scores below it are accused. Several are all tried, each at its share of the error probability.
        independent_runs: Whether each score is of a training run of its own.
        confidence: Probability that the bound holds, in [0.5, 1).

    Raises:
        ConfigError: A score is NaN, the shapes differ, a side is empty, there is no threshold, or a number is outside
            its range.

    Example:
        >>> found = repeated_runs_bound([0.1] * 10 + [0.9] * 10, [True] * 10 + [False] * 10, 1e-5, 0.5,
        ...                             independent_runs=True)
        >>> found.true_positives, found.false_positives, round(found.epsilon, 3)
        (10, 0, 0.807)
    """
    values, runs = scored(scores, included)
    each = [float(one) for one in np.atleast_1d(np.asarray(threshold, dtype=np.float64))]
    if not each or any(math.isnan(one) for one in each):
        raise ConfigError(f"threshold should be a number, or several, got {threshold!r}")
    n_in, n_out = int(runs.sum()), int((~runs).sum())
    share = 1 - (1 - confidence) / len(each)
    counts = [(int((values[runs] < one).sum()), int((values[~runs] < one).sum())) for one in each]
    epsilons = [epsilon_from_counts(tp, n_in, fp, n_out, delta, share) for tp, fp in counts]
    best = int(np.argmax(epsilons))
    return RepeatedRunsResult(
        epsilon=epsilons[best],
        delta=delta,
        confidence=confidence,
        threshold=each[best],
        thresholds=len(each),
        true_positives=counts[best][0],
        n_in=n_in,
        false_positives=counts[best][1],
        n_out=n_out,
        independent_runs=bool(independent_runs),
    )


def split_runs_bound(
    scores: npt.ArrayLike,
    included: npt.ArrayLike,
    delta: float,
    rng: np.random.Generator,
    *,
    independent_runs: bool,
    confidence: float = 0.95,
) -> RepeatedRunsResult:
    """Return the lower bound of the threshold that is best on a random half of the runs, judged on the other half.

    Args:
        scores: As ``repeated_runs_bound``.
        included: As ``repeated_runs_bound``; at least two runs of either kind.
        delta: As ``repeated_runs_bound``.
        rng: Source of the split.
        independent_runs: As ``repeated_runs_bound``.
        confidence: As ``repeated_runs_bound``.

    Raises:
        ConfigError: As ``repeated_runs_bound``, or there is but one run of a kind.
    """
    values, runs = scored(scores, included)
    if min(runs.sum(), (~runs).sum()) < 2:
        raise ConfigError(f"a split needs two runs of either kind, got {runs.sum()} and {(~runs).sum()}; train more")
    choosing = np.zeros(values.size, dtype=bool)
    for kind in (np.nonzero(runs)[0], np.nonzero(~runs)[0]):
        choosing[rng.permutation(kind)[: kind.size // 2]] = True
    found = [
        repeated_runs_bound(
            values[choosing], runs[choosing], delta, one, independent_runs=independent_runs, confidence=confidence
        )
        for one in np.unique(values[choosing])
    ]
    best = max(found, key=lambda one: (one.epsilon, one.true_positives / one.n_in - one.false_positives / one.n_out))
    return repeated_runs_bound(
        values[~choosing],
        runs[~choosing],
        delta,
        best.threshold,
        independent_runs=independent_runs,
        confidence=confidence,
    )


def epsilon_from_counts(tp: int, n_in: int, fp: int, n_out: int, delta: float, confidence: float = 0.95) -> float:
    """Return the lower bound on epsilon from counts at one threshold that was fixed beforehand.

    The larger of ln((1 - delta - FNR) / FPR) and ln((1 - delta - FPR) / FNR), at the upper ends of both rates, each
    wrong with probability (1 - confidence) / 2; at least 0.

    Args:
        tp: Accused runs with the canary.
        n_in: Runs with the canary, at least 1.
        fp: Accused runs without it.
        n_out: Runs without it, at least 1.
        delta: In [0, 1).
        confidence: Probability that the bound holds, in [0.5, 1).

    Raises:
        ConfigError: A number is outside its range.

    Example:
        >>> round(epsilon_from_counts(500, 500, 0, 500, 1e-5), 3)
        4.906
    """
    fnr, fpr = _upper_rates(tp, n_in, fp, n_out, delta, confidence)
    ratio = max((1 - delta - fnr) / fpr, (1 - delta - fpr) / fnr)
    return math.log(max(1.0, ratio))


def gaussian_epsilon_from_counts(
    tp: int, n_in: int, fp: int, n_out: int, delta: float, confidence: float = 0.95
) -> tuple[float, float]:
    """Return (mu, epsilon) from the same counts if the training is mu-Gaussian-DP for some mu.

    **No headline.** One point of the trade-off curve stands for all of it, so that 400 of 500 against 100 of 500 become
    an epsilon of 6.64 where ``epsilon_from_counts`` certifies 1.16. Only for a mechanism that is a Gaussian, to compare
    its noise with the claimed noise.

    Args:
        tp: As ``epsilon_from_counts``.
        n_in: As ``epsilon_from_counts``.
        fp: As ``epsilon_from_counts``.
        n_out: As ``epsilon_from_counts``.
        delta: In (0, 1).
        confidence: As ``epsilon_from_counts``.

    Raises:
        ConfigError: A number is outside its range.
    """
    if delta == 0:
        raise ConfigError("a Gaussian trade-off has no epsilon at delta 0, got delta 0; give one above 0")
    fnr, fpr = _upper_rates(tp, n_in, fp, n_out, delta, confidence)
    mu = max(0.0, -float(ndtri(fpr)) - float(ndtri(fnr)))
    return mu, gaussian_epsilon(mu, delta)


def _upper_rates(tp: int, n_in: int, fp: int, n_out: int, delta: float, confidence: float) -> tuple[float, float]:
    """Upper ends of the false negative and false positive rates, each wrong with half the error probability."""
    if not (0 <= tp <= n_in and 0 <= fp <= n_out and n_in > 0 and n_out > 0):
        raise ConfigError(f"need counts within runs of both kinds, got {tp} of {n_in} and {fp} of {n_out}")
    if not 0 <= delta < 1 or not 0.5 <= confidence < 1:
        raise ConfigError(f"delta should be in [0, 1) and confidence in [0.5, 1), got {delta} and {confidence}")
    each = (1 + confidence) / 2
    return _upper(n_in - tp, n_in, each), _upper(fp, n_out, each)


def _upper(k: int, n: int, level: float) -> float:
    return 1.0 if k == n else float(betaincinv(k + 1, n - k, level))
