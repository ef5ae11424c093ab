"""The max-min game: golden vectors, linear programs, and what the theorem says of every game."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.stats import binom

from fedkd.errors import ConfigError
from fedkd.query import rad
from fedkd.query.error_rate import error_rate, errors

FIVE = [0.9, 0.8, 0.7, 0.6, 0.5]
EIGHT = [0.95, 0.9, 0.4, 0.35, 0.3, 0.05, 0.02, 0.01]
GOLDEN = [
    ([1, 0.5, 0.25], 1, 1, 2, 1 / 3, [1 / 3, 2 / 3, 0]),
    ([1, 0.5, 0.25], 1, 2, 3, 1 / 7, [1 / 7, 2 / 7, 4 / 7]),
    (FIVE, 0, 1, 1, 0.9, [1, 0, 0, 0, 0]),
    (FIVE, 1, 1, 4, 0.549818, [0.203636, 0.229091, 0.261818, 0.305455, 0]),
    (FIVE, 2, 1, 5, 0.402342, [0.149015, 0.167642, 0.191591, 0.223523, 0.268228]),
    (FIVE, 1.5, 2, 5, 0.268228, [0.149015, 0.167642, 0.191591, 0.223523, 0.268228]),
    (EIGHT, 2, 1, 5, 0.276390, [0.096979, 0.102367, 0.230325, 0.263229, 0.307100, 0, 0, 0]),
    ([1] * 10, 3, 1, 10, 0.7, [0.1] * 10),
    ([1] * 10, 3, 2, 10, 0.4, [0.1] * 10),
]


@st.composite
def games(draw, smallest: int = 1):
    """(gains, m, penalty) that the adversary does not win; ties and three decades of gains among them."""
    n = draw(st.integers(smallest, 30))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    family = draw(st.sampled_from(["uniform", "beta", "decades", "ties"]))
    g = {
        "uniform": rng.uniform(0.01, 1, n),
        "beta": rng.beta(0.3, 0.6, n) + 1e-3,
        "decades": 10 ** rng.uniform(-3, 0, n),
        "ties": rng.integers(1, 5, n) / 4,
    }[family]
    penalty = draw(st.sampled_from([1.0, 1.5, 2.0]))
    m = draw(st.floats(1e-3, 1)) * n / penalty  # the solver of linear programs takes much less for 0
    m = float(math.floor(m)) if draw(st.booleans()) else m
    assume(penalty * m < 0.999 * n)
    return g, m, penalty


def program(g, m, penalty, batch=1.0, cap=None) -> float:
    """The game's value as a linear program: the m largest of x sum to min over t, u >= x - t, u >= 0 of m t + sum u."""
    n = len(g)
    worth = np.concatenate([g, [-penalty * m], np.full(n, -penalty)])
    excess = np.hstack([np.diag(g), -np.ones((n, 1)), -np.eye(n)])
    whole = np.concatenate([np.ones(n), np.zeros(n + 1)])[None]
    bounds = [(0, cap)] * n + [(0, None)] * (n + 1)
    return -linprog(-worth, excess, np.zeros(n), whole, [batch], bounds).fun


def enumeration(g, m: int, penalty) -> float:
    """The game's value with every error set written out."""
    n = len(g)
    rows = []
    for wrong in itertools.chain.from_iterable(itertools.combinations(range(n), size) for size in range(m + 1)):
        row = np.array(g, float)
        row[list(wrong)] *= 1 - penalty
        rows.append([*-row, 1.0])
    whole = np.array([[1.0] * n + [0.0]])
    bounds = [(0, None)] * n + [(None, None)]
    return -linprog([0.0] * n + [-1.0], np.array(rows), np.zeros(len(rows)), whole, [1.0], bounds).fun


@pytest.mark.parametrize(("g", "m", "penalty", "k", "value", "p"), GOLDEN)
def test_golden_vectors(g, m, penalty, k, value, p):
    game = rad.solve(g, m, penalty)
    assert game.k == k
    assert game.value == pytest.approx(value, abs=5e-7)
    np.testing.assert_allclose(game.p, p, atol=5e-7)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(games())
def test_the_value_is_the_linear_programs(game):
    assert rad.solve(*game).value == pytest.approx(program(*game), abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(0, 8), st.sampled_from([1.0, 2.0]), st.integers(0, 10**6))
def test_the_value_is_that_of_all_error_sets(n, m, penalty, seed):
    assume(penalty * m < n)
    g = np.random.default_rng(seed).uniform(0.02, 1, n)
    assert rad.solve(g, m, penalty).value == pytest.approx(enumeration(g, m, penalty), abs=1e-9)


@settings(max_examples=300, deadline=None)
@given(games())
def test_both_sides_prove_the_value(game):
    g, m, penalty = game
    solved = rad.solve(g, m, penalty)
    assert rad.worst_case(solved.p, g, m, penalty) == pytest.approx(solved.value, abs=1e-12)
    assert (g * solved.correctness).max() == pytest.approx(solved.value, abs=1e-12)
    assert (1 - solved.correctness).sum() == pytest.approx(penalty * m, abs=1e-9)
    assert np.all((solved.correctness > 0) & (solved.correctness <= 1))


@settings(max_examples=300, deadline=None)
@given(games())
def test_p_is_a_distribution_on_the_largest_gains_inverse_to_them(game):
    g, m, penalty = game
    solved = rad.solve(g, m, penalty)
    inside = solved.p > 0
    assert solved.p.sum() == pytest.approx(1, abs=1e-12) and solved.p.min() >= 0
    assert inside.sum() == solved.k > penalty * m
    if not inside.all():
        assert g[inside].min() >= g[~inside].max()
    np.testing.assert_allclose((solved.p * g)[inside], (solved.p * g).max(), rtol=1e-12)


@settings(max_examples=100, deadline=None)
@given(games(), st.floats(0, 1))
def test_more_errors_widen_the_support_and_lower_the_value(game, share):
    g, m, penalty = game
    fewer, more = rad.solve(g, share * m, penalty), rad.solve(g, m, penalty)
    assert fewer.k <= more.k and fewer.value >= more.value - 1e-12


@settings(max_examples=100, deadline=None)
@given(games(), st.floats(1e-9, 1e9), st.integers(0, 10**6))
def test_p_knows_neither_unit_nor_order(game, unit, seed):
    g, m, penalty = game
    assume(len(np.unique(g)) == len(g))  # ties go to the smallest index
    order = np.random.default_rng(seed).permutation(len(g))
    p = rad.solve(g, m, penalty).p
    np.testing.assert_allclose(rad.solve(unit * g, m, penalty).p, p, atol=1e-12)
    np.testing.assert_allclose(rad.solve(g[order], m, penalty).p, p[order], atol=1e-15)


@settings(max_examples=100, deadline=None)
@given(games())
def test_a_penalty_of_two_is_twice_the_errors(game):
    g, m, _ = game
    assume(2 * m < len(g))
    twice, double = rad.solve(g, 2 * m, 1), rad.solve(g, m, 2)
    assert np.array_equal(twice.p, double.p) and twice.value == double.value


@settings(max_examples=100, deadline=None)
@given(games(smallest=2), st.integers(1, 30))
def test_no_usual_choice_is_worth_more(game, b):
    g, m, penalty = game
    value, n = rad.solve(g, m, penalty).value, len(g)
    greedy = np.zeros(n)
    greedy[np.argsort(-g)[: min(b, n)]] = 1 / min(b, n)
    for p in (np.full(n, 1 / n), g / g.sum(), greedy):
        assert value >= rad.worst_case(p, g, m, penalty) - 1e-12


@pytest.mark.parametrize(
    ("rate", "robust", "uniform", "margin", "proportional"),
    [(0.05, 0.399, 0.164, 0.292, 0.285), (0.10, 0.277, 0.125, 0.0, 0.185)],
)
def test_the_margin_collapses_when_the_errors_fill_the_batch(rate, robust, uniform, margin, proportional):
    n, b = 1000, 100
    games = [np.random.default_rng(seed).beta(0.5, 2, n) + 1e-4 for seed in range(20)]
    rows = []
    for g in games:
        greedy = np.zeros(n)
        greedy[np.argsort(-g)[:b]] = 1 / b
        rivals = [rad.worst_case(p, g, rate * n) for p in (np.full(n, 1 / n), greedy, g / g.sum())]
        rows.append([rad.solve(g, rate * n).value, *rivals])
        assert rows[-1][0] > max(rivals)
    np.testing.assert_allclose(np.mean(rows, 0), [robust, uniform, margin, proportional], atol=0.015)


@pytest.mark.parametrize("g", [[0.3, 0.9, 0.2, 0.9, 0.9], [0.7, 0.1, 0.7], [1 / 3] * 7])
def test_without_errors_the_first_of_the_largest_gains_is_certain(g):
    game = rad.solve(g, 0)
    assert game.k == 1 and game.p.argmax() == int(np.argmax(g)) and game.p.max() == 1
    assert game.value == pytest.approx(max(g), abs=1e-15)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 1000), st.floats(1e-3, 0.99), st.floats(1e-6, 1e6))
def test_equal_gains_are_drawn_alike(n, rate, gain):
    game = rad.solve(np.full(n, gain), rate * n)
    assert game.k == n and game.value == pytest.approx(gain * (1 - rate), rel=1e-9)
    np.testing.assert_allclose(game.p, 1 / n, rtol=1e-12)


@settings(max_examples=50, deadline=None)
@given(games(), st.floats(0, 1))
def test_where_the_adversary_wins_p_is_uniform_and_a_warning_gives_the_numbers(game, share):
    g, _, penalty = game
    n = len(g)
    m = n / penalty + share * (n - n / penalty)
    with pytest.warns(UserWarning, match=f"{n} candidates at penalty {penalty:g}, got m = "):
        solved = rad.solve(g, m, penalty)
    assert solved.value == pytest.approx(program(g, m, penalty), abs=1e-9)
    assert (g * solved.correctness).max() == pytest.approx(solved.value, abs=1e-12)
    np.testing.assert_array_equal(solved.p, 1 / n)
    if penalty == 1:
        assert solved.value == 0 == rad.worst_case(solved.p, g, m)


def test_one_candidate():
    game = rad.solve([0.4], 0.25)
    assert (game.k, game.p.tolist()) == (1, [1.0]) and game.value == pytest.approx(0.3)


def test_gains_of_nothing():
    game = rad.solve([0.0, 1.0, 0.0, 0.5], 1)
    assert game.k == 2 and game.p.tolist() == pytest.approx([0, 1 / 3, 0, 2 / 3])
    assert rad.solve(np.zeros(4), 1).p.tolist() == [0.25] * 4
    for smallest in (0.0, 1e-300, 1e-12):  # more errors than there is to gain
        game = rad.solve([smallest] * 6 + [1.0] * 3, 4)
        assert np.all(np.isfinite(game.p)) and game.p.sum() == pytest.approx(1)
        assert 0 < game.value < 1e-5


def test_gains_far_below_one_are_as_good_as_any():
    g = np.array([1e-12, 5e-13, 2.5e-13])
    np.testing.assert_allclose(rad.solve(g, 1).p, [1 / 3, 2 / 3, 0], rtol=1e-12)


@pytest.mark.parametrize("n", [10**6])
def test_a_million_candidates(n):
    g = np.random.default_rng(0).beta(0.5, 2, n) + 1e-4
    game = rad.solve(g, 0.1 * n)
    assert game.p.sum() == pytest.approx(1, abs=1e-12)
    assert rad.worst_case(game.p, g, 0.1 * n) == pytest.approx(game.value, rel=1e-9)
    assert (g * game.correctness).max() == pytest.approx(game.value, rel=1e-12)


@pytest.mark.parametrize(
    ("gains", "m", "penalty", "message"),
    [
        ([0.5, float("nan")], 0, 1, "gains: expected finite numbers of at least 0, got nan at 1"),
        ([float("inf"), 0.5], 0, 1, "gains: .* got inf at 0"),
        ([0.5, -0.1], 0, 1, "gains: .* got -0.1 at 1"),
        ([], 0, 1, "gains: expected one number for each candidate"),
        ([[0.5]], 0, 1, "gains: .* got shape"),
        ([0.5, 0.5], -1, 1, "m: expected 0 to 2 errors"),
        ([0.5, 0.5], 3, 1, "m: expected 0 to 2 errors"),
        ([0.5, 0.5], float("nan"), 1, "m: expected 0 to 2 errors"),
        ([0.5, 0.5], 1, 0.5, "penalty: expected 1 or more"),
        ([0.5, 0.5], 1, float("nan"), "penalty: expected 1 or more"),
    ],
)
def test_bad_input(gains, m, penalty, message):
    with pytest.raises(ConfigError, match=message):
        rad.solve(gains, m, penalty)


def test_the_gain_is_one_minus_the_margin():
    probs = np.array([[0.7, 0.2, 0.1], [0.4, 0.2, 0.4], [0.0, 0.0, 1.0], [1.0 + 1e-7, 0.0, 0.0]])
    np.testing.assert_allclose(rad.gain(probs), [0.5, 1, 0, 0], atol=1e-15)
    assert rad.gain(probs.astype(np.float32)).dtype == np.float64


def test_the_plugin_rate_is_the_share_seen_and_m_is_not_rounded():
    assert error_rate(190, 200) == 0.05
    assert errors(190, 200, 333) == pytest.approx(16.65)
    assert errors(0, 5, 7) == errors(0, 5, 7, "upper") == 7


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.floats(0, 1), st.sampled_from([0.8, 0.95, 0.99]))
def test_the_upper_rate_is_clopper_and_pearsons(tested, share, level):
    wrong = min(int(share * tested), tested - 1)
    rate = error_rate(tested - wrong, tested, "upper", level)
    assert wrong / tested < rate < 1
    assert binom.cdf(wrong, tested, rate) == pytest.approx(1 - level, abs=1e-9)  # so few are seen that seldom


@pytest.mark.parametrize(("right", "tested"), [(0, 0), (-1, 5), (6, 5)])
def test_a_rate_needs_a_test(right, tested):
    with pytest.raises(ConfigError, match="right: expected"):
        error_rate(right, tested)


@pytest.mark.parametrize("level", [0.0, 1.0, float("nan")])
def test_a_level_is_a_confidence(level):
    with pytest.raises(ConfigError, match="level: expected a confidence"):
        error_rate(4, 5, "upper", level)
