"""When runs first reached a target: rounds and bytes until then, with the runs that never did."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from experiments.conditions import METRICS, Condition, Metric, find
from experiments.report.values import number
from fedkd.errors import ConfigError
from fedkd.registry import near

TARGETS = (
    "Target: the first scored round at or beyond it, and all clients' bytes up and down until then. Median over seeds, "
    "in which a run that never was there counts as later than any other: none where half of the runs or more never "
    "were. Range: of the runs that were."
)


@dataclass(frozen=True)
class Target:
    """A value of a metric that is good enough."""

    metric: Metric
    value: float

    @property
    def name(self) -> str:
        """As on the command line."""
        return f"{self.metric.name}={self.value:.10g}"

    @property
    def title(self) -> str:
        """As in a table."""
        return f"{self.metric.title} {'≥' if self.metric.better > 0 else '≤'} {self.value:.10g}"

    def met(self, value: float) -> bool:
        """Whether a value is good enough."""
        return (value - self.value) * self.metric.better >= 0

    def to_json(self) -> dict[str, Any]:
        """As in compare.json."""
        return {"metric": self.metric.name, "value": self.value}


@dataclass(frozen=True)
class Reached:
    """When the runs of one condition first met a target, by seed; None for one that never did.

    Runs that do not have the metric at all are not in it.

    Attributes:
        rounds: The first scored round.
        sent: Bytes up and down, this round included.
    """

    rounds: Mapping[int, int | None]
    sent: Mapping[int, int | None]

    @property
    def count(self) -> int:
        """How many runs did."""
        return sum(at is not None for at in self.rounds.values())

    def to_json(self) -> dict[str, Any]:
        """As in compare.json."""
        said: dict[str, Any] = {"n": len(self.rounds), "reached": self.count}
        for name, values in (("rounds", self.rounds), ("bytes", self.sent)):
            said[name] = {"median": middle(values), "values": {str(seed): value for seed, value in values.items()}}
        return said


def parse(text: str) -> Target:
    """A target as it is written on the command line.

    Example:
        >>> parse("personal=0.8").title
        'Personal accuracy ≥ 0.8'
    """
    known = [name for name, metric in METRICS.items() if metric.by_round]
    name, sep, word = (part.strip() for part in text.partition("="))
    if not sep or name not in known:
        raise ConfigError(
            f"--target: expected metric=value, the metric one of {', '.join(known)}, got '{text}'{near(name, known)}"
        )
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise ConfigError(f"--target: {name} is a fraction from 0 to 1, got '{word}'")
    return Target(METRICS[name], value)


def reached(condition: Condition, target: Target) -> Reached:
    """When each run first met the target."""
    rounds: dict[int, int | None] = {}
    sent: dict[int, int | None] = {}
    for seed in condition.seeds:
        scored, total = False, 0
        for line in condition.runs[seed].lines:
            total += in_round(line)
            value = number(target.metric.pick(line))
            scored = scored or value is not None
            if value is not None and target.met(value):
                rounds[seed], sent[seed] = int(line["round"]), total
                break
        else:
            if scored:
                rounds[seed] = sent[seed] = None
    return Reached(rounds, sent)


def in_round(line: Mapping[str, Any]) -> int:
    """Bytes of one round, up and down, all clients."""
    told = line.get("bytes") or {}
    return int(told.get("up", 0)) + int(told.get("down", 0))


def middle(values: Mapping[int, int | None]) -> float | None:
    """Median over seeds, None counting as infinite, and for an infinite median.

    Example:
        >>> middle({0: 3, 1: 5, 2: None}), middle({0: 3, 1: 5, 2: None, 3: None})
        (5, None)
    """
    found = median([math.inf if value is None else value for value in values.values()] or [math.inf])
    return found if math.isfinite(found) else None


def doubts(conditions: Sequence[Condition]) -> list[str]:
    """What keeps the targets of these conditions from being quite comparable."""

    def values(key: str, missing: Any) -> list[Any]:
        found = {find(condition.config, f"federation.{key}") for condition in conditions}
        return sorted(missing if value is None else value for value in found)

    rounds, every, whom = values("rounds", 0), values("evaluate_every", 1), values("evaluate", "all")
    notes = []
    if len(rounds) > 1:
        notes.append(f"runs of {' and '.join(map(str, rounds))} rounds: a longer run has more time to reach a target")
    if every[-1] > 1:
        notes.append(
            f"scored every {' or '.join(map(str, every))} rounds: a target may have been met some rounds earlier"
        )
    if "cohort" in whom:
        notes.append("before the last round only the cohort was scored: targets are met by changing sets of clients")
    return notes
