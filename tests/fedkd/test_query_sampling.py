"""Batches: the capped program against linear programs, exact inclusion probabilities, and never a candidate twice."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.stats import chi2

from fedkd.errors import ConfigError
from fedkd.query import rad
from fedkd.query.sampling import _at_level, _slope, _systematic, draw, inclusion, madow


@st.composite
def batches(draw):
    """(gains, m, b, penalty); a b near n or an m near n / penalty is as likely as any."""
    n = draw(st.integers(1, 25))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    family = draw(st.sampled_from(["uniform", "decades", "ties"]))
    g = {
        "uniform": rng.uniform(0.01, 1, n),
        "decades": 10 ** rng.uniform(-3, 0, n),
        "ties": rng.integers(1, 5, n) / 4,
    }[family]
    penalty = draw(st.sampled_from([1.0, 1.3, 2.0, 5.0]))
    m = draw(st.floats(1e-3, 1)) * n / penalty  # the solver of linear programs takes much less for 0
    m = float(math.floor(m)) if draw(st.booleans()) else m
    assume(penalty * m < 0.999 * n)
    return g, m, draw(st.integers(1, n)), penalty


def program(g, m, b, penalty) -> float:
    """The capped program's value; the m largest of x sum to the min over t, u >= x - t, u >= 0 of m t + sum u."""
    n = len(g)
    worth = np.concatenate([g, [-penalty * m], np.full(n, -penalty)])
    excess = np.hstack([np.diag(g), -np.ones((n, 1)), -np.eye(n)])
    whole = np.concatenate([np.ones(n), np.zeros(n + 1)])[None]
    bounds = [(0, 1)] * n + [(0, None)] * (n + 1)
    return -linprog(-worth, excess, np.zeros(n), whole, [b], bounds).fun


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(batches())
def test_the_inclusion_probabilities_are_worth_what_the_linear_program_is(batch):
    g, m, b, penalty = batch
    pi = inclusion(g, m, b, penalty)
    assert pi.min() >= 0 and pi.max() <= 1 and pi.sum() == pytest.approx(b, abs=1e-9)
    assert rad.worst_case(pi, g, m, penalty) == pytest.approx(program(*batch), abs=1e-9)


@settings(max_examples=200, deadline=None)
@given(batches())
def test_they_are_b_times_p_for_as_long_as_that_can_be(batch):
    g, m, b, penalty = batch
    game = rad.solve(g, m, penalty)
    worth = rad.worst_case(inclusion(g, m, b, penalty), g, m, penalty)
    if b * game.p.max() <= 1:
        np.testing.assert_allclose(inclusion(g, m, b, penalty), b * game.p, atol=1e-12)
        assert worth == pytest.approx(b * game.value, abs=1e-9)
    assert worth <= b * game.value + 1e-9


def test_the_cap_by_hand():
    assert inclusion([1, 0.5, 0.25], 1, 1).tolist() == pytest.approx([1 / 3, 2 / 3, 0])  # no cap yet
    assert inclusion([1, 0.5, 0.25], 1, 2).tolist() == pytest.approx([0.5, 1, 0.5])  # 0.5 is asked surely
    assert inclusion([1, 0.5, 0.25], 0, 2).tolist() == [1, 1, 0]
    # All are worth 0.2 and four questions are not used up. The adversary has three errors for the first two, so what
    # is left is worth nothing there; or is lost, at penalty 2, where the smaller gain loses less.
    g, rest = [1, 0.9, 0.2, 0.2, 0.2], 1 - 0.2 - 0.2 / 0.9
    assert inclusion(g, 3, 4).tolist() == pytest.approx([0.2 + rest, 0.2 / 0.9, 1, 1, 1])
    assert inclusion(g, 2, 4, 2).tolist() == pytest.approx([0.2, 0.2 / 0.9 + rest, 1, 1, 1])


@settings(max_examples=100, deadline=None)
@given(batches())
def test_the_slope_bounds_the_worth_at_every_other_level(batch):
    g, m, b, penalty = batch
    g = np.sort(g)[::-1]

    def worth(level: float) -> float:
        x = _at_level(g, level, b, penalty) * g
        return x.sum() - penalty * (m * level + np.maximum(x - level, 0).sum())

    levels = g[0] * np.linspace(0.02, 0.98, 13)
    worths = np.array([worth(level) for level in levels])
    for level, value in zip(levels, worths, strict=True):
        slope = _slope(g, rad.totals(g), level, m, b, penalty)
        assert np.all(worths <= value + slope * (levels - level) + 1e-9)


@pytest.mark.slow
def test_a_million_candidates_beyond_the_cap():
    n, b = 10**6, 400_000
    g = np.random.default_rng(0).beta(0.5, 2, n) + 1e-4
    pi = inclusion(g, 0.1 * n, b)
    assert pi.max() == 1 and pi.sum() == pytest.approx(b, abs=1e-6)
    # Weak duality: errors that sum to m prove that no pi is worth more than the b largest of what they leave.
    level, price = np.median((pi * g)[(pi > 0) & (pi < 1)]), g[pi > 0].min()
    wrong = np.where(g > level, np.maximum(0.0, 1 - price / g), 0.0)
    bound = np.sort(g * (1 - wrong * (0.1 * n / wrong.sum())))[-b:].sum()
    assert bound * (1 - 1e-5) < rad.worst_case(pi, g, 0.1 * n) < bound * (1 + 1e-12)
    assert len(np.unique(madow(pi, np.random.default_rng(1)))) == b


@settings(max_examples=100, deadline=None)
@given(batches())
def test_systematic_sampling_has_exactly_its_inclusion_probabilities(batch):
    """By enumeration: between two ends on the line, taken modulo 1, every start draws the same candidates."""
    pi, b = inclusion(*batch), batch[2]
    cuts = np.unique(np.concatenate([[0.0, 1.0], np.cumsum(pi[(pi > 0) & (pi < 1 - 1e-9)]) % 1]))
    drawn = np.zeros(len(pi))
    for low, high in itertools.pairwise(cuts):
        index = _systematic(pi, b, (low + high) / 2)
        assert len(np.unique(index)) == len(index) == b
        drawn[index] += high - low
    np.testing.assert_allclose(drawn, pi, atol=2e-9)


@pytest.mark.parametrize("scheme", ["inclusion", "sequential"])
@pytest.mark.parametrize(("b", "penalty"), [(1, 1.0), (3, 1.0), (1, 2.0), (4, 2.0)])
def test_draws_follow_the_inclusion_probabilities(scheme, b, penalty):
    g, rate, times = np.array([1, 0.9, 0.7, 0.5, 0.4, 0.3, 0.2, 0.1]), 0.25, 2000
    pi, rng = inclusion(g, rate * len(g), b, penalty), np.random.default_rng(0)
    assert rad.solve(g, rate * len(g), penalty).k > b  # both schemes then draw alike
    drawn = np.zeros((times, len(g)))
    for row in drawn:
        row[draw(g, rate, b, rng, penalty, scheme)] = 1
    certain = (pi == 0) | (pi == 1)
    assert np.all(drawn[:, certain] == pi[certain])
    gap, spread = drawn.mean(0) - pi, np.cov(drawn.T)
    statistic = times * gap @ np.linalg.pinv(spread, rcond=1e-9, hermitian=True) @ gap
    freedom = (~certain).sum() - 1  # every batch has the same size
    assert freedom >= 3 and statistic < chi2.ppf(0.999, freedom)


def test_neighbours_can_be_drawn_together():
    rng = np.random.default_rng(0)
    pairs = {tuple(madow(np.full(6, 1 / 3), rng).tolist()) for _ in range(500)}
    assert len(pairs) == 15


@settings(max_examples=200, deadline=None)
@given(batches(), st.floats(0, 1), st.sampled_from(["inclusion", "sequential"]), st.integers(0, 10**6))
@pytest.mark.filterwarnings("ignore:rad.* expected fewer:UserWarning")  # any rate is drawn here
def test_a_batch_has_its_size_and_nobody_twice(batch, rate, scheme, seed):
    g, _, b, penalty = batch
    first, again = (draw(g, rate, b, np.random.default_rng(seed), penalty, scheme) for _ in range(2))
    assert len(np.unique(first)) == len(first) == b
    assert first.min() >= 0 and first.max() < len(g)
    assert np.array_equal(first, again)


@settings(max_examples=100, deadline=None)
@given(batches(), st.floats(0, 0.6))
def test_sequential_batches_hold_whole_supports_while_there_is_room(batch, rate):
    g, _, b, penalty = batch
    assume(penalty * rate < 0.99)
    left, wanted, sure = np.arange(len(g)), b, []
    while wanted and (game := rad.solve(g[left], rate * len(left), penalty)).k <= wanted:
        sure += left[game.p > 0].tolist()
        left, wanted = left[game.p == 0], wanted - game.k
    batch = draw(g, rate, b, np.random.default_rng(0), penalty, "sequential")
    assert set(sure) <= set(batch.tolist())
    if wanted:
        pi = inclusion(g[left], rate * len(left), wanted, penalty)
        assert np.all(pi[np.isin(left, batch)] > 0)


def test_without_errors_a_batch_is_of_the_largest_gains():
    g = np.random.default_rng(0).permutation(50) + 1.0
    for scheme in ("inclusion", "sequential"):
        assert (
            draw(g, 0.0, 10, np.random.default_rng(1), scheme=scheme).tolist() == np.sort(np.argsort(-g)[:10]).tolist()
        )


@pytest.mark.parametrize("scheme", ["inclusion", "sequential"])
@pytest.mark.parametrize("g", [[0.4], [0.5] * 7, [1.0, 0.0, 0.0], [0.0] * 4])
def test_the_whole_pool(scheme, g):
    assert draw(g, 0.1, len(g), np.random.default_rng(0), scheme=scheme).tolist() == list(range(len(g)))


@pytest.mark.parametrize("scheme", ["inclusion", "sequential"])
def test_a_hopeless_teacher_is_asked_uniformly_with_a_warning(scheme):
    with pytest.warns(UserWarning, match="got m = 5"):
        assert len(draw(np.linspace(0.1, 1, 5), 1.0, 3, np.random.default_rng(0), scheme=scheme)) == 3
    with pytest.warns(UserWarning, match="drawn uniformly"):
        assert inclusion(np.linspace(0.1, 1, 5), 5, 2).tolist() == [0.4] * 5


@pytest.mark.parametrize("b", [0, -1, 4])
def test_a_batch_is_between_one_and_the_pool(b):
    for bad in (lambda: draw([1, 1, 1], 0.1, b, np.random.default_rng(0)), lambda: inclusion([1, 1, 1], 1, b)):
        with pytest.raises(ConfigError, match="b: expected 1 to 3 questions"):
            bad()


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_a_rate_is_a_share(rate):
    with pytest.raises(ConfigError, match="error_rate: expected a share"):
        draw([1, 1, 1], rate, 1, np.random.default_rng(0))


@pytest.mark.parametrize("pi", [[0.5, 0.7], [1.2, -0.2], [1.5, 0.5], [float("nan"), 1.0]])
def test_madow_wants_probabilities_of_a_whole_sum(pi):
    with pytest.raises(ConfigError, match="inclusion: expected probabilities"):
        madow(np.array(pi), np.random.default_rng(0))
