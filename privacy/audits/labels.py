"""Label inference: what a client's answers about public inputs give away about how many records of each class it has.

A model favours the classes that it saw often, on inputs of any class. The guess is the mean of the client's
probabilities over the public inputs: nothing is trained, no reference model is needed, and whoever sees one message can
do it. (Stronger attacks on federated distillation are known, for example arXiv 2502.08001; this one is a lower bound on
what could be found out.) The null: guesses and clients belong together no better than if they were shuffled.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedkd.errors import ConfigError
from fedkd.seeds import generator
from privacy.audits.membership import auroc

Floats = npt.NDArray[np.float64]
_SHUFFLES = 9999


@dataclass(frozen=True)
class LabelResult:
    """What the messages of all clients give away about their labels.

    Attributes:
        target: Which messages.
        distance: Mean over clients of the total variation distance between guess and truth, in [0, 1].
        shuffled: The same with every guess held against another client, on average: what guessing gives that knows the
            federation and not the client.
        p_value: Probability of so small a distance when guesses say nothing about whose they are (one-sided).
        presence: AUROC of telling, from a guess, classes that a client has from those that it has not; None where
            every client has every class.
        clients: Number of clients.
    """

    target: str
    distance: float
    shuffled: float
    p_value: float
    presence: float | None
    clients: int

    @property
    def leaks(self) -> bool:
        """Whether guesses fit their own clients better than others at the 5 % level."""
        return self.p_value <= 0.05

    def __str__(self) -> str:
        """Return one sentence."""
        there = (
            ""
            if self.presence is None
            else f", classes that are there told from those that are not at AUROC {self.presence:.2f}"
        )
        return (
            f"{self.target}: clients' label distributions guessed within {self.distance:.2f} (total variation; "
            f"{self.shuffled:.2f} with guesses shuffled over {self.clients} clients, p = {self.p_value:.2g}){there}."
        )

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {**asdict(self), "leaks": self.leaks}


def label_inference(target: str, answers: npt.ArrayLike, counts: npt.ArrayLike, seed: int) -> LabelResult:
    """Guess every client's label distribution from its answers.

    Args:
        target: Which messages.
        answers: (n, m, K) logits of n clients on m public inputs; noised ones as they left.
        counts: (n, K) how many training records of each class each client has.
        seed: Seed of the shuffles.

    Raises:
        ConfigError: The shapes differ, fewer than two clients, a client without records, or answers not finite.

    Example:
        >>> clear = 5.0 * np.eye(3)[:, None, :].repeat(4, axis=1)
        >>> found = label_inference("message", clear, 10 * np.eye(3), seed=0)
        >>> round(found.distance, 2), found.presence
        (0.01, 1.0)
    """
    logits, held = np.asarray(answers, np.float64), np.asarray(counts, np.float64)
    if logits.ndim != 3 or held.shape != (logits.shape[0], logits.shape[2]) or not logits.shape[1]:
        raise ConfigError(
            f"{target}: answers should be (n, m, K) and counts (n, K), got {logits.shape} and {held.shape}"
        )
    if len(held) < 2 or not held.sum(1).all():
        raise ConfigError(f"{target}: label inference needs two clients or more, each with records, got {len(held)}")
    if not np.isfinite(logits).all():
        raise ConfigError(f"{target}: answers should be finite; did training diverge?")
    guess, truth = guessed(logits), held / held.sum(1, keepdims=True)
    gaps = np.abs(guess[:, None] - truth[None]).sum(-1) / 2  # (guess, client)
    n, rng = len(held), generator(seed, "label shuffles")
    own = float(np.diagonal(gaps).mean())
    orders = rng.random((_SHUFFLES, n)).argsort(1)
    null = gaps[orders, np.arange(n)].mean(1)
    there = held > 0
    known = None if there.all() or not there.any() else auroc(-guess[there], -guess[~there])
    as_small = int((null <= own + 1e-12).sum())
    return LabelResult(target, own, float(null.mean()), (1 + as_small) / (1 + _SHUFFLES), known, n)


def guessed(logits: Floats) -> Floats:
    """Label distributions (n, K) guessed from logits (n, m, K): mean probabilities."""
    scaled = np.exp(logits - logits.max(-1, keepdims=True))
    shares: Floats = (scaled / scaled.sum(-1, keepdims=True)).mean(1)
    return shares
