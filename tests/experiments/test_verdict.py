"""Claimed against certified: a mechanism that does not do what it claims is caught, one that does is not."""

import json

import pytest

from experiments import files
from experiments.audit import open_run
from experiments.run import Run
from fedkd.config import Config
from privacy.gaussian import GaussianRows


def config(**privacy) -> Config:
    return Config.from_raw(
        {
            "seed": 2,
            "data": {"name": "digits", "test": 200, "public": 100},
            "federation": {"clients": 3, "rounds": 2, "evaluate_every": 2},
            "model": {"name": "mlp"},
            "method": {"name": "fedmd", "lr": 0.003, "batch": 16, "epochs": 30},
            "privacy": {"mechanism": "gaussian", "epsilon": 0.5, "clip": 20.0, **privacy},
            "audit": {"canaries": 240},
        }
    )


@pytest.mark.slow
def test_noise_that_is_claimed_and_never_added_is_contradicted(monkeypatch, tmp_path, fedkd_here):
    monkeypatch.setattr(GaussianRows, "noise", lambda self, bounded, rng, down=None: bounded)
    out = tmp_path / "silent"
    summary = Run(config(), out).go()
    told = {one["target"]: one for one in summary["audit"]["verdicts"]}
    assert summary["audit"]["contradicted"] and told["message"]["outcome"] == "contradicted"
    assert told["message"]["claimed"] == pytest.approx(0.5, abs=0.01) and told["message"]["audited"] > 0.5
    done = fedkd_here("audit", out)
    assert done.returncode == 3 and "the claim is contradicted" in done.stdout


@pytest.mark.slow
def test_noise_that_is_added_is_not(tmp_path, fedkd_here):
    out = tmp_path / "noised"
    summary = Run(config(), out).go()
    assert not summary["audit"]["contradicted"]
    told = {one["target"]: one for one in summary["audit"]["verdicts"]}
    assert set(told) == {"message", "aggregate"} and {one["outcome"] for one in told.values()} == {"consistent"}
    assert "home model" not in told  # it leaks, stays at home, and nothing is claimed of it
    assert [v.to_json() for v in open_run(out).verdicts()] == summary["audit"]["verdicts"]
    assert json.loads((out / files.SUMMARY).read_text())["audit"]["contradicted"] is False
    assert summary["audit"]["labels"]["clients"] == 3
    done = fedkd_here("audit", out)
    assert done.returncode == 0 and "label distributions guessed within" in done.stdout


@pytest.mark.slow
def test_what_a_trusted_server_sees_is_not_claimed(tmp_path):
    summary = Run(config(trust="server"), tmp_path / "trusted").go()
    told = {one["target"]: one["outcome"] for one in summary["audit"]["verdicts"]}
    assert told == {"message": "nothing claimed", "aggregate": "consistent"}


def test_a_report_shows_claims_beside_what_is_certified():
    from experiments.report.claim_figure import claims
    from experiments.report.read_privacy import read_audit

    told = {
        "targets": [],
        "verdicts": [
            {"target": "message", "claimed": 2.0, "audited": 3.1, "power": {"mean": 0.4}, "outcome": "contradicted",
             "sentence": "message: bad."},
            {"target": "student", "claimed": None, "audited": 0.0, "power": None, "outcome": "nothing claimed"},
        ],
    }  # fmt: skip
    found = read_audit(told).certified
    assert [one.contradicted for one in found] == [True, False] and found[1].visible is None
    for width in (9.0, 4.0):
        texts = [text.get_text() for text in claims(found, width).axes[0].texts]
        assert "3.10" in texts and "0.00" in texts and "student" in texts
    assert claims((), 9.0) is None
