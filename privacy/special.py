"""Epsilons of what does not go into a ledger: selection, random allocation, groups."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable

from fedkd.errors import ConfigError
from privacy.accounting import checked
from privacy.arguments import check_delta, integer, positive, require
from privacy.events import DpEvent, Relation
from privacy.prices import dp_event, renyi


def repeat_and_select(
    events: Iterable[DpEvent], mean: float, delta: float, relation: Relation, shape: float = 1.0
) -> float:
    """Return the epsilon of running something a random number of times and releasing only the best run.

    What a search for hyper-parameters on private data costs, if the number of runs is drawn, not chosen (Papernot and
    Steinke 2022, arXiv 2110.03620). By RDP: there is no PLD for it.

    Args:
        events: What one run releases.
        mean: Mean number of runs, above 1.
        delta: As for ``epsilon``.
        relation: As for ``epsilon``.
        shape: Of the number of runs: 0 logarithmic, 1 geometric, infinite Poisson, else negative binomial.

    Raises:
        ConfigError: An argument is outside its range, or RDP cannot price an event.
    """
    from dp_accounting import dp_event as theirs

    merged = checked(events, relation)
    check_delta(delta)
    require(positive("mean", mean) > 1, "mean", "above 1", mean)
    require(shape >= 0, "shape", "0 or more", shape)
    if renyi(merged, relation) is None:
        raise ConfigError(f"selection is priced by RDP, which cannot price all of {[e.kind for e in merged]} here")
    run = theirs.ComposedDpEvent([theirs.SelfComposedDpEvent(dp_event(event), event.steps) for event in merged])
    total = renyi((), relation)
    total.compose(theirs.RepeatAndSelectDpEvent(run, mean, shape))
    return float(total.get_epsilon(delta))


def random_allocation(noise_multiplier: float, rounds: int, chosen: int, delta: float, repeats: int = 1) -> float:
    """Return the epsilon when each unit takes part in exactly ``chosen`` of ``rounds`` releases, drawn uniformly.

    Feldman and Shenfeld 2025, arXiv 2502.08202, by the package pld-accounting; add or remove one unit. The sizes of the
    cohorts then vary. It takes about half a minute.

    Args:
        noise_multiplier: Standard deviation of the noise over one contribution.
        rounds: Releases, 1 or more.
        chosen: Releases that each unit takes part in.
        delta: As for ``epsilon``.
        repeats: How often the whole is done, with fresh draws.

    Returns:
        An upper bound, in nats.

    Raises:
        ConfigError: An argument is outside its range, or the package is not installed.
    """
    check_delta(delta)
    noise = positive("noise_multiplier", noise_multiplier)
    rounds, repeats = integer("rounds", rounds, 1), integer("repeats", repeats, 1)
    require(integer("chosen", chosen, 1) <= rounds, "chosen", f"at most the {rounds} rounds", chosen)
    try:
        allocation = importlib.import_module("PLD_accounting")
    except ImportError:
        raise ConfigError(
            "random allocation is priced by the package pld-accounting, which is not installed: pip install "
            "'pld-accounting>=2', or account for it as no sampling"
        ) from None
    upper, _ = allocation.gaussian_allocation_epsilon_range(
        delta=delta, sigma=noise, num_steps=rounds, num_selected=chosen, num_epochs=repeats
    )
    return float(upper)


def group_bound(epsilon: float, delta: float, size: int) -> tuple[float, float]:
    """Return (epsilon, delta) for ``size`` units that change together, from those of one: k e, k exp((k - 1) e) delta.

    Example:
        >>> group_bound(0.5, 1e-8, 1)
        (0.5, 1e-08)
    """
    size = integer("size", size, 1)
    require(0 <= epsilon < math.inf, "epsilon", "0 or more and finite", epsilon)
    check_delta(delta)
    return size * epsilon, size * math.exp((size - 1) * epsilon) * delta
