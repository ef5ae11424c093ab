"""The command line as a person meets it: in a process, by its output and exit codes."""

from __future__ import annotations

import json

import pytest


@pytest.mark.slow
def test_run_audit_report_and_list(tiny, tmp_path, fedkd):
    out = tmp_path / "run"
    done = fedkd("run", tiny, "method.digest_epochs=2", "--out", out, "--seed", "5")
    assert done.returncode == 0, done.stderr
    assert "balanced" in done.stderr
    assert "report.html" in done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert summary["seed"] == 5
    assert summary["command"].startswith("fedkd run ")
    page = (out / "report.html").read_text()
    assert summary["state_hash"] in page
    audit = fedkd("audit", out)
    assert audit.returncode == 0
    for word in ("home model", "stays home", "message", "leaves", "null band"):
        assert word in audit.stdout
    elsewhere = tmp_path / "page.html"
    assert fedkd("report", out, "-o", elsewhere).returncode == 0
    assert elsewhere.read_text() == page


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("methods", ["fedmd", "official-code", "fedprox", "local"]),
        ("datasets", ["mnist5k", "omniglot", "files"]),
        ("models", ["mlp", "resnet8"]),
        ("mechanisms", ["gaussian", "ambassador"]),
        ("keys", ["data.partition", "method (fedprox).mu", "privacy (ambassador).sampling_rate"]),
    ],
)
def test_list_says_one_line_each(fedkd, what, words):
    done = fedkd("list", what)
    assert done.returncode == 0
    for word in words:
        assert word in done.stdout
    assert all(len(line.split("  ", 1)) == 2 for line in done.stdout.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["federation.round=3"], ["unknown key 'federation.round'", "did you mean 'rounds'?"]),
        (["federation.rounds=many"], ["federation.rounds", "integer", "'many'"]),
        (["data.name=mnis"], ["mnist", "'mnis'"]),
        (["data.name=files", "data.path=/nowhere.npz"], ["/nowhere.npz"]),
        (["federation.clients=5000"], ["5000"]),
        (["method.name=fedavg", "model.by_client=[]", "privacy.mechanism=gaussian"], ["fedavg", "ambassador"]),
        (["method.name=fedprox"], ["by_client", "fedprox"]),
        (["data.partition=pathological"], ["data.classes"]),
        (["engine.device=cuda"], ["engine.device", "cpu"]),
        (["engine.name=warp"], ["engine.name", "loop"]),
        (["privacy.delta=0.5"], ["privacy.delta"]),
        (["nonsense"], ["key=value", "'nonsense'"]),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tiny, tmp_path, fedkd, overrides, words):
    out = tmp_path / "run"
    done = fedkd("run", tiny, *overrides, "--out", out)
    assert done.returncode == 2, done.stderr
    said = [line for line in done.stderr.splitlines() if not line.startswith("note:")]
    assert len(said) == 1
    assert said[0].startswith("ConfigError: ")
    for word in words:
        assert word in said[0]
    assert not out.exists()


def test_a_missing_file_and_a_directory_that_is_no_run(tmp_path, fedkd):
    for command in (["run", tmp_path / "no.toml"], ["report", tmp_path], ["audit", tmp_path], ["list", "nonsense"]):
        done = fedkd(*command)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
