"""The command line as a person meets it: by its output and exit codes, in a process of its own where that matters."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from fedkd.registry import METHODS


@pytest.mark.slow
def test_run_audit_report_and_list(tiny, tmp_path, fedkd, fedkd_here):
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
    audit = fedkd_here("audit", out)
    assert audit.returncode == 0
    for word in ("home model", "stays home", "message", "leaves", "null band"):
        assert word in audit.stdout
    elsewhere = tmp_path / "page.html"
    assert fedkd_here("report", out, "-o", elsewhere).returncode == 0
    assert elsewhere.read_text() == page


@pytest.mark.slow
def test_distill_is_one_teacher_one_pool_and_one_student(tiny, tmp_path, fedkd_here, monkeypatch):
    monkeypatch.setenv("FEDKD_CACHE", str(tmp_path / "cache"))
    out, settings = tmp_path / "run", ["method.name=kd3", "method.selection=all", "method.student_epochs=2"]
    plain = ["privacy.mechanism=none", "audit.canaries=0", "data.pool=glyphs"]
    done = fedkd_here("distill", tiny, *settings, *plain, "--out", out, "--quiet")
    assert done.returncode == 0, done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["clients"], summary["method"]) == (1, "kd3") and summary["accuracy"]["global"] is not None
    refused = fedkd_here("distill", tiny, "method.name=local", "data.public=0", *plain[:2], "--out", tmp_path / "no")
    assert refused.returncode == 2 and "local trains no student at the server; use kd3 or rad" in refused.stderr
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_a_model_of_one_run_is_the_teacher_of_another(tiny, tmp_path, fedkd_here):
    first, file, second = tmp_path / "first", tmp_path / "deep" / "teacher.safetensors", tmp_path / "second"
    plain = ["privacy.mechanism=none", "audit.canaries=0", "model.by_client="]
    alone = ["federation.clients=1", "data.partition=iid", "method.lr=3e-3", "method.epochs=4"]
    trained = fedkd_here("run", tiny, "method.name=local", *plain, *alone, "--out", first, "--quiet")
    assert trained.returncode == 0, trained.stderr
    refused = fedkd_here("export", first, file)
    assert refused.returncode == 2 and "local has no model at the server; name a client's" in refused.stderr
    assert fedkd_here("export", first, file, "--client", "3").returncode == 2
    assert not file.parent.exists()
    done = fedkd_here("export", first, file, "--client", "0")
    assert done.returncode == 0 and "parameters" in done.stdout
    settings = ["method.name=rad", "method.selection=all", "method.student_epochs=30"]
    given = fedkd_here("distill", tiny, *settings, *plain, "--teacher", file, "--out", second, "--quiet")
    assert given.returncode == 0, given.stderr
    before, after = (json.loads((place / "summary.json").read_text())["accuracy"] for place in (first, second))
    assert after["personal_mean"] == before["personal_mean"]  # it learnt no more
    assert after["global"] > 0.2
    whole = fedkd_here("export", second, tmp_path / "student.safetensors")
    assert whole.returncode == 0, whole.stderr


@pytest.mark.parametrize(
    ("content", "said"), [(None, "cannot be read"), ("junk", "cannot be read"), ("other", "expected the weights of")]
)
def test_weights_that_do_not_fit_are_refused_before_anything_is_written(content, said, tiny, tmp_path, fedkd_here):
    file = tmp_path / "w.safetensors"
    if content == "junk":
        file.write_bytes(b"no tensors here")
    if content == "other":
        save_file({"head.weight": torch.zeros(2, 2)}, file)
    done = fedkd_here("run", tiny, f"model.weights={file}", "model.by_client=", "--out", tmp_path / "no")
    assert done.returncode == 2 and said in done.stderr and str(file) in done.stderr
    assert not (tmp_path / "no").exists()


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
def test_list_says_one_line_each(fedkd_here, what, words):
    done = fedkd_here("list", what)
    assert done.returncode == 0
    for word in words:
        assert word in done.stdout
    assert all(len(line.split("  ", 1)) == 2 for line in done.stdout.splitlines())


def test_methods_are_listed_with_what_they_exchange_and_need(fedkd_here):
    lines = fedkd_here("list", "methods").stdout.splitlines()
    rows = [re.split(r"  +", line, maxsplit=5) for line in lines]
    assert rows[0] == ["method", "exchanged", "mixed models", "public data", "evidence", "what it does"]
    assert [row[0] for row in rows[1:]] == list(METHODS)
    said = {row[0]: row[1:5] for row in rows[1:]}
    assert said["local"] == ["nothing", "yes", "no", "baseline"]
    assert said["fedprox"] == ["params", "no", "no", "paper"]
    assert said["fedmd"] == ["logits", "yes", "yes", "official-code"]
    heads, rule, *table = fedkd_here("list", "methods", "--markdown").stdout.splitlines()
    assert heads == "| Method | Exchanged | Mixed models | Public data | Evidence | What it does |"
    assert rule == "| --- | --- | --- | --- | --- | --- |"
    assert table == [f"| `{row[0]}` | {' | '.join(row[1:])} |" for row in rows[1:]]


def test_every_markdown_table_has_one_number_of_columns(fedkd_here):
    for what in ("methods", "datasets", "models", "mechanisms", "keys"):
        lines = fedkd_here("list", what, "--markdown").stdout.splitlines()
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["federation.round=3"], ["unknown key 'federation.round'", "did you mean 'rounds'?"]),
        (["federation.rounds=many"], ["federation.rounds", "integer", "'many'"]),
        (["data.name=mnis"], ["mnist", "'mnis'"]),
        (["data.name=files", "data.path=/nowhere.npz"], ["/nowhere.npz"]),
        (["federation.clients=5000"], ["5000"]),
        (["method.name=fedgen", "model.by_client=[]", "privacy.mechanism=gaussian"], ["fedgen", "ambassador"]),
        (["method.name=fedprox"], ["by_client", "fedprox"]),
        (["data.partition=pathological"], ["data.classes"]),
        (["engine.device=cuda"], ["engine.device", "cpu"]),
        (["engine.name=warp"], ["engine.name", "loop"]),
        (["privacy.delta=0.5"], ["privacy.delta"]),
        (["nonsense"], ["key=value", "'nonsense'"]),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tiny, tmp_path, fedkd_here, overrides, words):
    out = tmp_path / "run"
    done = fedkd_here("run", tiny, *overrides, "--out", out)
    assert done.returncode == 2, done.stderr
    said = [line for line in done.stderr.splitlines() if not line.startswith("note:")]
    assert len(said) == 1
    assert said[0].startswith("ConfigError: ")
    for word in words:
        assert word in said[0]
    assert not out.exists()


def test_a_missing_file_and_a_directory_that_is_no_run(tmp_path, fedkd_here):
    for command in (["run", tmp_path / "no.toml"], ["report", tmp_path], ["audit", tmp_path], ["list", "nonsense"]):
        done = fedkd_here(*command)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_process_says_no_more_than_that_one_line(tiny, tmp_path, fedkd):
    for command in (["run", tiny, "federation.clients=5000", "--out", tmp_path / "run"], ["list", "nonsense"]):
        done = fedkd(*command)
        assert done.returncode == 2
        assert done.stdout == ""
        assert len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith("ConfigError: ")
    assert not (tmp_path / "run").exists()
