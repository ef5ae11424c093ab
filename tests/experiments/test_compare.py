"""Comparisons: the statistics against scipy and by hand, what may be paired, and bytes that repeat."""

from __future__ import annotations

import io
import json
import math
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats

from experiments.cells import plan
from experiments.compare import Comparison, Difference, compare, holm, paired, spread
from experiments.compare_clients import moved, order, worst
from experiments.compare_curves import curve, inside, sent
from experiments.compare_figures import verdict
from experiments.compare_files import default_place, write
from experiments.compare_table import names, table
from experiments.conditions import METRICS, check_pairs, read
from experiments.report.style import apart
from fedkd.config import Config, load
from fedkd.errors import ConfigError

FINITE = st.floats(-1e3, 1e3, allow_nan=False)


def leave_run(place: Path, config: Config, balanced: float = 0.7, **more: Any) -> Path:
    """Write what a finished run leaves, as far as a comparison reads it."""
    place.mkdir(parents=True)
    (place / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    alone = config.method_name == "local"
    accuracy = {"balanced_mean": balanced, "personal_mean": balanced + 0.1, "personal_std": 0.05,
                "personal_worst10": balanced - 0.1, "personal_ece": 0.08, "global": None if alone else balanced + 0.02,
                "global_ece": None if alone else 0.03}  # fmt: skip
    sent = {"up": 0 if alone else 40_000, "down": 0 if alone else 32_000}
    lines = []
    for t in range(1, config.federation.rounds + 1):
        grown = {key: value and value * t / config.federation.rounds for key, value in accuracy.items()}
        lines.append(json.dumps({"round": t, "accuracy": grown, "bytes": sent}) + "\n")
    (place / "metrics.jsonl").write_text("".join(lines))
    rows = [{"client": k, "personal": balanced + 0.1 * (k - 1), "balanced": balanced} for k in range(4)]
    (place / "clients.json").write_text(json.dumps(rows))
    targets = [{"target": "home model", "leaves_client": False}] + [{"target": "message", "leaves_client": True}] * (
        not alone
    )
    summary = {
        "method": config.method_name, "seed": config.seed, "accuracy": accuracy,
        "bytes": {"up": 0 if alone else 160_000, "down": 0 if alone else 128_000},
        "privacy": None if config.privacy.mechanism == "none" else {"epsilon": 9.5, "delta": 1e-3},
        "audit": {"target": targets[-1]["target"], "auroc": 0.6, "exposure_mean": 1.5, "targets": targets},
        "seconds": 3.0, "state_hash": f"state of {config.hash}", "config_hash": config.hash,
        "versions": {"fedkd": "0.1.0"}, "machine": "some machine", **more,
    }  # fmt: skip
    (place / "summary.json").write_text(json.dumps(summary))
    return place


FILES = [
    "compare.json",
    *(f"compare{part}.{kind}" for part in ("", "-curves", "-bytes", "-clients") for kind in ("svg", "png")),
]
SCORES = {"ambassador": [0.71, 0.75, 0.69, 0.74], "none": [0.72, 0.77, 0.70, 0.73], "local": [0.60, 0.66, 0.61, 0.63]}


def leave_sweep(conf: Path, out: Path, seeds: str = "0..3", skip: Sequence[str] = ()) -> Path:
    """Write what a sweep over three conditions leaves."""
    path = conf.with_name("three.toml")
    path.write_text(
        'base = "tiny.toml"\n[grid]\n"privacy.mechanism" = ["ambassador", "none"]\n'
        '[[cells]]\nlabel = "training alone"\noverrides = ["method.name=local", "privacy.mechanism=none"]\n'
    )
    what = plan(path, [], seeds)
    out.mkdir()
    (out / "sweep.json").write_text(json.dumps(what.to_json()))
    for cell, config in what.runs():
        kind = "local" if config.method_name == "local" else config.privacy.mechanism
        if f"{cell.label} {config.seed}" not in skip:
            leave_run(out / cell.label / f"seed-{config.seed}", config, SCORES[kind][config.seed % 4])
    return out


@pytest.fixture
def swept(tiny, tmp_path):
    return leave_sweep(tiny, tmp_path / "swept")


def found(*directories: Path, baseline: str | None = None, metrics: Sequence[str] = ()) -> Comparison:
    conditions, unfinished = read(directories)
    return compare(conditions, baseline, metrics, unfinished)


def test_a_difference_by_hand():
    d = paired({0: 3.0, 1: 5.0, 2: 7.0, 9: 0.0}, {0: 1.0, 1: 2.0, 2: 3.0, 8: 0.0})
    assert d.values == {0: 2.0, 1: 3.0, 2: 4.0}
    assert (d.mean, d.std) == (3.0, 1.0)
    # t at 0.975 with 2 degrees of freedom is 4.30265; t = 3 / (1 / sqrt 3) = 5.19615, p = 0.0350985
    assert d.low == pytest.approx(3 - 4.30265273 / math.sqrt(3))
    assert d.high == pytest.approx(3 + 4.30265273 / math.sqrt(3))
    assert d.p == pytest.approx(
        1 - 5.19615242 / math.sqrt(5.19615242**2 + 2)
    )  # the t distribution with 2 in closed form


@given(st.lists(st.tuples(FINITE, FINITE), min_size=2, max_size=8))
def test_a_difference_is_scipys(pairs):
    new, old = np.array(pairs).T
    moves = new - old
    assume(moves.std() > 1e-6 * np.abs(pairs).max() > 1e-100)  # the square of what is smaller is no number
    ours = paired(dict(enumerate(new.tolist())), dict(enumerate(old.tolist())))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        theirs = stats.ttest_rel(new, old)
    reach = theirs.confidence_interval(0.95)
    assert ours.p == pytest.approx(theirs.pvalue, rel=1e-6, abs=1e-12)
    scale = float(np.abs(pairs).max())
    assert (ours.low, ours.high) == pytest.approx((reach.low, reach.high), rel=1e-6, abs=1e-9 * scale)


def test_one_pair_has_no_interval_and_equal_differences_have_none():
    one = paired({0: 0.7}, {0: 0.6})
    assert one.mean == pytest.approx(0.1)
    assert (one.std, one.low, one.high, one.p) == (None, None, None, None)
    same = paired({0: 0.1 + 0.2, 1: 0.5}, {0: 0.1, 1: 0.3})  # 0.2 both, but for rounding
    assert (same.std, same.low, same.p) == (0.0, None, None)
    assert paired({0: math.inf, 1: 3.0}, {0: math.inf, 1: 2.0}).values == {1: 1.0}
    assert paired({0: 1.0}, {1: 1.0}) == Difference({}, None, None)


def test_spread_of_a_sample():
    two = spread({0: 1.0, 4: 3.0})
    assert (two.mean, two.std) == (2.0, pytest.approx(math.sqrt(2)))
    assert (spread({0: 1.0}).mean, spread({0: 1.0}).std) == (1.0, None)
    assert spread({}).mean is None
    assert spread({0: 1.0, 1: math.inf}).mean == math.inf


def test_holm_by_hand():
    ps = [0.01, 0.04, None, 0.03, 0.005]
    corrected = [d.holm for d in holm([Difference({}, 0.0, 0.0, p=p) for p in ps])]
    assert corrected == [pytest.approx(0.03), pytest.approx(0.06), None, pytest.approx(0.06), pytest.approx(0.02)]
    assert holm([Difference({}, 0.0, 0.0, p=0.9), Difference({}, 0.0, 0.0, p=0.6)])[0].holm == 1.0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_holm_never_helps_and_keeps_the_order(ps):
    corrected = [d.holm or 0.0 for d in holm([Difference({}, 0.0, 0.0, p=p) for p in ps])]
    assert all(p <= c <= min(1.0, len(ps) * p) + 1e-12 for p, c in zip(ps, corrected, strict=True))
    assert [corrected[i] for i in np.argsort(ps, kind="stable")] == sorted(corrected)


def test_a_sweep_is_compared_with_training_alone(swept):
    result = found(swept)
    assert [c.label for c in result.conditions] == [
        "privacy.mechanism=ambassador", "privacy.mechanism=none", "training alone",
    ]  # fmt: skip
    assert result.baseline.label == "training alone"
    assert [m.name for m in result.metrics] == [name for name in METRICS if "perplexity" not in name]
    assert result.notes == []
    d = result.differences["privacy.mechanism=none", "balanced"]
    theirs = stats.ttest_rel(SCORES["none"], SCORES["local"])
    assert d.p == pytest.approx(theirs.pvalue)
    assert d.mean == pytest.approx(0.105)
    assert d.holm == pytest.approx(min(2 * theirs.pvalue, d.holm or 0))
    for name in ("global", "global_ece", "epsilon", "auroc", "exposure"):  # the baseline has none of these
        assert result.differences["privacy.mechanism=none", name].mean is None
    assert result.spreads["training alone", "auroc"].values == {}  # its home model leaves nobody
    assert result.spreads["privacy.mechanism=none", "epsilon"].values == {}
    assert result.differences["privacy.mechanism=ambassador", "up"].mean == 160_000
    other = found(swept, baseline="privacy.mechanism=none", metrics=["global", "balanced", "global"])
    assert [m.name for m in other.metrics] == ["global", "balanced"]
    assert other.differences["privacy.mechanism=ambassador", "global"].mean == pytest.approx(-0.0075)


def test_names_that_do_not_exist(swept):
    with pytest.raises(ConfigError, match=r"--baseline: .*did you mean 'training alone'"):
        found(swept, baseline="training")
    with pytest.raises(ConfigError, match=r"--metric: .*did you mean 'balanced'"):
        found(swept, metrics=["balance"])


def test_unfinished_runs_are_left_out_and_said(tiny, tmp_path):
    swept = leave_sweep(tiny, tmp_path / "swept", skip=["training alone 1", "training alone 2", "training alone 3"])
    result = found(swept)
    assert result.notes[0].startswith("3 unfinished runs are left out: training alone seed 1, ")
    assert "'privacy.mechanism=none' shares 1 seeds with 'training alone'" in " ".join(result.notes)
    d = result.differences["privacy.mechanism=none", "balanced"]
    assert (d.mean, d.low, d.p, d.holm) == (pytest.approx(0.12), None, None, None)
    assert verdict(d, 1) == verdict(Difference({}, None, None), 1)  # undecided


def test_sweeps_add_up_seed_by_seed(tiny, tmp_path):
    one = leave_sweep(tiny, tmp_path / "one", "0,1")
    two = leave_sweep(tiny, tmp_path / "two", "1,2")
    assert [c.seeds for c in found(one, two).conditions] == [[0, 1, 2]] * 3
    path = next(two.glob("*/seed-1/summary.json"))
    path.write_text(path.read_text().replace("state of", "another state of"))
    with pytest.raises(ConfigError, match="same run with different results"):
        read([one, two])


def test_run_directories_are_grouped_by_configuration_and_named_by_folder(tiny, tmp_path):
    for seed in (0, 1):
        leave_run(tmp_path / f"fedmd-{seed}", load(tiny, seed=seed)[0])
        alone, _ = load(tiny, ["method.name=local", "privacy.mechanism=none"], seed)
        leave_run(tmp_path / "alone" / f"seed-{seed}", alone, 0.5)
    leave_run(tmp_path / "run-3", load(tiny, ["method.temperature=3"], 0)[0])
    leave_run(tmp_path / "deep" / "run-3", load(tiny, ["method.temperature=4"], 0)[0])
    places = ["fedmd-1", "fedmd-0", "alone/seed-0", "alone/seed-1", "run-3", "deep/run-3"]
    conditions, _ = read([tmp_path / place for place in places])
    assert [(c.label, c.seeds) for c in conditions] == [
        ("fedmd", [0, 1]), ("alone", [0, 1]), ("run-3 (1)", [0]), ("run-3 (2)", [0]),
    ]  # fmt: skip
    assert compare(conditions).baseline.label == "alone"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.alpha=1.0"], "data.alpha is 0.5 and 1.0; choose with --where data.alpha=..."),
        (["data.partition=iid"], "data.alpha is 0.5 and None"),
        (["data.test=50"], "data.test"),
        (["data.limit=1500"], "data.limit is None and 1500"),
        (["data.public=100"], "data.public + labelled + reserve is 200 and 100"),
        (["federation.clients=5"], "federation.clients is 4 and 5"),
        (["audit.canaries=20"], "audit.canaries is 40 and 20"),
    ],
)
def test_runs_on_other_records_are_not_paired(tiny, tmp_path, overrides, words):
    leave_run(tmp_path / "one", load(tiny)[0])
    leave_run(tmp_path / "other", load(tiny, overrides)[0])
    with pytest.raises(ConfigError) as error:
        found(tmp_path / "one", tmp_path / "other")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_reserved_images_are_as_good_as_public_ones(tiny, tmp_path):
    leave_run(tmp_path / "one", load(tiny)[0])
    leave_run(tmp_path / "alone", load(tiny, ["method.name=local", "privacy.mechanism=none", "federation.rounds=9"])[0])
    check_pairs(read([tmp_path / "one", tmp_path / "alone"])[0])


def test_where_chooses_what_can_be_paired(tiny, tmp_path):
    for name, alpha in (("a", 0.5), ("b", 1.0), ("c", 1.0)):
        overrides = [f"data.alpha={alpha}"] + ["method.temperature=2"] * (name == "c")
        leave_run(tmp_path / name, load(tiny, overrides)[0])
    places = [tmp_path / name for name in "abc"]
    chosen, _ = read(places, ["data.alpha=1"])
    assert [c.label for c in compare(chosen).conditions] == ["b", "c"]
    with pytest.raises(ConfigError, match="no finished run that --where lets through"):
        read(places, ["data.alpha=7.0"])
    with pytest.raises(ConfigError, match="expected key=value"):
        read(places, ["data.alpha"])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda run: (run / "summary.json").unlink(), "no summary.json here"),
        (lambda run: (run / "config.toml").unlink(), "no config.toml here"),
        (lambda run: (run / "summary.json").write_text("{"), "cannot be read"),
        (lambda run: (run / "summary.json").write_text("[]"), "not of one run"),
        (lambda run: (run / "summary.json").write_text('{"config_hash": "0"}'), "not of one run"),
        (lambda run: (run / "config.toml").write_text("= 3"), "cannot be read"),
    ],
)
def test_damaged_runs_are_refused(tiny, tmp_path, damage, words):
    run = leave_run(tmp_path / "run", load(tiny)[0])
    damage(run)
    with pytest.raises(ConfigError, match=re.escape(words)):
        read([run])


def test_a_run_that_is_not_the_sweeps_is_refused(swept, tiny):
    place = next(swept.glob("*/seed-0"))
    other = leave_run(swept / "other", load(tiny, ["method.lr=0.5"])[0])
    for name in ("config.toml", "summary.json"):
        (place / name).write_bytes((other / name).read_bytes())
    with pytest.raises(ConfigError, match=r"not the run that sweep\.json names"):
        read([swept])


@pytest.mark.slow
def test_the_files_repeat_byte_for_byte_wherever_the_runs_are(tiny, tmp_path):
    deep = tmp_path / "deep" / "er"
    deep.mkdir(parents=True)
    here, there = leave_sweep(tiny, tmp_path / "swept"), leave_sweep(tiny, deep / "swept")
    assert default_place([here]) == here
    one, two = (
        write(found(place, metrics=["balanced", "epsilon"]), tmp_path / name)
        for place, name in ((here, "one"), (there, "two"))
    )
    assert [path.name for path in one] == FILES
    for first, second in zip(one, two, strict=True):
        assert first.read_bytes() == second.read_bytes()
    assert not list((tmp_path / "one").glob(".*"))
    assert str(tmp_path) not in one[0].read_text()


@pytest.mark.slow
def test_the_json_has_all_numbers(swept, tmp_path):
    path = write(found(swept), tmp_path)[0]
    said = json.loads(path.read_text())
    assert said["baseline"] == "training alone"
    assert "Student" in said["statistics"]
    assert said["versions"]["fedkd"] == ["0.1.0"]
    assert set(said["versions"]) == {"fedkd", "scipy"}
    assert said["machines"] == ["some machine"]
    first = said["conditions"][0]
    assert first["seeds"] == [0, 1, 2, 3]
    assert first["values"]["balanced"]["values"] == {str(k): v for k, v in enumerate(SCORES["ambassador"])}
    assert first["differences"]["balanced"]["n"] == 4
    assert first["runs"]["2"]["config_hash"] in (swept / "sweep.json").read_text()
    assert said["conditions"][2]["differences"] == {}


def text_of(svg: Path) -> str:
    return " ".join(
        "".join(node.itertext()).strip() for node in ET.fromstring(svg.read_text()).iter() if node.tag.endswith("}text")
    )


@pytest.mark.slow
def test_the_figures_say_what_they_show(swept, tmp_path):
    _, picture, _, curves, *_ = write(found(swept), tmp_path)
    said = text_of(picture)
    for word in ("ambassador", "training alone", "Balanced accuracy", "fraction correct", "points", "kB", "Holm p = ",
                 "more is better", "less is better", "no guarantee", "the same for all 4 seeds"):  # fmt: skip
        assert word in said
    assert "+10.5  [+8.4 to +12.6]" in said
    said = text_of(curves)
    for word in ("round", "Server's model", "Personal accuracy", "± one standard deviation", "training alone 0.625"):
        assert word in said
    said = text_of(tmp_path / "compare-bytes.svg")
    for word in ("sent so far", "100 kB", "a level line sends nothing", "training alone 0.725", "none 0.830"):
        assert word in said
    said = text_of(tmp_path / "compare-clients.svg")
    for word in ("client by client", "16 better, 0 worse", "of 16 clients; median +10.5", "baseline's best at the top"):
        assert word in said


EVIL = "<script> $x^{2$ & \"' ]]> 漢字"


@pytest.mark.slow
def test_hostile_labels_stay_text_and_one_seed_is_enough(tiny, tmp_path):
    leave_run(tmp_path / EVIL, load(tiny)[0], privacy={"epsilon": "inf"})
    leave_run(tmp_path / "[red]b", load(tiny, ["method.temperature=2"])[0], accuracy=None, audit=None)
    result = found(tmp_path / EVIL, tmp_path / "[red]b")
    path, picture, _, curves, *_ = write(result, tmp_path / "out")
    assert "<script> $x^{2$" in text_of(picture)
    assert all("<script> $x^{2$" in text_of(tmp_path / "out" / f"compare-{name}.svg") for name in ("bytes", "clients"))
    assert "<script> $x^{2$" in text_of(curves)
    assert "one pair: no interval" in text_of(picture)
    assert json.loads(path.read_text())["conditions"][0]["values"]["epsilon"]["mean"] == "inf"
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table(result))
    assert "[red]b" in console.export_text()


def test_labels_in_figures_are_short_but_distinct():
    labels = ["method.name=fedmd,privacy.epsilon=3", "method.name=local,privacy.epsilon=3", "a=1", "b.name=1", "1"]
    assert names(labels) == ["fedmd, epsilon=3", "local, epsilon=3", "a=1", "b.name=1", "1"]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=10))
def test_labels_stay_inside_the_panel(places):
    moved = inside(apart(places, 0.1), 0.1, 0.0, 1.0)
    assert np.argsort(moved, kind="stable").tolist() == np.argsort(apart(places, 0.1), kind="stable").tolist()
    assert all(step >= 0.1 - 1e-9 for step in np.diff(sorted(moved)))
    assert min(moved) >= -1e-9 and max(moved) <= 1 + 1e-9


def test_curves_keep_the_rounds_that_all_seeds_have(swept):
    condition = found(swept).conditions[0]
    (swept / condition.label / "seed-0" / "metrics.jsonl").write_text(
        '{"round": 1, "accuracy": {"balanced_mean": 0.5}}\n{"round": 2, "accuracy": null}\n'
    )
    assert {at: len(values) for at, values in curve(condition, METRICS["balanced"]).items()} == {1: 4}


def test_bytes_add_up_over_rounds(swept):
    here, _, alone = found(swept).conditions
    assert sent(here) == {1: 72_000, 2: 144_000, 3: 216_000, 4: 288_000}
    assert set(sent(alone).values()) == {0}


@pytest.mark.slow
def test_without_bytes_or_clients_there_are_fewer_figures_and_old_ones_go(tiny, tmp_path):
    run = leave_run(tmp_path / "run", load(tiny, ["method.name=local", "privacy.mechanism=none"])[0])
    (run / "clients.json").unlink()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "compare-targets.svg").write_text("of an earlier comparison")
    write(found(run), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "compare-curves.png", "compare-curves.svg", "compare.json", "compare.png", "compare.svg",
    ]  # fmt: skip
    (run / "clients.json").write_text("[3]")
    with pytest.raises(ConfigError, match=r"clients\.json: cannot be read"):
        write(found(run), tmp_path / "out")


def test_clients_are_paired_by_seed_and_client_in_the_baselines_order():
    base = {(0, 0): 0.5, (0, 1): 0.9, (1, 0): 0.7}
    new = {(0, 0): 0.75, (0, 1): 0.8, (1, 1): 1.0}
    assert moved(new, base) == {(0, 0): pytest.approx(25), (0, 1): pytest.approx(-10)}
    heights = order(base, [base, new])
    assert sorted(heights, key=heights.__getitem__) == [(0, 1), (1, 0), (0, 0), (1, 1)]  # from the top
    assert sorted(heights.values()) == pytest.approx([-0.4, -0.4 / 3, 0.4 / 3, 0.4])
    many = {(seed, k): (k + 20 * seed) / 40 for seed in (0, 1) for k in range(20)}
    assert worst(many) == pytest.approx(fmean([0.5 / 40, 20.5 / 40]))  # the lowest two of twenty, seed by seed


@pytest.mark.slow
def test_the_command(swept, tmp_path, fedkd, fedkd_here):
    done = fedkd("compare", swept, "--metric", "balanced", "--metric", "up", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    for word in ("training alone (baseline)", "+10.5 points", "+8.4 to +12.6", "Student's t", "same in all 4"):
        assert word in done.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(FILES)
    asked = fedkd_here("compare", swept, "--target", "balanced=0.7", "--metric", "up", "-o", tmp_path / "out")
    assert "Balanced accuracy ≥ 0.7" in asked.stdout and "3 of 4" in asked.stdout and "never" in asked.stdout
    assert (tmp_path / "out" / "compare-targets.png").exists()
    bad = fedkd_here("compare", swept, "--target", "balanced=70", "-o", tmp_path / "bad")
    assert (bad.returncode, len(bad.stderr.splitlines()), (tmp_path / "bad").exists()) == (2, 1, False)
    bad = fedkd_here("compare", tmp_path)
    assert bad.returncode == 2
    assert len(bad.stderr.splitlines()) == 1
    assert bad.stderr.startswith("ConfigError: ")
