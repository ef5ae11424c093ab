"""What an epsilon means, in words and as JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, get_args

from privacy.arguments import check_delta, choice, require
from privacy.events import Relation, Unit

_WHOM = {"record": "one record of one client", "client": "all data of one client", "label": "the label of one record"}


@dataclass(frozen=True)
class Statement:
    """Everything that an epsilon means; an epsilon alone means nothing.

    Attributes:
        epsilon: Privacy loss in nats; infinite where no mechanism protects the unit.
        delta: Probability with which the loss may exceed epsilon.
        unit: What is protected: one ``"record"`` of one client, all data of one ``"client"``, or the ``"label"`` of one
            record.
        relation: How neighbouring data sets differ: ``"add_remove"`` or ``"replace"`` one unit.
        view: Who sees what, for example ``"the server sees every client's released logits"``.
        sampling: How units enter a release, for example ``"Poisson, rate 0.35, hidden from the server"``.
        accountant: Name and version of what computed epsilon; see ``accounting.accountant``.
        upper_bound: Whether epsilon bounds the true loss from above; false for an estimate.
        assumptions: What must hold for the statement to hold.
        exclusions: What also leaves a client but is not covered.
        rdp: A second opinion: epsilon of the same releases by Renyi differential privacy, which is looser but computed
            another way. None where there is none.

    Raises:
        ConfigError: A value is outside its range.
    """

    epsilon: float
    delta: float
    unit: Unit
    relation: Relation
    view: str
    sampling: str
    accountant: str
    upper_bound: bool
    assumptions: tuple[str, ...] = ()
    exclusions: tuple[str, ...] = ()
    rdp: float | None = None

    def __post_init__(self) -> None:
        require(self.epsilon >= 0, "epsilon", "0 or more", self.epsilon)
        check_delta(self.delta)
        choice("unit", self.unit, get_args(Unit))
        choice("relation", self.relation, get_args(Relation))
        object.__setattr__(self, "assumptions", tuple(self.assumptions))
        object.__setattr__(self, "exclusions", tuple(self.exclusions))

    @property
    def private(self) -> bool:
        """Whether any differential privacy is claimed."""
        return math.isfinite(self.epsilon)

    def to_json(self) -> dict[str, Any]:
        """Return the statement as JSON values; an infinite epsilon, which JSON does not know, becomes null."""
        value = {field.name: getattr(self, field.name) for field in fields(self)}
        finite = self.rdp is not None and math.isfinite(self.rdp)
        return value | {
            "epsilon": self.epsilon if self.private else None,
            "assumptions": list(self.assumptions),
            "exclusions": list(self.exclusions),
            "rdp": self.rdp if finite else None,
            "rdp_ratio": self.rdp / self.epsilon if finite and self.rdp and self.epsilon else None,
        }

    def __str__(self) -> str:
        """Return the statement as one paragraph."""
        return " ".join([*(self._guarantee() if self.private else self._no_guarantee()), *self._exclusions()])

    def _no_guarantee(self) -> list[str]:
        return [f"For one {self.unit}, no differential privacy is claimed: {self.view}, and no mechanism bounds it."]

    def _guarantee(self) -> list[str]:
        epsilon = rounded_up(self.epsilon)
        size = f"at most {epsilon}" if self.upper_bound else f"about {epsilon} (an estimate, not a bound)"
        change = "adding or removing" if self.relation == "add_remove" else "replacing"
        second = "" if self.rdp is None else f" Second opinion, Renyi: {rounded_up(self.rdp)}."
        lines = [
            f"Against {change} {_WHOM[self.unit]}, epsilon is {size} at delta {self.delta:g}, where {self.view}.",
            f"Sampling: {self.sampling}. Accountant: {self.accountant}.{second}",
        ]
        return [*lines, f"Assumed: {'; '.join(self.assumptions)}."] if self.assumptions else lines

    def _exclusions(self) -> list[str]:
        return [f"Not covered: {'; '.join(self.exclusions)}."] if self.exclusions else []


def rounded_up(epsilon: float) -> str:
    """An epsilon with three decimals, rounded up, lest it claims more than was computed."""
    return f"{math.ceil(epsilon * 1000) / 1000:.3f}" if math.isfinite(epsilon) else "infinite"
