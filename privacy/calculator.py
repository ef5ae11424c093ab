"""What a mechanism costs before anything is run: epsilon of noise, noise for an epsilon, and other readings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from fedkd.errors import ConfigError
from privacy import releases
from privacy.accounting import LIVE_INTERVAL, accountant, epsilon, merge, opinions, rdp_epsilon
from privacy.arguments import check_delta, choice, integer, positive
from privacy.calibration import calibrate, calibrate_by
from privacy.events import DpEvent, Relation, Unit
from privacy.prices import has_distribution
from privacy.releases import EVERYONE, Observer, Poisson, Sampling, WithoutReplacement
from privacy.special import random_allocation
from privacy.statement import Statement

Kind = Literal["gaussian", "laplace", "counts", "labels", "votes", "confident-votes"]

ABOUT: dict[str, str] = {
    "gaussian": "Gaussian noise on a sum of contributions clipped in L2: logits, updates, gradients (DP-SGD), features",
    "laplace": "Laplace noise on a sum of contributions clipped in L1",
    "counts": "discrete Gaussian noise on a histogram of whole numbers; the noise is in counts",
    "labels": "k-ary randomised response on each label; the noise is the epsilon of one report",
    "votes": "the noisy largest of teachers' votes (GNMax); the noise is in votes",
    "confident-votes": "a noisy threshold test on every query, votes on those that pass (confident GNMax)",
}
"""One line about each kind."""

EXCLUDED = (
    "anything else that leaves: evaluation metrics, numbers of records, losses",
    "who took part, when, and how long it took",
    "hyper-parameters, where they were chosen by looking at private data",
)

_SEES = {
    "server": "the server sees every release and knows who takes part",
    "client": "other clients see every release, but not who takes part",
    "outsider": "outsiders see every release, but not who takes part",
}


@dataclass(frozen=True, kw_only=True)
class Question:
    """A mechanism that somebody thinks of.

    Attributes:
        kind: See ``ABOUT``.
        noise: Standard deviation (Laplace: scale) over ``clip``; for counts and votes in counts; for labels the epsilon
            of one report.
        steps: Releases; for confident votes the queries that are tested.
        delta: Probability with which the loss may exceed epsilon.
        relation: ``"add_remove"`` or ``"replace"`` one unit.
        unit: What is protected.
        observer: Against whom.
        sampling: What the sampler does.
        clip: Bound of one contribution; it changes no epsilon, only what the noise is in numbers.
        units: Number of units, if known: delta must be below one over it.
        classes: Labels to choose from.
        threshold_noise: Of the threshold test.
        answers: Queries that pass it.

    Raises:
        ConfigError: A value is outside its range.
    """

    noise: float
    steps: int
    delta: float
    kind: Kind = "gaussian"
    relation: Relation = "add_remove"
    unit: Unit = "record"
    observer: Observer = "server"
    sampling: Sampling = field(default=EVERYONE)
    clip: float = 1.0
    units: int | None = None
    classes: int = 10
    threshold_noise: float | None = None
    answers: int | None = None

    def __post_init__(self) -> None:
        choice("kind", self.kind, get_args(Kind))
        choice("relation", self.relation, get_args(Relation))
        choice("unit", self.unit, get_args(Unit))
        choice("observer", self.observer, get_args(Observer))
        positive("noise", self.noise)
        positive("clip", self.clip)
        integer("steps", self.steps, 1)
        check_delta(self.delta, None if self.units is None else integer("units", self.units, 1))
        if self.kind not in ("gaussian", "laplace") and self.sampling != EVERYONE:
            raise ConfigError(f"sampling is priced for gaussian and laplace noise, not for {self.kind}: claim none")
        if self.kind == "labels" and (self.unit, self.relation) != ("label", "replace"):
            raise ConfigError(
                "randomised response hides which label a record has: ask with unit label, relation replace"
            )
        if self.unit == "label" and self.relation != "replace":
            raise ConfigError("a label is replaced, never absent: ask with relation replace")
        if self.kind == "confident-votes" and (self.threshold_noise is None or self.answers is None):
            raise ConfigError("confident votes need the threshold test's noise and the number of answers")

    def events(self) -> tuple[DpEvent, ...]:
        """The releases.

        Raises:
            ConfigError: The sampling amplifies nothing for this observer, or nobody prices it.
        """
        std = self.noise * self.clip
        match self.kind:
            case "gaussian":
                return (releases.gaussian(std, self.clip, *self._who, self.sampling, self.steps),)
            case "laplace":
                return (releases.laplace(std, self.clip, *self._who, self.sampling, self.steps),)
            case "counts":
                return (releases.counts(self.noise, self.relation, self.steps),)
            case "labels":
                return (releases.randomised_response(self.noise, self.classes, self.steps),)
            case "votes":
                return (releases.votes(self.noise, self.relation, self.unit, self.steps),)
            case "confident-votes":
                tests = self.threshold_noise or 0.0, self.noise
                return releases.confident_votes(*tests, self.relation, self.unit, self.steps, self.answers or 0)

    @property
    def _who(self) -> tuple[Relation, Unit, Observer]:
        return self.relation, self.unit, self.observer

    def statement(self) -> Statement:
        """Epsilon, and everything that it means, with a second opinion by RDP.

        Raises:
            ConfigError: See ``events``.

        Example:
            >>> asked = Question(noise=1.0, steps=1000, delta=1e-5, sampling=Poisson(0.01))
            >>> round(asked.statement().epsilon, 3)
            1.828
        """
        events = self.events()
        both = opinions(events, self.delta, self.relation)
        return Statement(
            epsilon=both.epsilon,
            rdp=both.rdp if all(map(has_distribution, events)) else None,
            delta=self.delta,
            unit=self.unit,
            relation=self.relation,
            view=_SEES[self.observer],
            sampling=str(self.sampling),
            accountant=accountant(events),
            upper_bound=True,
            assumptions=self._assumptions(),
            exclusions=EXCLUDED,
        )

    def with_epsilon(self, target: float) -> Question:
        """The same question with the least noise that stays within an epsilon; of labels, the most honest reports.

        Raises:
            ConfigError: The target is not positive, or no noise is enough for it.

        Example:
            >>> round(Question(noise=1.0, steps=1, delta=1e-5).with_epsilon(1.0).noise, 4)
            3.7306
        """
        if self.kind == "gaussian" and not isinstance(self.sampling, WithoutReplacement):
            self.events()  # refuses what cannot be claimed
            rate = self.sampling.rate if isinstance(self.sampling, Poisson) else 1.0
            multiplier = calibrate(target, self.delta, rate, self.steps, self.relation)
            # The next number up: multiplying and dividing by the sensitivity may have rounded the last digit down.
            return replace(self, noise=math.nextafter(multiplier * releases.sensitivity(1.0, self.relation), math.inf))
        inverse = self.kind == "labels"

        def make(noise: float) -> tuple[DpEvent, ...]:
            return replace(self, noise=1 / noise if inverse else noise).events()

        noise = calibrate_by(make, target, self.delta, self.relation, least=0.01)
        return replace(self, noise=1 / noise if inverse else noise)

    def _assumptions(self) -> tuple[str, ...]:
        match self.kind:
            case "gaussian" | "laplace":
                norm, name = ("L2", "standard deviation") if self.kind == "gaussian" else ("L1", "scale")
                moved = releases.sensitivity(self.clip, self.relation)
                std = self.noise * self.clip
                return (
                    f"each contribution is clipped to {norm} norm {self.clip:g}, so the sum moves by {moved:g} at most",
                    f"noise of {name} {std:g} is added once to the sum of each release ({std / moved:.4g} times that)",
                    "means divide by a public number, with equal weights",
                )
            case "counts":
                return (f"each unit counts once in each histogram; noise of parameter {self.noise:g} on every cell",)
            case "labels":
                kept = math.exp(self.noise) / (math.exp(self.noise) + self.classes - 1)
                return (f"each report is the true label of {self.classes} with probability {kept:.4g}",)
            case "votes":
                return (f"one unit changes one teacher's vote; noise of {self.noise:g} votes on each count",)
            case "confident-votes":
                return (
                    f"one unit changes one teacher's vote; noise of {self.noise:g} votes on each count, and of "
                    f"{self.threshold_noise:g} on the largest in each of {self.steps} tests",
                )


@dataclass(frozen=True)
class Comparison:
    """The same noise under another reading.

    Attributes:
        reading: What is read differently.
        relation: Neighbouring relation of this reading.
        accountant: What computed it.
        epsilon: In nats; None where it could not be computed, and ``reading`` says why.
    """

    reading: str
    relation: Relation
    accountant: str
    epsilon: float | None


def comparisons(asked: Question, allocation: bool = False) -> list[Comparison]:
    """Return the same mechanism by other accountants, and under other samplings.

    Args:
        asked: The mechanism.
        allocation: Whether to ask pld-accounting about random allocation, which takes about half a minute.

    Raises:
        ConfigError: The mechanism itself cannot be priced.
    """
    events = asked.events()
    return [*_accountants(asked, events), *_samplings(asked, allocation)]


def _accountants(asked: Question, events: tuple[DpEvent, ...]) -> Iterator[Comparison]:
    delta, relation = asked.delta, asked.relation
    if all(map(has_distribution, events)):
        yield Comparison("as asked", relation, "PLD", epsilon(events, delta, relation))
    yield Comparison("as asked", relation, "RDP", rdp_epsilon(events, delta, relation))
    count = sum(event.steps for event in events)
    single = [(event.steps, epsilon([replace(event, steps=1)], delta / count, relation)) for event in merge(events)]
    yield Comparison("sum of single releases, delta shared out", relation, "basic", sum(n * one for n, one in single))


def _samplings(asked: Question, allocation: bool) -> Iterator[Comparison]:
    sampling = asked.sampling
    if sampling == EVERYONE or asked.kind not in ("gaussian", "laplace"):
        return

    def other(**changes: object) -> float:
        changed = replace(asked, **changes)  # type: ignore[arg-type]
        return epsilon(changed.events(), changed.delta, changed.relation)

    rate = _rate(sampling)
    turns = max(1, math.ceil(rate * asked.steps - 1e-9))
    yield Comparison("no amplification, every release", asked.relation, "PLD", other(sampling=EVERYONE))
    fixed = f"no amplification, {turns} turns by a fixed schedule"
    yield Comparison(fixed, asked.relation, "PLD", other(sampling=EVERYONE, steps=turns))
    if asked.kind == "laplace":
        return
    for relation in get_args(Relation):
        if (sampling, relation) != (Poisson(rate), asked.relation):
            value = other(sampling=Poisson(rate), relation=relation)
            yield Comparison(f"Poisson, rate {rate:g}", relation, "PLD", value)
    if asked.units is not None and isinstance(sampling, Poisson) and (cohort := round(rate * asked.units)):
        drawn = WithoutReplacement(cohort, asked.units)
        value = other(sampling=drawn, relation="replace")
        yield Comparison(f"exactly {cohort} of {asked.units}", "replace", "RDP", value)
    if allocation:
        value = random_allocation(asked.noise, asked.steps, turns, asked.delta)
        name = f"each unit in exactly {turns} of {asked.steps} releases"
        yield Comparison(name, "add_remove", "random allocation", value)


def against_rounds(asked: Question, rounds: list[int]) -> list[float]:
    """Return epsilon after each number of releases."""
    return [_quick(replace(asked, steps=number)) for number in rounds]


def against_cohort(asked: Question, cohorts: list[int], mean_noise: bool) -> list[float]:
    """Return epsilon for each size of the cohort, drawn from ``asked.units``.

    Args:
        asked: A Gaussian mechanism over sampled units, their number known.
        cohorts: Sizes, expected ones under Poisson sampling.
        mean_noise: Whether the noise on the *mean* stays, and with it the accuracy, so that the noise on the sum grows
            with the cohort; else the noise on the sum stays.
    """
    units = integer("units", asked.units, 1)
    base = _rate(asked.sampling) * units
    found = []
    for m in cohorts:
        drawn = Poisson(m / units) if isinstance(asked.sampling, Poisson) else WithoutReplacement(m, units)
        noise = asked.noise * m / base if mean_noise else asked.noise
        found.append(_quick(replace(asked, sampling=drawn, noise=noise)))
    return found


def _rate(sampling: Sampling) -> float:
    """Share of the units in one release, on average."""
    match sampling:
        case Poisson():
            return sampling.rate
        case WithoutReplacement():
            return sampling.cohort / sampling.population
        case _:
            return 1.0


def _quick(asked: Question) -> float:
    return epsilon(asked.events(), asked.delta, asked.relation, LIVE_INTERVAL)
