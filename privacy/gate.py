"""The gate: the only maker of `Released`. Ask the ledger, bound, noise, book, and only then hand out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedkd import learn
from fedkd.errors import PrivacyError
from fedkd.knowledge import Knowledge, Schema
from fedkd.method import Peer
from privacy.accounting import Event
from privacy.ledger import Ledger
from privacy.mechanism import NOTHING, Mechanism


@dataclass(frozen=True)
class Released:
    """One client's message as it left.

    Attributes:
        peer: Who sent it.
        round: When.
        knowledge: What it says.
        event: Privacy loss that was booked for it; None when nothing is promised.
    """

    peer: Peer
    round: int
    knowledge: Knowledge
    event: Event | None


class Gate:
    """One client's front door."""

    def __init__(
        self, mechanism: Mechanism, ledger: Ledger, peer: Peer, schema: Schema, down: Knowledge = NOTHING
    ) -> None:
        self.mechanism = mechanism
        self.down = down
        self.ledger = ledger
        self.peer = peer
        self.schema = schema

    def ask(self) -> None:
        """Raise `BudgetExhausted` if this round's release would pass the budget. Ask before working."""
        event = self.mechanism.event()
        if event is not None:
            self.ledger.ask(self.peer.client, event)

    def release(self, t: int, raw: Knowledge, rng: np.random.Generator) -> Released:
        """Bound, check, noise, book, hand out. A release that cannot be made raises, and nothing leaves."""
        self.ask()
        who = f"client {self.peer.client}, round {t}"
        raw.fits(self.schema, who)
        bounded = self.mechanism.bound(raw, self.down)
        bounded.check(self.schema, who)
        knowledge = self.mechanism.noise(bounded, rng)
        event = self.mechanism.event()
        if event is not None:  # booked before it leaves: the ledger may say too much, never too little
            self.ledger.record(self.peer.client, t, event)
        return Released(self.peer, t, knowledge, event)


def admit(released: Released, t: int, expected: Peer, schema: Schema, mechanism: Mechanism) -> Released:
    """The server's side of the gate: refuse what is not this client's answer to this round.

    Raises:
        SchemaError: Wrong names, shapes, types, NaN, or a weight that is not positive.
        PrivacyError: Another round's or client's message, or one whose booking differs from the mechanism's.
    """
    who = f"client {expected.client}, round {t}"
    if (released.peer, released.round) != (expected, t):
        raise PrivacyError(f"{who}: got a message of client {released.peer.client}, round {released.round}")
    if released.event != mechanism.event():
        raise PrivacyError(f"{who}: expected the release to book {mechanism.event()}, got {released.event}")
    released.knowledge.check(schema, who)
    return released


class Pool:
    """What a server half may read of one round's answers: a `fedkd.method.Pool`."""

    def __init__(
        self,
        released: Sequence[Released],
        mechanism: Mechanism,
        rng: np.random.Generator,
        down: Knowledge = NOTHING,
    ) -> None:
        self._down = down
        self._released = sorted(released, key=lambda r: r.peer.client)
        self._mechanism = mechanism
        self._rng = rng
        self._mean: Knowledge | None = None

    @property
    def mean(self) -> Knowledge:
        """Weighted mean; uniform and noised when trust ends at the server. Noise is drawn once."""
        if self._mean is None:
            knowledge = [r.knowledge for r in self._released]
            server = self._mechanism.trust == "server"
            self._mean = (
                self._mechanism.noisy_mean(knowledge, self._rng, self._down) if server else learn.mean(knowledge)
            )
        return self._mean

    @property
    def each(self) -> Sequence[Released]:
        """Every answer, in client order.

        Raises:
            PrivacyError: Trust ends at the server, so a server half may read the noisy mean only.
        """
        if self._mechanism.trust == "server":
            raise PrivacyError("privacy.trust=server: a method may read the noisy mean, not single answers")
        return self._released
