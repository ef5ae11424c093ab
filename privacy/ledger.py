"""What has left each client, and what it cost.

A release is booked *before* it leaves: ask, record, then release. One that was booked and never arrived stays booked,
so the ledger is an upper bound on what anybody saw. Resending the same bytes needs no second entry; drawing new noise
does. A release that no mechanism protects is booked as ``Event(0.0)``; left out, it would count as nothing.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, get_args

from fedkd.errors import BudgetExhausted, ConfigError, PrivacyError
from privacy.accounting import (
    FINAL_INTERVAL,
    LIVE_INTERVAL,
    Opinions,
    Relation,
    Unit,
    accountant,
    epsilon,
    merge,
    opinions,
)
from privacy.events import DpEvent, check_priceable, read_event
from privacy.prices import has_distribution
from privacy.statement import Statement

_FORMAT = 1


class Ledger:
    """The releases of every client, towards one view and for one unit.

    An entry's full key is (client, unit, view); unit and view are those of the ledger, so a run with two adversaries
    keeps two ledgers: ``privacy.books`` holds them side by side.

    **Formal guarantee.** A client's releases compose; clients do not. Each release of client k is a function of k's
    data alone (and of what was released before), and clients are disjoint: adding, removing or replacing one record,
    or all data of one client, changes the releases of that client only. The federation's epsilon is therefore the
    largest client's, not the sum or the mean (parallel composition). Where noise is added once to the sum over a
    cohort, the same holds; book the release to every member of the cohort, or, if its event claims amplification by
    sampling the cohort, to every client that could have been sampled.

    Not covered: data that several clients hold, and whatever leaves a client without being booked.

    Args:
        delta: Probability with which the loss may exceed epsilon, in (0, 1).
        relation: ``"add_remove"`` or ``"replace"`` one unit.
        unit: ``"record"``, ``"client"`` or ``"label"``; a label is replaced, never absent.
        view: Who sees what, in words; it becomes part of the statement.
        budget: Largest epsilon that a client may spend; None only books.

    Raises:
        ConfigError: An argument is outside its range.

    Example:
        >>> from privacy.events import Event
        >>> ledger = Ledger(1e-3, "add_remove", "client", "the server sees released logits", budget=2.0)
        >>> event = Event(3.0)
        >>> ledger.ask(7, event)
        >>> ledger.record(7, 1, event)
        >>> round(ledger.spent(7), 2)
        0.83
    """

    def __init__(self, delta: float, relation: Relation, unit: Unit, view: str, budget: float | None = None) -> None:
        epsilon((), delta, relation)  # refuses a bad delta or relation
        if unit not in get_args(Unit):
            raise ConfigError(f"unit should be one of {get_args(Unit)}, got {unit!r}")
        if unit == "label" and relation != "replace":
            raise ConfigError(f"relation should be 'replace' for labels, which are never absent, got {relation!r}")
        if budget is not None and not budget > 0:
            raise ConfigError(f"budget should be positive, or None to book without a limit, got {budget!r}")
        self.delta = float(delta)
        self.relation: Relation = relation
        self.unit: Unit = unit
        self.view = view
        self.budget = budget
        self._releases: dict[int, list[tuple[int, DpEvent]]] = {}
        self._counts: dict[int, Counter[DpEvent]] = {}

    def record(self, client: int, round: int, event: DpEvent) -> None:
        """Book one release; call it before the release leaves the client.

        Args:
            client: Client id.
            round: Round of the release, from 1; 0 outside rounds.
            event: What is about to leave.

        Raises:
            ConfigError: The event has no price under the ledger's relation; nothing is booked.
        """
        client, round = operator.index(client), operator.index(round)  # plain integers, for JSON
        check_priceable(event, self.relation)
        self._releases.setdefault(client, []).append((round, event))
        self._counts.setdefault(client, Counter())[_once(event)] += event.steps

    def releases(self, client: int) -> tuple[tuple[int, DpEvent], ...]:
        """Return the (round, event) pairs of a client, in the order in which they were booked."""
        return tuple(self._releases.get(client, ()))

    def spent(self, client: int | None = None, interval: float = LIVE_INTERVAL) -> float:
        """Return the epsilon of one client, or that of the client who spent most.

        Args:
            client: Client id; None for the largest over all clients, which is the epsilon of the federation.
            interval: As in ``accounting.epsilon``: the live interval during a run, the final one for publication.
        """
        if client is not None:
            return self._cost(self._history(client), interval)
        return self._cost(self._dearest(interval), interval)

    def would_exceed(self, client: int, event: DpEvent, budget_epsilon: float) -> bool:
        """Return whether one more release would bring the client's epsilon above ``budget_epsilon``."""
        return self._exceeds(self._history(client, event), budget_epsilon)

    def _exceeds(self, after: tuple[DpEvent, ...], budget_epsilon: float) -> bool:
        # Both intervals give upper bounds, so the coarse one may acquit; only the fine one, for which noise is
        # calibrated, may convict.
        return self._cost(after, LIVE_INTERVAL) > budget_epsilon and self._cost(after, FINAL_INTERVAL) > budget_epsilon

    def ask(self, client: int, *events: DpEvent) -> None:
        """Return if the client may make this release, of one event or several; nothing is booked yet.

        Raises:
            BudgetExhausted: The release would bring the client above the budget. It must not be made.
        """
        if not events or self.budget is None or not self._exceeds(self._history(client, *events), self.budget):
            return
        after = self._cost(self._history(client, *events), FINAL_INTERVAL)
        raise BudgetExhausted(
            f"client {client}: epsilon is {self.spent(client, FINAL_INTERVAL):.4g}, the next release would make it "
            f"{after:.4g}, above the budget of {self.budget:.4g} (delta {self.delta:g}); it was not made"
        )

    def statement(self, sampling: str, assumptions: Iterable[str] = (), exclusions: Iterable[str] = ()) -> Statement:
        """Return what the ledger proves so far, at the final interval, with a second opinion by RDP.

        An empty ledger proves nothing (infinite epsilon): it cannot tell silence from releases that nobody booked.

        Args:
            sampling: How units entered the releases, in words.
            assumptions: What must hold for the statement to hold.
            exclusions: What also left the clients but was not booked.

        Raises:
            PrivacyError: The two accountants contradict each other; see ``accounting.opinions``.
        """
        dearest = self._dearest(FINAL_INTERVAL)
        both = opinions(dearest, self.delta, self.relation) if self._releases else Opinions(math.inf, None)
        return Statement(
            epsilon=both.epsilon,
            rdp=both.rdp if all(map(has_distribution, dearest)) else None,  # else it is the first opinion
            delta=self.delta,
            unit=self.unit,
            relation=self.relation,
            view=self.view,
            sampling=sampling,
            accountant=accountant(dearest),
            upper_bound=True,
            assumptions=tuple(assumptions),
            exclusions=tuple(exclusions),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the full history as JSON values.

        The result does not depend on the order in which clients were served. ``events`` lists the distinct events,
        ``releases`` holds [round, index into events] pairs, and ``composed`` the merged counts that are priced.
        """
        index: dict[DpEvent, int] = {}
        clients = [
            {
                "client": client,
                "releases": [[round, index.setdefault(event, len(index))] for round, event in self._releases[client]],
                "composed": [event.to_json() for event in self._history(client)],
            }
            for client in sorted(self._releases)
        ]
        return {
            "format": _FORMAT,
            "delta": self.delta,
            "relation": self.relation,
            "unit": self.unit,
            "view": self.view,
            "budget": self.budget,
            "events": [event.to_json() for event in index],
            "clients": clients,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Ledger:
        """Read what ``to_json`` wrote.

        Raises:
            ConfigError: The format or an event is unknown, or a part is missing.
            PrivacyError: A client's releases do not add up to its merged counts.
        """
        if value.get("format") != _FORMAT:
            raise ConfigError(f"ledger format should be {_FORMAT}, got {value.get('format')!r}")
        try:
            return cls._read(value)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ConfigError(f"not a ledger: {error!r}") from error

    @classmethod
    def _read(cls, value: Mapping[str, Any]) -> Ledger:
        ledger = cls(value["delta"], value["relation"], value["unit"], value["view"], value["budget"])
        events = [read_event(event) for event in value["events"]]
        for entry in value["clients"]:
            for round, index in entry["releases"]:
                ledger.record(entry["client"], round, events[index])
            ledger._check(entry["client"], entry["composed"])
        return ledger

    def _check(self, client: int, composed: list[dict[str, Any]]) -> None:
        if [event.to_json() for event in self._history(client)] != composed:
            raise PrivacyError(f"client {client}: the ledger's releases do not add up to its counts; was it edited?")

    def _history(self, client: int, *more: DpEvent) -> tuple[DpEvent, ...]:
        """A client's releases, merged; with more if asked."""
        counts = self._counts.get(client, Counter())
        booked = (replace(event, steps=steps) for event, steps in counts.items())
        return merge((*booked, *more))

    def _dearest(self, interval: float) -> tuple[DpEvent, ...]:
        """The history of the client who spent most; clients with equal histories are priced once."""
        histories = _longest({self._history(client) for client in self._counts})
        return max(histories, key=lambda history: self._cost(history, interval), default=())

    def _cost(self, history: tuple[DpEvent, ...], interval: float) -> float:
        return _priced(history, self.delta, self.relation, interval)


def _once(event: DpEvent) -> DpEvent:
    return event if event.steps == 1 else replace(event, steps=1)


def _longest(histories: set[tuple[DpEvent, ...]]) -> list[tuple[DpEvent, ...]]:
    """Leave out histories that another one contains: composing more never costs less, so they need no price."""
    counts = {history: {_once(event): event.steps for event in history} for history in histories}

    def within(small: tuple[DpEvent, ...], large: tuple[DpEvent, ...]) -> bool:
        return all(steps <= counts[large].get(event, 0) for event, steps in counts[small].items())

    kept: list[tuple[DpEvent, ...]] = []
    for history in sorted(histories, key=lambda one: sum(counts[one].values()), reverse=True):
        if not any(within(history, other) for other in kept):
            kept.append(history)
    return kept


@lru_cache(maxsize=16384)
def _priced(history: tuple[DpEvent, ...], delta: float, relation: Relation, interval: float) -> float:
    """Price a history; 1,000 clients with one history cost one query, not 1,000 merges."""
    return epsilon(history, delta, relation, interval)
