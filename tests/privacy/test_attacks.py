import doctest
import json
import math

import numpy as np
import pytest
from scipy.special import expit, log_expit
from scipy.stats import binom, norm

import privacy.audits.lira
import privacy.audits.rmia
from fedkd.errors import ConfigError
from fedkd.seeds import generator
from privacy.audits.lira import audit_attack, lira_offline, lira_online, log_odds
from privacy.audits.membership import auroc, null_band, tpr_at_fpr
from privacy.audits.one_run import one_run_bound
from privacy.audits.rmia import rmia

M, SHADOWS, POPULATION = 100, 16, 200


def log_odds_of_models(draw: np.random.Generator, hard: np.ndarray, seen: np.ndarray, effect: float) -> np.ndarray:
    """Log-odds (models, m): some canaries are harder than others, and having seen one helps by ``effect``."""
    return hard + effect * seen + draw.normal(size=seen.shape)


def attack_scores(draw: np.random.Generator, effect: float) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Scores of each attack on one target, and the target's coins; the shadow models' coins are their own."""
    hard, hard_z = 3 * draw.normal(size=M), 3 * draw.normal(size=POPULATION)
    coins = draw.random(M) < 0.5
    seen = np.concatenate([draw.random((SHADOWS, M)) < 0.5, [[True] * M, [False] * M] * 2])
    phi = log_odds_of_models(draw, hard, coins, effect)
    shadows = log_odds_of_models(draw, hard, seen, effect)
    reference = log_odds_of_models(draw, hard, np.zeros((1, M)), effect)
    phi_z, reference_z = (log_odds_of_models(draw, hard_z, np.zeros((1, POPULATION)), effect) for _ in range(2))
    return {
        "loss": -log_expit(phi),
        "LiRA": lira_online(phi, shadows, seen),
        "LiRA, own variance": lira_online(phi, shadows, seen, own_variance=True),
        "LiRA, offline": lira_offline(phi, shadows, seen),
        "RMIA": rmia(log_expit(phi), log_expit(reference), log_expit(phi_z[0]), log_expit(reference_z)),
    }, coins


# --- Calibration -----------------------------------------------------------------------------------------------------


def test_null_runs_raise_few_alarms():
    """By the AUROC's band (nominal 2.5 %) and by the one-run bound (5 %), for every attack."""
    draw, draws = generator(0, "test attacks null"), 200
    leaks, certified = {}, {}
    for _ in range(draws):
        found, coins = attack_scores(draw, effect=0.0)
        high = null_band(int(coins.sum()), int((~coins).sum()))[1]
        for name, scores in found.items():
            leaks[name] = leaks.get(name, 0) + (auroc(scores[coins], scores[~coins]) > high)
            bound = one_run_bound(scores, coins, 1e-5, fair_coins=True)
            certified[name] = certified.get(name, 0) + (bound.epsilon > 0)

    assert max(leaks.values()) <= binom.ppf(0.999, draws, 0.025)
    assert max(certified.values()) <= binom.ppf(0.999, draws, 0.05)


def test_a_leak_raises_the_alarm_where_the_loss_alone_does_not():
    draw, draws, areas, leaks = generator(0, "test attacks leak"), 20, {}, {}
    for seed in range(draws):
        found, coins = attack_scores(draw, effect=1.5)
        for name, scores in found.items():
            result = audit_attack(name, "student", True, scores, coins, seed)
            areas.setdefault(name, []).append(result.audit.auroc)
            leaks[name] = leaks.get(name, 0) + result.leaks

    means = {name: float(np.mean(area)) for name, area in areas.items()}
    assert min(leaks[name] for name in means if name != "loss") >= 0.9 * draws
    assert means["loss"] < 0.65
    assert means["LiRA"] == pytest.approx(norm.cdf(1.5 / math.sqrt(2)), abs=0.04)  # what hardness known would give
    assert min(means[name] for name in means if name != "loss") > means["loss"] + 0.05


# --- LiRA ------------------------------------------------------------------------------------------------------------


def reference_case() -> tuple[list[float], np.ndarray, np.ndarray]:
    """The construction of the reference: 16 shadow models that saw each of 4 canaries, and 16 that did not."""
    rng = np.random.RandomState(0)
    inside = [rng.randn(16) * 0.8 + 3 for _ in range(4)]
    outside = [rng.randn(16) + 1 for _ in range(4)]
    shadows = np.concatenate([inside, outside], axis=1).T
    return [3.1, 2.0, 1.0, 0.2], shadows, np.repeat([[True] * 4, [False] * 4], 16, axis=0)


REFERENCE = [-4.8007566892048725, 0.6637004080540845, 1.3684903599120395, 10.236646586436471]
REFERENCE_FIXED = [-2.840766498513574, 0.8650016631178417, 1.8807771423347457, 4.1070508928584015]
REFERENCE_OUT = [-5.366216852167596, -0.9832085622696356, -1.2493552956123872, -1.6168867565074891]


def test_online_scores_are_the_references():
    """TensorFlow Privacy, git 03035d5, compute_score_lira, whose small scores are members, too."""
    phi, shadows, seen = reference_case()

    np.testing.assert_allclose(lira_online(phi, shadows, seen, own_variance=True), REFERENCE, atol=1e-9)
    np.testing.assert_allclose(lira_online(phi, shadows, seen, own_variance=False), REFERENCE_FIXED, atol=1e-9)


def test_variance_is_shared_below_64_shadow_models():
    phi, shadows, seen = reference_case()

    np.testing.assert_allclose(lira_online(phi, shadows, seen), REFERENCE_FIXED, atol=1e-9)
    twice, saw_twice = np.concatenate([shadows, shadows]), np.concatenate([seen, seen])
    np.testing.assert_allclose(lira_online(phi, twice, saw_twice), REFERENCE, atol=1e-9)
    assert (lira_offline(phi, twice, saw_twice) == lira_offline(phi, shadows, seen, own_variance=True)).all()


def test_offline_scores_are_the_tail_beyond_the_target():
    phi, shadows, seen = reference_case()
    out = shadows[16:]
    z = (phi - np.median(out, axis=0)) / out.std(axis=0)
    np.testing.assert_allclose(norm.logpdf(z) - np.log(out.std(axis=0)), REFERENCE_OUT, atol=1e-9)

    np.testing.assert_allclose(lira_offline(phi, shadows, seen, True), norm.logsf(z), atol=1e-9)
    np.testing.assert_allclose(lira_offline(phi, out, own_variance=True), norm.logsf(z), atol=1e-9)
    assert np.isfinite(lira_offline([1e4] * 4, out)).all()  # a probability would be 0, and tie


def test_the_variance_of_the_excluded_is_their_own():
    """The authors' code takes that of the included for both, and pools the canaries' own levels in."""
    draw = generator(0, "test lira variance")
    level = 10 * draw.normal(size=50)
    seen = np.arange(40)[:, None] % 2 == np.zeros(50)
    shadows = np.where(seen, 0.1 * draw.normal(size=(40, 50)) + 2, draw.normal(size=(40, 50))) + level

    scores = lira_online(level + 1, shadows, seen)

    # 1 is 10 deviations below the included, and one above the excluded: excluded for certain.
    assert scores == pytest.approx(50 - 0.5 - math.log(10), abs=25)
    assert scores.min() > 0


def test_log_odds_do_not_saturate():
    logits = np.array([[2.0, 1.0, -1.0], [0.0, 0.0, 0.0], [800.0, 0.0, -5.0], [-900.0, 0.0, 0.0]])
    labels = [0, 2, 0, 0]

    found = log_odds(logits, labels)

    p = np.exp(logits[0]) / np.exp(logits[0]).sum()
    assert found[0] == pytest.approx(math.log(p[0]) - math.log(p[1] + p[2]))
    assert found[1:] == pytest.approx([-math.log(2), 800 - math.log1p(math.exp(-5)), -900 - math.log(2)])
    assert log_odds(np.log([[0.7, 0.2, 0.1]]), [0]) == pytest.approx([0.8472978603872034])


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        ([1.0, 2.0], [0, 1], r"\(2,\)"),
        ([[1.0]], [0], r"\(1, 1\)"),
        ([[1.0, 2.0]], [0, 1], r"\(2,\)"),
        ([[1.0, 2.0]], [0.0], "float64"),
        ([[1.0, math.inf]], [0], "1 of 2 logits"),
        ([[1.0, 2.0]], [2], "0 to 1, got 2"),
        ([[1.0, 2.0]], [-1], "got -1"),
    ],
)
def test_unusable_logits_are_refused(logits, labels, message):
    with pytest.raises(ConfigError, match=message):
        log_odds(logits, labels)


@pytest.mark.parametrize(
    ("phi", "shadows", "seen", "message"),
    [
        ([0.0], [[0.0, 1.0]], [[True, False]], r"\(1,\) and \(1, 2\)"),
        ([0.0], np.zeros((0, 1)), np.zeros((0, 1), bool), "at least 1"),
        ([0.0], [[0.0]], [[1]], "bool"),
        ([0.0], [[math.nan], [1.0]], [[True], [False]], "1 of 3"),
        ([0.0, 0.0], [[0.0, 1.0], [1.0, 2.0]], [[True, False], [True, False]], "did not see 1 of 2 canaries, first 0"),
        ([0.0], [[0.0], [1.0]], [[False], [False]], "saw 1 of 1 canaries"),
        ([0.0], [[0.0], [1.0]], [[True], [False]], "agree"),
    ],
)
def test_unusable_shadow_models_are_refused(phi, shadows, seen, message):
    with pytest.raises(ConfigError, match=message) as error:
        lira_online(phi, shadows, seen)

    assert "\n" not in str(error.value)


# --- RMIA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("a", "gamma"), [(0.3, 1.0), (0.0, 1.0), (1.0, 2.0), (0.5, 0.7)])
@pytest.mark.parametrize("models", [1, 2])
def test_rmia_by_the_definition(models, a, gamma):
    draw = generator(0, "test rmia", models)
    p_x, p_z = draw.random(20), draw.random(30)
    out_x, out_z = draw.random((models, 20)), draw.random((models, 30))
    ratio_x = p_x / (((1 + a) * out_x.mean(axis=0) + 1 - a) / 2)
    ratio_z = p_z / (((1 + a) * out_z.mean(axis=0) + 1 - a) / 2)

    found = rmia(np.log(p_x), np.log(out_x), np.log(p_z), np.log(out_z), a=a, gamma=gamma)

    assert found == pytest.approx([1 - np.mean(one / ratio_z > gamma) for one in ratio_x])


def test_rmia_uses_no_reference_model_that_saw_the_canary():
    x, z = np.log([0.9, 0.8]), np.log([0.3, 0.5, 0.7])
    references = np.log([[0.6, 0.1], [0.2, 0.5]])

    found = rmia(x, references, z, [z, z], included=[[True, False], [False, True]])

    np.testing.assert_array_equal(found, rmia(x, np.log([[0.2, 0.1]]), z, [z]))


def test_rmia_survives_probabilities_too_small_to_write():
    found = rmia([-2000.0, -1500.0], [[-1500.0, -2000.0]], [-1700.0], [[-1700.0]], a=1.0)

    assert found.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": [0.5]}, "canaries: log-probabilities should be finite and at most 0, got 0.5"),
        ({"target": [math.nan]}, "nan"),
        ({"references": [[-math.inf]]}, "-inf"),
        ({"references": [-1.0]}, r"\(1,\) and \(1,\)"),
        ({"references": np.zeros((0, 1))}, "at least 1"),
        ({"target_population": [-1.0, -1.0]}, "population"),
        ({"target_population": [], "references_population": np.zeros((1, 0))}, "should fit"),
        ({"references_population": [[-1.0], [-1.0]]}, "should fit"),
        ({"included": [True]}, "should fit"),
        ({"included": [[True]]}, "saw 1 of 1 canaries, first 0"),
        ({"a": 1.5}, "a should be"),
        ({"gamma": 0.0}, "gamma"),
    ],
)
def test_unusable_references_are_refused(change, message):
    usable = {
        "target": [-1.0],
        "references": [[-1.0]],
        "target_population": [-1.0],
        "references_population": [[-1.0]],
    }
    with pytest.raises(ConfigError, match=message) as error:
        rmia(**{**usable, **change})

    assert "\n" not in str(error.value)


# --- The report ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_out", [999, 1000])
def test_a_thousandth_needs_a_thousand_canaries(n_out):
    draw = generator(0, "test attack report")
    scores, coins = draw.normal(size=n_out + 50), np.arange(n_out + 50) < 50
    scores[coins] -= 3

    found = audit_attack("LiRA", "student", True, scores, coins, seed=0)

    assert found.leaks
    assert found.tpr_at_1_percent == tpr_at_fpr(scores[coins], scores[~coins], 0.01) > 0.3
    expected = None if n_out < 1000 else tpr_at_fpr(scores[coins], scores[~coins], 0.001)
    assert found.tpr_at_01_percent == expected
    saved = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert saved["audit"] == found.audit.to_json()
    assert (saved["attack"], saved["tpr_at_01_percent"]) == ("LiRA", expected)


def test_the_attacks_agree_on_who_is_low():
    """Two canaries alike but for what the target learnt of the first."""
    shadows, seen = (
        np.array([[2.0, 2.1], [2.2, 1.9], [0.1, 0.2], [-0.1, -0.2]]),
        np.array([[True] * 2] * 2 + [[False] * 2] * 2),
    )
    phi, population = np.array([2.0, 0.0]), np.linspace(-1, 1, 9)

    online, offline = lira_online(phi, shadows, seen), lira_offline(phi, shadows, seen)
    pairwise = rmia(log_expit(phi), log_expit(shadows[2:]), log_expit(population), log_expit([population, population]))

    assert [scores[0] < scores[1] for scores in (online, offline, pairwise)] == [True] * 3
    assert expit(phi[0]) > expit(phi[1])


@pytest.mark.parametrize("module", [privacy.audits.lira, privacy.audits.rmia])
def test_examples(module):
    assert doctest.testmod(module).failed == 0
