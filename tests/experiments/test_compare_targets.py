"""Targets: the first round that is there, all bytes until then, and runs that never are."""

from __future__ import annotations

import io
import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from experiments.compare import compare
from experiments.compare_files import write
from experiments.compare_table import targets_table
from experiments.compare_targets import Reached, doubts, middle, parse, reached
from experiments.conditions import Condition, Result
from fedkd.errors import ConfigError


def condition(
    place: Path, label: str, seeds: dict[int, list], sizes: tuple[int, int] = (3, 2), **federation
) -> Condition:
    """Runs with these values of personal accuracy by round, None where the round was not scored."""
    runs = {}
    for seed, values in seeds.items():
        folder = place / label / f"seed-{seed}"
        folder.mkdir(parents=True)
        lines = [
            {"round": t, "bytes": {"up": sizes[0], "down": sizes[1]},
             "accuracy": None if value is None else {"personal_mean": value, "personal_ece": 1 - value, "global": None}}
            for t, value in enumerate(values, start=1)
        ]  # fmt: skip
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        summary = {"accuracy": lines[-1]["accuracy"], "state_hash": f"{label} {seed}"}
        runs[seed] = Result(label, seed, {}, summary, folder)
    config = {"method": {"name": label}, "federation": {"clients": 4, **federation}}
    return Condition(label, config, runs)


def test_the_first_scored_round_counts_with_all_bytes_until_then(tmp_path):
    one = condition(tmp_path, "a", {0: [0.1, None, 0.8, 0.7, 0.9], 1: [0.1, 0.2, 0.3, 0.4, 0.79]})
    assert reached(one, parse("personal=0.8")) == Reached({0: 3, 1: None}, {0: 15, 1: None})
    assert reached(one, parse("personal=0.75")).rounds == {0: 3, 1: 5}  # that it was lost again does not matter
    assert reached(one, parse("personal=0.1")) == Reached({0: 1, 1: 1}, {0: 5, 1: 5})


def test_less_is_better_where_it_is(tmp_path):
    one = condition(tmp_path, "a", {0: [0.1, 0.6, 0.9]})
    assert reached(one, parse("personal_ece=0.45")).rounds == {0: 2}
    assert parse("personal_ece=0.45").title == "Calibration error (ECE) ≤ 0.45"


def test_a_run_without_the_metric_is_not_one_that_never_was_there(tmp_path):
    one = condition(tmp_path, "a", {0: [0.1, 0.6]})
    assert reached(one, parse("global=0.5")) == Reached({}, {})
    (one.runs[0].place / "metrics.jsonl").unlink()
    fresh = Condition("a", {}, {0: Result("a", 0, {}, {}, one.runs[0].place)})
    assert reached(fresh, parse("personal=0.5")) == Reached({}, {})


@given(st.lists(st.one_of(st.none(), st.integers(1, 50)), min_size=1, max_size=9))
def test_the_median_is_one_whatever_the_missing_would_have_been(values):
    found = middle(dict(enumerate(values)))
    later = [median(at if at is not None else late for at in values) for late in (51, 10_000)]
    if found is None:
        assert 2 * sum(at is None for at in values) >= len(values)
        assert later[0] != later[1]
    else:
        assert later == [found, found]
    assert middle({}) is None


@pytest.mark.slow
def test_table_json_and_figure_say_who_was_there(tmp_path):
    alone = condition(tmp_path, "local", {0: [0.5, 0.8], 1: [0.5, 0.7]}, sizes=(0, 0))
    light = condition(tmp_path, "light", {0: [0.8, 0.9], 1: [0.7, 0.8], 2: [0.8, 0.8]}, sizes=(2_000, 1_000))
    heavy = condition(tmp_path, "heavy", {0: [0.3, 0.8], 1: [0.5, 0.6], 2: [0.3, 0.4]}, sizes=(900_000, 300_000))
    found = compare([alone, light, heavy], targets=["personal=0.8", "personal=0.8", "global=0.5"])
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(targets_table(found))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["Personal", "accuracy", "≥", "0.8"] in lines
    assert ["local", "(baseline)", "1", "of", "2", "–", "2", "–", "0", "bytes"] in lines  # half of the runs: no median
    assert ["light", "3", "of", "3", "1", "1", "to", "2", "3.0", "kB", "3.0", "kB", "to", "6.0", "kB"] in lines
    assert ["heavy", "1", "of", "3", "–", "2", "–", "2.4", "MB"] in lines
    assert ["heavy", "–", "–", "–"] in lines  # nobody has a server's model
    out = tmp_path / "out"
    said = json.loads(write(found, out)[0].read_text())
    assert said["targets"] == {
        "personal=0.8": {"metric": "personal", "value": 0.8}, "global=0.5": {"metric": "global", "value": 0.5},
    }  # fmt: skip
    assert said["conditions"][2]["reached"]["personal=0.8"] == {
        "n": 3, "reached": 1, "rounds": {"median": None, "values": {"0": 2, "1": None, "2": None}},
        "bytes": {"median": None, "values": {"0": 2_400_000, "1": None, "2": None}},
    }  # fmt: skip
    assert "counts as later than any other" in said["statistics"]
    nodes = ET.fromstring((out / "compare-targets.svg").read_text()).iter()
    words = " ".join("".join(node.itertext()).strip() for node in nodes if node.tag.endswith("}text"))
    for word in ("Personal accuracy ≥ 0.8", "never", "3 of 3 there", "median 1 rounds, 3.0 kB", "nothing sent",
                 "has none of this", "1 MB"):  # fmt: skip
        assert word in words
    assert "target 0.8" in (out / "compare-curves.svg").read_text()
    assert (out / "compare-targets.png").read_bytes()[:4] == b"\x89PNG"


def test_without_a_target_nothing_is_said_of_them(tmp_path):
    found = compare([condition(tmp_path, "a", {0: [0.5]})])
    assert "arget" not in found.statistics and found.to_json()["targets"] == {}
    assert not [path for path in write(found, tmp_path / "out") if "targets" in path.name]


@pytest.mark.parametrize("value", [0.0, 1.0, math.pi / 4])
def test_a_target_nobody_or_everybody_meets_still_makes_a_figure(tmp_path, value):
    found = compare([condition(tmp_path, "a", {0: [0.5], 1: [0.4]}, sizes=(0, 0))], targets=[f"personal={value}"])
    assert "compare-targets.png" in [path.name for path in write(found, tmp_path / "out")]


def test_what_makes_targets_hard_to_compare_is_said(tmp_path):
    one = condition(tmp_path, "a", {0: [0.5]}, rounds=10, evaluate="all")
    two = condition(tmp_path, "b", {0: [0.5]}, rounds=20, evaluate="cohort", evaluate_every=5)
    assert doubts([one]) == []
    said = " ".join(doubts([one, two]))
    for words in ("10 and 20 rounds", "every 1 or 5 rounds", "only the cohort was scored"):
        assert words in said
    assert compare([one, two], targets=["personal=0.5"]).notes[-3:] == doubts([one, two])
    assert "a longer run" not in " ".join(compare([one, two]).notes)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("personal", "expected metric=value"),
        ("persnal=0.8", "did you mean 'personal'"),
        ("seconds=3", "expected metric=value"),
        ("personal=much", "a fraction from 0 to 1, got 'much'"),
        ("personal=80", "a fraction from 0 to 1, got '80'"),
        ("personal=nan", "a fraction from 0 to 1, got 'nan'"),
    ],
)
def test_bad_targets_are_one_line(text, words):
    with pytest.raises(ConfigError) as error:
        parse(text)
    assert words in str(error.value) and "\n" not in str(error.value)
