"""What class means give away: membership by distance, and the record that is alone in its class.

Clients release, for each class, a sum of features and a count (FedProto's prototypes; FedD2S with
``upload = "class_mean"``); whoever sees them divides. Two attacks, neither of which trains anything:

* A record pulls the mean of its class towards itself, by 1/n_y of the way: members are nearer. ``distance_scores`` are
  for ``privacy.audits.membership`` and ``privacy.audits.one_run``. Features are those of the owner's own model, the
  worst case, and that model was trained on its records: distances show what the *model* remembers, too.
* Of a class with one record, the mean **is** the record. ``single_records`` finds it among candidates by the nearest
  feature, and one of the records of classes with 2 to 5.

Noisy counts may be negative or fractional. A mean is the sum divided by the count or by 1, whichever is larger: whoever
releases a class has a record of it, and a small divisor would only enlarge the noise. What was released is used as it
is; the true counts select the classes that single records are looked for in. Exact counts beside noisy sums give
members away as well: the noise in a mean shrinks with its count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import betaincinv

from fedkd.errors import ConfigError

Floats = npt.NDArray[np.float64]

_TAIL = 0.025


def exact_interval(right: int, n: int) -> tuple[float, float]:
    """Return Clopper and Pearson's exact 95 % interval of a share.

    Args:
        right: How many of n, which are independent of one another.
        n: At least 1.

    Raises:
        ConfigError: ``right`` is not within 0 to n, or n is 0.

    Example:
        >>> [round(end, 3) for end in exact_interval(10, 10)]
        [0.692, 1.0]
    """
    if not 0 <= right <= n or n < 1:
        raise ConfigError(f"a share needs 0 to n right answers of n, at least 1, got {right} of {n}")
    low = float(betaincinv(right, n - right + 1, _TAIL)) if right else 0.0
    high = float(betaincinv(right + 1, n - right, 1 - _TAIL)) if right < n else 1.0
    return low, high


def class_means(sums: npt.ArrayLike, counts: npt.ArrayLike) -> Floats:
    """Return the means (clients, K, d) that a reader makes of sums (clients, K, d) and counts (clients, K).

    Raises:
        ConfigError: The shapes do not fit, or a value is not finite.

    Example:
        >>> class_means([[[4.0, 2.0], [0.3, -0.1]]], [[2.0, -0.4]]).tolist()
        [[[2.0, 1.0], [0.3, -0.1]]]
    """
    total, count = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    if total.ndim != 3 or count.shape != total.shape[:2] or not total.size:
        raise ConfigError(f"sums should be (clients, K, d) and counts (clients, K), got {total.shape}, {count.shape}")
    if not (np.isfinite(total).all() and np.isfinite(count).all()):
        raise ConfigError("sums and counts should be finite; did training diverge?")
    return np.asarray(total / np.maximum(count, 1)[..., None])


# --- Membership ------------------------------------------------------------------------------------------------------


def distance_scores(
    sums: npt.ArrayLike, counts: npt.ArrayLike, owners: npt.ArrayLike, labels: npt.ArrayLike, features: npt.ArrayLike
) -> Floats:
    """Return how far each canary is from its owner's mean of its class, less how far it is from that of the others.

    Some canaries lie far from every mean. What is expected of such a one is its distance to the mean that the owner's
    other classes have: the scores subtract it.

    Args:
        sums: (clients, K, d) as released.
        counts: (clients, K) as released; 0 or less where there is no mean to go by.
        owners: (m,) client of each canary.
        labels: (m,) class that each canary is planted with.
        features: (m, d) of each canary, under its owner's model.

    Returns:
        (m,) scores in units of features; lower is more like a member.

    Raises:
        ConfigError: Shapes do not fit, a value is not finite, or an owner or a label is out of range.

    Example:
        >>> sums = [[[0.0, 0.0], [6.0, 0.0], [0.0, 9.0]]]
        >>> distance_scores(sums, [[1, 2, 3]], [0, 0], [1, 1], [[3.0, 0.0], [0.0, 1.0]]).round(2).tolist()
        [-3.62, 1.66]
    """
    means, count = class_means(sums, counts), np.asarray(counts, dtype=np.float64)
    who, y, f = np.asarray(owners), np.asarray(labels), np.asarray(features, dtype=np.float64)
    clients, classes, width = means.shape
    if f.ndim != 2 or f.shape[1] != width or who.shape != f.shape[:1] or y.shape != f.shape[:1]:
        raise ConfigError(
            f"owners and labels should be (m,) and features (m, {width}), got {who.shape}, {y.shape} and {f.shape}"
        )
    for name, index, end in (("owners", who, clients), ("labels", y, classes)):
        if not np.issubdtype(index.dtype, np.integer) or (index.size and not 0 <= index.min() <= index.max() < end):
            raise ConfigError(f"{name} should be whole numbers from 0 to {end - 1}, got {index.tolist()[:8]}")
    if not np.isfinite(f).all():
        raise ConfigError("features should be finite; did training diverge?")
    gaps = np.sqrt(((f[:, None] - means[who]) ** 2).sum(-1))  # (m, K)
    own = np.arange(classes) == y[:, None]
    others = (count[who] > 0) & ~own
    expected = (gaps * others).sum(1) / np.maximum(others.sum(1), 1)
    return np.asarray(gaps[own] - expected)


# --- The record alone in its class -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """How often a record was found by the mean of its class, one record of each class being tried.

    Attributes:
        records: Records of the class at its client.
        classes: Number n of pairs of client and class with so many records.
        found: Records found: nearer to the mean than every other candidate.
        low: Lower end of the exact 95 % interval of the share found.
        high: Upper end of that interval.
    """

    records: int
    classes: int
    found: int
    low: float
    high: float

    @property
    def rate(self) -> float:
        """Share found."""
        return self.found / self.classes


@dataclass(frozen=True)
class RecordResult:
    """What class means give away about single records.

    Attributes:
        target: Which message.
        candidates: Number N of candidates, of the same class; guessing is right once in N times.
        by_records: By number of records that share a mean, ascending; numbers that no class has are left out.
    """

    target: str
    candidates: int
    by_records: tuple[Found, ...]

    @property
    def chance(self) -> float:
        """Share found by guessing."""
        return 1 / self.candidates

    @property
    def alone(self) -> Found | None:
        """The classes with exactly one record; None if there are none."""
        return next((one for one in self.by_records if one.records == 1), None)

    @property
    def leaks(self) -> bool:
        """Whether single records are found more often than by guessing; where means say nothing, seldom true."""
        return self.alone is not None and self.alone.low > self.chance

    def __str__(self) -> str:
        """Return one sentence."""
        if self.alone is None:
            return f"{self.target}: no client has a class of one record only."
        one = self.alone
        more = [f"{100 * other.rate:.0f} % of {other.records}" for other in self.by_records if other.records > 1]
        return (
            f"{self.target}: the record was found in {one.found} of {one.classes} classes of one record (95 % interval "
            f"{100 * one.low:.0f} to {100 * one.high:.0f} %) among {self.candidates} candidates (chance "
            f"{100 * self.chance:.2g} %){'; one of more: ' + ', '.join(more) if more else ''}."
        )

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        rows = [{**asdict(one), "rate": one.rate} for one in self.by_records]
        return {**asdict(self), "by_records": rows, "chance": self.chance, "leaks": self.leaks}


def single_records(
    target: str,
    sums: npt.ArrayLike,
    counts: npt.ArrayLike,
    features: Sequence[npt.ArrayLike],
    labels: Sequence[npt.ArrayLike],
    others: Sequence[npt.ArrayLike],
    other_labels: npt.ArrayLike,
    rng: np.random.Generator,
    *,
    candidates: int = 100,
    most: int = 5,
) -> RecordResult:
    """Find a record by the mean of its class, among others of that class.

    A record is tried of each class that a client has ``most`` records of, or fewer. Features are those of the model
    that the client made its sums with.

    Args:
        target: Which message.
        sums: (clients, K, d) as released.
        counts: (clients, K) as released.
        features: Of each client, (n_k, d) of its records.
        labels: Of each client, (n_k,) classes of its records.
        others: Of each client, (p, d) features that its model gives images which nobody trained on.
        other_labels: (p,) classes of these images.
        rng: Source of the records tried and of the other candidates.
        candidates: Candidates, the record included; fewer where ``others`` are less than one fewer of some class.
        most: Largest number of records that is tried.

    Raises:
        ConfigError: Shapes do not fit, a value is not finite, or there is no other of some class.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> records, rest = rng.normal(size=(1, 2, 3)), rng.normal(size=(1, 40, 3))
        >>> found = single_records("message", records, [[1, 1]], records, [[0, 1]], rest, np.arange(40) % 2, rng)
        >>> found.alone.rate, found.candidates
        (1.0, 21)
    """
    means, pool = class_means(sums, counts), np.asarray(other_labels)
    clients, classes, width = means.shape
    own = [np.asarray(part, dtype=np.float64) for part in features]
    held = [np.asarray(part) for part in labels]
    rest = [np.asarray(part, dtype=np.float64) for part in others]
    if not len(own) == len(held) == len(rest) == clients:
        raise ConfigError(f"{target}: expected {clients} clients, got {len(own)}, {len(held)} and {len(rest)}")
    for k in range(clients):
        if own[k].shape != (held[k].size, width) or rest[k].shape != (pool.size, width):
            raise ConfigError(
                f"{target}: client {k} should have features ({held[k].size}, {width}) and others ({pool.size}, {width})"
                f", got {own[k].shape} and {rest[k].shape}"
            )
        if not (np.isfinite(own[k]).all() and np.isfinite(rest[k]).all()):
            raise ConfigError(f"{target}: features of client {k} should be finite; did training diverge?")
    among = min(candidates - 1, *(int((pool == y).sum()) for y in range(classes)))
    if among < 1:
        raise ConfigError(f"{target}: expected others of every class and 2 candidates or more; give more images")
    hits: dict[int, list[bool]] = {}
    for k in range(clients):
        for y in range(classes):
            mine = np.flatnonzero(held[k] == y)
            if 1 <= mine.size <= most:
                other = rest[k][rng.choice(np.flatnonzero(pool == y), among, replace=False)]
                nearest = np.linalg.norm(other - means[k, y], axis=1).min()
                gap = np.linalg.norm(own[k][rng.choice(mine)] - means[k, y])
                hits.setdefault(mine.size, []).append(bool(gap < nearest))
    found = (Found(n, len(all_), sum(all_), *exact_interval(sum(all_), len(all_))) for n, all_ in sorted(hits.items()))
    return RecordResult(target, among + 1, tuple(found))
