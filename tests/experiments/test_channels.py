"""Audits of channels: canary clients, class means, differences of aggregates, and inverted features."""

import pytest
import torch

from experiments import channels
from experiments.audit import DIFFERENCE, MESSAGE, Auditor, class_means
from experiments.channels import canary_clients
from experiments.run import Run
from fedkd.config import Config
from fedkd.knowledge import Knowledge
from privacy.gaussian import Gaussian, GaussianRows, GaussianUpdate
from tests.helpers.small import config, run


def with_privacy(cfg: Config, **privacy) -> Config:
    return Config.from_raw({**cfg.raw(), "privacy": privacy})


def finished(cfg: Config) -> Auditor:
    """Who looks at a run that is over."""
    strategy, _, grid = run(cfg)
    from clients.client import site

    return Auditor(site(cfg.to_json()), strategy.server, grid.homes, strategy.round, strategy.ledger, strategy.control)


# --- Canary clients --------------------------------------------------------------------------------------------------


def noisy(name: str, **privacy) -> Config:
    data = {"public": 20} if name == "fedmd" else {}
    method = {"loss": "kl"} if name == "fedmd" else {}
    cfg = config(name, model="linear", data=data, **method)
    return with_privacy(cfg, mechanism="gaussian", epsilon=5.0, **privacy)


@pytest.mark.parametrize("trust", ["client", "server"])
@pytest.mark.parametrize(("name", "kind"), [("fedmd", GaussianRows), ("fedavg", GaussianUpdate)])
def test_a_run_whose_noise_is_as_booked_is_as_claimed(name, kind, trust):
    auditor = finished(noisy(name, trust=trust))
    assert isinstance(auditor.site.mechanism, kind)
    found = canary_clients(auditor)
    assert found is not None and found.outcome == "as claimed", found
    assert found.target.startswith("message" if trust == "client" else "aggregate")
    assert found.rounds == 2 and found.mu_low <= found.claimed <= found.mu_high
    assert found.claimed == pytest.approx(2**0.5 / auditor.site.mechanism.noise_multiplier)


@pytest.mark.parametrize("trust", ["client", "server"])
@pytest.mark.parametrize("name", ["fedmd", "fedavg"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_less_noise_than_booked_is_contradicted(monkeypatch, name, trust, share):
    honest = Gaussian._noised
    monkeypatch.setattr(Gaussian, "_noised", lambda self, said, std, rng: honest(self, said, share * std, rng))
    found = canary_clients(finished(noisy(name, trust=trust)))
    assert found is not None and found.outcome == "contradicted", found
    assert found.mu_low > found.claimed


def test_a_missing_clip_is_contradicted(monkeypatch):
    monkeypatch.setattr(GaussianRows, "bound", lambda self, raw, down=None: Knowledge(dict(raw.tensors)))
    found = canary_clients(finished(noisy("fedmd")))
    assert found is not None and found.outcome == "contradicted" and found.moved > 100 * found.sensitivity


@pytest.mark.parametrize(
    ("name", "privacy"),
    [
        ("fedmd", {"mechanism": "none"}),
        ("fedmd", {"mechanism": "laplace"}),
        ("fedmd", {"mechanism": "local_votes"}),
        ("fedavg", {"mechanism": "gaussian", "quantile": 0.5}),
        ("fedavg", {"mechanism": "gaussian", "trust": "server", "noise_cohort_size": 100}),
        ("fedavg", {"mechanism": "ambassador", "delta": 1e-3, "steps": 1, "sampling_rate": 1.0}),
    ],
)
def test_other_mechanisms_have_no_canary_clients(name, privacy):
    assert canary_clients(finished(with_privacy(noisy(name), **privacy))) is None


def test_missing_noise_is_exit_code_three_and_right_noise_is_none(monkeypatch, tmp_path, fedkd_here):
    for label, code in (("right", 0), ("silent", 3)):
        Run(noisy("fedmd"), tmp_path / label).go()
        if code:
            monkeypatch.setattr(Gaussian, "_noised", lambda self, said, std, rng: dict(said))
        done = fedkd_here("audit", tmp_path / label)
        assert done.returncode == code, done.stdout
        assert ("contradicted" in done.stdout) == bool(code) and "message, canary clients: mu" in done.stdout


# --- Class means -----------------------------------------------------------------------------------------------------


def prototypes(mechanism: str = "none", **privacy) -> Config:
    split = {"name": "digits", "limit": 300, "test": 200, "partition": "dirichlet", "alpha": 0.3, "min_size": 5}
    cfg = config("fedproto", data=split, federation={"clients": 8, "rounds": 2}, seed=1)
    return with_privacy(Config.from_raw({**cfg.raw(), "method": {**cfg.raw()["method"], "epochs": 20}}),
                        mechanism=mechanism, **privacy)  # fmt: skip


@pytest.mark.slow
def test_class_means_of_an_overfitted_run_give_lone_records_and_classes_away_and_an_ambassadors_do_not():
    plain = finished(prototypes())
    said = channels.summed(plain)
    assert said is not None
    alone, there = channels.records(plain, said), channels.presence(plain, said)
    assert alone.alone is not None and alone.alone.classes >= 5
    assert alone.leaks and alone.alone.rate > 0.9, alone
    assert there.leaks and there.accuracy == 1.0 and there.auroc == 1.0, there
    told = class_means(plain, said)
    assert told["records"]["sentence"] == str(alone) and told["presence"]["leaks"]

    proxy = finished(prototypes("ambassador", epsilon=3.0, delta=1e-3, steps=2, sampling_rate=1.0))
    said = channels.summed(proxy)
    assert said is not None
    alone, there = channels.records(proxy, said), channels.presence(proxy, said)
    assert not alone.leaks, alone
    assert there.accuracy < 0.9 and there.auroc is not None and there.auroc < 0.95, there


def test_methods_without_sums_have_no_class_means():
    assert channels.summed(finished(with_privacy(noisy("fedmd"), mechanism="none"))) is None


# --- Differences of aggregates ---------------------------------------------------------------------------------------


def aggregates(cohort: int, rounds: int = 3, **privacy) -> Config:
    raw = {
        "seed": 2,
        "data": {"name": "digits", "test": 200, "public": 60},
        "federation": {"clients": 4, "rounds": rounds, "cohort": cohort, "evaluate_every": 9},
        "model": {"name": "mlp"},
        "method": {"name": "fedmd", "loss": "kl", "lr": 0.003, "batch": 16, "epochs": 25},
        "privacy": {"mechanism": "gaussian", "trust": "server", "clip": 20.0, **privacy},
        "audit": {"canaries": 160},
    }
    return Config.from_raw(raw)


@pytest.mark.slow
def test_the_difference_of_two_means_without_noise_tells_the_canaries_and_with_noise_does_not():
    silent = finished(aggregates(3, noise_cohort_size=10**9, epsilon=1e3))
    found = {one.target: one for one in silent.results()}
    assert found[DIFFERENCE].auroc_low > 0.75 and found[DIFFERENCE].leaves_client
    assert found[DIFFERENCE].auroc == pytest.approx(found[MESSAGE].auroc, abs=0.02)  # it is the message
    verdicts = silent.verdicts()
    assert {one.outcome for one in verdicts} == {"nothing claimed"}  # a simulation claims nothing of itself
    assert silent.claim is not None and any("a simulation" in line for line in silent.claim.assumptions)

    loud = finished(aggregates(3, epsilon=1.0))
    found = {one.target: one for one in loud.results()}
    assert found[DIFFERENCE].auroc_low < 0.5 < found[DIFFERENCE].auroc_high
    outcomes = {one.target: one.outcome for one in loud.verdicts()}
    assert outcomes[DIFFERENCE] == "consistent" and outcomes[MESSAGE] == "nothing claimed"


@pytest.mark.slow
def test_where_everybody_takes_part_every_round_there_is_no_difference_to_look_at():
    assert DIFFERENCE not in finished(aggregates(4, rounds=2)).canary_logits


# --- Inversion -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_features_of_a_shallow_cut_give_the_images_away():
    split = {"limit": 900, "test": 300, "partition": "iid", "alpha": None}
    cfg = config("fedd2s", model="cnn", federation={"rounds": 1}, dropping=["block1"])
    raw = cfg.raw()
    raw["data"] = {k: v for k, v in {**raw["data"], **split}.items() if v is not None}
    auditor = finished(Config.from_raw(raw))
    seen = channels.inversion(auditor, images=10)
    assert seen is not None and seen.target == "features after block1"
    assert seen.psnr_low > seen.baseline + 10, seen
    assert seen.leaks and seen.identified == 1.0
    assert torch.equal(
        torch.from_numpy(seen.originals).float(), auditor.site.federation.train_set(0)[0][: len(seen.originals)].float()
    )


def test_what_is_no_feature_of_records_is_not_inverted():
    assert channels.inversion(finished(with_privacy(noisy("fedmd"), mechanism="none"))) is None
