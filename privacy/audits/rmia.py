"""RMIA: does the target know a canary better than it knows other records of the same kind, more than reference models?

Zarifzadeh, Liu, Shokri, "Low-Cost High-Power Membership Inference Attacks", ICML 2024, arXiv 2312.03262. The
score of a canary x is the share of population records z with

    (p(x) / pr(x)) / (p(z) / pr(z)) > gamma,

p under the target and pr its mean over models at large, half of which would have seen x. One or two reference models
that saw neither x nor z will do: then pr(x) = ((1 + a) p_out(x) + 1 - a) / 2, which takes p_in = a p_out + 1 - a.

Decided here: the offline form only, whatever the reference models saw, so that all canaries are scored alike; and the
share is subtracted from 1, so that **a lower score is more memorised**, as everywhere in this room.

**What a score is not:** a share of records is no probability of membership and no bound on epsilon. Judge the scores
with ``privacy.audits.lira.audit_attack``, or with ``privacy.audits.one_run`` for a lower bound.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy.special import logsumexp

from fedkd.errors import ConfigError

Floats = npt.NDArray[np.float64]


def rmia(
    target: npt.ArrayLike,
    references: npt.ArrayLike,
    target_population: npt.ArrayLike,
    references_population: npt.ArrayLike,
    *,
    included: npt.ArrayLike | None = None,
    a: float = 0.3,
    gamma: float = 1.0,
) -> Floats:
    """Return the share of population records that each canary does not stand out from.

    Args:
        target: (m,) log-probability, in nats, of each canary's label under the model attacked (less its cross-entropy).
        references: (s, m) the same under each of s reference models, at least 1.
        target_population: (n,) the same of records from the canaries' distribution that no model saw.
        references_population: (s, n) the same under the reference models.
        included: (s, m) bool, which canaries each reference model saw: there it is not used. None: none.
        a: How far seeing a record moves its probability from p_out (a = 1) to 1 (a = 0). The paper's 0.3 is for
            CIFAR-10; choose it on another model than the target.
        gamma: How much better than a population record a canary must be known; positive.

    Returns:
        (m,) scores from 0 to 1, in steps of 1 / n; lower is more memorised.

    Raises:
        ConfigError: Shapes do not fit, a log-probability is NaN, infinite or above 0, no reference model is without a
            canary, or ``a`` or ``gamma`` is outside its range.

    Example:
        >>> population = np.log([0.3, 0.4, 0.5, 0.6])
        >>> rmia(np.log([0.9, 0.45]), np.log([[0.4, 0.45]]), population, [population]).tolist()
        [0.0, 0.5]
    """
    if not (0 <= a <= 1 and 0 < gamma < math.inf):
        raise ConfigError(f"a should be in [0, 1] and gamma positive, got {a} and {gamma}")
    p_x, out_x = _log_probabilities("canaries", target, references)
    p_z, out_z = _log_probabilities("population", target_population, references_population)
    unseen = np.ones(out_x.shape, dtype=bool) if included is None else ~np.asarray(included, dtype=bool)
    if unseen.shape != out_x.shape or len(out_z) != len(out_x) or p_z.size == 0:
        raise ConfigError(
            f"references {out_x.shape}, included and the population's {out_z.shape} should fit, got {unseen.shape}"
        )
    without = np.nonzero(~unseen.any(axis=0))[0]
    if without.size:
        raise ConfigError(
            f"all reference models saw {without.size} of {p_x.size} canaries, first {without[0]}; "
            "train one without canaries"
        )
    ratio_x = p_x - _log_mean(out_x, unseen, a)
    ratio_z = np.sort(p_z - _log_mean(out_z, np.ones(out_z.shape, dtype=bool), a))
    beaten = np.searchsorted(ratio_z, ratio_x - math.log(gamma), side="left")
    return np.asarray(1 - beaten / p_z.size)


def _log_mean(out: Floats, used: npt.NDArray[np.bool_], a: float) -> Floats:
    """Log of pr = ((1 + a) p_out + 1 - a) / 2, p_out the mean over the reference models used."""
    p_out = logsumexp(np.where(used, out, -np.inf), axis=0) - np.log(used.sum(axis=0))
    return np.asarray(np.logaddexp(math.log((1 + a) / 2) + p_out, math.log((1 - a) / 2) if a < 1 else -math.inf))


def _log_probabilities(name: str, target: npt.ArrayLike, references: npt.ArrayLike) -> tuple[Floats, Floats]:
    values, others = np.asarray(target, dtype=np.float64), np.asarray(references, dtype=np.float64)
    if values.ndim != 1 or others.ndim != 2 or others.shape[1:] != values.shape or len(others) == 0:
        raise ConfigError(
            f"{name}: target should be (m,) and references (s, m), s at least 1, got {values.shape} and {others.shape}"
        )
    for each in (values, others):
        good = np.isfinite(each) & (each <= 0)
        if not good.all():
            raise ConfigError(f"{name}: log-probabilities should be finite and at most 0, got {each[~good][0]}")
    return values, others
