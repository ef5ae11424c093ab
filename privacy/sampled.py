"""The privacy loss of Gaussian releases over Poisson samples, all composed at once.

dp-accounting (0.6.0) builds the same distributions, but inverts the loss cell by cell, and transforms back and forth
for every event. Here a whole grid is computed in closed form, and one product in the frequency domain composes all.
Discretisation: "connect the dots", Doroshenko et al. 2022, arXiv 2207.04380, algorithm 1. Truncation: Chernoff bounds,
as in dp-accounting. Both only ever raise the loss, so that what comes out is an upper bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from privacy.events import Event, Relation

MOST_NOISE = 1e9  # what floating point can price; rounded towards less privacy beyond

_CUT = 9.75  # standard deviations of noise on either side, beyond which its mass, exp(-50), counts as infinite loss
_TAIL = 1e-15  # mass of the composition that may be cut off; it is added to the infinite losses

Array = NDArray[np.float64]


class Losses(NamedTuple):
    """Privacy losses of one release, on a grid.

    Attributes:
        first: Lowest loss, in cells of the grid.
        mass: Probability of that loss and of each of the following.
        infinite: Probability of an infinite loss.
    """

    first: int
    mass: Array
    infinite: float


def composed(events: Iterable[Event], relation: Relation, grid: float) -> Any:
    """dp-accounting's privacy loss distribution of all the releases, one event or more, pessimistic."""
    from dp_accounting.pld import pld_pmf  # here: it takes most of a second
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

    parts = [_of_event(event, relation, grid) for event in events]
    directions = ([(losses[side], steps) for losses, steps in parts] for side in range(len(parts[0][0])))
    totals = [_convolved(direction) for direction in directions]
    return PrivacyLossDistribution(
        *(pld_pmf.DensePLDPmf(grid, total.first, total.mass, total.infinite, True) for total in totals)
    )


def _of_event(event: Event, relation: Relation, grid: float) -> tuple[tuple[Losses, ...], int]:
    """Losses of one release in every direction, and how often it is made."""
    noise = min(event.noise_multiplier, MOST_NOISE)
    noise, steps = (noise / math.sqrt(event.steps), 1) if event.sampling_rate == 1 else (noise, event.steps)
    if relation == "replace":
        return (_replaced(2 * noise, event.sampling_rate, grid),), steps
    return _added_and_removed(noise, event.sampling_rate, grid), steps


# --- One release -----------------------------------------------------------------------------------------------------


def _added_and_removed(noise: float, rate: float, grid: float) -> tuple[Losses, Losses]:
    """A unit at 1 is there with probability ``rate``, or is not; losses when it is removed, and when it is added."""
    cells = _cells(noise, grid, lambda x: _log_ratio(x, noise, rate))
    loss, log_rate, log_rest = cells * grid, math.log(rate), _log_rest(rate)
    with np.errstate(divide="ignore"):  # no outcome is below a loss of log(1 - rate)
        excess = np.log(np.maximum(-np.expm1(log_rest - loss), 0))
    x = noise**2 * (loss + excess - log_rate) + 0.5
    above, below = _log_tail(-x, noise), _log_tail(x, noise)
    above_with = np.logaddexp(log_rest + above, log_rate + _log_tail(1 - x, noise))
    below_with = np.logaddexp(log_rest + below, log_rate + _log_tail(x - 1, noise))
    removed = np.exp(above_with) - np.exp(loss + above)
    added = (np.exp(below) - np.exp(below_with - loss))[::-1]
    return _connected(int(cells[0]), removed, grid), _connected(-int(cells[-1]), added, grid)


def _replaced(noise: float, rate: float, grid: float) -> Losses:
    """A unit at 1 or at -1 is there with probability ``rate``; losses when one is replaced by the other."""
    cells = _cells(noise, grid, lambda x: _log_ratio(x, noise, rate) - _log_ratio(-x, noise, rate))
    loss, log_rate, log_rest = cells * grid, math.log(rate), _log_rest(rate)
    with np.errstate(divide="ignore"):  # at a loss of 0
        log_sinh = np.abs(loss) / 2 + np.log(-np.expm1(-np.abs(loss))) - math.log(2)
    log_sinh += log_rest - log_rate + 0.5 / noise**2
    x = noise**2 * (loss / 2 + np.sign(loss) * np.logaddexp(0.5 * np.logaddexp(0, 2 * log_sinh), log_sinh))
    without = log_rest + _log_tail(-x, noise)
    here = np.logaddexp(without, log_rate + _log_tail(1 - x, noise))
    there = np.logaddexp(without, log_rate + _log_tail(-1 - x, noise))
    return _connected(int(cells[0]), np.exp(here) - np.exp(loss + there), grid)


def _log_rest(rate: float) -> float:
    return math.log1p(-rate) if rate < 1 else -math.inf


def _log_tail(x: Array, noise: float) -> Array:
    from scipy.special import log_ndtr

    return np.asarray(log_ndtr(x / noise))


def _log_ratio(x: float, noise: float, rate: float) -> float:
    """Log of the density at x with the unit, at 1 with probability ``rate``, over that without it."""
    return float(np.logaddexp(_log_rest(rate), math.log(rate) + (2 * x - 1) / (2 * noise**2)))


def _cells(noise: float, grid: float, loss: Any) -> Array:
    """Cells of the losses of all outcomes that are not cut off."""
    low, high = loss(-_CUT * noise), loss(1 + _CUT * noise)
    return np.arange(math.floor(low / grid), math.ceil(high / grid) + 1, dtype=np.float64)


def _connected(first: int, deltas: Array, grid: float) -> Losses:
    """Connect the dots: losses whose delta is as given on the grid, and a chord of that in exp(loss) between."""
    deltas = np.minimum.accumulate(np.clip(deltas, 0, 1))  # rounding
    slopes = np.diff(deltas) / math.expm1(grid)
    mass = np.append(1 - deltas[0], -slopes * math.exp(grid)) + np.append(slopes, 0)
    return Losses(first, np.maximum(mass, 0), float(deltas[-1]))


# --- Composition -----------------------------------------------------------------------------------------------------


def _convolved(parts: list[tuple[Losses, int]]) -> Losses:
    """Losses of each part so many times, all together."""
    from scipy.fft import next_fast_len

    low, high = _window(parts)
    longest = max(len(losses.mass) for losses, _ in parts)
    length = next_fast_len(max(high - low + 1, longest), real=True)
    spectrum = np.ones(length // 2 + 1, dtype=np.complex128)
    power = np.empty_like(spectrum)  # in place, for most of the time is memory's
    for losses, steps in parts:
        np.fft.rfft(losses.mass, length, out=power)
        for bit in reversed(f"{steps:b}"):  # to the power of steps, by squaring
            if bit == "1":
                spectrum *= power
            power *= power
    # What is outside of the window wraps around into it: no more than the tail, which counts as infinite besides.
    mass = np.roll(np.fft.irfft(spectrum, length), -(low % length))[: high - low + 1]
    infinite = _TAIL - math.expm1(sum(steps * math.log1p(-losses.infinite) for losses, steps in parts))
    first = sum(steps * losses.first for losses, steps in parts)
    return Losses(first + low, np.maximum(mass, 0), infinite)


def _window(parts: list[tuple[Losses, int]]) -> tuple[int, int]:
    """Cells, from the lowest possible sum, outside of which the mass is the tail at most."""
    slack = math.log(2 / _TAIL)
    places = [np.arange(len(losses.mass), dtype=np.float64) for losses, _ in parts]

    def chernoff(order: float) -> float:
        """No more than half the tail is beyond this; ``order``, in 1 / cells, is negative for the lower end."""
        log_moment = 0.0
        for (losses, steps), place in zip(parts, places, strict=True):
            largest = max(order, 0) * place[-1]
            # Terms below exp(-300) are raised to that: smaller ones would make denormal products, which are slow.
            terms = losses.mass * np.exp(np.maximum(order * place - largest, -300))
            log_moment += steps * (largest + math.log(terms.sum()))  # not a dot product, which would start threads
        return (log_moment + slack) / order

    variance = sum(
        steps * float(((place - (losses.mass * place).sum()) ** 2 * losses.mass).sum())
        for (losses, steps), place in zip(parts, places, strict=True)
    )
    normal = math.sqrt(2 * slack / max(variance, 1.0))  # the best order for a normal distribution of this variance

    def best(sign: int) -> float:
        """The bound is quasi-convex in the order: halve while that helps, as it does where losses are skewed."""
        order = sign * normal
        bound, nearer = chernoff(order), chernoff(order / 2)
        while sign * nearer < sign * bound:
            order, bound = order / 2, nearer
            nearer = chernoff(order / 2)
        return bound

    highest = sum(steps * (len(losses.mass) - 1) for losses, steps in parts)
    return max(math.floor(best(-1)), 0), min(math.ceil(best(1)), highest)
