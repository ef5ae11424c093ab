import doctest
import json
import math
import time

import numpy as np
import pytest

import privacy.audits.verdict
from fedkd.errors import ConfigError
from privacy.audits.clopper_pearson import repeated_runs_bound
from privacy.audits.one_run import epsilon_bound, gaussian_bound, one_run_bound, several
from privacy.audits.verdict import judge, power

COINS = np.arange(1000) % 2 == 0
LEAK = np.where(COINS, 0.0, 1.0)
DELTA = 1e-5

# epsilon, m; mean of 12 audits with r = m / 5 (delta 1e-5, 95 %), and assuming Gaussian; measured elsewhere.
TABLE = [
    (1, 50, 0.0, 0.0),
    (1, 200, 0.03, 0.032),
    (1, 1000, 0.225, 0.329),
    (1, 5000, 0.362, None),
    (2, 50, 0.159, 0.266),
    (2, 200, 0.174, 0.255),
    (2, 1000, 0.615, 0.963),
    (2, 5000, 0.795, None),
    (4, 50, 0.159, 0.266),
    (4, 200, 0.966, 1.614),
    (4, 1000, 1.35, 2.164),
    (4, 5000, 1.628, None),
    (8, 50, 0.843, 1.449),
    (8, 200, 2.061, 3.611),
    (8, 1000, 2.984, 4.971),
    (8, 5000, 3.189, None),
]


@pytest.mark.parametrize(("epsilon", "m", "bound", "gaussian"), TABLE)
def test_power_is_the_tables_within_its_error(epsilon, m, bound, gaussian):
    for estimator, expected in [("one run", bound), ("one run, assuming Gaussian", gaussian)]:
        if expected is not None:
            found = power(estimator, epsilon, m)
            assert abs(found.mean - expected) < 3 * found.sd * math.sqrt(1 / 12 + 1 / 40) + 1e-3
            assert found.low <= found.mean + 1e-9 < epsilon


@pytest.mark.parametrize("estimator", ["one run", "one run, assuming Gaussian", "Clopper-Pearson"])
def test_power_grows_with_the_leak_and_the_canaries(estimator):
    means = [power(estimator, epsilon, 400).mean for epsilon in (0.5, 2, 4, 8)]

    assert means == sorted(means)
    assert power(estimator, 4, 1000).mean > power(estimator, 4, 100).mean
    assert power(estimator, 0, 400).detected <= 0.1


def test_power_comes_to_the_ceiling():
    assert power("one run", 200.0, 1000).mean == pytest.approx(epsilon_bound(1000, 200, 200, DELTA), abs=1e-9)
    assert power("one run", 200.0, 1000).sd == 0


def test_repeated_runs_are_judged_by_their_best_threshold():
    """Halfway, where it is easy to guess, 2000 runs would certify 0.62 of 4."""
    assert power("Clopper-Pearson", 4.0, 2000).mean > 1.0


def test_power_of_several_k_is_told_apart():
    assert power("one run", 4.0, 400, k=several(400)) != power("one run", 4.0, 400)
    assert power("one run", 4.0, 400, k=40) == power("one run", 4.0, 400)


def test_power_is_cheap():
    start = time.process_time()
    power("one run", 3.21, 1000)
    power("one run, assuming Gaussian", 3.21, 1000)
    first = time.process_time() - start
    power("one run", 3.21, 1000)

    assert first < 1.0
    assert time.process_time() - start - first < 0.001


@pytest.mark.parametrize(
    ("estimator", "epsilon", "m", "more", "message"),
    [
        ("LiRA", 1.0, 100, {}, "estimator"),
        ("one run", -1.0, 100, {}, "epsilon"),
        ("one run", math.inf, 100, {}, "epsilon"),
        ("one run", math.nan, 100, {}, "epsilon"),
        ("one run", 1.0, 1, {}, "plant more"),
        ("one run", 1.0, 100, {"delta": 0.0}, "delta"),
        ("one run", 1.0, 100, {"k": 51}, "half of the 100"),
        ("one run", 1.0, 100, {"confidence": 1.0}, "confidence"),
    ],
)
def test_impossible_power_is_refused(estimator, epsilon, m, more, message):
    with pytest.raises(ConfigError, match=message):
        power(estimator, epsilon, m, **more)


# --- Verdicts --------------------------------------------------------------------------------------------------------


def test_an_audit_above_the_claim_contradicts_it():
    audit = one_run_bound(LEAK, COINS, DELTA, fair_coins=True)

    verdict = judge("student", 2.0, audit)

    assert verdict.outcome == "contradicted"
    assert verdict.audited == audit.epsilon > 2
    assert "epsilon at most 2.00 claimed" in str(verdict)
    assert str(verdict).endswith("the claim is contradicted.")
    assert judge("student", audit.epsilon, audit).outcome == "consistent"  # above, not at


def test_a_low_audit_is_no_proof():
    quiet = one_run_bound(np.arange(1000.0), COINS, DELTA, fair_coins=True)

    verdict = judge("student", 2.0, quiet)

    assert (verdict.outcome, verdict.audited) == ("consistent", 0.0)
    assert "nothing certified" in str(verdict)
    assert "proves no privacy" in str(verdict)
    assert f"an epsilon of 2.00 would be certified as {power('one run', 2.0, 1000).mean:.2f} on average" in str(verdict)
    assert "\n" not in str(verdict)
    assert str(verdict).count(". ") == 0


def test_without_a_claim_nothing_is_contradicted():
    verdict = judge("student", None, one_run_bound(LEAK, COINS, DELTA, fair_coins=True))

    assert verdict.outcome == "nothing claimed"
    assert verdict.power.epsilon == 8
    assert "no epsilon claimed" in str(verdict)
    assert "no privacy" in str(verdict)


def test_a_verdict_on_repeated_runs():
    audit = repeated_runs_bound(LEAK, COINS, DELTA, 0.5, independent_runs=True)

    verdict = judge("aggregate", 4.0, audit)

    assert verdict.outcome == "contradicted"
    assert verdict.power == power("Clopper-Pearson", 4.0, 1000)
    assert "1000 runs" in str(verdict)


def test_the_power_is_that_of_the_audit_that_was_made():
    audit = one_run_bound(LEAK, COINS, 1e-3, fair_coins=True, k=several(1000), confidence=0.9)

    verdict = judge("student", 3.0, audit)

    assert verdict.power == power("one run", 3.0, 1000, delta=1e-3, confidence=0.9, k=several(1000))


def test_a_verdict_goes_to_json():
    verdict = judge("student", 2.0, one_run_bound(LEAK, COINS, DELTA, fair_coins=True))

    saved = json.loads(json.dumps(verdict.to_json(), allow_nan=False))

    assert saved["outcome"] == "contradicted"
    assert saved["sentence"] == str(verdict)
    assert saved["power"] == verdict.power.to_json()


@pytest.mark.parametrize(
    ("audit", "message"),
    [
        (one_run_bound(LEAK, COINS, DELTA, fair_coins=False), "fair coins"),
        (gaussian_bound(LEAK, COINS, DELTA, fair_coins=True), "Gaussian"),
        (repeated_runs_bound(LEAK, COINS, DELTA, 0.5, independent_runs=False), "share a training run"),
        (one_run_bound(LEAK, COINS, 0.0, fair_coins=True), "audit at a small delta"),
    ],
)
def test_a_heuristic_gives_no_verdict(audit, message):
    with pytest.raises(ConfigError, match=message) as error:
        judge("student", 1.0, audit)

    assert "student" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("claimed", [-1.0, math.nan, math.inf])
def test_impossible_claims_are_refused(claimed):
    with pytest.raises(ConfigError, match="claimed"):
        judge("student", claimed, one_run_bound(LEAK, COINS, DELTA, fair_coins=True))


def test_examples():
    assert doctest.testmod(privacy.audits.verdict).failed == 0
