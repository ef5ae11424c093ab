"""From an epsilon to the noise that buys it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache, partial
from typing import get_args

from fedkd.errors import ConfigError
from privacy.accounting import FINAL_INTERVAL, LIVE_INTERVAL, epsilon
from privacy.arguments import check_delta, choice, positive
from privacy.events import DpEvent, Event, Relation

_CALIBRATION_SLACK = 1e-4  # share of the target epsilon that calibrated noise may leave unused
_LEAST_SIGMA = 0.2  # sampled releases are not calibrated below this: epsilon is vast there, or delta alone pays


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
    target = positive("target_epsilon", target_epsilon)
    check_delta(delta)
    choice("relation", relation, get_args(Relation))
    shape = Event(1.0, sampling_rate, steps)
    return _calibrate(target, float(delta), shape, relation)


def calibrate_by(
    make: Callable[[float], Iterable[DpEvent]],
    target_epsilon: float,
    delta: float,
    relation: Relation,
    least: float = 1e-3,
) -> float:
    """Return the smallest noise whose releases stay within an epsilon, for releases of any kind.

    Args:
        make: From the noise, in whatever scale, to the releases; more noise must not cost more.
        target_epsilon: Largest epsilon allowed, in nats; positive.
        delta: Probability with which the loss may exceed epsilon, in (0, 1).
        relation: ``"add_remove"`` or ``"replace"`` one unit.
        least: Noise below which nobody looks; if even that is enough, it is returned.

    Returns:
        A noise whose ``epsilon`` at the final interval is at most the target, and within about 1 % or 0.01 of it.

    Raises:
        ConfigError: An argument is outside its range, or no noise up to 1e6 stays within the target.

    Example:
        >>> from privacy.events import Laplace
        >>> round(calibrate_by(lambda b: [Laplace(b, steps=10)], 1.0, 1e-5, "add_remove"), 1)
        9.9
    """
    from scipy.optimize import brentq

    target = positive("target_epsilon", target_epsilon)

    def gap(log_noise: float) -> float:
        found = epsilon(make(math.exp(log_noise)), delta, relation, LIVE_INTERVAL)
        return _log_gap(min(found, 1e9), target)

    floor, low, high = math.log(least), 0.0, 0.0
    while gap(low) <= 0 and low > floor:
        low = max(low - 1, floor)
    while gap(high) > 0:
        high += 1
        if high > math.log(1e6):
            raise ConfigError(f"target_epsilon={target:g}: no noise up to a million times the unit is enough for it")
    found = low if gap(low) <= 0 else float(brentq(gap, low, high, xtol=1e-4))
    return _raise_until(lambda noise: epsilon(make(noise), delta, relation) <= target, math.exp(found))


@lru_cache(maxsize=1024)
def _calibrate(target: float, delta: float, shape: Event, relation: Relation) -> float:
    from dp_accounting import get_sigma_gaussian

    def epsilon_at(sigma: float, interval: float = FINAL_INTERVAL) -> float:
        return epsilon((replace(shape, noise_multiplier=sigma),), delta, relation, interval)

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
