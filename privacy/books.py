"""Record-level, client-level and label-level ledgers of one run, side by side.

Every release touches every unit. What a release costs a unit that its mechanism does not name is either implied by a
coarser unit (all data of a client hold its records, a record holds its label), or unbounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from fedkd.errors import ConfigError
from privacy.events import DpEvent, Event, Laplace, Relation, Unit
from privacy.ledger import Ledger
from privacy.statement import Statement

_COARSE_FIRST: tuple[Unit, ...] = ("client", "record", "label")
_FORMAT = 1


class Books:
    """Ledgers of one run, one for each unit and view.

    Args:
        ledgers: At least one; each pair of unit and view at most once.

    Raises:
        ConfigError: There is none, or two have the same unit and view.

    Example:
        >>> server = "the server sees released logits"
        >>> books = Books([Ledger(1e-3, "replace", unit, server) for unit in ("client", "record")])
        >>> books.record(7, 1, {"client": Event(3.0)})
        >>> [round(ledger.spent(7), 2) for ledger in books.ledgers]
        [0.83, 0.83]
    """

    def __init__(self, ledgers: Iterable[Ledger]) -> None:
        self.ledgers = tuple(ledgers)
        keys = {(ledger.unit, ledger.view) for ledger in self.ledgers}
        if not self.ledgers or len(keys) < len(self.ledgers):
            raise ConfigError("books hold one ledger or more, each with a unit and view of its own")

    def ask(self, client: int, events: Mapping[Unit, DpEvent]) -> None:
        """Return if every ledger can pay for this release; nothing is booked yet.

        Args:
            client: Client id.
            events: The release's event for each unit that its mechanism protects.

        Raises:
            BudgetExhausted: It would bring the client above one of the budgets. It must not be made.
        """
        for ledger, event in zip(self.ledgers, self._events(events), strict=True):
            ledger.ask(client, event)

    def record(self, client: int, round: int, events: Mapping[Unit, DpEvent]) -> None:
        """Book one release in every ledger; call it before the release leaves the client.

        Raises:
            ConfigError: An event has no price under its ledger's relation.
        """
        for ledger, event in zip(self.ledgers, self._events(events), strict=True):
            ledger.record(client, round, event)

    def statements(
        self, sampling: str, assumptions: Iterable[str] = (), exclusions: Iterable[str] = ()
    ) -> tuple[Statement, ...]:
        """Return what each ledger proves; arguments as for ``Ledger.statement``."""
        assumptions, exclusions = tuple(assumptions), tuple(exclusions)
        return tuple(ledger.statement(sampling, assumptions, exclusions) for ledger in self.ledgers)

    def to_json(self) -> dict[str, Any]:
        """Return all ledgers as JSON values."""
        return {"format": _FORMAT, "ledgers": [ledger.to_json() for ledger in self.ledgers]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Books:
        """Read what ``to_json`` wrote.

        Raises:
            ConfigError: The format is unknown, or a ledger cannot be read.
            PrivacyError: A ledger was edited.
        """
        if value.get("format") != _FORMAT or not isinstance(value.get("ledgers"), list):
            raise ConfigError(f"books should be of format {_FORMAT} with a list of ledgers, got {[*value]}")
        return cls(Ledger.from_json(ledger) for ledger in value["ledgers"])

    def _events(self, events: Mapping[Unit, DpEvent]) -> list[DpEvent]:
        if unknown := events.keys() - set(_COARSE_FIRST):
            raise ConfigError(f"unit should be one of {_COARSE_FIRST}, got {sorted(unknown)}")
        relations = {ledger.unit: ledger.relation for ledger in self.ledgers}
        if missing := events.keys() - relations.keys():
            raise ConfigError(f"no ledger has the unit {sorted(missing)}, so its relation is not known")
        return [self._event(ledger, events, relations) for ledger in self.ledgers]

    def _event(self, ledger: Ledger, events: Mapping[Unit, DpEvent], relations: Mapping[Unit, Relation]) -> DpEvent:
        if ledger.unit in events:
            return events[ledger.unit]
        coarser = _COARSE_FIRST[: _COARSE_FIRST.index(ledger.unit)]
        for unit in reversed(coarser):
            if unit in events and (found := implied(events[unit], relations[unit], ledger.relation)) is not None:
                return found
        return Event(0.0)


def implied(event: DpEvent, coarse: Relation, fine: Relation) -> DpEvent | None:
    """Return what a release costs a part of the unit that its event is about; None if that says nothing.

    A change of the part turns the unit's data into other data. Under replace that is one step; under add or remove it
    is two, out and in again, at twice the sensitivity. Under sampling the part's unit is drawn or not, with or without
    the change, which is a replacement, whatever the relation of the part.

    Args:
        event: The release's event for the whole unit.
        coarse: Relation of the whole unit.
        fine: Relation of the part.

    Example:
        >>> implied(Event(4.0), "add_remove", "add_remove")
        Event(noise_multiplier=2.0, sampling_rate=1.0, steps=1)
    """
    if not isinstance(event, Event | Laplace):  # the others are priced under replace, or whole numbers
        return event if coarse == fine == "replace" else None
    if event.sampling_rate < 1 and (fine == "add_remove" or isinstance(event, Laplace)):
        return None
    return replace(event, noise_multiplier=event.noise_multiplier / 2) if coarse == "add_remove" else event
