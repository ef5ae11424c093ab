import doctest
import json
import math
import time

import numpy as np
import pytest
from scipy.stats import binom, norm

import privacy.audits.one_run
from fedkd.errors import ConfigError
from fedkd.seeds import generator
from privacy.audits.one_run import (
    OneRunResult,
    epsilon_bound,
    gaussian_bound,
    gaussian_delta,
    gaussian_epsilon,
    gaussian_epsilon_bound,
    gaussian_mu,
    one_run_bound,
    p_value,
    right_guesses,
    several,
)

# m, r, v, delta, 1 - confidence; the authors' appendix D by bisection; jax-privacy, git 8967688, one_run, one_run_fdp.
ROWS = [
    (1000, 100, 75, 1e-4, 0.05, 0.6729846641074193, 0.672984729773335, 0.841723703717428),
    (100000, 1510, 1439, 1e-5, 0.05, 2.6758510076786246, 2.6758509126062022, 3.309083523975045),
    (1000, 1000, 600, 1e-5, 0.05, 0.2972269537187744, 0.2972269575896597, 0.5835403679239116),
    (1000, 1000, 550, 1e-5, 0.05, 0.09398809305700873, 0.09398823055434719, 0.1855698971004857),
    (1000, 1000, 1000, 1e-5, 0.05, 5.78228313539401, 5.782283131572193, 12.334570155595598),
    (100, 100, 100, 1e-5, 0.05, 3.490215955326395, 3.4902158675692982, 8.216186103950786),
    (100, 100, 100, 0, 0.05, 3.4929654311522924, 3.492965346169885, None),
    (100, 50, 40, 1e-5, 0.05, 0.7735157707459948, 0.7735156794749161, 1.5187876446281094),
    (50, 50, 50, 1e-5, 0.05, 2.7833087717470573, 2.7833087629132476, 6.8279658533116),
    (20, 20, 20, 1e-5, 0.05, 1.8220923612649624, 1.8220922196483862, 4.733871257592561),
    (10, 10, 10, 1e-5, 0.05, 1.0515101489334153, 1.0515101317379305, 2.806180038845805),
    (1000, 200, 180, 1e-5, 0.05, 1.7962850706709332, 1.796285070718516, 2.9012429233094257),
    (1000, 200, 180, 1e-5, 0.01, 1.6497745962288466, 1.6497745522272085, 2.388842418418913),
    (5000, 500, 450, 1e-5, 0.05, 1.9414204321292843, 1.9414204321527775, 2.77606619765971),
    (1000, 100, 100, 1e-5, 0.05, 3.465376347811045, 3.465376229385333, 5.5490279999429415),
    (1000, 100, 50, 1e-5, 0.05, 0, 0.0, 0.0),
]

# m, r, v, epsilon, delta, p; jax-privacy gives the same.
P_VALUES = [
    (100, 100, 75, 1.0986122886681098, 0, 0.5534708238482475),
    (1000, 100, 75, 0.5, 0.0001, 0.014587207651351315),
    (1000, 1000, 600, 0.2, 1e-5, 0.0010232412152254599),
    (1000, 1000, 600, 0.0, 0.0, 1.3642320780329735e-10),
    (200, 50, 50, 2.0, 1e-5, 0.002185725685899418),
]

CEILING = {  # of a perfect attack, delta 1e-5, confidence 95 %
    5: 0.19752108240567345,
    10: 1.0515101489334153,
    20: 1.8220923612649624,
    50: 2.7833087717470573,
    100: 3.490215955326395,
    200: 4.188215804851971,
    500: 5.101003263921388,
    1000: 5.78228313539401,
    5000: 7.283899622120757,
    10000: 7.834303247177843,
}

DELTA = 1e-5
AUDITS = {
    "one run": one_run_bound,
    "one run, Bonferroni": lambda *args, **more: one_run_bound(*args, k=several(len(args[0])), **more),
    "Gaussian": gaussian_bound,
    "Gaussian, Bonferroni": lambda *args, **more: gaussian_bound(*args, k=several(len(args[0])), **more),
}


# --- The theorems, on other people's numbers -------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "r", "v", "delta", "beta", "appendix", "jax", "fdp"), ROWS)
def test_bounds_are_the_references(m, r, v, delta, beta, appendix, jax, fdp):
    assert epsilon_bound(m, r, v, delta, 1 - beta) == pytest.approx(appendix, abs=2e-6)
    assert epsilon_bound(m, r, v, delta, 1 - beta) == pytest.approx(jax, abs=2e-6)
    if fdp is not None:
        assert gaussian_epsilon_bound(m, r, v, delta, 1 - beta) == pytest.approx(fdp, abs=2e-5)


def test_the_published_figures():
    assert round(epsilon_bound(1000, 100, 75, 1e-4), 3) == 0.673  # arXiv 2305.08846v1, appendix D, p. 46
    assert math.floor(1000 * epsilon_bound(100000, 1510, 1439, 1e-5)) == 2675  # section 7, p. 28


@pytest.mark.parametrize(("m", "r", "v", "epsilon", "delta", "p"), P_VALUES)
def test_p_values_are_the_references(m, r, v, epsilon, delta, p):
    assert p_value(m, r, v, epsilon, delta) == pytest.approx(p, rel=1e-10)


@pytest.mark.parametrize(
    ("v", "epsilon"), [(138, 0.5395374507872186), (168, 1.3309151266831278), (195, 2.90355981777326)]
)
def test_an_explicit_threshold_of_jax_privacy(v, epsilon):
    """400 Gaussian quantiles 1, 2 and 4 apart, of which the 200 above the threshold halfway are guessed in."""
    assert epsilon_bound(400, 200, v, DELTA) == pytest.approx(epsilon, abs=2e-6)


@pytest.mark.parametrize(("m", "epsilon"), CEILING.items())
def test_what_a_perfect_attack_certifies(m, epsilon):
    assert epsilon_bound(m, m, m, DELTA) == pytest.approx(epsilon, abs=2e-6)


@pytest.mark.parametrize(("r", "v", "epsilon"), [(6, 5, 0.7), (9, 3, 0.0), (4, 4, 2.0)])
def test_p_values_by_the_definition(r, v, epsilon):
    pmf = binom.pmf(np.arange(r + 1), r, 1 / (1 + math.exp(-epsilon)))
    alpha = max(pmf[v - i : v].sum() / i for i in range(1, v + 1))

    assert p_value(20, r, v, epsilon, 0.001) == pytest.approx(pmf[v:].sum() + 2 * 20 * 0.001 * alpha, rel=1e-12)
    assert p_value(20, r, 0, epsilon, 0.001) == 1
    assert p_value(20, r, v, epsilon, 0.9) == 1


def test_abstentions_do_not_lower_the_price_of_delta():
    assert p_value(10_000, 100, 75, 0.5, 1e-4) > 3 * p_value(1000, 100, 75, 0.5, 1e-4)


@pytest.mark.parametrize(("r", "epsilon", "confidence"), [(10, 0.5, 0.95), (200, 0.0, 0.95), (200, 3.0, 0.9)])
def test_the_bound_holds_as_often_as_it_says(r, epsilon, confidence):
    """Exactly, for randomised response, on which a guess is right with probability e^eps / (1 + e^eps)."""
    pmf = binom.pmf(np.arange(r + 1), r, 1 / (1 + math.exp(-epsilon)))
    wrong = sum(pmf[v] for v in range(r + 1) if epsilon_bound(r, r, v, 0.0, confidence) > epsilon)

    assert (1 - confidence) / 6 < wrong <= 1 - confidence


def test_gaussian_conversions():
    """Figures of dp-accounting 0.6.0 for sigma 1 and 2, and of corollary 2.13 by hand."""
    assert gaussian_epsilon(1.0, 1e-5) == pytest.approx(4.377178095681137, abs=2e-6)
    assert gaussian_epsilon(0.5, 1e-5) == pytest.approx(1.9930914044151198, abs=2e-6)
    for mu, epsilon, delta in [
        (0.5, 1, 0.006829594983114591),
        (1, 1, 0.12693673750664392),
        (1, 3, 0.0015371853694009525),
        (2, 5, 0.03228198475007283),
    ]:
        assert gaussian_delta(mu, epsilon) == pytest.approx(delta, rel=1e-9)
        assert gaussian_mu(epsilon, delta) == pytest.approx(mu, abs=2e-6)
    assert gaussian_epsilon(0.0, 1e-5) == 0
    assert gaussian_epsilon(1e-6, 1e-5) == 0
    assert gaussian_epsilon(40.0, 1e-5) == pytest.approx(40**2 / 2 - 40 * norm.ppf(1e-5), rel=0.01)


# --- Scores ----------------------------------------------------------------------------------------------------------


def test_the_lowest_are_guessed_in_and_the_highest_out():
    coins = np.array([True, False, True, False, False, True])

    assert right_guesses([0, 1, 2, 3, 4, 5], coins, (1, 2, 3)) == (1, 2, 4)
    assert right_guesses([0, 1, 2, 5, 4, 3], coins, (1, 2, 3)) == (2, 3, 4)


def test_ties_go_against_the_auditor():
    coins = np.array([True] * 50 + [False] * 50)

    assert right_guesses(np.zeros(100), coins, (25, 50)) == (0, 0)
    assert right_guesses([0.0] * 50 + [1.0] * 50, coins, (50,)) == (100,)
    assert right_guesses([0.0] * 51 + [1.0] * 49, coins, (1,)) == (1,)  # one of the tied at the bottom is excluded
    assert one_run_bound(np.zeros(100), coins, DELTA, fair_coins=True).epsilon == 0


def gaussian_scores(draw: np.random.Generator, m: int, mu: float) -> tuple[np.ndarray, np.ndarray]:
    coins = draw.random(m) < 0.5
    return draw.normal(size=m) - mu * coins, coins


def most_alarms(draws: int, rate: float = 0.05) -> int:
    return int(binom.ppf(0.999, draws, rate))


@pytest.mark.parametrize("name", AUDITS)
@pytest.mark.parametrize("m", [50, 400])
def test_null_runs_raise_few_alarms(name, m):
    draw, draws = generator(0, "test one run null", m), 1000
    alarms = sum(AUDITS[name](*gaussian_scores(draw, m, 0.0), DELTA, fair_coins=True).epsilon > 0 for _ in range(draws))

    assert alarms <= most_alarms(draws)


@pytest.mark.parametrize("name", AUDITS)
def test_a_leak_raises_the_alarm(name):
    """Of a Gaussian mechanism with epsilon 8, on 200 canaries."""
    draw, mu = generator(0, "test one run leak"), gaussian_mu(8.0, DELTA)
    certified = [AUDITS[name](*gaussian_scores(draw, 200, mu), DELTA, fair_coins=True).epsilon for _ in range(50)]

    assert min(certified) > 0.5
    assert np.mean(np.greater(certified, 8.0)) <= 0.05


def test_the_best_of_all_k_without_a_price_cries_wolf():
    """Why several k share the error probability: the estimator that the test above would not pass."""
    draw, draws, alarms, each = generator(0, "test one run greedy"), 300, 0, range(5, 201, 5)
    for _ in range(draws):
        counts = right_guesses(*gaussian_scores(draw, 400, 0.0), each)
        alarms += any(p_value(400, 2 * k, v, 0.0, DELTA) < 0.05 for k, v in zip(each, counts, strict=True))

    assert alarms > 1.5 * most_alarms(draws)


def test_several_numbers_of_guesses_pay_for_it():
    draw = generator(0, "test one run several")
    scores, coins = gaussian_scores(draw, 1000, 1.0)

    found = one_run_bound(scores, coins, DELTA, fair_coins=True, k=(20, 50, 100, 200))

    assert several(1000) == (20, 50, 100, 200)
    assert found.tried == (40, 100, 200, 400)
    paid = [epsilon_bound(1000, 2 * k, *right_guesses(scores, coins, (k,)), DELTA, 1 - 0.05 / 4) for k in several(1000)]
    assert found.epsilon == max(paid)
    assert found.guesses == found.tried[int(np.argmax(paid))]


def test_few_canaries_still_make_five_guesses_of_either_kind():
    coins = np.arange(20) % 2 == 0

    found = one_run_bound(np.where(coins, 0.0, 1.0), coins, DELTA, fair_coins=True)

    assert (found.guesses, found.correct) == (10, 10)
    assert found.epsilon == epsilon_bound(20, 10, 10, DELTA) > 1
    assert several(20) == (5,)
    assert one_run_bound([0.0, 1.0], [True, False], DELTA, fair_coins=True).guesses == 2


def test_what_is_assumed_is_recorded():
    scores, coins = gaussian_scores(generator(0, "test one run record"), 200, 2.0)

    bound = one_run_bound(scores, coins, DELTA, fair_coins=True)
    half = one_run_bound(scores, coins, DELTA, fair_coins=False)
    gaussian = gaussian_bound(scores, coins, DELTA, fair_coins=True)

    assert bound.caveat is None
    assert "fair coins" in half.caveat
    assert half.epsilon == bound.epsilon
    assert "Gaussian" in gaussian.method
    assert "Gaussian" in gaussian.caveat
    assert gaussian.epsilon > bound.epsilon > 0
    saved = json.loads(json.dumps(bound.to_json(), allow_nan=False))
    assert saved.pop("caveat") is None
    assert OneRunResult(**{**saved, "tried": tuple(saved["tried"])}) == bound


@pytest.mark.parametrize(
    ("scores", "coins", "more", "message"),
    [
        ([0.0, math.nan], [True, False], {}, "1 of 2 scores are NaN"),
        ([0.0, 1.0], [1, 0], {}, "bool"),
        ([0.0, 1.0, 2.0], [True, False], {}, r"\(3,\) and \(2,\)"),
        ([0.0], [True], {}, "half of the 1 canaries"),
        ([], np.zeros(0, bool), {}, "half of the 0 canaries"),
        ([0.0, 1.0], [True, False], {"k": 2}, r"got \(2,\)"),
        ([0.0, 1.0], [True, False], {"k": ()}, r"got \(\)"),
        ([0.0, 1.0], [True, False], {"confidence": 1.0}, "confidence"),
        ([0.0, 1.0], [True, False], {"delta": 1.0}, "delta"),
        (np.zeros(100), np.arange(100) < 90, {}, "90 of 100 canaries are included"),
    ],
)
@pytest.mark.parametrize("audit", [one_run_bound, gaussian_bound])
def test_unusable_audits_are_refused(audit, scores, coins, more, message):
    with pytest.raises(ConfigError, match=message) as error:
        audit(scores, coins, **{"delta": DELTA, "fair_coins": True, **more})

    assert "\n" not in str(error.value)


def test_a_gaussian_has_no_epsilon_at_delta_0():
    with pytest.raises(ConfigError, match="delta 0"):
        gaussian_epsilon_bound(100, 20, 15, 0.0)


@pytest.mark.parametrize("counts", [(10, 20, 5), (10, 5, 6), (10, 5, -1), (10, 0, 0)])
@pytest.mark.parametrize("bound", [epsilon_bound, gaussian_epsilon_bound])
def test_impossible_counts_are_refused(bound, counts):
    with pytest.raises(ConfigError, match="correct <= guesses <= m"):
        bound(*counts, DELTA)


def test_a_thousand_canaries_take_milliseconds():
    scores, coins = gaussian_scores(generator(0, "test one run speed"), 1000, 1.3)
    start = time.process_time()
    one_run_bound(scores, coins, DELTA, fair_coins=True, k=several(1000))
    gaussian_bound(scores, coins, DELTA, fair_coins=True, k=several(1000))

    assert time.process_time() - start < 0.5


def test_examples():
    assert doctest.testmod(privacy.audits.one_run).failed == 0
