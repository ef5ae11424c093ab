"""Votes and labels in place of logits: GNMax, confident GNMax, randomised response.

Papernot, Song, Mironov, Raghunathan, Talwar, Erlingsson, "Scalable Private Learning with PATE", ICLR 2018,
arXiv:1802.08908, with clients as teachers; the bound that does not depend on the data. Kairouz, Oh, Viswanath,
"Extremal Mechanisms for Local Differential Privacy", NeurIPS 2014, arXiv:1407.1338, for k-ary randomised response, by
which PrivateKT answers public questions.

Client-level, replace one: a client's vote about a public input may move from one class to another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from fedkd.knowledge import Knowledge
from privacy.events import DpEvent, RandomisedResponse, Relation
from privacy.gaussian import finite, normal
from privacy.mechanism import NOTHING, PUBLIC_SET, SEEDED, UNAMPLIFIED, Mechanism
from privacy.releases import confident_votes, votes


@dataclass(frozen=True, kw_only=True)
class Voting(Mechanism):
    """What both have in common: a row of logits becomes a vote for its largest.

    Attributes:
        cohort: Clients that are asked in a round.
        rows: Rows in one message.
        scale: What a vote counts for where methods expect logits; 1 where they expect probabilities.
    """

    cohort: int
    rows: int
    scale: float = 1.0

    def bound(self, raw: Knowledge, down: Knowledge = NOTHING) -> Knowledge:
        """One vote a row (..., K), as ``scale`` in its place; weight 1."""
        return Knowledge({"logits": self.scale * _ballots(finite(raw.tensors["logits"]).argmax(-1), raw)})

    def sampling(self) -> str:
        """No amplification."""
        return UNAMPLIFIED

    def assumptions(self) -> tuple[str, ...]:
        """What the statement takes for granted."""
        return PUBLIC_SET, SEEDED


@dataclass(frozen=True, kw_only=True)
class GNMax(Voting):
    """The server counts votes, adds Gaussian noise and releases the winner of each row.

    Confident where there is a ``threshold``: a noisy test, paid for at every row, whether the winner has enough votes;
    of the rows that pass, in random order, ``answers`` at most are answered, and that many are paid for. Elsewhere the
    answer is that every class is as likely.

    Attributes:
        std: Standard deviation of the noise on each count, in votes.
        threshold: Votes that a winner needs, as a share of the cohort; None answers every row.
        threshold_std: Standard deviation of the test's noise, in votes.
        answers: Most rows that are answered in a round.
    """

    std: float
    threshold: float | None = None
    threshold_std: float = 0.0
    answers: int = 0
    trust: Literal["client", "server"] = "server"

    def events(self, first: bool = False) -> tuple[DpEvent, ...]:
        """Votes about every row; or tests of every row, and as many answers as there may be."""
        if self.threshold is None:
            return (votes(self.std, self.relation, self.unit, self.rows),)
        return confident_votes(self.threshold_std, self.std, self.relation, self.unit, self.rows, self.answers)

    def noisy_mean(self, bounded: list[Knowledge], rng: np.random.Generator, down: Knowledge = NOTHING) -> Knowledge:
        """The winners of the noisy counts, as ``scale`` in their places."""
        counts = torch.stack([k.tensors["logits"] for k in bounded]).sum(0) / self.scale
        winner = _ballots((counts + self.std * normal(rng, counts)).argmax(-1), bounded[0])
        if self.threshold is None:
            return Knowledge({"logits": self.scale * winner})
        most = counts.amax(-1).flatten()
        passed = most + self.threshold_std * normal(rng, most) >= self.threshold * self.cohort
        order = torch.from_numpy(rng.permutation(len(most))).to(most.device)
        chosen = torch.zeros_like(passed)
        chosen[order[passed[order]][: self.answers]] = True
        answered = chosen.reshape(counts.shape[:-1])[..., None]
        return Knowledge({"logits": self.scale * torch.where(answered, winner, 1 / counts.shape[-1])})

    def view(self) -> str:
        """The winners."""
        return "clients and outsiders see the noisy winners; the server is trusted with every client's votes"


@dataclass(frozen=True, kw_only=True)
class LocalVotes(Voting):
    """Each client answers each row by k-ary randomised response, and nobody has to be trusted.

    What leaves is the unbiased estimate of the vote that follows from the randomised label, a function of it.

    Attributes:
        report_epsilon: Epsilon of one row's report at delta 0.
        classes: K.
    """

    report_epsilon: float
    classes: int

    def events(self, first: bool = False) -> tuple[DpEvent, ...]:
        """A report for every row."""
        return (RandomisedResponse(self.report_epsilon, self.classes, self.rows),)

    def noise(self, bounded: Knowledge, rng: np.random.Generator, down: Knowledge = NOTHING) -> Knowledge:
        """Keep each vote or draw another one, then undo the bias."""
        said = randomised(bounded.tensors["logits"].argmax(-1), self.classes, self.report_epsilon, rng)
        odds = math.expm1(self.report_epsilon)
        unbiased = (_ballots(said, bounded) * (odds + self.classes) - 1) / odds
        return Knowledge({"logits": self.scale * unbiased})

    def view(self) -> str:
        """Everyone."""
        return "everyone, the server included, sees every client's randomised labels of public inputs"


@dataclass(frozen=True, kw_only=True)
class RandomLabels(Mechanism):
    """Label-level: each record's label is drawn once by k-ary randomised response, before anything is learnt from it.

    All that a client ever says is post-processing. Inputs are not protected, nor how many there are.

    Attributes:
        report_epsilon: Epsilon of one label.
        classes: K.
    """

    report_epsilon: float
    classes: int
    unit: Literal["label"] = "label"
    relation: Relation = "replace"

    def events(self, first: bool = False) -> tuple[DpEvent, ...]:
        """Once in a run, before a client's first answer."""
        return (RandomisedResponse(self.report_epsilon, self.classes),) if first else ()

    def labels(self, y: Tensor, classes: int, rng: np.random.Generator) -> Tensor:
        """The randomised labels (n,), the same in every round."""
        return randomised(y, classes, self.report_epsilon, rng)

    def bound(self, raw: Knowledge, down: Knowledge = NOTHING) -> Knowledge:
        """Nothing to bound; the weight becomes 1, as under every mechanism."""
        return replace(raw, weight=NOTHING.weight)

    def view(self) -> str:
        """Everyone."""
        return "everyone, the server included, sees what was learnt from randomised labels"

    def assumptions(self) -> tuple[str, ...]:
        """What the statement takes for granted."""
        return (
            "a record's input does not tell its label by itself, which no mechanism could hide",
            "the labels are drawn by a seeded generator, as simulations need; a deployment must draw them afresh",
        )


def randomised(y: Tensor, classes: int, report_epsilon: float, rng: np.random.Generator) -> Tensor:
    """Labels y (any shape), each kept with probability e^a / (e^a + K - 1), else another one, all as likely."""
    keep = 1 / (1 + (classes - 1) * math.exp(-report_epsilon))
    shape = tuple(y.shape)
    kept = torch.from_numpy(rng.random(shape) < keep).to(y.device)
    other = (y + torch.from_numpy(rng.integers(1, classes, shape)).to(y.device)) % classes
    return torch.where(kept, y, other)


def _ballots(winner: Tensor, like: Knowledge) -> Tensor:
    logits = like.tensors["logits"]
    return one_hot(winner, logits.shape[-1]).to(logits.dtype)
