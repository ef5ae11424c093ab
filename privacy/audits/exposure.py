"""Exposure: how far up the list of guesses an inserted secret stands, in bits.

Carlini, Liu, Erlingsson, Kos, Song, "The Secret Sharer: Evaluating and Testing Unintended Memorization in Neural
Networks", USENIX Security 2019, arXiv 1802.08232, sections 4.2 and 4.3. Decided here: the canary itself counts among
the candidates (rank 1 is the best), and a tie counts against exposure, so that 2 ** -exposure is a valid p-value for
"this canary was not memorised".

A lower score is more memorised (cross-entropy, in nats or bits: only the order matters). **Chance is not 0 bits**: a
canary that nobody memorised has a mean of ``null_mean``, about 1 / ln 2 = 1.44 bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedkd.errors import ConfigError

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

_MIN_REFERENCES = 1000
_KS_LIMIT = 1.0  # of sqrt(n) D, D measured where the curve was fitted, which makes it smaller than in tables of KS


def exposure_exact(rank: npt.ArrayLike, space: int) -> Floats:
    """Return the exposure of canaries that were ranked among all possible candidates.

    Args:
        rank: (m,) number of candidates whose score is at most the canary's, itself included; from 1 to ``space``.
        space: Number of candidates.

    Returns:
        (m,) bits, from 0 to log2(space), in the order of ``rank``.

    Raises:
        ConfigError: A rank is not a whole number from 1 to ``space``.

    Example:
        >>> exposure_exact([1, 512, 1024], 1024).tolist()
        [10.0, 1.0, 0.0]
    """
    ranks = np.asarray(rank, dtype=np.float64)
    inside = (ranks >= 1) & (ranks <= space) & (ranks == np.floor(ranks))  # false for NaN
    if not inside.all():
        raise ConfigError(f"ranks should be whole numbers from 1 to {space}, got {_first(ranks[~inside])}")
    return np.asarray(math.log2(space) - np.log2(ranks))


def exposure_interpolated(score: npt.ArrayLike, references: npt.ArrayLike) -> Floats:
    """Return the exposure of canaries that were ranked among a sample of candidates that were never inserted.

    -log2 p with p = (1 + #{reference <= score}) / (n + 1). It cannot pass log2(n + 1) bits, however well a canary is
    memorised: where the candidates can all be scored, use ``exposure_exact``. (Other libraries divide by n, which goes
    below 0, and sort the result.)

    Args:
        score: (m,) scores of inserted canaries, lower is more memorised.
        references: (n,) scores of fresh canaries from the same distribution, n at least 1.

    Returns:
        (m,) bits, from 0 to log2(n + 1), in the order of ``score``.

    Raises:
        ConfigError: A score is NaN, or there are no references.

    Example:
        >>> exposure_interpolated([3.5, 0.5], [1.0, 2.0, 3.0]).tolist()
        [0.0, 2.0]
    """
    scores, others = _scores("score", score), np.sort(_scores("references", references), axis=None)
    if others.size == 0:
        raise ConfigError("exposure needs at least one reference canary, got none")
    at_most = np.searchsorted(others, scores, side="right")
    return np.asarray(np.log2(others.size + 1) - np.log2(1 + at_most))


@dataclass(frozen=True, eq=False)
class Extrapolated:
    """Exposures read off a curve that was fitted to references.

    Attributes:
        exposure: (m,) bits, from 0 to log2(space), in the order of the scores.
        capped: (m,) bool, where the curve says log2(space) or more.
        ks: Kolmogorov-Smirnov distance between the references and the curve.
        ks_limit: Largest distance that is accepted.
    """

    exposure: Floats
    capped: Bools
    ks: float
    ks_limit: float


def exposure_extrapolated(score: npt.ArrayLike, references: npt.ArrayLike, space: int) -> Extrapolated:
    """Return the exposure of canaries from a space too big to enumerate, by a skew-normal fit to references.

    -log2 F(score), F the maximum-likelihood skew-normal distribution of the references (section 4.3), capped at
    log2(space), which no exact exposure can pass.

    **Error.** Against the exact value in spaces of 10,000 (skew-normal scores with shape -3 to 3, and sums of four
    log-probabilities of digits with Gaussian logits), with 1000 references, 95 % of the canaries were within 0.15 bits
    where the exact value is below 3 bits, within 0.5 bits from 3 to 7, and within 1.4 bits from 7 to 10. Beyond log2(n)
    bits, hence below all references, the value is the curve's word alone: off by up to 2.7 bits from 10 to 13, and in a
    space of a million, of six digits, too low by 2 bits on average above 16 (95 % within 4.7). Below all candidates it
    runs away, up by tens of bits, and only the cap holds it. Where all can be scored, use ``exposure_exact``.

    **Check.** Tables of the Kolmogorov-Smirnov test do not hold for a curve that was fitted to the same scores, and to
    test one half against a curve fitted to the other refuses 14 to 19 % of true skew-normal samples at a nominal 5 %.
    So the limit, 1 / sqrt(n), is simulated, as Lilliefors did for the normal (1967). Of samples of 1000 it refuses
    under 1 % that are skew-normal with a shape of -2 to 2, 2 % with a shape of 4, 8 % with one of 10; and all that are
    exponential or uniform, 98 % that are Student's t with 5 degrees of freedom, 63 % logistic, 40 % Gumbel. It sees
    the middle of the curve: an accepted curve can be wrong in the tail.

    Args:
        score: (m,) scores of inserted canaries, lower is more memorised.
        references: (n,) scores of fresh canaries from the same distribution, n at least 1000.
        space: Number of candidates.

    Raises:
        ConfigError: A score is NaN, references are too few, infinite or all the same, no skew-normal curve fits them,
            or there are no candidates.

    Example:
        >>> found = exposure_extrapolated([0.0, -90.0], np.random.default_rng(0).normal(size=1000), 10**9)
        >>> found.exposure.round(1).tolist(), found.capped.tolist()
        ([1.0, 29.9], [False, True])
    """
    from scipy.stats import skewnorm  # here, not above: it takes a second

    scores, others = _scores("score", score), np.sort(_scores("references", references), axis=None)
    if space < 1:
        raise ConfigError(f"space should be 1 or more, got {space}")
    n = others.size
    if n < _MIN_REFERENCES:
        raise ConfigError(f"extrapolation needs {_MIN_REFERENCES} or more references, got {n}; score more candidates")
    if not np.isfinite(others).all() or others[0] == others[-1]:
        raise ConfigError(f"references should be finite and differ, got {others[0]} to {others[-1]}")
    curve = skewnorm(*skewnorm.fit(others))
    below, at = curve.cdf(others), np.arange(n + 1) / n
    ks, limit = float(max((below - at[:-1]).max(), (at[1:] - below).max())), _KS_LIMIT / math.sqrt(n)
    if not ks <= limit:  # true for NaN
        raise ConfigError(
            f"no skew-normal curve fits the {n} references: Kolmogorov-Smirnov distance {ks:.3f}, "
            f"at most {limit:.3f} is accepted; enumerate the space, or interpolate"
        )
    bits, most = -curve.logcdf(scores) / math.log(2), math.log2(space)
    return Extrapolated(exposure=np.clip(bits, 0, most), capped=np.asarray(bits >= most), ks=ks, ks_limit=limit)


def null_mean(references: int) -> float:
    """Return the mean interpolated exposure, in bits, when nothing was memorised.

    The rank is then uniform on 1 to n + 1, so the mean is log2(n + 1) - log2((n + 1)!) / (n + 1): 0.5 bits for one
    reference, 1 / ln 2 = 1.4427 for infinitely many.

    Args:
        references: Number n of references.

    Raises:
        ConfigError: There are no references.

    Example:
        >>> round(null_mean(99), 4)
        1.3962
    """
    if references < 1:
        raise ConfigError(f"references should be 1 or more, got {references}")
    return null_mean_exact(references + 1)


def null_mean_exact(space: int) -> float:
    """Return the mean exact exposure, in bits, when nothing was memorised: the rank is uniform on 1 to ``space``.

    Args:
        space: Number of candidates.

    Raises:
        ConfigError: There are no candidates.
    """
    if space < 1:
        raise ConfigError(f"space should be 1 or more, got {space}")
    return math.log2(space) - math.lgamma(space + 1) / (space * math.log(2))


def _scores(name: str, value: npt.ArrayLike) -> Floats:
    scores = np.asarray(value, dtype=np.float64)
    if np.isnan(scores).any():
        raise ConfigError(
            f"{name}: {int(np.isnan(scores).sum())} of {scores.size} scores are NaN; did training diverge?"
        )
    return scores


def _first(values: npt.NDArray[Any]) -> float:
    return float(np.ravel(values)[0])
