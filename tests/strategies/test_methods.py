"""What every method must hold: determinism, order, bytes, purity, an ear for every client, and that it helps."""

import itertools
import random
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, RecordDict
from small import homes_of

from clients.app import app
from clients.client import Site, open_site, site
from clients.engines.loop import Loop
from fedkd import federation as federations
from fedkd import learn, seeds, wire
from fedkd.config import Config
from fedkd.errors import ConfigError
from fedkd.grid import LocalGrid
from fedkd.knowledge import Knowledge, fingerprint, nest, pick
from fedkd.losses import kl, l1_logits
from fedkd.method import Peer
from fedkd.optim import Adam
from fedkd.registry import METHODS, method_class
from privacy.gate import Pool, Released
from privacy.mechanisms import refuse
from strategies.fedavg import FedAvg
from strategies.feddf import FedDF
from strategies.fedmd import FedMD
from strategies.fedprox import FedProx
from strategies.flower import KnowledgeStrategy, Round

PUBLIC, CLASSES, CLIENTS = 60, 10, 4
DEEP = {"fedper", "fedproto", "fedrep", "kd3"}  # use what lies below the head, of which softmax regression has nothing
UNWEIGHTED = {"dense"}  # its ensemble is the plain mean of the logits, as in the paper
every_method = pytest.mark.parametrize("name", METHODS)
senders = pytest.mark.parametrize("name", [name for name in METHODS if method_class(name).sends != "nothing"])
mixed = pytest.mark.parametrize("name", [name for name in METHODS if not method_class(name).same_model])


def tiny(name: str, **sections) -> Config:
    raw = {
        "seed": 5,
        "data": {"limit": 500, "test": 100, "partition": "dirichlet", "alpha": 1.0},
        "federation": {"clients": CLIENTS, "rounds": 2},
        "model": {"name": "linear"},
        "method": {"name": name, "lr": 0.01, "batch": 16},
    }
    match name:  # what the smallest of all models and trainings is too small for
        case "fedrep":
            raw["method"]["epochs"] = 2
        case "kd3":
            raw["method"] |= {"student_epochs": 2, "student_batch": 16, "selection": "all", "mix_lambda": 1.0}
        case "rad" | "rad_clients":
            raw["method"] |= {"questions": 10, "student_epochs": 2, "error_rate": 0.1}
        case "swing":
            raw["method"] |= {"score": "rarity"}
        case "swing_labels":
            raw["method"] |= {"score": "none", "noise": "none"}
        case "dense":
            raw["method"] |= {"synthesis_epochs": 2, "synthesis_batch": 16, "generator_steps": 3}
    raw["data"] |= {"public" if method_class(name).needs_public else "reserve": PUBLIC}
    for section, fields in sections.items():
        raw[section] = raw.get(section, {}) | fields
    if name in DEEP and raw["model"]["name"] == "linear":
        raw["model"]["name"] = "mlp"
    return Config.from_raw(raw)


def run(config: Config, grid_type: type[LocalGrid] = LocalGrid) -> tuple[KnowledgeStrategy, list[Round], LocalGrid]:
    here, rounds = site(config.to_json()), []
    grid = grid_type(Loop(app), config.federation.clients, {"config": config.to_json()})
    strategy = KnowledgeStrategy(here.federation, here.mechanism, rounds.append)
    strategy.start(grid)
    return strategy, rounds, grid


def state_of(strategy: KnowledgeStrategy, grid: LocalGrid) -> str:
    homes = {
        str(k): nest(str(k), wire.from_record(state.array_records["personal"]))
        for k, state in sorted(grid.homes.items())
        if "personal" in state
    }
    return fingerprint(strategy.server, *homes.values())


@cache
def answers(name: str) -> tuple[Site, dict, list[Released]]:
    """The site, the server's first state, and every client's answer to round 2 (FedMD digests from then on)."""
    here = open_site(federations.build(tiny(name)))
    method, task, states = here.federation.config.method, here.federation.server_task, {}
    server = method.server_init(task, 5)
    for t in (1, 2):
        released = []
        for k in range(CLIENTS):
            down = method.send(task, server, t, Peer(k, here.federation.client_models[k]))
            released.append(here.train(k, t, down, states.setdefault(k, RecordDict())))
        before, server = server, aggregate(here, server, released, t)
    return here, before, released


def aggregate(here: Site, server: dict, released: list[Released], t: int = 2) -> dict:
    method, task = here.federation.config.method, here.federation.server_task
    pool = Pool(released, here.mechanism, np.random.default_rng(0))
    return method.aggregate(task, server, pool, t, np.random.default_rng(1))


# --- Every method ----------------------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("model", ["linear", pytest.param("mlp", marks=pytest.mark.slow)])
def test_the_same_configuration_gives_the_same_state(name, model):
    config = tiny(name, model={"name": model})
    prints = []
    for _ in range(2):
        site.cache_clear()
        federations.from_json.cache_clear()
        torch.manual_seed(len(prints))  # nobody may draw from the global generators
        np.random.seed(len(prints))  # noqa: NPY002
        random.seed(len(prints))
        strategy, rounds, grid = run(config)
        scores = [r.accuracy for r in rounds]
        prints.append((state_of(strategy, grid), scores, [line.norm for r in rounds for line in r.lines]))
    assert prints[0] == prints[1]


@every_method
def test_another_seed_gives_another_state(name):
    config = tiny(name)
    one, _, grid_one = run(config)
    two, _, grid_two = run(replace(config, seed=6))
    assert state_of(one, grid_one) != state_of(two, grid_two)


def shaken(value: torch.Tensor) -> torch.Tensor:
    return value + 0.1 * torch.randn_like(value) if value.is_floating_point() else value


@senders
@pytest.mark.parametrize("who", range(CLIENTS))
def test_the_aggregate_changes_when_one_client_says_something_else(name, who):
    here, server, released = answers(name)
    base = aggregate(here, server, released)
    said = released[who].knowledge
    for changed in (
        Knowledge({key: shaken(value) for key, value in said.tensors.items()}, said.weight),
        Knowledge({key: -value for key, value in said.tensors.items()}, said.weight),
    ):
        others = [*released[:who], replace(released[who], knowledge=changed), *released[who + 1 :]]
        after = aggregate(here, server, others)
        assert after.keys() == base.keys()
        floats = [key for key in base if base[key].is_floating_point()]
        moved = [key for key in floats if key in server and not torch.equal(base[key], server[key])] or floats
        assert all(not torch.equal(after[key], base[key]) for key in moved)
    assert fingerprint(aggregate(here, server, released)) == fingerprint(base)


@pytest.mark.parametrize("name", [n for n in METHODS if method_class(n).sends != "nothing" and n not in UNWEIGHTED])
def test_the_aggregate_moves_with_the_weight_of_a_client(name):
    here, server, released = answers(name)
    heavy = replace(released[0], knowledge=replace(released[0].knowledge, weight=torch.tensor(1e6)))
    assert fingerprint(aggregate(here, server, [heavy, *released[1:]])) != fingerprint(
        aggregate(here, server, released)
    )


@every_method
def test_no_half_edits_what_it_is_given(name):
    here, server, released = answers(name)
    method, task = here.federation.config.method, here.federation.client_task(0)
    before = fingerprint(server, *(r.knowledge.tensors for r in released))
    after = aggregate(here, server, released)
    assert fingerprint(server, *(r.knowledge.tensors for r in released)) == before

    down = method.send(here.federation.server_task, after, 3, Peer(CLIENTS, task.model.name))  # a newcomer
    own = here.tensors(0, 3, method.personal_init(task, 5, 0))
    given = {"x": own.x, "y": own.y, "order": own.order, "public": own.public_order, "public_x": task.public_x}
    before = fingerprint(given, own.personal, down.tensors)
    personal, said = method.client_update(task, own, down)
    assert fingerprint(given, own.personal, down.tensors) == before
    assert not any(t.requires_grad for t in (*personal.values(), *said.tensors.values(), said.weight))


@every_method
def test_replies_in_any_order_give_bitwise_the_same_server(name):
    config = tiny(name)
    js = config.to_json()
    here = site(js)
    grid = LocalGrid(Loop(app), CLIENTS, {"config": js})
    first = KnowledgeStrategy(here.federation, here.mechanism)
    for t in (1, 2):
        messages = first.configure_train(t, wire.to_record({}), ConfigRecord(), grid)
        replies = list(grid.send_and_receive(messages))
        start, prints = first.server, set()
        for order in [replies, replies[::-1], *itertools.islice(itertools.permutations(replies), 5, 24, 6)]:
            other = KnowledgeStrategy(here.federation, here.mechanism)
            other.resume(t - 1, start, here.mechanism.ledger())
            other._asked = first._asked
            other.aggregate_train(t, list(order))
            prints.add(fingerprint(other.server))
        first.aggregate_train(t, replies)
        assert prints == {fingerprint(first.server)}


class Shuffled(LocalGrid):
    """Delivers in another order than asked and hands replies over in yet another, like a real network."""

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        replies = list(super().send_and_receive(messages[::-1], timeout=timeout))
        return replies[2:] + replies[:2]


@every_method
def test_a_disorderly_network_changes_nothing(name):
    config = tiny(name)
    tidy, tidy_rounds, tidy_grid = run(config)
    loose, loose_rounds, loose_grid = run(config, Shuffled)
    assert state_of(loose, loose_grid) == state_of(tidy, tidy_grid)
    assert [r.accuracy for r in loose_rounds] == [r.accuracy for r in tidy_rounds]


@every_method
def test_a_partial_cohort_takes_turns_and_the_others_stay_at_home(name):
    config = tiny(name, federation={"rounds": 4, "cohort": 2})
    _, rounds, _ = run(config)
    asked = [{line.client for line in r.lines if line.direction == "down"} for r in rounds]
    assert all(len(who) == r.cohort == 2 for who, r in zip(asked, rounds, strict=True))
    assert len({frozenset(who) for who in asked}) > 1
    assert all(
        {line.client for line in r.lines if line.direction == "up"} == who for r, who in zip(rounds, asked, strict=True)
    )
    assert all(r.failures == [] and r.accuracy is not None for r in rounds)


# --- Hard lives -------------------------------------------------------------------------------------------------------

PROTECTIONS = (
    {"mechanism": "gaussian", "epsilon": 5.0},
    {"mechanism": "gaussian", "epsilon": 5.0, "trust": "server"},
    {"mechanism": "ambassador", "epsilon": 5.0, "delta": 1e-3, "steps": 2},
)


def sole(name: str, **sections) -> Config:
    """Ten clients, each with one class of its own."""
    raw = tiny(name).raw()
    del raw["data"]["alpha"]
    raw["data"] |= {"limit": 700, "partition": "pathological", "classes": 1}
    for section, fields in sections.items():
        raw[section] = raw.get(section, {}) | fields
    return Config.from_raw(raw)


@every_method
def test_clients_of_one_class_who_are_asked_now_and_then(name):
    strategy, rounds, grid = run(sole(name, federation={"clients": 10, "rounds": 5, "cohort": 2}))
    assert all(r.failures == [] for r in rounds) and rounds[-1].accuracy is not None
    for state in (strategy.server, *homes_of(grid).values()):
        assert all(torch.isfinite(value).all() for value in state.values() if value.is_floating_point())


def allowed(name: str, privacy: dict) -> bool:
    try:
        refuse(sole(name, federation={"clients": 10}, privacy=privacy))
    except ConfigError:
        return False
    return True


PROTECTED = [(name, privacy) for name in METHODS for privacy in PROTECTIONS if allowed(name, privacy)]


@pytest.mark.parametrize(("name", "privacy"), PROTECTED)
def test_under_a_mechanism_no_message_tells_by_its_shape_which_classes_a_client_has(name, privacy):
    _, rounds, _ = run(sole(name, federation={"clients": 10, "rounds": 2}, privacy=privacy))
    for r in rounds:
        up = [line for line in r.lines if line.direction == "up"]
        assert len(up) == 10 and all(line.refused is None for line in up)
        assert len({str(sorted(line.shapes.items())) for line in up}) == 1


# --- Bytes -----------------------------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("model", ["linear", "mlp"])
def test_what_is_promised_is_what_is_sent(name, model):
    config = tiny(name, model={"name": model})
    here, rounds, told = site(config.to_json()), [], {}

    class Noting(KnowledgeStrategy):
        def aggregate_train(self, server_round, replies):
            told[server_round] = {client: down for client, (_, down) in self._asked.items()}
            return super().aggregate_train(server_round, replies)

    grid = LocalGrid(Loop(app), CLIENTS, {"config": config.to_json()})
    Noting(here.federation, here.mechanism, rounds.append).start(grid)
    task = here.federation.server_task
    assert len(told) == len(rounds) == 2
    for r in rounds:
        lines = [line for line in r.lines if line.direction == "up"]
        assert [line.client for line in lines] == list(range(CLIENTS))
        for line in lines:
            schema = config.method.reply_schema(task, told[r.t][line.client])
            assert line.shapes.keys() == schema.keys()
            for key, (shape, _) in schema.items():
                assert len(shape) == len(line.shapes[key])
                assert all(isinstance(e, str) or e == s for e, s in zip(shape, line.shapes[key], strict=True))
            total = sum(np.prod(line.shapes[key], dtype=int) * dtype.itemsize for key, (_, dtype) in schema.items())
            assert line.bytes == total
        assert r.bytes_up == sum(line.bytes for line in lines)


UP = {"local": 0, "fedmd": 4 * PUBLIC * CLASSES, **dict.fromkeys(("fedavg", "fedprox", "feddf"), 4 * (64 * 10 + 10))}


@pytest.mark.parametrize("name", UP)
def test_what_goes_up_is_what_the_table_says(name):
    _, rounds, _ = run(tiny(name))
    assert all(r.bytes_up == CLIENTS * UP[name] for r in rounds)


@pytest.mark.parametrize("name", UP)
def test_what_goes_down_is_what_the_table_says(name):
    _, rounds, _ = run(tiny(name))
    linear = 4 * (64 * 10 + 10)
    logits = 4 * PUBLIC * CLASSES
    expected = {"local": (0, 0), "fedmd": (0, logits)}.get(name, (linear, linear))
    assert tuple(r.bytes_down for r in rounds) == tuple(CLIENTS * b for b in expected)


def test_local_training_moves_nothing_at_all():
    strategy, rounds, _ = run(tiny("local", federation={"rounds": 3}))
    assert [(r.bytes_up, r.bytes_down) for r in rounds] == [(0, 0)] * 3
    assert strategy.server == {} and strategy.method.student(strategy.task, strategy.server) is None


# --- Architectures of one's own --------------------------------------------------------------------------------------


@mixed
def test_clients_may_have_architectures_of_their_own(name):
    models = ["mlp", "resnet8"] if name == "fedproto" else ["linear", "mlp", "cnn"]  # it needs features of one width
    config = tiny(name, model={"name": models[0], "by_client": models})
    strategy, rounds, _ = run(config)
    assert all(r.failures == [] for r in rounds) and rounds[-1].accuracy is not None
    if name == "feddf":
        lines = [line for line in rounds[0].lines if line.direction == "up"]
        assert [line.bytes for line in lines] == [
            4 * sum(p.numel() for p in strategy.federation.client_task(k).model.net.parameters())
            for k in range(CLIENTS)
        ]


def test_feddf_teaches_an_architecture_that_nobody_trained_this_round():
    config = tiny("feddf", model={"name": "linear", "by_client": ["linear", "mlp", "linear", "linear"]})
    here = open_site(federations.build(config))
    task, method = here.federation.server_task, config.method
    server = method.server_init(task, 5)
    released = [here.train(k, 1, method.send(task, server, 1, Peer(k, "linear")), RecordDict()) for k in (0, 2, 3)]
    after = aggregate(here, server, released, 1)
    assert after.keys() == server.keys()
    ensemble = torch.stack([task.models["linear"].logits(r.knowledge.tensors, task.public_x) for r in released]).mean(0)

    def gap(state: dict) -> float:
        return float(kl(1.0)(task.models["mlp"].logits(pick("mlp", state), task.public_x), ensemble).mean())

    assert gap(after) < gap(server)


# --- It helps --------------------------------------------------------------------------------------------------------

HELP = {
    "fedavg": ({}, 0.08),
    "fedprox": ({"mu": 0.1}, 0.08),
    "fedmd": ({"loss": "kl", "temperature": 3.0, "digest_epochs": 8}, 0.04),
    "feddf": ({}, 0.08),
}


def skewed(name: str, **method) -> float:
    config = Config.from_raw(
        {
            "data": {
                "name": "digits",
                "test": 300,
                "partition": "dirichlet",
                "alpha": 0.3,
                "public" if method_class(name).needs_public else "reserve": 300,
            },
            "federation": {"clients": 5, "rounds": 6, "evaluate_every": 6},
            "model": {"name": "linear"},
            "method": {"name": name, "lr": 0.003, "batch": 16, **method},
        }
    )
    _, rounds, _ = run(config)
    assert [r.accuracy is not None for r in rounds] == [False] * 5 + [True]
    return rounds[-1].accuracy.balanced_mean


@cache
def alone() -> float:
    return skewed("local")


@pytest.mark.slow
@pytest.mark.parametrize("name", HELP)
def test_knowledge_from_others_beats_staying_alone(name):
    method, margin = HELP[name]
    assert skewed(name, **method) > alone() + margin


# --- FedAvg and FedProx ----------------------------------------------------------------------------------------------


def test_a_round_of_fedavg_is_the_weighted_average_worked_out_by_hand():
    config = tiny("fedavg", federation={"rounds": 1}, method={"epochs": 2})
    strategy, _, _ = run(config)
    federation = strategy.federation
    task = federation.server_task
    start = task.model.init(config.seed)

    trained, sizes = [], []
    for k in range(CLIENTS):
        x, y = federation.train_set(k)
        order = learn.batches(seeds.generator(config.seed, "order", 1, k), len(y), 16, 2)
        net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        net.load_state_dict({f"1.{key.removeprefix('head.')}": value for key, value in start.items()})
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        for row in order:
            index = row[row >= 0]
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(x[index]), y[index]).backward()
            optimizer.step()
        trained.append({f"head.{key[2:]}": value.detach().numpy() for key, value in net.state_dict().items()})
        sizes.append(len(y))

    assert len(set(sizes)) > 1
    assert strategy.server.keys() == start.keys()
    for key, value in strategy.server.items():
        expected = np.average([w[key] for w in trained], axis=0, weights=sizes)
        np.testing.assert_allclose(value.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_every_client_of_fedavg_is_scored_on_the_server_model():
    _, rounds, _ = run(tiny("fedavg"))
    assert all(r.accuracy.balanced_mean == pytest.approx(r.accuracy.global_, abs=1e-12) for r in rounds)


def test_fedprox_without_its_term_is_fedavg_bitwise():
    plain, _, _ = run(tiny("fedavg", model={"name": "mlp"}))
    free, _, _ = run(tiny("fedprox", model={"name": "mlp"}, method={"mu": 0.0}))
    bound, _, _ = run(tiny("fedprox", model={"name": "mlp"}, method={"mu": 0.1}))
    assert fingerprint(free.server) == fingerprint(plain.server) != fingerprint(bound.server)


def test_the_proximal_pull_is_mu_times_the_way_from_home():
    g = torch.Generator().manual_seed(0)
    start = {"a": torch.randn((3, 2), generator=g), "b": torch.randn(4, generator=g)}
    w = {name: value + torch.randn(value.shape, generator=g) for name, value in start.items()}
    penalty = FedProx(mu=0.3).penalty(start)

    squared = sum(float((w[name] - start[name]).square().sum()) for name in w)
    assert float(penalty(w)) == pytest.approx(0.15 * squared, rel=1e-6)
    for name, grad in learn.gradient(penalty, w).items():
        torch.testing.assert_close(grad, 0.3 * (w[name] - start[name]))
    assert float(penalty(start)) == 0 and not any(g.any() for g in learn.gradient(penalty, start).values())
    assert FedAvg().penalty(start) is None


def test_a_stronger_pull_keeps_clients_nearer():
    here, server, _ = answers("fedprox")
    task, own = here.federation.client_task(0), here.tensors(0, 1, {})
    ways = []
    for mu in (0.0, 1.0, 100.0):
        method = FedProx(lr=0.01, batch=16, epochs=3, mu=mu)
        _, said = method.client_update(task, own, Knowledge(server))
        ways.append(sum(float((said.tensors[key] - server[key]).square().sum()) for key in server))
    assert ways[0] > ways[1] > ways[2] > 0


# --- FedMD -----------------------------------------------------------------------------------------------------------


def test_fedmds_consensus_is_the_weighted_mean_of_the_clients_logits():
    here, server, released = answers("fedmd")
    consensus = aggregate(here, server, released)["logits"]
    sizes = [len(index) for index in here.federation.split.train]
    assert [float(r.knowledge.weight) for r in released] == sizes
    expected = np.average([r.knowledge.tensors["logits"].numpy() for r in released], axis=0, weights=sizes)
    np.testing.assert_allclose(consensus.numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("loss", "distance"), [("l1", l1_logits), ("kl", kl(2.0))])
def test_the_digest_brings_a_client_nearer_to_the_consensus_and_only_then_does_it_revisit(loss, distance):
    here, server, released = answers("fedmd")
    task, own = here.federation.client_task(0), here.tensors(0, 2, here.federation.client_task(0).model.init(5, 1))
    down = Knowledge({"logits": aggregate(here, server, released)["logits"]})
    method = FedMD(loss=loss, temperature=2.0, lr=0.01, epochs=1)

    order = method.public_order(np.random.default_rng(0), PUBLIC)
    own = own._replace(public_order=order)
    still = own._replace(order=own.order[:0])
    digested, said = method.client_update(task, still, down)
    start = distance(task.model.logits(own.personal, task.public_x), down.tensors["logits"]).mean()
    assert distance(said.tensors["logits"], down.tensors["logits"]).mean() < start
    torch.testing.assert_close(said.tensors["logits"], task.model.logits(digested, task.public_x))

    both, _ = method.client_update(task, own, down)
    revisited = learn.fit(task, digested, own)
    assert fingerprint(both) == fingerprint(revisited)


def test_in_round_one_there_is_nothing_to_digest():
    here, _, _ = answers("fedmd")
    task = here.federation.client_task(0)
    own = here.tensors(0, 1, task.model.init(5, 1))
    personal, _ = here.federation.config.method.client_update(task, own, Knowledge({}))
    assert fingerprint(personal) == fingerprint(learn.fit(task, own.personal, own))


def test_fedmds_student_learns_from_the_consensus_and_from_nothing_else():
    plain, rounds, _ = run(tiny("fedmd"))
    taught, taught_rounds, _ = run(tiny("fedmd", method={"student_epochs": 5}))
    assert [r.accuracy.global_ for r in rounds] == [None, None]
    assert taught_rounds[-1].accuracy.global_ > 0.2
    assert torch.equal(plain.server["logits"], taught.server["logits"])  # a student changes nothing for the clients
    assert [r.accuracy.balanced_mean for r in rounds] == [r.accuracy.balanced_mean for r in taught_rounds]
    task = taught.federation.server_task
    student = taught.method.student(task, taught.server)
    gap = kl(1.0)(task.model.logits(student, task.public_x), taught.server["logits"]).mean()
    fresh = kl(1.0)(task.model.logits(task.model.init(5), task.public_x), taught.server["logits"]).mean()
    assert gap < fresh


# --- FedDF -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architectures", [1, 2])
def test_feddf_asks_each_teacher_once_a_round(architectures):
    here, server, released = answers("feddf") if architectures == 1 else hetero()
    asked, taught = [], []

    def watch(module, inputs):
        if torch.is_grad_enabled():
            taught.append(len(inputs[0]))
        else:
            asked.append((len(inputs[0]), module.head.weight.data_ptr()))

    nets = [model.net for model in here.federation.models.values()]
    handles = [net.register_forward_pre_hook(watch) for net in nets]
    try:
        aggregate(here, server, released)
    finally:
        for handle in handles:
            handle.remove()

    pointers = {r.knowledge.tensors["head.weight"].data_ptr() for r in released}
    assert len(pointers) == CLIENTS
    assert sorted(asked) == sorted((PUBLIC, pointer) for pointer in pointers)
    method = here.federation.config.method
    assert len(taught) == method.fusion_epochs * -(-PUBLIC // method.public_batch) * len(nets)


@cache
def hetero() -> tuple[Site, dict, list[Released]]:
    here = open_site(federations.build(tiny("feddf", model={"name": "linear", "by_client": ["linear", "mlp"]})))
    method, task = here.federation.config.method, here.federation.server_task
    server = method.server_init(task, 5)
    downs = [method.send(task, server, 1, Peer(k, here.federation.client_models[k])) for k in range(CLIENTS)]
    return here, server, [here.train(k, 1, down, RecordDict()) for k, down in enumerate(downs)]


def test_a_fusion_of_feddf_is_average_then_imitate():
    here, server, released = hetero()
    task = here.federation.server_task
    after = aggregate(here, server, released, 1)
    rng = np.random.default_rng(1)
    order = learn.batches(rng, PUBLIC, 64, 2)
    votes = [task.models[r.peer.model].logits(r.knowledge.tensors, task.public_x) for r in released]
    ensemble = torch.stack(votes).mean(0)
    for name, who in (("linear", (0, 2)), ("mlp", (1, 3))):
        weights = [float(released[k].knowledge.weight) for k in who]
        start = {
            key: torch.from_numpy(
                np.average([released[k].knowledge.tensors[key] for k in who], axis=0, weights=weights)
            )
            for key in released[who[0]].knowledge.tensors
        }
        start = {key: value.float() for key, value in start.items()}
        fused = learn.imitate(task.models[name], start, task.public_x, ensemble, order, kl(1.0), Adam(1e-3))
        for key, value in fused.items():
            torch.testing.assert_close(after[f"{name}/{key}"], value, rtol=1e-3, atol=1e-4)


def test_a_fusion_brings_the_average_nearer_to_the_ensemble():
    here, server, released = answers("feddf")
    task = here.federation.server_task
    ensemble = torch.stack([task.model.logits(r.knowledge.tensors, task.public_x) for r in released]).mean(0)
    start = learn.mean([r.knowledge for r in released]).tensors
    gaps = [
        float(kl(1.0)(task.model.logits(params, task.public_x), ensemble).mean())
        for params in (start, pick("linear", aggregate(here, server, released)))
    ]
    assert gaps[1] < gaps[0]


def test_the_declared_traits_are_those_of_the_papers():
    traits = {
        name: (c.sends, c.needs_public, c.needs_each, c.same_model)
        for name, c in ((name, method_class(name)) for name in UP)
    }
    assert traits == {
        "local": ("nothing", False, False, False),
        "fedavg": ("params", False, False, True),
        "fedprox": ("params", False, False, True),
        "fedmd": ("logits", True, False, False),
        "feddf": ("params", True, True, False),
    }
    assert FedDF.model_fields["fusion_lr"].default == 1e-3
