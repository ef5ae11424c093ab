import doctest
import json
import math
import time
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu, norm, skewnorm

import privacy.audits.exposure
import privacy.audits.membership
from fedkd.errors import ConfigError
from fedkd.seeds import generator
from privacy.audits.exposure import (
    exposure_exact,
    exposure_extrapolated,
    exposure_interpolated,
    null_mean,
    null_mean_exact,
)
from privacy.audits.membership import (
    AuditResult,
    audit_scores,
    auroc,
    bootstrap_interval,
    null_band,
    p_value,
    tpr_at_fpr,
)

VECTORS = json.loads(Path(__file__).with_name("vectors.json").read_text())
GENERATED = {
    "normal": norm.ppf((np.arange(1000) + 0.5) / 1000, 10, 2),
    "skewnorm": skewnorm.ppf((np.arange(500) + 0.5) / 500, 4, 0, 1),
}

scores = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=12)  # few values, so many ties


# --- Exposure --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", VECTORS["exposure"]["cases"], ids=lambda case: case["name"])
def test_interpolated_exposure_is_the_reference_shifted_to_a_p_value(case):
    """The reference divides by n, we by n + 1; it sorts within a key, we keep the order."""
    references = GENERATED.get(case["name"], case["references"])
    n = len(references)
    for key, secrets in case["secrets"].items():
        ours = exposure_interpolated(sorted(secrets), references)
        np.testing.assert_allclose(ours - math.log2((n + 1) / n), case["interpolated"][key], atol=1e-9)


def test_exposure_keeps_the_order_and_counts_ties_against_itself():
    assert exposure_interpolated([3.5, 0.5], [1, 2, 3, 4]) == pytest.approx([-math.log2(4 / 5), math.log2(5)])
    assert exposure_interpolated([2.0], [1, 2, 2, 3]) == pytest.approx([-math.log2(4 / 5)])
    assert exposure_interpolated([1.0], [1.0, 1.0]) == pytest.approx([0.0])


def test_exact_exposure_runs_from_zero_to_the_whole_space():
    np.testing.assert_allclose(exposure_exact([1, 100, 10_000], 10_000), [4 * math.log2(10), 2 * math.log2(10), 0])


@pytest.mark.parametrize("space", [1, 2, 100, 10_000])
def test_chance_level_is_the_mean_over_a_uniform_rank(space):
    every_rank = exposure_exact(np.arange(1, space + 1), space)

    assert null_mean_exact(space) == pytest.approx(every_rank.mean(), abs=1e-9)
    if space > 1:
        assert null_mean(space - 1) == null_mean_exact(space)
    if str(space) in VECTORS["exposure_chance"]["by_space"]:
        assert null_mean_exact(space) == pytest.approx(VECTORS["exposure_chance"]["by_space"][str(space)], rel=1e-6)


def test_chance_level_tends_to_one_over_ln_two():
    assert null_mean(10**7) == pytest.approx(VECTORS["exposure_chance"]["limit"], abs=2e-6)


def test_exposure_of_canaries_that_nobody_saw_is_at_chance():
    draws = generator(0, "test exposure").normal(size=(4000, 26))
    bits = np.array([exposure_interpolated(row[:1], row[1:])[0] for row in draws])

    assert bits.mean() == pytest.approx(null_mean(25), abs=4 * bits.std() / math.sqrt(bits.size))
    for b in (1, 2, 3):  # 2 ** -exposure is a valid p-value
        assert np.mean(bits >= b) <= 2**-b + 4 * math.sqrt(2**-b / bits.size)


@settings(derandomize=True, deadline=None)
@given(members=scores, references=scores)
def test_exposure_is_bounded_and_sees_only_the_order(members, references):
    bits = exposure_interpolated(members, references)

    assert np.all((bits >= 0) & (bits <= math.log2(len(references) + 1)))
    np.testing.assert_array_equal(bits, exposure_interpolated(np.exp(members), np.exp(references)))


@pytest.mark.parametrize("rank", [[0], [11], [1.5], [math.nan]])
def test_impossible_ranks_are_refused(rank):
    with pytest.raises(ConfigError, match="ranks"):
        exposure_exact(rank, 10)


@pytest.mark.parametrize(("members", "references"), [([1.0], []), ([math.nan], [1.0]), ([1.0], [1.0, math.nan])])
def test_exposure_refuses_nan_and_missing_references(members, references):
    with pytest.raises(ConfigError):
        exposure_interpolated(members, references)


@pytest.mark.parametrize("chance", [null_mean, null_mean_exact])
def test_chance_needs_candidates(chance):
    with pytest.raises(ConfigError, match="1 or more"):
        chance(0)


# --- Extrapolated exposure -------------------------------------------------------------------------------------------

EXTRAPOLATED = [  # tensorflow_privacy secret_sharer/exposures.py at git 03035d5; exactly, under the true distribution
    ("normal", [10.0, 9.0], [1.0, 1.6970179744083653], [1.0, 1.696482066974119]),
    ("normal", [5.0], [7.337898332060212], [7.331268769171912]),
    ("normal", [2.0, 0.5], [14.962346503397093, 19.92919828739662], [14.946467037719302, 19.907130808785173]),
    ("normal", [-20.0], [167.754493083197], [167.5422]),  # the logarithm of F: F itself is 3e-51
    (
        "skewnorm",
        [0.0, -0.1, 0.3],
        [3.685465248183384, 4.502553270400923, 2.0212327277094913],
        [3.6807681238728818, 4.492700856701145, 2.0227386712672804],
    ),
]


@pytest.mark.parametrize(("name", "secrets", "reference", "exact"), EXTRAPOLATED)
def test_extrapolated_exposure_is_the_reference(name, secrets, reference, exact):
    references = GENERATED[name]
    twice = np.tile(references, 2)  # has the same best curve; 500 references are too few

    found = exposure_extrapolated(secrets, twice, 2**200)

    np.testing.assert_allclose(found.exposure, reference, rtol=1e-4)
    np.testing.assert_allclose(found.exposure, exact, rtol=3e-3)
    assert not found.capped.any()
    assert found.ks <= found.ks_limit == 1 / math.sqrt(twice.size)


def space_of_scores(kind, draw):
    """Return the scores of 10,000 secrets: skew-normal, or sums of four digits' log-probabilities."""
    name, parameter = kind
    if name == "skewnorm":
        return skewnorm.rvs(parameter, size=10_000, random_state=draw)
    scores = np.zeros(1)
    for _ in range(4):
        logits = parameter * draw.normal(size=(scores.size, 10))
        scores = (scores[:, None] + np.log(np.exp(logits).sum(axis=1, keepdims=True)) - logits).ravel()
    return scores


@pytest.mark.slow
def test_extrapolation_on_enumerable_spaces_errs_as_stated():
    """Canaries at chance and one to four standard deviations below it."""
    draw, exact, found = generator(0, "test extrapolation"), [], []
    for kind in [("skewnorm", a) for a in (-3, 0, 3)] + [("digits", sd) for sd in (0.5, 1, 2)]:
        for _ in range(6):
            space = space_of_scores(kind, draw)
            canaries = np.concatenate([draw.choice(space, 12) - shift * space.std() for shift in range(5)])
            ranks = np.maximum(1, (space <= canaries[:, None]).sum(axis=1))
            exact.append(exposure_exact(ranks, space.size))
            found.append(exposure_extrapolated(canaries, draw.choice(space, 1000, replace=False), space.size).exposure)
    exact, error = np.concatenate(exact), np.abs(np.concatenate(found) - np.concatenate(exact))

    for low, high, stated in [(0, 3, 0.15), (3, 7, 0.5), (7, 10, 1.4), (10, 13, 2.7)]:
        inside = (low <= exact) & (exact < high)
        assert inside.sum() > 60
        assert np.mean(error[inside] <= stated) >= 0.92
        assert np.mean(error[inside] <= stated / 6) < 0.92  # no looser than it need be


def test_no_exposure_passes_the_space():
    """Far below all references the curve says 60 bits and more."""
    references = GENERATED["normal"]

    found = exposure_extrapolated([-8.0, 10.0, -math.inf, math.inf], references, 10_000)

    assert found.exposure == pytest.approx([math.log2(10_000), 1.0, math.log2(10_000), 0.0])
    assert found.capped.tolist() == [True, False, True, False]
    assert exposure_extrapolated([-8.0], references, 2**200).exposure[0] > 60


@pytest.mark.slow
@pytest.mark.parametrize("shape", [0, -4])
def test_few_true_curves_are_refused(shape):
    draw, refused = generator(0, f"test refusal {shape}"), 0
    for _ in range(40):
        try:
            exposure_extrapolated([], skewnorm.rvs(shape, size=1000, random_state=draw), 10_000)
        except ConfigError:
            refused += 1

    assert refused <= 4  # 1 % or 2 % of 40


@pytest.mark.parametrize("name", ["exponential", "uniform", "standard_cauchy"])
def test_other_curves_are_refused(name):
    with pytest.raises(ConfigError, match="no skew-normal curve fits the 1000 references") as error:
        exposure_extrapolated([0.0], getattr(generator(0, "test refusal"), name)(size=1000), 10_000)

    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("secrets", "references", "space", "message"),
    [
        ([0.0], np.arange(999.0), 10, "1000 or more references, got 999"),
        ([0.0], np.ones(1000), 10, "differ, got 1.0 to 1.0"),
        ([0.0], np.append(GENERATED["normal"], math.inf), 10, "finite"),
        ([0.0], np.append(GENERATED["normal"], math.nan), 10, "references: 1 of 1001 scores are NaN"),
        ([math.nan], GENERATED["normal"], 10, "score: 1 of 1 scores are NaN"),
        ([0.0], GENERATED["normal"], 0, "space should be 1 or more"),
    ],
)
def test_unusable_references_are_refused(secrets, references, space, message):
    with pytest.raises(ConfigError, match=message):
        exposure_extrapolated(secrets, references, space)


# --- AUROC and its null ----------------------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None)
@given(members=scores, others=scores)
def test_auroc_is_the_share_of_ordered_pairs(members, others):
    pairs = [(m < o) + (m == o) / 2 for m in members for o in others]

    assert auroc(members, others) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert auroc(members, others) + auroc(others, members) == pytest.approx(1, abs=1e-12)


@settings(derandomize=True, deadline=None)
@given(members=scores, others=scores)
def test_tied_p_values_are_scipys(members, others):
    if len({*members, *others}) == 1:
        assert p_value(members, others) == 1
    elif len({*members, *others}) < len(members) + len(others):
        expected = mannwhitneyu(np.negative(members), np.negative(others), alternative="greater", method="asymptotic")
        assert p_value(members, others) == pytest.approx(min(1.0, expected.pvalue), abs=1e-9)


@pytest.mark.parametrize(("n_in", "n_out"), [(1, 1), (3, 5), (20, 11), (60, 70)])
def test_exact_p_values_are_scipys(n_in, n_out):
    draw = generator(0, "test p-value", n_in, n_out)
    members, others = draw.normal(size=n_in) - 0.3, draw.normal(size=n_out)

    expected = mannwhitneyu(-members, -others, alternative="greater", method="exact").pvalue

    assert p_value(members, others) == pytest.approx(expected, abs=1e-10)


def test_large_p_values_are_scipys():
    draw = generator(0, "test p-value")
    members, others = draw.normal(size=300) - 0.1, draw.normal(size=200)

    expected = mannwhitneyu(-members, -others, alternative="greater", method="asymptotic").pvalue

    assert p_value(members, others) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("n_in", "n_out", "level"), [(4, 4, 0.95), (5, 3, 0.9), (2, 6, 0.8), (3, 3, 0.95)])
def test_the_band_against_all_orders(n_in, n_out, level):
    """By enumeration: the band holds at least its level, and an end moved in by one step would not."""
    n = n_in + n_out
    areas = np.array([auroc(c, sorted({*range(n)} - {*c})) for c in combinations(range(n), n_in)])
    low, high = null_band(n_in, n_out, level)
    tail, step = (1 - level) / 2, 1 / (n_in * n_out)

    assert np.mean(areas < low) <= tail
    assert np.mean(areas > high) <= tail
    assert np.mean(areas < low + step) > tail
    assert low + high == pytest.approx(1)


def test_few_canaries_cannot_raise_an_alarm():
    assert null_band(3, 3) == (0.0, 1.0)
    assert null_band(1, 1000)[1] > 0.97


def test_the_exact_band_meets_the_normal_one():
    exact, normal = null_band(100, 100), null_band(100, 101)

    assert exact == pytest.approx(normal, abs=2e-3)
    assert null_band(1000, 1000) == pytest.approx((0.4747, 0.5253), abs=1e-4)  # 0.5 -+ 1.96 sqrt(2001 / 12e6)


# --- Calibration on noise and on a leak ------------------------------------------------------------------------------


def noise_audits(draws: int, canaries: int, decimals: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Return (alarms, p-values) of audits of models that leak nothing; cross-entropies are skewed, as in life."""
    draw = generator(0, f"test null calibration {canaries} {decimals}")
    alarms, p_values = np.empty(draws, dtype=bool), np.empty(draws)
    for i in range(draws):
        values = np.round(draw.exponential(size=canaries), decimals)
        included = draw.random(canaries) < 0.5
        members, others = values[included], values[~included]
        low, high = null_band(members.size, others.size)
        alarms[i] = not low <= auroc(members, others) <= high
        p_values[i] = p_value(members, others)
    return alarms, p_values


def false_alarm_bounds(rate: float, draws: int) -> tuple[float, float]:
    error = 4 * math.sqrt(rate * (1 - rate) / draws)
    return rate - error, rate + error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("canaries", "discreteness"),
    [(40, 0.005), (100, 0.002), (300, 0.0)],  # what rounding the band outwards may cost
    ids=["exact, few canaries", "exact", "normal"],
)
def test_noise_raises_false_alarms_at_the_nominal_rate(canaries, discreteness):
    draws = 3000
    alarms, p_values = noise_audits(draws, canaries)

    low, high = false_alarm_bounds(0.05, draws)
    assert low - discreteness <= alarms.mean() <= high
    for level in (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9):  # uniform p-values
        low, high = false_alarm_bounds(level, draws)
        assert low - 2 * discreteness <= np.mean(p_values <= level) <= high


def test_ties_do_not_raise_more_alarms():
    draws = 2000
    alarms, p_values = noise_audits(draws, 60, decimals=0)

    assert alarms.mean() <= false_alarm_bounds(0.05, draws)[1]
    assert np.mean(p_values <= 0.05) <= false_alarm_bounds(0.05, draws)[1]


def test_a_planted_leak_raises_the_alarm():
    caught = []
    for i in range(50):
        draw = generator(i, "test leak")
        included = draw.random(100) < 0.5
        values = draw.normal(size=100) - 1.5 * included
        result = audit_scores("teacher of client 3", True, values, included, seed=i)
        caught.append(result.leaks and result.p_value < 1e-3 and result.exposure_mean > result.exposure_chance + 1)

    assert np.mean(caught) > 0.95


@pytest.mark.slow
def test_the_bootstrap_interval_covers_the_truth():
    truth, draws = norm.cdf(1 / math.sqrt(2)), 150
    draw = generator(0, "test coverage")
    covered = 0
    for i in range(draws):
        low, high = bootstrap_interval(draw.normal(size=50) - 1, draw.normal(size=50), seed=i)
        covered += low <= truth <= high

    assert 0.88 <= covered / draws <= 0.99


def test_perfect_separation_is_not_certainty():
    low, high = bootstrap_interval([0.0, 1.0] * 5, [2.0, 3.0] * 5, seed=0)

    assert (low, high) == (pytest.approx(0.025 ** (1 / 10)), 1.0)
    assert bootstrap_interval([2.0, 3.0] * 5, [0.0, 1.0] * 5, seed=0) == (0.0, pytest.approx(1 - 0.025 ** (1 / 10)))


# --- TPR at FPR ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fpr", "tpr"), [(0.0, 0.5), (0.24, 0.5), (0.25, 0.75), (0.5, 0.75), (0.99, 0.75), (1.0, 1.0)])
def test_tpr_at_fpr(fpr, tpr):
    assert tpr_at_fpr([0.0, 1.0, 2.0, 9.0], [1.5, 3.0, 4.0, 5.0], fpr) == tpr


def test_tpr_does_not_lose_a_non_member_to_rounding():
    others = np.arange(100.0)

    assert tpr_at_fpr([28.5], others, 0.29) == 1.0  # 0.29 * 100 is 28.999999999999996


@settings(derandomize=True, deadline=None)
@given(members=scores, others=scores, fpr=st.floats(0, 1))
def test_tpr_is_the_best_over_all_thresholds(members, others, fpr):
    thresholds = [*others, math.inf]
    allowed = [t for t in thresholds if np.mean(np.less(others, t)) <= fpr + 1e-12]

    assert tpr_at_fpr(members, others, fpr) == max(np.mean(np.less(members, t)) for t in allowed)


# --- audit_scores ----------------------------------------------------------------------------------------------------


def test_an_audit_repeats_and_goes_to_json():
    draw = generator(0, "test audit")
    values, included = draw.normal(size=60), draw.random(60) < 0.5

    result = audit_scores("student", True, values, included, seed=3)

    assert result == audit_scores("student", True, values, included, seed=3)
    assert json.loads(json.dumps(result.to_json(), allow_nan=False)) == result.to_json()
    assert AuditResult(**result.to_json()) == result
    assert result.n_in + result.n_out == 60
    assert result.auroc_low <= result.auroc <= result.auroc_high
    assert (result.null_low, result.null_high) == null_band(result.n_in, result.n_out)
    assert result.exposure_chance == null_mean(result.n_out)


@pytest.mark.parametrize(
    ("values", "included", "message"),
    [
        ([1.0, 2.0], [True, True], "2 and 0"),
        ([1.0, 2.0], [False, False], "0 and 2"),
        ([1.0, math.nan], [True, False], "NaN"),
        ([1.0, 2.0, 3.0], [True, False], "included"),
        ([1.0, 2.0], [1, 0], "bool"),
        ([[1.0], [2.0]], [[True], [False]], "scores"),
    ],
)
def test_unusable_scores_are_refused(values, included, message):
    with pytest.raises(ConfigError, match=message) as error:
        audit_scores("student", True, values, included, seed=0)

    assert "student" in str(error.value)


@pytest.mark.parametrize("statistic", [auroc, p_value, lambda a, b: bootstrap_interval(a, b, 0)])
@pytest.mark.parametrize("sides", [([], [1.0]), ([1.0], []), ([math.nan], [1.0])])
def test_statistics_refuse_empty_sides_and_nan(statistic, sides):
    with pytest.raises(ConfigError):
        statistic(*sides)


@pytest.mark.parametrize("arguments", [(0, 5), (5, 0), (5, 5, 0.0), (5, 5, 1.0)])
def test_impossible_bands_are_refused(arguments):
    with pytest.raises(ConfigError, match="null_band"):
        null_band(*arguments)


def test_impossible_rates_are_refused():
    with pytest.raises(ConfigError, match="fpr"):
        tpr_at_fpr([1.0], [1.0], 1.5)


def test_an_audit_of_200_canaries_is_quick():
    draw = generator(0, "test speed")
    values, included = draw.normal(size=200), np.arange(200) % 2 == 0
    audit_scores("warm", True, values, included, seed=0)
    start = time.process_time()
    audit_scores("student", True, values, included, seed=0)

    assert time.process_time() - start < 0.5


@pytest.mark.parametrize("module", [privacy.audits.exposure, privacy.audits.membership])
def test_examples(module):
    assert doctest.testmod(module).failed == 0
