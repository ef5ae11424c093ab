"""Canary clients: honest noise passes at the nominal rate, and every way of adding too little is seen."""

import doctest
import json
import math
import time
from itertools import count

import numpy as np
import pytest
import torch
from scipy import stats

import privacy.audits.message_canaries
from fedkd.errors import ConfigError, PrivacyError
from fedkd.knowledge import Knowledge
from privacy.audits.canary_clients import plant
from privacy.audits.message_canaries import audit_messages
from privacy.audits.one_run import gaussian_epsilon
from privacy.gaussian import GaussianRows, GaussianUpdate
from privacy.mechanism import NOTHING

ROWS, K, CLIP, COHORT = 20, 5, 2.0, 8
SIDES = [("client", "replace"), ("server", "replace"), ("server", "add_remove")]
SERVER = SIDES[1:]
ZEROS = Knowledge({"logits": torch.zeros(ROWS, K)})
WEIGHTS = Knowledge({"w": torch.linspace(-3, 3, 90).reshape(9, 10), "b": torch.full((10,), 7.0)})


def rows(trust="client", relation="replace", cls=GaussianRows, sigma=5.0, **changes):
    values = {"clip": CLIP, "rows": ROWS, "cohort": COHORT, "noise_multiplier": sigma, **changes}
    return cls(trust=trust, relation=relation, **values)


def update(trust="client", relation="replace", cls=GaussianUpdate, sigma=5.0):
    return cls(clip=CLIP, cohort=COHORT, noise_multiplier=sigma, trust=trust, relation=relation)


def audited(mechanism, seed=0, rounds=10, m=50, neutral=ZEROS, **kwargs):
    return audit_messages("message", mechanism, neutral, rounds, np.random.default_rng(seed), m=m, **kwargs)


def audited_update(mechanism, seed=0, rounds=10, m=50):
    return audited(mechanism, seed, rounds, m, WEIGHTS, down=WEIGHTS)


# --- Broken mechanisms -----------------------------------------------------------------------------------------------


class HalfNoise(GaussianRows):
    def _noised(self, tensors, scale, rng):
        return super()._noised(tensors, scale / 2, rng)


class NoNoise(GaussianRows):
    def _noised(self, tensors, scale, rng):
        return dict(tensors)


class NoClip(GaussianRows):
    def bound(self, raw, down=NOTHING):
        return raw


class NoiseOfTheMeanOverTheCohort(GaussianRows):
    @property
    def _mean_std(self):
        return super()._mean_std / self.cohort


class SumForMean(GaussianRows):
    def noisy_mean(self, bounded, rng, down=NOTHING):
        total = torch.stack([one.tensors["logits"] for one in bounded]).sum(0)
        return Knowledge(self._noised({"logits": total}, self._mean_std, rng))


class OneDrawForAll(GaussianRows):
    def _noised(self, tensors, std, rng):
        return {name: value + std * float(rng.standard_normal()) for name, value in tensors.items()}


class LaplaceNoise(GaussianRows):
    def _noised(self, tensors, scale, rng):
        std = self.noise_multiplier * self.sensitivity * scale
        return {
            name: value + torch.from_numpy(rng.laplace(0, std / math.sqrt(2), value.shape)).float()
            for name, value in tensors.items()
        }


class ClipByTensor(GaussianUpdate):
    def bound(self, raw, down=NOTHING):
        parts = {name: value - down.tensors[name] for name, value in raw.tensors.items()}
        return Knowledge(
            {n: down.tensors[n] + p * min(1.0, self.clip / max(1e-12, float(p.norm()))) for n, p in parts.items()}
        )


class NoNoiseOnBias(GaussianUpdate):
    def _noised(self, tensors, scale, rng):
        return {**super()._noised(tensors, scale, rng), "b": tensors["b"]}


class LittleNoiseOnBias(GaussianUpdate):
    def _noised(self, tensors, scale, rng):
        return {**super()._noised(tensors, scale, rng), **super()._noised({"b": tensors["b"]}, scale / 6, rng)}


class OwnNoise(GaussianRows):
    """As claimed, but from a source of its own, as a deployment's."""

    SOURCE = np.random.default_rng(3)

    def _noised(self, tensors, scale, rng):
        return super()._noised(tensors, scale, self.SOURCE)


# --- Golden ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("trust", "relation"), SIDES)
@pytest.mark.parametrize("kind", ["rows", "update"])
def test_an_honest_mechanism_is_measured_as_the_analytic_gaussian(kind, trust, relation):
    honest = rows(trust, relation) if kind == "rows" else update(trust, relation)
    found = (audited if kind == "rows" else audited_update)(honest, rounds=50)
    bound = CLIP * math.sqrt(ROWS) if kind == "rows" else CLIP
    moves, share = bound * (2 if relation == "replace" else 1), 1 if trust == "client" else 1 / COHORT
    assert found.claimed == pytest.approx(math.sqrt(50) / 5)
    assert found.outcome == "as claimed" and found.mu_low <= found.claimed <= found.mu_high
    assert found.mu == pytest.approx(found.claimed, rel=0.04)
    assert found.moved == pytest.approx(moves, rel=1e-5) and found.sensitivity == pytest.approx(moves)
    assert found.signal == pytest.approx(moves * share, rel=1e-4)
    assert found.noise == pytest.approx(5 * moves * share, rel=0.04)
    assert found.mu == pytest.approx(math.sqrt(50) * found.signal / found.noise)


def test_the_epsilon_is_the_analytic_one_of_50_releases_at_noise_5():
    found = audited(rows(), rounds=50)
    assert gaussian_epsilon(found.claimed, 1e-5) == pytest.approx(6.57297, abs=1e-5)  # privacy vectors, setting F
    assert found.epsilon == gaussian_epsilon(found.mu_low, 1e-5)
    assert found.epsilon == pytest.approx(6.573, rel=0.02) and found.epsilon < 6.6


@pytest.mark.parametrize(("trust", "pairs"), [("client", 50 * 5), ("server", 100)])
def test_bounds_on_mu_are_chi_square_quantiles_where_the_signal_is_exact(trust, pairs):
    found = audited(rows(trust))  # 10 releases of each of 50 canaries; 200 of the mean, for 10,000 values of noise
    dof = pairs * ROWS * K
    for bound, tail in [(found.mu_low, 0.025), (found.mu_high, 0.975)]:
        assert bound / found.mu == pytest.approx(math.sqrt(stats.chi2.ppf(tail, dof) / dof), rel=1e-4)


def test_other_clients_in_the_mean_change_nothing_but_the_scores():
    honest, rng = rows("server", "add_remove"), torch.Generator().manual_seed(1)
    others = [honest.bound(Knowledge({"logits": 9 * torch.randn(ROWS, K, generator=rng)})) for _ in range(4)]
    found, alone = audited(honest, background=others), audited(honest)
    assert found.signal == pytest.approx(alone.signal, rel=1e-4) and found.noise == pytest.approx(alone.noise, rel=1e-4)
    assert found.outcome == "as claimed"


def test_a_mean_that_nobody_takes_part_in_is_of_a_client_with_nothing_to_say():
    canaries = plant(rows("server", "add_remove", sigma=0.0), ZEROS, 2, np.random.default_rng(0))
    canaries.coins[:] = False
    assert not canaries.release(0, False, np.random.default_rng(0)).any()
    assert canaries.release(0, True, np.random.default_rng(0)).any()


# --- Controls --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("trust", "relation"), SIDES)
@pytest.mark.parametrize(("cls", "factor"), [(HalfNoise, 2), (NoClip, 1000)])
def test_too_little_noise_for_what_passes_is_a_contradiction_wherever_trust_ends(cls, factor, trust, relation):
    found = audited(rows(trust, relation, cls))
    assert found.outcome == "contradicted" and found.mu == pytest.approx(factor * found.claimed, rel=0.04)
    assert found.epsilon > gaussian_epsilon(found.claimed, 1e-5)
    assert ("1000 times as far as claimed" in str(found)) is (cls is NoClip)


@pytest.mark.parametrize(("trust", "relation"), SERVER)
@pytest.mark.parametrize("cls", [NoiseOfTheMeanOverTheCohort, SumForMean])
def test_a_cohort_too_many_or_too_few_is_a_contradiction(cls, trust, relation):
    found = audited(rows(trust, relation, cls))
    assert found.outcome == "contradicted" and found.mu == pytest.approx(COHORT * found.claimed, rel=0.04)


@pytest.mark.parametrize(("trust", "relation"), SIDES)
def test_no_noise_is_a_contradiction_and_hides_nothing(trust, relation):
    found = audited(rows(trust, relation, NoNoise), m=100)
    assert found.outcome == "contradicted" and found.epsilon == found.mu_low == math.inf and found.noise == 0
    assert found.normality is None and found.caveat == "no noise hides the canaries"
    assert trust == "server" or found.one_run.correct == found.one_run.guesses


@pytest.mark.parametrize(("trust", "relation"), SIDES)
def test_a_tensor_with_too_little_noise_is_not_hidden_by_the_others(trust, relation):
    bare, thin = (audited_update(update(trust, relation, cls)) for cls in (NoNoiseOnBias, LittleNoiseOnBias))
    assert bare.outcome == thin.outcome == "contradicted"
    assert bare.mu == math.inf
    assert thin.mu == pytest.approx(thin.claimed * math.sqrt(0.9 + 0.1 * 36), rel=0.1)  # a tenth of the numbers


def test_a_clip_by_tensor_lets_more_through_than_one_over_all():
    found = audited_update(update(cls=ClipByTensor))
    assert found.outcome == "contradicted" and found.moved == pytest.approx(math.sqrt(2) * 2 * CLIP, rel=1e-4)


@pytest.mark.parametrize(("trust", "relation"), SIDES)
@pytest.mark.parametrize("cls", [OneDrawForAll, LaplaceNoise])
def test_noise_of_another_law_gives_no_epsilon(cls, trust, relation):
    found = audited(rows(trust, relation, cls))
    assert found.outcome == "not Gaussian" and found.epsilon is None and found.normality < 1e-3
    assert "no epsilon (the noise is not independent Gaussian" in str(found)


def test_more_noise_than_claimed_is_said_to_be():
    class Generous(GaussianRows):
        def _noised(self, tensors, scale, rng):
            return super()._noised(tensors, 1.1 * scale, rng)

    found = audited(rows(cls=Generous))
    assert found.outcome == "more noise than claimed"
    assert found.mu_high < found.claimed < 1.2 * found.mu


def test_noise_from_a_source_of_its_own_widens_the_bounds_instead_of_raising_an_alarm():
    found = [audited(rows("server", "add_remove", OwnNoise), seed, m=20) for seed in range(25)]
    assert sum(one.mu_low > one.claimed for one in found) <= 2
    assert np.mean([one.mu_high for one in found]) > 2 * found[0].claimed
    assert audited(rows("server", "add_remove", OwnNoise, sigma=0.05)).mu_low > 10  # a leak that large is still seen


# --- Null ------------------------------------------------------------------------------------------------------------


def test_honest_mechanisms_raise_false_alarms_at_most_at_the_nominal_rate():
    many, large = Knowledge({"logits": torch.zeros(200, K)}), {"w": torch.full((30, 30), 3.0), "b": torch.zeros(100)}
    down, seeds, found = Knowledge(large), count(), []
    for _ in range(45):
        for trust, relation in SIDES:
            honest = rows(trust, relation, sigma=9.0, rows=200)
            found.append(audited(honest, next(seeds), rounds=3, m=20, neutral=many))
            honest = update(trust, relation, sigma=9.0)
            found.append(audited(honest, next(seeds), rounds=3, m=20, neutral=down, down=down))
    outcomes = [one.outcome for one in found]
    assert len(found) == 270
    assert outcomes.count("contradicted") <= 0.055 * len(found)
    assert outcomes.count("more noise than claimed") <= 0.055 * len(found)
    assert outcomes.count("not Gaussian") <= 2  # at 0.1 %
    assert np.mean([one.mu_low <= one.claimed <= one.mu_high for one in found]) >= 0.9
    truth = gaussian_epsilon(math.sqrt(3) / 9, 1e-5)
    assert np.mean([one.one_run.epsilon > truth for one in found]) <= 0.055
    assert 0.3 < np.mean([one.normality < 0.5 for one in found]) < 0.6


def test_one_run_learns_from_the_scores_what_little_noise_leaves():
    found = audited(rows(sigma=0.3), m=100)
    assert found.one_run.epsilon == pytest.approx(1.82, abs=0.01)  # all that 20 right guesses of 20 can show
    assert found.one_run.caveat is None and found.outcome == "as claimed"
    assert found.one_run.epsilon < found.epsilon


# --- Form ------------------------------------------------------------------------------------------------------------


def test_a_result_is_one_sentence_and_json():
    found = audited(rows())
    assert str(found).startswith("message: mu 0.63") and str(found).endswith(
        "canary clients (each bound at 95%, delta 1e-05)."
    )
    assert "0.632 claimed: as claimed; epsilon at least 2.5" in str(found) and "\n" not in str(found)
    value = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert value["outcome"] == "as claimed" and value["epsilon"] == found.epsilon and value["one_run"]["m"] == 50
    assert value["sentence"] == str(found) and value["caveat"].startswith("assuming Gaussian noise")
    open_ = json.loads(json.dumps(audited(rows(cls=NoNoise)).to_json(), allow_nan=False))
    assert open_["mu"] is None and open_["epsilon"] is None and open_["caveat"] == "no noise hides the canaries"


def test_the_same_seed_gives_the_same_result():
    assert audited(rows("server"), 5) == audited(rows("server"), 5) != audited(rows("server"), 6)


def test_a_claim_of_nothing_cannot_be_contradicted():
    found = audited(rows(sigma=0.0))
    assert found.claimed == found.mu_low == math.inf and found.outcome == "as claimed"
    assert audited(rows(), confidence=0.99).mu_low < audited(rows()).mu_low


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rounds": 0}, "rounds should be 1 or more"),
        ({"rounds": 2.5}, "rounds should be a whole number"),
        ({"m": 1}, "m should be 2 or more"),
        ({"confidence": 1.0}, "confidence should be in"),
        ({"mechanism": rows("client", "add_remove")}, "expected relation 'replace', got 'add_remove'"),
        ({"mechanism": rows(clip=0.0)}, "a bound of 0 lets no canary through"),
        ({"neutral": Knowledge({"logits": torch.full((ROWS, K), 9.0)})}, "should leave the neutral message as it is"),
        ({"neutral": Knowledge({"logits": torch.full((ROWS, K), torch.nan)})}, "finite floats, got logits"),
        ({"neutral": Knowledge({"logits": torch.zeros(ROWS, K, dtype=torch.int64)})}, "finite floats, got logits"),
        ({"neutral": Knowledge({})}, "finite floats, got nothing"),
    ],
)
def test_bad_input(changes, said):
    with pytest.raises(ConfigError, match=said):
        audited(**{"mechanism": rows(), **changes})


def test_an_update_of_what_did_not_come_down_is_refused_by_the_mechanism():
    with pytest.raises(PrivacyError, match="parameters that came down"):
        audited(update(), neutral=WEIGHTS)


def test_large_messages_take_seconds():
    down = Knowledge({"w": torch.zeros(490, 100), "b": torch.zeros(1000)})
    start = time.process_time()
    found = audited(update("server", "add_remove"), m=100, neutral=down, down=down)
    assert found.outcome == "as claimed" and time.process_time() - start < 10


def test_the_examples_in_the_docstrings_run():
    result = doctest.testmod(privacy.audits.message_canaries)
    assert result.attempted and not result.failed
