"""The clients' front door: bounds, sensitivities, noise as claimed, refusals, and a ledger that is asked first."""

import json
import math
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.app import app
from clients.client import Site, open_site, site
from clients.engines.loop import Loop
from fedkd import federation as federations
from fedkd.config import Config
from fedkd.errors import BudgetExhausted, ConfigError, PrivacyError, SchemaError
from fedkd.grid import LocalGrid
from fedkd.knowledge import Knowledge, Params, fingerprint
from fedkd.method import Peer, size
from fedkd.registry import method_class
from fedkd.sections import MECHANISMS
from fedkd.task import Client, Task
from privacy.accounting import FINAL_INTERVAL, Event, epsilon
from privacy.gate import Gate, Pool, Released, admit
from privacy.gaussian import GaussianRows, GaussianUpdate
from privacy.ledger import Ledger
from privacy.mechanism import Mechanism
from privacy.mechanisms import ABOUT, build
from strategies.fedmd import FedMD
from strategies.flower import KnowledgeStrategy, Round

M, K, CLIENTS = 20, 10, 3
SCHEMA = {"logits": ((M, K), torch.float32)}


def gaussian(trust: str = "client", **changes) -> GaussianRows:
    relation = "replace" if trust == "client" else "add_remove"
    values = {"clip": 2.0, "rows": M, "cohort": 4, "noise_multiplier": 1.7, "budget": 5.0}
    return GaussianRows(trust=trust, relation=relation, **{**values, **changes})


def logits(seed: int = 0, rows: int = M, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn((rows, K), generator=torch.Generator().manual_seed(seed))


def raw(seed: int = 0, weight: float = 37.0, **kwargs) -> Knowledge:
    return Knowledge({"logits": logits(seed, **kwargs)}, torch.tensor(weight))


def configured(name: str = "fedmd", mechanism: str = "gaussian", **sections) -> Config:
    values = {
        "seed": 4,
        "data": {"limit": 400, "test": 50},
        "federation": {"clients": CLIENTS, "rounds": 3},
        "model": {"name": "linear"},
        "method": {"name": name},
        "privacy": {"mechanism": mechanism},
    }
    if method_class(name).needs_public:
        values["data"]["public"] = M
    if mechanism == "ambassador":
        values["privacy"] |= {"delta": 1e-3, "steps": 2, "sampling_rate": 1.0}  # at rate 1 calibration takes no time
    for section, fields in sections.items():
        values[section] = values.get(section, {}) | fields
    return Config.from_raw(values)


@cache
def opened(name: str, mechanism: str, privacy: tuple = (), federation: tuple = ()) -> Site:
    config = configured(name, mechanism, privacy=dict(privacy), federation=dict(federation))
    return open_site(federations.build(config))


class Counting(LocalGrid):
    """Counts what the server sent out, by kind and round."""

    def __init__(self, config: Config) -> None:
        super().__init__(Loop(app), config.federation.clients, {"config": config.to_json()})
        self.sent: list[tuple[str, str]] = []

    def push_messages(self, messages):
        messages = list(messages)
        self.sent += [(m.metadata.message_type, m.metadata.group_id) for m in messages]
        return super().push_messages(messages)


def strategy_of(config: Config) -> tuple[KnowledgeStrategy, Counting, list[Round]]:
    here, rounds = site(config.to_json()), []
    return KnowledgeStrategy(here.federation, here.mechanism, rounds.append), Counting(config), rounds


# --- Bounds ----------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=3, max_size=3), max_size=5
    ),
    clip=st.floats(1e-3, 1e4),
)
def test_no_row_is_longer_than_the_clip_whatever_it_held(rows, clip):
    values = torch.tensor(rows, dtype=torch.float32).reshape(-1, 3)
    bounded = gaussian(clip=clip).bound(Knowledge({"logits": values}, torch.tensor(9.0)))
    norms = bounded.tensors["logits"].double().norm(dim=1)
    assert torch.isfinite(norms).all() and (norms <= clip * (1 + 1e-6)).all()
    assert bounded.weight == 1 and list(bounded.tensors) == ["logits"]


def test_short_rows_stay_long_rows_keep_their_direction_and_what_is_no_number_becomes_zero():
    nan, inf = torch.nan, torch.inf
    values = torch.tensor([[0.3, -0.4], [30.0, -40.0], [nan, 0.5], [inf, 0.5], [-inf, nan], [0.0, 0.0]])
    bounded = gaussian(clip=2.0).bound(Knowledge({"logits": values})).tensors["logits"]
    expected = torch.tensor([[0.3, -0.4], [1.2, -1.6], [0.0, 0.5], [0.0, 0.5], [0.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(bounded, expected)
    assert torch.equal(bounded[0], values[0])


def test_the_bound_leaves_the_clients_own_tensors_alone():
    said = raw()
    before = fingerprint(said.tensors)
    gaussian().bound(said)
    gaussian().noise(said, np.random.default_rng(0))
    assert fingerprint(said.tensors) == before


def test_other_mechanisms_bound_nothing_but_an_ambassadors_weight():
    said = raw()
    assert Mechanism().bound(said) is said
    bounded = opened("fedmd", "ambassador").mechanism.bound(said)
    assert bounded.weight == 1 and bounded.tensors["logits"] is said.tensors["logits"]


# --- Sensitivity and noise -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("clip", "rows"), [(1.0, 1), (5.0, 1000), (0.3, 7)])
def test_sensitivities_follow_from_the_bound_and_the_relation(clip, rows):
    one = clip * math.sqrt(rows)
    assert gaussian("server", clip=clip, rows=rows).sensitivity == pytest.approx(one)
    assert gaussian("client", clip=clip, rows=rows).sensitivity == pytest.approx(2 * one)


@settings(max_examples=40, deadline=None)
@given(one=st.integers(0, 99), two=st.integers(0, 99), scale=st.sampled_from([0.01, 1.0, 1e3]))
def test_no_two_messages_are_farther_apart_than_the_sensitivity(one, two, scale):
    here, there = gaussian("client"), gaussian("server")
    a, b = (here.bound(raw(seed, scale=scale)).tensors["logits"] for seed in (one, two))
    assert (a - b).norm() <= here.sensitivity * (1 + 1e-5)
    assert a.norm() <= there.sensitivity * (1 + 1e-5)


def test_the_sensitivity_is_reached():
    mechanism = gaussian("client")
    far = Knowledge({"logits": torch.full((M, K), 1e3)})
    ends = [mechanism.bound(Knowledge({"logits": s * far.tensors["logits"]})).tensors["logits"] for s in (1, -1)]
    assert float((ends[0] - ends[1]).norm()) == pytest.approx(mechanism.sensitivity, rel=1e-6)


# Updates of weights


DOWN = Knowledge({"w": torch.linspace(-1, 1, 2000).view(40, 50), "b": torch.full((50,), 3.0)})


def update(trust: str = "server", **changes) -> GaussianUpdate:
    relation = "replace" if trust == "client" else "add_remove"
    values = {"clip": 0.5, "cohort": 4, "noise_multiplier": 1.7, "budget": 5.0}
    return GaussianUpdate(trust=trust, relation=relation, **{**values, **changes})


def trained(seed: int, far: float = 1.0) -> Knowledge:
    g = torch.Generator().manual_seed(seed)
    return Knowledge(
        {k: v + far * torch.randn(v.shape, generator=g) for k, v in DOWN.tensors.items()}, torch.tensor(9.0)
    )


def moved(said: Knowledge) -> torch.Tensor:
    return torch.cat([(said.tensors[k] - v).double().flatten() for k, v in DOWN.tensors.items()])


def test_an_update_is_clipped_as_a_whole_and_short_ones_stay():
    for far, norm in ((1.0, 0.5), (1e6, 0.5), (1e-4, None)):
        raw = trained(0, far)
        bounded = update().bound(raw, DOWN)
        assert bounded.weight == 1
        if norm is None:
            torch.testing.assert_close(moved(bounded), moved(raw), rtol=1e-3, atol=1e-6)
        else:
            assert float(moved(bounded).norm()) == pytest.approx(norm, rel=1e-3)
            cosine = torch.nn.functional.cosine_similarity(moved(bounded), moved(raw), dim=0)
            assert float(cosine) == pytest.approx(1, abs=1e-3)


def test_an_update_with_nan_is_bounded_and_what_never_came_down_is_refused():
    raw = trained(0)
    raw.tensors["w"][0, 0] = math.nan
    assert float(moved(update().bound(raw, DOWN)).norm()) <= 0.5 * (1 + 1e-5)
    with pytest.raises(PrivacyError, match=r"the parameters that came down, got \['counts'\]"):
        update().bound(Knowledge({**raw.tensors, "counts": torch.ones(3)}), DOWN)


def test_sensitivities_of_updates():
    assert update("server").sensitivity == 0.5 and update("client").sensitivity == 1.0
    one, two = (update("client").bound(trained(seed, 1e3), DOWN) for seed in (1, 2))
    assert float((moved(one) - moved(two)).norm()) <= update("client").sensitivity * (1 + 1e-4)


@pytest.mark.parametrize("answered", [4, 2])
def test_the_noise_on_updates_is_as_strong_as_claimed(answered):
    bounded = [update().bound(trained(seed), DOWN) for seed in range(answered)]
    mean = update(noise_multiplier=40.0).noisy_mean(bounded, np.random.default_rng(0), DOWN)
    z = (moved(mean) - sum(map(moved, bounded)) / 4) / (40.0 * 0.5 / 4)
    assert is_normal(z) and not is_normal(1.15 * z)
    alone = update("client", noise_multiplier=40.0)
    z = (moved(alone.noise(bounded[0], np.random.default_rng(1))) - moved(bounded[0])) / (40.0 * 2 * 0.5)
    assert is_normal(z) and not is_normal(1.15 * z)
    silent = update(noise_multiplier=0.0).noisy_mean(bounded, np.random.default_rng(0), DOWN)
    torch.testing.assert_close(moved(silent), sum(map(moved, bounded)) / 4, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("trust", ["client", "server"])
def test_fedavg_with_bounded_updates_is_booked_and_moves_no_farther_than_its_bound(trust):
    config = configured("fedavg", privacy={"trust": trust, "epsilon": 1e6, "clip": 0.1, "delta": 1e-5})
    here = site(config.to_json())
    rounds: list[Round] = []
    strategy = KnowledgeStrategy(here.federation, here.mechanism, rounds.append)
    before = dict(strategy.server)
    strategy.start(LocalGrid(Loop(app), CLIENTS, {"config": config.to_json()}))
    assert rounds[-1].epsilon <= 1e6 and not any(r.failures for r in rounds)
    step = math.sqrt(sum(float((strategy.server[k] - v).square().sum()) for k, v in before.items()))
    assert 0 < step <= 3 * 0.1 * 1.5  # three rounds, and a little noise


def is_normal(z: torch.Tensor) -> bool:
    """Mean, variance and fourth moment of standard normal numbers, each within five standard errors."""
    z = z.double().flatten()
    n = len(z)
    moments = ((z.mean(), 0, 1), (z.square().mean(), 1, 2), (z.pow(4).mean(), 3, 96))
    return all(abs(float(got) - expected) < 5 * math.sqrt(variance / n) for got, expected, variance in moments)


@pytest.mark.parametrize("sigma", [0.5, 4.0])
def test_a_clients_noise_is_as_strong_as_claimed(sigma):
    rows = 3000
    mechanism = gaussian("client", rows=rows, clip=2.0, noise_multiplier=sigma)
    bounded = mechanism.bound(raw(rows=rows))
    noised = mechanism.noise(bounded, np.random.default_rng(0))
    std = sigma * 2 * 2.0 * math.sqrt(rows)
    z = (noised.tensors["logits"].double() - bounded.tensors["logits"].double()) / std
    assert is_normal(z) and not is_normal(1.05 * z)
    assert noised.weight == 1


@pytest.mark.parametrize("answered", [5, 3, 1])
def test_the_noise_of_a_mean_is_as_strong_as_claimed_and_divides_by_the_expected_cohort(answered):
    rows, cohort = 3000, 5
    mechanism = gaussian("server", rows=rows, cohort=cohort, noise_multiplier=1.5)
    bounded = [mechanism.bound(raw(seed, rows=rows)) for seed in range(answered)]
    mean = mechanism.noisy_mean(bounded, np.random.default_rng(1)).tensors["logits"]
    total = sum(k.tensors["logits"].double() for k in bounded)
    std = 1.5 * 2.0 * math.sqrt(rows) / cohort
    z = (mean.double() - total / cohort) / std
    assert is_normal(z) and not is_normal(1.05 * z)

    silent = replace(mechanism, noise_multiplier=0.0).noisy_mean(bounded, np.random.default_rng(1))
    torch.testing.assert_close(silent.tensors["logits"].double(), total / cohort, rtol=1e-5, atol=1e-6)
    assert silent.weight == 1


def test_the_noise_is_added_once_at_the_end_of_trust():
    bounded = gaussian().bound(raw())
    assert gaussian("server").noise(bounded, np.random.default_rng(0)) is bounded
    assert Mechanism().noise(bounded, np.random.default_rng(0)) is bounded
    with pytest.raises(NotImplementedError):
        Mechanism().noisy_mean([bounded], np.random.default_rng(0))


def test_noise_follows_from_the_generator_and_differs_between_clients_and_rounds():
    here = opened("fedmd", "gaussian")
    state, other = RecordDict(), RecordDict()
    one = here.train(0, 1, Knowledge({}), state)
    again = here.train(0, 1, Knowledge({}), other)
    assert fingerprint(one.knowledge.tensors) == fingerprint(again.knowledge.tensors)
    plain = opened("fedmd", "none")
    left = []
    for k, t in ((0, 1), (1, 1), (0, 2)):
        said = here.train(k, t, Knowledge({}), RecordDict()).knowledge
        bounded = here.mechanism.bound(plain.train(k, t, Knowledge({}), RecordDict()).knowledge)
        left.append(said.tensors["logits"] - bounded.tensors["logits"])
    for i in range(3):
        for j in range(i):
            corr = float(torch.corrcoef(torch.stack([left[i].flatten(), left[j].flatten()]))[0, 1])
            assert abs(corr) < 5 / math.sqrt(M * K)


# --- Pool ------------------------------------------------------------------------------------------------------------


def released(k: int, mechanism: Mechanism, weight: float = 1.0, t: int = 1) -> Released:
    knowledge = Knowledge({"logits": logits(k)}, torch.tensor(weight))
    return Released(Peer(k, "linear"), t, knowledge, mechanism.events())


def test_a_server_that_is_trusted_for_the_mean_only_may_read_the_mean_only():
    mechanism = gaussian("server")
    pool = Pool([released(k, mechanism) for k in range(4)], mechanism, np.random.default_rng(0))
    with pytest.raises(PrivacyError, match="a method may read the noisy mean, not single answers"):
        pool.each  # noqa: B018
    first = pool.mean
    assert pool.mean is first  # asking again draws no new noise, which would average it away
    fresh = Pool([released(k, mechanism) for k in (3, 1, 0, 2)], mechanism, np.random.default_rng(0)).mean
    assert torch.equal(fresh.tensors["logits"], first.tensors["logits"])
    plain = torch.stack([logits(k) for k in range(4)]).mean(0)
    assert (first.tensors["logits"] - plain).norm() > 1


def test_otherwise_the_mean_is_weighted_and_each_answer_is_there_in_client_order():
    for mechanism in (Mechanism(), gaussian("client")):
        pool = Pool([released(k, mechanism, weight=k + 1) for k in (2, 0, 1)], mechanism, np.random.default_rng(0))
        assert [r.peer.client for r in pool.each] == [0, 1, 2]
        expected = np.average([logits(k).numpy() for k in range(3)], axis=0, weights=[1, 2, 3])
        np.testing.assert_allclose(pool.mean.tensors["logits"].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_a_method_that_reads_single_answers_fails_where_only_the_mean_may_be_read():
    here = opened("feddf", "none")
    task, method = here.federation.server_task, here.federation.config.method
    mechanism = gaussian("server")
    pool = Pool([released(0, mechanism)], mechanism, np.random.default_rng(0))
    with pytest.raises(PrivacyError):
        method.aggregate(task, method.server_init(task, 0), pool, 1, np.random.default_rng(0))


# --- Gate ------------------------------------------------------------------------------------------------------------


class Diary(Ledger):
    """A ledger that also notes when it was asked and when it was told."""

    def __init__(self, diary: list[str], budget: float | None) -> None:
        super().__init__(1e-5, "replace", "client", "everyone sees it", budget)
        self.diary = diary

    def ask(self, client, *events):
        self.diary.append("ask")
        super().ask(client, *events)

    def record(self, client, round, event):
        self.diary.append("book")
        super().record(client, round, event)


@dataclass(frozen=True, kw_only=True)
class Noted(GaussianRows):
    """A Gaussian mechanism that writes into the same diary, and may break down."""

    diary: list
    broken: bool = False

    def bound(self, raw, down):
        self.diary.append("bound")
        return super().bound(raw, down)

    def noise(self, bounded, rng, down):
        self.diary.append("noise")
        if self.broken:
            raise OSError("no entropy")
        return super().noise(bounded, rng, down)


def gate(budget: float | None = 50.0, **changes) -> tuple[Gate, Diary]:
    diary: list[str] = []
    values = {"clip": 2.0, "rows": M, "cohort": 4, "noise_multiplier": 1.7, "trust": "client", "relation": "replace"}
    ledger = Diary(diary, budget)
    return Gate(Noted(diary=diary, **values, **changes), ledger, Peer(3, "linear"), SCHEMA), ledger


def test_the_gate_asks_bounds_noises_books_and_only_then_hands_out():
    door, ledger = gate()
    door.ask()
    assert ledger.diary == ["ask"] and ledger.releases(3) == ()
    out = door.release(2, raw(), np.random.default_rng(0))
    assert ledger.diary == ["ask", "ask", "bound", "noise", "book"]
    assert ledger.releases(3) == ((2, Event(1.7)),)
    assert (out.peer, out.round, out.events) == (Peer(3, "linear"), 2, (Event(1.7),))
    assert out.knowledge.weight == 1


@pytest.mark.parametrize(
    "said",
    [
        Knowledge({"logits": torch.zeros(M, K + 1)}),
        Knowledge({"logits": torch.zeros(M, K, dtype=torch.float64)}),
        Knowledge({"logits": torch.zeros(M - 1, K)}),
    ],
)
def test_what_cannot_be_released_raises_and_costs_nothing(said):
    door, ledger = gate()
    with pytest.raises(SchemaError, match=r"client 3, round 2: 'logits' should be"):
        door.release(2, said, np.random.default_rng(0))
    assert ledger.releases(3) == () and "noise" not in ledger.diary


def test_a_release_that_breaks_down_before_it_is_made_costs_nothing():
    door, ledger = gate(broken=True)
    with pytest.raises(OSError, match="no entropy"):
        door.release(2, raw(), np.random.default_rng(0))
    assert ledger.releases(3) == ()


def test_past_the_budget_the_gate_stays_shut_before_anything_is_bounded_or_noised():
    door, ledger = gate(budget=epsilon([Event(1.7, steps=2)], 1e-5, "replace", FINAL_INTERVAL) + 1e-6)
    for t in (1, 2):
        door.release(t, raw(), np.random.default_rng(t))
    ledger.diary.clear()
    for attempt in (door.ask, lambda: door.release(3, raw(), np.random.default_rng(3))):
        with pytest.raises(BudgetExhausted, match=r"client 3: epsilon is .* it was not made"):
            attempt()
    assert ledger.diary == ["ask", "ask"] and len(ledger.releases(3)) == 2


def test_without_a_mechanism_nothing_is_asked_or_booked():
    ledger = Diary([], None)
    out = Gate(Mechanism(), ledger, Peer(0, "linear"), SCHEMA).release(1, raw(), np.random.default_rng(0))
    assert out.events == () and ledger.diary == [] and out.knowledge.weight == 37


def test_an_unprotected_message_with_nan_does_not_leave():
    door = Gate(Mechanism(), Diary([], None), Peer(0, "linear"), SCHEMA)
    with pytest.raises(SchemaError, match="NaN"):
        door.release(1, Knowledge({"logits": torch.full((M, K), torch.nan)}), np.random.default_rng(0))


# --- The server's side of the gate -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"round": 2}, PrivacyError, "got a message of client 0, round 2"),
        ({"peer": Peer(1, "linear")}, PrivacyError, "got a message of client 1, round 1"),
        ({"peer": Peer(0, "mlp")}, PrivacyError, "got a message of client 0"),
        ({"events": ()}, PrivacyError, r"expected the release to book \(Event"),
        ({"events": (Event(1.6),)}, PrivacyError, r"expected the release to book \(Event"),
        ({"events": (Event(1.7, steps=2),)}, PrivacyError, r"expected the release to book \(Event"),
        ({"events": (Event(1.7, 0.5),)}, PrivacyError, r"expected the release to book \(Event"),
        ({"events": (Event(1.7), Event(1.7))}, PrivacyError, r"expected the release to book \(Event"),
        ({"knowledge": Knowledge({})}, SchemaError, "expected tensors"),
        ({"knowledge": Knowledge({"logits": torch.zeros(M, 3)})}, SchemaError, "should be"),
        ({"knowledge": Knowledge({"logits": torch.full((M, K), torch.nan)})}, SchemaError, "NaN"),
        ({"knowledge": Knowledge({"logits": torch.zeros(M, K)}, torch.tensor(-1.0))}, SchemaError, "weight"),
    ],
)
def test_the_server_admits_this_clients_answer_to_this_round_and_nothing_else(changes, error, message):
    mechanism = gaussian()
    good = released(0, mechanism)
    assert admit(good, 1, Peer(0, "linear"), SCHEMA, mechanism) is good
    with pytest.raises(error, match=rf"^client 0, round 1: .*{message}"):
        admit(replace(good, **changes), 1, Peer(0, "linear"), SCHEMA, mechanism)


def test_a_booking_where_none_is_expected_is_refused():
    with pytest.raises(PrivacyError, match=r"expected the release to book \(\)"):
        admit(replace(released(0, Mechanism()), events=(Event(1.0),)), 1, Peer(0, "linear"), SCHEMA, Mechanism())


# --- Refusals --------------------------------------------------------------------------------------------------------


class Peeking(FedMD):
    """Says honestly that it reads records outside training."""

    def reads_records(self):
        return True


class Choosy(FedMD):
    """Sends logits, but reads them one by one."""

    needs_each = True


@pytest.mark.parametrize(
    ("name", "mechanism", "privacy", "message"),
    [
        ("fedgen", "gaussian", {}, r"came down, and sums by class, but fedgen sends other params; use 'ambassador'"),
        ("fedd2s", "gaussian", {}, r"but fedd2s sends other features; use 'ambassador', or method.upload=class_mean"),
        ("feddf", "gaussian", {"trust": "server"}, r"feddf reads each client's answer"),
        ("local", "gaussian", {}, r"privacy.mechanism=gaussian: local sends nothing to protect; use 'none'"),
        ("local", "ambassador", {}, r"privacy.mechanism=ambassador: local sends nothing to protect"),
        ("fedmd", "ambassador", {"delta": 0.05}, r"privacy.delta=0.05: should be below 1/\d+"),
        ("fedavg", "ambassador", {"delta": 0.05}, r"privacy.delta=0.05: should be below"),
        ("fedavg", "ambassador", {"model": "linear"}, r"privacy.model=linear: fedavg sends params"),
        ("feddf", "ambassador", {"model": "mlp"}, r"privacy.model=mlp: feddf sends params"),
        (f"{__name__}:Peeking", "ambassador", {}, r"reads records outside training"),
        (f"{__name__}:Choosy", "gaussian", {"trust": "server"}, r"reads each client's answer, not only their mean"),
    ],
)
def test_what_cannot_be_honoured_is_refused_before_anything_runs(name, mechanism, privacy, message):
    federation = federations.build(configured(name, mechanism, privacy=privacy))
    with pytest.raises(ConfigError, match=message) as caught:
        build(federation)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "mechanism", "privacy"),
    [
        ("fedmd", "gaussian", {"trust": "server"}),
        (f"{__name__}:Choosy", "gaussian", {"trust": "client"}),
        (f"{__name__}:Peeking", "gaussian", {}),
        ("feddf", "ambassador", {}),
        ("local", "none", {}),
    ],
)
def test_what_can_be_honoured_is_built(name, mechanism, privacy):
    built = build(federations.build(configured(name, mechanism, privacy=privacy)))
    assert built.promises == (mechanism != "none")
    assert set(ABOUT) == set(MECHANISMS)


def test_delta_is_compared_with_the_largest_client():
    here = opened("fedmd", "ambassador")
    largest = max(len(index) for index in here.federation.split.train)
    privacy = {"delta": 1 / largest}
    with pytest.raises(ConfigError, match=f"1/{largest}"):
        build(federations.build(configured("fedmd", "ambassador", privacy=privacy)))
    build(federations.build(configured("fedmd", "ambassador", privacy={"delta": 0.99 / largest})))


# --- Budgets ---------------------------------------------------------------------------------------------------------

BUDGETS = [
    ("gaussian", {"trust": "client", "epsilon": 3.0}, {}),
    ("gaussian", {"trust": "server", "epsilon": 0.5}, {}),
    ("gaussian", {"trust": "client", "epsilon": 8.0}, {"cohort": 2, "rounds": 5}),
    ("ambassador", {"epsilon": 4.0, "sampling_rate": 0.35}, {}),
    pytest.param(
        "ambassador", {"epsilon": 8.0, "sampling_rate": 0.6}, {"cohort": 1, "rounds": 4}, marks=pytest.mark.slow
    ),
]


@pytest.mark.parametrize(("mechanism", "privacy", "federation"), BUDGETS)
def test_a_calibrated_run_spends_its_budget_and_not_more(mechanism, privacy, federation):
    config = configured("fedmd", mechanism, privacy=privacy, federation=federation)
    strategy, grid, rounds = strategy_of(config)
    strategy.start(grid)
    budget = privacy["epsilon"]
    assert 0.95 * budget < strategy.ledger.spent(interval=FINAL_INTERVAL) <= budget
    shown = [r.epsilon for r in rounds]
    assert shown == sorted(shown) and shown[0] > 0
    assert shown[-1] == pytest.approx(strategy.ledger.spent(interval=FINAL_INTERVAL), abs=0.02)

    asked = {k: sum(k in (line.client for line in r.lines if line.direction == "up") for r in rounds) for k in range(3)}
    for client, state in grid.homes.items():  # every client's own ledger agrees with the server's
        if asked[client]:
            own = Ledger.from_json(json.loads(str(state.config_records["ledger"]["json"])))
            assert (
                own.releases(client) == strategy.ledger.releases(client) and len(own.releases(client)) == asked[client]
            )
            assert own.spent(client, FINAL_INTERVAL) <= budget


@pytest.mark.parametrize(("mechanism", "privacy", "federation"), [BUDGETS[0], BUDGETS[1], BUDGETS[3]])
def test_a_round_too_many_stops_the_run_before_anything_leaves(mechanism, privacy, federation):
    config = configured("fedmd", mechanism, privacy=privacy, federation=federation)
    strategy, grid, rounds = strategy_of(config)
    with pytest.raises(BudgetExhausted, match="above the budget"):
        strategy.start(grid, num_rounds=5)
    assert [r.t for r in rounds] == [1, 2, 3] and strategy.round == 3
    assert {t for kind, t in grid.sent if kind == "train"} == {"1", "2", "3"}
    assert strategy.ledger.spent(interval=FINAL_INTERVAL) <= privacy["epsilon"]


def test_a_client_keeps_to_its_own_budget_even_if_the_server_forgets_what_was_spent():
    config = configured("fedmd", "gaussian")
    strategy, grid, _ = strategy_of(config)
    strategy.start(grid)
    states = {k: dict(state) for k, state in grid.homes.items()}
    strategy.resume(3, strategy.server, strategy.mechanism.ledger())
    with pytest.raises(BudgetExhausted, match="client 0: epsilon is"):
        strategy.start(grid, num_rounds=4)
    assert {k: dict(state) for k, state in grid.homes.items()} == states
    assert strategy.round == 3


class Eager(FedMD):
    """Raises as soon as it works."""

    def client_update(self, task: Task, client: Client, down: Knowledge) -> tuple[Params, Knowledge]:
        raise AssertionError("worked though the budget was spent")


def test_a_client_asks_its_ledger_before_it_works():
    here = open_site(federations.build(configured(f"{__name__}:Eager", "gaussian")))
    ledger = here.mechanism.ledger()
    for t in (1, 2, 3):
        ledger.record(0, t, *here.mechanism.events())
    state = RecordDict({"ledger": ConfigRecord({"json": json.dumps(ledger.to_json())})})
    with pytest.raises(BudgetExhausted):
        here.train(0, 4, Knowledge({}), state)
    assert list(state) == ["ledger"]
    with pytest.raises(AssertionError, match="worked though"):
        here.train(1, 4, Knowledge({}), RecordDict())


def test_a_forged_ledger_is_refused():
    here = opened("fedmd", "gaussian")
    state = RecordDict()
    here.train(0, 1, Knowledge({}), state)
    value = json.loads(str(state.config_records["ledger"]["json"]))
    value["clients"][0]["releases"] = []
    state["ledger"] = ConfigRecord({"json": json.dumps(value)})
    with pytest.raises(PrivacyError, match="was it edited"):
        here.train(0, 2, Knowledge({}), state)


# --- What leaves -----------------------------------------------------------------------------------------------------


class Loud(FedMD):
    """Claims to have a million records and shouts."""

    def client_update(self, task: Task, client: Client, down: Knowledge) -> tuple[Params, Knowledge]:
        w, said = super().client_update(task, client, down)
        return w, Knowledge({"logits": 1e6 * said.tensors["logits"]}, size(client) + 1e6)


@pytest.mark.parametrize("trust", ["client", "server"])
def test_no_weight_and_no_loud_voice_gets_through(trust):
    config = configured(f"{__name__}:Loud", "gaussian", privacy={"trust": trust, "clip": 1.5})
    here = open_site(federations.build(config))
    out = here.train(0, 1, Knowledge({}), RecordDict()).knowledge
    norms = out.tensors["logits"].norm(dim=1)
    assert out.weight == 1
    if trust == "server":
        torch.testing.assert_close(norms, torch.full((M,), 1.5))
    else:
        std = here.mechanism.noise_multiplier * here.mechanism.sensitivity
        assert float(norms.mean()) < 1.5 + 1.5 * std * math.sqrt(K)


def test_each_mechanism_says_who_sees_what():
    views = {Mechanism().view(), gaussian("client").view(), gaussian("server").view()}
    views.add(opened("fedmd", "ambassador").mechanism.view())
    assert len(views) == 4
    for mechanism in (gaussian("client"), gaussian("server"), opened("fedmd", "ambassador").mechanism):
        ledger = mechanism.ledger()
        ledger.record(0, 1, *mechanism.events())
        text = str(ledger.statement(mechanism.sampling(), mechanism.assumptions()))
        assert mechanism.view() in text and "epsilon is at most" in text
        assert ("one record" in text) == (mechanism.unit == "record")
        assert ("replacing" in text) == (mechanism.relation == "replace")


def test_batch_norm_is_refused_under_dp_sgd(monkeypatch):
    from torch import nn

    from fedkd import models

    def normed(shape, num_classes):
        return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, num_classes))

    monkeypatch.setitem(models.MODELS, "normed", (normed, "with BatchNorm"))
    monkeypatch.setitem(models.IMAGE_MODELS, "normed", (normed, "with BatchNorm"))
    config = configured("fedavg", "ambassador", model={"name": "normed"})
    with pytest.raises(ConfigError, match="model 'normed' has BatchNorm"):
        build(federations.build(config))
