"""Skellam noise: its bound against sums over the whole numbers, its shares, and rounding that keeps the mean."""

import doctest
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import gammaln, logsumexp

import privacy.skellam
from fedkd.errors import ConfigError
from privacy import releases
from privacy.accounting import Event, accountant, delta_at, epsilon, opinions, rdp_epsilon
from privacy.calibration import calibrate_by
from privacy.events import Laplace, Skellam
from privacy.prices import renyi
from privacy.skellam import dequantise, quantise, share
from privacy.special import repeat_and_select

CASES = [(mu, moved) for mu in (0.5, 2.0, 9.0, 100.0) for moved in (1, 3, 10) if moved**2 <= 30 * mu]


def log_pmf(k: np.ndarray, variance: float) -> np.ndarray:
    """Of a difference of two Poissons: exp(-mu) I_|k|(mu), by the series of the Bessel function."""
    k, m = np.abs(k)[:, None], np.arange(300)
    series = (2 * m + k) * math.log(variance / 2) - gammaln(m + 1) - gammaln(m + k + 1)
    return logsumexp(series, axis=1) - variance


def pair(variance: float, moved: int, reach: int = 1500) -> tuple[np.ndarray, np.ndarray]:
    k = np.arange(-reach, reach + 1)
    return log_pmf(k, variance), log_pmf(k - moved, variance)


def bound(order: float, variance: float, l1: float, l2: float) -> float:
    """Theorem 3.5 of the paper, as it is printed."""
    near = ((2 * order - 1) * l2**2 + 6 * l1) / (4 * variance**2)
    return order * l2**2 / (2 * variance) + min(near, 3 * l1 / (2 * variance))


def test_the_reference_is_a_skellam_distribution():
    for variance in (0.5, 9.0, 100.0):
        k, p = np.arange(-400, 401), np.exp(log_pmf(np.arange(-400, 401), variance))
        assert p.sum() == pytest.approx(1, abs=1e-12)
        assert (p * k**2).sum() == pytest.approx(variance, rel=1e-9)


@pytest.mark.parametrize(("variance", "moved"), CASES)
def test_no_divergence_is_above_the_price_and_the_price_is_the_theorem(variance, moved):
    log_p, log_q = pair(variance, moved)
    priced = renyi([Skellam(variance, moved, moved)], "add_remove")
    assert all(order == int(order) for order in priced.orders)
    for order, price in zip(priced.orders, priced.rdp, strict=True):
        if order > 40:
            break
        truth = logsumexp(order * log_p + (1 - order) * log_q) / (order - 1)
        assert truth <= bound(order, variance, moved, moved) * (1 + 1e-9) <= price * (1 + 2e-9)
        if order <= 3 * (variance - 1) / moved:  # where the first line is the lesser; its constant is not let below 0
            assert price <= bound(order, variance, moved, moved) + moved**2 / (4 * variance**2)


@pytest.mark.parametrize(("variance", "moved"), [(9.0, 1), (9.0, 3), (100.0, 10)])
def test_epsilon_is_above_that_of_the_exact_sum_and_near_it(variance, moved):
    log_p, log_q = pair(variance, moved)
    event, delta = Skellam(variance, moved, moved), 1e-5
    eps = epsilon([event], delta, "add_remove")
    truth = np.maximum(np.exp(log_p) - np.exp(eps + log_q), 0).sum()
    assert truth <= delta
    assert np.maximum(np.exp(log_p) - np.exp(0.6 * eps + log_q), 0).sum() > delta
    assert delta_at([event], eps, "add_remove") == pytest.approx(delta, rel=1e-2)


def test_much_noise_is_about_as_good_as_gaussian_noise():
    """Per unit of noise; the integers are felt in the fourth digit."""
    release = releases.skellam(1e8, 1.0, 1e3 - 10, 100, "add_remove", steps=10)
    gaussian = rdp_epsilon([Event(math.sqrt(1e8) / release.l2, steps=10)], 1e-5, "add_remove")
    assert release.l2 == pytest.approx(1000)
    assert gaussian <= epsilon([release], 1e-5, "add_remove") < 1.01 * gaussian


def test_it_is_priced_by_renyi_divergence_alone_and_with_what_that_can_price():
    history = [Skellam(100.0, 9.0, 3.0, 4), Event(5.0, 0.1, 20)]
    assert "Renyi" in accountant(history)
    both = opinions(history, 1e-5, "add_remove")
    assert both.epsilon == both.rdp > max(epsilon([event], 1e-5, "add_remove") for event in history)
    for ask in (lambda: epsilon(history, 1e-5, "replace"), lambda: delta_at(history, 1.0, "replace")):
        with pytest.raises(ConfigError, match="two ledgers"):
            ask()
    with pytest.raises(ConfigError, match="two ledgers"):
        epsilon([history[0], Laplace(1.0, 0.5)], 1e-5, "add_remove")
    with pytest.raises(ConfigError, match="whole orders"):
        repeat_and_select(history, 10, 1e-5, "add_remove")


def test_no_noise_is_no_promise_and_calibration_finds_enough():
    assert epsilon([Skellam(0.0, 1.0, 1.0)], 1e-5, "add_remove") == math.inf
    variance = calibrate_by(lambda mu: [Skellam(mu, 9.0, 3.0, 5)], 2.0, 1e-5, "replace")
    assert 1.98 < epsilon([Skellam(variance, 9.0, 3.0, 5)], 1e-5, "replace") <= 2.0


# --- Sensitivity -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clip", "scale", "dimension", "relation", "l1", "l2"),
    [
        (1.0, 90.0, 100, "add_remove", 1000.0, 100.0),
        (1.0, 90.0, 100, "replace", 2000.0, 200.0),
        (0.5, 2.0, 4, "add_remove", 6.0, 3.0),
        (0.5, 2.0, 10_000, "add_remove", 10_100.0, 101.0),
    ],
)
def test_sensitivities_follow_from_clip_scale_and_dimension(clip, scale, dimension, relation, l1, l2):
    event = releases.skellam(50.0, clip, scale, dimension, relation, steps=3)
    assert (event.variance, event.steps) == (50.0, 3)
    assert (event.l1, event.l2) == (pytest.approx(l1), pytest.approx(l2))


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 999),
    dimension=st.integers(1, 30),
    clip=st.floats(1e-3, 100),
    scale=st.floats(0.01, 1e4),
    spread=st.sampled_from([1e-3, 1.0, 1e6, 1e200]),
)
def test_no_rounded_vector_passes_the_sensitivity(seed, dimension, clip, scale, spread):
    rng = np.random.default_rng(seed)
    x, y = spread * rng.standard_normal((2, dimension))
    one, other = (quantise(v, scale, clip, rng).astype(float) for v in (x, y))
    added = releases.skellam(1.0, clip, scale, dimension, "add_remove")
    replaced = releases.skellam(1.0, clip, scale, dimension, "replace")
    assert np.linalg.norm(one) <= added.l2 * (1 + 1e-12)
    assert np.abs(one).sum() <= added.l1 * (1 + 1e-12)
    assert np.linalg.norm(one - other) <= replaced.l2 * (1 + 1e-12)
    assert np.abs(one - other).sum() <= replaced.l1 * (1 + 1e-12)


def test_rounding_up_can_add_the_root_of_the_dimension():
    """A vector of norm 0.002, four numbers below one step: each may become a whole step."""
    tiny, rng = np.full(4, 1e-3), np.random.default_rng(0)
    norms = [np.linalg.norm(quantise(tiny, 300.0, 2e-3, rng)) for _ in range(2000)]
    assert max(norms) == 2.0 <= releases.skellam(1.0, 2e-3, 300.0, 4, "add_remove").l2 == pytest.approx(2.6)


@pytest.mark.parametrize(
    "arguments",
    [
        (0.0, 1.0, 1.0, 2, "replace"),
        (1.0, 0.0, 1.0, 2, "replace"),
        (1.0, 1.0, math.inf, 2, "replace"),
        (1.0, 1.0, 1.0, 0, "replace"),
        (1.0, 1.0, 1.0, 2, "swap"),
    ],
    ids=str,
)
def test_releases_that_bound_nothing_are_refused(arguments):
    with pytest.raises(ConfigError, match="should be"):
        releases.skellam(*arguments)


def test_an_l1_below_the_l2_is_refused():
    with pytest.raises(ConfigError, match="l1"):
        Skellam(1.0, 1.0, 2.0)


# --- Sampler ---------------------------------------------------------------------------------------------------------


def test_shares_add_up_to_noise_of_the_whole_variance():
    variance, cohort, cells = 7.0, 5, 40_000
    rng = np.random.default_rng(0)
    shares = [share(rng, variance, cohort, (cells,)) for _ in range(cohort)]
    total = sum(shares)
    assert total.dtype == np.int64
    for noise, expected in ((shares[0], variance / cohort), (total, variance)):
        assert abs(noise.mean()) < 5 * math.sqrt(expected / cells)
        assert noise.var() == pytest.approx(expected, rel=5 * math.sqrt((2 + 1 / expected) / cells))
    counts = np.bincount(total[np.abs(total) <= 12] + 12, minlength=25) / cells
    assert counts == pytest.approx(np.exp(log_pmf(np.arange(-12, 13), variance)), abs=5 * math.sqrt(0.16 / cells))


def test_shares_follow_from_the_generator():
    one, again, other = (share(np.random.default_rng(seed), 3.0, 2, (4, 5)) for seed in (1, 1, 2))
    assert np.array_equal(one, again) and not np.array_equal(one, other) and one.shape == (4, 5)


def test_rounding_keeps_the_mean_and_moves_by_less_than_one_step():
    x, scale, draws = np.array([0.234, -0.5, 0.0, 0.999]), 10.0, 20_000
    rng = np.random.default_rng(3)
    rounded = np.stack([quantise(x, scale, 5.0, rng) for _ in range(draws)])
    assert np.abs(rounded - scale * x).max() < 1
    assert dequantise(rounded, scale).mean(0) == pytest.approx(x, abs=5 * 0.5 / scale / math.sqrt(draws))
    assert (rounded[:, 1] == -5).all() and (rounded[:, 2] == 0).all()  # what is whole stays


def test_long_vectors_are_clipped_and_what_is_no_number_counts_as_nothing():
    rng = np.random.default_rng(0)
    assert quantise(np.array([[30.0], [40.0]]), 10.0, 5.0, rng).tolist() == [[30], [40]]
    assert quantise(np.array([3.0, math.nan, math.inf, 4.0]), 10.0, 5.0, rng).tolist() == [30, 0, 0, 40]
    assert quantise(np.zeros(0), 1.0, 1.0, rng).shape == (0,)


def test_bad_arguments_are_refused():
    rng = np.random.default_rng(0)
    for ask in (
        lambda: share(rng, 0.0, 1, (1,)),
        lambda: share(rng, 1.0, 0, (1,)),
        lambda: quantise(np.ones(1), 0.0, 1.0, rng),
        lambda: quantise(np.ones(1), 1.0, math.inf, rng),
        lambda: dequantise(np.ones(1, dtype=np.int64), -1.0),
    ):
        with pytest.raises(ConfigError, match="should be"):
            ask()


def test_examples():
    assert doctest.testmod(privacy.skellam).failed == 0
