import doctest
import json
import math
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm

import privacy.accounting
from fedkd.errors import ConfigError
from privacy.accounting import (
    LIVE_INTERVAL,
    Event,
    _epsilon,
    _pld_epsilon,
    accountant,
    epsilon,
    merge,
)
from privacy.calibration import calibrate
from privacy.statement import Statement

VECTORS = json.loads(Path(__file__).with_name("vectors.json").read_text())
CLOSED_FORM = 1e-6  # relative
FINE, LIVE = 1e-3, 1e-2  # absolute, for the two intervals

events = st.builds(
    Event,
    noise_multiplier=st.floats(0.6, 20),
    sampling_rate=st.one_of(st.just(1.0), st.floats(0.01, 1)),
    steps=st.integers(1, 100),
)


def gaussian_delta(sigma: float, eps: float) -> float:
    """Balle and Wang 2018, equation 6, sensitivity 1: written out here, to be independent of the code under test."""
    return norm.cdf(0.5 / sigma - eps * sigma) - math.exp(eps) * norm.cdf(-0.5 / sigma - eps * sigma)


def integrated_delta(sigma: float, rate: float, eps: float, present: float, other: float) -> float:
    """Hockey-stick divergence of one sampled release between contributions at ``present`` and at ``other``."""

    def density(x: float, at: float) -> float:
        return rate * norm.pdf(x, at, sigma) + (1 - rate) * norm.pdf(x, 0, sigma)

    def excess(x: float) -> float:
        return max(density(x, present) - math.exp(eps) * density(x, other), 0.0)

    ends = np.linspace(-12 * sigma - 1, 12 * sigma + 1, 60)
    return sum(quad(excess, a, b)[0] for a, b in pairwise(ends))


# --- Epsilon ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", VECTORS["poisson_gaussian"]["rows"], ids=lambda row: row["name"])
def test_poisson_gaussian_agrees_with_four_accountants(row):
    event = Event(row["noise_over_contribution"], row["sampling_rate"], row["steps"])

    live = epsilon([event], row["delta"], "add_remove", LIVE_INTERVAL)

    assert live == pytest.approx(row["pld_1e3"], abs=LIVE)
    assert live < row["opacus_rdp"]
    low, high = row.get("prv_lower_upper", (0, math.inf))
    assert low < live < high + LIVE


@pytest.mark.slow
@pytest.mark.parametrize(
    "row", [row for row in VECTORS["poisson_gaussian"]["rows"] if row["pld_1e4"] < 10], ids=lambda row: row["name"]
)
def test_poisson_gaussian_at_the_final_interval(row):
    event = Event(row["noise_over_contribution"], row["sampling_rate"], row["steps"])

    assert epsilon([event], row["delta"], "add_remove") == pytest.approx(row["pld_1e4"], abs=FINE)


@pytest.mark.parametrize("row", VECTORS["poisson_gaussian"]["rows"], ids=lambda row: row["name"])
def test_replace_takes_noise_relative_to_twice_the_contribution(row):
    """dp-accounting is given std / C and doubles C; we are given std / (2 C)."""
    event = Event(row["noise_over_contribution"] / 2, row["sampling_rate"], row["steps"])

    assert epsilon([event], row["delta"], "replace", LIVE_INTERVAL) == pytest.approx(
        row["pld_replace_one_1e4"], abs=2 * LIVE
    )


@pytest.mark.parametrize("relation", ["add_remove", "replace"])
@pytest.mark.parametrize("row", VECTORS["analytic_gaussian"]["rows"], ids=str)
def test_one_gaussian_is_the_closed_form_under_both_relations(row, relation):
    value = epsilon([Event(row["sigma"])], row["delta"], relation)

    assert value == pytest.approx(row["epsilon"], rel=CLOSED_FORM)
    assert gaussian_delta(row["sigma"], value) == pytest.approx(row["delta"], rel=1e-4)


@pytest.mark.parametrize("relation", ["add_remove", "replace"])
@pytest.mark.parametrize("sigma", [1.0, 8.0])
def test_the_pld_route_agrees_with_the_closed_form_under_both_relations(sigma, relation):
    """The shortcut for unsampled releases and dp-accounting's PLD must mean the same sensitivity."""
    through_pld = _pld_epsilon((Event(sigma),), 1e-5, relation, LIVE_INTERVAL)
    nearly_everybody = epsilon([Event(sigma, 1 - 1e-9)], 1e-5, relation, LIVE_INTERVAL)

    assert gaussian_delta(sigma, through_pld) == pytest.approx(1e-5, rel=1e-3)
    assert nearly_everybody == pytest.approx(through_pld, abs=FINE)


@pytest.mark.parametrize("row", VECTORS["gaussian_steps"]["rows"], ids=str)
def test_gaussian_steps(row):
    whole, doubled = Event(row["sigma"], steps=row["steps"]), Event(row["sigma"] / 2, steps=row["steps"])
    delta = VECTORS["gaussian_steps"]["delta"]

    assert epsilon([whole], delta, "replace") == pytest.approx(row["analytic"], rel=CLOSED_FORM)
    assert epsilon([doubled], delta, "replace") == pytest.approx(row["pld_replace_one"], abs=FINE)


@pytest.mark.parametrize(("relation", "other"), [("add_remove", 0.0), ("replace", -0.5)])
def test_one_sampled_release_agrees_with_the_integral(relation, other):
    """Add/remove: a contribution of norm 1 or none. Replace: opposite contributions of norm 1/2, 1 apart."""
    sigma, rate, delta = 0.8, 0.3, 1e-3
    present = 1.0 if relation == "add_remove" else 0.5

    value = epsilon([Event(sigma, rate)], delta, relation, LIVE_INTERVAL)

    assert integrated_delta(sigma, rate, value, present, other) == pytest.approx(delta, rel=1e-3)


def test_sampled_replace_needs_the_norm_not_only_the_distance():
    """Two contributions of norm 1, sqrt(2) apart: std / sqrt(2) would promise a delta that the release breaks."""
    sigma, rate, eps = 0.5, 0.1, 2.0
    grid = np.linspace(-4, 5, 300)
    first, second = np.meshgrid(grid, grid)

    def density(x: float, y: float) -> np.ndarray:
        present = norm.pdf(first, x, sigma) * norm.pdf(second, y, sigma)
        return rate * present + (1 - rate) * norm.pdf(first, 0, sigma) * norm.pdf(second, 0, sigma)

    truth = np.maximum(density(1, 0) - math.exp(eps) * density(0, 1), 0).sum() * (grid[1] - grid[0]) ** 2

    assert epsilon([Event(sigma / 2, rate)], truth, "replace", LIVE_INTERVAL) >= eps  # what the docstring asks for
    assert epsilon([Event(sigma / math.sqrt(2), rate)], truth, "replace", LIVE_INTERVAL) < 1.5  # the tempting mistake


@pytest.mark.slow
@pytest.mark.parametrize("row", VECTORS["heterogeneous"]["rows"], ids=lambda row: row["name"])
def test_heterogeneous_composition(row):
    parts = [Event(*part) for part in row["events"]]

    assert epsilon(parts, row["delta"], "add_remove") == pytest.approx(row["pld_1e4"], abs=FINE)
    assert epsilon(parts, row["delta"], "add_remove", LIVE_INTERVAL) == pytest.approx(row["pld_1e3"], abs=LIVE)


@pytest.mark.parametrize("row", VECTORS["client_sampling"]["rows"], ids=str)
def test_client_sampling(row):
    event = Event(row["noise_multiplier"], row["sampling_rate"], row["steps"])

    value = epsilon([event], VECTORS["client_sampling"]["delta"], "add_remove", LIVE_INTERVAL)

    assert value == pytest.approx(row["pld"], abs=FINE)


def test_many_rows_equal_one_vector():
    row = VECTORS["logit_release"]
    each = Event(row["noise_multiplier"], steps=row["rows"])
    together = Event(row["noise_multiplier"] / math.sqrt(row["rows"]))

    for event in (each, together):
        assert epsilon([event], row["delta"], "add_remove") == pytest.approx(row["epsilon"], rel=CLOSED_FORM)


def test_nothing_costs_nothing_and_no_noise_costs_everything():
    assert epsilon([], 1e-5, "add_remove") == 0.0
    assert epsilon([Event(1.0), Event(0.0, 0.01)], 1e-5, "replace") == math.inf


def test_equal_events_are_merged_whatever_their_order():
    a, b = Event(1.0, 0.1, 3), Event(2.0)
    before = _epsilon.cache_info().misses

    first = epsilon([a, b, a], 1e-5, "add_remove", LIVE_INTERVAL)
    second = epsilon([Event(1.0, 0.1, 6), b], 1e-5, "add_remove", LIVE_INTERVAL)

    assert merge([a, b, a]) == merge([b, Event(1.0, 0.1, 6)]) == (Event(1.0, 0.1, 6), Event(2.0))
    assert first == second
    assert _epsilon.cache_info().misses == before + 1


@settings(derandomize=True, max_examples=10, deadline=None)
@given(history=st.lists(events, min_size=1, max_size=3), more=events)
def test_releases_cost_more_and_sampling_never_does(history, more):
    alone = epsilon(history, 1e-5, "add_remove", LIVE_INTERVAL)
    unsampled = [Event(event.noise_multiplier, 1.0, event.steps) for event in history]

    assert epsilon([*history, more], 1e-5, "add_remove", LIVE_INTERVAL) >= alone - 1e-6
    assert 0 <= alone <= epsilon(unsampled, 1e-5, "add_remove") + LIVE


@pytest.mark.slow
@pytest.mark.parametrize("relation", ["add_remove", "replace"])
def test_tiny_noise_is_bounded_in_time_and_still_counted(relation):
    start = time.process_time()
    value = epsilon([Event(0.02, 0.35, 3)], 1e-3, relation)

    assert 1_000 < value < epsilon([Event(0.02, 1.0, 3)], 1e-3, relation)
    assert time.process_time() - start < 15


@pytest.mark.parametrize("relation", ["add_remove", "replace"])
@pytest.mark.parametrize("rate", [0.35, 1.0])
def test_absurd_noise_is_priced_without_a_numerical_accident(rate, relation):
    assert epsilon([Event(1e-300, rate)], 1e-3, relation) == epsilon([Event(1e-6, rate)], 1e-3, relation) == math.inf
    assert epsilon([Event(1e300, rate, 80)], 1e-3, relation) == 0


# --- Calibration -----------------------------------------------------------------------------------------------------


def test_calibration_agrees_with_dp_accounting():
    row = VECTORS["calibration"]

    sigma = calibrate(row["epsilon"], row["delta"], row["sampling_rate"], row["steps"], "add_remove")

    assert sigma == pytest.approx(row["sigma"], rel=1e-3)


@pytest.mark.parametrize("row", VECTORS["analytic_gaussian"]["rows"], ids=str)
def test_calibration_without_sampling_is_the_closed_form(row):
    assert calibrate(row["epsilon"], row["delta"], 1.0, 9, "replace") == pytest.approx(3 * row["sigma"], rel=1e-6)


@pytest.mark.slow
@settings(derandomize=True, max_examples=6, deadline=None)
@given(
    target=st.floats(0.05, 12),
    delta=st.sampled_from([1e-3, 1e-5]),
    rate=st.one_of(st.just(1.0), st.floats(0.005, 0.99)),
    steps=st.integers(1, 200),
    relation=st.sampled_from(["add_remove", "replace"]),
)
def test_calibration_keeps_the_promise_and_wastes_nothing(target, delta, rate, steps, relation):
    sigma = calibrate(target, delta, rate, steps, relation)
    spent = epsilon([Event(sigma, rate, steps)], delta, relation)

    assert spent <= target
    assert spent >= 0.999 * target or sigma == 0.2


def test_calibration_is_fast_and_cached():
    arguments = (10.0, 1e-3, 0.35, 80, "add_remove")
    start = time.process_time()
    sigma = calibrate(*arguments)
    cold = time.process_time() - start
    start = time.process_time()

    assert calibrate(*arguments) == sigma
    assert time.process_time() - start < 1e-3
    assert cold < 3  # 0.6 on an idle machine
    assert 0.9999 * 10 < epsilon([Event(sigma, 0.35, 80)], 1e-3, "add_remove") <= 10


@pytest.mark.slow
def test_calibration_stops_where_delta_alone_pays():
    """A unit takes part in five releases with probability 5e-6, less than delta: any noise will do."""
    assert calibrate(1.0, 1e-3, 1e-6, 5, "add_remove") == 0.2


# --- Events, statements, errors --------------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None)
@given(events)
def test_event_round_trip(event):
    assert Event.from_json(json.loads(json.dumps(event.to_json()))) == event


def test_numpy_numbers_become_plain_ones():
    event = Event(np.float32(0.5), np.float64(0.25), np.int64(3))

    assert event == Event(0.5, 0.25, 3)
    assert json.loads(json.dumps(event.to_json()))["steps"] == 3


@pytest.mark.parametrize(
    "arguments",
    [
        (-1.0,),
        (math.nan,),
        (math.inf,),
        ("x",),
        (1.0, 0.0),
        (1.0, 1.1),
        (1.0, math.nan),
        (1.0, 1.0, 0),
        (1.0, 1.0, 1.5),
    ],
    ids=str,
)
def test_bad_events_are_refused(arguments):
    with pytest.raises(ConfigError, match="should be"):
        Event(*arguments)


@pytest.mark.parametrize(
    "value",
    [{"kind": "laplace", "noise_multiplier": 1.0}, {"kind": "gaussian"}, {"kind": "gaussian", "sigma": 1.0}, {}],
    ids=str,
)
def test_unknown_event_json_is_refused(value):
    with pytest.raises(ConfigError, match="event"):
        Event.from_json(value)


@pytest.mark.parametrize(
    ("delta", "relation", "interval"),
    [(0.0, "add_remove", 1e-3), (1.0, "replace", 1e-3), (1e-5, "remove", 1e-3), (1e-5, "replace", 0.0)],
)
def test_bad_queries_are_refused(delta, relation, interval):
    with pytest.raises(ConfigError, match="should be"):
        epsilon([], delta, relation, interval)


@pytest.mark.parametrize("target", [0.0, -1.0, math.inf, math.nan])
def test_bad_targets_are_refused(target):
    with pytest.raises(ConfigError, match="target_epsilon"):
        calibrate(target, 1e-5, 0.1, 10, "add_remove")


def statement(**changes) -> Statement:
    values = {
        "epsilon": 2.00001,
        "delta": 1e-3,
        "unit": "record",
        "relation": "replace",
        "view": "the server sees released logits",
        "sampling": "Poisson, rate 0.35",
        "accountant": accountant(),
        "upper_bound": True,
        "assumptions": ("clients are disjoint",),
        "exclusions": ("n_k", "timing"),
    }
    return Statement(**(values | changes))


def test_a_statement_says_all_it_holds_and_never_rounds_down():
    text = str(statement())

    assert "\n" not in text
    for part in (
        "replacing one record of one client",
        "at most 2.001",
        "delta 0.001",
        "the server sees released logits",
        "Poisson, rate 0.35",
        "dp-accounting 0.6",
        "Assumed: clients are disjoint.",
        "Not covered: n_k; timing.",
    ):
        assert part in text


def test_an_estimate_is_not_called_a_bound():
    text = str(statement(upper_bound=False, unit="client", relation="add_remove"))

    assert "an estimate, not a bound" in text
    assert "at most" not in text
    assert "adding or removing all data of one client" in text


def test_no_mechanism_claims_no_privacy():
    open_statement = statement(epsilon=math.inf)

    assert "no differential privacy is claimed" in str(open_statement)
    assert "inf" not in str(open_statement)
    assert "Not covered" in str(open_statement)
    assert json.loads(json.dumps(open_statement.to_json(), allow_nan=False))["epsilon"] is None


def test_statement_to_json_has_every_field():
    value = json.loads(json.dumps(statement().to_json(), allow_nan=False))

    assert value["epsilon"] == 2.00001
    assert value["exclusions"] == ["n_k", "timing"]
    assert set(value) == {*Statement.__dataclass_fields__, "rdp_ratio"}
    assert value["rdp"] is value["rdp_ratio"] is None


@pytest.mark.parametrize("change", [{"epsilon": -1.0}, {"epsilon": math.nan}, {"unit": "user"}, {"relation": "swap"}])
def test_bad_statements_are_refused(change):
    with pytest.raises(ConfigError, match="should be"):
        statement(**change)


def test_importing_the_ledger_does_not_load_the_accountant():
    """scipy.stats and dp-accounting take most of a second, which every worker process would pay."""
    code = "import sys, privacy.ledger; sys.exit('dp_accounting' in sys.modules or 'scipy' in sys.modules)"

    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(privacy.accounting.__file__).parents[1])


def test_examples():
    assert doctest.testmod(privacy.accounting).failed == 0
