"""Whole runs: what they write, that they repeat, and that they survive."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import files
from experiments.audit import open_run
from experiments.rows import configs
from experiments.run import Run
from fedkd import checkpoint
from fedkd.checkpoint import load as load_checkpoint
from fedkd.config import load
from fedkd.errors import BudgetExhausted, ConfigError, QuorumError
from fedkd.homes import Homes

CONF = Path(__file__).parents[2] / "experiments" / "conf"


def go(conf: Path, out: Path, *overrides: str, resume: bool = False):
    config, _ = load(conf, overrides)
    return Run(config, out).go(resume)


def test_a_run_writes_everything_and_says_what_it_did(tiny, tmp_path):
    out = tmp_path / "run"
    summary = go(tiny, out)
    names = {path.name for path in out.iterdir()}
    written = "config.toml metrics.jsonl transcript.jsonl ledger.json summary.json clients.json checkpoint homes"
    assert names == set(written.split())
    assert json.loads((out / "summary.json").read_text()) == summary
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 3, 4]
    assert summary["accuracy"] == lines[-1]["accuracy"]
    assert summary["bytes"] == {
        "up": 4 * 4 * 200 * 10 * 4,
        "down": 3 * 4 * 200 * 10 * 4,
    }  # rounds, clients, m, K, float
    assert 0.95 < summary["privacy"]["epsilon"] <= 1
    assert summary["privacy"]["statement"]["unit"] == "record"
    targets = [target["target"] for target in summary["audit"]["targets"]]
    assert targets == ["home model", "message", "aggregate", "student"]
    assert [target["leaves_client"] for target in summary["audit"]["targets"]] == [False, True, True, True]
    clients = json.loads((out / "clients.json").read_text())
    assert [client["model"] for client in clients] == ["linear", "mlp", "linear", "mlp"]
    personal = sum(client["personal"] for client in clients) / 4
    assert personal == pytest.approx(summary["accuracy"]["personal_mean"])
    config, _ = load(out / "config.toml")
    assert config.hash == summary["config_hash"]
    transcript = [json.loads(line) for line in (out / "transcript.jsonl").read_text().splitlines()]
    assert sum(line["bytes"] for line in transcript if line["direction"] == "up") == summary["bytes"]["up"]
    assert [r.to_json() for r in open_run(out).results()] == summary["audit"]["targets"]  # from the checkpoint alone


def test_equal_runs_have_equal_hashes_and_seeds_matter(tiny, tmp_path):
    first, second = go(tiny, tmp_path / "a"), go(tiny, tmp_path / "b")
    other = go(tiny, tmp_path / "c", "seed=4")
    assert first["state_hash"] == second["state_hash"] != other["state_hash"]


def test_resuming_a_finished_run_changes_nothing(tiny, tmp_path):
    first = go(tiny, tmp_path / "run")
    again = go(tiny, tmp_path / "run", resume=True)
    assert again["state_hash"] == first["state_hash"]
    assert again["accuracy"] == first["accuracy"]
    assert again["audit"] == first["audit"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mechanism", "engine", "kills"),
    [
        ("ambassador", "loop", 3),
        ("gaussian", "loop", 1),
        ("ambassador", "pool", 2),
        ("none", "vectorised", 2),
        pytest.param("none", "ray", 1, marks=pytest.mark.integration),
    ],
)
def test_kill_nine_then_resume_gives_the_same_hash(tiny, tmp_path, mechanism, engine, kills):
    overrides = [f"privacy.mechanism={mechanism}", "federation.rounds=12", "federation.cohort=0.75"]
    whole = go(tiny, tmp_path / "whole", *overrides, *(["engine.name=vectorised"] if engine == "vectorised" else []))
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "experiments.cli", "run", str(tiny), *overrides, "--out", str(out), "--quiet"]
    command += ["--engine", engine] + (["--workers", "2"] if engine in ("pool", "ray") else [])
    moments = random.Random(len(mechanism))
    for attempt in range(kills):
        resume = ["--resume"] if list(out.glob("checkpoint/round-*")) else []
        if not resume:
            shutil.rmtree(out, ignore_errors=True)
        child = subprocess.Popen(command + resume, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        wait_for(lambda n=attempt: _rounds(out) > 3 * n, child)
        time.sleep(moments.uniform(0, 0.3))
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert _rounds(out) >= 1
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert summary["state_hash"] == whole["state_hash"]
    assert summary["accuracy"] == whole["accuracy"]
    assert summary["bytes"] == whole["bytes"]
    assert [line["round"] for line in _metrics(out)] == list(range(1, 13))


@pytest.mark.slow
def test_a_kill_at_any_step_of_writing_a_round_is_survived(tiny, tmp_path, monkeypatch):
    whole = go(tiny, tmp_path / "whole")
    steps = [(Homes, "write"), (Homes, "settle"), (checkpoint, "save"), (files, "append"), (files, "write_json")]
    for place, name in steps:
        for when in ("before", "after"):
            out = tmp_path / f"{name}-{when}"
            with monkeypatch.context() as patch:
                patch.setattr(place, name, dying(getattr(place, name), when))
                with pytest.raises(Killed):
                    go(tiny, out)
            resume = bool(list(out.glob("checkpoint/round-*")))
            if not resume:
                shutil.rmtree(out)
            assert go(tiny, out, resume=resume)["state_hash"] == whole["state_hash"], (name, when)
            assert [line["round"] for line in _metrics(out)] == [1, 2, 3, 4]


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def dying(function, when: str):
    """The function, but the process dies at its third call."""
    calls = iter(range(1, 1000))

    def call(*args, **kwargs):
        last = next(calls) == 3
        if last and when == "before":
            raise Killed
        result = function(*args, **kwargs)
        if last:
            raise Killed
        return result

    return call


def _metrics(out: Path):
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _rounds(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def wait_for(condition, child, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)


@pytest.mark.slow
def test_control_c_leaves_a_checkpoint_and_says_how_to_go_on(tiny, tmp_path, fedkd):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "experiments.cli", "run", str(tiny), "federation.rounds=500", "--out", str(out)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: _rounds(out) >= 2, child)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130
    assert f"--out {out} --resume" in said
    assert load_checkpoint(out / "checkpoint").round >= 1
    assert "Traceback" not in said


def test_a_half_written_checkpoint_is_ignored_and_a_damaged_one_refused(tiny, tmp_path):
    out = tmp_path / "run"
    whole = go(tiny, out)
    draft = out / "checkpoint" / ".draft-1"
    draft.mkdir()
    (draft / "server.safetensors").write_bytes(b"half")
    assert go(tiny, out, resume=True)["state_hash"] == whole["state_hash"]
    homes = next((out / "homes").iterdir())
    content = bytearray(homes.read_bytes())
    content[-1] ^= 1
    homes.write_bytes(bytes(content))
    before = sorted((path, path.stat().st_mtime_ns) for path in out.rglob("*"))
    with pytest.raises(ConfigError, match=r"home is damaged"):
        go(tiny, out, resume=True)
    assert sorted((path, path.stat().st_mtime_ns) for path in out.rglob("*")) == before


@pytest.mark.parametrize("part", ["server.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["empty", "gone", "garbage"])
def test_every_kind_of_damage_is_one_line(tiny, tmp_path, part, damage):
    out = tmp_path / "run"
    overrides = ["federation.rounds=1", "privacy.mechanism=gaussian"]  # it is calibrated without a search
    go(tiny, out, *overrides)
    path = next((out / "checkpoint").glob("round-*")) / part
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(b"" if damage == "empty" else os.urandom(64))
    with pytest.raises(ConfigError, match="damaged") as error:
        go(tiny, out, *overrides, resume=True)
    assert "\n" not in str(error.value)


def test_resume_refuses_another_configuration(tiny, tmp_path):
    go(tiny, tmp_path / "run")
    with pytest.raises(ConfigError, match="choose another --out"):
        go(tiny, tmp_path / "run", "seed=9", resume=True)
    with pytest.raises(ConfigError, match=r"no config\.toml"):
        go(tiny, tmp_path / "nothing", resume=True)


def test_a_directory_with_something_in_it_is_left_alone(tiny, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "precious").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        go(tiny, out)
    assert [path.name for path in out.iterdir()] == ["precious"]


def test_the_budget_stops_a_run_before_anything_leaves(tiny, tmp_path, monkeypatch):
    # A calibrated run cannot pass its budget, so the noise is weakened behind the ledger's back.
    from privacy import mechanisms

    real = mechanisms.calibrate
    monkeypatch.setattr(mechanisms, "calibrate", lambda *args: real(*args) * 0.7)
    out = tmp_path / "run"
    with pytest.raises(BudgetExhausted, match="not made"):
        go(tiny, out, "privacy.mechanism=gaussian")
    up = [json.loads(line) for line in (out / "transcript.jsonl").read_text().splitlines()]
    rounds = {line["round"] for line in up if line["direction"] == "up"}
    assert rounds == set(range(1, max(rounds) + 1)) != {1, 2, 3, 4}


def test_quorum_stops_the_run_with_its_last_checkpoint(tiny, tmp_path):
    with pytest.raises(QuorumError, match="0 of 4 clients"):
        go(tiny, tmp_path / "run", "federation.client_timeout=0.0001", "privacy.mechanism=none")


@pytest.mark.slow
def test_local_and_comparison_rows(tiny, tmp_path):
    row = '\n[compare]\nlocal = ["method.name=local", "privacy.mechanism=none"]\n'
    tiny.write_text(tiny.read_text() + row)
    out = tmp_path / "run"
    go(tiny, out)
    local = json.loads((out / "compare" / "local" / "summary.json").read_text())
    assert local["bytes"] == {"up": 0, "down": 0}
    assert local["privacy"] is None
    assert local["accuracy"]["global"] is None
    assert [t["target"] for t in local["audit"]["targets"]] == ["home model"]
    classes = [client["classes"] for client in json.loads((out / "clients.json").read_text())]
    alone = json.loads((out / "compare" / "local" / "clients.json").read_text())
    assert [client["classes"] for client in alone] == classes  # the same partition


def test_a_row_that_is_not_a_configuration_is_refused_before_anything_runs(tiny, tmp_path):
    tiny.write_text(tiny.read_text() + '\n[compare]\nodd = ["method.name=fedavgg"]\n')
    with pytest.raises(ConfigError, match=r"compare.'odd'|fedavg"):
        go(tiny, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_shipped_client_level_run_is_the_main_jobs_row():
    main, _ = load(CONF / "main.toml")
    alone, _ = load(CONF / "client_level.toml")
    assert configs(main)["client-level noise"].hash == alone.hash
