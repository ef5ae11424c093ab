"""Adaptive clipping: what a client can move, both events as one, noise, a bound that finds its quantile, and its way
through messages and checkpoints."""

import math
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clients.client import open_site
from experiments import files
from experiments.run import Run
from fedkd import federation as federations
from fedkd.checkpoint import load
from fedkd.config import Config
from fedkd.errors import ConfigError, PrivacyError
from fedkd.knowledge import Knowledge
from fedkd.method import Peer
from privacy.accounting import epsilon
from privacy.adaptive import BELOW, CLIP, AdaptiveUpdate
from privacy.events import Event
from privacy.gate import Pool, Released
from privacy.mechanism import without_control
from privacy.mechanisms import refuse
from strategies.fedavg import FedAvg
from tests.helpers.small import config, run

WEIGHTS = {"w": torch.linspace(-1, 1, 60).view(6, 10), "b": torch.full((10,), 2.0)}
ODD = (math.nan, math.inf, -math.inf, 0.0, 3e38, -3e38, 1e20, 1e-30, 1.0)


def adaptive(trust: str = "server", **changes) -> AdaptiveUpdate:
    relation = "replace" if trust == "client" else "add_remove"
    values = {"clip": 0.5, "quantile": 0.5, "cohort": 4, "noise_multiplier": 1.7, "budget": 5.0}
    return AdaptiveUpdate(trust=trust, relation=relation, **{**values, **changes})


def down(clip: float = 0.5, weights=WEIGHTS) -> Knowledge:
    return Knowledge({**weights, CLIP: torch.tensor(clip)})


def trained(length: float, seed: int = 0, weights=WEIGHTS) -> Knowledge:
    """What came down, moved by an update of a length."""
    g = torch.Generator().manual_seed(seed)
    step = {name: torch.randn(value.shape, generator=g) for name, value in weights.items()}
    norm = math.sqrt(sum(float(part.square().sum()) for part in step.values()))
    return Knowledge({name: value + length / norm * step[name] for name, value in weights.items()}, torch.tensor(9.0))


def moved(said: Knowledge, weights=WEIGHTS) -> Tensor:
    return torch.cat([(said.tensors[name] - value).double().flatten() for name, value in weights.items()])


def pool_of(here: AdaptiveUpdate, said: list[Knowledge], told: Knowledge, seed: int = 0) -> Pool:
    """What the server gets of raw answers."""
    rng, answers = np.random.default_rng(seed), []
    for k, raw in enumerate(said):
        answers.append(Released(Peer(k, "mlp"), 1, here.noise(here.bound(raw, told), rng, told), ()))
    return Pool(answers, here, rng, told)


# --- Sensitivity -----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.one_of(st.sampled_from(ODD), st.floats(width=32)), min_size=3, max_size=3),
    clip=st.floats(0.01, 100),
)
def test_update_and_bit_are_bounded_whatever_a_client_holds(values, clip):
    weights = {"w": torch.tensor([0.5, -1.0, 0.0])}
    bounded = adaptive().bound(Knowledge({"w": torch.tensor(values)}), down(clip, weights))
    assert float(moved(bounded, weights).norm()) <= clip * (1 + 1e-4) + 1e-6  # the weights themselves are rounded
    assert abs(float(bounded.tensors[BELOW])) == 0.5 and bounded.weight == 1
    assert set(bounded.tensors) == {"w", BELOW}


@pytest.mark.parametrize(("length", "bit"), [(0.0, 0.5), (0.3, 0.5), (0.499, 0.5), (0.501, -0.5), (1e6, -0.5)])
def test_the_bit_says_whether_the_update_was_within_the_bound_that_came_down(length, bit):
    bounded = adaptive(clip=7.0).bound(trained(length), down(0.5))
    assert float(bounded.tensors[BELOW]) == bit
    assert float(moved(bounded).norm()) == pytest.approx(min(length, 0.5), abs=1e-5)


@pytest.mark.parametrize("trust", ["client", "server"])
def test_one_client_moves_update_and_bit_by_no_more_than_their_noise_assumes(trust):
    """In units of the noise: with both moves together, by what one release at ``noise_multiplier`` is moved by."""
    here, told = adaptive(trust), down(0.5)
    most_update, most_bit = (1.0, 1.0) if trust == "client" else (0.5, 0.5)
    assert here._at(told)._std == pytest.approx(here._update_multiplier * most_update)
    assert here._bit_std == pytest.approx(here._count_multiplier * most_bit)
    ends = [here.bound(trained(length, seed), told) for length in (0.0, 0.4, 1e3) for seed in (0, 1)]
    ends.append(here.bound(Knowledge({name: 2 * t - ends[-1].tensors[name] for name, t in WEIGHTS.items()}), told))
    far = []
    for one in ends:
        for other in ends if trust == "client" else [here.bound(Knowledge(dict(WEIGHTS)), told)]:
            alone = trust == "server"  # adding a client, so its own message counts and not a difference
            update = moved(one) if alone else moved(one) - moved(other)
            bit = float(one.tensors[BELOW]) - (0.0 if alone else float(other.tensors[BELOW]))
            assert float(update.norm()) <= most_update * (1 + 1e-4) and abs(bit) <= most_bit
            far.append(math.hypot(float(update.norm()) / here._at(told)._std, bit / here._bit_std))
    assert max(far) <= (1 + 1e-4) / here.noise_multiplier
    assert max(far) > 0.9 / here.noise_multiplier


# --- Events ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
def test_both_events_are_together_exactly_the_one_that_was_calibrated(share):
    here = adaptive(count_share=share, noise_multiplier=2.5)
    two = here.events()
    assert len(two) == 2 and math.hypot(*(1 / e.noise_multiplier for e in two)) == pytest.approx(1 / 2.5, rel=1e-12)
    assert (1 / two[1].noise_multiplier) ** 2 == pytest.approx(share / 2.5**2)
    one = epsilon([Event(2.5, steps=9)], 1e-5, "replace")
    assert epsilon(two * 9, 1e-5, "replace") == pytest.approx(one, rel=1e-9)


def federated(rounds: int = 4, **privacy) -> Config:
    cfg = config("fedavg", model="linear", federation={"rounds": rounds})
    told = {"mechanism": "gaussian", "trust": "server", "epsilon": 50.0, "clip": 0.3, "quantile": 0.5, **privacy}
    return Config.from_raw({**cfg.raw(), "privacy": told})


def test_a_whole_run_books_at_most_epsilon_and_nearly_it():
    here = open_site(federations.build(federated(epsilon=3.0, count_share=0.2))).mechanism
    assert isinstance(here, AdaptiveUpdate) and here.count_share == 0.2
    assert 0.99 * 3 < epsilon(here.events() * 4, here.delta, here.relation) <= 3 < epsilon(
        here.events() * 5, here.delta, here.relation
    )  # fmt: skip


# --- Noise -----------------------------------------------------------------------------------------------------------

MANY = {"w": torch.zeros(100, 100)}


def is_chi_square(z: Tensor) -> bool:
    n = z.numel()
    return abs(float(z.double().square().sum()) - n) < 5 * math.sqrt(2 * n)


@pytest.mark.parametrize(("trust", "answered"), [("client", 1), ("server", 4), ("server", 2)])
def test_the_noise_on_updates_is_as_strong_as_claimed_at_the_bound_that_came_down(trust, answered):
    here, told = adaptive(trust, clip=99.0, count_share=0.2), down(0.25, MANY)
    bounded = [here.bound(trained(5.0, seed, MANY), told) for seed in range(answered)]
    rng = np.random.default_rng(0)
    if trust == "client":
        got, plain, std = here.noise(bounded[0], rng, told), moved(bounded[0], MANY), 1.7 / 0.8**0.5 * 2 * 0.25
    else:
        assert here.noise(bounded[0], rng, told) is bounded[0]
        got, std = here.noisy_mean(bounded, rng, told), 1.7 / 0.8**0.5 * 0.25 / 4
        plain = sum(moved(one, MANY) for one in bounded) / 4
    z = (moved(got, MANY) - plain) / std
    assert is_chi_square(z) and not is_chi_square(1.1 * z)


@pytest.mark.parametrize("trust", ["client", "server"])
@pytest.mark.parametrize("cohort", [None, 400])
def test_the_noise_on_bits_is_as_strong_as_claimed(trust, cohort):
    here, told = adaptive(trust, count_share=0.2, noise_cohort=cohort if trust == "server" else None), down(1.0)
    bounded = [here.bound(trained(length), told) for length in (0.1, 0.2, 0.3, 5.0)]
    divisor = here.noise_cohort or 4
    bits, rng = [], np.random.default_rng(0)
    for _ in range(600):
        if trust == "client":
            got, plain, std = here.noise(bounded[0], rng, told), 0.5, 1.7 / 0.2**0.5
        else:
            got, plain, std = here.noisy_mean(bounded, rng, told), 1 / 4, 1.7 / 0.2**0.5 * 0.5 / divisor
        bits.append((float(got.tensors[BELOW]) - plain) / std)
    z = torch.tensor(bits)
    assert is_chi_square(z) and not is_chi_square(1.3 * z) and not is_chi_square(z / 1.3)


@pytest.mark.parametrize("trust", ["client", "server"])
@pytest.mark.parametrize("noise", [0.01, 0.2])
def test_signal_to_noise_is_that_of_the_update(trust, noise):
    here, told = adaptive(trust, noise_multiplier=noise / (8 if trust == "client" else 1)), down(0.5, MANY)
    same = [trained(0.4, 0, MANY) for _ in range(4)]
    pools = [pool_of(here, same, told, seed) for seed in range(8)]
    std = here._at(told)._std / (4 if trust == "server" else 2)
    true = 0.4 / (std * 100)
    assert np.mean([pool.signal_to_noise() for pool in pools]) == pytest.approx(true, rel=0.15)


# --- The bound -------------------------------------------------------------------------------------------------------


def followed(first: float, quantile: float, norms, rounds: int, trust: str = "server", noise: float = 0.5) -> list:
    """Bounds of successive rounds of 50 clients whose updates have given norms, through the pool as in a run."""
    here = adaptive(trust, clip=first, quantile=quantile, cohort=50, noise_multiplier=noise)
    weights, control, bounds = {"w": torch.zeros(3)}, here.control(), []
    rng = np.random.default_rng(1)
    for t in range(rounds):
        told = down(float(control["clip"]), weights)
        said = [trained(float(x), k, weights) for k, x in enumerate(norms(rng, 50))]
        pool = pool_of(here, said, told, seed=t)
        assert set(pool.mean.tensors) == {"w"}
        control = pool.control(control)
        bounds.append(float(control["clip"]))
    return bounds


def lognormal(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.lognormal(0.0, 0.5, n)


@pytest.mark.parametrize("first", [0.01, 100.0])
@pytest.mark.parametrize("quantile", [0.5, 0.8])
def test_the_bound_reaches_the_quantile_of_norms_from_far_below_and_far_above(first, quantile):
    bounds = followed(first, quantile, lognormal, 160)
    wanted = math.exp(0.5 * {0.5: 0.0, 0.8: 0.8416}[quantile])
    assert np.mean(bounds[-40:]) == pytest.approx(wanted, rel=0.15)
    begin = np.diff(np.log([first, *bounds[:10]]))
    assert (begin > 0).all() if first < 1 else (begin < 0).all()  # the other sign would run away


def test_with_trust_at_the_client_the_bound_is_found_as_well():
    bounds = followed(0.01, 0.5, lognormal, 200, trust="client", noise=0.5)
    assert np.mean(bounds[-60:]) == pytest.approx(1.0, rel=0.25)


def test_noise_alone_never_throws_the_bound_away():
    here = adaptive(quantile=0.5)
    for below in (-1e6, 1e6, -0.7, 0.7):
        after = here.controlled({"clip": torch.tensor(1.0)}, {"below": torch.tensor(below)})
        assert math.exp(-0.1) - 1e-6 <= float(after["clip"]) <= math.exp(0.1) + 1e-6


def test_updates_of_norm_zero_do_no_harm():
    here, told = adaptive(noise_multiplier=0.0), down(0.5)
    bounded = here.bound(Knowledge(dict(WEIGHTS)), told)
    assert not moved(bounded).any() and float(bounded.tensors[BELOW]) == 0.5
    mean = here.noisy_mean([bounded] * 4, np.random.default_rng(0), told)
    assert all(value.isfinite().all() for value in mean.tensors.values()) and not moved(mean).any()
    bounds = followed(1.0, 0.5, lambda rng, n: np.zeros(n), 100)
    assert all(0 < b < math.inf for b in bounds) and bounds[-1] < 1e-3
    half = followed(1.0, 0.75, lambda rng, n: lognormal(rng, n) * (np.arange(n) % 2), 160)
    assert np.mean(half[-40:]) == pytest.approx(1.0, rel=0.25)  # the upper half's median


def test_clients_who_are_not_heard_of_count_as_a_half():
    here = adaptive(noise_multiplier=0.0, quantile=0.5)
    before = {"clip": torch.tensor(2.0)}
    pool = pool_of(here, [trained(0.1), trained(1e3)], down(2.0))
    assert float(pool.control(before)["clip"]) == 2.0
    alone = pool_of(here, [trained(0.1)], down(2.0))
    assert float(alone.control(before)["clip"]) == pytest.approx(2 * math.exp(-0.2 / 8))


# --- Runs ------------------------------------------------------------------------------------------------------------

SEEN: list[str] = []


class Curious(FedAvg):
    """Notes every tensor that a method is shown."""

    def client_update(self, task, client, down):
        SEEN.extend(down.tensors)
        return super().client_update(task, client, down)

    def reply_schema(self, task, down):
        SEEN.extend(down.tensors)
        return super().reply_schema(task, down)

    def judged(self, down, personal):
        SEEN.extend(down.tensors)
        return super().judged(down, personal)

    def aggregate(self, task, server, pool, t, rng):
        SEEN.extend([*pool.mean.tensors, *server])
        with suppress(PrivacyError):  # trust in the server
            SEEN.extend(name for answer in pool.each for name in answer.knowledge.tensors)
        return super().aggregate(task, server, pool, t, rng)


@pytest.mark.parametrize("trust", ["client", "server"])
def test_no_method_sees_what_travels_for_the_mechanism_and_it_does_travel(trust):
    SEEN.clear()
    raw = federated(3, trust=trust, clip=1e-3).raw()
    strategy, rounds, _ = run(Config.from_raw({**raw, "method": {**raw["method"], "name": f"{__name__}:Curious"}}))
    assert SEEN and not [name for name in SEEN if name.startswith("privacy/")]
    assert not [name for name in strategy.server if name.startswith("privacy/")]
    assert float(strategy.control["clip"]) > 1e-3  # all updates were longer
    assert all(r.signal_to_noise is not None and r.signal_to_noise >= 0 for r in rounds)
    assert strategy._said_to(4, 0).tensors[CLIP] == strategy.control["clip"]
    assert CLIP not in without_control(strategy._said_to(4, 0)).tensors
    assert rounds[-1].epsilon <= 50


class Stop(Exception):
    """The power fails."""


@pytest.mark.parametrize("trust", ["server", "client"])
@pytest.mark.parametrize("quantile", [0.5, None])
def test_the_bound_survives_a_checkpoint_and_a_resumed_run_ends_alike(tmp_path, monkeypatch, trust, quantile):
    cfg = federated(4, clip=1e-3, trust=trust)
    if quantile is None:
        raw = cfg.raw()
        cfg = Config.from_raw({**raw, "privacy": {k: v for k, v in raw["privacy"].items() if k != "quantile"}})
    whole = Run(cfg, tmp_path / "whole").go()
    save = Run._on_round

    def until(self, report, strategy, homes):
        save(self, report, strategy, homes)
        if report.t == 2:
            raise Stop

    monkeypatch.setattr(Run, "_on_round", until)
    with pytest.raises(Stop):
        Run(cfg, tmp_path / "cut").go()
    monkeypatch.setattr(Run, "_on_round", save)
    saved = load(tmp_path / "cut" / files.CHECKPOINT)
    assert saved.round == 2 and set(saved.extra["control"]) == ({"clip"} if quantile else set())
    assert all(clip > 1e-3 for clip in saved.extra["control"].values())
    assert Run(cfg, tmp_path / "cut").go(resume=True)["state_hash"] == whole["state_hash"]
    lines = [files.read_lines(tmp_path / name / files.METRICS) for name in ("whole", "cut")]
    assert [line["signal_to_noise"] for line in lines[0]] == [line["signal_to_noise"] for line in lines[1]]


# --- What makes no sense ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "privacy", "reason"),
    [
        ("fedmd", {"quantile": 0.5}, r"privacy.quantile: adapts the clip of updates, and fedmd sends logits; leave it"),
        ("fedproto", {"quantile": 0.5}, r"privacy.quantile: .* fedproto sends prototypes; leave it out"),
        (
            "fedavg",
            {"count_share": 0.1},
            r"privacy.count_share: has no meaning with a fixed clip; set privacy.quantile",
        ),
        ("fedavg", {"min_count": 1.0}, r"privacy.min_count: is about sums by class, and fedavg sends params; leave it"),
        ("fedavg", {"noise_cohort_size": 99, "trust": "client"}, r"privacy.noise_cohort_size: .*use trust=server"),
        ("fedavg", {"quantile": 1.0}, r"privacy.quantile: .*less than 1, got 1.0"),
        ("fedavg", {"quantile": 0.5, "count_share": 0.0}, r"privacy.count_share: .*greater than 0, got 0.0"),
    ],
)
def test_what_makes_no_sense_is_refused_with_what_to_do(name, privacy, reason):
    data = {"public": 20} if name == "fedmd" else {}
    raw = config(name, data=data).raw()
    with pytest.raises(ConfigError, match=reason) as error:
        refuse(Config.from_raw({**raw, "privacy": {"mechanism": "gaussian", **privacy}}))
    assert "\n" not in str(error.value)


def test_a_simulated_cohort_must_not_be_smaller_than_the_real_one():
    with pytest.raises(ConfigError, match=r"privacy.noise_cohort_size=3: expected at least the 4 clients"):
        open_site(federations.build(federated(noise_cohort_size=3)))
    here = open_site(federations.build(federated(noise_cohort_size=400))).mechanism
    assert here.hypothetical and replace(here, noise_cohort=None).assumptions() == here.assumptions()[1:]
