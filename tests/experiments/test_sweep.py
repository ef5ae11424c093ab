"""Sweeps: what a grid means, that nothing runs before all of it is valid, and that a sweep survives."""

from __future__ import annotations

import fcntl
import io
import json
import os
import signal
import string
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console

from experiments.cells import LONGEST, plan
from experiments.children import Children, Job
from experiments.lists import parse_seeds, readable, split_values
from experiments.run import Run
from experiments.sweep import SWEEP, Sweep, default_jobs, span
from fedkd.config import load
from fedkd.errors import ConfigError

# Values as someone may write them: TOML scalars, strings, arrays of these, and bare words.
STRINGS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8)
QUOTED = STRINGS.map(lambda text: json.dumps(text, ensure_ascii=False))
LITERAL = STRINGS.filter(lambda text: "'" not in text).map("'{}'".format)
NUMBERS = st.one_of(st.integers().map(str), st.floats(allow_nan=False, allow_infinity=False).map(repr))
SCALARS = st.one_of(QUOTED, LITERAL, NUMBERS, st.sampled_from(["true", "false"]))
ARRAYS = st.recursive(
    st.lists(SCALARS, max_size=3).map(lambda items: f"[{', '.join(items)}]"),
    lambda inner: st.lists(inner, max_size=2).map(lambda items: f"[{','.join(items)}]"),
    max_leaves=4,
)
BARE = st.from_regex(r"[a-z][a-z'\"\[\]{}/.:_-]{0,8}", fullmatch=True)
VALUES = st.lists(st.one_of(SCALARS, ARRAYS, BARE), min_size=1, max_size=5)


@given(VALUES, st.sampled_from([",", ", ", " , "]))
@example(['["mlp","cnn"]'], ",")
@example(['["mlp","cnn"]', '["cnn"]'], ",")
@example(["'a,b'", '"c,\\"d"'], ",")
@example(["it's", "b"], ",")
def test_split_undoes_join(values, comma):
    assert split_values(comma.join(values)) == values


def test_a_table_and_a_long_string_are_one_value():
    assert split_values('{a = 1, b = "x,y"},2') == ['{a = 1, b = "x,y"}', "2"]
    assert split_values('"""a,"b",c""",\'\'\'d,e\'\'\'') == ['"""a,"b",c"""', "'''d,e'''"]


@pytest.mark.parametrize("text", ['"a', "'a,b", "[1,2", '["a]', "[[1],", "{a = 1", '1,"'])
def test_what_is_not_closed_is_refused(text):
    with pytest.raises(ConfigError, match="not closed"):
        split_values(text)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=6, unique=True))
def test_seeds_as_numbers_or_text(seeds):
    assert parse_seeds(seeds) == parse_seeds(", ".join(map(str, seeds))) == seeds


@given(st.integers(0, 10**9), st.integers(0, 50))
def test_a_range_of_seeds_has_both_ends(first, more):
    assert parse_seeds(f"{first}..{first + more}") == list(range(first, first + more + 1))


@pytest.mark.parametrize(
    "given",
    ["", "4..0", "a", "-1", "0..", "..3", "0,,1", "1,1", "0..2,2", [], [True], [1.5], None, "0..99999999999", "1e3"],
)
def test_bad_seeds(given):
    with pytest.raises(ConfigError, match="seeds: expected"):
        parse_seeds(given)


@given(st.one_of(SCALARS, ARRAYS, BARE))
def test_a_value_in_a_label_can_be_in_a_folder_name(text):
    shown = readable(text)
    assert shown
    assert all(c.isalnum() or c in "_.+-" for c in shown)


def labels(what) -> list[str]:
    return [cell.label for cell in what.cells]


def test_the_grid_is_a_product_and_labels_name_swept_keys_only(tiny):
    arguments = ["method.temperature=1,2", "federation.rounds=3", 'model.by_client=["mlp","linear"],["linear"]']
    what = plan(tiny, arguments, "0..2")
    assert labels(what) == [
        "method.temperature=1,model.by_client=mlp+linear",
        "method.temperature=1,model.by_client=linear",
        "method.temperature=2,model.by_client=mlp+linear",
        "method.temperature=2,model.by_client=linear",
    ]
    runs = list(what.runs())
    assert len(runs) == 12
    assert [config.seed for _, config in runs[:5]] == [0, 0, 0, 0, 1]  # whole comparisons first
    assert {config.federation.rounds for _, config in runs} == {3}
    assert runs[0][1].model.by_client == ["mlp", "linear"]
    assert runs[-1][1].method.temperature == 2


def test_only_seeds(tiny):
    what = plan(tiny, [], "7")
    assert labels(what) == ["base"]
    assert what.cells[0].config == load(tiny, seed=7)[0]
    assert plan(tiny).seeds == (3,)  # the file's


def test_each_cell_is_what_run_would_make_of_it(tiny):
    what = plan(tiny, ["method.name=fedmd,local", "privacy.mechanism=none"], "1")
    for cell, name in zip(what.cells, ("fedmd", "local"), strict=True):
        config, notes = load(tiny, [f"method.name={name}", "privacy.mechanism=none"], 1)
        assert cell.config == config
        assert list(cell.notes) == notes
    assert what.cells[1].config.data.reserve == 200  # the override-drop rule


def test_comparison_rows_are_not_run(tiny):
    tiny.write_text(tiny.read_text() + '\n[compare]\nlocal = ["method.name=local", "privacy.mechanism=none"]\n')
    assert plan(tiny).cells[0].config.compare == {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["method.temperature=1,-2"], ["cell 'method.temperature=-2'", "greater than 0"]),
        (["method.name=fedmd,fedprox", "privacy.mechanism=none"], ["cell 'method.name=fedprox'", "by_client"]),
        (["method.temperatur=1,2"], ["cell 'method.temperatur=1'", "did you mean 'temperature'"]),
        (["method.temperature=1", "method.temperature=2"], ["method.temperature", "twice"]),
        (["method.temperature=1,"], ["empty value"]),
        (["method.temperature=1,1.0"], ["same configuration"]),
        (["seed=0,1"], ["--seeds"]),
        (["compare.a=[]"], ["compare.a", "no comparison rows"]),
        (["nonsense"], ["key=a,b,c", "'nonsense'"]),
        (["=1"], ["key=a,b,c"]),
        ([f"method.temperature={','.join(map(str, range(1, 102)))}", f"method.lr={'1,' * 100}1"], ["more than 10000"]),
    ],
)
def test_bad_grids(tiny, arguments, words):
    with pytest.raises(ConfigError) as error:
        plan(tiny, arguments, "0,1")
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


WRITTEN = """
base = "tiny.toml"
seeds = "0..1"
[grid]
"privacy.epsilon" = [3, 10]
method.loss = ["kl", "l1"]
federation.rounds = [2]
[[cells]]
label = "training alone"
overrides = ["method.name=local", "privacy.mechanism=none"]
[[cells]]
label = "no protection"
overrides = ["privacy.mechanism=none"]
grid = {"method.temperature" = [1, 3]}
"""


@pytest.fixture
def written(tiny):
    path = tiny.with_name("sweep.toml")
    path.write_text(WRITTEN)
    return path


def test_a_sweep_file(written):
    what = plan(written)
    assert labels(what) == [
        "privacy.epsilon=3,method.loss=kl",
        "privacy.epsilon=3,method.loss=l1",
        "privacy.epsilon=10,method.loss=kl",
        "privacy.epsilon=10,method.loss=l1",
        "training alone",
        "no protection,method.temperature=1",
        "no protection,method.temperature=3",
    ]
    assert what.seeds == (0, 1)
    assert [cell.config.federation.rounds for cell in what.cells] == [2, 2, 2, 2, 4, 4, 4]
    assert what.cells[4].config.method_name == "local"
    more = plan(written, ["data.alpha=1.0"], "5")
    assert more.seeds == (5,)
    assert {cell.config.data.alpha for cell in more.cells} == {1.0}


def test_a_sweep_file_of_cells_alone_has_no_base_cell(written):
    written.write_text('base = "tiny.toml"\n[[cells]]\nlabel = "a"\n')
    assert labels(plan(written)) == ["a"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("seeds", "seed", ["unknown key 'seed'", "did you mean 'seeds'"]),
        ("overrides = [", "override = [", ["unknown key 'cells.override'"]),
        ('base = "tiny.toml"', 'base = "no.toml"', ["no.toml", "no such file"]),
        ('base = "tiny.toml"', "base = 3", ["base: expected a text"]),
        ("[3, 10]", "3", ["privacy.epsilon", "list of values"]),
        ("[3, 10]", "[]", ["privacy.epsilon", "list of values"]),
        ("[3, 10]", "[2020-01-01]", ["privacy.epsilon", "numbers"]),
        ("[3, 10]", "[3, -10]", ["cell 'privacy.epsilon=-10,method.loss=kl'"]),
        ('"no protection"', '"a/b"', ["name a folder"]),
        ('"no protection"', '""', ["cells.label"]),
        ('"no protection"', "4", ["cells.label"]),
        ('["privacy.mechanism=none"]', '"none"', ["cells.'no protection'.overrides"]),
        ("[[cells]]", "[cells]", ["not valid TOML"]),
        ("federation.rounds = [2]", "seed = [1, 2]", ["--seeds"]),
        ("federation.rounds = [2]", '"method.loss" = ["kl"]\nprivacy = {epsilon = [1]}', ["twice"]),
    ],
)
def test_bad_sweep_files(written, old, new, words):
    written.write_text(WRITTEN.replace(old, new))
    with pytest.raises(ConfigError) as error:
        plan(written)
    for word in words:
        assert word in str(error.value)


def test_a_key_cannot_be_set_by_the_file_and_by_hand(written):
    with pytest.raises(ConfigError, match=r"privacy\.epsilon is given here, but cell"):
        plan(written, ["privacy.epsilon=4"])
    with pytest.raises(ConfigError, match="put it in its"):
        plan(written, ["data.alpha=1,2"])


@given(st.lists(st.text(string.printable, min_size=1, max_size=300), min_size=2, max_size=4, unique=True))
def test_labels_are_safe_and_distinct_whatever_the_values(tmp_path_factory, texts):
    folder = tmp_path_factory.getbasetemp()
    base = folder / "free.toml"
    base.write_text('[data]\nname = "files"\n[method]\nname = "local"\n')
    sweep = folder / "free-sweep.toml"
    sweep.write_text('base = "free.toml"\n[grid]\n"data.path" = ' + json.dumps(texts).replace("\x7f", "\\u007f") + "\n")
    names = labels(plan(sweep))
    assert len({name.casefold() for name in names}) == len(texts)
    for name in names:
        assert len(name.encode()) <= LONGEST
        assert not set(name) & set('/\\:*?"<>|\n\0')


def sweep_of(conf: Path, out: Path, *arguments: str, jobs: int = 1, seeds: str = "0") -> Sweep:
    return Sweep(plan(conf, arguments, seeds), out, jobs, Console(file=io.StringIO(), force_terminal=True))


@pytest.fixture
def no_children(monkeypatch):
    """Jobs that only leave a summary."""

    def pretend(self: Children, job: Job) -> None:
        if not job.finished():
            job.place.mkdir(parents=True, exist_ok=True)
            (job.place / "summary.json").write_text(json.dumps({"config_hash": job.config.hash}))

    monkeypatch.setattr(Children, "_run", pretend)


@pytest.mark.usefixtures("no_children")
def test_the_directory_says_what_runs_where_and_is_taken_up_again(tiny, tmp_path):
    out = tmp_path / "out"
    assert sweep_of(tiny, out, "method.temperature=1,2", seeds="0,1").go() == {}
    said = json.loads((out / SWEEP).read_text())
    assert said["seeds"] == [0, 1]
    for cell in said["cells"]:
        for seed, name in cell["config_hash"].items():
            summary = json.loads((out / cell["label"] / f"seed-{seed}" / "summary.json").read_text())
            assert summary["config_hash"] == name
    again = sweep_of(tiny, out, "method.temperature=1,2", seeds="0,1")
    assert again.go() == {}
    assert again.children.over == []  # nothing was left
    (out / "method.temperature=2" / "seed-1" / "summary.json").write_text("{")
    (out / "method.temperature=1" / "seed-1" / "summary.json").write_text('{"config_hash": "another"}')
    half = sweep_of(tiny, out, "method.temperature=1,2", seeds="0,1", jobs=2)
    assert half.go() == {}
    assert sorted(half.children.over) == ["method.temperature=1 seed 1", "method.temperature=2 seed 1"]


@pytest.mark.usefixtures("no_children")
def test_a_directory_of_something_else_is_refused(tiny, tmp_path):
    out = tmp_path / "out"
    sweep_of(tiny, out).go()
    before = (out / SWEEP).read_bytes()
    for arguments, seeds in ((["method.temperature=1,2"], "0"), ([], "0,1"), (["federation.rounds=2"], "0")):
        with pytest.raises(ConfigError, match="holds another sweep"):
            sweep_of(tiny, out, *arguments, seeds=seeds).go()
    assert (out / SWEEP).read_bytes() == before
    for damage in ("{", "[]", "{}", '{"hash": 3, "cells": []}'):
        (out / SWEEP).write_text(damage)
        with pytest.raises(ConfigError, match="damaged"):
            sweep_of(tiny, out).go()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "precious").write_text("mine")
    with pytest.raises(ConfigError, match="no sweep"):
        sweep_of(tiny, mine).go()
    assert [path.name for path in mine.iterdir()] == ["precious"]
    with pytest.raises(ConfigError, match="cannot be made"):
        sweep_of(tiny, mine / "precious").go()
    with pytest.raises(ConfigError, match="at least 1"):
        sweep_of(tiny, tmp_path / "none", jobs=0).go()
    assert not (tmp_path / "none").exists()


@pytest.mark.usefixtures("no_children")
def test_two_sweeps_do_not_work_in_one_directory(tiny, tmp_path):
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(ConfigError, match="another 'fedkd sweep' is at work"):
        sweep_of(tiny, tmp_path).go()
    os.close(handle)


def test_a_cell_that_cannot_be_set_up_is_named_before_anything_is_written(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"cell 'method\.name=local': .*sends nothing to protect"):
        sweep_of(tiny, tmp_path / "out", "method.name=fedmd,local").go()
    assert not (tmp_path / "out").exists()


def test_cores_are_shared_with_the_processes_of_a_run(tiny):
    cores = default_jobs([load(tiny)[0]])
    assert cores >= 1
    assert default_jobs([load(tiny, ["engine.name=pool"])[0]]) == 1
    assert default_jobs([load(tiny, ["engine.name=pool", f"engine.workers={2 * cores}"])[0]]) == 1


def test_a_guess_of_what_is_left():
    assert [span(s) for s in (0.2, 12, 89, 600, 7200)] == ["5 s", "10 s", "90 s", "10 min", "2.0 h"]


def summaries(out: Path) -> dict[str, dict]:
    return {str(path.parent.relative_to(out)): json.loads(path.read_text()) for path in out.rglob("summary.json")}


def offspring(process: int) -> list[int]:
    """Children of all threads of a process."""
    found = []
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        found += [int(word) for word in path.read_text().split()]
    return found


def ends(process: int, seconds: float = 20.0) -> bool:
    """Wait for a process of somebody else to end."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state in "ZX":
            return True
        time.sleep(0.02)
    return False


def begin(conf: Path, out: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "experiments.cli", "sweep", str(conf), *arguments, "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def at_work(out: Path, rounds: int, process: subprocess.Popen[str]) -> list[int]:
    """Wait until some run has so many rounds behind it; return the children."""
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        made = [path.read_bytes().count(b"\n") for path in out.rglob("metrics.jsonl")]
        if max(made, default=0) >= rounds and (found := offspring(process.pid)):
            return found
        time.sleep(0.01)
    raise AssertionError(process.communicate())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
def test_kill_nine_takes_the_children_along_and_the_same_command_goes_on(tiny, tmp_path, fedkd):
    arguments = ["method.temperature=1,2", "federation.rounds=12", "--seeds", "0,1", "--jobs", "2"]
    out = tmp_path / "killed"
    for rounds in (3, 1):
        process = begin(tiny, out, *arguments)
        children = at_work(out, rounds, process)
        process.kill()
        process.communicate()
        assert all(ends(child) for child in children)
    assert len(summaries(out)) < 4
    done = {place: (out / place / "summary.json").stat().st_mtime_ns for place in summaries(out)}
    last = fedkd("sweep", tiny, *arguments, "--out", out)
    assert last.returncode == 0, last.stderr
    assert "4 of 4 runs finished" in last.stdout
    for place, summary in summaries(out).items():
        alone = Run(load(out / place / "config.toml")[0], tmp_path / "alone" / place).go(False)
        assert summary["state_hash"] == alone["state_hash"]
        assert summary["bytes"] == alone["bytes"]
    assert len({summary["state_hash"] for summary in summaries(out).values()}) == 4
    assert all((out / place / "summary.json").stat().st_mtime_ns == at for place, at in done.items())
    assert not list(out.rglob(".seed-*"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
def test_control_c_ends_the_children_and_says_how_to_go_on(tiny, tmp_path):
    process = begin(tiny, tmp_path / "out", "federation.rounds=2000", "--seeds", "0,1", "--jobs", "2")
    children = at_work(tmp_path / "out", 2, process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.strip().splitlines()[-1].startswith("interrupted; go on with: fedkd sweep ")
    assert "Traceback" not in said
    assert "failed" not in said
    assert all(ends(child, 0.5) for child in children)


@pytest.mark.slow
def test_a_failing_run_does_not_stop_the_others(tiny, tmp_path, fedkd):
    timeouts = "federation.client_timeout=0.0001,0.0002,100.0"
    arguments = ["privacy.mechanism=none", timeouts, "--seeds", "0", "--jobs", "2"]
    out = tmp_path / "out"
    done = fedkd("sweep", tiny, *arguments, "--out", out)
    assert done.returncode == 1
    assert "1 of 3 runs finished" in done.stdout
    failed = [line for line in done.stderr.splitlines() if " failed: " in line]
    assert sorted(line.partition(" failed")[0] for line in failed) == [  # they run side by side
        "federation.client_timeout=0.0001 seed 0",
        "federation.client_timeout=0.0002 seed 0",
    ]
    assert all("QuorumError: " in line for line in failed)
    assert list(summaries(out)) == ["federation.client_timeout=100.0/seed-0"]


def test_bad_input_is_one_line_and_leaves_nothing(tiny, tmp_path, fedkd_here):
    out = tmp_path / "out"
    for arguments in (["method.mu=1,2"], ["--seeds", "x"], ["--jobs", "0"], ["method.name=fedmd,local"]):
        done = fedkd_here("sweep", tiny, *arguments, "--out", out)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith("ConfigError: ")
        assert not out.exists()
