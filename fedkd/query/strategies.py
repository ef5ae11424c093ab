"""Query strategies: which candidates to ask a teacher about next. One interface, NumPy in and out.

A strategy sees the candidates as the current student does, and never the teacher: asking is the caller's business
(`fedkd.query.budget`). All are deterministic given their generator, and choose what was not asked before.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from fedkd.errors import ConfigError
from fedkd.query import rad, sampling
from fedkd.query.rad import FloatArray, IntArray

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True, eq=False)
class Candidates:
    """The pool, as a strategy sees it.

    Attributes:
        probs: (n, K) probabilities of the current student, K >= 2.
        asked: (n,) whom the teacher has been asked about.
        features: (n, d) representation of each candidate, where a strategy needs it.
        error_rate: Share of the candidates that the teacher errs on, in [0, 1], where a strategy needs it.

    Raises:
        ConfigError: Shapes do not match, or the values are no probabilities or not finite.
    """

    probs: Floats
    asked: NDArray[np.bool_]
    features: Floats | None = None
    error_rate: float | None = None

    def __post_init__(self) -> None:
        probs, n = self.probs, len(self.probs)
        if probs.ndim != 2 or probs.shape[1] < 2:
            raise ConfigError(f"probs: expected (n, K) with K of 2 or more, got {probs.shape}; give a row for each")
        if not np.all((probs >= 0) & (probs <= 1 + 1e-3)) or np.any(abs(probs.sum(1) - 1) > 1e-3):
            raise ConfigError("probs: expected rows that sum to 1, got others; take the softmax, or did it diverge?")
        if self.asked.shape != (n,) or self.asked.dtype != np.bool_:
            raise ConfigError(f"asked: expected a mask ({n},), got {self.asked.dtype} {self.asked.shape}")
        if self.features is not None and (self.features.ndim != 2 or len(self.features) != n):
            raise ConfigError(f"features: expected ({n}, d), got {self.features.shape}; flatten them")
        if self.features is not None and not np.all(np.isfinite(self.features)):
            raise ConfigError("features: expected finite numbers, got others; did the student diverge?")
        if self.error_rate is not None and not 0 <= self.error_rate <= 1:
            raise ConfigError(f"error_rate: expected a share in [0, 1], got {self.error_rate}; estimate it anew")

    @property
    def open(self) -> IntArray:
        """Indices of the candidates that can still be asked about, ascending."""
        return np.flatnonzero(~self.asked)


@dataclass(frozen=True, eq=False)
class Mixed:
    """What is blended into the candidates asked about.

    Attributes:
        partner: (b,) the candidate blended in.
        share: (b,) its share, in [0, 1].
    """

    partner: IntArray
    share: FloatArray


@dataclass(frozen=True, eq=False)
class Questions:
    """What to ask.

    Attributes:
        index: (b,) distinct candidates.
        mixed: None where they are asked about as they are.
    """

    index: IntArray
    mixed: Mixed | None = None

    def inputs(self, pool: NDArray[Any]) -> NDArray[Any]:
        """Return the inputs (b, *shape) to send to the teacher, and to train on.

        Args:
            pool: (n, *shape) all candidates; floating point if any are to be mixed.
        """
        asked = pool[self.index]
        if self.mixed is None:
            return asked
        share = self.mixed.share.astype(pool.dtype).reshape(-1, *[1] * (pool.ndim - 1))
        blend: NDArray[Any] = (1 - share) * asked + share * pool[self.mixed.partner]
        return blend


class Strategy(BaseModel, ABC):
    """Base class of query strategies; the fields are the settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    needs: ClassVar[tuple[Literal["features", "error_rate"], ...]] = ()

    def choose(self, seen: Candidates, budget: int, rng: np.random.Generator) -> Questions:
        """Choose what to ask.

        Args:
            seen: The candidates.
            budget: Questions, 1 to the number of open candidates.
            rng: Randomness.

        Returns:
            Exactly ``budget`` questions about distinct open candidates.

        Raises:
            ConfigError: The budget is above the pool, or the strategy needs what is not there.
        """
        for name in self.needs:
            if getattr(seen, name) is None:
                raise ConfigError(f"{name}: expected by {type(self).__name__}, got None; give it with the candidates")
        open_ = seen.open
        if not 1 <= budget <= len(open_):
            raise ConfigError(f"budget: expected 1 to {len(open_)}, the open candidates, got {budget}; lower it")
        return self._choose(seen, open_, budget, rng)

    @abstractmethod
    def _choose(self, seen: Candidates, open_: IntArray, budget: int, rng: np.random.Generator) -> Questions:
        """Choose among the candidates ``open_``, no fewer than ``budget``."""


class Uniform(Strategy):
    """Every open candidate alike."""

    def _choose(self, seen: Candidates, open_: IntArray, budget: int, rng: np.random.Generator) -> Questions:
        return Questions(rng.choice(open_, budget, replace=False))


def entropy(probs: Floats) -> FloatArray:
    """Return the entropy (n,) in nats of probabilities (n, K)."""
    p = np.asarray(probs, np.float64)
    sums: FloatArray = (p * np.log(np.where(p > 0, p, 1.0))).sum(1)
    return -sums


def doubt(probs: Floats) -> FloatArray:
    """Return 1 minus the largest (n,) of probabilities (n, K)."""
    largest: FloatArray = np.asarray(probs, np.float64).max(1)
    return 1.0 - largest


Score = Literal["margin", "entropy", "least_confidence"]

SCORES: dict[Score, Callable[[Floats], FloatArray]] = {
    "margin": rad.gain,
    "entropy": entropy,
    "least_confidence": doubt,
}
"""Student's probabilities (n, K) -> uncertainty (n,), larger where it is less sure."""


class Uncertainty(Strategy):
    """The candidates that the student is least sure of; ties are drawn."""

    score: ClassVar[Score]

    def _choose(self, seen: Candidates, open_: IntArray, budget: int, rng: np.random.Generator) -> Questions:
        return Questions(_ranked(SCORES[self.score](seen.probs[open_]), open_, rng)[:budget])


class Margin(Uncertainty):
    """Smallest difference of the two largest probabilities."""

    score = "margin"


class Entropy(Uncertainty):
    """Largest entropy."""

    score = "entropy"


class LeastConfidence(Uncertainty):
    """Smallest largest probability."""

    score = "least_confidence"


class Coreset(Strategy):
    """Greedy k-center: the candidate farthest from all that were asked about, again and again.

    Sener and Savarese, ICLR 2018 (arXiv 1708.00489), Algorithm 1, with Euclidean distances. Where nothing was asked
    yet, the first is drawn.
    """

    needs = ("features",)

    def _choose(self, seen: Candidates, open_: IntArray, budget: int, rng: np.random.Generator) -> Questions:
        x = _centred(seen)
        points, centres = x[open_], x[seen.asked]
        square = (points * points).sum(1)
        far, chosen = _nearest(points, centres)[0], np.empty(budget, np.int64)
        for i in range(budget):
            at = int(far.argmax()) if len(centres) or i else int(rng.integers(len(points)))
            chosen[i] = open_[at]
            np.minimum(far, square - 2 * (points @ points[at]) + square[at], out=far)
            far[at] = -np.inf  # never twice, even if all are in one place
        return Questions(chosen)


class ClusterMargin(Strategy):
    """Small margins, spread over clusters of the features.

    Citovsky et al., Batch Active Learning at Scale, NeurIPS 2021 (arXiv 2107.14263). Evidence: reconstruction from the
    paper's description; no official code is known. The pool is clustered with average linkage. Of the smallest margins
    a few more than the budget are kept, and the batch is taken from their clusters in turn, one at random from each,
    those that hold the fewest of them first. The paper clusters once: give the same features in every round. Its
    threshold on distances depends on the scale of the features, so the mean size of a cluster is set instead.
    """

    needs = ("features",)

    kept: float = Field(1.25, ge=1, description="smallest margins to choose from, as a multiple of the budget")
    cluster_size: float = Field(10.0, ge=1, description="mean size of a cluster")
    limit: int = Field(2000, ge=2, description="candidates to cluster; the others join the nearest one's cluster")

    def _choose(self, seen: Candidates, open_: IntArray, budget: int, rng: np.random.Generator) -> Questions:
        near = _ranked(rad.gain(seen.probs[open_]), open_, rng)[: int(np.ceil(self.kept * budget))]
        near = rng.permutation(near)
        _, cluster, sizes = np.unique(self._clusters(_centred(seen))[near], return_inverse=True, return_counts=True)
        together = np.argsort(cluster, kind="stable")
        turn = np.empty(len(near), np.int64)
        turn[together] = np.arange(len(near)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return Questions(near[np.lexsort((cluster, sizes[cluster], turn))[:budget]])

    def _clusters(self, x: FloatArray) -> IntArray:
        """Return the cluster (n,) of each row; no randomness, so equal features give equal clusters."""
        from sklearn.cluster import AgglomerativeClustering  # a second of imports that only this strategy needs

        some = np.unique(np.linspace(0, len(x) - 1, min(len(x), self.limit)).astype(np.int64))
        count = round(len(some) / self.cluster_size)
        if count < 2:
            return np.zeros(len(x), np.int64)
        label: IntArray = AgglomerativeClustering(n_clusters=count, linkage="average").fit_predict(x[some])
        return label if len(some) == len(x) else label[_nearest(x, x[some])[1]]


class Unixkd(Strategy):
    """Uncertain candidates, the surer of them blended with others: fewer questions than candidates in a minibatch.

    Xu et al., Computation-Efficient Knowledge Distillation via Uncertainty-Aware Mixup (arXiv 2012.09413). Evidence:
    official code. There every minibatch of training is ranked by uncertainty, row r of B is blended with a random row
    of the same minibatch, whose share is ``lam * sigmoid(sharpness * (r / B - (2 plain - 1) / (2 B)))`` with lam ~
    U(0, 1), and the teacher is asked about the first ``asked`` rows. Here the minibatches are drawn from the open
    candidates, and where these are too few, more of each minibatch is asked about.
    """

    score: Score = Field("entropy", description="uncertainty to rank by")
    batch: int = Field(64, ge=1, description="candidates in a minibatch")
    plain: int = Field(32, ge=0, description="its most uncertain rows, which are not blended")
    asked: int = Field(48, ge=1, description="its rows to ask about")
    sharpness: float = Field(1000.0, gt=0, description="how suddenly blending sets in after the plain rows")

    def _choose(self, seen: Candidates, open_: IntArray, budget: int, rng: np.random.Generator) -> Questions:
        batches = -(-budget // min(self.asked, self.batch))
        drawn = rng.choice(open_, min(len(open_), batches * self.batch), replace=False)
        wanted = [len(part) for part in np.array_split(np.arange(budget), batches)]
        parts = [
            self._blend(seen.probs, rows, k, rng)
            for rows, k in zip(np.array_split(drawn, batches), wanted, strict=True)
        ]
        index, partner, share = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return Questions(index, Mixed(partner, share))

    def _blend(
        self, probs: Floats, rows: IntArray, k: int, rng: np.random.Generator
    ) -> tuple[IntArray, IntArray, FloatArray]:
        """Return (index, partner, share) of the k first rows of one minibatch."""
        ranked, partner = _ranked(SCORES[self.score](probs[rows]), rows, rng), rng.permutation(rows)
        place = (np.arange(len(rows)) + 0.5) / len(rows) - self.plain / self.batch
        share = rng.random() * 0.5 * (1.0 + np.tanh(0.5 * self.sharpness * place))  # a sigmoid that cannot overflow
        return ranked[:k], partner[:k], share[:k]


class Rad(Strategy):
    """Robust Active Distillation: gains are 1 minus the margin, drawn by the max-min game (see `fedkd.query.rad`)."""

    needs = ("error_rate",)

    penalty: float = Field(1.0, ge=1, description="a wrong answer earns 1 - penalty times the gain")
    scheme: sampling.Scheme = Field("inclusion", description="how a batch is drawn")

    def _choose(self, seen: Candidates, open_: IntArray, budget: int, rng: np.random.Generator) -> Questions:
        rate = 0.0 if seen.error_rate is None else seen.error_rate  # `choose` has seen that it is there
        drawn = sampling.draw(rad.gain(seen.probs[open_]), rate, budget, rng, self.penalty, self.scheme)
        return Questions(open_[drawn])


STRATEGIES: dict[str, type[Strategy]] = {
    "uniform": Uniform,
    "margin": Margin,
    "entropy": Entropy,
    "least_confidence": LeastConfidence,
    "coreset": Coreset,
    "cluster_margin": ClusterMargin,
    "unixkd": Unixkd,
    "rad": Rad,
}
"""Query strategies by name."""


def _ranked(score: FloatArray, index: IntArray, rng: np.random.Generator) -> IntArray:
    """Return ``index`` (n,) in descending order of ``score`` (n,), ties in random order."""
    shuffled = rng.permutation(len(index))
    return index[shuffled[np.argsort(-score[shuffled], kind="stable")]]


def _centred(seen: Candidates) -> FloatArray:
    """Return the features (n, d) about their mean, where squared distances lose the least to rounding."""
    x = np.asarray(seen.features, np.float64)
    centred: FloatArray = x - x.mean(0)
    return centred


def _nearest(x: FloatArray, centres: FloatArray, block: int = 64) -> tuple[FloatArray, IntArray]:
    """Return the squared distance (n,) of each row of ``x`` (n, d) to the nearest centre, and which one it is (n,).

    Without centres the distance is infinite.
    """
    best, which = np.full(len(x), np.inf), np.zeros(len(x), np.int64)
    for start in range(0, len(centres), block):
        part = centres[start : start + block]
        gap = (part * part).sum(1) - 2 * (x @ part.T)  # less the square of x, which is the same for all centres
        at = gap.argmin(1)
        value = gap[np.arange(len(x)), at]
        closer = value < best
        best[closer], which[closer] = value[closer], start + at[closer]
    return best + (x * x).sum(1), which
