"""A mechanism: what stands between a client's raw answer and the world.

It bounds what one unit (a record, a client) can change, on the client, and adds noise where trust ends. Sensitivities
follow from the bound and the neighbouring relation; they are never typed in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from fedkd.knowledge import Knowledge, Params, Schema, nest
from fedkd.method import Method
from fedkd.task import Client, Task
from privacy.events import DpEvent, Relation, Unit
from privacy.ledger import Ledger

EXCLUDED = (
    "evaluation metrics, which a simulation reads from every client",
    "who took part, when, and how long it took",
    "hyper-parameters, where they were chosen by looking at private data",
)

UNAMPLIFIED = "none claimed: every release of a client counts in full, since the server knows who takes part"
PUBLIC_SET = "the public set does not depend on private data"
SEEDED = "the noise comes from a seeded generator, as simulations need; a deployment must draw it afresh"

NOTHING = Knowledge({})

CONTROL = "privacy"
"""Prefix of tensors that travel for the mechanism's sake; no method sees them."""


def with_control(said: Knowledge, control: Mapping[str, Tensor]) -> Knowledge:
    """A method's message with what the mechanism has to say."""
    return Knowledge({**said.tensors, **nest(CONTROL, control)}, said.weight) if control else said


def without_control(said: Knowledge) -> Knowledge:
    """A message as the method sees it."""
    own = {name: value for name, value in said.tensors.items() if not name.startswith(f"{CONTROL}/")}
    return said if len(own) == len(said.tensors) else Knowledge(own, said.weight)


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """No mechanism: answers leave as they are. The base class of the others.

    Attributes:
        delta: Delta of the whole run.
        budget: Epsilon that may be spent; None when nothing is promised.
    """

    delta: float = 1e-5
    budget: float | None = None

    unit: Unit = "client"
    relation: Relation = "replace"
    trust: Literal["client", "server"] = "client"

    @property
    def promises(self) -> bool:
        """Whether anything is promised."""
        return bool(self.events(first=True))

    def events(self, first: bool = False) -> tuple[DpEvent, ...]:
        """Privacy loss of one round's release, a client's first or a later one; empty when nothing is promised."""
        return ()

    @property
    def noisy_messages(self) -> bool:
        """Whether messages or their mean carry noise, so that `signal_to_noise` has an answer."""
        return False

    @property
    def hypothetical(self) -> bool:
        """Whether the epsilon is that of another federation, which this one only simulates."""
        return False

    def labels(self, y: Tensor, classes: int, rng: np.random.Generator) -> Tensor:
        """The labels (n,) that a client learns from; ``rng`` is the same in every round."""
        return y

    def personal_init(self, method: Method, task: Task, seed: int, client: int) -> Params:
        """What a client holds at home before its first round."""
        return method.personal_init(task, seed, client)

    def draws(self, rng: np.random.Generator, records: int, task: Task) -> dict[str, Tensor]:
        """Randomness of one client and round that the mechanism needs inside training."""
        return {}

    def update(self, method: Method, task: Task, client: Client, down: Knowledge) -> tuple[Params, Knowledge]:
        """Run the client's half of a round: (what stays at home, the raw answer)."""
        return method.client_update(task, client, down)

    def home(self, personal: Params) -> Params:
        """The part of what stays at home that the client itself uses."""
        return personal

    def speaker(self, personal: Params) -> Params:
        """The part of what stays at home that answers to the federation."""
        return personal

    def speaker_task(self, task: Task) -> Task:
        """The task as the one who answers sees it."""
        return task

    def bound(self, raw: Knowledge, down: Knowledge = NOTHING) -> Knowledge:
        """Limit what one unit can change, on the client, in the answer to ``down``."""
        return raw

    def noise(self, bounded: Knowledge, rng: np.random.Generator, down: Knowledge = NOTHING) -> Knowledge:
        """Add noise to one client's bounded answer to ``down``, where trust ends at the client."""
        return bounded

    def noisy_mean(self, bounded: list[Knowledge], rng: np.random.Generator, down: Knowledge = NOTHING) -> Knowledge:
        """Mean over clients of their answers to ``down`` with noise, where trust ends at the server."""
        raise NotImplementedError

    def signal_to_noise(self, mean: Knowledge, answers: Sequence[Knowledge], down: Knowledge = NOTHING) -> float | None:
        """How much more is in a mean of released answers than noise; None where no noise is added to messages."""
        return None

    def control(self) -> Params:
        """What the server tells clients for the mechanism's sake in round 1, by name; nothing by default."""
        return {}

    def controlled(self, control: Params, mean: Mapping[str, Tensor]) -> Params:
        """`control` of the next round, from the mean of what clients said for the mechanism's sake."""
        return control

    def besides(self) -> Schema:
        """What clients say for the mechanism's sake, besides the method's tensors."""
        return {}

    def ledger(self) -> Ledger:
        """An empty ledger in this mechanism's terms."""
        return Ledger(delta=self.delta, relation=self.relation, unit=self.unit, view=self.view(), budget=self.budget)

    def view(self) -> str:
        """Who sees what, as a clause."""
        return "everyone sees every message as the client made it"

    def sampling(self) -> str:
        """The sampling model behind the epsilon."""
        return "none"

    def assumptions(self) -> tuple[str, ...]:
        """What the statement takes for granted."""
        return ("messages leave the clients as they are",)
