"""The bench runs, says what it measured, and what it could not."""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from experiments.bench import text
from experiments.bench.child import Child, Process, _marked
from experiments.bench.figure import draw
from experiments.bench.measure import measure, paired, reached, spread
from experiments.bench.run import choose
from experiments.bench.show import amount, table, times, verdict
from experiments.bench.spec import Contender, Reach, Settings, Unavailable, Work
from experiments.bench.start import run
from experiments.bench.works import TEMPERED, WORKS
from fedkd.config import load
from fedkd.errors import ConfigError
from fedkd.federation import build

ALIKE = ("trivial1000", "pfl-cnn")  # other sizes of trivial10 and pfl-mlp
ENTRY = {"name", "about", "ours", "first", "samples", "value", "ratio", "reach", "trouble"}


def contender(name, values, *, reach=None, ours=True, closed=None):
    """Takes the given times, one after the other; a string is what it fails with."""

    @contextmanager
    def opened():
        left = iter(values)

        def step() -> float:
            value = next(left)
            if isinstance(value, str):
                raise RuntimeError(value)
            return value

        yield step
        if closed is not None:
            closed.append(name)

    return Contender(name, f"about {name}", opened, reach, ours)


def work(*contenders, **how):
    how = {"reference": contenders[0].name, **how}
    return Work("work", "something to do", sizes=lambda _: {"clients": 10}, contenders=lambda _: contenders, **how)


@pytest.fixture
def settings(tmp_path):
    return Settings(tmp_path, quick=True, ray=False)


def entries(found):
    return {one["name"]: one for one in found["contenders"]}


def test_the_first_time_is_kept_apart_and_ratios_are_taken_turn_by_turn(settings):
    slow_machine = work(
        contender("reference", [9.0, 1.0, 10.0, 2.0]),
        contender("twice", [30.0, 2.0, 20.0, 5.0], reach=Reach(2, "ratio")),
    )
    found = entries(measure(slow_machine, settings, 3))
    twice = found["twice"]
    assert (twice["first"], twice["samples"]) == (30.0, [2.0, 20.0, 5.0])
    assert twice["value"] == {"median": 5.0, "min": 2.0, "max": 20.0}
    assert twice["ratio"] == {"median": 2.0, "min": 2.0, "max": 2.5}  # medians alone would give 2.5
    assert twice["reach"] == {"limit": 2, "of": "ratio", "met": True}
    assert found["reference"]["ratio"] == {"median": 1.0, "min": 1.0, "max": 1.0}


def test_contenders_take_turns(settings):
    order = []

    def noting(name):
        @contextmanager
        def opened():
            yield lambda: order.append(name) or 1.0

        return Contender(name, "", opened)

    measure(work(noting("a"), noting("b")), settings, 2)
    assert order == ["a", "b"] * 3


def test_a_work_may_have_no_warm_up_and_fewer_turns(settings):
    found = entries(measure(work(contender("a", [1.0, 2.0, 3.0]), warm=False, most=2), settings, 7))
    assert (found["a"]["first"], found["a"]["samples"]) == (None, [1.0, 2.0])


def test_who_cannot_run_says_why_and_stops_nobody(settings):
    @contextmanager
    def absent():
        raise Unavailable("not installed: it")
        yield

    closed = []
    found = entries(
        measure(
            work(
                contender("good", [1.0, 1.0, 1.0], closed=closed),
                Contender("absent", "", absent),
                contender("breaks", [1.0, 2.0, "no\nmore"], reach=Reach(1, "value"), closed=closed),
            ),
            settings,
            2,
        )
    )
    assert found["absent"]["trouble"] == "not installed: it"
    assert found["absent"]["value"] is found["absent"]["ratio"] is found["absent"]["reach"] is None
    assert found["breaks"]["trouble"] == "failed: RuntimeError: no"
    assert found["breaks"]["samples"] == [2.0]
    assert found["good"]["samples"] == [1.0, 1.0]
    assert closed == ["breaks", "good"]


def test_a_missing_reference_leaves_ratios_out(settings):
    reach = Reach(1.1, "ratio")
    found = entries(measure(work(contender("gone", ["no"]), contender("a", [1.0, 1.0], reach=reach)), settings, 1))
    assert found["a"]["ratio"] is None
    assert found["a"]["reach"] == {"limit": 1.1, "of": "ratio", "met": None}


def test_limits_spreads_and_pairs():
    assert spread([]) is None
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert paired([2.0, 3.0], [1.0]) == [2.0]
    assert paired([2.0], [0.0]) == []
    assert reached(None, None, None) is None
    met = {limit: reached(Reach(limit, "value"), spread([2.0]), None)["met"] for limit in (1.9, 2.0)}
    assert met == {1.9: False, 2.0: True}


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (1.234, "s", "1.23 s"),
        (0.0123, "s", "12.3 ms"),
        (0.4, "s", "400 ms"),
        (2e-6, "s", "2.00 µs"),
        (1234.4, "MB", "1,234 MB"),
    ],
)
def test_amounts_have_three_digits(value, unit, text):
    assert amount(value, unit) == text


def test_words_of_the_table():
    assert [times(spread([v])) for v in (0.5, 12.34, 1234.0)] == ["0.50x", "12.3x", "1234x"]
    assert times(None) == ""
    one = {"reach": {"limit": 0.005, "of": "value", "met": True}}
    assert verdict(one, "s") == "kept: 5.00 ms"
    assert verdict({"reach": {"limit": 1.1, "of": "ratio", "met": False}}, "s") == "missed: 1.10x"
    assert verdict({"reach": None}, "s") == ""


def results(settings):
    found = measure(
        work(
            contender("by hand", [1.0, 1.0, 1.2], ours=False),
            contender("loop", [1.0, 1.1, 1.3], reach=Reach(1.1, "ratio")),
            contender("pool", [1.0, 0.2, 0.3], reach=Reach(0.1, "value")),
            contender("gone", ["no"]),
        ),
        settings,
        2,
    )
    place = {"processor": "a processor", "usable_cores": 2}
    return {"quick": False, "repeats": 2, "machine": place, "works": [found]}


@pytest.mark.slow
def test_equal_results_give_equal_figures(tmp_path, settings):
    for name in ("a", "b"):
        draw(results(settings), tmp_path / name)
    for kind in ("svg", "png"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()
    assert table(results(settings)).row_count == 5  # and an empty line


def test_no_figure_of_nothing(tmp_path):
    draw({"works": []}, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_an_unknown_work_is_refused_with_a_near_one():
    with pytest.raises(ConfigError, match=r"got 'fedmd'; did you mean 'kd-fedmd'\?"):
        choose(["fedmd"])


def test_works_come_in_the_benchs_own_order():
    assert [w.name for w in choose(["memory", "start"])] == ["start", "memory"]


def test_swing_and_plain_distillation_have_the_same_records_and_only_one_has_scores(settings):
    scores = {"none": {"sigma": 0.0}, "regex": TEMPERED, "oracle": TEMPERED}
    made = {one: build(text.config(settings, 2, 20, 4, {"score": one, **more})) for one, more in scores.items()}
    records = {one: federation.train_set(0)[1] for one, federation in made.items()}
    assert all(bool((records["none"] == other).all()) for other in records.values())
    assert made["none"].notes(0) == {}
    hot = {one: float(made[one].notes(0)["scores"].mean()) for one in ("regex", "oracle")}
    assert all(0 < share < 0.3 for share in hot.values())


def test_exposure_is_timed_over_all_secrets(settings):
    found = entries(measure(WORKS["exposure"], settings, 1))["trie"]
    assert found["trouble"] is None and found["reach"]["met"]


@pytest.mark.slow
def test_a_child_that_ends_says_its_last_words():
    with Child("experiments.bench.nothing:here", {}) as child, pytest.raises(Unavailable, match="No module named"):
        child.await_ready()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds what is left through /proc")
def test_what_a_child_leaves_behind_is_ended():
    leave = "import subprocess; subprocess.Popen(['sleep', '60'], start_new_session=True)"
    with Process(["-c", leave]) as process:
        process.process.wait(20)
        assert len(_marked(process.mark)) == 1
    deadline = time.monotonic() + 5
    while _marked(process.mark) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert _marked(process.mark) == []


@pytest.mark.slow
def test_engines_that_are_open_at_once_keep_their_own_configuration(settings):
    with run(settings, "loop")(), run(settings, "pool")():
        engines = {path.stem: load(path)[0].engine.name for path in settings.folder.glob("*.toml")}
    assert engines == {"start-loop": "loop", "start-pool": "pool"}


@pytest.mark.slow
def test_every_kind_of_work_runs(tmp_path, fedkd):
    names = [one.name for one in choose([]) if one.name not in ALIKE]
    done = fedkd("bench", *names, "--quick", "--no-ray", "--repeats", "1", "-o", tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["format"] == 1
    assert found["quick"] is True
    assert found["machine"]["cores"] >= 1
    assert found["versions"]["torch"]
    assert [w["name"] for w in found["works"]] == names
    for one in (one for w in found["works"] for one in w["contenders"]):
        assert set(one) == ENTRY
        assert (one["value"] is None) == (one["trouble"] is not None)
        if one["trouble"] is not None:
            assert one["trouble"].startswith(("left out", "not installed")), one
        else:
            assert 0 < one["value"]["min"] <= one["value"]["median"] <= one["value"]["max"]
    assert "left out: --no-ray" in done.stdout
    assert (tmp_path / "bench.svg").read_text().startswith("<?xml")
    assert (tmp_path / "bench.png").stat().st_size > 1000


@pytest.mark.integration
def test_flowers_runtime_takes_its_turns(tmp_path, fedkd):
    done = fedkd("bench", "trivial10", "--quick", "--repeats", "1", "-o", tmp_path)
    found = json.loads((tmp_path / "bench.json").read_text())["works"][0]
    assert entries(found)["Flower, Ray"]["trouble"] is None, done.stdout
    assert entries(found)["Flower, Ray"]["value"]["median"] > 0
