"""Query strategies: what each promises, and what all do."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedkd.errors import ConfigError
from fedkd.query import rad
from fedkd.query.strategies import (
    STRATEGIES,
    Candidates,
    ClusterMargin,
    Coreset,
    Mixed,
    Questions,
    Rad,
    Unixkd,
    _nearest,
    doubt,
    entropy,
)


def pool(n: int = 40, classes: int = 4, asked: int = 0, seed: int = 0, rate: float = 0.1) -> Candidates:
    """Random students' answers and features; the first of a random order were asked about."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(n, bool)
    mask[rng.permutation(n)[:asked]] = True
    return Candidates(rng.dirichlet(np.full(classes, 0.5), n), mask, rng.normal(size=(n, 3)), rate)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(STRATEGIES)), st.integers(1, 60), st.floats(0, 1), st.floats(0, 1), st.integers(0, 10**6))
def test_every_strategy_asks_the_budget_about_open_candidates_once(name, n, asked, budget, seed):
    seen = pool(n, asked=int(asked * (n - 1)), seed=seed)
    budget = max(1, int(budget * len(seen.open)))
    questions, again = (STRATEGIES[name]().choose(seen, budget, rng(seed)) for _ in range(2))
    assert len(np.unique(questions.index)) == len(questions.index) == budget
    assert not seen.asked[questions.index].any()
    assert np.array_equal(questions.index, again.index)
    if questions.mixed is not None:
        assert np.array_equal(questions.mixed.partner, again.mixed.partner)
        assert np.array_equal(questions.mixed.share, again.mixed.share)
        assert not seen.asked[questions.mixed.partner].any()


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_copes_with_candidates_that_are_all_alike(name):
    n = 12
    seen = Candidates(np.full((n, 3), 1 / 3), np.arange(n) < 2, np.ones((n, 2)), 0.2)
    index = STRATEGIES[name]().choose(seen, 7, rng()).index
    assert len(np.unique(index)) == 7 and index.min() >= 2


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_generator_decides_where_the_student_does_not(name):
    n = 30
    seen = Candidates(np.full((n, 3), 1 / 3), np.zeros(n, bool), rng().normal(size=(n, 2)), 0.2)
    drawn = {tuple(np.sort(STRATEGIES[name]().choose(seen, 5, rng(seed)).index)) for seed in range(20)}
    assert len(drawn) > 10


def test_uniform_asks_about_everyone_alike():
    seen, times = pool(12, asked=4), 3000
    counts = sum(
        np.bincount(STRATEGIES["uniform"]().choose(seen, 3, rng(seed)).index, minlength=12) for seed in range(times)
    )
    gap = counts[seen.open] - times * 3 / 8
    assert np.all(abs(gap) < 4.5 * np.sqrt(times * 3 / 8 * 5 / 8))


PROBS = np.array(
    [[0.50, 0.49, 0.01, 0.00], [0.40, 0.20, 0.20, 0.20], [0.46, 0.30, 0.24, 0.00], [0.97, 0.01, 0.01, 0.01]]
)


@pytest.mark.parametrize(
    ("name", "order"), [("margin", [0, 2, 1]), ("entropy", [1, 2, 0]), ("least_confidence", [1, 2, 0])]
)
def test_uncertainty_is_ranked_as_defined(name, order):
    seen = Candidates(PROBS, np.zeros(4, bool))
    assert STRATEGIES[name]().choose(seen, 3, rng()).index.tolist() == order


def test_scores_by_hand():
    np.testing.assert_allclose(entropy(np.array([[0.5, 0.5, 0], [1, 0, 0]])), [np.log(2), 0], atol=1e-15)
    np.testing.assert_allclose(doubt(PROBS), [0.5, 0.6, 0.54, 0.03])


def test_coreset_goes_to_the_farthest_from_all_that_were_asked():
    x = np.array([[0.0], [1.0], [10.0], [4.0], [5.5]])
    asked = np.array([True, False, False, False, False])
    seen = Candidates(np.full((5, 2), 0.5), asked, x)
    assert Coreset().choose(seen, 4, rng()).index.tolist() == [2, 4, 3, 1]  # 10; 4.5 from it; then 1.5, then 1


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 6), st.integers(1, 10))
def test_coreset_is_the_greedy_k_center_with_distances_as_they_are(seed, asked, budget):
    seen = pool(30, asked=asked, seed=seed)
    x, chosen = np.asarray(seen.features), Coreset().choose(seen, budget, rng(seed)).index.tolist()
    centres = np.flatnonzero(seen.asked).tolist() or [chosen.pop(0)]
    for index in chosen:
        far = np.linalg.norm(x[:, None] - x[centres], axis=2).min(1)
        assert far[index] == pytest.approx(far.max())
        centres.append(index)


def test_coreset_sees_differences_that_are_small_beside_the_features():
    seen = pool(30, asked=4)
    x = np.round(np.asarray(seen.features) * 1024) / 1024
    near, far = (Candidates(seen.probs, seen.asked, x + shift) for shift in (0.0, 2.0**30))
    assert np.array_equal(Coreset().choose(near, 9, rng()).index, Coreset().choose(far, 9, rng()).index)


def test_the_nearest_of_many_centres():
    x, centres = rng().normal(size=(50, 3)), rng(1).normal(size=(150, 3))
    square, which = _nearest(x, centres)
    gap = np.linalg.norm(x[:, None] - centres, axis=2)
    assert np.array_equal(which, gap.argmin(1))
    np.testing.assert_allclose(square, gap.min(1) ** 2, atol=1e-12)


def test_coreset_is_within_twice_the_best_radius():
    blobs = np.repeat(np.arange(5) * 100.0, 6)[:, None] + rng().uniform(-1, 1, (30, 1))
    index = Coreset().choose(Candidates(np.full((30, 2), 0.5), np.zeros(30, bool), blobs), 5, rng(1)).index
    assert np.unique(index // 6).tolist() == [0, 1, 2, 3, 4]


def clustered() -> Candidates:
    """Three blobs of 20, 6 and 4 candidates far apart, all with small margins; 30 more, far off, with large ones."""
    place = np.repeat([0.0, 50.0, 100.0, 150.0], [20, 6, 4, 30])[:, None] + rng().uniform(-1, 1, (60, 2))
    sure = np.where(np.arange(60) < 30, 0.55, 0.95) + rng(1).uniform(0, 0.01, 60)
    return Candidates(np.stack([sure, 1 - sure], 1), np.zeros(60, bool), place)


def test_cluster_margin_takes_turns_from_the_smallest_cluster_on():
    seen, strategy = clustered(), ClusterMargin(cluster_size=15)
    index = ClusterMargin(cluster_size=15, kept=30 / 7).choose(seen, 7, rng()).index  # of all 30 small margins
    blob = np.searchsorted([20, 26, 30], index, side="right").tolist()
    assert blob == [2, 1, 0, 2, 1, 0, 2]
    assert set(strategy.choose(seen, 24, rng()).index.tolist()) <= set(range(30))  # 24 * 1.25 small margins
    first = {int(strategy.choose(seen, 24, rng(seed)).index[0]) for seed in range(40)}
    assert first == {26, 27, 28, 29}  # at random within the cluster


def test_cluster_margin_asks_the_smallest_margins_where_nothing_is_spare():
    seen = pool(30, asked=3)
    index = ClusterMargin(kept=1.0).choose(seen, 8, rng()).index
    margin = STRATEGIES["margin"]().choose(seen, 8, rng()).index
    assert set(index.tolist()) == set(margin.tolist())


def test_candidates_beyond_the_limit_join_the_nearest_cluster():
    seen = clustered()
    x = np.asarray(seen.features)
    label = ClusterMargin(cluster_size=5, limit=20)._clusters(x)
    assert len(np.unique(label)) == 4
    for low, high in ((0, 20), (20, 26), (26, 30), (30, 60)):
        assert len(np.unique(label[low:high])) == 1


def test_unixkd_leaves_the_most_uncertain_rows_alone_and_blends_the_rest():
    seen = pool(64, seed=3)
    questions = Unixkd().choose(seen, 48, rng())
    assert questions.mixed is not None
    share = questions.mixed.share
    assert np.all(share[:32] < 1e-3)  # sigmoid(-1000 / 128) of a lambda
    assert np.ptp(share[32:]) < 1e-3 and 1e-3 < share[47] < 1  # one lambda a minibatch
    assert np.array_equal(questions.index, np.argsort(-entropy(seen.probs))[:48])


@pytest.mark.parametrize(("batch", "plain", "asked"), [(64, 32, 48), (20, 5, 15), (20, 0, 20)])
def test_unixkds_blending_is_the_papers_mask(batch, plain, asked):
    strategy = Unixkd(batch=batch, plain=plain, asked=asked, sharpness=8.0)
    questions = strategy.choose(pool(batch), asked, rng())
    assert questions.mixed is not None
    mask = 1 / (1 + np.exp(-8.0 * (np.arange(batch) / batch - (2 * plain - 1) / (2 * batch))))
    np.testing.assert_allclose(questions.mixed.share / questions.mixed.share[0], (mask / mask[0])[:asked], rtol=1e-12)


def test_unixkd_asks_about_a_part_of_each_minibatch_while_the_pool_lasts():
    seen, strategy = pool(200), Unixkd(batch=16, plain=8, asked=12)
    wide = strategy.choose(seen, 36, rng())  # three minibatches
    assert wide.mixed is not None
    assert [(part > 0.01).any() for part in np.split(wide.mixed.share, 3)] == [True] * 3
    assert all((part[:8] < 1e-3).all() for part in np.split(wide.mixed.share, 3))
    assert len(strategy.choose(seen, 200, rng()).index) == 200


def test_mixed_inputs_are_blended_and_others_are_the_pools_own():
    x = rng().normal(size=(5, 2, 3)).astype(np.float32)
    questions = Questions(np.array([4, 1]), Mixed(np.array([0, 1]), np.array([0.25, 0.5])))
    blend = questions.inputs(x)
    assert blend.dtype == np.float32
    np.testing.assert_allclose(blend, [0.75 * x[4] + 0.25 * x[0], x[1]], rtol=1e-6)
    assert np.array_equal(Questions(np.array([4, 1])).inputs(x), x[[4, 1]])


@pytest.mark.parametrize("scheme", ["inclusion", "sequential"])
def test_rad_asks_as_the_game_says(scheme):
    seen, b, times = pool(20, asked=5, rate=0.3), 1, 3000
    p = rad.solve(rad.gain(seen.probs[seen.open]), 0.3 * 15).p
    drawn = [int(Rad(scheme=scheme).choose(seen, b, rng(seed)).index[0]) for seed in range(times)]
    counts = np.bincount(drawn, minlength=20)
    assert counts[seen.asked].sum() == 0 and np.all(counts[seen.open][p == 0] == 0)
    assert np.all(abs(counts[seen.open] - times * p) <= 4.5 * np.sqrt(times * p * (1 - p)))


def test_rad_meets_fewer_errors_than_margin_where_the_teacher_errs_on_the_hardest():
    n, b, share = 400, 40, {"rad": [], "margin": []}
    for seed in range(10):
        seen = pool(n, 10, seed=seed)
        wrong = np.argsort(-rad.gain(seen.probs))[: n // 10]
        for name, shares in share.items():
            shares.append(np.isin(STRATEGIES[name]().choose(seen, b, rng(seed)).index, wrong).mean())
    assert np.mean(share["margin"]) == 1 and np.mean(share["rad"]) < 0.5


@pytest.mark.parametrize(
    ("name", "missing"), [("rad", "error_rate"), ("coreset", "features"), ("cluster_margin", "features")]
)
def test_what_a_strategy_needs_must_be_there(name, missing):
    bare = Candidates(PROBS, np.zeros(4, bool))
    with pytest.raises(ConfigError, match=f"{missing}: expected by {STRATEGIES[name].__name__}, got None"):
        STRATEGIES[name]().choose(bare, 1, rng())


@pytest.mark.parametrize("budget", [0, 3])
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_budget_is_between_one_and_the_open_candidates(name, budget):
    with pytest.raises(ConfigError, match=f"budget: expected 1 to 2, the open candidates, got {budget}"):
        STRATEGIES[name]().choose(pool(5, asked=3), budget, rng())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probs": np.full((4, 1), 1.0)}, "probs: expected .n, K. with K of 2"),
        ({"probs": np.full(4, 0.5)}, "probs: expected .n, K."),
        ({"probs": np.full((4, 2), 0.7)}, "probs: expected rows that sum to 1"),
        ({"probs": np.full((4, 2), np.nan)}, "probs: expected rows that sum to 1"),
        ({"probs": np.array([[1.5, -0.5]] * 4)}, "probs: expected rows that sum to 1"),
        ({"asked": np.zeros(3, bool)}, "asked: expected a mask"),
        ({"asked": np.zeros(4, int)}, "asked: expected a mask"),
        ({"features": np.ones((3, 2))}, "features: expected .4, d."),
        ({"features": np.ones((4, 2, 2))}, "features: expected .4, d."),
        ({"features": np.full((4, 2), np.inf)}, "features: expected finite"),
        ({"error_rate": 1.5}, "error_rate: expected a share"),
    ],
)
def test_candidates_are_checked(change, message):
    with pytest.raises(ConfigError, match=message):
        Candidates(**({"probs": PROBS, "asked": np.zeros(4, bool)} | change))


def test_settings_are_frozen_and_checked():
    with pytest.raises(ValidationError):
        Rad(penalty=0.5)
    with pytest.raises(ValidationError):
        ClusterMargin(size=3)
    with pytest.raises(ValidationError):
        Unixkd().batch = 3
