"""Shadows: what they share with their run and what not, what LiRA and RMIA find with them, and that they survive."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from clients.client import site
from experiments import files
from experiments.audit import HOME, open_run
from experiments.run import Run
from experiments.shadow_attacks import PAPERS_A, attack, attacks
from experiments.shadows import CANARIES, FOLDER, Pipeline, Scores, ShadowJob, Shadows, shadow, train, trained
from experiments.show import View
from fedkd.config import Config
from fedkd.data.canaries import coins, shadow_coins
from fedkd.errors import ConfigError
from fedkd.federation import build
from strategies.flower import Round
from tests.helpers import plays, small

SEED = 2
MODELS = 8


def config(**more) -> Config:
    """Three clients that learn their few records by heart, and say so."""
    raw = {
        "seed": SEED,
        "data": {"name": "digits", "test": 200, "public": 100, "limit": 700},
        "federation": {"clients": 3, "rounds": 2, "evaluate_every": 2},
        "model": {"name": "mlp"},
        "method": {"name": "fedmd", "lr": 0.003, "batch": 16, "epochs": 15, "student_epochs": 1},
        "audit": {"canaries": 100},
    }
    for section, fields in more.items():
        raw[section] = {**raw.get(section, {}), **fields}
    return Config.from_raw(raw)


def noisy(**privacy) -> Config:
    return config(privacy={"mechanism": "gaussian", "epsilon": 0.5, "clip": 20.0, **privacy})


def with_shadows(out: Path, what: Config, models: int = MODELS) -> Path:
    """A run and its shadows, trained in this process."""
    Run(what, out).go()
    for k in range(1, models + 1):
        train(shadow(what, k), out / FOLDER / f"{k:02d}", resume=False)
    return out


@pytest.fixture(scope="module")
def leak(tmp_path_factory) -> Path:
    return with_shadows(tmp_path_factory.mktemp("leak") / "run", config())


@pytest.fixture(scope="module")
def hidden(tmp_path_factory) -> Path:
    return with_shadows(tmp_path_factory.mktemp("hidden") / "run", noisy())


def shadows_of(directory: Path, runs: int = 1, first: int = 1, jobs: int | None = 1) -> Shadows:
    return Shadows(directory, runs, first, jobs, Console(file=io.StringIO()))


# What a shadow shares with its run, and what not.


def test_coins_are_fair_and_independent_of_the_runs_own_and_of_one_another():
    m = 4000
    drawn = np.array([coins(m, SEED), *(shadow_coins(m, SEED, k) for k in (1, 3, 5, 7))])
    assert np.all(np.abs(drawn.mean(axis=1) - 0.5) < 5 * 0.5 / np.sqrt(m))
    correlations = np.corrcoef(drawn)[np.triu_indices(len(drawn), 1)]
    assert np.all(np.abs(correlations) < 5 / np.sqrt(m))
    assert abs((shadow_coins(m, SEED, 1) == shadow_coins(m, SEED + 1, 1)).mean() - 0.5) < 5 * 0.5 / np.sqrt(m)


def test_of_an_even_number_of_shadows_half_saw_each_canary():
    drawn = np.array([shadow_coins(50, SEED, k) for k in range(1, 9)])
    assert drawn.sum(axis=0).tolist() == [4] * 50
    assert len({tuple(one) for one in drawn}) == 8


def test_only_the_coins_of_the_split_are_drawn_anew():
    what = config(data={"partition": "dirichlet", "alpha": 0.5})
    own, other = build(what), build(shadow(what, 3))
    a, b = own.split.canaries, other.split.canaries
    assert not np.array_equal(a.included, b.included)
    assert np.array_equal(b.included, shadow_coins(100, SEED, 3))
    for name in ("index", "label", "owner"):
        assert np.array_equal(getattr(a, name), getattr(b, name))
    for name in ("test", "public"):
        assert np.array_equal(getattr(own.split, name), getattr(other.split, name))
    for k in range(3):
        assert np.array_equal(own.split.own_test[k], other.split.own_test[k])
        left = [np.setdiff1d(one.split.train[k], a.index) for one in (own, other)]
        assert np.array_equal(*left)


def test_a_run_of_its_own_does_not_know_the_key():
    what = config()
    assert "coins" not in what.raw()["audit"] and what.training_seed == what.seed
    seeds = {shadow(what, k).training_seed for k in range(1, 50)} | {what.seed}
    assert len(seeds) == 50
    assert shadow(what, 1).hash != shadow(what, 2).hash


def test_a_shadow_starts_from_the_same_weights_and_draws_its_own_samples_and_noise():
    what = config(model={"name": "linear"}, privacy={"mechanism": "ambassador", "delta": 1e-3, "steps": 2})
    here = site(what.to_json())
    canaries = here.federation.split.canaries
    own = canaries.owner == 0
    records = canaries.included[own].sum()  # as many draws, so that noise from one seed would be the same noise
    number = next(k for k in range(1, 99) if shadow_coins(100, SEED, k)[own].sum() == records)
    there = site(shadow(what, number).to_json())
    turns = []
    for one in (here, there):
        personal = one.personal(0, small.RecordDict())
        turns.append(one.tensors(0, 1, personal))
    for name, value in turns[0].personal.items():
        assert value.equal(turns[1].personal[name])
    noise = [turn.draws["dp_noise"].flatten().numpy() for turn in turns]
    assert abs(np.corrcoef(*noise)[0, 1]) < 5 / np.sqrt(noise[0].size)


@pytest.mark.parametrize("trust", ["client", "server"])
def test_a_shadow_does_not_tell_the_noise_of_its_run(trust):
    what = noisy(trust=trust, epsilon=0.01)
    said = [small.run(replace(one, federation=what.federation.model_copy(update={"rounds": 1})))[0].server["logits"]
            for one in (what, shadow(what, 1))]  # fmt: skip
    assert float(said[0].std()) > 100  # noise, and hardly anything else
    assert abs(np.corrcoef(*(one.flatten().numpy() for one in said))[0, 1]) < 5 / np.sqrt(said[0].numel())


@pytest.mark.parametrize("audit", [{"canaries": 0, "coins": 1}, {"canaries": 9, "coins": 0}])
def test_coins_without_canaries_or_out_of_range(audit):
    with pytest.raises(ConfigError, match=r"audit\.coins"):
        config(audit=audit)


def test_coins_are_not_for_text(tmp_path):
    with pytest.raises(ConfigError, match=r"audit\.coins=1: is about canaries among images"):
        plays.config(plays.write(tmp_path), audit={"coins": 1})


# Attacks on scores that are made up: m canaries, n records like them, and a target that moves those it saw.

M, N = 60, 200


def made_up(gap: float, included: np.ndarray, seed: int) -> Scores:
    """Log-odds N(where, 1), each canary at a place of its own, moved by the gap where included."""
    where, rng = np.random.default_rng(1).normal(0, 3, M + N), np.random.default_rng(seed)
    moved = np.concatenate([gap * included, np.zeros(N)])
    return Scores(included, {HOME: where + moved + 0.3 * rng.normal(size=M + N)})


def made_up_shadows(gap: float, numbers) -> list[Scores]:
    return [made_up(gap, shadow_coins(M, SEED, k), 100 + k) for k in numbers]


def labels(found) -> list[str]:
    return [one.attack.split(",")[0] + one.attack.partition(",")[2].split("=")[0].rstrip() for one in found.results]


def test_the_form_of_the_attack_follows_from_the_shadows():
    target = made_up(1.0, coins(M, SEED), 5)
    assert labels(attack(target, made_up_shadows(1.0, range(1, 9)), 0)) == ["LiRA online", "RMIA a"]
    out = [made_up(1.0, np.zeros(M, bool), k) for k in range(3)]
    assert labels(attack(target, out, 0)) == ["LiRA offline", "RMIA a"]
    one = attack(target, out[:1], 0)
    assert labels(one) == ["RMIA a"] and one.results[0].attack.endswith(f"{PAPERS_A}")
    assert [note.partition(";")[0] for note in one.notes] == [
        "home model: LiRA: expected two shadows or more that did not see each canary"
    ]
    seen = [made_up(1.0, np.ones(M, bool), 1)]
    nothing = attack(target, seen, 0)
    assert not nothing.results and not nothing.lira and "all reference models saw" in nothing.notes[1]


def test_shadows_see_what_each_canary_alone_would_look_like():
    found = attack(made_up(1.0, coins(M, SEED), 5), made_up_shadows(1.0, range(1, 17)), 0)
    lira, rmia = (one.audit for one in found.results)
    own = made_up(1.0, coins(M, SEED), 5)
    plain = np.mean(own.log_odds[HOME][:M][own.included][:, None] > own.log_odds[HOME][:M][~own.included])
    assert plain < 0.7 and rmia.auroc > 0.8 and lira.auroc > 0.95
    assert found.results[0].tpr_at_01_percent is None and found.models == 16 and found.population == N


def test_the_coins_of_the_run_do_not_move_a_score():
    target, models = made_up(1.0, coins(M, SEED), 5), made_up_shadows(1.0, range(1, 9))
    other = Scores(~target.included, target.log_odds)
    one, two = attack(target, models, 0), attack(other, models, 0)
    assert np.array_equal(one.lira[HOME], two.lira[HOME])
    assert [r.attack for r in one.results] == [r.attack for r in two.results]
    assert one.results[0].audit.auroc == pytest.approx(1 - two.results[0].audit.auroc)


def test_nothing_to_find_is_not_found_more_often_than_chance_allows():
    models = made_up_shadows(0.0, range(1, 9))
    alarms = np.zeros(2)
    for seed in range(100):
        drawn = np.random.default_rng([7, seed]).random(M) < 0.5
        alarms += [one.leaks for one in attack(made_up(0.0, drawn, 1000 + seed), models, 0).results]
    assert np.all(alarms <= 8)  # 2.5 expected of each, sd 1.6


# Real runs.


@pytest.mark.slow
def test_lira_sees_more_than_the_cross_entropy(leak):
    plain = {one.target: one.auroc for one in open_run(leak).results()}
    found = attacks(open_run(leak), leak)
    assert found.models == MODELS and 150 < found.population < 200 and not found.notes
    reached = {(one.audit.target, one.attack.split(",")[0]): one.audit for one in found.results}
    assert set(reached) == {(target, name) for target in plain for name in ("LiRA", "RMIA")}
    assert not reached["home model", "LiRA"].leaves_client and reached["aggregate", "LiRA"].leaves_client
    for target in ("home model", "message"):
        assert reached[target, "LiRA"].auroc >= plain[target] - 0.02
    assert reached["aggregate", "LiRA"].auroc > plain["aggregate"] + 0.03  # each client says one third of it
    assert reached["aggregate", "RMIA"].auroc > plain["aggregate"]


@pytest.mark.slow
def test_an_audit_with_shadows_is_shown_and_kept(leak, fedkd_here):
    before = json.loads((leak / files.SUMMARY).read_text())
    done = fedkd_here("audit", leak)
    assert done.returncode == 0 and "LiRA, online" in done.stdout and "97.5%" in done.stdout
    summary = json.loads((leak / files.SUMMARY).read_text())
    told = summary["audit"].pop("shadows")
    assert told["models"] == MODELS and len(told["attacks"]) == 8
    verdicts = summary["audit"].pop("verdicts")
    assert [one["target"] for one in verdicts] == [
        *("message", "message, LiRA", "aggregate", "aggregate, LiRA", "student", "student, LiRA")
    ]
    assert {one["confidence"] for one in verdicts} == {0.975}
    before["audit"].pop("verdicts")
    assert summary == before  # and nothing else is another
    assert fedkd_here("report", leak).returncode == 0


@pytest.mark.slow
def test_of_a_shadow_only_scores_are_kept_and_nothing_is_trained_twice(leak, fedkd_here):
    for k in range(1, MODELS + 1):
        assert {path.name for path in (leak / FOLDER / f"{k:02d}").iterdir()} == {files.CONFIG, CANARIES}
    kept = {path: path.stat().st_mtime_ns for path in leak.glob(f"{FOLDER}/*/*")}
    (leak / FOLDER / "02" / files.CHECKPOINT / "round-2").mkdir(parents=True)  # killed while it tidied up
    done = fedkd_here("shadows", leak, "--runs", MODELS)
    assert done.returncode == 0 and f"{MODELS} of {MODELS} shadows trained" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in leak.glob(f"{FOLDER}/*/*")} == kept


@pytest.mark.slow
def test_noise_hides_from_shadows_too(hidden):
    auditor = open_run(hidden)
    found = attacks(auditor, hidden)
    reached = {(one.audit.target, one.attack.split(",")[0]): one for one in found.results}
    for target in ("message", "aggregate", "student"):
        assert not reached[target, "LiRA"].leaks and not reached[target, "RMIA"].leaks
    assert reached["home model", "LiRA"].leaks  # it stays at home
    verdicts = {one.target: one for one in auditor.verdicts(found.lira)}
    assert verdicts["message, LiRA"].claimed == pytest.approx(0.5, abs=0.01)
    assert {one.outcome for one in verdicts.values()} == {"consistent"}
    known = np.where(auditor.site.federation.split.canaries.included, 0.0, 1.0)
    verdicts = {one.target: one.outcome for one in auditor.verdicts({"message": known})}
    assert verdicts["message, LiRA"] == "contradicted" and verdicts["message"] == "consistent"
    assert "aggregate, LiRA" not in verdicts


class Stop(View):
    """Ctrl-C after the first round."""

    def round(self, report: Round) -> None:
        raise KeyboardInterrupt


@pytest.mark.slow
def test_a_killed_shadow_goes_on_where_it_was_and_ends_the_same(leak):
    what, place = shadow(config(), MODELS + 1), leak / FOLDER / f"{MODELS + 1:02d}"
    with pytest.raises(KeyboardInterrupt):
        Pipeline(what, place, view=Stop()).go()
    assert (place / files.CHECKPOINT).is_dir() and not ShadowJob("", what, place).finished()
    assert len(trained(leak)) == MODELS  # a half-made one does not count
    made = (place / files.CONFIG).stat().st_mtime_ns
    assert shadows_of(leak, runs=1, first=MODELS + 1).go() == {}
    assert (place / files.CONFIG).stat().st_mtime_ns == made  # resumed, not made anew
    again = leak.parent / "undisturbed"
    train(what, again, resume=False)
    one, two = (Scores.read(where / CANARIES, what) for where in (place, again))
    assert np.array_equal(one.included, two.included)
    for target, values in one.log_odds.items():
        assert np.array_equal(values, two.log_odds[target])
    assert {path.name for path in place.iterdir()} == {files.CONFIG, CANARIES}
    assert not list(place.parent.glob(".*"))
    assert len(trained(leak)) == MODELS + 1
    for path in place.iterdir():
        path.unlink()
    place.rmdir()


def test_a_shadow_that_fails_is_one_line_and_exit_code_1(monkeypatch, tmp_path, fedkd_here):
    from experiments.children import Children, Job

    out = tmp_path / "run"
    Run(config(method={"epochs": 1}), out).go()

    def fail(self: Children, job: Job) -> None:
        self.failures[job.label] = "no luck"

    monkeypatch.setattr(Children, "_run", fail)
    done = fedkd_here("shadows", out, "--runs", 2, "--first", 3, "--jobs", 2)
    assert done.returncode == 1
    assert sorted(done.stderr.splitlines()[-2:]) == ["shadow 3 failed: no luck", "shadow 4 failed: no luck"]
    assert "0 of 2 shadows trained" in done.stdout


# Bad input: one line, exit code 2, nothing written.


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    Run(config(method={"epochs": 1}, federation={"rounds": 1}), out).go()
    return out


@pytest.mark.parametrize(("option", "value"), [("--runs", 0), ("--runs", -3), ("--first", 0), ("--jobs", 0)])
def test_numbers_out_of_range(finished, fedkd_here, option, value):
    done = fedkd_here("shadows", finished, option, value)
    assert done.returncode == 2 and done.stderr == f"ConfigError: {option} {value}: expected at least 1\n"
    assert not (finished / FOLDER).exists()


def refused(directory: Path, fedkd_here) -> str:
    done = fedkd_here("shadows", directory, "--runs", 2)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not (directory / FOLDER).exists()
    return done.stderr


def test_a_directory_that_can_have_no_shadows(tmp_path, fedkd_here):
    assert "no config.toml here" in refused(tmp_path, fedkd_here)
    file = plays.write(tmp_path)
    for name, what, words in (
        ("text", plays.config(file), "a run on text"),
        ("none", config(audit={"canaries": 0}), "no canaries were planted"),
        ("shadow", shadow(config(), 2), "is a shadow itself"),
        ("half", config(), "not finished"),
    ):
        place = tmp_path / name
        place.mkdir()
        (place / files.CONFIG).write_text(what.to_toml())
        assert words in refused(place, fedkd_here)


def test_scores_of_something_else_are_refused(finished, fedkd_here):
    place = finished / FOLDER / "01"
    place.mkdir(parents=True)
    what = shadow(files.config_of(finished), 1)
    said = Scores(coins(100, SEED), {HOME: np.zeros(150)})
    said.write(place / CANARIES, what)
    assert np.array_equal(Scores.read(place / CANARIES, what).included, said.included)
    said.write(place / CANARIES, shadow(what, 2))
    done = fedkd_here("audit", finished)
    assert done.returncode == 2 and "of another configuration" in done.stderr
    for damage in (b"", b"PK", (place / CANARIES).read_bytes()[:-200]):
        (place / CANARIES).write_bytes(damage)
        done = fedkd_here("audit", finished)
        assert done.returncode == 2 and "damaged; delete it" in done.stderr and done.stderr.count("\n") == 1
        assert not ShadowJob("", what, place).finished()
