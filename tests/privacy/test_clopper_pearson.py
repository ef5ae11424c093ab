import doctest
import json
import math

import numpy as np
import pytest
from scipy.stats import beta, binom

import privacy.audits.clopper_pearson
from fedkd.errors import ConfigError
from fedkd.seeds import generator
from privacy.audits.clopper_pearson import (
    RepeatedRunsResult,
    epsilon_from_counts,
    gaussian_epsilon_from_counts,
    repeated_runs_bound,
    split_runs_bound,
)

# tp, n_in, fp, n_out, epsilon at delta 1e-5 and 95 %; jax-privacy, git 8967688, gives the same.
ROWS = [
    (500, 500, 0, 500, 4.905584135932773),
    (100, 100, 0, 100, 3.2813359732686576),
    (1000, 1000, 0, 1000, 5.6005774942916355),
    (50, 50, 0, 50, 2.5695739172851564),
    (400, 500, 100, 500, 1.1648109588836046),
    (60, 500, 5, 500, 1.387355613572004),
    (10, 10, 0, 10, 0.8071404038888916),
    (250, 500, 250, 500, 0),
]
GAUSSIAN_ROWS = [  # tp, n_in, fp, n_out, mu, epsilon
    (500, 500, 0, 500, 4.879313650820094, 31.997407546218653),
    (400, 500, 100, 500, 1.4268472426444276, 6.642926995671264),
    (100, 100, 0, 100, 3.592769024660131, 21.120338661825002),
    (1000, 1000, 0, 1000, 5.359822537549037, 36.489487893017696),
]

DELTA = 1e-5
DRAWS = 400
AUDITS = {
    "one threshold": lambda *args, **more: repeated_runs_bound(*args, -0.5, **more),
    "several": lambda *args, **more: repeated_runs_bound(*args, np.linspace(-3, 2, 21), **more),
    "split": lambda *args, **more: split_runs_bound(*args, generator(0, "test split"), **more),
}


@pytest.mark.parametrize(("tp", "n_in", "fp", "n_out", "epsilon"), ROWS)
def test_bounds_are_the_references(tp, n_in, fp, n_out, epsilon):
    assert epsilon_from_counts(tp, n_in, fp, n_out, DELTA) == pytest.approx(epsilon, abs=1e-9)
    assert epsilon_from_counts(n_out - fp, n_out, n_in - tp, n_in, DELTA) == pytest.approx(epsilon, abs=1e-9)


@pytest.mark.parametrize(("tp", "n_in", "fp", "n_out", "mu", "epsilon"), GAUSSIAN_ROWS)
def test_gaussian_figures_are_the_references_and_no_headline(tp, n_in, fp, n_out, mu, epsilon):
    found = gaussian_epsilon_from_counts(tp, n_in, fp, n_out, DELTA)

    assert found == (pytest.approx(mu, abs=1e-9), pytest.approx(epsilon, abs=2e-6))
    assert found[1] > 5 * epsilon_from_counts(tp, n_in, fp, n_out, DELTA)


def test_the_ends_are_clopper_and_pearsons():
    fnr, fpr = beta.ppf(0.975, 8, 13), beta.ppf(0.975, 3, 28)

    assert epsilon_from_counts(13, 20, 2, 30, 0.01) == pytest.approx(math.log((1 - 0.01 - fnr) / fpr), abs=1e-12)
    assert gaussian_epsilon_from_counts(0, 20, 30, 30, 0.01) == (0.0, 0.0)


# --- Scores ----------------------------------------------------------------------------------------------------------


def runs(draw: np.random.Generator, n: int, mu: float) -> tuple[np.ndarray, np.ndarray]:
    coins = draw.random(n) < 0.5
    return draw.normal(size=n) - mu * coins, coins


@pytest.mark.parametrize("name", AUDITS)
def test_null_runs_raise_few_alarms(name):
    draw, alarms = generator(0, "test repeated null"), 0
    for _ in range(DRAWS):
        alarms += AUDITS[name](*runs(draw, 100, 0.0), DELTA, independent_runs=True).epsilon > 0

    assert alarms <= binom.ppf(0.999, DRAWS, 0.05)


@pytest.mark.parametrize("name", AUDITS)
def test_a_leak_raises_the_alarm(name):
    draw = generator(0, "test repeated leak")

    certified = [AUDITS[name](*runs(draw, 100, 3.0), DELTA, independent_runs=True).epsilon for _ in range(50)]

    assert np.mean(np.greater(certified, 0.5)) > 0.95


def test_a_threshold_that_has_seen_the_scores_certifies_more_than_it_may():
    """What the split is for: on 60 runs of a mechanism with epsilon ln 3, at 60 % confidence."""
    draw, truth, greedy, split = generator(0, "test repeated greedy"), math.log(3), 0, 0
    for _ in range(DRAWS):
        coins = draw.random(60) < 0.5
        told = coins ^ (draw.random(60) < 0.25)  # randomised response; the rest is post-processing
        scores = draw.normal(size=60) - 2 * told
        more = {"independent_runs": True, "confidence": 0.6}
        greedy += max(repeated_runs_bound(scores, coins, 0.0, one, **more).epsilon for one in scores) > truth
        split += split_runs_bound(scores, coins, 0.0, draw, **more).epsilon > truth

    assert split <= binom.ppf(0.999, DRAWS, 0.4)
    assert greedy > 2 * split


def test_several_thresholds_pay_for_it():
    scores, included = np.array([0.0] * 30 + [1.0] * 30), np.array([True] * 30 + [False] * 30)

    found = repeated_runs_bound(scores, included, DELTA, [-1.0, 0.5], independent_runs=True)

    assert (found.threshold, found.thresholds, found.true_positives, found.false_positives) == (0.5, 2, 30, 0)
    assert found.epsilon == epsilon_from_counts(30, 30, 0, 30, DELTA, 0.975)
    assert found.epsilon < epsilon_from_counts(30, 30, 0, 30, DELTA)


def test_a_score_at_the_threshold_is_not_accused():
    found = repeated_runs_bound([0.5, 0.4, 0.5], [True, True, False], DELTA, 0.5, independent_runs=True)

    assert (found.true_positives, found.false_positives) == (1, 0)


def test_a_split_judges_the_other_half():
    scores, included = runs(generator(0, "test split"), 101, 3.0)

    found = split_runs_bound(scores, included, DELTA, generator(0, "test split"), independent_runs=True)

    n_in = int(included.sum())
    assert (found.n_in, found.n_out) == (n_in - n_in // 2, 101 - n_in - (101 - n_in) // 2)
    assert found == split_runs_bound(scores, included, DELTA, generator(0, "test split"), independent_runs=True)


def test_canaries_of_one_run_are_a_heuristic():
    scores, included = runs(generator(0, "test repeated record"), 100, 3.0)

    bound = repeated_runs_bound(scores, included, DELTA, -1.5, independent_runs=True)
    one_run = repeated_runs_bound(scores, included, DELTA, -1.5, independent_runs=False)

    assert bound.caveat is None
    assert "share a training run" in one_run.caveat
    assert one_run.epsilon == bound.epsilon > 0
    assert bound.m == 100
    saved = json.loads(json.dumps(bound.to_json(), allow_nan=False))
    assert (saved.pop("method"), saved.pop("caveat")) == ("Clopper-Pearson", None)
    assert RepeatedRunsResult(**saved) == bound


@pytest.mark.parametrize(
    ("scores", "included", "more", "message"),
    [
        ([0.0, math.nan], [True, False], {}, "1 of 2 scores are NaN"),
        ([0.0, 1.0], [1, 0], {}, "bool"),
        ([0.0, 1.0, 2.0], [True, False], {}, r"\(3,\) and \(2,\)"),
        ([0.0, 1.0], [True, True], {}, "both kinds"),
        ([0.0, 1.0], [True, False], {"threshold": ()}, "threshold"),
        ([0.0, 1.0], [True, False], {"threshold": math.nan}, "threshold"),
        ([0.0, 1.0], [True, False], {"delta": 1.0}, "delta"),
        ([0.0, 1.0], [True, False], {"confidence": 0.0}, "confidence"),
    ],
)
def test_unusable_runs_are_refused(scores, included, more, message):
    with pytest.raises(ConfigError, match=message) as error:
        repeated_runs_bound(scores, included, **{"delta": DELTA, "threshold": 0.5, "independent_runs": True, **more})

    assert "\n" not in str(error.value)


def test_a_split_of_one_run_is_refused():
    with pytest.raises(ConfigError, match="two runs of either kind, got 2 and 1"):
        split_runs_bound([0, 1, 2], [True, True, False], DELTA, generator(0, "test split"), independent_runs=True)


@pytest.mark.parametrize("counts", [(11, 10, 0, 10), (-1, 10, 0, 10), (0, 0, 0, 10), (0, 10, 0, 0)])
@pytest.mark.parametrize("bound", [epsilon_from_counts, gaussian_epsilon_from_counts])
def test_impossible_counts_are_refused(bound, counts):
    with pytest.raises(ConfigError, match="both kinds"):
        bound(*counts, DELTA)


def test_a_gaussian_has_no_epsilon_at_delta_0():
    with pytest.raises(ConfigError, match="delta 0"):
        gaussian_epsilon_from_counts(5, 10, 1, 10, 0.0)


def test_examples():
    assert doctest.testmod(privacy.audits.clopper_pearson).failed == 0
