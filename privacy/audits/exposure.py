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
from typing import Any

import numpy as np
import numpy.typing as npt

from fedkd.errors import ConfigError

Floats = npt.NDArray[np.float64]


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
