"""Votes and labels: what one client can move, noise and odds as claimed, and what is booked."""

import json
import math
from collections import Counter
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clients.app import app
from clients.client import open_site, site
from clients.engines.loop import Loop
from experiments import files
from experiments.run import Run
from fedkd import federation as federations
from fedkd.config import Config
from fedkd.errors import ConfigError, PrivacyError
from fedkd.grid import LocalGrid
from fedkd.knowledge import Knowledge
from fedkd.method import Peer
from privacy.accounting import epsilon
from privacy.events import Event, RandomisedResponse
from privacy.gate import Pool, Released
from privacy.ledger import Ledger
from privacy.mechanisms import build, refuse
from privacy.votes import GNMax, LocalVotes, RandomLabels, randomised
from strategies.fedmd import FedMD
from strategies.flower import KnowledgeStrategy
from tests.helpers.small import config, run

M, K, COHORT = 30, 5, 20
ODD = (math.nan, math.inf, -math.inf, 0.0, 3e38, -3e38, 1.0)


def gnmax(**changes) -> GNMax:
    return GNMax(**{"cohort": COHORT, "rows": M, "scale": 5.0, "std": 3.0, "budget": 5.0, **changes})


def local(**changes) -> LocalVotes:
    return LocalVotes(**{"cohort": COHORT, "rows": M, "scale": 5.0, "report_epsilon": 1.0, "classes": K, **changes})


def raw(seed: int, rows: int = M) -> Knowledge:
    g = torch.Generator().manual_seed(seed)
    return Knowledge({"logits": torch.randn((rows, K), generator=g)}, torch.tensor(37.0))


def ballots(labels: list[int] | Tensor, scale: float = 5.0) -> Knowledge:
    return Knowledge({"logits": scale * torch.nn.functional.one_hot(torch.as_tensor(labels), K).float()})


def is_share(hits: int, n: int, p: float) -> bool:
    """Whether so many of n are a share p, within five standard errors."""
    return abs(hits - n * p) < 5 * math.sqrt(n * p * (1 - p)) + 1


# --- Sensitivity -----------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(st.lists(st.one_of(st.sampled_from(ODD), st.floats(width=32)), min_size=K, max_size=K), max_size=4)
)
def test_a_message_is_one_vote_a_row_whatever_it_held(rows):
    values = torch.tensor(rows, dtype=torch.float32).reshape(-1, K)
    for here in (gnmax(), local()):
        bounded = here.bound(Knowledge({"logits": values}, torch.tensor(9.0)))
        said = bounded.tensors["logits"]
        assert said.shape == values.shape and bounded.weight == 1
        assert ((said == 0) | (said == 5)).all() and (said.sum(-1) == 5).all()


def test_another_client_moves_the_votes_of_a_row_by_the_root_of_two_and_the_most_by_one():
    here = gnmax(std=1.0)
    one, other = (here.bound(raw(seed)).tensors["logits"] / here.scale for seed in (0, 1))
    apart = (one - other).norm(dim=1)
    assert float(apart.max()) == pytest.approx(math.sqrt(2)) and (apart <= math.sqrt(2) + 1e-6).all()
    others = sum(here.bound(raw(seed)).tensors["logits"] / here.scale for seed in range(2, 9))
    assert ((others + one).amax(1) - (others + other).amax(1)).abs().max() <= 1
    assert here.events()[0].noise_multiplier == pytest.approx(1 / math.sqrt(2))


def test_votes_of_text_are_one_for_each_token():
    shaped = Knowledge({"logits": torch.randn((3, 4, K), generator=torch.Generator().manual_seed(0))})
    here = gnmax(std=1e-6, rows=12)
    out = here.noisy_mean([here.bound(shaped)] * 3, np.random.default_rng(0)).tensors["logits"]
    assert torch.equal(out.argmax(-1), shaped.tensors["logits"].argmax(-1)) and out.shape == (3, 4, K)
    some = gnmax(std=1e-6, rows=12, threshold=0.1, threshold_std=1e-6, answers=5, cohort=3)
    out = some.noisy_mean([some.bound(shaped)] * 3, np.random.default_rng(0)).tensors["logits"]
    assert int((out.amax(-1) == 5).sum()) == 5


# --- GNMax -----------------------------------------------------------------------------------------------------------


def test_with_next_to_no_noise_the_winner_is_the_plurality():
    here = gnmax(std=1e-6)
    said = [here.bound(raw(seed)) for seed in range(COHORT)]
    counts = torch.stack([k.tensors["logits"] for k in said]).sum(0)
    clear = (counts.topk(2, dim=1).values.diff(dim=1) != 0).squeeze(1)
    out = here.noisy_mean(said, np.random.default_rng(0)).tensors["logits"]
    assert clear.sum() > M / 2 and torch.equal(out.argmax(1)[clear], counts.argmax(1)[clear])
    assert torch.equal(out, ballots(out.argmax(1)).tensors["logits"])


def test_the_noise_on_counts_is_as_strong_as_claimed():
    """Two classes, 12 votes against 8: the first wins with probability Phi(4 / (std sqrt(2)))."""
    n, std = 20_000, 5.0
    said = [ballots(torch.full((n,), int(k >= 12))) for k in range(COHORT)]
    for k in said:
        k.tensors["logits"] = k.tensors["logits"][:, :2]
    won = gnmax(std=std, rows=n).noisy_mean(said, np.random.default_rng(0)).tensors["logits"].argmax(1)
    phi = 0.5 * (1 + math.erf(4 / (std * math.sqrt(2)) / math.sqrt(2)))
    assert is_share(int((won == 0).sum()), n, phi)
    assert not is_share(int((won == 0).sum()), n, 0.5 * (1 + math.erf(4 / (1.2 * std * math.sqrt(2)) / math.sqrt(2))))


def test_the_noise_on_the_thresholds_test_is_as_strong_as_claimed():
    """15 of 20 agree, the threshold asks for 12: a row passes with probability Phi(3 / std)."""
    n, std = 20_000, 4.0
    said = [ballots(torch.full((n,), 0 if k < 15 else k % 4 + 1)) for k in range(COHORT)]
    here = gnmax(std=1e-6, rows=n, threshold=0.6, threshold_std=std, answers=n)
    out = here.noisy_mean(said, np.random.default_rng(0)).tensors["logits"]
    passed = int((out.amax(1) == 5).sum())
    assert is_share(passed, n, 0.5 * (1 + math.erf(3 / std / math.sqrt(2))))
    assert not is_share(passed, n, 0.5 * (1 + math.erf(3 / (1.2 * std) / math.sqrt(2))))


def test_no_more_rows_are_answered_than_were_paid_for_and_the_others_are_uniform():
    agreed = [ballots([0] * 20 + [k % K for _ in range(10)]) for k in range(COHORT)]
    here = gnmax(std=1e-3, threshold=0.5, threshold_std=1e-3, answers=7)
    chosen = set()
    for seed in range(30):
        out = here.noisy_mean(agreed, np.random.default_rng(seed)).tensors["logits"]
        answered = out.amax(1) == 5
        assert int(answered.sum()) == 7 and not answered[20:].any()
        assert torch.equal(out[~answered], torch.ones((23, K))) and torch.equal(
            out[answered], ballots([0] * 7).tensors["logits"]
        )
        chosen |= set(answered.nonzero().flatten().tolist())
    assert chosen == set(range(20))  # in random order, not the first ones
    few = replace(here, answers=30).noisy_mean(agreed, np.random.default_rng(0)).tensors["logits"]
    assert int((few.amax(1) == 5).sum()) == 20
    nobody = replace(here, threshold=1.0, cohort=40).noisy_mean(agreed, np.random.default_rng(0)).tensors["logits"]
    assert torch.equal(nobody, torch.ones((M, K)))


def test_the_servers_half_reads_winners_and_nothing_else():
    here, rng = gnmax(), np.random.default_rng(0)
    said = [here.noise(here.bound(raw(k)), rng) for k in range(COHORT)]
    pool = Pool([Released(Peer(k, "mlp"), 1, one, here.events()) for k, one in enumerate(said)], here, rng)
    with pytest.raises(PrivacyError, match="noisy mean, not single answers"):
        pool.each  # noqa: B018
    assert pool.mean is pool.mean and pool.signal_to_noise() is None


# --- Randomised response ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("report", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("classes", [2, 5])
def test_labels_are_kept_as_often_as_claimed_and_others_are_as_likely(report, classes):
    n = 40_000
    y = torch.arange(n) % classes
    got = randomised(y, classes, report, np.random.default_rng(0))
    keep = RandomisedResponse(report, classes).keep
    assert is_share(int((got == y).sum()), n, keep)
    moved = Counter(((got - y) % classes).tolist())
    assert set(moved) == set(range(classes))
    assert all(is_share(moved[k], n, (1 - keep) / (classes - 1)) for k in range(1, classes))


def test_local_votes_are_unbiased():
    n = 40_000
    here = local(rows=n, report_epsilon=0.7)
    plain = ballots(torch.full((n,), 3))
    noised = here.noise(plain, np.random.default_rng(0)).tensors["logits"]
    standard_error = noised.std(0) / math.sqrt(n)
    assert ((noised.mean(0) - plain.tensors["logits"].mean(0)).abs() < 5 * standard_error).all()
    assert len(torch.unique(noised)) == 2  # a function of the label that was drawn, and of nothing else


def test_a_local_vote_is_no_likelier_than_epsilon_allows():
    here, n = local(rows=40_000, report_epsilon=1.0), 40_000
    shares = []
    for label in (0, 1):
        out = here.noise(ballots(torch.full((n,), label)), np.random.default_rng(label)).tensors["logits"].argmax(1)
        shares.append(torch.bincount(out, minlength=K).double() / n)
    ratio = (shares[0] / shares[1]).log()
    assert float(ratio[0]) == pytest.approx(1.0, abs=0.06) and float(ratio[1]) == pytest.approx(-1.0, abs=0.06)
    assert ratio[2:].abs().max() < 0.1


# --- What is booked --------------------------------------------------------------------------------------------------


def federated(mechanism: str, rounds: int = 3, name: str = "fedmd", **privacy) -> Config:
    method = {"loss": "kl"} if name == "fedmd" else {}
    data = {"public": 24} if name in ("fedmd", "dsfl") else {}
    cfg = config(name, model="linear", federation={"rounds": rounds}, data=data, **method)
    return Config.from_raw({**cfg.raw(), "privacy": {"mechanism": mechanism, **privacy}})


@pytest.mark.parametrize("eps", [1.0, 8.0])
@pytest.mark.parametrize(
    "privacy",
    [
        {"mechanism": "votes"},
        {"mechanism": "votes", "threshold": 0.5},
        {"mechanism": "votes", "threshold": 0.5, "threshold_share": 0.6, "answers": 5},
        {"mechanism": "votes", "threshold": 0.5, "answers": 1000},
        {"mechanism": "local_votes"},
    ],
)
def test_a_whole_run_books_at_most_epsilon_and_nearly_it(privacy, eps):
    here = open_site(federations.build(federated(**privacy, epsilon=eps, delta=1e-4))).mechanism
    spent = epsilon(here.events() * 3, 1e-4, "replace")
    assert 0.98 * eps < spent <= eps
    assert epsilon(here.events() * 4, 1e-4, "replace") > eps


@pytest.mark.parametrize("share", [0.1, 0.3, 0.8])
def test_confident_votes_cost_exactly_what_was_calibrated_for_a_round(share):
    plain = open_site(federations.build(federated("votes"))).mechanism
    here = open_site(federations.build(federated("votes", threshold=0.5, threshold_share=share, answers=6))).mechanism
    signal = [sum(e.steps / e.noise_multiplier**2 for e in m.events()) for m in (plain, here)]
    assert signal[0] == pytest.approx(signal[1], rel=1e-9)
    test, answers = here.events()
    assert (test.steps, answers.steps) == (24, 6)
    assert test.steps / test.noise_multiplier**2 == pytest.approx(share * signal[0])


def test_a_thousand_checks_and_286_answers_cost_what_pate_says():
    """Of PATE's own example: 1,000 tests at 150 votes of noise, 286 answers at 40; by privacy loss distributions."""
    here = gnmax(std=40.0, rows=1000, threshold=0.5, threshold_std=150.0, answers=286)
    assert epsilon(here.events(), 1e-5, "replace") == pytest.approx(2.601487206608089, abs=1e-3)


@pytest.mark.parametrize("mechanism", ["votes", "local_votes"])
def test_a_run_by_votes_books_every_round_and_stays_within_its_budget(mechanism):
    strategy, rounds, _ = run(federated(mechanism, epsilon=5.0, name="dsfl"))
    assert [len(strategy.ledger.releases(k)) for k in range(4)] == [3] * 4
    assert rounds[-1].epsilon <= 5.0 and all(r.signal_to_noise is None for r in rounds)


def test_probabilities_stay_such():
    for name, scale in (("fedmd", 5.0), ("dsfl", 1.0)):
        here = open_site(federations.build(federated("votes", name=name))).mechanism
        assert here.scale == scale


# --- Labels ----------------------------------------------------------------------------------------------------------


def test_labels_are_drawn_alike_in_every_round_and_kept_as_often_as_claimed():
    here = site(federated("labels", epsilon=1.0, delta=1e-4).to_json())
    kept = n = 0
    for client in range(4):
        true = here.federation.train_set(client)[1]
        drawn = [here.tensors(client, t, {}).y for t in (1, 2, 9)]
        assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])
        kept, n = kept + int((drawn[0] == true).sum()), n + len(true)
    assert n > 200 and is_share(kept, n, RandomisedResponse(1.0, 10).keep)


def test_labels_are_booked_once_in_a_run_and_cost_what_randomised_response_costs():
    strategy, rounds, grid = run(federated("labels", epsilon=2.0, delta=1e-4))
    event = RandomisedResponse(2.0, 10)
    here = open_site(strategy.federation)
    for client in range(4):
        assert strategy.ledger.releases(client) == ((1, event),)
        assert here.ledger(grid.homes[client]).releases(client) == ((1, event),)
    assert {r.epsilon for r in rounds} == {epsilon([event], 1e-4, "replace")}  # as much after one round as after three
    assert 0.95 * 2 < rounds[-1].epsilon <= 2
    assert strategy.ledger.unit == "label"


class Losing(LocalGrid):
    """Loses what client 2 answers in round 1."""

    def send_and_receive(self, messages, *, timeout=None):
        for reply in super().send_and_receive(messages, timeout=timeout):
            first = reply.metadata.group_id == "1" and reply.metadata.message_type == "train"
            if not (first and self.client_of(reply.metadata.src_node_id) == 2):
                yield reply


def test_labels_are_booked_once_by_both_sides_though_the_first_answer_was_lost():
    cfg = federated("labels", epsilon=2.0, delta=1e-4)
    here, rounds, event = site(cfg.to_json()), [], RandomisedResponse(2.0, 10)
    grid = Losing(Loop(app), 4, {"config": cfg.to_json()})
    strategy = KnowledgeStrategy(here.federation, here.mechanism, rounds.append)
    strategy.start(grid)
    assert [[line.client for line in r.failures] for r in rounds] == [[2], [], []]
    assert here.ledger(grid.homes[2]).releases(2) == ((1, event),)
    assert strategy.ledger.releases(2) == ((2, event),)  # when it first heard of it
    assert {r.epsilon for r in rounds} == {epsilon([event], 1e-4, "replace")}


class Stop(Exception):
    """The power fails."""


def test_labels_are_booked_once_across_a_resumption(tmp_path, monkeypatch):
    cfg = federated("labels", epsilon=2.0, delta=1e-4)
    whole = Run(cfg, tmp_path / "whole").go()
    save = Run._on_round

    def until(self, report, strategy, homes):
        save(self, report, strategy, homes)
        if report.t == 1:
            raise Stop

    monkeypatch.setattr(Run, "_on_round", until)
    with pytest.raises(Stop):
        Run(cfg, tmp_path / "cut").go()
    monkeypatch.setattr(Run, "_on_round", save)
    cut = Run(cfg, tmp_path / "cut").go(resume=True)
    assert cut["state_hash"] == whole["state_hash"]
    ledger = Ledger.from_json(json.loads((tmp_path / "cut" / files.LEDGER).read_text()))
    assert [ledger.releases(k) for k in range(4)] == [((1, RandomisedResponse(2.0, 10)),)] * 4


def test_random_labels_promise_something_though_later_rounds_book_nothing():
    here = RandomLabels(report_epsilon=1.0, classes=K)
    assert here.promises and here.events() == () and here.events(first=True) == (RandomisedResponse(1.0, K),)


# --- What makes no sense ---------------------------------------------------------------------------------------------


class Each(FedMD):
    """Reads single answers."""

    needs_each: ClassVar[bool] = True


@pytest.mark.parametrize(
    ("mechanism", "name", "privacy", "reason"),
    [
        ("votes", "fedavg", {}, "votes bounds rows of logits, but fedavg sends other params; use 'ambassador'"),
        ("local_votes", "fedproto", {}, "local_votes bounds rows of logits, but fedproto sends other prototypes"),
        ("laplace", "fedavg", {}, "laplace bounds rows of logits, but fedavg sends other params; use 'ambassador'"),
        ("laplace", "fedd2s", {}, "fedd2s sends other features; use 'gaussian' and method.upload=class_mean"),
        ("votes", "local", {}, "privacy.mechanism=votes: local sends nothing to protect; use 'none'"),
        ("votes", "fedmd", {"answers": 3}, "have no meaning without privacy.threshold"),
        ("votes", "fedmd", {"threshold_share": 0.3}, "have no meaning without privacy.threshold"),
        ("votes", "rad_clients", {}, "clients choose public images .*; use rad, whose server chooses, or 'ambassador'"),
        ("local_votes", "rad_clients", {}, "clients choose public images .*; use rad, whose server chooses"),
        ("votes", "each", {}, "trust in the server: .* reads each client's answer, .*use trust=client, or local_votes"),
        ("votes", "fedmd", {"delta": 0.3}, "privacy.delta=0.3: should be below 1/4"),
        ("votes", "fedmd", {"clip": 1.0}, "unknown key 'privacy.clip'"),
        ("labels", "fedmd", {"clip": 1.0}, "unknown key 'privacy.clip'"),
        ("votes", "fedmd", {"threshold": 1.5}, "privacy.threshold: .*less than or equal to 1, got 1.5"),
        ("ambassador", "fedd2s", {}, "reads records outside training, .*; set method.upload=class_mean"),
        ("ambassador", "fedmd", {"row_clip": 1.0}, "privacy.row_clip: is about sums by class, and fedmd sends logits"),
        ("ambassador", "fedmd", {"sums_share": 0.1}, "privacy.sums_share: is about sums by class"),
        ("ambassador", "fedavg", {"min_count": 0.0}, "privacy.min_count: is about sums by class, and fedavg"),
    ],
)
def test_what_makes_no_sense_is_refused_with_what_to_do(mechanism, name, privacy, reason):
    def made() -> None:
        raw = config("fedmd", data={"public": 24}).raw()
        if name not in ("fedmd", "feddf", "rad_clients", "each"):
            del raw["data"]["public"]
        method = {"name": f"{__name__}:Each" if name == "each" else name}
        refuse(Config.from_raw({**raw, "method": method, "privacy": {"mechanism": mechanism, **privacy}}))

    with pytest.raises(ConfigError, match=reason) as error:
        made()
    assert "\n" not in str(error.value)


def test_tokens_are_input_and_label_at_once():
    raw = {"data": {"name": "shakespeare"}, "method": {"name": "fedavg"}, "privacy": {"mechanism": "labels"}}
    with pytest.raises(ConfigError, match="labels: a token is input and label at once; use another mechanism for text"):
        refuse(Config.from_raw({**raw, "model": {"name": "gru"}}))


def test_labels_are_not_drawn_where_a_method_has_noted_the_true_ones():
    """Scores by the rarity of a record's class are a function of its true label, and steer what the student learns."""
    cfg = federated("labels", name="swing", delta=1e-4)
    for score, fine in (("rarity", False), ("oracle", False), ("none", True), ("surprisal", True)):
        raw = cfg.raw()
        federation = federations.build(Config.from_raw({**raw, "method": {**raw["method"], "score": score}}))
        if fine:
            assert isinstance(build(federation), RandomLabels)
        else:
            with pytest.raises(
                ConfigError, match=r"before their labels are drawn, which may .*; set method.score=none"
            ):
                build(federation)


def test_labels_of_fewer_records_than_one_over_delta_say_nothing():
    with pytest.raises(ConfigError, match=r"privacy.delta=0.1: should be below 1/\d+, one over the records"):
        open_site(federations.build(federated("labels", delta=0.1)))


def test_an_event_of_these_is_priced_under_replace_only():
    with pytest.raises(ConfigError, match="replace"):
        epsilon(local().events(), 1e-5, "add_remove")
    assert isinstance(gnmax().events()[0], Event)
