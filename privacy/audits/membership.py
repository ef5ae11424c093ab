"""Membership: can an outsider tell which canaries were in the training data?

Canaries are included by independent fair coins; each model is then scored on all of them. If nothing leaks, included
and excluded canaries are exchangeable, whatever the model, so the null distribution of the AUROC is known exactly: that
of the Mann-Whitney statistic (Mann and Whitney 1947; AUROC = U / (n_in n_out)). The band that an AUROC must leave to
count as a leak comes from it, not from a rule of thumb.

A lower score is more memorised, throughout; AUROC above 0.5 is a leak. **What a result is not:** an AUROC inside the
band is no proof of privacy (few canaries see only gross leaks), and no epsilon follows from it. Looking at several
models, and raising the alarm when any of them leaves its band, multiplies false alarms by their number.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, ndtri

from fedkd.errors import ConfigError
from fedkd.seeds import generator
from privacy.audits.exposure import exposure_interpolated, null_mean

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_EXACT_PAIRS = 10_000  # pairs up to which the exact null distribution takes under 0.1 s; the normal is good beyond
_RESAMPLES = 1000


@dataclass(frozen=True)
class AuditResult:
    """What one model gives away about its canaries.

    Attributes:
        target: Which model, for example ``"teacher of client 3"``.
        leaves_client: Whether the model, or its answers, leave the client; a leak in a model that stays at home is a
            warning, not a breach.
        auroc: Probability that an included canary scores lower than an excluded one; ties count half.
        auroc_low: Lower end of the 95 % bootstrap interval.
        auroc_high: Upper end of the 95 % bootstrap interval.
        null_low: Lower end of the interval that holds the AUROC, 95 % of the time, when nothing leaks.
        null_high: Upper end of that interval.
        p_value: Probability of an AUROC at least this high when nothing leaks (one-sided).
        exposure_mean: Mean exposure of the included canaries in bits, the excluded ones being the references.
        exposure_chance: Its expectation in bits when nothing leaks.
        n_in: Number of included canaries.
        n_out: Number of excluded canaries.
    """

    target: str
    leaves_client: bool
    auroc: float
    auroc_low: float
    auroc_high: float
    null_low: float
    null_high: float
    p_value: float
    exposure_mean: float
    exposure_chance: float
    n_in: int
    n_out: int

    @property
    def leaks(self) -> bool:
        """Whether the AUROC lies above its null band; on a model that leaks nothing, true for at most about 2.5 %."""
        return self.auroc > self.null_high

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return asdict(self)


def audit_scores(target: str, leaves: bool, scores: npt.ArrayLike, included: npt.ArrayLike, seed: int) -> AuditResult:
    """Audit one model.

    Args:
        target: Which model.
        leaves: Whether the model, or its answers, leave the client.
        scores: (m,) cross-entropy of each canary's wrong label under the model, in nats; lower is more memorised.
        included: (m,) bool, whether each canary was in the training data.
        seed: Seed of the bootstrap; the same for the same run, so that results repeat.

    Raises:
        ConfigError: A score is NaN, the shapes differ, or all canaries (or none) were included.

    Example:
        >>> result = audit_scores("student", True, [0.1, 0.2, 3.0, 2.0], [True, True, False, False], seed=0)
        >>> result.auroc, result.n_in, result.n_out
        (1.0, 2, 2)
    """
    values, coins = np.asarray(scores, dtype=np.float64), np.asarray(included)
    if values.ndim != 1 or coins.shape != values.shape or coins.dtype != np.bool_:
        raise ConfigError(
            f"{target}: scores should be (m,) and included (m,) bool, "
            f"got {values.shape} and {coins.shape} {coins.dtype}"
        )
    members, others = _both(values[coins], values[~coins], target)
    low, high = bootstrap_interval(members, others, seed)
    null_low, null_high = null_band(members.size, others.size)
    return AuditResult(
        target=target,
        leaves_client=bool(leaves),
        auroc=auroc(members, others),
        auroc_low=low,
        auroc_high=high,
        null_low=null_low,
        null_high=null_high,
        p_value=p_value(members, others),
        exposure_mean=float(exposure_interpolated(members, others).mean()),
        exposure_chance=null_mean(others.size),
        n_in=members.size,
        n_out=others.size,
    )


def auroc(member_scores: npt.ArrayLike, non_member_scores: npt.ArrayLike) -> float:
    """Return the probability that a member scores lower than a non-member, ties counting half.

    Args:
        member_scores: (n_in,) scores, lower is more memorised.
        non_member_scores: (n_out,) scores.

    Raises:
        ConfigError: A side is empty or holds NaN.

    Example:
        >>> auroc([1.0, 2.0], [2.0, 3.0])
        0.875
    """
    inside, outside = _counts(*_both(member_scores, non_member_scores))
    return float(_double_u(inside, outside)) / (2 * int(inside.sum()) * int(outside.sum()))


def p_value(member_scores: npt.ArrayLike, non_member_scores: npt.ArrayLike) -> float:
    """Return the one-sided Mann-Whitney p-value: how often chance gives an AUROC at least this high.

    Exact without ties and up to 10,000 pairs (then valid: P(p <= a) <= a); else the normal approximation with tie and
    continuity corrections.

    Args:
        member_scores: (n_in,) scores, lower is more memorised.
        non_member_scores: (n_out,) scores.

    Raises:
        ConfigError: A side is empty or holds NaN.
    """
    inside, outside = _counts(*_both(member_scores, non_member_scores))
    n_in, n_out, u = int(inside.sum()), int(outside.sum()), int(_double_u(inside, outside)) / 2
    tied = inside + outside
    if n_in * n_out <= _EXACT_PAIRS and int(tied.max()) == 1:
        return min(1.0, float(_null_pmf(n_in, n_out)[int(u) :].sum()))
    sd = math.sqrt(_null_variance(n_in, n_out, tied))
    return float(ndtr((n_in * n_out / 2 + 0.5 - u) / sd)) if sd > 0 else 1.0


def null_band(n_in: int, n_out: int, level: float = 0.95) -> tuple[float, float]:
    """Return the interval that holds the AUROC with probability ``level`` or more when nothing leaks.

    Exact up to 10,000 pairs, rounded outwards: with few canaries (three of each, at 95 %) it is all of [0, 1] and no
    alarm is possible. The normal approximation beyond. Ties make the AUROC vary less, hence alarms rarer.

    Args:
        n_in: Number of included canaries, at least 1.
        n_out: Number of excluded canaries, at least 1.
        level: Probability of the interval, in (0, 1); the rest is split evenly over both ends.

    Raises:
        ConfigError: An argument is outside its range.

    Example:
        >>> null_band(10, 10)
        (0.24, 0.76)
    """
    if n_in < 1 or n_out < 1 or not 0 < level < 1:
        raise ConfigError(f"null_band needs n_in, n_out >= 1 and 0 < level < 1, got {n_in}, {n_out}, {level}")
    pairs, tail = n_in * n_out, (1 - level) / 2
    if pairs <= _EXACT_PAIRS:
        below = np.cumsum(_null_pmf(n_in, n_out))  # below[k] = P(U <= k)
        least = int(np.searchsorted(below, tail, side="right"))  # the least k with P(U <= k) > tail
        return least / pairs, (pairs - least) / pairs  # rounded as `auroc` is: an AUROC on the end is inside
    half = -float(ndtri(tail)) * math.sqrt(_null_variance(n_in, n_out)) / pairs
    return max(0.0, 0.5 - half), min(1.0, 0.5 + half)


def bootstrap_interval(
    member_scores: npt.ArrayLike, non_member_scores: npt.ArrayLike, seed: int, level: float = 0.95
) -> tuple[float, float]:
    """Return a percentile bootstrap interval for the AUROC, members and non-members being resampled apart.

    Where the samples are perfectly separated every resample is, too, and the bootstrap would claim certainty. The end
    that it leaves at 1 (or 0) is then moved to where k = min(n_in, n_out) disjoint pairs, all in the right order, would
    still be seen with half the remaining probability: A ** k = (1 - level) / 2.

    Args:
        member_scores: (n_in,) scores, lower is more memorised.
        non_member_scores: (n_out,) scores.
        seed: Seed of the resampling.
        level: Nominal coverage, in (0, 1).

    Raises:
        ConfigError: A side is empty or holds NaN.
    """
    inside, outside = _counts(*_both(member_scores, non_member_scores))
    n_in, n_out = int(inside.sum()), int(outside.sum())
    draw = generator(seed, "audit bootstrap")
    resampled_in = draw.multinomial(n_in, inside / n_in, size=_RESAMPLES)
    resampled_out = draw.multinomial(n_out, outside / n_out, size=_RESAMPLES)
    areas = _double_u(resampled_in, resampled_out) / (2 * n_in * n_out)
    tail = (1 - level) / 2
    low, high = (float(end) for end in np.quantile(areas, [tail, 1 - tail]))
    certain = tail ** (1 / min(n_in, n_out))
    return (min(low, certain) if low == 1 else low), (max(high, 1 - certain) if high == 0 else high)


def tpr_at_fpr(member_scores: npt.ArrayLike, non_member_scores: npt.ArrayLike, fpr: float) -> float:
    """Return the share of members caught by the best threshold that accuses at most a share ``fpr`` of non-members.

    The threshold is chosen on these very scores, so this describes an attack; it is no bound. With fewer than 1 / fpr
    non-members it means "without a single false accusation".

    Args:
        member_scores: (n_in,) scores, lower is more memorised.
        non_member_scores: (n_out,) scores.
        fpr: Largest share of non-members accused, in [0, 1].

    Raises:
        ConfigError: A side is empty or holds NaN, or ``fpr`` is outside its range.

    Example:
        >>> tpr_at_fpr([0.0, 1.0, 2.0, 9.0], [1.5, 3.0, 4.0, 5.0], 0.25)
        0.75
    """
    if not 0 <= fpr <= 1:
        raise ConfigError(f"fpr should be in [0, 1], got {fpr!r}")
    members, others = _both(member_scores, non_member_scores)
    accused = math.floor(fpr * others.size + 1e-9)  # 0.29 * 100 is 28.999999999999996
    if accused == others.size:
        return 1.0
    # Strictly below the first non-member who must go free: a tie frees the member, too.
    return float(np.mean(members < np.sort(others)[accused]))


# --- The Mann-Whitney statistic --------------------------------------------------------------------------------------


def _both(member_scores: npt.ArrayLike, non_member_scores: npt.ArrayLike, who: str = "audit") -> tuple[Floats, Floats]:
    members, others = (np.asarray(side, dtype=np.float64).ravel() for side in (member_scores, non_member_scores))
    if members.size == 0 or others.size == 0:
        raise ConfigError(
            f"{who}: needs included and excluded canaries, got {members.size} and {others.size}; plant more canaries"
        )
    broken = int(np.isnan(members).sum() + np.isnan(others).sum())
    if broken:
        raise ConfigError(f"{who}: {broken} of {members.size + others.size} scores are NaN; did training diverge?")
    return members, others


def _counts(members: Floats, others: Floats) -> tuple[Ints, Ints]:
    """Return how many (members, non-members) have each distinct score, in ascending order of score."""
    values, place = np.unique(np.concatenate([members, others]), return_inverse=True)
    inside = np.bincount(place[: members.size], minlength=values.size)
    outside = np.bincount(place[members.size :], minlength=values.size)
    return inside.astype(np.int64), outside.astype(np.int64)


def _double_u(inside: Ints, outside: Ints) -> Ints:
    """Return 2 U from counts (..., values): whole numbers, so no rounding and no order of summation.

    U counts the pairs in which the member scores lower, ties half.
    """
    lower = np.cumsum(inside, axis=-1) - inside
    return np.asarray((outside * (2 * lower + inside)).sum(axis=-1))


@lru_cache(maxsize=64)
def _null_pmf(n_in: int, n_out: int) -> Floats:
    """Return P(U = u), u = 0 to n_in n_out, when all orders are equally likely and nothing ties.

    Mann and Whitney's recurrence on who holds the largest score: a non-member, who is then above all i members, with
    probability j / (i + j); else a member, who is above nobody that counts.
    """
    row = [np.ones(1) for _ in range(n_out + 1)]  # i = 0 members
    for i in range(1, n_in + 1):
        row[0] = np.ones(1)
        for j in range(1, n_out + 1):
            pmf = np.zeros(i * j + 1)
            pmf[i:] += j / (i + j) * row[j - 1]
            pmf[: (i - 1) * j + 1] += i / (i + j) * row[j]
            row[j] = pmf
    result = row[n_out]
    result.flags.writeable = False  # shared by the cache
    return result


def _null_variance(n_in: int, n_out: int, tied: Ints | None = None) -> float:
    """Return the variance of U under the null, given how many scores share each value (None: no ties)."""
    n = n_in + n_out
    ties = 0.0 if tied is None or n < 2 else float((tied.astype(np.float64) ** 3 - tied).sum()) / (n * (n - 1))
    return n_in * n_out / 12 * (n + 1 - ties)
