"""What a release was, as data: its mechanism, its noise over its sensitivity, how its units were sampled, how often.

An event says nothing about price; ``privacy.accounting`` interprets it. Noise multipliers are relative to the
sensitivity *under the neighbouring relation that is accounted*, so an unsampled release costs the same under both.
Nobody should work one out by hand: ``privacy.releases`` computes it from the bound, the relation and the unit.

**Sampling under replace.** For a sampled release the distance between two contributions does not suffice: a unit that
is left out contributes zero, so the norm of each contribution matters too. ``noise_multiplier`` is then
``std / (2 C)``, also where two contributions are always nearer than 2C. (One-hot rows lie sqrt(2) C apart; at rate
0.1, std C / 2 and epsilon 2, dividing by sqrt(2) C would claim a delta 14 times too small.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Self, get_args

from fedkd.errors import ConfigError
from privacy.arguments import integer, number, positive, require

Relation = Literal["add_remove", "replace"]
Unit = Literal["record", "client", "label"]


@dataclass(frozen=True)
class _Kind:
    """What all kinds share: JSON tagged with the kind."""

    kind: ClassVar[str]
    only: ClassVar[Relation | None] = None  # the only relation under which the kind has a price

    def to_json(self) -> dict[str, Any]:
        """Return the event as JSON values, tagged with its kind."""
        return {"kind": self.kind, **{field.name: getattr(self, field.name) for field in fields(self)}}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Read what ``to_json`` of this kind wrote.

        Raises:
            ConfigError: The kind is another one, or the fields are not those of the kind.
        """
        arguments = {key: item for key, item in value.items() if key != "kind"}
        if value.get("kind") != cls.kind:
            raise ConfigError(f"event kind should be {cls.kind!r}, got {value.get('kind')!r}")
        if set(arguments) != {field.name for field in fields(cls)}:
            raise ConfigError(f"a {cls.kind} event has the fields {[f.name for f in fields(cls)]}, got {[*arguments]}")
        return cls(**arguments)

    def _plain(self, **values: float) -> None:
        # Plain numbers, so that equal events hash alike and go to JSON whatever numpy type they came from.
        for name, value in values.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Event(_Kind):
    """``steps`` Gaussian releases of the same kind; the commonest event, hence the plain name.

    Attributes:
        noise_multiplier: Standard deviation of the noise over the L2 sensitivity under the relation that is accounted
            (module docstring); 0 is a release without noise, hence without a guarantee.
        sampling_rate: Probability, in (0, 1], with which each unit enters a release, drawn independently (Poisson) and
            unseen by the adversary; 1 when every unit takes part.
        steps: Number of releases, at least 1.

    Raises:
        ConfigError: A value is outside its range.

    Example:
        >>> Event(1.0, 0.25, steps=3) == Event.from_json(Event(1.0, 0.25, steps=3).to_json())
        True
    """

    kind: ClassVar[str] = "gaussian"

    noise_multiplier: float
    sampling_rate: float = 1.0
    steps: int = 1

    def __post_init__(self) -> None:
        self._plain(
            noise_multiplier=_noise(self.noise_multiplier),
            sampling_rate=_rate(self.sampling_rate),
            steps=integer("steps", self.steps, 1),
        )


@dataclass(frozen=True)
class Laplace(_Kind):
    """``steps`` Laplace releases, of a number or of a vector with independent noise in each coordinate.

    A vector whose L1 norm moves by 1 costs no more than a number that moves by 1: Laplace noise is log-concave, so the
    trade-off of a shift by s + t is the group composition of the shifts by s and by t (Dong, Roth, Su 2022,
    arXiv 1905.02383), which bounds their product from below.

    Attributes:
        noise_multiplier: Scale b of the noise over the L1 sensitivity under the relation; 0 is a release without noise.
        sampling_rate: As in ``Event``; below 1 under ``"add_remove"`` only.
        steps: Number of releases, at least 1.

    Raises:
        ConfigError: A value is outside its range.
    """

    kind: ClassVar[str] = "laplace"

    noise_multiplier: float
    sampling_rate: float = 1.0
    steps: int = 1

    def __post_init__(self) -> None:
        self._plain(
            noise_multiplier=_noise(self.noise_multiplier),
            sampling_rate=_rate(self.sampling_rate),
            steps=integer("steps", self.steps, 1),
        )


@dataclass(frozen=True)
class DiscreteGaussian(_Kind):
    """``steps`` releases of one whole number with discrete Gaussian noise (Canonne, Kamath, Steinke 2020, 2004.00010).

    A vector is one step for each coordinate that a unit can change; ``releases.counts`` does it for a histogram.

    Attributes:
        sigma: The noise's parameter, nearly its standard deviation; 0 is a release without noise, 100,000 the most.
        sensitivity: Largest change of the number under the relation, a whole number.
        steps: Number of releases, at least 1.

    Raises:
        ConfigError: A value is outside its range.
    """

    kind: ClassVar[str] = "discrete_gaussian"

    sigma: float
    sensitivity: int = 1
    steps: int = 1

    def __post_init__(self) -> None:
        require(_noise(self.sigma, "sigma") <= 1e5, "sigma", "at most 100000", self.sigma)
        self._plain(
            sigma=number("sigma", self.sigma),
            sensitivity=integer("sensitivity", self.sensitivity, 1),
            steps=integer("steps", self.steps, 1),
        )


@dataclass(frozen=True)
class RandomisedResponse(_Kind):
    """``steps`` reports of one unit's label by k-ary randomised response; replace only (a label becomes another one).

    The label is reported with probability e^a / (e^a + k - 1), any other one with 1 / (e^a + k - 1) each.

    Attributes:
        report_epsilon: The a above: epsilon of one report at delta 0; in (0, 100].
        classes: Number k of labels, at least 2.
        steps: Number of reports, at least 1.

    Raises:
        ConfigError: A value is outside its range.
    """

    kind: ClassVar[str] = "randomised_response"
    only: ClassVar[Relation | None] = "replace"

    report_epsilon: float
    classes: int
    steps: int = 1

    def __post_init__(self) -> None:
        require(
            positive("report_epsilon", self.report_epsilon) <= 100, "report_epsilon", "at most 100", self.report_epsilon
        )
        self._plain(
            report_epsilon=number("report_epsilon", self.report_epsilon),
            classes=integer("classes", self.classes, 2),
            steps=integer("steps", self.steps, 1),
        )

    @property
    def keep(self) -> float:
        """Probability that the true label is reported."""
        return 1 / (1 + (self.classes - 1) * math.exp(-self.report_epsilon))

    @property
    def uniform(self) -> float:
        """Probability of a label drawn uniformly from all k, the true one included: the same mechanism, told anew."""
        return self.classes / (math.expm1(self.report_epsilon) + self.classes)


@dataclass(frozen=True)
class FixedSize(_Kind):
    """``steps`` Gaussian releases over a cohort of fixed size, drawn without replacement; replace only, by RDP only.

    Wang, Balle, Kasiviswanathan 2019, arXiv 1808.00087, theorem 27. There is no tight accountant for it, so a history
    that holds such an event is priced by RDP as a whole.

    Attributes:
        noise_multiplier: Standard deviation of the noise over the L2 sensitivity *under replace*, twice the bound C.
            With std / C instead, the theorem's number is no bound: at 20 of 100, std = C and 100 rounds it says 29.8,
            while a unit at C among others at -C already has epsilon 57.
        cohort: Units in each release.
        population: Units it is drawn from.
        steps: Number of releases, at least 1.

    Raises:
        ConfigError: A value is outside its range.
    """

    kind: ClassVar[str] = "fixed_size_gaussian"
    only: ClassVar[Relation | None] = "replace"

    noise_multiplier: float
    cohort: int
    population: int
    steps: int = 1

    def __post_init__(self) -> None:
        self._plain(
            noise_multiplier=_noise(self.noise_multiplier),
            cohort=integer("cohort", self.cohort, 1),
            population=integer("population", self.population, 1),
            steps=integer("steps", self.steps, 1),
        )
        require(self.cohort <= self.population, "cohort", f"at most the population of {self.population}", self.cohort)


@dataclass(frozen=True)
class Skellam(_Kind):
    """``steps`` releases of a vector of whole numbers with Skellam noise, a difference of Poissons; by RDP only.

    Agarwal, Kairouz, Liu 2021, arXiv 2110.04995, theorem 3.5. Shares of such noise add up to it exactly, so that
    clients under secure summation can each add one.

    Attributes:
        variance: Their mu, the variance of the noise on each coordinate of the sum; 0 is a release without noise.
        l1: Largest change of the vector in L1 under the relation.
        l2: Largest change of the vector in L2 under the relation.
        steps: Number of releases, at least 1.

    Raises:
        ConfigError: A value is outside its range, or ``l1`` is below ``l2``, which no vector has.
    """

    kind: ClassVar[str] = "skellam"

    variance: float
    l1: float
    l2: float
    steps: int = 1

    def __post_init__(self) -> None:
        self._plain(
            variance=_noise(self.variance, "variance"),
            l1=positive("l1", self.l1),
            l2=positive("l2", self.l2),
            steps=integer("steps", self.steps, 1),
        )
        require(self.l1 >= self.l2, "l1", f"at least l2={self.l2:g}", self.l1)


DpEvent = Event | Laplace | DiscreteGaussian | RandomisedResponse | FixedSize | Skellam
"""Any release. Another kind: a dataclass above, a branch in each function of ``privacy.prices``."""


def read_event(value: Mapping[str, Any]) -> DpEvent:
    """Read what any event's ``to_json`` wrote.

    Raises:
        ConfigError: The kind is unknown, or the fields are not those of the kind.
    """
    kinds = {kind.kind: kind for kind in get_args(DpEvent)}
    if value.get("kind") not in kinds:
        raise ConfigError(f"event kind should be one of {[*kinds]}, got {value.get('kind')!r}")
    event: DpEvent = kinds[value["kind"]].from_json(value)
    return event


def check_priceable(event: DpEvent, relation: Relation) -> None:
    """Raise `ConfigError` if no accountant prices the event under the relation."""
    if event.only not in (None, relation):
        raise ConfigError(f"a {event.kind} release has a price under relation {event.only!r} only, got {relation!r}")
    if isinstance(event, Laplace) and event.sampling_rate < 1 and relation == "replace":
        raise ConfigError("Poisson-sampled Laplace noise has a price under 'add_remove' only, got 'replace'")


def _noise(value: Any, name: str = "noise_multiplier") -> float:
    plain = number(name, value)
    require(plain >= 0, name, "0 or more", value)
    return plain


def _rate(value: Any) -> float:
    plain = number("sampling_rate", value)
    require(0 < plain <= 1, "sampling_rate", "in (0, 1]", value)
    return plain
