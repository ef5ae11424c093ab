"""What a federation is judged by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from torch import Tensor

from fedkd.models import Model


def accuracy(model: Model, params: Mapping[str, Tensor], x: Tensor, y: Tensor) -> float:
    """Share of inputs x (n, *shape) whose largest logit is at the label y (n,); 0 for an empty set."""
    if not len(y):
        return 0.0
    return float((model.logits(params, x).argmax(-1) == y).double().mean())


@dataclass(frozen=True)
class Accuracy:
    """Accuracy over clients, in [0, 1].

    Attributes:
        balanced_mean: Mean over clients of each client's model on the balanced global test set.
        personal_mean: Mean over clients of each client's model on its own test split.
        personal_std: Population standard deviation of the latter: fairness.
        personal_worst10: Mean of its lowest tenth (at least one client).
        global_: The server's own model on the balanced global test; None where there is none.
    """

    balanced_mean: float
    personal_mean: float
    personal_std: float
    personal_worst10: float
    global_: float | None

    def to_json(self) -> dict[str, float | None]:
        """As in metrics.jsonl and summary.json."""
        raw = asdict(self)
        raw["global"] = raw.pop("global_")
        return raw


def over_clients(balanced: Sequence[float], personal: Sequence[float], server: float | None) -> Accuracy:
    """Summarise the clients' accuracies."""
    own = np.sort(np.asarray(personal, dtype=float))
    worst = own[: max(1, len(own) // 10)]
    return Accuracy(float(np.mean(balanced)), float(own.mean()), float(own.std()), float(worst.mean()), server)
