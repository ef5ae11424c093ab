"""LiRA: is a model's answer on a canary more like that of models that saw it, or of models that did not?

Carlini, Chien, Nasr, Song, Terzis, Tramèr, "Membership Inference Attacks From First Principles", S&P 2022, arXiv
2112.03570, algorithm 1, and its offline form. Shadow models, trained as the target on random halves of the canaries,
give two Gaussians of ``log_odds`` for each canary. Where the target is a student, a shadow model is a whole pipeline,
from teacher to student.

Decided here: medians for the means, as in the authors' code; with fewer than 64 shadow models one variance for all
canaries, of the deviations from each canary's own median (the authors' code pools the canaries' medians in, too, and
takes the variance of the canaries left out from those included). Their sign is turned: **a lower score is more
memorised**, as everywhere in this room.

**What a score is not:** a likelihood ratio of two fitted Gaussians is no bound on epsilon; it is one more score, for
``audit_attack``, or for ``privacy.audits.one_run`` and a lower bound. Shadow models see canaries by coins of their own,
never the target's.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import log_ndtr, logsumexp

from fedkd.errors import ConfigError
from privacy.audits.membership import AuditResult, audit_scores, tpr_at_fpr

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

_OWN_VARIANCE = 64  # shadow models from which each canary has a variance of its own, as in the paper
_MIN_OUT = 1000  # excluded canaries from which a false positive rate of 0.1 % is one canary or more


def log_odds(logits: npt.ArrayLike, labels: npt.ArrayLike) -> Floats:
    """Return log p_y - log sum over j != y of p_j, from logits, without the rounding of a softmax that saturates.

    Args:
        logits: (m, classes) logits of one model, at least two classes.
        labels: (m,) whole numbers from 0 to classes - 1: the label that each canary was planted with.

    Returns:
        (m,) log-odds in nats; higher is more memorised.

    Raises:
        ConfigError: Shapes do not fit, a logit is not finite or a label is outside its range.

    Example:
        >>> log_odds(np.log([[0.7, 0.2, 0.1]]), [0]).round(4).tolist()
        [0.8473]
    """
    z, y = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    if z.ndim != 2 or z.shape[1] < 2 or y.shape != z.shape[:1] or not np.issubdtype(y.dtype, np.integer):
        raise ConfigError(
            f"logits should be (m, classes) and labels (m,) whole numbers, got {z.shape} and {y.shape} {y.dtype}"
        )
    if not np.isfinite(z).all():
        raise ConfigError(f"{int((~np.isfinite(z)).sum())} of {z.size} logits are not finite; did training diverge?")
    if y.size and not 0 <= y.min() <= y.max() < z.shape[1]:
        raise ConfigError(f"labels should be from 0 to {z.shape[1] - 1}, got {y.min()} to {y.max()}")
    own = np.arange(z.shape[1]) == y[:, None]
    return np.asarray(z[own] - logsumexp(np.where(own, -np.inf, z), axis=1))


def lira_online(
    target: npt.ArrayLike, shadows: npt.ArrayLike, included: npt.ArrayLike, own_variance: bool | None = None
) -> Floats:
    """Return log N_out - log N_in of each canary: how much likelier its log-odds are if the target did not see it.

    Args:
        target: (m,) log-odds under the model attacked.
        shadows: (s, m) log-odds under the shadow models.
        included: (s, m) bool, which canaries each shadow model saw; each canary was seen by some and not by others.
        own_variance: Whether each canary has a variance of its own; None: from 64 shadow models.

    Returns:
        (m,) scores in nats, lower is more memorised; below 0 where seen is likelier.

    Raises:
        ConfigError: Shapes do not fit, a value is not finite, a canary lacks shadow models that saw it, or that did
            not, or these agree to the last digit, so that there is no variance.

    Example:
        >>> shadows = [[3.0, 3.2], [2.8, 1.1], [1.2, 3.0], [0.9, 0.8]]
        >>> included = [[True, True], [True, False], [False, True], [False, False]]
        >>> lira_online([3.0, 1.0], shadows, included).round(1).tolist()
        [-84.4, 220.0]
    """
    phi, values, seen = _shadow_scores(target, shadows, included)
    own = len(values) >= _OWN_VARIANCE if own_variance is None else own_variance
    return _log_density(phi, *_fit(values, ~seen, own, "did not see")) - _log_density(
        phi, *_fit(values, seen, own, "saw")
    )


def lira_offline(
    target: npt.ArrayLike,
    shadows: npt.ArrayLike,
    included: npt.ArrayLike | None = None,
    own_variance: bool | None = None,
) -> Floats:
    """Return log P[Z > log-odds], Z from models that did not see the canary: small where no such model knows it so.

    Args:
        target: (m,) log-odds under the model attacked.
        shadows: (s, m) log-odds under the shadow models.
        included: (s, m) bool, which canaries each shadow model saw: those are not used. None: none.
        own_variance: As ``lira_online``.

    Returns:
        (m,) scores in nats, lower is more memorised; at most 0.

    Raises:
        ConfigError: As ``lira_online``, but no shadow model need have seen anything.
    """
    phi, values, seen = _shadow_scores(
        target, shadows, np.zeros(np.shape(shadows), bool) if included is None else included
    )
    own = len(values) >= _OWN_VARIANCE if own_variance is None else own_variance
    mean, std = _fit(values, ~seen, own, "did not see")
    return np.asarray(log_ndtr((mean - phi) / std))


@dataclass(frozen=True)
class AttackResult:
    """What an attack with a score of its own gets out of one target.

    Attributes:
        attack: Which, for example ``"LiRA, offline, 16 shadow models"``.
        audit: AUROC with its null band, and the rest.
        tpr_at_1_percent: Share of included canaries found at a false positive rate of 1 %; with fewer than 100 excluded
            canaries, without any false positive. The threshold is the best on these scores: an attack, no bound.
        tpr_at_01_percent: The same at 0.1 %; None with fewer than 1000 excluded canaries.
    """

    attack: str
    audit: AuditResult
    tpr_at_1_percent: float
    tpr_at_01_percent: float | None

    @property
    def leaks(self) -> bool:
        """Whether the AUROC lies above its null band; on a model that leaks nothing, true for at most about 2.5 %."""
        return self.audit.leaks

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return asdict(self)


def audit_attack(
    attack: str, target: str, leaves: bool, scores: npt.ArrayLike, included: npt.ArrayLike, seed: int
) -> AttackResult:
    """Judge the scores of LiRA, RMIA or another attack on one target.

    Args:
        attack: Which attack.
        target: Which model or message.
        leaves: Whether the target leaves the client.
        scores: (m,) scores, lower is more memorised.
        included: (m,) bool, whether the target saw each canary.
        seed: Seed of the bootstrap.

    Raises:
        ConfigError: A score is NaN, the shapes differ, or all canaries (or none) were included.

    Example:
        >>> found = audit_attack("loss", "student", True, [0.1, 0.2, 3.0, 0.15], [True, True, False, False], seed=0)
        >>> found.audit.auroc, found.tpr_at_1_percent, found.tpr_at_01_percent
        (0.75, 0.5, None)
    """
    audit = audit_scores(target, leaves, scores, included, seed)
    values, coins = np.asarray(scores, dtype=np.float64), np.asarray(included)
    members, others = values[coins], values[~coins]
    return AttackResult(
        attack=attack,
        audit=audit,
        tpr_at_1_percent=tpr_at_fpr(members, others, 0.01),
        tpr_at_01_percent=tpr_at_fpr(members, others, 0.001) if others.size >= _MIN_OUT else None,
    )


def _shadow_scores(
    target: npt.ArrayLike, shadows: npt.ArrayLike, included: npt.ArrayLike
) -> tuple[Floats, Floats, Bools]:
    phi, values, seen = (
        np.asarray(target, dtype=np.float64),
        np.asarray(shadows, dtype=np.float64),
        np.asarray(included),
    )
    if phi.ndim != 1 or values.ndim != 2 or values.shape[1:] != phi.shape or len(values) == 0:
        raise ConfigError(f"target should be (m,) and shadows (s, m), s at least 1, got {phi.shape} and {values.shape}")
    if seen.shape != values.shape or seen.dtype != np.bool_:
        raise ConfigError(f"included should be {values.shape} bool, got {seen.shape} {seen.dtype}")
    broken = int((~np.isfinite(phi)).sum() + (~np.isfinite(values)).sum())
    if broken:
        raise ConfigError(f"{broken} of {phi.size + values.size} log-odds are not finite; did training diverge?")
    return phi, values, seen


def _fit(values: Floats, used: Bools, own_variance: bool, which: str) -> tuple[Floats, Floats]:
    """Median (m,) and standard deviation (m,) of each canary's log-odds under the shadow models used (s, m)."""
    without = np.nonzero(~used.any(axis=0))[0]
    if without.size:
        raise ConfigError(
            f"no shadow model {which} {without.size} of {values.shape[1]} canaries, first {without[0]}; train more"
        )
    kept = np.where(used, values, np.nan)
    mean = np.nanmedian(kept, axis=0)
    std = np.nanstd(kept, axis=0) if own_variance else np.full(mean.shape, np.nanstd(kept - mean))
    if not (std > 0).all():
        raise ConfigError(
            f"the shadow models that {which} canary {int(np.argmin(std))} agree and leave no variance; train more"
        )
    return mean, std


def _log_density(x: Floats, mean: Floats, std: Floats) -> Floats:
    """Log of the normal density, less a constant."""
    return np.asarray(-(((x - mean) / std) ** 2) / 2 - np.log(std))
