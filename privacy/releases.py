"""Events from what a mechanism does: its bound, its noise, its unit, its sampler. Sensitivities are computed here.

**Sampling is the sampler's word.** A rate amplifies only where a sampler drew by it and the observer cannot tell who
was drawn. The server picks the cohort, so against the server no sampling of *clients* amplifies; sampling of records
inside a client is hidden from everybody else. Shuffled batches and weighted draws are refused: nobody prices them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fedkd.errors import ConfigError
from privacy.arguments import choice, integer, positive, require
from privacy.events import DiscreteGaussian, Event, FixedSize, Laplace, RandomisedResponse, Relation, Skellam, Unit

Observer = Literal["server", "client", "outsider"]


@dataclass(frozen=True)
class Everyone:
    """Every unit takes part in every release that is counted: no amplification."""

    def __str__(self) -> str:
        return "none claimed: every release counts in full"


@dataclass(frozen=True)
class Poisson:
    """Each unit is drawn with probability ``rate``, independently of the others; the batch may be empty."""

    rate: float

    def __str__(self) -> str:
        return f"Poisson, each unit with probability {self.rate:g} in each release, hidden from the observer"


@dataclass(frozen=True)
class WithoutReplacement:
    """Exactly ``cohort`` of ``population`` units are drawn, uniformly."""

    cohort: int
    population: int

    def __str__(self) -> str:
        drawn = f"exactly {self.cohort} of {self.population} units"
        return f"fixed size without replacement, {drawn} in each release, hidden from the observer"


@dataclass(frozen=True)
class Shuffled:
    """Fixed batches, one pass after another: what most loaders do."""

    def __str__(self) -> str:
        return "shuffled batches"


@dataclass(frozen=True)
class Weighted:
    """Units are drawn with probabilities of their own."""

    def __str__(self) -> str:
        return "weighted draws"


Sampling = Everyone | Poisson | WithoutReplacement | Shuffled | Weighted

EVERYONE = Everyone()


def sensitivity(bound: float, relation: Relation) -> float:
    """Largest distance that one unit, whose contribution has norm ``bound`` at most, can move a sum.

    Raises:
        ConfigError: The bound is not positive and finite, or the relation is unknown.

    Example:
        >>> sensitivity(1.5, "add_remove"), sensitivity(1.5, "replace")
        (1.5, 3.0)
    """
    choice("relation", relation, get_args(Relation))
    bound = positive("clip", bound)
    return 2 * bound if relation == "replace" else bound


def gaussian(
    std: float,
    bound: float,
    relation: Relation,
    unit: Unit,
    observer: Observer,
    sampling: Sampling = EVERYONE,
    steps: int = 1,
) -> Event | FixedSize:
    """Gaussian noise on a sum of contributions, each of L2 norm ``bound`` at most.

    Args:
        std: Standard deviation of the noise on each coordinate of the sum.
        bound: L2 clipping norm of one unit's contribution.
        relation: ``"add_remove"`` or ``"replace"`` one unit.
        unit: What one contribution belongs to.
        observer: Against whom the event will be accounted.
        sampling: What the sampler did.
        steps: Number of releases.

    Raises:
        ConfigError: A value is outside its range, or the sampling amplifies nothing for this observer.

    Example:
        >>> gaussian(3.0, 1.5, "replace", "client", "server", steps=4)
        Event(noise_multiplier=1.0, sampling_rate=1.0, steps=4)
    """
    multiplier = _multiplier(std, sensitivity(bound, relation))
    _check_hidden(unit, observer, sampling)
    if isinstance(sampling, WithoutReplacement):
        if relation != "replace":
            raise ConfigError(
                "fixed-size sampling without replacement has a price under relation 'replace' only, since the size of "
                f"the cohort is public; got {relation!r}"
            )
        return FixedSize(multiplier, sampling.cohort, sampling.population, steps)
    return Event(multiplier, sampling.rate if isinstance(sampling, Poisson) else 1.0, steps)


def laplace(
    scale: float,
    bound: float,
    relation: Relation,
    unit: Unit,
    observer: Observer,
    sampling: Sampling = EVERYONE,
    steps: int = 1,
) -> Laplace:
    """Laplace noise on a sum of contributions, each of L1 norm ``bound`` at most; arguments as in ``gaussian``.

    Raises:
        ConfigError: A value is outside its range, the sampling amplifies nothing, or nobody prices it.
    """
    multiplier = _multiplier(scale, sensitivity(bound, relation))
    _check_hidden(unit, observer, sampling)
    if isinstance(sampling, WithoutReplacement) or (isinstance(sampling, Poisson) and relation == "replace"):
        raise ConfigError(
            "Laplace noise has a price for Poisson sampling under 'add_remove' only; use Gaussian noise, or everyone"
        )
    return Laplace(multiplier, sampling.rate if isinstance(sampling, Poisson) else 1.0, steps)


def counts(sigma: float, relation: Relation, steps: int = 1) -> DiscreteGaussian:
    """Discrete Gaussian noise on every cell of a histogram in which each unit counts once.

    Adding a unit changes one cell by 1, replacing it may change two: hence two releases of a number for each histogram.

    Example:
        >>> counts(4.0, "replace").steps
        2
    """
    choice("relation", relation, get_args(Relation))
    cells = 2 if relation == "replace" else 1
    return DiscreteGaussian(positive("sigma", sigma), 1, cells * integer("steps", steps, 1))


def skellam(variance: float, clip: float, scale: float, dimension: int, relation: Relation, steps: int = 1) -> Skellam:
    """Skellam noise on a sum of vectors that were clipped, scaled and rounded to whole numbers.

    Rounding moves each coordinate by less than 1, hence the vector by less than sqrt(dimension), whichever way it goes
    (Kairouz, Liu, Steinke 2021, arXiv 2102.06387; their tighter bound needs conditions on the rounding). L1 is at most
    sqrt(dimension) times L2.

    Args:
        variance: Variance of the noise on each coordinate of the sum, in units of the rounded numbers. If clients add
            shares of it, that of the shares that arrived.
        clip: L2 bound of one unit's vector before it is scaled.
        scale: Steps of the grid in one unit of the vector.
        dimension: Length of the vector.
        relation: ``"add_remove"`` or ``"replace"`` one unit.
        steps: Number of releases.

    Raises:
        ConfigError: A value is outside its range.

    Example:
        >>> skellam(1e4, clip=1.0, scale=90.0, dimension=100, relation="add_remove")
        Skellam(variance=10000.0, l1=1000.0, l2=100.0, steps=1)
    """
    root = math.sqrt(integer("dimension", dimension, 1))
    l2 = sensitivity(positive("clip", clip) * positive("scale", scale) + root, relation)
    return Skellam(positive("variance", variance), root * l2, l2, steps)


def randomised_response(report_epsilon: float, classes: int, steps: int = 1) -> RandomisedResponse:
    """One unit's label, reported ``steps`` times by k-ary randomised response (label differential privacy).

    PrivateKT's beta, 1 / (1 + k / (e^a - 1)), is the probability of answering truthfully rather than uniformly.
    """
    return RandomisedResponse(report_epsilon, classes, steps)


def votes(std: float, relation: Relation, unit: Unit, queries: int) -> Event:
    """GNMax (Papernot et al. 2018, arXiv 1802.08908): the noisy largest of teachers' votes, once for each query.

    A teacher's vote may move from one class to another, sqrt(2) in L2. That is so under both relations if the unit is a
    record (one of a teacher's records), and under replace if it is a client (a teacher); a client that is added or
    removed changes one cell by 1.

    Args:
        std: Standard deviation of the noise on each count.
        relation: ``"add_remove"`` or ``"replace"`` one unit.
        unit: ``"record"``, ``"label"`` or ``"client"``.
        queries: Number of queries.

    Example:
        >>> round(votes(40.0, "replace", "client", 1).noise_multiplier ** 2)
        800
    """
    choice("relation", relation, get_args(Relation))
    choice("unit", unit, get_args(Unit))
    moved = 1.0 if unit == "client" and relation == "add_remove" else math.sqrt(2)
    return Event(_multiplier(std, moved), steps=queries)


def confident_votes(
    threshold_std: float, std: float, relation: Relation, unit: Unit, checks: int, answers: int
) -> tuple[Event, ...]:
    """Confident GNMax: a noisy threshold test for every query, GNMax for those that pass.

    The test costs even where the answer is no. It compares the largest count, which one vote moves by 1.

    Args:
        threshold_std: Standard deviation of the noise on the largest count.
        std: Standard deviation of the noise on each count.
        relation: ``"add_remove"`` or ``"replace"`` one unit.
        unit: ``"record"``, ``"label"`` or ``"client"``.
        checks: Queries that were tested.
        answers: Queries that were answered.

    Raises:
        ConfigError: A value is outside its range, or there are more answers than checks.
    """
    checks, answers = integer("checks", checks, 1), integer("answers", answers, 0)
    require(answers <= checks, "answers", f"at most the {checks} checks", answers)
    test = Event(_multiplier(threshold_std, 1.0), steps=checks)
    return (test, votes(std, relation, unit, answers)) if answers else (test,)


def group(event: Event, size: int) -> Event:
    """The event for ``size`` units that change together: exactly ``size`` times the sensitivity.

    Raises:
        ConfigError: The event is sampled: the units are drawn apart, so no multiplier says what they do together.

    Example:
        >>> group(Event(10.0), 5).noise_multiplier
        2.0
    """
    if event.sampling_rate < 1:
        raise ConfigError(
            "group privacy by the noise multiplier needs an unsampled release; use accounting.group_bound"
        )
    return Event(event.noise_multiplier / integer("size", size, 1), steps=event.steps)


def _multiplier(noise: Any, moved: float) -> float:
    return positive("noise", noise) / moved


def _check_hidden(unit: Unit, observer: Observer, sampling: Sampling) -> None:
    choice("unit", unit, get_args(Unit))
    choice("observer", observer, get_args(Observer))
    if isinstance(sampling, Shuffled):
        raise ConfigError(
            "shuffled or fixed batches are not Poisson samples, and no accountant prices them: draw by Poisson, or "
            "count one release for each pass over the data and claim no sampling"
        )
    if isinstance(sampling, Weighted):
        raise ConfigError("weighted draws are not Poisson samples of one rate: draw by Poisson, or claim no sampling")
    if isinstance(sampling, Poisson):
        require(0 < sampling.rate <= 1, "rate", "in (0, 1]", sampling.rate)
    if unit == "client" and observer == "server" and sampling != EVERYONE:
        raise ConfigError(
            "the server draws the clients, so sampling them hides nobody from it: claim no sampling and count a "
            "client's participations, or account for an observer that is not the server"
        )
