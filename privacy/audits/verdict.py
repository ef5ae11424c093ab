"""Verdict: what is claimed of a target, what an audit certified, and what that audit could have certified.

A claim is an upper bound on epsilon, an audit a lower bound at the same delta: above the claim, it contradicts it. **An
audit below the claim proves nothing**, for an attack may be weak and canaries few. How few is ``power``: what the same
audit certifies, on average, of a Gaussian mechanism whose epsilon is known, when the attack sees all that it outputs.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

from fedkd.errors import ConfigError
from fedkd.seeds import generator
from privacy.audits.clopper_pearson import RepeatedRunsResult, epsilon_from_counts
from privacy.audits.one_run import (
    Guesses,
    OneRunResult,
    chosen,
    epsilon_bound,
    gaussian_epsilon_bound,
    gaussian_mu,
    right_guesses,
)

Estimator = Literal["one run", "one run, assuming Gaussian", "Clopper-Pearson"]
Outcome = Literal["contradicted", "consistent", "nothing claimed"]

_TYPICAL = 8.0  # the epsilon whose power is shown where none is claimed
_SCORES = 200_000  # to draw for one power, in 25 to 200 audits


@dataclass(frozen=True)
class Power:
    """What an audit certifies when the true epsilon is known.

    Attributes:
        estimator: Which audit.
        epsilon: The true epsilon, of a Gaussian mechanism.
        m: Number of canaries of one run, or of runs.
        delta: The delta that both epsilons go with.
        confidence: Of the audit.
        mean: Mean certified epsilon.
        sd: Its standard deviation from audit to audit.
        low: What nine audits in ten certify, or more.
        detected: Share of audits that certify anything above 0.
    """

    estimator: Estimator
    epsilon: float
    m: int
    delta: float
    confidence: float
    mean: float
    sd: float
    low: float
    detected: float

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return asdict(self)


def power(
    estimator: Estimator,
    epsilon: float,
    m: int,
    *,
    delta: float = 1e-5,
    confidence: float = 0.95,
    k: Guesses = None,
) -> Power:
    """Return what an audit certifies of a Gaussian mechanism with a known epsilon, by simulation.

    The attack sees the whole output: a score is N(-mu, 1) if the canary is in, N(0, 1) if not. Coins are fair. Repeated
    runs are judged by the one threshold that is best for this epsilon. 25 to 200 audits are drawn, always the same, so
    that the mean errs by sd / 5 to sd / 14. The first call takes a few tenths of a second at most (10,000 canaries),
    the same again nothing.

    Args:
        estimator: The ``method`` of an audit's result.
        epsilon: The true epsilon, from 0.
        m: Number of canaries of one run, or of runs; at least 2.
        delta: In (0, 1).
        confidence: Of the audit, in [0.5, 1).
        k: As in ``privacy.audits.one_run``.

    Raises:
        ConfigError: A number is outside its range, or there is no such estimator.

    Example:
        >>> power("one run", 8.0, 20).detected > 0.2 > power("one run", 1.0, 20).detected
        True
    """
    if estimator not in get_args(Estimator):
        raise ConfigError(f"estimator should be one of {', '.join(get_args(Estimator))}, got {estimator!r}")
    if not 0 <= epsilon < math.inf or not 0 < delta < 1:
        raise ConfigError(f"power needs a finite epsilon from 0 and 0 < delta < 1, got {epsilon} and {delta}")
    return _power(estimator, float(epsilon), m, delta, confidence, chosen(m, k))


@dataclass(frozen=True)
class Verdict:
    """One line on one target.

    Attributes:
        target: Which model or message.
        claimed: Upper bound on its epsilon at ``delta``; None if none is claimed.
        audited: Lower bound that the audit certified.
        method: How.
        delta: The delta that both go with.
        confidence: Probability that the lower bound holds.
        m: Number of canaries, or of runs.
        power: What the audit certifies, on average, of a known epsilon.
    """

    target: str
    claimed: float | None
    audited: float
    method: str
    delta: float
    confidence: float
    m: int
    power: Power

    @property
    def outcome(self) -> Outcome:
        """Whether the audit contradicts the claim. "Consistent" is not "proved"."""
        if self.claimed is None:
            return "nothing claimed"
        return "contradicted" if self.audited > self.claimed else "consistent"

    def __str__(self) -> str:
        """Return one sentence, with what the audit could have seen."""
        claim = "no epsilon claimed" if self.claimed is None else f"epsilon at most {self.claimed:.2f} claimed"
        found = f"at least {self.audited:.2f} certified" if self.audited > 0 else "nothing certified"
        what = "runs" if self.method == "Clopper-Pearson" else "canaries"
        end = {
            "contradicted": "the claim is contradicted",
            "consistent": "consistent, which proves no privacy",
            "nothing claimed": "a low figure would prove no privacy",
        }[self.outcome]
        return (
            f"{self.target}: {claim}, {found} by audit ({self.method}, {self.m} {what}, {100 * self.confidence:g}%, "
            f"delta {self.delta:g}); an epsilon of {self.power.epsilon:.2f} would be certified as "
            f"{self.power.mean:.2f} on average: {end}."
        )

    def to_json(self) -> dict[str, Any]:
        """Return the verdict as JSON values."""
        return {**asdict(self), "outcome": self.outcome, "sentence": str(self)}


def judge(target: str, claimed: float | None, audit: OneRunResult | RepeatedRunsResult) -> Verdict:
    """Set an audit against a claim about the same unit.

    A claim about records is audited by canaries that are one record each, and occur once: several copies audit a group.
    Of twenty targets audited at 95 %, one may contradict a true claim by chance.

    Args:
        target: Which model or message.
        claimed: Upper bound on its epsilon at the audit's delta, or at a smaller one; None if none is claimed.
        audit: A bound that holds of any training.

    Raises:
        ConfigError: The audit is no such bound (its ``caveat`` says why), for a heuristic can contradict nothing; or
            the claim is no finite number from 0, or the audit's delta is 0, where a Gaussian has no epsilon.

    Example:
        >>> from privacy.audits.one_run import one_run_bound
        >>> coins = np.arange(100) % 3 > 0
        >>> leak = one_run_bound(np.where(coins, 0.0, 1.0), coins, 1e-5, fair_coins=True)
        >>> judge("student", 1.0, leak).outcome, judge("student", 4.0, leak).outcome
        ('contradicted', 'consistent')
    """
    if audit.caveat is not None:
        raise ConfigError(
            f"{target}: a verdict needs a bound, got a heuristic ({audit.method}): {audit.caveat}; report it apart"
        )
    if claimed is not None and not 0 <= claimed < math.inf:
        raise ConfigError(f"{target}: a claimed epsilon should be finite and from 0, got {claimed}; None is no claim")
    if audit.delta == 0:
        raise ConfigError(f"{target}: got an audit at delta 0; audit at a small delta, where a claim at 0 holds, too")
    k = [one // 2 for one in audit.tried] if isinstance(audit, OneRunResult) else None
    method: Estimator = "one run" if isinstance(audit, OneRunResult) else "Clopper-Pearson"
    return Verdict(
        target=target,
        claimed=claimed,
        audited=audit.epsilon,
        method=audit.method,
        delta=audit.delta,
        confidence=audit.confidence,
        m=audit.m,
        power=power(
            method,
            _TYPICAL if claimed is None else claimed,
            audit.m,
            delta=audit.delta,
            confidence=audit.confidence,
            k=k,
        ),
    )


@lru_cache(maxsize=256)
def _power(estimator: Estimator, epsilon: float, m: int, delta: float, confidence: float, k: tuple[int, ...]) -> Power:
    mu, rng = gaussian_mu(epsilon, delta), generator(0, f"audit power {m}")
    threshold = _best_threshold(mu, m, delta, confidence) if estimator == "Clopper-Pearson" else 0.0
    draws = min(200, max(25, _SCORES // m))
    certified = np.empty(draws)
    share = 1 - (1 - confidence) / len(k)
    for i in range(draws):
        coins = rng.random(m) < 0.5
        scores = rng.normal(size=m) - mu * coins
        if estimator == "Clopper-Pearson":
            certified[i] = _repeated(scores < threshold, coins, delta, confidence)
        else:
            bound = epsilon_bound if estimator == "one run" else gaussian_epsilon_bound
            counts = right_guesses(scores, coins, k)
            certified[i] = max(bound(m, 2 * one, v, delta, share) for one, v in zip(k, counts, strict=True))
    return Power(
        estimator=estimator,
        epsilon=epsilon,
        m=m,
        delta=delta,
        confidence=confidence,
        mean=float(certified.mean()),
        sd=float(certified.std()),
        low=float(np.quantile(certified, 0.1)),
        detected=float((certified > 0).mean()),
    )


def _best_threshold(mu: float, m: int, delta: float, confidence: float) -> float:
    """The threshold that certifies most at the expected counts of m runs, half of them with the canary."""
    n, grid = m // 2, np.linspace(-mu - 3, 3, 61)
    counts = [(round(n * float(ndtr(one + mu))), round(n * float(ndtr(one)))) for one in grid]
    return float(grid[np.argmax([epsilon_from_counts(tp, n, fp, n, delta, confidence) for tp, fp in counts])])


def _repeated(accused: npt.NDArray[np.bool_], coins: npt.NDArray[np.bool_], delta: float, confidence: float) -> float:
    n_in = int(coins.sum())
    if not 0 < n_in < coins.size:
        return 0.0
    tp, fp = int((accused & coins).sum()), int((accused & ~coins).sum())
    return epsilon_from_counts(tp, n_in, fp, coins.size - n_in, delta, confidence)
