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
    monkeypatch.setattr(GaussianRows, "noise", lambda self, bounded, rng: bounded)
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
    assert fedkd_here("audit", out).returncode == 0


@pytest.mark.slow
def test_what_a_trusted_server_sees_is_not_claimed(tmp_path):
    summary = Run(config(trust="server"), tmp_path / "trusted").go()
    told = {one["target"]: one["outcome"] for one in summary["audit"]["verdicts"]}
    assert told == {"message": "nothing claimed", "aggregate": "consistent"}
