"""What a federation is judged by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedkd.losses import cross_entropy
from fedkd.models import Model

BINS = 15
"""Equal-width bins of confidence, (0, 1/15] to (14/15, 1], as in Guo et al., ICML 2017."""


def accuracy(model: Model, params: Mapping[str, Tensor], x: Tensor, y: Tensor) -> float:
    """Share of inputs x (n, *shape) whose largest logit is at the label y (n,); 0 for an empty set."""
    if not len(y):
        return 0.0
    return _share(_right(model.logits(params, x), y))


@dataclass(frozen=True)
class Score:
    """One model on one test set.

    Attributes:
        accuracy: Share correct, of text the share of next tokens; 0 for an empty set.
        tests: Size of the test set, of text the tokens to predict.
        gaps: In each of `BINS` bins the sum of (confidence - correct), confidence being the largest probability;
            empty where nobody asked.
        nats: Cross-entropy of text, nats a token; None for images and for an empty set.
    """

    accuracy: float
    tests: int
    gaps: tuple[float, ...] = ()
    nats: float | None = None

    def to_metrics(self, name: str) -> dict[str, float | int | list[float]]:
        """As a client tells it."""
        said: dict[str, float | int | list[float]] = {name: self.accuracy, f"{name}/tests": self.tests}
        if self.gaps:
            said[f"{name}/gaps"] = list(self.gaps)
        return said if self.nats is None else {**said, f"{name}/nats": self.nats}

    @classmethod
    def from_metrics(cls, said: Mapping[str, Any], name: str) -> Score:
        """Undo `to_metrics`."""
        return cls(
            float(said[name]), int(said[f"{name}/tests"]), tuple(said.get(f"{name}/gaps", ())), said.get(f"{name}/nats")
        )


def score(model: Model, params: Mapping[str, Tensor], x: Tensor, y: Tensor, calibrated: bool = True) -> Score:
    """As `accuracy`, with what the calibration error and the perplexity need, in one pass over the inputs.

    Where a diverged model's logits give no probabilities, it counts as certain: that cannot make it look calibrated.
    """
    if not len(y):
        return Score(0.0, 0, (0.0,) * BINS)
    logits = model.logits(params, x)
    if y.dim() == 2:
        logits, y = logits[y >= 0], y[y >= 0]
        nats = _share(cross_entropy(logits, y))
    else:
        nats = None
    right = _right(logits, y)
    if not calibrated:
        return Score(_share(right), len(y), nats=nats)
    confidence = torch.nan_to_num(logits.double().softmax(-1).amax(-1), nan=1.0).cpu().numpy()
    place = np.searchsorted(np.arange(1, BINS) / BINS, confidence)  # edges belong to the bin below
    gaps = np.bincount(place, confidence - right.double().cpu().numpy(), minlength=BINS)
    return Score(_share(right), len(y), tuple(gaps.tolist()), nats)


def perplexity(scores: Sequence[Score]) -> float | None:
    """Exp of the mean cross-entropy over all test tokens together; None for images."""
    known = [(one.nats, one.tests) for one in scores if one.nats is not None]
    if not known:
        return None
    mean = sum(nats * tests for nats, tests in known) / sum(tests for _, tests in known)
    return math.exp(min(mean, 700.0))  # beyond there is no number for it


def calibration_error(scores: Sequence[Score]) -> float | None:
    """Expected calibration error over all test samples together (Naeini et al., AAAI 2015); None without any.

    Within a bin, one client's overconfidence can make up for another's doubt.
    """
    tests = sum(one.tests for one in scores)
    gaps = np.sum([one.gaps for one in scores], axis=0)
    return float(np.abs(gaps).sum()) / tests if tests else None


@dataclass(frozen=True)
class Accuracy:
    """Accuracy and calibration over clients, in [0, 1].

    Attributes:
        balanced_mean: Mean over clients of each client's model on the balanced global test set.
        personal_mean: Mean over clients of each client's model on its own test split.
        personal_std: Population standard deviation of the latter: fairness.
        personal_worst10: Mean of its lowest tenth (at least one client).
        personal_ece: Calibration error of the clients' models on their own test splits, pooled; None if all are empty.
        global_: The server's own model on the balanced global test; None where there is none.
        global_ece: Its calibration error there.
        balanced_perplexity, personal_perplexity, global_perplexity: Of text, where the accuracies are; a mean over
            clients is one over all their test tokens. None for images.
    """

    balanced_mean: float
    personal_mean: float
    personal_std: float
    personal_worst10: float
    personal_ece: float | None
    global_: float | None
    global_ece: float | None
    balanced_perplexity: float | None = None
    personal_perplexity: float | None = None
    global_perplexity: float | None = None

    def to_json(self) -> dict[str, float | None]:
        """As in metrics.jsonl and summary.json; perplexities only of text."""
        return {n.rstrip("_"): v for n, v in asdict(self).items() if v is not None or not n.endswith("perplexity")}


def over_clients(balanced: Sequence[Score], personal: Sequence[Score], server: Score | None) -> Accuracy:
    """Summarise the clients' scores, and the server's own model's."""
    own = np.sort([one.accuracy for one in personal])
    worst = own[: max(1, len(own) // 10)]
    return Accuracy(
        balanced_mean=float(np.mean([one.accuracy for one in balanced])),
        personal_mean=float(own.mean()),
        personal_std=float(own.std()),
        personal_worst10=float(worst.mean()),
        personal_ece=calibration_error(personal),
        global_=None if server is None else server.accuracy,
        global_ece=None if server is None else calibration_error([server]),
        balanced_perplexity=perplexity(balanced),
        personal_perplexity=perplexity(personal),
        global_perplexity=None if server is None else perplexity([server]),
    )


def _right(logits: Tensor, y: Tensor) -> Tensor:
    return logits.argmax(-1) == y


def _share(right: Tensor) -> float:
    return float(right.double().mean())
