import doctest
import json
import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import privacy.audits.secrets
from fedkd.errors import ConfigError
from fedkd.seeds import generator
from privacy.audits.exposure import exposure_exact, null_mean_exact
from privacy.audits.secrets import SecretResult, judge, mean_interval, permutation_p_value, reduction

SPACE = 10_000
MOST = math.log2(SPACE)
CHANCE = null_mean_exact(SPACE)


def chance_exposures(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return exposure_exact(rng.integers(1, SPACE + 1, size=shape), SPACE)


def judged(**changes) -> SecretResult:
    arguments = {
        "target": "student", "attack": "as said", "leaves": True, "ranks": [1, 8, 1, 2, 5000, 64],
        "swapped": [500, 4, 64, 16, 9999, 9999], "repetitions": [10, 1, 10, 1, 1, 10],
        "included": [True, True, True, True, False, False], "space": SPACE, "seed": 0,
    }  # fmt: skip
    return judge(**{**arguments, **changes})


# --- judge -----------------------------------------------------------------------------------------------------------


def test_a_result_worked_out_by_hand():
    found = judged(space=8192, swapped=[512, 4, 64, 16, 8000, 8000])  # log2: 13 bits

    assert [(row.repetitions, row.n, row.mean, row.extracted) for row in found.by_repetition] == [
        (1, 2, 11.0, 0),  # ranks 8 and 2
        (10, 2, 13.0, 2),
    ]
    assert (found.n_in, found.n_out) == (4, 2)
    assert found.included_mean == 12.0
    assert found.excluded_mean == pytest.approx((13 - math.log2(5000) + 13 - 6) / 2)
    assert found.swap_mean == (4 + 11 + 7 + 9) / 4  # not the excluded canaries'
    assert found.largest == 13.0
    assert found.threshold == pytest.approx(math.log2(4 / 0.05))
    assert found.chance == null_mean_exact(8192)
    assert found.included_low <= found.included_mean <= found.included_high <= 13
    assert found.swap_low <= found.swap_mean <= found.swap_high


def test_a_result_repeats_and_goes_to_json():
    found = judged()

    assert found == judged()
    assert found != judged(seed=1)
    said = found.to_json()
    assert json.loads(json.dumps(said, allow_nan=False)) == said
    assert said["leaves_client"] is True and said["by_repetition"][1]["extracted"] == 2


def test_without_excluded_canaries_nothing_can_be_compared():
    found = judged(included=[True] * 6)

    assert (found.excluded_mean, found.n_out, found.p_value) == (None, 0, 1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": [0, 8, 1, 2, 5000, 64]}, "from 1 to 10000, got 0"),
        ({"ranks": [1, 8, 1, 2, 10_001, 64]}, "from 1 to 10000, got 10001"),
        ({"swapped": [1, 8, math.nan, 2, 5, 64]}, "got nan"),
        ({"ranks": [1, 2, 3]}, r"\(3,\)"),
        ({"included": [True]}, r"\(1,\)"),
        ({"included": [1, 1, 1, 1, 0, 0]}, "bool"),
        ({"included": [False] * 6}, "none of 6"),
        ({"repetitions": [0, 1, 1, 1, 1, 1]}, "repetitions .* got 0"),
        ({"repetitions": [1, 1, 1, 1, 1, math.nan]}, "repetitions .* got nan"),
    ],
)
def test_bad_input_is_refused_on_one_line(changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        judged(**changes)

    assert "\n" not in str(error.value)


# --- The permutation test --------------------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None, max_examples=20)
@given(ranks=st.lists(st.integers(1, 4), min_size=2, max_size=8), data=st.data())
def test_the_p_value_is_the_share_of_all_choices(ranks, data):
    """By enumeration, with ties; the seeded choices err by less than five standard deviations."""
    bits = exposure_exact(ranks, 4)
    n_in = data.draw(st.integers(1, len(ranks)))
    sums = np.array([bits[list(chosen)].sum() for chosen in combinations(range(len(ranks)), n_in)])
    exact = np.mean(sums >= bits[:n_in].sum() - 1e-9)

    found = permutation_p_value(bits[:n_in], bits[n_in:], generator(0, "test permutation"))

    assert found == pytest.approx(exact, abs=1e-4 + 5 * math.sqrt(exact * (1 - exact) / 9999))


def test_the_smallest_p_value_counts_the_true_choice():
    assert permutation_p_value(np.full(12, 13.0), np.zeros(12), generator(0, "test permutation")) == 1e-4


@pytest.mark.slow
def test_noise_raises_false_alarms_at_the_nominal_rate():
    draws, p_values = 400, []
    for i in range(draws):
        rng = generator(i, "test null")
        bits, coins = chance_exposures(rng, 24), rng.random(24) < 0.5
        p_values.append(permutation_p_value(bits[coins], bits[~coins], rng))

    for level in (0.05, 0.25, 0.5):
        assert np.mean(np.array(p_values) <= level) == pytest.approx(
            level, abs=3 * math.sqrt(level * (1 - level) / draws)
        )


def test_the_largest_of_many_passes_its_threshold_in_at_most_one_run_in_twenty():
    bits = chance_exposures(generator(0, "test largest"), 4000, 24)

    rate = np.mean(bits.max(axis=1) >= judged(
        ranks=[1] * 24, swapped=[1] * 24, repetitions=[1] * 24, included=[True] * 24
    ).threshold)  # fmt: skip

    assert 0.035 < rate < 0.065


def test_memory_is_told_from_knowing_the_digits():
    rng = generator(0, "test swap")
    coins = np.arange(48) % 2 == 0
    known = np.where(coins, rng.integers(1, 50, size=48), rng.integers(1, SPACE + 1, size=48))
    anywhere = rng.integers(1, SPACE + 1, size=48)
    once = np.ones(48)

    memory = judge("model", "as said", False, known, anywhere, once, coins, SPACE, 0)
    digits = judge("model", "as said", False, known, known, once, coins, SPACE, 0)

    assert memory.p_value == digits.p_value == 1e-4
    assert memory.swap_low < CHANCE < memory.swap_high
    assert digits.swap_low > CHANCE + 4
    assert memory.excluded_mean == pytest.approx(CHANCE, abs=4 * 1.44 / math.sqrt(24))


# --- Intervals -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("n", "stated"), [(4, 0.84), (8, 0.90), (24, 0.93)])
def test_the_interval_covers_chance_as_often_as_stated(n, stated):
    draws, rng = 400, generator(n, "test coverage")
    ends = np.array([mean_interval(row, MOST, rng) for row in chance_exposures(rng, draws, n)])

    covered = np.mean((ends[:, 0] <= CHANCE) & (ends[:, 1] >= CHANCE))

    assert covered == pytest.approx(stated, abs=3 * math.sqrt(stated * (1 - stated) / draws))


def test_canaries_that_agree_are_not_certainty():
    share = 0.025 ** (1 / 8)
    rng = generator(0, "test interval")

    assert mean_interval(np.full(8, MOST), MOST, rng) == pytest.approx((share * MOST, MOST))
    assert mean_interval(np.zeros(8), MOST, rng) == pytest.approx((0, (1 - share) * MOST))
    assert mean_interval(np.array([2.0]), 10.0, rng) == pytest.approx((0.05, 9.8))


def test_the_interval_of_many_canaries_is_the_normal_one():
    bits = chance_exposures(generator(0, "test interval"), 400)
    half = 1.96 * bits.std() / 20

    low, high = mean_interval(bits, MOST, generator(1, "test interval"))

    assert (low, high) == pytest.approx((bits.mean() - half, bits.mean() + half), abs=0.03)


# --- reduction -------------------------------------------------------------------------------------------------------


def noisy(mean: float, rng: np.random.Generator) -> list[np.ndarray]:
    return [mean + rng.uniform(-1, 1, size=n) for n in (12, 9, 14)]


def test_a_reduction_worked_out_by_hand():
    found = reduction([[1.0, 2.0, 3.0], [6.0]], [[10.0, 8.0, 12.0], [10.0]], 1.0)

    assert (found.method_mean, found.baseline_mean, found.chance_mean) == (3.0, 10.0, 1.0)
    assert found.raw == pytest.approx(0.7)
    assert found.corrected == pytest.approx(1 - 2 / 9)
    assert (found.seeds, found.canaries) == (2, 4)
    assert found == reduction([[1.0, 2.0, 3.0], [6.0]], [[10.0, 8.0, 12.0], [10.0]], 1.0)


def test_no_method_can_be_80_percent_below_a_weak_baseline():
    at_chance = reduction([[CHANCE] * 5], [[7.1] * 5], CHANCE)

    assert at_chance.raw < 0.8
    assert at_chance.corrected == pytest.approx(1)
    assert reduction([[CHANCE] * 5], [[7.3] * 5], CHANCE).raw > 0.8


def test_the_twin_takes_the_place_of_chance():
    """(student - twin) / (teacher - twin) is what is left."""
    student, teacher, twin = [[3.0, 5.0]], [[9.0, 13.0]], [[1.0, 2.0]]

    found = reduction(student, teacher, twin)

    assert 1 - found.corrected == pytest.approx((4 - 1.5) / (11 - 1.5))
    assert found.chance_mean == 1.5
    assert found.raw == reduction(student, teacher, 1.44).raw


def test_the_same_draw_is_used_for_method_and_baseline():
    baseline = noisy(8, generator(0, "test paired"))
    found = reduction([bits / 4 for bits in baseline], baseline, CHANCE)

    assert (found.raw_low, found.raw, found.raw_high) == pytest.approx((0.75, 0.75, 0.75))


def test_seeds_that_differ_widen_the_interval():
    baseline = [np.full(10, 10.0)] * 4
    alike = reduction([np.tile([1.0, 3.0], 5)] * 4, baseline, CHANCE)
    unlike = reduction([np.full(10, bits) for bits in (1.0, 3.0, 1.0, 3.0)], baseline, CHANCE)

    assert alike.raw == unlike.raw == pytest.approx(0.8)
    assert unlike.raw_high - unlike.raw_low > 2 * (alike.raw_high - alike.raw_low)
    assert (unlike.raw_low, unlike.raw_high) == pytest.approx((0.7, 0.9))  # all seeds the same: 2 of 256 draws


@pytest.mark.parametrize("mean", [1.0, CHANCE, 1.5])
def test_a_baseline_not_above_chance_has_no_corrected_reduction(mean):
    found = reduction([[1.2] * 12] * 3, [np.tile([mean - 0.9, mean + 0.9], 6)] * 3, CHANCE)

    assert found.raw == pytest.approx(1 - 1.2 / mean)
    assert (found.corrected, found.corrected_low, found.corrected_high) == (None, None, None)
    assert json.loads(json.dumps(found.to_json(), allow_nan=False)) == found.to_json()


def test_a_constant_baseline_at_chance_is_not_divided_by_rounding():
    found = reduction([[0.3] * 7], [[CHANCE] * 7], CHANCE)

    assert found.corrected is None
    assert reduction([[0.0] * 3], [[0.0] * 3], CHANCE).raw is None


def test_a_baseline_that_some_resamples_put_below_chance_has_a_wide_but_finite_interval():
    """Of the 3125 draws of five seeds 32 are of the two at zero alone: below chance. Of the 240 with one seed of 12
    bits, 30 have a larger mean of the method than 2.2 and 55 have 2.2; 2.5 % are 78."""
    baseline = [[bits] * 3 for bits in (0.0, 0.0, 12.0, 12.0, 12.0)]
    found = reduction([[bits] * 3 for bits in (1.0, 2.0, 3.0, 4.0, 5.0)], baseline, CHANCE)

    assert found.corrected == pytest.approx(1 - (3 - CHANCE) / (7.2 - CHANCE))
    assert found.corrected_low == pytest.approx(1 - (2.2 - CHANCE) / (2.4 - CHANCE))
    assert found.corrected < found.corrected_high < 1.1


@pytest.mark.slow
@pytest.mark.parametrize(("m", "spread", "stated"), [(12, 0.0, 0.97), (24, 0.15, 0.88)])
def test_the_reductions_interval_covers_the_truth_as_often_as_stated(m, spread, stated):
    """A share of canaries is memorised (4 bits to all), the rest at chance; the share varies between seeds."""
    draws, rng = 60, generator(m, "test reduction")

    def seeds(share: float, count: int, m: int) -> list[np.ndarray]:
        shares = np.clip(share + spread * rng.normal(size=count), 0, 1)[:, None]
        known = rng.random((count, m)) < shares
        return list(np.where(known, rng.uniform(4, MOST, size=(count, m)), chance_exposures(rng, count, m)))

    kept, known = (float(np.mean(seeds(share, 4000, 50))) for share in (0.2, 0.6))
    truth = 1 - (kept - CHANCE) / (known - CHANCE)
    found = [reduction(seeds(0.2, 5, m), seeds(0.6, 5, m), CHANCE, seed=i) for i in range(draws)]

    covered = np.mean([one.corrected_low <= truth <= one.corrected_high for one in found])
    assert covered == pytest.approx(stated, abs=3 * math.sqrt(stated * (1 - stated) / draws))


@pytest.mark.parametrize(
    ("method", "baseline", "chance", "message"),
    [
        ([], [], 1.0, "got 0, 0 and 0"),
        ([[1.0]], [[1.0], [2.0]], 1.0, "got 1, 2 and 2"),
        ([[1.0]], [[2.0]], [[1.0], [1.0]], "got 1, 1 and 2"),
        ([[1.0]], [[2.0, 3.0]], 1.0, r"seed 0: .*\(1,\), \(2,\)"),
        ([[1.0], []], [[1.0], []], 1.0, "seed 1: .*at least one"),
        ([[[1.0]]], [[[1.0]]], 1.0, r"\(1, 1\)"),
        ([[math.nan]], [[2.0]], 1.0, "got nan"),
        ([[1.0]], [[math.inf]], 1.0, "got inf"),
        ([[1.0]], [[2.0]], [[-0.1]], "got -0.1"),
        ([[1.0]], [[2.0]], math.nan, "got nan"),
    ],
)
def test_unusable_exposures_are_refused_on_one_line(method, baseline, chance, message):
    with pytest.raises(ConfigError, match=message) as error:
        reduction(method, baseline, chance)

    assert "\n" not in str(error.value)


def test_examples():
    assert doctest.testmod(privacy.audits.secrets).failed == 0
