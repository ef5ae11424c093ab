"""Class presence: which classes a client has, read from the counts that it releases, or from rows of zeros.

Nothing is guessed but what is plain to see, so this is a lower bound on what could be found out; where counts are exact
it is everything. ``privacy.audits.labels`` infers the same from answers about public inputs.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedkd.errors import ConfigError
from privacy.audits.class_means import exact_interval
from privacy.audits.membership import auroc


@dataclass(frozen=True)
class PresenceResult:
    """What a message gives away about which classes its sender has.

    Attributes:
        target: Which message.
        read: What was read: ``"counts"`` or ``"rows of zeros"``.
        accuracy: Share of all pairs of client and class that are told right.
        low: Lower end of its exact 95 % interval, over pairs as if they were independent.
        high: Upper end of that interval.
        majority: Share that whoever gives all pairs the more frequent answer has right.
        auroc: Probability that what is read is larger for a class that is there than for one that is not, ties
            counting half; None where all classes are there, or none.
        pairs: Number of pairs of client and class.
    """

    target: str
    read: str
    accuracy: float
    low: float
    high: float
    majority: float
    auroc: float | None
    pairs: int

    @property
    def leaks(self) -> bool:
        """Whether pairs are told right more often than by the majority."""
        return self.low > self.majority

    def __str__(self) -> str:
        """Return one sentence."""
        told = "" if self.auroc is None else f"; AUROC {self.auroc:.2f}"
        return (
            f"{self.target}: {100 * self.accuracy:.0f} % of {self.pairs} pairs of client and class told right by "
            f"{self.read} (95 % interval {100 * self.low:.0f} to {100 * self.high:.0f} %; majority "
            f"{100 * self.majority:.0f} %{told})."
        )

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {**asdict(self), "leaks": self.leaks}


def class_presence(
    target: str, held: npt.ArrayLike, *, counts: npt.ArrayLike | None = None, sums: npt.ArrayLike | None = None
) -> PresenceResult:
    """Tell which classes clients have, by counts of more than a half, or by rows that are not all zeros.

    Args:
        target: Which message.
        held: (clients, K) true counts.
        counts: (clients, K) as released.
        sums: (clients, K, d) sums or means as released, where counts are not; with noise on them, no row is zero.

    Raises:
        ConfigError: Not one of counts and sums, the shapes differ, or a value is not finite.

    Example:
        >>> class_presence("message", [[3, 0], [1, 2]], counts=[[2.6, -0.9], [0.7, 1.8]]).accuracy
        1.0
    """
    if (counts is None) == (sums is None):
        raise ConfigError(f"{target}: expected counts or sums, got {'neither' if counts is None else 'both'}")
    truth = np.asarray(held) > 0
    if counts is not None:
        read, said = "counts", np.asarray(counts, dtype=np.float64)
        guess = said > 0.5
    else:
        read, said = "rows of zeros", np.abs(np.asarray(sums, dtype=np.float64)).sum(-1)
        guess = said > 0
    if truth.ndim != 2 or said.shape != truth.shape or not truth.size:
        raise ConfigError(
            f"{target}: held and what was released should be (clients, K), got {truth.shape}, {said.shape}"
        )
    if not np.isfinite(said).all():
        raise ConfigError(f"{target}: what was released should be finite; did training diverge?")
    n, right, there = truth.size, int((guess == truth).sum()), float(truth.mean())
    known = auroc(-said[truth], -said[~truth]) if 0 < there < 1 else None
    return PresenceResult(target, read, right / n, *exact_interval(right, n), max(there, 1 - there), known, n)
