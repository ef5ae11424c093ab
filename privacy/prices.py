"""dp-accounting's interpretation of events: privacy loss distributions (PLD), and Renyi divergences (RDP).

dp-accounting takes noise relative to one contribution C in its PLD of Gaussians, and under its REPLACE_ONE doubles the
sensitivity to 2C; its RDP of Gaussians and Laplace noise never doubles. Our multipliers are relative to the sensitivity
under the relation, so they are doubled for the former under replace, and left for the latter. PLDs are composed here,
since its ``PLDAccountant`` (0.6.0) counts k-ary randomised response once however often it is composed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, assert_never

from privacy.events import DiscreteGaussian, DpEvent, Event, FixedSize, Laplace, RandomisedResponse, Relation

MOST_NOISE = 1e9  # what floating point can price; rounded towards less privacy beyond
LEAST_NOISE = 1e-3  # below this, epsilon is infinite

_TAIL = 10.0  # standard deviations of Gaussian noise that dp-accounting keeps on either side (mass exp(-50))
_CELLS = 250_000  # grid cells of one release; beyond this (noise below about 0.45) seconds turn into minutes


def is_open(event: DpEvent) -> bool:
    """Whether the noise is so little that nothing is promised."""
    match event:
        case RandomisedResponse():
            return False
        case DiscreteGaussian():
            return event.sigma / event.sensitivity < LEAST_NOISE
        case _:
            return event.noise_multiplier < LEAST_NOISE


def has_distribution(event: DpEvent) -> bool:
    """Whether there is a privacy loss distribution for the event."""
    return not isinstance(event, FixedSize)


def distribution(events: Iterable[DpEvent], relation: Relation, interval: float) -> Any:
    """The privacy loss distribution of all the releases, on a grid of at least ``interval``, pessimistic."""
    from dp_accounting.pld import privacy_loss_distribution as pld  # here: it takes most of a second

    events = tuple(events)
    # One grid for all: PLDs of different grids do not compose.
    grid = max(interval, max(map(_loss_width, events), default=0.0) / _CELLS)
    total = pld.identity(value_discretization_interval=grid)
    for event in events:
        total = total.compose(_one_distribution(event, relation, grid))
    return total


def _one_distribution(event: DpEvent, relation: Relation, grid: float) -> Any:
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution as pld

    match event:
        case Event():
            replaced = relation == "replace"
            scale = 2.0 if replaced else 1.0
            neighbours = NeighboringRelation.REPLACE_ONE if replaced else NeighboringRelation.ADD_OR_REMOVE_ONE
            noise = scale * min(event.noise_multiplier, MOST_NOISE)
            if event.sampling_rate == 1:  # composes in closed form, a sampled one by Fourier transform
                return pld.from_gaussian_mechanism(
                    noise / math.sqrt(event.steps), value_discretization_interval=grid, neighboring_relation=neighbours
                )
            once = pld.from_gaussian_mechanism(
                noise,
                value_discretization_interval=grid,
                sampling_prob=event.sampling_rate,
                neighboring_relation=neighbours,
            )
        case Laplace():
            noise = min(event.noise_multiplier, MOST_NOISE)
            once = pld.from_laplace_mechanism(
                noise, value_discretization_interval=grid, sampling_prob=event.sampling_rate
            )
        case DiscreteGaussian():
            once = pld.from_discrete_gaussian_mechanism(
                event.sigma, event.sensitivity, value_discretization_interval=grid, use_connect_dots=True
            )
        case RandomisedResponse():
            once = pld.from_randomized_response(event.uniform, event.classes, value_discretization_interval=grid)
        case FixedSize():
            raise TypeError("a fixed-size cohort has no privacy loss distribution")  # callers ask has_distribution
        case _:
            assert_never(event)
    return once.self_compose(event.steps)


def _loss_width(event: DpEvent) -> float:
    """Largest privacy loss of one release, in nats, up to the tail that dp-accounting cuts off."""
    match event:
        case Laplace():
            return 1 / event.noise_multiplier
        case RandomisedResponse():
            return event.report_epsilon
        case DiscreteGaussian():
            signal = event.sensitivity / event.sigma
        case Event() | FixedSize():
            signal = 1 / event.noise_multiplier
    return signal * (signal / 2 + _TAIL)


def renyi(events: Iterable[DpEvent], relation: Relation) -> Any:
    """dp-accounting's RDP accountant after all the releases; None if it cannot price one of them.

    It has no price for Poisson sampling under replace, nor for sampled Laplace noise.
    """
    from dp_accounting import NeighboringRelation, rdp

    neighbours = NeighboringRelation.REPLACE_ONE if relation == "replace" else NeighboringRelation.ADD_OR_REMOVE_ONE
    accountant = rdp.RdpAccountant(neighboring_relation=neighbours)
    for event in events:
        theirs = dp_event(event)
        if not accountant.supports(theirs):
            return None
        with _orders_may_fail():
            accountant.compose(theirs, event.steps)
    return accountant


@contextmanager
def _orders_may_fail() -> Iterator[None]:
    """Silence a warning for each order whose series does not converge: leaving orders out keeps the bound a bound."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def dp_event(event: DpEvent) -> Any:
    """dp-accounting's own name for one release."""
    import dp_accounting as dpa

    match event:
        case Event():
            gaussian = dpa.GaussianDpEvent(min(event.noise_multiplier, MOST_NOISE))
            return gaussian if event.sampling_rate == 1 else dpa.PoissonSampledDpEvent(event.sampling_rate, gaussian)
        case Laplace():
            noise = dpa.LaplaceDpEvent(min(event.noise_multiplier, MOST_NOISE))
            return noise if event.sampling_rate == 1 else dpa.PoissonSampledDpEvent(event.sampling_rate, noise)
        case DiscreteGaussian():  # Canonne et al. 2020, theorem 14: concentrated like the continuous one
            return dpa.ZCDpEvent((event.sensitivity / event.sigma) ** 2 / 2)
        case RandomisedResponse():
            return dpa.RandomizedResponseDpEvent(event.uniform, event.classes)
        case FixedSize():
            gaussian = dpa.GaussianDpEvent(min(event.noise_multiplier, MOST_NOISE))
            return dpa.SampledWithoutReplacementDpEvent(event.population, event.cohort, gaussian)
        case _:
            assert_never(event)
