"""From what was released to an epsilon.

A release is data (``privacy.events``); dp-accounting interprets it (``privacy.prices``). Releases of one kind are
merged first, then composed as privacy loss distributions (PLD; Koskela et al. 2020, arXiv 1906.03049; "connect the
dots", Doroshenko et al. 2022, arXiv 2207.04380). The estimate is pessimistic: at any grid interval, epsilon is an upper
bound. When nothing was sampled, Gaussians compose to one Gaussian, whose epsilon has a closed form (Balle and Wang
2018, arXiv 1805.06530); that form is used instead. Cohorts of fixed size and Skellam noise have no PLD; a history with
one of them is priced by Renyi differential privacy (RDP) as a whole.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import get_args

from fedkd.errors import ConfigError, PrivacyError
from privacy.arguments import check_delta, choice, require
from privacy.events import DpEvent, Event, Relation, Unit, check_priceable
from privacy.prices import distribution, has_distribution, is_open, renyi
from privacy.sampled import MOST_NOISE

__all__ = [
    "FINAL_INTERVAL",
    "LIVE_INTERVAL",
    "DpEvent",
    "Event",
    "Opinions",
    "Relation",
    "Unit",
    "accountant",
    "delta_at",
    "epsilon",
    "merge",
    "opinions",
    "rdp_epsilon",
]

LIVE_INTERVAL = 1e-3
"""Grid of the privacy loss, in nats, for an epsilon during a run: milliseconds, at most about 0.01 too high."""

FINAL_INTERVAL = 1e-4
"""Grid of the privacy loss, in nats, for an epsilon that is published: at most about 0.001 too high."""

_ROUNDING = 1e-3  # share by which the grid of a PLD may put its bound above that of RDP
_PLAUSIBLE = 100.0  # nats; beyond, noise is so little that the grid is coarse (``prices.distribution``)


def accountant(events: Iterable[DpEvent] = ()) -> str:
    """Return the name and version of the accountant behind ``epsilon`` of these events."""
    method = "privacy loss distributions" if all(map(has_distribution, events)) else "Renyi differential privacy"
    return f"dp-accounting {importlib.metadata.version('dp-accounting')}, {method}"


def merge(events: Iterable[DpEvent]) -> tuple[DpEvent, ...]:
    """Return the same releases with equal events counted together, in a fixed order.

    Composition does not depend on the order, so two histories with the same result cost the same; the result is the
    key under which epsilons are cached.
    """
    steps: Counter[DpEvent] = Counter()
    for event in events:
        steps[event if event.steps == 1 else replace(event, steps=1)] += event.steps
    merged = (replace(event, steps=count) for event, count in steps.items())
    return tuple(sorted(merged, key=lambda event: (event.kind, *vars(event).values())))


def checked(events: Iterable[DpEvent], relation: Relation, interval: float = FINAL_INTERVAL) -> tuple[DpEvent, ...]:
    """Return merged events that have a price under the relation; raise `ConfigError` otherwise."""
    choice("relation", relation, get_args(Relation))
    require(0 < interval < math.inf, "interval", "positive", interval)
    merged = merge(events)
    for event in merged:
        check_priceable(event, relation)
    return merged


def epsilon(events: Iterable[DpEvent], delta: float, relation: Relation, interval: float = FINAL_INTERVAL) -> float:
    """Return the epsilon of all the releases together.

    Args:
        events: What was released, in any order.
        delta: Probability with which the loss may exceed epsilon, in (0, 1).
        relation: ``"add_remove"`` or ``"replace"`` one unit; see ``privacy.events`` for what the noise multipliers then
            mean.
        interval: Grid of the privacy loss in nats. Coarser is faster and gives a larger epsilon. Very small noise is
            put on a coarser grid than asked, which keeps time and memory bounded.

    Returns:
        An upper bound, in nats; 0 when nothing was released, infinite when a release carried no noise, or less than a
        thousandth of the sensitivity.

    Raises:
        ConfigError: An argument is outside its range, or an event has no price under the relation.

    Example:
        >>> round(epsilon([Event(5.0, steps=50)], delta=1e-5, relation="add_remove"), 4)
        6.573
    """
    merged = checked(events, relation, interval)
    check_delta(delta)
    return _epsilon(merged, float(delta), relation, float(interval))


def delta_at(events: Iterable[DpEvent], epsilon: float, relation: Relation, interval: float = FINAL_INTERVAL) -> float:
    """Return the delta of all the releases together at a given epsilon, 0 or more; otherwise as ``epsilon``.

    Example:
        >>> round(delta_at([Event(5.0, steps=50)], 6.57297, "add_remove") * 1e5, 3)
        1.0
    """
    merged = checked(events, relation, interval)
    require(0 <= epsilon < math.inf, "epsilon", "0 or more and finite", epsilon)
    if not merged:
        return 0.0
    if any(map(is_open, merged)):
        return 1.0
    if not all(map(has_distribution, merged)):
        composed = renyi(merged, relation)
        if composed is None:
            raise _unpriced()
        return float(composed.get_delta(epsilon))
    return float(distribution(_fold_unsampled(merged), relation, interval).get_delta_for_epsilon(epsilon))


def rdp_epsilon(events: Iterable[DpEvent], delta: float, relation: Relation) -> float | None:
    """Return the epsilon of all the releases together by Renyi differential privacy.

    Returns:
        An upper bound, in nats; None if dp-accounting cannot price one of the events by RDP: Poisson samples under
        replace, sampled Laplace noise.

    Raises:
        ConfigError: An argument is outside its range, or an event has no price under the relation.
    """
    merged = checked(events, relation)
    check_delta(delta)
    return _rdp_epsilon(merged, float(delta), relation)


@dataclass(frozen=True)
class Opinions:
    """An epsilon by two accountants that share no arithmetic.

    Attributes:
        epsilon: What ``accounting.epsilon`` says, in nats.
        rdp: What Renyi differential privacy says; None where it says nothing.
    """

    epsilon: float
    rdp: float | None

    @property
    def ratio(self) -> float | None:
        """RDP over epsilon, 1 or more; None where there is no second opinion, or nothing was spent."""
        return None if self.rdp is None or not 0 < self.epsilon < math.inf else self.rdp / self.epsilon


def opinions(events: Iterable[DpEvent], delta: float, relation: Relation, interval: float = FINAL_INTERVAL) -> Opinions:
    """Return epsilon with a second opinion by RDP; arguments as for ``epsilon``.

    Raises:
        ConfigError: An argument is outside its range.
        PrivacyError: RDP is below epsilon by more than rounding. Both are upper bounds and PLD is the tighter one, so
            one of them must be wrong.
    """
    merged = merge(events)
    both = Opinions(epsilon(merged, delta, relation, interval), rdp_epsilon(merged, delta, relation))
    slack = 10 * interval
    if both.rdp is not None and both.rdp < both.epsilon * (1 - _ROUNDING) - slack and both.epsilon < _PLAUSIBLE:
        raise PrivacyError(
            f"RDP says epsilon {both.rdp:.6g}, privacy loss distributions {both.epsilon:.6g}: the looser bound is the "
            "smaller one; publish neither, and report the events"
        )
    return both


# --- Accounting ------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def _epsilon(merged: tuple[DpEvent, ...], delta: float, relation: Relation, interval: float) -> float:
    if not merged:
        return 0.0
    if any(map(is_open, merged)):
        return math.inf
    if not all(map(has_distribution, merged)):
        found = _rdp_epsilon(merged, delta, relation)
        if found is None:
            raise _unpriced()
        return found
    merged = _fold_unsampled(merged)
    if len(merged) == 1 and isinstance(merged[0], Event) and merged[0].sampling_rate == 1:
        return _gaussian_epsilon(merged[0].noise_multiplier, delta)
    return _pld_epsilon(merged, delta, relation, interval)


def _unpriced() -> ConfigError:
    return ConfigError(
        "cohorts of fixed size and Skellam noise are priced by RDP, which has no price for Poisson sampling under "
        "replace, nor for sampled Laplace noise; keep them in two ledgers"
    )


def _fold_unsampled(merged: tuple[DpEvent, ...]) -> tuple[DpEvent, ...]:
    """Compose the Gaussian releases in which everybody takes part: together they are exactly one."""
    whole = [event for event in merged if isinstance(event, Event) and event.sampling_rate == 1]
    if not whole:
        return merged
    others = (event for event in merged if not (isinstance(event, Event) and event.sampling_rate == 1))
    signal = math.hypot(*(math.sqrt(event.steps) / min(event.noise_multiplier, MOST_NOISE) for event in whole))
    return (*others, Event(1 / signal))


def _gaussian_epsilon(noise_multiplier: float, delta: float) -> float:
    from dp_accounting import get_epsilon_gaussian  # here, not above: it takes most of a second

    return float(get_epsilon_gaussian(noise_multiplier, delta))


def _pld_epsilon(merged: tuple[DpEvent, ...], delta: float, relation: Relation, interval: float) -> float:
    return float(distribution(merged, relation, interval).get_epsilon_for_delta(delta))


@lru_cache(maxsize=1024)
def _rdp_epsilon(merged: tuple[DpEvent, ...], delta: float, relation: Relation) -> float | None:
    if not merged:
        return 0.0
    if any(map(is_open, merged)):
        return math.inf
    composed = renyi(_fold_unsampled(merged), relation)
    return None if composed is None else float(composed.get_epsilon(delta))
