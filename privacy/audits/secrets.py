"""Secrets in text: what one model or message gives away about canaries whose exact rank among all secrets is known.

Exposure as in ``privacy.audits.exposure`` (Carlini et al., "The Secret Sharer", USENIX Security 2019, arXiv
1802.08232), with the controls that a claim of memory, or of its absence, needs: canaries left out by a fair coin, each
secret under another canary's prefix, and chance, which is not 0 bits.

**What a result is not:** no leak seen with few canaries is no proof of privacy, and no epsilon follows from it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, stdtrit

from fedkd.errors import ConfigError
from fedkd.seeds import generator
from privacy.audits.exposure import exposure_exact, null_mean_exact

Floats = npt.NDArray[np.float64]
Interval = tuple[float, float]
_Nothing = tuple[None, None, None]

ALPHA = 0.05
_TAIL = ALPHA / 2
_RESAMPLES = 9999  # of permutations, too
_ROUNDING = 1e-9  # bits; sums of the same numbers in another order differ by less


@dataclass(frozen=True)
class ByRepetition:
    """Included canaries that occur equally often in the training text.

    Attributes:
        repetitions: How often each occurs.
        n: Number of canaries.
        mean: Mean exposure in bits.
        low: Lower end of its 95 % interval.
        high: Upper end of its 95 % interval.
        extracted: How many have rank 1, so that an attacker's first guess is right.
    """

    repetitions: int
    n: int
    mean: float
    low: float
    high: float
    extracted: int


@dataclass(frozen=True)
class SecretResult:
    """What one attack on one target gives away about the canaries. Exposures in bits; intervals as ``mean_interval``.

    Attributes:
        target: Which model or message, for example ``"student"``.
        attack: How it was read, for example ``"digits only"``.
        leaves_client: Whether the target leaves the client.
        space: Number of possible secrets.
        chance: Mean exposure when nothing is memorised.
        by_repetition: Included canaries by number of repetitions, ascending.
        included_mean: Mean exposure of the included canaries.
        included_low: Lower end of its 95 % interval.
        included_high: Upper end of its 95 % interval.
        n_in: Number of included canaries.
        excluded_mean: Mean exposure of the excluded canaries; None if there are none.
        n_out: Number of excluded canaries.
        swap_mean: Mean exposure of the included canaries' secrets under another canary's prefix. Above chance, the
            target knows which digits were planted rather than which secret belongs to which prefix.
        swap_low: Lower end of its 95 % interval.
        swap_high: Upper end of its 95 % interval.
        p_value: Probability of so large a mean difference, included less excluded, when nothing leaks (one-sided).
        largest: Largest exposure of an included canary.
        threshold: What ``largest`` reaches with a probability of at most 5 % when nothing leaks: log2(n_in / 0.05),
            Bonferroni's correction. Above log2(space) it cannot be reached.
    """

    target: str
    attack: str
    leaves_client: bool
    space: int
    chance: float
    by_repetition: tuple[ByRepetition, ...]
    included_mean: float
    included_low: float
    included_high: float
    n_in: int
    excluded_mean: float | None
    n_out: int
    swap_mean: float
    swap_low: float
    swap_high: float
    p_value: float
    largest: float
    threshold: float

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {**asdict(self), "by_repetition": [asdict(row) for row in self.by_repetition]}


def judge(
    target: str,
    attack: str,
    leaves: bool,
    ranks: npt.ArrayLike,
    swapped: npt.ArrayLike,
    repetitions: npt.ArrayLike,
    included: npt.ArrayLike,
    space: int,
    seed: int,
) -> SecretResult:
    """Judge one attack on one target.

    Args:
        target: Which model or message.
        attack: How it was read.
        leaves: Whether the target leaves the client.
        ranks: (m,) rank of each secret under its own prefix, from 1 to ``space``: how many secrets score at most as
            much, itself included.
        swapped: (m,) rank of each secret under another canary's prefix.
        repetitions: (m,) how often each canary occurs, or would if it were included; at least 1.
        included: (m,) bool, whether each canary was in the training text: independent fair coins.
        space: Number of possible secrets.
        seed: Seed of resampling and permutations; the same for the same run, so that results repeat.

    Raises:
        ConfigError: The shapes differ, a rank or a number of repetitions is NaN or outside its range, or no canary was
            included.

    Example:
        >>> found = judge("student", "as said", True, [1, 2, 500, 900], [700, 300, 10, 90], [10, 1, 10, 1],
        ...               [True, True, False, False], 1000, seed=0)
        >>> [(row.repetitions, row.n, row.extracted) for row in found.by_repetition]
        [(1, 1, 0), (10, 1, 1)]
    """
    coins, counts = np.asarray(included), np.asarray(repetitions, dtype=np.float64)
    shapes = [np.shape(one) for one in (ranks, swapped, repetitions, included)]
    if coins.ndim != 1 or coins.dtype != np.bool_ or len(set(shapes)) > 1:
        raise ConfigError(
            f"{target}: ranks, swapped, repetitions and included (bool) should be (m,), "
            f"got {', '.join(map(str, shapes))} {coins.dtype}"
        )
    if not coins.any():
        raise ConfigError(f"{target}: none of {coins.size} canaries was included; plant more, or take another seed")
    whole = (counts >= 1) & (counts == np.floor(counts))  # false for NaN
    if not whole.all():
        raise ConfigError(f"{target}: repetitions should be whole numbers from 1, got {counts[~whole][0]}")
    bits, others = exposure_exact(ranks, space), exposure_exact(swapped, space)[coins]
    inside, outside, counts = bits[coins], bits[~coins], counts[coins]
    most, rng = math.log2(space), generator(seed, "secrets bootstrap")
    rows = []
    for count in np.unique(counts):
        group = inside[counts == count]
        low, high = mean_interval(group, most, rng)
        extracted = int((group == most).sum())
        rows.append(ByRepetition(int(count), group.size, float(group.mean()), low, high, extracted))
    low, high = mean_interval(inside, most, rng)
    swap_low, swap_high = mean_interval(others, most, rng)
    return SecretResult(
        target=target,
        attack=attack,
        leaves_client=bool(leaves),
        space=space,
        chance=null_mean_exact(space),
        by_repetition=tuple(rows),
        included_mean=float(inside.mean()),
        included_low=low,
        included_high=high,
        n_in=inside.size,
        excluded_mean=float(outside.mean()) if outside.size else None,
        n_out=outside.size,
        swap_mean=float(others.mean()),
        swap_low=swap_low,
        swap_high=swap_high,
        p_value=permutation_p_value(inside, outside, generator(seed, "secrets permutation")),
        largest=float(inside.max()),
        threshold=math.log2(inside.size / ALPHA),
    )


def permutation_p_value(inside: Floats, outside: Floats, rng: np.random.Generator) -> float:
    """Return how often chance makes the included canaries' mean exceed the excluded ones' by so much (one-sided).

    Canaries are included by independent fair coins, so when nothing leaks every choice of as many canaries is equally
    likely. 9,999 choices are drawn; the true one is counted too, which makes P(p <= a) <= a. Measured on uniform ranks
    of 24 canaries: p <= 0.05 in 4.7 % of 2000 draws.

    Args:
        inside: (n_in,) exposures of included canaries, in bits.
        outside: (n_out,) exposures of excluded canaries; with none, the result is 1.
        rng: Source of the choices.
    """
    bits = np.concatenate([inside, outside])
    chosen = rng.random((_RESAMPLES, bits.size)).argsort(axis=1)[:, : inside.size]
    # Among choices of as many canaries the difference of means grows with the sum of the chosen.
    as_large = bits[chosen].sum(axis=1) >= inside.sum() - _ROUNDING
    return (1 + int(as_large.sum())) / (1 + _RESAMPLES)


def mean_interval(bits: Floats, most: float, rng: np.random.Generator) -> Interval:
    """Return a 95 % bootstrap interval for the mean exposure, canaries being resampled.

    Percentiles, widened for a small n as Student's t widens the normal's (Hesterberg, "What Teachers Should Know About
    the Bootstrap", The American Statistician 2015, section 4.3). Where all exposures are the same, the bootstrap would
    claim certainty: then the interval holds all means that are possible if at least a share A of canaries is like these
    n, A ** n = 0.025, and the others may be anything from 0 to ``most``.

    **Coverage** of 1.44 bits on uniform ranks, 2000 draws or more: 95 % for 100 canaries, 93 % for 24, 90 % for 8
    (plain percentiles: 86 %), 84 % for 4, 45 % for 2, for exposure is skewed; most misses lie below 1.44 bits. Of 8
    canaries of a kind of which nine in ten are extracted: 99 %.

    Args:
        bits: (n,) exposures, n at least 1.
        most: Largest possible exposure, log2(space).
        rng: Source of the resamples.
    """
    n, first = bits.size, float(bits[0])
    if np.all(bits == first):
        share = _TAIL ** (1 / n)
        return share * first, first + (1 - share) * (most - first)
    tail = float(ndtr(math.sqrt(n / (n - 1)) * stdtrit(n - 1, _TAIL)))
    low, high = np.quantile(bits[rng.integers(n, size=(_RESAMPLES, n))].mean(axis=1), [tail, 1 - tail])
    return float(low), float(high)


# --- Against a baseline ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reduction:
    """By how much a method lowers exposure. Fractions: 1 is all of it, negative means that it raises exposure.

    Attributes:
        method_mean: Mean exposure under the method, in bits.
        baseline_mean: Under the baseline.
        chance_mean: When nothing is memorised.
        raw: 1 - method / baseline; None where the baseline shows no exposure.
        raw_low: Lower end of its 95 % interval.
        raw_high: Upper end of its 95 % interval.
        corrected: 1 - (method - chance) / (baseline - chance); None where the baseline is not above chance.
        corrected_low: Lower end of its 95 % interval.
        corrected_high: Upper end of its 95 % interval.
        seeds: Number of seeds.
        canaries: Number of included canaries, over all seeds.
    """

    method_mean: float
    baseline_mean: float
    chance_mean: float
    raw: float | None
    raw_low: float | None
    raw_high: float | None
    corrected: float | None
    corrected_low: float | None
    corrected_high: float | None
    seeds: int
    canaries: int

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return asdict(self)


def reduction(
    method: Sequence[npt.ArrayLike],
    baseline: Sequence[npt.ArrayLike],
    chance: float | Sequence[npt.ArrayLike],
    seed: int = 0,
) -> Reduction:
    """Return by how much a method lowers the exposure of the same canaries, raw and less chance.

    **The raw form flatters and is bounded.** A method under which nothing at all is memorised still has ``chance``, so
    a raw reduction of 80 % is impossible where the baseline is below chance / 0.2 = 7.2 bits.

    Means are over all canaries of all seeds. Intervals are percentiles of a hierarchical bootstrap: seeds are drawn,
    then canaries within each, the same for method, baseline and twin. With 5 seeds of 12 or 24 canaries it covered the
    truth in 97 % of simulations where only canaries vary, and in 88 to 94 % where the seeds' share of memorised
    canaries varies by 15 points too; with one seed it knows nothing of how seeds vary. Where the baseline's own
    interval reaches down to chance, the corrected reduction is undefined: None, not a division by nearly nothing.

    The transfer ratio (student - twin) / (teacher - twin) is 1 - ``reduction(student, teacher, twin).corrected``.

    Args:
        method: (m_s,) exposures in bits of the included canaries, for each seed s; from 0.
        baseline: The same canaries' under the baseline, for example plain distillation.
        chance: Mean exposure when nothing is memorised, ``null_mean_exact(space)``; or the same canaries' exposures
            under a model that saw none of them, for each seed.
        seed: Seed of the bootstrap.

    Raises:
        ConfigError: There is no seed, a seed has no canary, shapes differ, or an exposure is NaN, infinite or negative.

    Example:
        >>> found = reduction([[2.0, 3.0], [1.0, 2.0]], [[8.0, 8.0], [8.0, 8.0]], 1.0)
        >>> found.raw, round(found.corrected, 4)
        (0.75, 0.8571)
    """
    twin = [np.full(np.shape(one), chance) for one in baseline] if isinstance(chance, float | int) else chance
    if not 0 < len(method) == len(baseline) == len(twin):
        raise ConfigError(
            f"method, baseline and twin should hold one array for each seed, "
            f"got {len(method)}, {len(baseline)} and {len(twin)}"
        )
    groups = [_group(s, *each) for s, each in enumerate(zip(method, baseline, twin, strict=True))]
    means = np.concatenate(groups, axis=1).mean(axis=1)
    draws = _resampled_means(groups, generator(seed, "secrets reduction"))
    raw, raw_low, raw_high = _less(means[0], means[1], draws[0], draws[1])
    corrected, low, high = _less(means[0] - means[2], means[1] - means[2], draws[0] - draws[2], draws[1] - draws[2])
    return Reduction(
        method_mean=float(means[0]),
        baseline_mean=float(means[1]),
        chance_mean=float(means[2]),
        raw=raw,
        raw_low=raw_low,
        raw_high=raw_high,
        corrected=corrected,
        corrected_low=low,
        corrected_high=high,
        seeds=len(groups),
        canaries=sum(group.shape[1] for group in groups),
    )


def _group(s: int, *each: npt.ArrayLike) -> Floats:
    """One seed's exposures (3, m_s) under method, baseline and twin."""
    rows = [np.asarray(one, dtype=np.float64) for one in each]
    if rows[0].ndim != 1 or rows[0].size == 0 or len({row.shape for row in rows}) > 1:
        raise ConfigError(
            f"seed {s}: method, baseline and twin should hold the same canaries, at least one, "
            f"got shapes {', '.join(str(row.shape) for row in rows)}"
        )
    group = np.stack(rows)
    good = np.isfinite(group) & (group >= 0)
    if not good.all():
        raise ConfigError(f"seed {s}: exposures should be numbers from 0, got {group[~good][0]}")
    return group


def _resampled_means(groups: list[Floats], rng: np.random.Generator) -> Floats:
    """Means (3, resamples) over seeds drawn with replacement and canaries drawn within each."""
    picks = rng.integers(len(groups), size=(_RESAMPLES, len(groups)))
    sums, sizes = np.zeros((3, _RESAMPLES)), np.zeros(_RESAMPLES)
    for s, group in enumerate(groups):
        m = group.shape[1]
        resample = np.nonzero(picks == s)[0]  # a resample that drew the seed twice draws its canaries twice
        drawn = group[:, rng.integers(m, size=(resample.size, m))].sum(axis=2)
        sums += np.stack([np.bincount(resample, row, _RESAMPLES) for row in drawn])
        sizes += m * np.bincount(resample, minlength=_RESAMPLES)
    return sums / sizes


def _less(method: float, baseline: float, methods: Floats, baselines: Floats) -> tuple[float, float, float] | _Nothing:
    """1 - method / baseline with the percentiles of its resamples; nothing where the baseline's reach down to 0."""
    if min(baseline, _percentile(baselines, _TAIL)) <= _ROUNDING:
        return None, None, None
    ratio = np.full_like(methods, np.inf)  # fewer than a share _TAIL stay so: no percentile taken here is one of them
    np.divide(methods, baselines, out=ratio, where=baselines > _ROUNDING)
    return float(1 - method / baseline), _percentile(1 - ratio, _TAIL), _percentile(1 - ratio, 1 - _TAIL)


def _percentile(draws: Floats, share: float) -> float:
    return float(np.quantile(draws, share, method="inverted_cdf"))  # one of the draws, never between two
