"""Sums by class with counts: how far one record or client moves them, noise as claimed, absent classes, one answer."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clients.app import app
from clients.client import open_site, site
from clients.engines.loop import Loop
from clients.engines.pool import Pool
from clients.engines.vectorised import Vectorised
from fedkd import federation as federations
from fedkd import wire
from fedkd.config import Config
from fedkd.errors import ConfigError, PrivacyError
from fedkd.grid import LocalGrid
from fedkd.knowledge import Knowledge, fingerprint
from fedkd.losses import cross_entropy
from fedkd.method import Peer
from fedkd.models import IMAGE_MODELS, build, with_features
from privacy.accounting import epsilon
from privacy.class_sums import GaussianSums, RecordSums
from privacy.dp_sgd import ClippedSum
from privacy.events import Event
from privacy.gate import Pool as Answers
from privacy.gate import Released
from privacy.mechanisms import refuse
from strategies.feddistill import FedDistill
from strategies.fedproto import FedProto
from strategies.flower import KnowledgeStrategy
from tests.helpers.small import SHAPE, K, config, make_client, make_task, padded, run

D = 6
ODD = (math.nan, math.inf, -math.inf, 0.0, 3e38, -3e38, 1e30, 1e-30, 1.0)


def record_sums(clip: float = 2.0, noise: float = 1.5, min_count: float = 1.0) -> RecordSums:
    return RecordSums(clip, noise, min_count)


def gaussian(trust: str = "client", **changes) -> GaussianSums:
    relation = "replace" if trust == "client" else "add_remove"
    values = {"clip": 3.0, "cohort": 5, "noise_multiplier": 1.7, "min_count": 1.0, "budget": 5.0}
    return GaussianSums(trust=trust, relation=relation, **{**values, **changes})


def said(seed: int, scale: float = 1.0, classes: int = K, d: int = D) -> Knowledge:
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 40, (classes,), generator=g).float()
    means = scale * torch.randn((classes, d), generator=g)
    return Knowledge({"sums": counts[:, None] * means, "counts": counts}, torch.tensor(9.0))


def flat(knowledge: Knowledge, clip: float) -> Tensor:
    """A message as the noise sees it: sums in units of the clip, counts as they are."""
    return torch.cat([knowledge.tensors["sums"].double().flatten() / clip, knowledge.tensors["counts"].double()])


def is_chi_square(z: Tensor) -> bool:
    """Whether numbers are as wide as standard normal ones, within five standard errors."""
    n = z.numel()
    return abs(float(z.double().square().sum()) - n) < 5 * math.sqrt(2 * n)


# --- Sensitivity -----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.sampled_from(ODD), min_size=D, max_size=D),
    label=st.integers(0, K - 1),
    others=st.integers(0, 6),
    clip=st.floats(1e-2, 1e2),
)
def test_one_record_moves_its_class_by_at_most_the_clip_and_one_whatever_it_holds(values, label, others, clip):
    task = make_task("linear")
    start = task.model.init(0)
    client = make_client(task, [k % K for k in range(others)])
    row = torch.tensor(values)
    more = client._replace(
        x=torch.cat([client.x, torch.full((1, *SHAPE), 7.0)]), y=torch.cat([client.y, torch.tensor([label])])
    )

    def rows(params, x: Tensor) -> Tensor:
        h = x.flatten(1)[:, :D]
        return torch.where(h[:, :1] == 7, row, h)

    here = record_sums(clip)
    without, with_it = (Knowledge(dict(zip(("sums", "counts"), here.sums(task, start, c, rows), strict=True)))
                        for c in (client, more))  # fmt: skip
    apart = flat(with_it, clip) - flat(without, clip)
    assert apart.isfinite().all()
    assert float(apart.norm()) <= math.sqrt(2) * (1 + 1e-4)
    moved = (with_it.tensors["sums"] - without.tensors["sums"]).abs().sum(1) > 1e-4 * clip
    assert not moved[torch.arange(K) != label].any()


def test_a_record_can_move_the_sums_as_far_as_the_noise_assumes():
    task, here = make_task("linear"), record_sums(2.0)
    one = make_client(task, [1])
    sums, counts = here.sums(task, task.model.init(0), one, lambda p, x: 1e3 * torch.ones((len(x), D)))
    assert float(flat(Knowledge({"sums": sums, "counts": counts}), 2.0).norm()) == pytest.approx(math.sqrt(2), rel=1e-5)


def test_an_empty_client_says_zeros_and_padding_says_nothing():
    task, here = make_task("linear"), record_sums()
    start, client = task.model.init(0), make_client(task, [0, 1, 1, 3])
    empty = client._replace(x=client.x[:0], y=client.y[:0])
    assert not any(part.any() for part in here.sums(task, start, empty, task.model.apply))
    for a, b in zip(
        here.sums(task, start, client, task.model.apply),
        here.sums(task, start, padded(client), task.model.apply),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@settings(max_examples=80, deadline=None)
@given(
    sums=st.lists(st.one_of(st.sampled_from(ODD), st.floats(width=32)), min_size=K * 2, max_size=K * 2),
    counts=st.lists(st.one_of(st.sampled_from(ODD), st.floats(0, 1e4, width=32)), min_size=K, max_size=K),
    clip=st.floats(1e-2, 1e3),
)
def test_no_clients_answer_is_longer_than_one_whatever_it_held(sums, counts, clip):
    raw = Knowledge({"sums": torch.tensor(sums).reshape(K, 2), "counts": torch.tensor(counts)}, torch.tensor(50.0))
    bounded = gaussian(clip=clip).bound(raw)
    assert bounded.weight == 1
    length = math.hypot(*(float(part.double().norm()) for part in bounded.tensors.values()))
    assert math.isfinite(length) and length <= 1 + 1e-5


def test_two_answers_are_nearer_than_the_sensitivity_and_one_is_as_long_as_its_bound():
    for trust, most in (("client", 2.0), ("server", 1.0)):
        assert gaussian(trust).sensitivity == most
    here = gaussian()
    bounded = [here.bound(said(seed, scale)) for seed in range(6) for scale in (1e-3, 1.0, 1e4)]
    vectors = [torch.cat([part.double().flatten() for part in one.tensors.values()]) for one in bounded]
    assert all(float(v.norm()) == pytest.approx(1, rel=1e-5) for v in vectors)
    assert max(float((a - b).norm()) for a in vectors for b in vectors) <= 2


def test_a_client_that_comes_or_goes_moves_the_sum_by_at_most_one():
    here = gaussian("server", noise_multiplier=0.0, min_count=0.0)
    bounded = [here.bound(said(seed, 10.0)) for seed in range(5)]
    rng = np.random.default_rng(0)
    everyone, fewer = (flat(here.noisy_mean(part, rng), here.clip) for part in (bounded, bounded[1:]))
    assert float(here.cohort * (everyone - fewer).norm()) == pytest.approx(1, rel=1e-4)


def test_the_scaling_leaves_means_below_the_clip_as_they_are():
    raw = said(0, 0.1)
    raw.tensors["sums"][2], raw.tensors["counts"][2] = 0.0, 0.0
    bounded = gaussian(clip=3.0).bound(raw).tensors
    held = raw.tensors["counts"] > 0
    means = 3.0 * bounded["sums"][held] / bounded["counts"][held, None]
    torch.testing.assert_close(means, raw.tensors["sums"][held] / raw.tensors["counts"][held, None])
    assert not bounded["sums"][2].any() and bounded["counts"][2] == 0
    nothing = gaussian().bound(Knowledge({"sums": torch.zeros(K, D), "counts": torch.zeros(K)}))
    assert not any(part.any() for part in nothing.tensors.values())


# --- Noise -----------------------------------------------------------------------------------------------------------

LARGE = {"classes": 200, "d": 30}


def test_the_noise_on_records_sums_is_as_strong_as_claimed():
    here = record_sums(clip=2.0, noise=1.5, min_count=0.0)
    raw = said(0, **LARGE)
    raw.tensors["counts"] += 1000  # all of them present
    noised = here.noised(raw, np.random.default_rng(0))
    z = (flat(noised, 2.0) - flat(raw, 2.0)) / (1.5 * math.sqrt(2))
    for part in (z, z[-200:]):  # counts as well
        assert is_chi_square(part) and not is_chi_square(2 * part)
    assert is_chi_square(z) and not is_chi_square(1.1 * z)


@pytest.mark.parametrize(("trust", "answered"), [("client", 1), ("server", 5), ("server", 2)])
def test_the_noise_on_a_clients_sums_is_as_strong_as_claimed(monkeypatch, trust, answered):
    monkeypatch.setattr(
        "privacy.class_sums._present", lambda sums, counts, least: Knowledge({"sums": sums, "counts": counts})
    )
    here = gaussian(trust)
    bounded = [here.bound(said(seed, **LARGE)) for seed in range(answered)]
    if trust == "client":
        got, plain, std = here.noise(bounded[0], np.random.default_rng(0)), flat(bounded[0], 1.0), 1.7 * 2
    else:
        assert here.noise(bounded[0], np.random.default_rng(0)) is bounded[0]
        got, std = here.noisy_mean(bounded, np.random.default_rng(0)), 1.7 / 5
        plain = sum(flat(one, 1.0) for one in bounded) / 5
    z = (flat(got, here.clip) - plain) / std
    assert is_chi_square(z) and not is_chi_square(1.1 * z)


def test_a_simulated_cohort_scales_the_means_noise_and_promises_nothing():
    few, many = gaussian("server"), gaussian("server", noise_cohort=500)
    bounded = [few.bound(said(seed, **LARGE)) for seed in range(5)]
    one, other = (replace(m, min_count=0.0).noisy_mean(bounded, np.random.default_rng(0)) for m in (few, many))
    silent = replace(few, noise_multiplier=0.0, min_count=0.0).noisy_mean(bounded, np.random.default_rng(0))
    both = (one.tensors["counts"] > 0) & (other.tensors["counts"] > 0)
    loud, quiet = ((m.tensors["sums"] - silent.tensors["sums"])[both] for m in (one, other))
    torch.testing.assert_close(quiet, loud / 100, rtol=1e-2, atol=1e-4)
    assert many.hypothetical and not few.hypothetical
    assert any(line.startswith("a simulation: the noise is that of 500 clients") for line in many.assumptions())
    assert not any("simulation:" in line for line in few.assumptions())


@pytest.mark.parametrize("clip", [0.5, 20.0])
@pytest.mark.parametrize(("trust", "noise"), [("server", 0.05), ("server", 0.3), ("client", 0.05), ("client", 0.01)])
def test_signal_to_noise_is_near_its_true_value(trust, noise, clip):
    here = gaussian(trust, cohort=20, noise_multiplier=noise, clip=clip)
    bounded = [here.bound(said(seed % 4, scale=100.0, classes=40, d=50)) for seed in range(20)]
    found, true = [], []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        noised = [here.noise(one, rng) for one in bounded]
        pool = Answers([Released(Peer(k, "mlp"), 1, one, ()) for k, one in enumerate(noised)], here, rng)
        heard = noised if trust == "client" else [pool.mean] * 20
        present = [one.tensors["counts"] > 0 for one in heard]
        signal = torch.stack(
            [there[:, None] * one.tensors["sums"] for there, one in zip(present, bounded, strict=True)]
        ).mean(0)
        times = sum(map(int, map(torch.sum, present)))
        std = noise * math.sqrt(times / 20) / 20 if trust == "server" else 2 * noise * math.sqrt(times) / 20
        found.append(pool.signal_to_noise())
        true.append(float(signal.norm()) / (std * math.sqrt(50)))
    assert np.mean(found) == pytest.approx(np.mean(true), rel=0.1)


# --- Events ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trust", ["client", "server"])
def test_what_a_whole_run_books_is_at_most_epsilon_and_nearly_it(trust):
    cfg = config("fedproto", federation={"rounds": 7}, data={"alpha": 10.0})
    cfg = Config.from_raw({**cfg.raw(), "privacy": {"mechanism": "gaussian", "trust": trust, "epsilon": 3.0}})
    here = open_site(federations.build(cfg)).mechanism
    assert isinstance(here, GaussianSums) and here.events() == (Event(here.noise_multiplier),)
    assert 0.99 * 3 < epsilon(here.events() * 7, here.delta, here.relation) <= 3
    assert epsilon(here.events() * 8, here.delta, here.relation) > 3


def test_dp_sgd_and_the_sums_share_the_budget_of_an_ambassador():
    here = open_site(federations.build(private("fedproto", epsilon=4.0, sums_share=0.4, sampling_rate=0.5))).mechanism
    booked = here.events()
    assert booked == (here.dp.event(), Event(here.summary.noise_multiplier))
    assert 0.97 * 4 < epsilon(booked * 2, here.delta, "add_remove") <= 4
    assert epsilon(booked[1:] * 2, here.delta, "add_remove") == pytest.approx(1.6, rel=0.01)


# --- Absent classes --------------------------------------------------------------------------------------------------


def test_a_class_with_too_low_a_noisy_count_is_absent_in_both_tensors():
    counts = torch.tensor([0.0, 1.0, 30.0, 300.0]).repeat(50)
    raw = Knowledge({"sums": torch.full((200, D), 5.0), "counts": counts})
    for noised, least in (
        (record_sums(2.0, 1.5, min_count=3.0).noised(raw, np.random.default_rng(0)), 3 * 1.5 * math.sqrt(2)),
        (gaussian(min_count=2.0).noise(gaussian().bound(raw), np.random.default_rng(0)), 2 * 2 * 1.7),
    ):
        told, sums = noised.tensors["counts"], noised.tensors["sums"]
        absent = told == 0
        assert ((told > least) | absent).all() and absent.any() and not absent.all()
        assert not sums[absent].any() and sums[~absent].any(1).all()


def test_without_a_least_count_a_negative_one_is_still_absent():
    raw = Knowledge({"sums": torch.zeros(100, D), "counts": torch.zeros(100)})
    told = record_sums(min_count=0.0).noised(raw, np.random.default_rng(0)).tensors["counts"]
    assert (told >= 0).all() and 30 < int((told > 0).sum()) < 70


@pytest.mark.parametrize("mechanism", ["gaussian", "ambassador"])
def test_a_message_is_shaped_alike_whatever_classes_a_client_has(mechanism):
    split = {"partition": "pathological", "classes": 3, "alpha": None}
    here = open_site(federations.build(private("fedproto", mechanism, data=split)))
    shapes = set()
    for client in range(4):
        out = here.train(client, 1, Knowledge({}), RecordDict()).knowledge
        shapes.add((float(out.weight), *((n, tuple(v.shape), v.dtype) for n, v in sorted(out.tensors.items()))))
    assert len(shapes) == 1


# --- Ambassadors -----------------------------------------------------------------------------------------------------


def private(name: str, mechanism: str = "ambassador", data=None, **fields) -> Config:
    own = {"delta": 1e-3, "steps": 2, "sampling_rate": 1.0} if mechanism == "ambassador" else {}
    split = {"partition": "iid", "alpha": None, **(data or {})}
    method = {"upload": "class_mean"} if name == "fedd2s" else {}
    raw = config(name, **method).raw()
    raw["data"] = {k: v for k, v in {**raw["data"], **split}.items() if v is not None}
    return Config.from_raw({**raw, "privacy": {"mechanism": mechanism, **own, **fields}})


class Rounded(FedProto):
    """Says something else than the sums: a copy, which only looks like post-processing."""

    def client_update(self, task, client, down):
        w, out = super().client_update(task, client, down)
        return w, Knowledge({name: value.clone() for name, value in out.tensors.items()})


class Besides(FedDistill):
    """Says something of the sums in a tensor of its own, which gets no noise."""

    def client_update(self, task, client, down):
        w, out = super().client_update(task, client, down)
        return w, Knowledge({**out.tensors, "largest": out.tensors["sums"].amax()})


class Hoarding(FedDistill):
    """Takes the sums home, to tell them in a later round."""

    def client_update(self, task, client, down):
        w, out = super().client_update(task, client, down)
        return {**w, "head.bias": out.tensors["counts"]}, out


class Backwards(FedDistill):
    """Sums up first, so that it could train towards the sums."""

    def client_update(self, task, client, down):
        sums, counts = task.sums(task, client.personal, client, self.summed(task, down))
        return task.fit(task, client.personal, client), Knowledge({"sums": sums, "counts": counts})


class Twice(FedDistill):
    """Sums up once more than it says."""

    def client_update(self, task, client, down):
        w, out = super().client_update(task, client, down)
        task.sums(task, w, client, self.summed(task, down))
        return w, out


class Unsaid(FedDistill):
    """Sums up, though it says that it does not."""

    def answers_sums(self):
        return False


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("Rounded", "have to be said as they are, as .'sums', 'counts'."),
        ("Besides", "have to be said as they are, as .'sums', 'counts'."),
        ("Hoarding", "keeps at home what was fitted, or what it had, and nothing else"),
        ("Backwards", "may fit an ambassador once a round, and before it sums up"),
        ("Twice", "may sum up an ambassador's records once a round, and say so beforehand"),
        ("Unsaid", "may sum up an ambassador's records once a round, and say so beforehand"),
    ],
)
def test_an_ambassador_says_the_sums_as_they_are_once_and_as_announced(method, reason):
    here = open_site(federations.build(private(f"{__name__}:{method}")))
    state = RecordDict()
    with pytest.raises(PrivacyError, match=reason):
        here.train(0, 1, Knowledge({}), state)
    assert list(state) == []


def test_the_ledgers_of_client_and_server_hold_both_events_of_every_round():
    strategy, rounds, grid = run(private("fedproto", epsilon=5.0))
    here = strategy.mechanism
    expected = tuple((t, event) for t in (1, 2) for event in here.events())
    assert len(expected) == 4
    for client in range(4):
        assert strategy.ledger.releases(client) == expected
        assert open_site(strategy.federation).ledger(grid.homes[client]).releases(client) == expected
    assert rounds[-1].epsilon <= 5.0


@pytest.mark.parametrize("mechanism", ["ambassador", "gaussian"])
def test_rounds_that_are_paid_for_without_an_answer_are_refused(mechanism):
    raw = private("fedd2s", mechanism).raw()
    silent = Config.from_raw({**raw, "method": {**raw["method"], "final": "stop"}})
    with pytest.raises(
        ConfigError, match=r"with method.final=stop fedd2s sends nothing .*; use method.final=keep_last"
    ):
        refuse(silent)
    refuse(Config.from_raw({**silent.raw(), "privacy": {"mechanism": "none"}}))


def outcome(cfg: Config, engine):
    here = site(cfg.to_json())
    rounds: list = []
    grid = LocalGrid(engine, cfg.federation.clients, {"config": cfg.to_json()})
    strategy = KnowledgeStrategy(here.federation, here.mechanism, rounds.append)
    strategy.start(grid)
    assert [line for r in rounds for line in r.failures] == []
    homes = {k: wire.from_record(s.array_records["personal"]) for k, s in sorted(grid.homes.items())}
    return strategy.server, homes, strategy.ledger.to_json()


NAMES = ("fedproto", "feddistill", "fedd2s")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mechanism", ["ambassador", "gaussian"])
def test_every_engine_gives_the_loops_sums(name, mechanism):
    cfg = private(name, mechanism, epsilon=1e4)
    server, homes, ledger = outcome(cfg, Loop(app))
    with Pool("clients.app:app", workers=2) as pool:
        got = outcome(cfg, pool)
    assert fingerprint(got[0]) == fingerprint(server) and got[2] == ledger
    assert [fingerprint(h) for h in got[1].values()] == [fingerprint(h) for h in homes.values()]
    got = outcome(cfg, Vectorised(app, block=3))
    assert got[2] == ledger
    for one, other in ((got[0], server), *((got[1][k], homes[k]) for k in homes)):
        assert one.keys() == other.keys()
        for key in one:
            torch.testing.assert_close(one[key], other[key], rtol=1e-4, atol=1e-4)


# --- What makes no sense ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mechanism", "method", "reason"),
    [
        ("fedproto", "gaussian", {"weighting": "uniform"}, "prototypes; use 'ambassador', or method.weighting=counts"),
        ("fedproto", "ambassador", {"weighting": "uniform"}, "does not cover; set method.weighting=counts$"),
        ("fedd2s", "ambassador", {}, "does not cover; set method.upload=class_mean$"),
        (
            "fedd2s",
            "ambassador",
            {"upload": "class_mean", "downlink": "head"},
            "does not cover; set method.downlink=logits$",
        ),
        (
            "fedd2s",
            "ambassador",
            {"kd_grad": "shared_only"},
            "does not cover; set method.upload=class_mean and method.kd_grad=all$",
        ),
        ("fedgkt", "ambassador", {}, "does not cover; use another mechanism or method$"),
        ("fedgkt", "gaussian", {}, "fedgkt sends other features; use 'ambassador'$"),
        ("fedproto", "laplace", {}, "prototypes; use 'ambassador'$"),
    ],
)
def test_a_refusal_names_what_makes_the_method_answer_with_sums(name, mechanism, method, reason):
    raw = {**config(name, **method).raw(), "privacy": {"mechanism": mechanism}}
    with pytest.raises(ConfigError, match=reason) as error:
        refuse(Config.from_raw(raw))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["feddistill", "fedd2s"])
def test_a_method_that_reads_each_answer_needs_noise_at_the_client(name):
    with pytest.raises(ConfigError, match=f"{name} reads each client's answer, not only their mean; use trust=client$"):
        refuse(private(name, "gaussian", trust="server"))


# --- Features beside logits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_with_features_is_features_and_logits_side_by_side(name):
    model = build(name, (1, 8, 8), K)
    params, x = model.init(0), torch.randn((5, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    for depth in range(len(model.blocks)):
        both = with_features(model, depth)
        assert both.schema == model.schema and with_features(model, depth) is both
        expected = torch.cat([model.features(params, x, depth).flatten(1), model.apply(params, x)], 1)
        assert torch.equal(both.apply(params, x), expected)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_ghost_clipping_of_features_and_logits_is_that_of_every_record_alone(name):
    plain = build(name, (1, 8, 8), K)
    model, params = with_features(plain, len(plain.blocks) - 1), plain.init(0)
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn((9, 1, 8, 8), generator=g), torch.randint(0, K, (9,), generator=g)
    clip = 0.7

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(out[:, -K:], y) + 3 * out[:, :-K].square().mean(-1)

    def one(p, x: Tensor, y: Tensor) -> Tensor:
        return loss(model.apply(p, x[None]), y[None]).squeeze(0)

    grads = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))(params, x, y)
    norms = torch.stack([v.flatten(1).norm(dim=1) for v in grads.values()]).norm(dim=0)
    assert (norms > clip).any()
    expected = {n: torch.tensordot((clip / (norms + 1e-6)).clamp(max=1), v, 1) for n, v in grads.items()}
    total = ClippedSum(model, clip, loss)(params, x, y)
    assert total.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(total[key], expected[key], rtol=1e-4, atol=1e-5)
