import doctest
import math
from dataclasses import replace

import pytest

import privacy.calculator
from fedkd.errors import ConfigError
from privacy.accounting import epsilon
from privacy.calculator import ABOUT, Question, against_cohort, against_rounds, comparisons
from privacy.events import Event
from privacy.releases import Poisson, Shuffled, WithoutReplacement

CLIENTS = Question(
    noise=1.0, steps=100, delta=1e-5, unit="client", observer="outsider", sampling=Poisson(0.2), units=100
)
ONE_OF_EACH = [
    Question(noise=4.0, steps=10, delta=1e-5),
    Question(noise=10.0, steps=10, delta=1e-5, kind="laplace"),
    Question(noise=6.0, steps=10, delta=1e-5, kind="counts", relation="replace"),
    Question(noise=0.3, steps=10, delta=1e-5, kind="labels", unit="label", relation="replace"),
    Question(noise=40.0, steps=10, delta=1e-5, kind="votes"),
    Question(noise=40.0, steps=10, delta=1e-5, kind="confident-votes", threshold_noise=150.0, answers=4),
]


@pytest.mark.slow
def test_the_sampling_table_is_what_explain_shows():
    found = {(row.reading, row.relation, row.accountant): row.epsilon for row in comparisons(CLIENTS)}

    expected = {
        ("as asked", "add_remove", "PLD"): 14.527517922603613,
        ("as asked", "add_remove", "RDP"): 16.081655440721068,
        ("no amplification, every release", "add_remove", "PLD"): 91.81728962407377,
        ("no amplification, 20 turns by a fixed schedule", "add_remove", "PLD"): 28.373473804682845,
        ("Poisson, rate 0.2", "replace", "PLD"): 23.673293108954773,
        # Over twice the clipping norm; over the norm itself it would be 29.8, which is no bound.
        ("exactly 20 of 100", "replace", "RDP"): 178.16941400319038,
    }
    basic = "sum of single releases, delta shared out", "add_remove", "basic"
    assert found.keys() == {*expected, basic}
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=1e-3)
    assert found[basic] == pytest.approx(100 * epsilon([Event(1.0, 0.2)], 1e-7, "add_remove"), abs=0.1)


@pytest.mark.parametrize("asked", ONE_OF_EACH, ids=lambda asked: asked.kind)
def test_every_kind_has_a_statement_and_more_noise_costs_less(asked):
    said = asked.statement()
    quieter = replace(asked, noise=asked.noise * (2 if asked.kind != "labels" else 0.5))

    assert 0 < quieter.statement().epsilon < said.epsilon < said.rdp
    assert (said.unit, said.relation, said.delta) == (asked.unit, asked.relation, asked.delta)
    for part in ("Sampling: ", "Accountant: ", "Second opinion", "Assumed: ", "Not covered: "):
        assert part in str(said)
    assert asked.kind in ABOUT


@pytest.mark.parametrize("asked", ONE_OF_EACH, ids=lambda asked: asked.kind)
def test_the_noise_for_an_epsilon_keeps_it(asked):
    found = asked.with_epsilon(1.0)

    assert 0.98 < found.statement().epsilon <= 1.0
    assert replace(found, noise=asked.noise) == asked


@pytest.mark.parametrize("relation", ["add_remove", "replace"])
def test_noise_is_over_the_clip_whatever_the_relation(relation):
    asked = Question(noise=1.0, steps=100, delta=1e-5, relation=relation, sampling=Poisson(0.1), clip=3.0)
    found = asked.with_epsilon(3.0)

    assert 2.99 < found.statement().epsilon <= 3.0
    assert f"the sum moves by {3.0 if relation == 'add_remove' else 6.0:g} at most" in str(found.statement())


def test_the_clip_changes_no_epsilon():
    asked = ONE_OF_EACH[0]

    assert replace(asked, clip=7.0).statement().epsilon == asked.statement().epsilon


def test_fixed_cohorts_are_priced_by_renyi_once():
    asked = replace(CLIENTS, relation="replace", sampling=WithoutReplacement(20, 100), noise=2.0)
    said = asked.statement()

    assert said.epsilon == pytest.approx(29.803512372820027)
    assert "Renyi" in said.accountant
    assert said.rdp is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise": 0.0}, "noise should be positive"),
        ({"noise": math.inf}, "noise should be"),
        ({"clip": 0.0}, "clip should be positive"),
        ({"clip": math.inf}, "clip should be"),
        ({"steps": 0}, "steps should be"),
        ({"delta": 0.01}, "below 1/100"),
        ({"delta": 0.0}, "delta should be"),
        ({"kind": "tree"}, "kind should be"),
        ({"relation": "swap"}, "relation should be"),
        ({"observer": "server"}, "the server draws the clients"),
        ({"sampling": Shuffled()}, "Poisson"),
        ({"sampling": Poisson(1.5)}, "rate should be in"),
        ({"kind": "votes"}, "sampling is priced for"),
        ({"unit": "label"}, "never absent"),
        ({"kind": "labels", "sampling": privacy.calculator.EVERYONE}, "unit label"),
        ({"kind": "confident-votes", "sampling": privacy.calculator.EVERYONE}, "threshold"),
    ],
    ids=str,
)
def test_bad_questions_are_refused_in_one_line(change, message):
    with pytest.raises(ConfigError, match=message) as refusal:
        replace(CLIENTS, **change).events()

    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("target", [0.0, -1.0, math.inf])
@pytest.mark.parametrize("asked", ONE_OF_EACH[:2], ids=lambda asked: asked.kind)
def test_bad_targets_are_refused(asked, target):
    with pytest.raises(ConfigError, match="target_epsilon"):
        asked.with_epsilon(target)


def test_curves():
    rounds = against_rounds(CLIENTS, [1, 100, 200])
    fixed_sum = against_cohort(CLIENTS, [10, 20, 40], mean_noise=False)
    fixed_mean = against_cohort(CLIENTS, [10, 20, 40], mean_noise=True)

    assert rounds == sorted(rounds)
    assert rounds[1] == fixed_sum[1] == pytest.approx(14.5275, abs=0.01)
    assert fixed_mean[1] == pytest.approx(fixed_sum[1])
    assert fixed_sum == sorted(fixed_sum)
    assert fixed_mean == sorted(fixed_mean, reverse=True)


def test_examples():
    assert doctest.testmod(privacy.calculator).failed == 0
