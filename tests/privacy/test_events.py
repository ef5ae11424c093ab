"""Every kind of release against numbers from other people's code (dp-accounting 0.6.0 unless said otherwise)."""

import doctest
import json
import math

import numpy as np
import pytest
from scipy.stats import norm

import privacy.events
import privacy.special
from fedkd.errors import ConfigError, PrivacyError
from privacy import accounting, releases
from privacy.accounting import (
    LIVE_INTERVAL,
    Event,
    Opinions,
    accountant,
    delta_at,
    epsilon,
    merge,
    opinions,
    rdp_epsilon,
)
from privacy.calibration import calibrate_by
from privacy.events import DiscreteGaussian, FixedSize, Laplace, RandomisedResponse, Skellam, read_event
from privacy.special import group_bound, random_allocation, repeat_and_select

FINE, LIVE = 1e-3, 1e-2

KINDS = [
    Event(1.0, 0.5, 3),
    Laplace(2.0, 0.5, 3),
    DiscreteGaussian(4.0, 2, 3),
    RandomisedResponse(1.0, 10, 3),
    FixedSize(1.0, 20, 100, 3),
    Skellam(50.0, 9.0, 3.0, 3),
]

H1 = [Event(6.0, steps=20), Event(1.1, 0.02, 2000)]
H2 = [Event(1.5, 0.1, 20), Laplace(20.0, steps=20), Event(8.0, steps=5)]
H3 = [Event(40.0, steps=1000), Event(1.0, 0.01, 1000)]


# --- Prices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("events", "live", "rdp"),
    [
        (H1, 5.88721611392728, 6.387629509324563),
        (H2, 2.17645276184095, 2.44619925383849),
        (H3, 3.8859938072044478, 4.215169651249678),
    ],
    ids=["logits and DP-SGD", "clients, Laplace, logits", "votes and DP-SGD"],
)
def test_heterogeneous_histories_by_both_accountants(events, live, rdp):
    both = opinions(events, 1e-5, "add_remove", LIVE_INTERVAL)

    assert both.epsilon == pytest.approx(live, abs=1e-6)
    assert both.rdp == pytest.approx(rdp, rel=1e-4)
    assert both.ratio == both.rdp / both.epsilon > 1


def test_a_history_with_laplace_noise_at_the_final_interval():
    assert epsilon(H2, 1e-5, "add_remove") == pytest.approx(2.176439458227785, abs=FINE)


@pytest.mark.parametrize(
    ("scale", "steps", "expected"),
    [(1, 1, 0.9999800002999969), (10, 10, 0.9899623169856906), (10, 100, 4.220347347318563)],
)
@pytest.mark.parametrize("relation", ["add_remove", "replace"])
def test_laplace(scale, steps, expected, relation):
    assert epsilon([Laplace(scale, steps=steps)], 1e-5, relation) == pytest.approx(expected, abs=FINE)


def test_laplace_on_a_vector_costs_no_more_than_on_a_number():
    """Two coordinates that move by 1/2 each, integrated: below what one that moves by 1 costs at the same delta."""
    eps, grid = 0.4, np.linspace(-25, 25, 2001)
    loss = np.abs(grid - 0.5) - np.abs(grid)
    density = np.exp(-np.abs(grid)) / 2 * (grid[1] - grid[0])
    pairs = np.outer(density, density)
    truth = (pairs * np.maximum(1 - np.exp(eps - loss[:, None] - loss[None, :]), 0)).sum()

    assert 0.1 < truth < delta_at([Laplace(1.0)], eps, "add_remove") + 1e-3


@pytest.mark.parametrize(
    ("keep_not", "classes", "expected"), [(0.5, 10, 2.3978999), (0.9, 10, 0.7473), (0.5, 2, 1.0987)]
)
def test_one_randomised_response(keep_not, classes, expected):
    """The vectors tell the mechanism by the probability of a uniform answer."""
    report = RandomisedResponse(math.log1p(classes * (1 - keep_not) / keep_not), classes)

    assert report.uniform == pytest.approx(keep_not)
    assert report.keep == pytest.approx(1 - keep_not + keep_not / classes)
    assert epsilon([report], 1e-10, "replace") == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("report", "beta", "true_label"),
    [
        (RandomisedResponse(1.0, 10), 0.14663257409341549, 0.23196931668407395),
        (RandomisedResponse(0.1, 10), 0.010407633767730044, 0.10936687039095705),
        (RandomisedResponse(2.0, 2), 0.7615941559557649, 0.8807970779778824),
    ],
    ids=str,
)
def test_privatekt(report, beta, true_label):
    assert 1 - report.uniform == pytest.approx(beta, rel=1e-9)
    assert report.keep == pytest.approx(true_label, rel=1e-9)


@pytest.mark.parametrize(("each", "count", "expected"), [(0.1, 100, 1.8182835020120987), (1.0, 20, 12.82688270982887)])
def test_reports_are_counted_as_often_as_they_are_made(each, count, expected):
    """dp-accounting's PLDAccountant composes randomised response once, whatever its count: 2.4 for a hundred of 2.4."""
    value = epsilon([RandomisedResponse(each, 10, count)], 1e-5, "replace")

    assert value == pytest.approx(expected, abs=FINE)
    assert value < each * count  # basic composition


@pytest.mark.parametrize("steps", [1, 50])
def test_discrete_gaussian_noise_is_about_as_good_as_continuous(steps):
    value = epsilon([DiscreteGaussian(5.0, 1, steps)], 1e-5, "add_remove")

    assert value == pytest.approx(epsilon([Event(5.0, steps=steps)], 1e-5, "add_remove"), abs=2e-3)
    assert value < rdp_epsilon([DiscreteGaussian(5.0, 1, steps)], 1e-5, "add_remove")


def test_discrete_gaussian_noise_agrees_with_its_sum():
    sigma, eps = 2.0, 1.0
    k = np.arange(-80, 81)
    p, q = np.exp(-(k**2) / (2 * sigma**2)), np.exp(-((k - 1) ** 2) / (2 * sigma**2))
    truth = np.maximum(p - math.exp(eps) * q, 0).sum() / p.sum()

    assert delta_at([DiscreteGaussian(sigma)], eps, "add_remove") == pytest.approx(truth, rel=1e-3)


def test_confident_votes_are_two_gaussians():
    history = releases.confident_votes(150.0, 40.0, "replace", "client", checks=1000, answers=286)

    assert epsilon(history, 1e-5, "replace") == pytest.approx(2.601487206608089, abs=FINE)
    assert rdp_epsilon(history, 1e-5, "replace") == pytest.approx(2.8213338026853956, rel=1e-4)


@pytest.mark.parametrize("order", [1.5, 2.0, 8.0, 64.0])
def test_a_vote_has_the_renyi_divergence_of_gnmax(order):
    """alpha / sigma squared, data-independent; the threshold test alpha / (2 sigma squared)."""
    vote = releases.votes(20.0, "replace", "client", 1)
    (test,) = releases.confident_votes(20.0, 20.0, "replace", "client", checks=1, answers=0)

    assert order / (2 * vote.noise_multiplier**2) == pytest.approx(order / 20.0**2)
    assert order / (2 * test.noise_multiplier**2) == pytest.approx(order / (2 * 20.0**2))


# --- Samplings -------------------------------------------------------------------------------------------------------


def test_the_sampling_table():
    """100 clients, 20 a round, noise 1, 100 rounds, delta 1e-5: what is claimed depends on what the sampler does."""
    poisson, turns, all_rounds = Event(1.0, 0.2, 100), Event(1.0, steps=20), Event(1.0, steps=100)

    assert epsilon([poisson], 1e-5, "add_remove", LIVE_INTERVAL) == pytest.approx(14.5275, abs=LIVE)
    assert rdp_epsilon([poisson], 1e-5, "add_remove") == pytest.approx(16.081655440721068, rel=1e-6)
    assert epsilon([turns], 1e-5, "add_remove") == pytest.approx(28.373473804682845, abs=FINE)
    assert epsilon([all_rounds], 1e-5, "add_remove") == pytest.approx(91.81728962407377, abs=FINE)
    fixed = [FixedSize(1.0, 20, 100, 100)]
    assert epsilon(fixed, 1e-5, "replace") == pytest.approx(29.803512372820027, rel=1e-6)
    assert "Renyi" in accountant(fixed)


def test_a_fixed_cohort_needs_noise_over_twice_the_bound():
    """Noise std C, one unit at C and all others at -C: C comes in with probability q, and the sum moves by 2 C. That
    pair alone is above what the theorem says when it is given std / C."""
    pair = epsilon([Event(0.5, 0.2, 100)], 1e-5, "add_remove", LIVE_INTERVAL)
    drawn = releases.WithoutReplacement(20, 100)
    honest = releases.gaussian(1.0, 1.0, "replace", "client", "outsider", drawn, steps=100)

    assert epsilon([FixedSize(1.0, 20, 100, 100)], 1e-5, "replace") < 0.6 * pair
    assert honest == FixedSize(0.5, 20, 100, 100)
    assert epsilon([honest], 1e-5, "replace") > pair


def test_shuffled_batches_are_refused_and_what_may_be_claimed_instead():
    """10 epochs of 100 batches, noise 1: Poisson would be 1.83, without amplification it is 17.86."""
    with pytest.raises(ConfigError, match="one release for each pass"):
        releases.gaussian(1.0, 1.0, "add_remove", "record", "server", releases.Shuffled(), steps=1000)

    drawn = releases.gaussian(1.0, 1.0, "add_remove", "record", "server", releases.Poisson(0.01), steps=1000)
    passes = releases.gaussian(1.0, 1.0, "add_remove", "record", "server", steps=10)
    assert epsilon([drawn], 1e-5, "add_remove", LIVE_INTERVAL) == pytest.approx(1.8282436461194622, abs=LIVE)
    assert epsilon([passes], 1e-5, "add_remove") == pytest.approx(17.856586830107616, rel=1e-6)


def test_selection_by_a_random_number_of_runs():
    run = [Event(1.0, 0.01, 1000)]

    assert rdp_epsilon(run, 1e-5, "add_remove") == pytest.approx(2.101366525420273, rel=1e-6)
    for mean, shape, expected in [
        (10, 1.0, 4.10327065640215),
        (10, math.inf, 4.329497680252047),
        (50, 1.0, 4.94183122282386),
    ]:
        assert repeat_and_select(run, mean, 1e-5, "add_remove", shape) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ConfigError, match="cannot price"):
        repeat_and_select(run, 10, 1e-5, "replace")


@pytest.mark.parametrize(
    ("size", "expected"),
    [(1, 0.34066936468432835), (2, 0.725521750857794), (5, 1.9930914044151198), (10, 4.377178095681137)],
)
def test_group_privacy_of_gaussian_noise_is_exact(size, expected):
    assert epsilon([releases.group(Event(10.0), size)], 1e-5, "add_remove") == pytest.approx(expected, rel=1e-6)


def test_group_privacy_in_general():
    eps, delta = group_bound(0.49285036535491517, 1e-8, 5)

    assert eps == pytest.approx(2.464251826774576)
    assert delta == pytest.approx(3.5903664800152263e-07)
    with pytest.raises(ConfigError, match="group_bound"):
        releases.group(Event(10.0, 0.5), 2)


def test_random_allocation_is_refused_without_its_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "PLD_accounting", None)

    with pytest.raises(ConfigError, match="pip install"):
        random_allocation(1.0, 100, 20, 1e-5)
    with pytest.raises(ConfigError, match="chosen"):
        random_allocation(1.0, 100, 101, 1e-5)


@pytest.mark.slow
def test_random_allocation_agrees_with_opake():
    pytest.importorskip("PLD_accounting")

    assert random_allocation(1.0, 100, 1, 1e-5, repeats=10) == pytest.approx(1.729, abs=0.03)


# --- Second opinion --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", KINDS, ids=lambda event: event.kind)
def test_no_second_opinion_is_below_the_first(event):
    relation = event.only or "add_remove"
    both = opinions([event], 1e-5, relation, LIVE_INTERVAL)

    if isinstance(event, Laplace):
        assert both.rdp is both.ratio is None  # sampled Laplace noise has no RDP price
    else:
        assert both.rdp >= both.epsilon - LIVE


def test_a_second_opinion_below_the_first_is_an_alarm(monkeypatch):
    monkeypatch.setattr(accounting, "rdp_epsilon", lambda *_: 3.0)

    with pytest.raises(PrivacyError, match="smaller"):
        opinions([Event(1.0)], 1e-5, "add_remove")


def test_no_second_opinion_of_what_was_never_released():
    assert opinions([], 1e-5, "add_remove") == Opinions(0.0, 0.0)
    assert opinions([], 1e-5, "add_remove").ratio is None
    assert opinions([Event(0.0)], 1e-5, "add_remove") == Opinions(math.inf, math.inf)


def test_unsampled_replacement_costs_the_same_by_rdp_under_both_relations():
    """dp-accounting doubles the sensitivity under replace in its PLD, but not in its RDP."""
    assert (
        rdp_epsilon([Event(1.0)], 1e-5, "replace")
        == rdp_epsilon([Event(1.0)], 1e-5, "add_remove")
        == (pytest.approx(4.728507067217623))
    )
    assert rdp_epsilon([Event(1.0, 0.5)], 1e-5, "replace") is None


# --- Delta -----------------------------------------------------------------------------------------------------------


def test_delta_is_the_inverse_of_epsilon():
    for events in (H2, [FixedSize(1.0, 20, 100, 10)]):
        relation = events[0].only or "add_remove"
        assert delta_at(events, epsilon(events, 1e-5, relation), relation) == pytest.approx(1e-5, rel=1e-2)
    assert delta_at([], 1.0, "replace") == 0.0
    assert delta_at([Event(0.0)], 1.0, "replace") == 1.0


@pytest.mark.parametrize(("mu", "eps", "expected"), [(0.5, 1, 0.006829594983114591), (1, 3, 0.0015371853694009525)])
def test_delta_of_one_gaussian(mu, eps, expected):
    truth = norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu)

    assert truth == pytest.approx(expected, rel=1e-9)
    assert delta_at([Event(1 / mu)], eps, "add_remove") == pytest.approx(expected, rel=1e-4)


# --- Data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", KINDS, ids=lambda event: event.kind)
def test_round_trip_of_every_kind(event):
    assert read_event(json.loads(json.dumps(event.to_json()))) == event


def test_gaussian_json_is_what_it_has_always_been():
    assert json.dumps(Event(1.5, 0.25, 2).to_json()) == (
        '{"kind": "gaussian", "noise_multiplier": 1.5, "sampling_rate": 0.25, "steps": 2}'
    )


@pytest.mark.parametrize("value", [{"kind": "tree"}, {}, {"kind": "laplace", "scale": 1.0}], ids=str)
def test_unknown_kinds_are_refused(value):
    with pytest.raises(ConfigError, match="event"):
        read_event(value)


def test_equal_events_of_each_kind_are_merged_apart():
    doubled = merge([*KINDS, *reversed(KINDS)])

    assert {type(event) for event in doubled} == {type(event) for event in KINDS}
    assert [event.steps for event in doubled] == [6] * len(KINDS)
    assert merge([Event(2.0), Laplace(2.0)]) == (Event(2.0), Laplace(2.0))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Laplace(-1.0),
        lambda: Laplace(1.0, 1.5),
        lambda: DiscreteGaussian(1.0, 0),
        lambda: DiscreteGaussian(1e6),
        lambda: RandomisedResponse(0.0, 10),
        lambda: RandomisedResponse(1.0, 1),
        lambda: RandomisedResponse(101.0, 10),
        lambda: FixedSize(1.0, 21, 20),
        lambda: FixedSize(1.0, 0, 20),
    ],
)
def test_bad_events_are_refused(make):
    with pytest.raises(ConfigError, match="should be"):
        make()


@pytest.mark.parametrize(
    ("event", "relation"),
    [
        (RandomisedResponse(1.0, 10), "add_remove"),
        (FixedSize(1.0, 2, 10), "add_remove"),
        (Laplace(1.0, 0.5), "replace"),
    ],
    ids=str,
)
def test_what_nobody_prices_is_refused(event, relation):
    for ask in (epsilon, rdp_epsilon):
        with pytest.raises(ConfigError, match="price"):
            ask([event], 1e-5, relation)


def test_a_fixed_cohort_and_poisson_samples_under_replace_need_two_ledgers():
    with pytest.raises(ConfigError, match="two ledgers"):
        epsilon([FixedSize(1.0, 2, 10), Event(1.0, 0.5)], 1e-5, "replace")


# --- Calibration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "relation"),
    [
        (lambda noise: [Laplace(noise, steps=20)], "add_remove"),
        (lambda noise: [DiscreteGaussian(noise, 1, 20)], "add_remove"),
        (lambda noise: [FixedSize(noise, 20, 100, 20)], "replace"),
        (lambda noise: [Event(4 * noise, steps=3), Laplace(noise)], "add_remove"),
    ],
)
def test_calibration_of_any_kind_keeps_the_promise_and_wastes_little(make, relation):
    noise = calibrate_by(make, 2.0, 1e-5, relation)

    assert 1.98 < epsilon(make(noise), 1e-5, relation) <= 2.0


def test_calibration_gives_up_where_noise_does_not_help():
    with pytest.raises(ConfigError, match="no noise"):
        calibrate_by(lambda noise: [Event(1.0), Laplace(noise)], 0.5, 1e-5, "add_remove")


def test_examples():
    for module in (privacy.events, privacy.special, releases, __import__("privacy.calibration").calibration):
        assert doctest.testmod(module).failed == 0
