"""Class means: a mean of one is the record, noise hides it, and no attack cries wolf."""

import numpy as np
import pytest

from fedkd.errors import ConfigError
from privacy.audits.class_means import class_means, distance_scores, exact_interval, single_records
from privacy.audits.membership import audit_scores
from privacy.audits.one_run import one_run_bound

CLIENTS, K, D, POOL = 40, 5, 8, 30


def federation(seed, records):
    """Sums, counts, features, labels, others and their labels; every class of every client has ``records``."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(K), records)
    features = rng.normal(size=(CLIENTS, len(labels), D))
    sums = features.reshape(CLIENTS, K, records, D).sum(2)
    others = rng.normal(size=(CLIENTS, POOL * K, D))
    return sums, np.full((CLIENTS, K), records), features, [labels] * CLIENTS, others, np.arange(POOL * K) % K


def found(seed, records, noise=0.0, **more):
    sums, counts, *rest = federation(seed, records)
    rng = np.random.default_rng(seed + 1)
    return single_records("message", sums + noise * rng.normal(size=sums.shape), counts, *rest, rng, **more)


# --- Means -----------------------------------------------------------------------------------------------------------


def test_noisy_counts_neither_blow_up_nor_turn_the_mean():
    sums = np.full((1, 4, 2), 3.0)
    means = class_means(sums, [[3.0, 0.25, 0.0, -7.0]])
    np.testing.assert_allclose(means[0, :, 0], [1.0, 3.0, 3.0, 3.0])


@pytest.mark.parametrize(
    ("right", "n", "low", "high"), [(0, 10, 0.0, 0.3085), (5, 10, 0.1871, 0.8129), (100, 100, 0.9638, 1.0)]
)
def test_exact_intervals_are_those_of_the_tables(right, n, low, high):
    assert exact_interval(right, n) == pytest.approx((low, high), abs=1e-4)


# --- Single records --------------------------------------------------------------------------------------------------


def test_the_mean_of_one_record_is_the_record():
    result = found(0, 1)
    assert result.alone.found == result.alone.classes == CLIENTS * K
    assert result.candidates == POOL + 1 and result.leaks
    assert "200 of 200 classes of one record" in str(result)
    assert result.to_json()["by_records"][0]["rate"] == 1.0


def test_more_records_hide_one_another():
    rates = [found(0, n).by_records[0].rate for n in (1, 2, 3, 5)]
    assert rates == sorted(rates, reverse=True) and rates[0] == 1.0 and rates[-1] < 0.6
    assert found(0, 2).alone is None and not found(0, 2).leaks
    assert found(0, 6).by_records == ()  # more than are tried


def test_heavy_noise_is_chance_at_the_nominal_rate():
    results = [found(seed, 1, noise=1e6) for seed in range(60)]
    rates = [one.alone.rate for one in results]
    assert np.mean(rates) == pytest.approx(1 / (POOL + 1), abs=4 * np.sqrt(0.031 / (60 * CLIENTS * K)))
    assert sum(one.leaks for one in results) <= 6  # 2.5 % each: seven or more, once in 800


def test_noise_on_sums_lowers_the_rate():
    rates = [found(0, 1, noise).alone.rate for noise in (0.0, 0.5, 1.0, 2.0, 8.0)]
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.2


def test_the_curve_is_by_true_counts_and_one_record_a_class():
    sums, counts, features, labels, others, classes = federation(0, 2)
    alone = [np.delete(part, 0, axis=0) for part in features]  # the first class loses a record
    sums[:, 0] -= features[:, 0]
    result = single_records(
        "m", sums, counts, alone, [part[1:] for part in labels], others, classes, np.random.default_rng(0)
    )
    assert [(one.records, one.classes) for one in result.by_records] == [(1, CLIENTS), (2, CLIENTS * (K - 1))]


# --- Membership ------------------------------------------------------------------------------------------------------


def canaries(seed, planted, noise=0.0):
    """Scores and coins of canaries, one for each class of each client, beside two records each."""
    sums, counts, *_ = federation(seed, 2)
    rng = np.random.default_rng(seed + 1)
    features, coins = rng.normal(size=(CLIENTS, K, D)), rng.random((CLIENTS, K)) < 0.5
    inside = coins * float(planted)
    sums = sums + inside[..., None] * features + noise * rng.normal(size=sums.shape)
    owners, labels = np.repeat(np.arange(CLIENTS), K), np.tile(np.arange(K), CLIENTS)
    counts = counts + inside + noise * rng.normal(size=counts.shape)
    return distance_scores(sums, counts, owners, labels, features.reshape(-1, D)), coins.ravel()


def test_members_are_nearer_to_their_mean():
    scores, coins = canaries(0, planted=True)
    assert audit_scores("message", True, scores, coins, 0).auroc > 0.8
    assert one_run_bound(scores, coins, 1e-5, fair_coins=True).epsilon > 0.5


def test_scores_of_who_is_not_there_do_not_cry_wolf():
    alarms = [audit_scores("m", True, *canaries(seed, planted=False), 0).leaks for seed in range(20)]
    assert sum(alarms) <= 3  # 2.5 % each: four or more, once in 700


def test_noise_hides_members():
    assert audit_scores("message", True, *canaries(0, planted=True, noise=1e4), 0).auroc < 0.6


def test_what_is_expected_comes_from_the_owners_other_classes_that_are_there():
    sums = np.array([[[0.0], [10.0], [0.0]], [[5.0], [5.0], [5.0]]])
    counts = [[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]
    np.testing.assert_allclose(distance_scores(sums, counts, [0, 0, 1], [0, 1, 2], [[2.0], [2.0], [2.0]]), [-6, 6, 0])


# --- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: class_means(np.zeros((2, 3)), np.zeros((2, 3))), r"\(clients, K, d\)"),
        (lambda: class_means(np.full((1, 1, 1), np.inf), [[1]]), "finite"),
        (lambda: exact_interval(3, 2), "3 of 2"),
        (lambda: distance_scores(np.zeros((1, 2, 3)), np.ones((1, 2)), [1], [0], np.zeros((1, 3))), "owners"),
        (lambda: distance_scores(np.zeros((1, 2, 3)), np.ones((1, 2)), [0], [0.5], np.zeros((1, 3))), "labels"),
        (lambda: distance_scores(np.zeros((1, 2, 3)), np.ones((1, 2)), [0], [0], np.zeros((1, 2))), r"\(m, 3\)"),
        (lambda: distance_scores(np.zeros((1, 2, 3)), np.ones((1, 2)), [0], [0], np.full((1, 3), np.nan)), "finite"),
        (lambda: found(0, 1, candidates=1), "2 candidates"),
        (lambda: single_records("m", *federation(0, 1)[:2], [], [], [], [0], None), "40 clients"),
        (lambda: single_records("m", [[[1.0]]], [[1]], [[[1.0]]], [[0]], [[[1.0, 2.0]]], [0], None), "client 0 should"),
    ],
)
def test_bad_input(call, said):
    with pytest.raises(ConfigError, match=said):
        call()
