"""dp-accounting's interpretation of events: privacy loss distributions (PLD), and Renyi divergences (RDP).

dp-accounting takes noise relative to one contribution C in its PLD of Gaussians, and under its REPLACE_ONE doubles the
sensitivity to 2C; its RDP of Gaussians and Laplace noise never doubles. Our multipliers are relative to the sensitivity
under the relation, so they are doubled for the former under replace, and left for the latter. PLDs are composed here,
since its ``PLDAccountant`` (0.6.0) counts k-ary randomised response once however often it is composed; Gaussians by
``privacy.sampled``, which is faster.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, assert_never

from fedkd.errors import ConfigError
from privacy.events import (
    DiscreteGaussian,
    DpEvent,
    Event,
    FixedSize,
    Laplace,
    RandomisedResponse,
    Relation,
    Skellam,
)
from privacy.sampled import MOST_NOISE, composed

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
        case Skellam():
            return math.sqrt(event.variance) / event.l2 < LEAST_NOISE
        case _:
            return event.noise_multiplier < LEAST_NOISE


def has_distribution(event: DpEvent) -> bool:
    """Whether there is a privacy loss distribution for the event."""
    return not isinstance(event, FixedSize | Skellam)


def distribution(events: Iterable[DpEvent], relation: Relation, interval: float) -> Any:
    """The privacy loss distribution of all the releases, on a grid of at least ``interval``, pessimistic."""
    from dp_accounting.pld import privacy_loss_distribution as pld  # here: it takes most of a second

    events = tuple(events)
    # One grid for all: PLDs of different grids do not compose.
    grid = max(interval, max(map(_loss_width, events), default=0.0) / _CELLS)
    gaussian = [event for event in events if isinstance(event, Event)]
    total = composed(gaussian, relation, grid) if gaussian else pld.identity(value_discretization_interval=grid)
    for event in events:
        if not isinstance(event, Event):
            total = total.compose(_one_distribution(event, grid))
    return total


def _one_distribution(event: DpEvent, grid: float) -> Any:
    from dp_accounting.pld import privacy_loss_distribution as pld

    match event:
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
        case Event() | FixedSize() | Skellam():
            raise TypeError(f"{event.kind} is not composed here")  # its own way, or callers ask has_distribution
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
        case Skellam():
            signal = event.l2 / math.sqrt(event.variance)
        case Event() | FixedSize():
            signal = 1 / event.noise_multiplier
    return signal * (signal / 2 + _TAIL)


def renyi(events: Iterable[DpEvent], relation: Relation) -> Any:
    """dp-accounting's RDP accountant after all the releases; None if it cannot price one of them.

    It has no price for Poisson sampling under replace, nor for sampled Laplace noise.
    """
    from dp_accounting import NeighboringRelation, rdp
    from dp_accounting.rdp.rdp_privacy_accountant import DEFAULT_RDP_ORDERS

    events = tuple(events)
    neighbours = NeighboringRelation.REPLACE_ONE if relation == "replace" else NeighboringRelation.ADD_OR_REMOVE_ONE
    whole = any(isinstance(event, Skellam) for event in events)  # its theorem is about whole orders
    orders = [order for order in DEFAULT_RDP_ORDERS if order == int(order) or not whole]
    accountant = rdp.RdpAccountant(orders, neighbours)
    for event in events:
        theirs = _skellam(event) if isinstance(event, Skellam) else dp_event(event)
        if not accountant.supports(theirs):
            return None
        with _orders_may_fail():
            accountant.compose(theirs, event.steps)
    return accountant


def _skellam(event: Skellam) -> Any:
    """Agarwal, Kairouz, Liu 2021, theorem 3.5: the lesser of two lines in the order, by which of them is so at 2.

    Either is a bound at every whole order; with a variance of more than a few units the first one is the lesser.
    """
    from dp_accounting import ZCDpEvent

    rho, square = event.l2**2 / (2 * event.variance), event.l2**2
    near, far = (3 * square + 6 * event.l1) / (4 * event.variance**2), 3 * event.l1 / (2 * event.variance)
    if far < near:
        return ZCDpEvent(rho, far)
    # dp-accounting takes no negative constant
    return ZCDpEvent(rho * (1 + 1 / event.variance), max(6 * event.l1 - square, 0) / (4 * event.variance**2))


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
        case Skellam():
            raise ConfigError(
                "Skellam noise has a price at whole orders of RDP only; compose it outside of a selection"
            )
        case _:
            assert_never(event)
