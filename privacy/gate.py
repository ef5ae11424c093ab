"""The gate: the only maker of `Released`. Ask the ledger, bound, noise, book, and only then hand out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from fedkd import learn
from fedkd.errors import PrivacyError
from fedkd.knowledge import Knowledge, Params, Schema, nest, pick
from fedkd.method import Peer
from privacy.events import DpEvent
from privacy.ledger import Ledger
from privacy.mechanism import CONTROL, NOTHING, Mechanism, without_control


@dataclass(frozen=True)
class Released:
    """One client's message as it left.

    Attributes:
        peer: Who sent it.
        round: When.
        knowledge: What it says.
        events: Privacy loss that was booked for it; empty when nothing is promised.
    """

    peer: Peer
    round: int
    knowledge: Knowledge
    events: tuple[DpEvent, ...]


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
        if events := self._events():
            self.ledger.ask(self.peer.client, *events)

    def release(self, t: int, raw: Knowledge, rng: np.random.Generator) -> Released:
        """Bound, check, noise, book, hand out. A release that cannot be made raises, and nothing leaves."""
        self.ask()
        who = f"client {self.peer.client}, round {t}"
        raw.fits(self.schema, who)
        bounded = self.mechanism.bound(raw, self.down)
        bounded.check({**self.schema, **self.mechanism.besides()}, who)
        knowledge = self.mechanism.noise(bounded, rng, self.down)
        events = self._events()
        for event in events:  # booked before it leaves: the ledger may say too much, never too little
            self.ledger.record(self.peer.client, t, event)
        return Released(self.peer, t, knowledge, events)

    def _events(self) -> tuple[DpEvent, ...]:
        return self.mechanism.events(first=not self.ledger.releases(self.peer.client))


def admit(released: Released, t: int, expected: Peer, schema: Schema, mechanism: Mechanism) -> Released:
    """The server's side of the gate: refuse what is not this client's answer to this round.

    Raises:
        SchemaError: Wrong names, shapes, types, NaN, or a weight that is not positive.
        PrivacyError: Another round's or client's message, or one whose booking differs from the mechanism's.
    """
    who = f"client {expected.client}, round {t}"
    if (released.peer, released.round) != (expected, t):
        raise PrivacyError(f"{who}: got a message of client {released.peer.client}, round {released.round}")
    if released.events not in (mechanism.events(first=False), mechanism.events(first=True)):  # a first one may be lost
        raise PrivacyError(f"{who}: expected the release to book {mechanism.events()}, got {released.events}")
    released.knowledge.check({**schema, **mechanism.besides()}, who)
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

    @cached_property
    def _whole_mean(self) -> Knowledge:
        knowledge = [r.knowledge for r in self._released]
        if self._mechanism.trust == "server":
            return self._mechanism.noisy_mean(knowledge, self._rng, self._down)
        return learn.mean(knowledge)

    @property
    def mean(self) -> Knowledge:
        """Weighted mean; uniform and noised when trust ends at the server. Noise is drawn once."""
        return without_control(self._whole_mean)

    def control(self, before: Params) -> Params:
        """What the server will tell clients for the mechanism's sake, after this round."""
        if not before:
            return before
        if self._mechanism.trust == "server":
            said = self._whole_mean
        else:  # architectures may differ, what is said besides does not
            said = learn.mean([Knowledge(nest(CONTROL, pick(CONTROL, r.knowledge.tensors))) for r in self._released])
        return self._mechanism.controlled(before, pick(CONTROL, said.tensors))

    def signal_to_noise(self) -> float | None:
        """How much more than noise was heard; None where messages carry none, or are not of one kind."""
        if not self._mechanism.noisy_messages or len({frozenset(r.knowledge.tensors) for r in self._released}) > 1:
            return None
        return self._mechanism.signal_to_noise(self._whole_mean, [r.knowledge for r in self._released], self._down)

    @property
    def each(self) -> Sequence[Released]:
        """Every answer, in client order.

        Raises:
            PrivacyError: Trust ends at the server, so a server half may read the noisy mean only.
        """
        if self._mechanism.trust == "server":
            raise PrivacyError("privacy.trust=server: a method may read the noisy mean, not single answers")
        if not self._mechanism.besides():
            return self._released
        return [replace(r, knowledge=without_control(r.knowledge)) for r in self._released]
