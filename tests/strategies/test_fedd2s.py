"""FedD2S: its schedule to the letter, what travels in how many bytes, which gradients reach what, that it helps."""

import itertools
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from clients.app import app
from clients.client import open_site, site
from clients.engines.loop import Loop
from clients.engines.vectorised import Vectorised
from fedkd import federation as federations
from fedkd import learn, wire
from fedkd.config import Config
from fedkd.errors import ConfigError
from fedkd.grid import LocalGrid
from fedkd.knowledge import Knowledge, fingerprint, nest, pick
from fedkd.losses import kl
from fedkd.method import Peer
from fedkd.optim import Sgd
from privacy.gate import Pool, Released
from strategies.fedd2s import FedD2S, feature_shape, lookup
from strategies.flower import KnowledgeStrategy

CLIENTS, K = 4, 10
WIDTHS = {"block1": 128, "block2": 64}  # of the mlp


def tiny(rounds: int = 2, model: str = "mlp", data=None, federation=None, by_client=None, name="fedd2s", **method):
    return Config.from_raw(
        {
            "seed": 5,
            "data": {"limit": 500, "test": 100, "reserve": 60, **(data or {"partition": "dirichlet", "alpha": 1.0})},
            "federation": {"clients": CLIENTS, "rounds": rounds, "evaluate_every": rounds, **(federation or {})},
            "model": {"name": model, **({"by_client": by_client} if by_client else {})},
            "method": {"name": name, "lr": 0.01, "batch": 16, **method},
        }
    )


def run(config: Config, engine=Loop):
    """The strategy after the run, its rounds, and what every client holds at home."""
    here, rounds = site(config.to_json()), []
    grid = LocalGrid(engine(app), config.federation.clients, {"config": config.to_json()})
    strategy = KnowledgeStrategy(here.federation, here.mechanism, rounds.append)
    strategy.start(grid)
    assert [line.refused for r in rounds for line in r.failures] == []
    homes = {k: wire.from_record(s.array_records["personal"]) for k, s in grid.homes.items() if "personal" in s}
    return strategy, rounds, homes


def scene(model: str = "mlp", **method):
    """A site, its method and the tasks of the server and of client 0."""
    here = open_site(federations.build(tiny(model=model, **method)))
    return here, here.federation.config.method, here.federation.client_task(0)


def answer(here, server, t, client=0, w=None):
    """What a client is told, holds afterwards and says."""
    method, task = here.federation.config.method, here.federation.client_task(client)
    own = here.tensors(client, t, method.personal_init(task, 5, client) if w is None else w)
    down = method.send(here.federation.server_task, server, t, Peer(client, task.model.name))
    return down, *method.client_update(task, own, down)


def served(here, server, said: dict[int, Knowledge], t):
    """The server after a round of these answers."""
    method, task = here.federation.config.method, here.federation.server_task
    models = here.federation.client_models
    released = [Released(Peer(k, models[k]), t, knowledge, ()) for k, knowledge in said.items()]
    pool = Pool(released, here.mechanism, np.random.default_rng(0))
    return method.aggregate(task, server, pool, t, np.random.default_rng(1))


def first_round(here):
    server = here.federation.config.method.server_init(here.federation.server_task, 5)
    return served(here, server, {k: answer(here, server, 1, k)[2] for k in range(CLIENTS)}, 1)


def depths_sent(rounds, client=None):
    """Width of the features that went up, by round."""
    return [
        {line.shapes["record/h"][1] for line in r.lines if line.direction == "up" and client in (None, line.client)}
        for r in rounds
    ]


# --- The schedule ----------------------------------------------------------------------------------------------------

GOLDEN = {
    0.0: [4] * 13,
    0.1: [4] * 10 + [3] * 3,
    0.25: [4, 4, 4, 4, 3, 3, 3, 3, 2, 2, 2, 2, 1],
    0.5: [4, 4, 3, 3, 2, 2] + [1] * 7,
    1.0: [4, 3, 2] + [1] * 10,
}


@pytest.mark.parametrize("rate", GOLDEN)
def test_the_golden_schedule(rate):
    method = FedD2S(mode="rate", rate=rate)
    assert [method.cut(t, (4, 3, 2, 1), 13) for t in range(13)] == GOLDEN[rate]


@pytest.mark.parametrize("rate", ["0.1", "0.02", "0.05", "0.07", "0.29", "0.3", "0.9"])
def test_no_round_slips_in_binary_floating_point(rate):
    method, cuts = FedD2S(mode="rate", rate=float(rate)), list(range(400, 0, -1))
    exact = [cuts[min(399, t * Fraction(rate) // 1)] for t in range(1000)]
    assert [method.cut(t, cuts, 1000) for t in range(1000)] == exact


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"mode": "off"}, [3] * 12),
        ({"mode": "period", "period": 5}, [3] * 5 + [2] * 5 + [1] * 2),
        ({"mode": "period", "period": 3, "final": "stop"}, [3] * 3 + [2] * 3 + [1] * 3 + [None] * 3),
        ({"mode": "fraction"}, [3] * 4 + [2] * 4 + [1] * 4),
        ({"mode": "fraction", "final": "stop"}, [3] * 4 + [2] * 4 + [1] * 4),
        ({"mode": "switch"}, [3] * 6 + [1] * 6),
        ({"mode": "switch", "final": "stop"}, [3] * 6 + [None] * 6),
        ({}, [3, 3, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1]),  # by default one drop every T / 2J rounds
        ({"final": "stop"}, [3, 3, 2, 2, 1, 1, None, None, None, None, None, None]),
    ],
)
def test_the_other_schedules(fields, expected):
    assert [FedD2S(**fields).cut(t, (3, 2, 1), 12) for t in range(12)] == expected


@pytest.mark.parametrize("rounds", [1, 2, 3, 5, 10, 17, 100, 1_000_000_000])
@pytest.mark.parametrize("cuts", [(1,), (2, 1), (3, 2, 1), (9, 7, 4, 2)])
def test_by_default_every_cut_has_its_turn_and_none_is_passed_over(rounds, cuts):
    seen = [FedD2S().cut(t, cuts, rounds) for t in range(min(rounds, 200))]
    assert seen[0] == cuts[0]
    assert all(b in (a, cuts[min(cuts.index(a) + 1, len(cuts) - 1)]) for a, b in itertools.pairwise(seen))
    if 2 * len(cuts) <= rounds <= 200:
        assert seen[rounds // 2] == cuts[-1]


def test_the_order_of_cuts_is_the_servers_and_random_comes_from_the_seed():
    cuts = {}
    for order in ("deep_to_shallow", "shallow_to_deep", "random"):
        _, method, task = scene("cnn", order=order)
        cuts[order] = [method.server_init(task, seed)["cuts/cnn"].tolist() for seed in (*range(12), 0)]
    assert cuts["deep_to_shallow"] == [[3, 2, 1]] * 13
    assert cuts["shallow_to_deep"] == [[1, 2, 3]] * 13
    assert all(sorted(c) == [1, 2, 3] for c in cuts["random"]) and len(set(map(tuple, cuts["random"]))) > 2
    assert cuts["random"][0] == cuts["random"][-1]


@pytest.mark.slow
def test_rounds_are_counted_from_one_and_the_global_clock_does_not_ask_who_takes_part():
    for cohort in (1, CLIENTS):
        _, rounds, _ = run(tiny(6, mode="period", period=2, federation={"cohort": cohort}))
        assert depths_sent(rounds) == [{64}] * 2 + [{128}] * 4
    _, rounds, _ = run(tiny(4, order="shallow_to_deep", mode="period", period=3))
    assert depths_sent(rounds) == [{128}] * 3 + [{64}]


def test_the_other_clock_counts_a_clients_own_answers():
    clock = {"clock": "client_participations", "mode": "period", "period": 2}
    strategy, rounds, _ = run(tiny(8, federation={"cohort": 2}, **clock))
    turns = dict.fromkeys(range(CLIENTS), 0)
    for r in rounds:
        for line in r.lines:
            if line.direction == "up":
                assert line.shapes["record/h"][1] == (64 if turns[line.client] < 2 else 128)
                turns[line.client] += 1
    assert {k: int(strategy.server.get(f"client/{k:05d}/turns", 0)) for k in turns} == turns
    assert len({w for widths in depths_sent(rounds) for w in widths}) == 2


def test_a_dropping_set_by_name_and_one_for_each_architecture():
    config = tiny(3, by_client=["mlp", "cnn"], dropping=["block1", "block3"], mode="period", period=1)
    strategy, rounds, _ = run(config)
    assert strategy.server["cuts/mlp"].tolist() == [1] and strategy.server["cuts/cnn"].tolist() == [3, 1]
    shapes = [{line.client: line.shapes["record/h"][1:] for line in r.lines if line.direction == "up"} for r in rounds]
    assert [s[0] for s in shapes] == [(128,)] * 3
    assert [s[1] for s in shapes] == [(256,), (16, 4, 4), (16, 4, 4)]


# --- Heads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["linear", "mlp", "cnn", "resnet8"])
def test_there_is_a_head_for_every_cut_and_it_fits_the_features(model):
    here, method, task = scene(model)
    server = method.server_init(task, 5)
    x, _ = here.federation.train_set(0)
    w = task.model.init(1)
    assert method.depths(task.model) == list(range(len(task.model.blocks) - 1, 0, -1))
    for d in method.depths(task.model):
        head = pick(f"head/{model}/{d}", server)
        assert head.keys() == task.model.schema.keys() - set(task.model.under(d))
        h = task.model.features(w, x[:3], d)
        assert h.shape[1:] == feature_shape(task.model, d, tuple(x.shape[1:]))
        assert task.model.head(head, h, d).shape == (3, K)


def test_a_new_head_takes_over_what_it_can_from_the_one_before():
    here, method, task = scene(dropping=["block2", "block1"], mode="period", period=1, lr=1e-12)
    server = method.server_init(task, 5)
    taught = {k: torch.randn(p.shape) for k, p in pick("head/mlp/2", server).items()}
    server |= nest("head/mlp/2", taught) | {"trained/mlp/2": torch.tensor(3)}
    fresh = pick("head/mlp/1", server)
    after = served(here, server, {0: answer(here, server, 2)[2]}, 2)
    head = pick("head/mlp/1", after)
    for key, value in head.items():
        torch.testing.assert_close(value, taught.get(key, fresh[key]), rtol=0, atol=1e-6)
    assert head.keys() > taught.keys()
    torch.testing.assert_close(pick("head/mlp/2", after), taught, rtol=0, atol=0)

    own = dict(after) | nest("head/mlp/1", {k: p + 1 for k, p in head.items()})  # once trained, it goes on from itself
    later = pick("head/mlp/1", served(here, own, {0: answer(here, own, 3)[2]}, 3))
    for key, value in later.items():
        torch.testing.assert_close(value, head[key] + 1, rtol=0, atol=1e-6)


def test_a_head_warms_up_in_its_first_round_only():
    heads = {}
    for warmup, epochs in ((1, 1), (0, 2), (0, 1)):
        here, method, task = scene(mode="off", warmup_heads=warmup, server_epochs=epochs)
        server = method.server_init(task, 5)
        first = served(here, server, {0: answer(here, server, 1)[2]}, 1)
        trained = dict(server) | {"trained/mlp/2": torch.tensor(1)}
        again = served(here, trained, {0: answer(here, server, 1)[2]}, 2)
        heads[warmup, epochs] = [fingerprint(pick("head/mlp/2", state)) for state in (first, again)]
    assert heads[1, 1] == [heads[0, 2][0], heads[0, 1][1]] and heads[0, 2] != heads[0, 1]


@pytest.mark.parametrize("answers", ["after", "training"])
def test_the_server_answers_the_very_rows_it_was_sent(answers):
    here, method, task = scene(mode="off", answers=answers, lr=1e-12)
    after = first_round(here)
    server = method.server_init(task, 5)
    for k in range(CLIENTS):
        said = answer(here, server, 1, k)[2].tensors
        q = task.model.head(pick("head/mlp/2", after), said["record/h"], 2)
        torch.testing.assert_close(after[f"client/{k:05d}/record/q"], q, rtol=1e-4, atol=1e-5)
        assert torch.equal(after[f"client/{k:05d}/record/id"], said["record/id"])


@pytest.mark.parametrize("downlink", ["logits", "head"])
@pytest.mark.parametrize("heads", ["shared", "own"])
def test_only_a_head_of_ones_own_sees_nobody_elses_records(heads, downlink):
    here, method, task = scene(mode="period", period=1, heads=heads, downlink=downlink)
    told = {}
    for who in ((0,), (0, 1)):  # the head of round 2 starts from that of round 1
        server = method.server_init(task, 5)
        for t in (1, 2):
            server = served(here, server, {k: answer(here, server, t, k)[2] for k in who}, t)
        told[who] = method.send(task, server, 3, Peer(0, "mlp")).tensors
    assert told[0,].keys() == told[0, 1].keys() and len(told[0,]) > 1
    assert (fingerprint(told[0,]) == fingerprint(told[0, 1])) == (heads == "own")


def test_the_head_that_was_sent_decides_where_that_is_asked_for():
    here, method, task = scene(mode="period", period=1, downlink="head", inference="head")
    after, own = first_round(here), task.model.init(9)
    down = method.send(here.federation.server_task, after, 2, Peer(0, "mlp"))
    judged, x = method.judged(down, own), torch.randn((5, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    h = task.model.features(own, x, 2)
    assert torch.equal(task.model.apply(judged, x), task.model.head(pick("head/mlp/2", after), h, 2))
    assert not torch.equal(task.model.apply(judged, x), task.model.apply(own, x))
    assert method.judged(Knowledge({}), own) == own
    assert FedD2S(downlink="head").judged(down, own) is own


def test_padding_does_not_stretch_the_scale_of_int8():
    h = torch.tensor([[0.5, -1.0], [0.25, 0.0], [100.0, 100.0]])
    sent, told = FedD2S(feature_dtype="int8")._compress(h, torch.tensor([True, True, False]))
    assert float(told["scale"]) == pytest.approx(1 / 127) and sent[0].tolist() == [64, -127]


def test_a_label_that_is_none_has_no_say():
    here, method, task = scene(mode="off")
    server = method.server_init(task, 5)
    said = answer(here, server, 1)[2]
    half = len(said.tensors["record/y"]) // 2
    odd = {k: v.clone() for k, v in said.tensors.items()}
    odd["record/y"][half:] = torch.tensor([-1, K, 99])[torch.arange(len(odd["record/y"]) - half) % 3]
    one = served(here, server, {0: Knowledge(odd, said.weight)}, 1)
    odd["record/h"][half:] += 1
    two = served(here, server, {0: Knowledge(odd, said.weight)}, 1)
    assert (
        fingerprint(pick("head/mlp/2", one))
        == fingerprint(pick("head/mlp/2", two))
        != fingerprint(pick("head/mlp/2", server))
    )


# --- The client ------------------------------------------------------------------------------------------------------


def one_step(kd_grad: str, lam: float, teacher: str = "noise"):
    """Parameters before and after one SGD step with a cut at block1, and what plain cross-entropy gives."""
    here, method, task = scene(kd_grad=kd_grad, lam_client=lam, mode="off", dropping=["block1"])
    task = replace(task, optimizer=Sgd(0.1))
    w = task.model.init(3)
    own = here.tensors(0, 1, w)
    own = own._replace(order=own.order[:1])
    q = task.model.logits(w, own.x)
    if teacher == "noise":
        q = torch.randn(q.shape, generator=torch.Generator().manual_seed(0))
    down = Knowledge({"cut/block1": torch.empty(0), "record/q": q, "record/id": torch.arange(len(own.y))})
    return w, method.client_update(task, own, down)[0], learn.fit(task, w, own)


@pytest.mark.parametrize("kd_grad", ["shared_only", "all"])
def test_the_kl_reaches_the_dropped_layers_only_if_all_is_asked_for(kd_grad):
    before, without, _ = one_step(kd_grad, 0.0)
    _, with_kl, _ = one_step(kd_grad, 10.0)
    for name in before:
        assert not torch.equal(without[name], before[name])  # cross-entropy trains every layer
        reached = not torch.equal(with_kl[name], without[name])
        assert reached == (name.startswith("block1") or kd_grad == "all"), name


@pytest.mark.parametrize("kd_grad", ["shared_only", "all"])
def test_a_teacher_who_says_what_the_student_says_teaches_nothing(kd_grad):
    _, taught, plain = one_step(kd_grad, 10.0, teacher="self")
    for name in plain:
        torch.testing.assert_close(taught[name], plain[name], rtol=0, atol=1e-6)
    z = torch.randn(5, K)
    assert not kl(3.0)(z, z).any()


@pytest.mark.parametrize("kd_grad", ["shared_only", "all"])
def test_a_step_on_both_losses_worked_out_by_hand(kd_grad):
    w, got, _ = one_step(kd_grad, 1.5)
    here, _, _ = scene(mode="off", dropping=["block1"])
    own = here.tensors(0, 1, w)
    q = torch.randn((len(own.y), K), generator=torch.Generator().manual_seed(0))
    index, p = own.order[0], {k: v.clone().requires_grad_() for k, v in w.items()}

    def after_block1(p, h):
        h = torch.relu(h @ p["block2.0.weight"].T + p["block2.0.bias"])
        return h @ p["head.weight"].T + p["head.bias"]

    h = torch.relu(own.x[index].flatten(1) @ p["block1.1.weight"].T + p["block1.1.bias"])
    logits = after_block1(p, h)
    pupil = logits if kd_grad == "all" else after_block1({k: v.detach() for k, v in p.items()}, h)
    ce = torch.nn.functional.cross_entropy(logits, own.y[index])
    soft = torch.nn.functional.kl_div((pupil / 3).log_softmax(1), (q[index] / 3).softmax(1), reduction="batchmean")
    (ce + 1.5 * 9 * soft).backward()
    for name, value in got.items():
        torch.testing.assert_close(value, w[name] - 0.1 * p[name].grad, rtol=1e-4, atol=1e-6)


def test_a_dropped_layer_leaves_the_features_alone_but_not_the_logits():
    here, method, task = scene(mode="off", dropping=["block1"], epochs=0)
    server = method.server_init(task, 5)
    w = task.model.init(3)
    for name in w:
        _, _, said = answer(here, server, 1, w=w)
        _, _, other = answer(here, server, 1, w=w | {name: w[name] + 0.1})
        same = torch.equal(said.tensors["record/h"], other.tensors["record/h"])
        assert same == (not name.startswith("block1"))
        assert not torch.equal(said.tensors["record/z"], other.tensors["record/z"])
    x, y = here.federation.train_set(0)
    torch.testing.assert_close(said.tensors["record/h"], task.model.features(w, x, 1))
    torch.testing.assert_close(said.tensors["record/z"], task.model.apply(w, x))
    assert torch.equal(said.tensors["record/y"], y) and float(said.weight) == len(y)
    assert torch.equal(said.tensors["record/id"], torch.arange(len(y)))


def test_soft_labels_belong_to_a_record_by_its_id():
    here, method, task = scene(mode="off")
    down, w, _ = answer(here, first_round(here), 2)
    own = here.tensors(0, 2, method.personal_init(task, 5, 0))
    order = torch.randperm(len(own.y), generator=torch.Generator().manual_seed(0))
    mixed = {k: v[order] if k.startswith("record/") else v for k, v in down.tensors.items()}
    assert fingerprint(method.client_update(task, own, Knowledge(mixed))[0]) == fingerprint(w)
    wrong = dict(down.tensors) | {"record/q": mixed["record/q"]}
    assert fingerprint(method.client_update(task, own, Knowledge(wrong))[0]) != fingerprint(w)


def test_records_without_a_soft_label_learn_from_their_own():
    q = torch.arange(8.0).reshape(4, 2)
    rows, known = lookup(q, torch.tensor([2, -1, 7, 0]), 4)
    assert rows.tolist() == [[6, 7], [0, 0], [0, 1], [0, 0]] and known.tolist() == [1, 0, 1, 0]
    stacked = torch.func.vmap(lambda q, i: lookup(q, i, 4))(torch.stack([q, q]), torch.tensor([[2, -1, 7, 0]] * 2))
    assert torch.equal(stacked[0][1], rows) and torch.equal(stacked[1][0], known)

    here, method, task = scene(mode="off")
    own = here.tensors(0, 2, task.model.init(3))
    told = {"cut/block2": torch.empty(0), "record/q": torch.randn(3, K), "record/id": torch.full((3,), -1)}
    for name, value in method.client_update(task, own, Knowledge(told))[0].items():
        torch.testing.assert_close(value, learn.fit(task, own.personal, own)[name], rtol=1e-4, atol=1e-5)


def test_in_its_first_round_a_client_is_on_its_own():
    here, method, task = scene()
    for downlink in ("logits", "head"):
        here, method, task = scene(downlink=downlink)
        down, w, _ = answer(here, method.server_init(task, 5), 1)
        assert set(down.tensors) == {"cut/block2"}
        own = here.tensors(0, 1, method.personal_init(task, 5, 0))
        assert fingerprint(w) == fingerprint(learn.fit(task, own.personal, own))


def test_clients_start_alike_or_each_on_its_own():
    for start, alike in (("common", True), ("own", False)):
        _, method, task = scene(start=start)
        one, two = (fingerprint(method.personal_init(task, 5, k)) for k in (0, 1))
        assert (one == two) == alike


# --- What travels ----------------------------------------------------------------------------------------------------

WIDTH = {"fp32": 4, "fp16": 2, "int8": 1}


@pytest.mark.parametrize("dtype", WIDTH)
@pytest.mark.parametrize("block", WIDTHS)
def test_bytes_of_records(block, dtype):
    strategy, rounds, _ = run(tiny(mode="off", dropping=[block], feature_dtype=dtype))
    sizes = [len(i) for i in strategy.federation.split.train]
    scale = 4 if dtype == "int8" else 0
    up = [n * (WIDTHS[block] * WIDTH[dtype] + 4 * K + 8 + 8) + scale for n in sizes]  # features, logits, label, id
    for r in rounds:
        assert [line.bytes for line in r.lines if line.direction == "up"] == up
    assert [r.bytes_down for r in rounds] == [0, sum(n * (4 * K + 8) for n in sizes)]


def test_bytes_of_class_means_are_the_same_for_every_client():
    _, rounds, _ = run(tiny(mode="off", dropping=["block2"], upload="class_mean"))
    up = 4 * K * (64 + K + 1)  # features, logits, count
    assert [line.bytes for r in rounds for line in r.lines if line.direction == "up"] == [up] * 2 * CLIENTS
    assert [r.bytes_down for r in rounds] == [0, CLIENTS * 4 * K * K]
    shapes = {str(line.shapes) for r in rounds for line in r.lines if line.direction == "up"}
    assert len(shapes) == 1  # none tells which classes a client holds


def test_bytes_of_a_head_that_is_sent():
    _, rounds, _ = run(tiny(mode="off", dropping=["block1"], downlink="head"))
    head = 4 * (128 * 64 + 64 + 64 * K + K)
    assert [r.bytes_down for r in rounds] == [0, CLIENTS * head]


def test_no_weights_go_up_and_the_message_grows_as_the_cut_rises():
    strategy, rounds, _ = run(tiny(4, mode="period", period=2))
    for r in rounds:
        for line in r.lines:
            if line.direction == "up":
                assert set(line.shapes) == {"record/h", "record/z", "record/y", "record/id"}
    assert rounds[1].bytes_up < rounds[2].bytes_up == rounds[3].bytes_up
    assert strategy.method.student(strategy.task, strategy.server) is None


def test_int8_is_within_half_a_step_and_fp16_is_a_rounding():
    said = {}
    for dtype in WIDTH:
        here, method, task = scene(mode="off", feature_dtype=dtype)
        said[dtype] = answer(here, method.server_init(task, 5), 1)[2].tensors
    h, scale = said["fp32"]["record/h"], said["int8"]["scale"]
    assert scale.shape == () and float(scale) == pytest.approx(float(h.abs().max()) / 127)
    assert int(said["int8"]["record/h"].abs().max()) == 127
    assert (said["int8"]["record/h"] * scale - h).abs().max() <= scale / 2 * 1.001
    assert torch.equal(said["fp16"]["record/h"], h.half())
    assert all(torch.equal(said[d]["record/z"], said["fp32"]["record/z"]) for d in said)


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_class_means_of_another_type_are_refused(dtype):
    with pytest.raises(ConfigError, match=rf"method.feature_dtype={dtype}: is about rows of records, .* use fp32"):
        federations.build(tiny(upload="class_mean", feature_dtype=dtype))


def test_class_means_are_means():
    here, method, task = scene(mode="off", upload="class_mean", epochs=0)
    server = method.server_init(task, 5)
    w = task.model.init(3)
    said = answer(here, server, 1, w=w)[2].tensors
    x, y = here.federation.train_set(0)
    h, z = task.model.features(w, x, 2).numpy(), task.model.apply(w, x).numpy()
    assert said["counts"].tolist() == np.bincount(y, minlength=K).tolist()
    rows, means = np.concatenate([h, z], 1), said["sums"] / said["counts"].clamp(min=1)[:, None]
    for c in range(K):
        mine = (y == c).numpy()
        expected = rows[mine].mean(0) if mine.any() else np.zeros(rows.shape[1])
        np.testing.assert_allclose(means[c].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_the_server_weights_class_means_by_their_counts():
    here, method, task = scene(mode="off", upload="class_mean", server_batch=1000)
    server = method.server_init(task, 5)
    said = answer(here, server, 1)[2]
    count = torch.tensor([0.0, 1, 2, 3, 4, 0, 5, 6, 7, 8])
    means = said.tensors["sums"] / said.tensors["counts"].clamp(min=1)[:, None]
    heads = {}
    for change in ("none", "of a class without records", "of one with"):
        h = means[:, :64].clone()
        h[{"none": [], "of a class without records": [0, 5], "of one with": [1]}[change]] += 1
        sums = torch.cat([h, means[:, 64:]], 1) * count.clamp(min=1)[:, None]
        told = Knowledge({"sums": sums, "counts": count}, said.weight)
        heads[change] = pick("head/mlp/2", served(here, server, {0: told}, 1))
    assert fingerprint(heads["none"]) == fingerprint(heads["of a class without records"])
    assert fingerprint(heads["none"]) != fingerprint(heads["of one with"])

    p = {k: v.clone().requires_grad_() for k, v in pick("head/mlp/2", server).items()}
    logits = means[:, :64] @ p["head.weight"].T + p["head.bias"]
    soft = (means[:, 64:] / 3).softmax(1)
    ce = torch.nn.functional.cross_entropy(logits, torch.arange(K), reduction="none")
    divergence = (soft * (soft.log() - (logits / 3).log_softmax(1))).sum(1)
    loss = ((ce + 1.5 * 9 * divergence) * count).sum() / count.sum()
    adam = torch.optim.Adam(p.values(), lr=0.01)
    loss.backward()
    adam.step()
    for name, value in heads["none"].items():
        torch.testing.assert_close(value, p[name].detach(), rtol=1e-3, atol=1e-4)


def test_a_client_that_computes_q_itself_gets_what_the_server_would_have_sent():
    _, rounds, homes = run(
        tiny(3, "linear", mode="off", answers="after")
    )  # its features are the inputs: they never get stale
    _, other, others = run(tiny(3, "linear", mode="off", downlink="head"))
    for k in homes:
        for name in homes[k]:
            torch.testing.assert_close(others[k][name], homes[k][name], rtol=1e-4, atol=1e-5)
    assert rounds[-1].accuracy.balanced_mean == pytest.approx(other[-1].accuracy.balanced_mean, abs=0.01)


def test_the_head_that_is_sent_has_been_trained():
    _, rounds, _ = run(tiny(4, mode="period", period=2, downlink="head"))
    told = [next(line for line in r.lines if line.direction == "down").shapes for r in rounds]
    assert [{name.rpartition("/")[0] for name in shapes} for shapes in told] == [
        {"cut"},
        {"cut", "head/block2"},
        {"cut", "head/block2"},  # the cut has moved on; its head has not been trained yet
        {"cut", "head/block1"},
    ]


def test_once_all_is_dropped_clients_train_alone_and_say_nothing():
    config = tiny(3, mode="period", period=1, dropping=["block2"], final="stop", federation={"quorum": 1.0})
    _, rounds, homes = run(config)
    assert rounds[0].bytes_up > 0 and [r.bytes_up + r.bytes_down for r in rounds[1:]] == [0, 0]
    assert [r.cohort for r in rounds] == [CLIENTS] * 3
    _, _, short = run(tiny(1, mode="period", period=1, dropping=["block2"], final="stop"))
    here = site(config.to_json())
    for k, w in short.items():
        for t in (2, 3):
            w = learn.fit(here.federation.client_task(k), w, here.tensors(k, t, w))
        assert fingerprint(w) == fingerprint(homes[k])


# --- Hard lives ------------------------------------------------------------------------------------------------------

OPTIONS = {
    "per record": {},
    "shared only": {"kd_grad": "shared_only"},
    "class means": {"upload": "class_mean"},
    "head": {"downlink": "head"},
    "int8": {"feature_dtype": "int8"},
    "class means, own clock": {
        "upload": "class_mean",
        "clock": "client_participations",
        "start": "own",
    },
    "stop, random": {"final": "stop", "order": "random", "clock": "client_participations"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_clients_of_one_class_that_come_seldom(options):
    data = {"partition": "pathological", "classes": 1, "limit": 600}
    config = tiny(8, data=data, federation={"clients": 10, "cohort": 3}, mode="period", period=2, **options)
    strategy, rounds, _ = run(config)
    held = [set(strategy.federation.labels[i].tolist()) for i in strategy.federation.split.train]
    assert {len(classes) for classes in held} == {1}
    assert all(bool(torch.isfinite(value).all()) for value in strategy.server.values())
    assert rounds[-1].accuracy is not None


def test_an_absent_client_keeps_its_soft_labels():
    here, _, _ = scene(mode="period", period=1)
    server = first_round(here)
    kept = pick("client/00003", server)
    for t in (2, 3, 4, 5):
        server = served(here, server, {k: answer(here, server, t, k)[2] for k in (0, 1)}, t)
    assert fingerprint(pick("client/00003", server)) == fingerprint(kept)
    down, w, said = answer(here, server, 6, 3)
    assert torch.equal(down.tensors["record/q"], kept["record/q"]) and "cut/block1" in down.tensors
    assert said.tensors["record/h"].shape[1:] == (128,)
    assert all(bool(torch.isfinite(value).all()) for value in w.values())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_stacked_clients_give_the_loops_answer(options):
    plain = {"optimizer": "sgd", "lr": 0.03}  # Adam's first steps are the signs of gradients, also of tiny ones
    schedule = {"mode": "period", "period": 1, "federation": {"clients": 5, "cohort": 4}}
    config = tiny(3, by_client=["mlp", "cnn"], **schedule, **plain, **options)
    alone, _, homes = run(config)
    stacked, _, others = run(config, Vectorised)
    coarse = "feature_dtype" in options  # a feature next to a rounding's edge
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if coarse else {"rtol": 1e-3, "atol": 1e-4}
    assert stacked.server.keys() == alone.server.keys()
    for key, value in alone.server.items():
        torch.testing.assert_close(stacked.server[key], value, **tolerance)
    for k in homes:
        torch.testing.assert_close(others[k], homes[k], **tolerance)


def test_a_message_weighs_what_it_says_whatever_its_rows():
    here, method, task = scene(mode="off", server_batch=10_000, optimizer="sgd", lr=0.1)
    server = method.server_init(task, 5)
    said = [answer(here, server, 1, k)[2] for k in (0, 1)]

    def steps(*weights):
        after = served(here, server, {k: replace(said[k], weight=torch.tensor(w)) for k, w in enumerate(weights)}, 1)
        return {name: value - server[f"head/mlp/2/{name}"] for name, value in pick("head/mlp/2", after).items()}

    one, two, both = steps(1.0, 1e-12), steps(1e-12, 1.0), steps(1.0, 3.0)
    for name, step in both.items():
        torch.testing.assert_close(step, one[name] / 4 + 3 * two[name] / 4, rtol=1e-3, atol=1e-6)


# --- Bad configurations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dropping": []}, r"dropping: expected a block of mlp \(block1, block2\), got \[\]"),
        ({"dropping": ["block9"]}, r"dropping: expected blocks of mlp \(block1, block2\), got 'block9'"),
        ({"dropping": ["block1", "head"]}, r"dropping: 'head' is a model's last block"),
        (
            {"by_client": ["mlp", "cnn"], "dropping": ["block3"]},
            r"dropping: expected a block of mlp .*got \['block3'\]",
        ),
        ({"mode": "period"}, "period: expected the rounds"),
        ({"mode": "period", "period": 2, "rate": 0.5}, "rate: has no meaning with mode=period"),
        ({"mode": "off", "rate": 0.5}, "rate: has no meaning with mode=off"),
        ({"period": 2}, "period: has no meaning with mode=rate"),
        ({"rate": 1.5}, "rate"),
        ({"rate": -0.1}, "rate"),
        ({"dropping": "block1"}, "dropping"),
    ],
)
def test_bad_configurations_are_refused_before_the_first_round(fields, message):
    with pytest.raises(ConfigError, match=message) as caught:
        federations.build(tiny(**fields))
    assert "\n" not in str(caught.value)


def test_class_means_of_a_class_that_nobody_has_are_refused():
    _, method, task = scene(upload="class_mean")
    held = np.ones(K, dtype=bool)
    method.check({"mlp": task}, held)
    held[[3, 7]] = False
    with pytest.raises(ConfigError, match=r"class_mean: .*nobody has class \[3, 7\]"):
        method.check({"mlp": task}, held)
    FedD2S().check({"mlp": task}, held)


def test_the_declared_traits():
    assert (FedD2S.evidence, FedD2S.sends, FedD2S.needs_public) == ("reconstruction", "features", False)
    assert (FedD2S.needs_each, FedD2S.same_model, FedD2S().reads_records()) == (True, False, True)
    summed = [FedD2S(upload="class_mean", **more) for more in ({}, {"downlink": "head"}, {"kd_grad": "shared_only"})]
    assert [(method.answers_sums(), method.reads_records()) for method in summed] == [
        (True, False),
        *[(True, True)] * 2,
    ]


# --- It helps --------------------------------------------------------------------------------------------------------


def skewed(name: str, **method) -> float:
    config = Config.from_raw(
        {
            "data": {"name": "digits", "test": 300, "partition": "dirichlet", "alpha": 0.3, "reserve": 300},
            "federation": {"clients": 5, "rounds": 10, "evaluate_every": 10},
            "model": {"name": "linear"},
            "method": {"name": name, "lr": 0.003, "batch": 16, **method},
        }
    )
    return run(config)[1][-1].accuracy.balanced_mean


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"downlink": "head"}, {"upload": "class_mean"}], ids=str)
def test_knowledge_from_others_beats_staying_alone(options):
    assert skewed("fedd2s", **options) > skewed("local") + 0.04
