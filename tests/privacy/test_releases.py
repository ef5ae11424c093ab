"""Sensitivities follow from bound, relation and unit; amplification needs a sampler and a blind observer."""

import math

import numpy as np
import pytest

from fedkd.errors import ConfigError
from privacy import releases
from privacy.events import DiscreteGaussian, Event, FixedSize, Laplace, RandomisedResponse
from privacy.releases import EVERYONE, Poisson, Shuffled, Weighted, WithoutReplacement


@pytest.mark.parametrize(
    ("relation", "sampling", "expected"),
    [
        ("add_remove", EVERYONE, Event(2.0, 1.0, 3)),
        ("replace", EVERYONE, Event(1.0, 1.0, 3)),
        ("add_remove", Poisson(0.25), Event(2.0, 0.25, 3)),
        ("replace", Poisson(0.25), Event(1.0, 0.25, 3)),
        ("replace", WithoutReplacement(2, 10), FixedSize(1.0, 2, 10, 3)),
    ],
)
def test_gaussian_noise_is_put_over_the_sensitivity(relation, sampling, expected):
    assert releases.gaussian(3.0, 1.5, relation, "record", "server", sampling, steps=3) == expected


@pytest.mark.parametrize("relation", ["add_remove", "replace"])
def test_the_sensitivity_is_reached_and_never_passed(relation):
    rng = np.random.default_rng(0)
    ones = [v / np.linalg.norm(v) for v in rng.standard_normal((200, 3))]
    moved = max(
        np.linalg.norm(a - (0 * a if relation == "add_remove" else b))
        for a, b in zip(ones, reversed(ones), strict=True)
    )
    worst = np.linalg.norm(ones[0] - (0 if relation == "add_remove" else -ones[0]))

    assert moved <= releases.sensitivity(1.0, relation) + 1e-12
    assert worst == pytest.approx(releases.sensitivity(1.0, relation))


def test_laplace_noise_is_put_over_the_sensitivity():
    assert releases.laplace(3.0, 1.5, "replace", "client", "server", steps=2) == Laplace(1.0, 1.0, 2)
    assert releases.laplace(3.0, 1.5, "add_remove", "record", "server", Poisson(0.5)) == Laplace(2.0, 0.5)


@pytest.mark.parametrize(("relation", "sampling"), [("replace", Poisson(0.5)), ("replace", WithoutReplacement(1, 2))])
def test_sampled_laplace_noise_without_a_price_is_refused(relation, sampling):
    with pytest.raises(ConfigError, match="Laplace noise has a price"):
        releases.laplace(1.0, 1.0, relation, "record", "server", sampling)


@pytest.mark.parametrize("sampling", [Poisson(0.2), WithoutReplacement(20, 100)])
@pytest.mark.parametrize("make", [releases.gaussian, releases.laplace])
def test_sampling_clients_hides_nobody_from_the_server(make, sampling):
    with pytest.raises(ConfigError, match="the server draws the clients"):
        make(1.0, 1.0, "replace", "client", "server", sampling)


def test_sampling_clients_hides_them_from_others():
    assert releases.gaussian(1.0, 1.0, "add_remove", "client", "outsider", Poisson(0.2)) == Event(1.0, 0.2)


@pytest.mark.parametrize("sampling", [Shuffled(), Weighted()])
def test_what_is_not_a_poisson_sample_gets_no_poisson_price(sampling):
    with pytest.raises(ConfigError, match="Poisson"):
        releases.gaussian(1.0, 1.0, "add_remove", "record", "server", sampling)


def test_a_fixed_cohort_has_no_price_under_add_or_remove():
    with pytest.raises(ConfigError, match="replace"):
        releases.gaussian(1.0, 1.0, "add_remove", "record", "server", WithoutReplacement(2, 10))


def test_counts_move_in_one_cell_or_two():
    assert releases.counts(4.0, "add_remove", 3) == DiscreteGaussian(4.0, 1, 3)
    assert releases.counts(4.0, "replace", 3) == DiscreteGaussian(4.0, 1, 6)


@pytest.mark.parametrize(
    ("relation", "unit", "moved"),
    [
        ("add_remove", "client", 1.0),
        ("replace", "client", math.sqrt(2)),
        ("add_remove", "record", math.sqrt(2)),
        ("replace", "label", math.sqrt(2)),
    ],
)
def test_a_vote_moves_by_what_its_histogram_moves(relation, unit, moved):
    before = np.array([9.0, 2.0, 1.0])
    after = before - [1, 0, 0] if moved == 1 else before - [1, -1, 0]
    test, vote = releases.confident_votes(10.0, 6.0, relation, unit, checks=5, answers=2)

    assert np.linalg.norm(after - before) == pytest.approx(moved)
    assert vote == Event(6.0 / moved, steps=2)
    assert test == Event(10.0 / abs(after.max() - before.max()), steps=5)


def test_no_answers_cost_the_tests():
    assert releases.confident_votes(10.0, 6.0, "replace", "client", checks=5, answers=0) == (Event(10.0, steps=5),)
    with pytest.raises(ConfigError, match="answers"):
        releases.confident_votes(10.0, 6.0, "replace", "client", checks=5, answers=6)


def test_labels():
    assert releases.randomised_response(1.0, 10, 3) == RandomisedResponse(1.0, 10, 3)


@pytest.mark.parametrize("bound", [0.0, -1.0, math.inf, math.nan])
def test_a_bound_that_bounds_nothing_is_refused(bound):
    with pytest.raises(ConfigError, match="clip should be"):
        releases.gaussian(1.0, bound, "replace", "client", "server")


@pytest.mark.parametrize("rate", [0.0, 1.1])
def test_a_rate_outside_its_range_is_refused(rate):
    with pytest.raises(ConfigError, match="rate should be in"):
        releases.gaussian(1.0, 1.0, "replace", "record", "server", Poisson(rate))


@pytest.mark.parametrize(("unit", "observer"), [("user", "server"), ("client", "god")])
def test_unknown_words_are_refused(unit, observer):
    with pytest.raises(ConfigError, match="should be"):
        releases.gaussian(1.0, 1.0, "replace", unit, observer)
