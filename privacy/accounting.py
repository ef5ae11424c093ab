"""From what was released to an epsilon, and from an epsilon to the noise that buys it.

A release is data (an ``Event``); dp-accounting interprets it. Releases of one kind are merged first, then composed as
privacy loss distributions (PLD; Koskela et al. 2020, arXiv 1906.03049; "connect the dots", Doroshenko et al. 2022,
arXiv 2207.04380). The estimate is pessimistic: at any grid interval, epsilon is an upper bound. When nothing was
sampled, Gaussians compose to one Gaussian, whose epsilon has a closed form (Balle and Wang 2018, arXiv 1805.06530);
that form is used instead.

**Relations.** ``"add_remove"``: one unit is present or absent. ``"replace"``: one unit's data become other data.
A noise multiplier is relative to the sensitivity *under the stated relation*, so an unsampled Gaussian costs the same
under both. dp-accounting, by contrast, always takes noise relative to the largest contribution C of one unit, and under
its REPLACE_ONE doubles the sensitivity to 2C; multipliers are therefore doubled before they reach it.

**Sampling under replace.** For a sampled release the distance between two contributions does not suffice: a unit that
is left out contributes zero, so the norm of each contribution matters too. ``noise_multiplier`` is then
``std / (2 C)``, also where two contributions are always nearer than 2C. (One-hot rows lie sqrt(2) C apart; at rate
0.1, std C / 2 and epsilon 2, dividing by sqrt(2) C would claim a delta 14 times too small.)
"""

from __future__ import annotations

import importlib.metadata
import itertools
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from typing import Any, ClassVar, Literal, get_args

from fedkd.errors import ConfigError

Relation = Literal["add_remove", "replace"]
Unit = Literal["record", "client"]

LIVE_INTERVAL = 1e-3
"""Grid of the privacy loss, in nats, for an epsilon during a run: milliseconds, at most about 0.01 too high."""

FINAL_INTERVAL = 1e-4
"""Grid of the privacy loss, in nats, for an epsilon that is published: at most about 0.001 too high."""

_TAIL = 10.0  # standard deviations of Gaussian noise that dp-accounting keeps on either side (mass exp(-50))
_CELLS = 250_000  # grid cells of one release; beyond this (noise below about 0.45) seconds turn into minutes
_LEAST_NOISE, _MOST_NOISE = 1e-3, 1e9  # what floating point can price; rounded towards less privacy beyond
_CALIBRATION_SLACK = 1e-4  # share of the target epsilon that calibrated noise may leave unused
_LEAST_SIGMA = 0.2  # sampled releases are not calibrated below this: epsilon is vast there, or delta alone pays


@dataclass(frozen=True)
class Event:
    """``steps`` Gaussian releases of the same kind.

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
        # Plain numbers, so that equal events hash alike and go to JSON whatever numpy type they came from.
        object.__setattr__(self, "noise_multiplier", _number("noise_multiplier", self.noise_multiplier))
        object.__setattr__(self, "sampling_rate", _number("sampling_rate", self.sampling_rate))
        object.__setattr__(self, "steps", _integer("steps", self.steps))
        _require(self.noise_multiplier >= 0, "noise_multiplier", "0 or more", self.noise_multiplier)
        _require(0 < self.sampling_rate <= 1, "sampling_rate", "in (0, 1]", self.sampling_rate)
        _require(self.steps >= 1, "steps", "1 or more", self.steps)

    def to_json(self) -> dict[str, Any]:
        """Return the event as JSON values, tagged with its kind."""
        return {
            "kind": self.kind,
            "noise_multiplier": self.noise_multiplier,
            "sampling_rate": self.sampling_rate,
            "steps": self.steps,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Event:
        """Read what ``to_json`` wrote.

        Raises:
            ConfigError: The kind is unknown, or the fields are not those of the kind.
        """
        arguments = {key: item for key, item in value.items() if key != "kind"}
        if value.get("kind") != cls.kind:
            raise ConfigError(f"event kind should be {cls.kind!r}, got {value.get('kind')!r}")
        if set(arguments) != {field.name for field in fields(cls)}:
            raise ConfigError(f"a {cls.kind} event has the fields {[f.name for f in fields(cls)]}, got {[*arguments]}")
        return cls(**arguments)


# To add a kind (Laplace, votes): another frozen dataclass with `kind`, `steps` and the two JSON methods; join it to
# Event in a union; give it a branch in _compose and a width in _loss_width. The ledger needs no change.


@dataclass(frozen=True)
class Statement:
    """Everything that an epsilon means; an epsilon alone means nothing.

    Attributes:
        epsilon: Privacy loss in nats; infinite where no mechanism protects the unit.
        delta: Probability with which the loss may exceed epsilon.
        unit: What is protected: one ``"record"`` of one client or all data of one ``"client"``.
        relation: How neighbouring data sets differ: ``"add_remove"`` or ``"replace"`` one unit.
        view: Who sees what, for example ``"the server sees every client's released logits"``.
        sampling: How units enter a release, for example ``"Poisson, rate 0.35, hidden from the server"``.
        accountant: Name and version of what computed epsilon; see ``accountant``.
        upper_bound: Whether epsilon bounds the true loss from above; false for an estimate.
        assumptions: What must hold for the statement to hold.
        exclusions: What also leaves a client but is not covered.

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

    def __post_init__(self) -> None:
        _require(self.epsilon >= 0, "epsilon", "0 or more", self.epsilon)
        _check_delta(self.delta)
        _check_choice("unit", self.unit, get_args(Unit))
        _check_relation(self.relation)
        object.__setattr__(self, "assumptions", tuple(self.assumptions))
        object.__setattr__(self, "exclusions", tuple(self.exclusions))

    @property
    def private(self) -> bool:
        """Whether any differential privacy is claimed."""
        return math.isfinite(self.epsilon)

    def to_json(self) -> dict[str, Any]:
        """Return the statement as JSON values; an infinite epsilon, which JSON does not know, becomes null."""
        value = {field.name: getattr(self, field.name) for field in fields(self)}
        return value | {
            "epsilon": self.epsilon if self.private else None,
            "assumptions": list(self.assumptions),
            "exclusions": list(self.exclusions),
        }

    def __str__(self) -> str:
        """Return the statement as one paragraph."""
        return " ".join([*(self._guarantee() if self.private else self._no_guarantee()), *self._exclusions()])

    def _no_guarantee(self) -> list[str]:
        return [f"For one {self.unit}, no differential privacy is claimed: {self.view}, and no mechanism bounds it."]

    def _guarantee(self) -> list[str]:
        # Rounded up, lest the sentence claims more than was computed.
        epsilon = f"{math.ceil(self.epsilon * 1000) / 1000:.3f}"
        size = f"at most {epsilon}" if self.upper_bound else f"about {epsilon} (an estimate, not a bound)"
        change = "adding or removing" if self.relation == "add_remove" else "replacing"
        whom = "one record of one client" if self.unit == "record" else "all data of one client"
        lines = [
            f"Against {change} {whom}, epsilon is {size} at delta {self.delta:g}, where {self.view}.",
            f"Sampling: {self.sampling}. Accountant: {self.accountant}.",
        ]
        return [*lines, f"Assumed: {'; '.join(self.assumptions)}."] if self.assumptions else lines

    def _exclusions(self) -> list[str]:
        return [f"Not covered: {'; '.join(self.exclusions)}."] if self.exclusions else []


def accountant() -> str:
    """Return the name and version of the accountant behind ``epsilon``."""
    return f"dp-accounting {importlib.metadata.version('dp-accounting')}, privacy loss distributions"


def merge(events: Iterable[Event]) -> tuple[Event, ...]:
    """Return the same releases with equal events counted together, in a fixed order.

    Composition does not depend on the order, so two histories with the same result cost the same; the result is the
    key under which epsilons are cached.
    """
    steps: Counter[Event] = Counter()
    for event in events:
        steps[replace(event, steps=1)] += event.steps
    merged = (replace(event, steps=count) for event, count in steps.items())
    return tuple(sorted(merged, key=lambda event: (event.kind, event.noise_multiplier, event.sampling_rate)))


def epsilon(events: Iterable[Event], delta: float, relation: Relation, interval: float = FINAL_INTERVAL) -> float:
    """Return the epsilon of all the releases together.

    Args:
        events: What was released, in any order.
        delta: Probability with which the loss may exceed epsilon, in (0, 1).
        relation: ``"add_remove"`` or ``"replace"`` one unit; see the module docstring for what the noise multipliers
            then mean.
        interval: Grid of the privacy loss in nats. Coarser is faster and gives a larger epsilon. Very small noise is
            put on a coarser grid than asked, which keeps time and memory bounded.

    Returns:
        An upper bound, in nats; 0 when nothing was released, infinite when a release carried no noise, or less than a
        thousandth of the sensitivity.

    Raises:
        ConfigError: An argument is outside its range.

    Example:
        >>> round(epsilon([Event(5.0, steps=50)], delta=1e-5, relation="add_remove"), 4)
        6.573
    """
    _check_delta(delta)
    _check_relation(relation)
    _require(0 < interval < math.inf, "interval", "positive", interval)
    return _epsilon(merge(events), float(delta), relation, float(interval))


def calibrate(target_epsilon: float, delta: float, sampling_rate: float, steps: int, relation: Relation) -> float:
    """Return the smallest noise multiplier whose releases stay within an epsilon.

    Args:
        target_epsilon: Largest epsilon allowed, in nats; positive.
        delta: Probability with which the loss may exceed epsilon, in (0, 1).
        sampling_rate: As in ``Event``.
        steps: As in ``Event``.
        relation: ``"add_remove"`` or ``"replace"`` one unit.

    Returns:
        A noise multiplier whose ``epsilon(...)``, at the final interval, is at most the target (never less privacy than
        asked) and, up to the accountant's rounding, above 0.9999 of it. With sampling, at least 0.2.

    Raises:
        ConfigError: An argument is outside its range.

    Example:
        >>> sigma = calibrate(10.0, 1e-3, 1.0, 80, "add_remove")
        >>> epsilon([Event(sigma, steps=80)], 1e-3, "add_remove") <= 10.0
        True
    """
    target = _number("target_epsilon", target_epsilon)
    _require(target > 0, "target_epsilon", "positive", target_epsilon)
    _check_delta(delta)
    _check_relation(relation)
    shape = Event(1.0, sampling_rate, steps)
    return _calibrate(target, float(delta), shape, relation)


# --- Accounting ------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def _epsilon(merged: tuple[Event, ...], delta: float, relation: Relation, interval: float) -> float:
    if not merged:
        return 0.0
    if any(event.noise_multiplier < _LEAST_NOISE for event in merged):
        return math.inf
    merged = _fold_unsampled(merged)
    if len(merged) == 1 and merged[0].sampling_rate == 1:
        return _gaussian_epsilon(merged[0].noise_multiplier, delta)
    return _pld_epsilon(merged, delta, relation, interval)


def _fold_unsampled(merged: tuple[Event, ...]) -> tuple[Event, ...]:
    """Compose the releases in which everybody takes part: together they are exactly one Gaussian release."""
    whole = [event for event in merged if event.sampling_rate == 1]
    if not whole:
        return merged
    signal = math.hypot(*(math.sqrt(event.steps) / min(event.noise_multiplier, _MOST_NOISE) for event in whole))
    return (*(event for event in merged if event.sampling_rate < 1), Event(1 / signal))


def _gaussian_epsilon(noise_multiplier: float, delta: float) -> float:
    from dp_accounting import get_epsilon_gaussian  # here, not above: it takes most of a second

    return float(get_epsilon_gaussian(noise_multiplier, delta))


def _pld_epsilon(merged: tuple[Event, ...], delta: float, relation: Relation, interval: float) -> float:
    from dp_accounting import NeighboringRelation, pld

    neighbours = {"add_remove": NeighboringRelation.ADD_OR_REMOVE_ONE, "replace": NeighboringRelation.REPLACE_ONE}
    # One grid for all: PLDs of different grids do not compose.
    grid = max(interval, max(map(_loss_width, merged)) / _CELLS)
    composed = pld.PLDAccountant(neighbours[relation], value_discretization_interval=grid)
    for event in merged:
        _compose(composed, event, relation)
    return float(composed.get_epsilon(delta))


def _compose(composed: Any, event: Event, relation: Relation) -> None:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent

    # dp-accounting: noise over one contribution C; ours: over the sensitivity, which is 2 C under replace.
    scale = 2.0 if relation == "replace" else 1.0
    gaussian = GaussianDpEvent(scale * min(event.noise_multiplier, _MOST_NOISE))
    # An unsampled Gaussian composes in closed form, a sampled one by Fourier transform.
    once = gaussian if event.sampling_rate == 1 else PoissonSampledDpEvent(event.sampling_rate, gaussian)
    composed.compose(once, event.steps)


def _loss_width(event: Event) -> float:
    """Largest privacy loss of one release, in nats, up to the tail that dp-accounting cuts off."""
    signal = 1 / event.noise_multiplier
    return signal * (signal / 2 + _TAIL)


# --- Calibration -----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _calibrate(target: float, delta: float, shape: Event, relation: Relation) -> float:
    from dp_accounting import get_sigma_gaussian

    def epsilon_at(sigma: float, interval: float = FINAL_INTERVAL) -> float:
        return _epsilon((replace(shape, noise_multiplier=sigma),), delta, relation, interval)

    single = float(get_sigma_gaussian(target, delta))
    if shape.sampling_rate == 1:
        return _raise_until(lambda sigma: epsilon_at(sigma) <= target, single * math.sqrt(shape.steps))
    # A fine grid is a hundred times dearer than a coarse one, so each grid only corrects what the coarser one found.
    aim = target * (1 - _CALIBRATION_SLACK / 2)
    coarse = _coarse_interval(target, shape.steps)
    sigma, slope = _bracketed(partial(epsilon_at, interval=coarse), aim, _limit_sigma(single, shape)), -1.0
    for interval in sorted({coarse, max(coarse / 10, FINAL_INTERVAL), FINAL_INTERVAL}, reverse=True):
        if sigma > _LEAST_SIGMA:
            sigma, slope = _polish(partial(epsilon_at, interval=interval), aim, sigma, slope)
    return _raise_until(lambda sigma: epsilon_at(sigma) <= target, sigma)


def _coarse_interval(target: float, steps: int) -> float:
    """Coarsest grid worth a first look: its error grows like steps * interval**2, and should stay near 0.001 target."""
    return min(max(math.sqrt(1e-3 * target / steps), FINAL_INTERVAL), 1e-2)


def _limit_sigma(single: float, shape: Event) -> float:
    """Noise by the central limit for many sampled releases (Bu et al. 2020, arXiv 1911.11607): a little too low.

    Args:
        single: Noise multiplier that one unsampled release would need.
        shape: Rate and number of the releases.
    """
    return 1 / math.sqrt(math.log1p((single * shape.sampling_rate) ** -2 / shape.steps))


def _log_gap(epsilon: float, aim: float) -> float:
    return math.log(max(epsilon, 1e-9) / aim)  # epsilon may be 0 when delta alone pays for the release


def _bracketed(epsilon_at: Callable[[float], float], aim: float, guess: float) -> float:
    """Return a noise multiplier within about 0.1 % of the one whose epsilon is ``aim``, or the least one."""
    from scipy.optimize import brentq

    def gap(log_sigma: float) -> float:
        return _log_gap(epsilon_at(math.exp(log_sigma)), aim)

    least = math.log(_LEAST_SIGMA)
    low = high = max(math.log(guess), least)
    for step in (0.1 * 2**i for i in itertools.count()):
        if gap(low) <= 0:
            if low == least:
                return _LEAST_SIGMA
            low, high = max(low - step, least), low
        elif gap(high) > 0:
            low, high = high, high + step
        else:
            break
    return math.exp(float(brentq(gap, low, high, xtol=1e-3)))


def _polish(epsilon_at: Callable[[float], float], aim: float, sigma: float, slope: float) -> tuple[float, float]:
    """Return sigma after a few secant steps towards ``aim`` in log-log scale, and the slope there."""
    gap = _log_gap(epsilon_at(sigma), aim)
    for _ in range(5):
        if abs(gap) <= _CALIBRATION_SLACK / 2:
            break
        step = min(max(-gap / slope, -0.5), 0.5)
        sigma = max(sigma * math.exp(step), _LEAST_SIGMA)
        before, gap = gap, _log_gap(epsilon_at(sigma), aim)
        # Between nearly equal points the slope would be rounding noise.
        slope = min((gap - before) / step, -0.1) if abs(step) > 1e-5 else slope
    return sigma, slope


def _raise_until(enough: Callable[[float], bool], sigma: float) -> float:
    """Raise sigma by as little as it takes; almost always by nothing."""
    for step in (1e-12 * 4**i for i in itertools.count()):
        if enough(sigma):
            break
        sigma *= 1 + step
    return sigma


# --- Argument checks -------------------------------------------------------------------------------------------------


def _require(holds: bool, name: str, expected: str, value: object) -> None:
    if not holds:
        raise ConfigError(f"{name} should be {expected}, got {value!r}")


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    _require(math.isfinite(number), name, "a finite number", value)
    return number


def _integer(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ConfigError(f"{name} should be a whole number, got {value!r}") from None


def _check_delta(delta: float) -> None:
    _require(0 < delta < 1, "delta", "in (0, 1), best below 1 / number of units", delta)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    _require(value in choices, name, " or ".join(map(repr, choices)), value)


def _check_relation(relation: str) -> None:
    _check_choice("relation", relation, get_args(Relation))
