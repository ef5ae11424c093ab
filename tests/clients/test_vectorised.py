"""The vectorised engine gives the loop's answers, whatever the sizes, blocks, methods and mishaps."""

import json
import time

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from torch import nn
from torch.func import vmap

from clients.app import app
from clients.client import LEDGER, PERSONAL, site
from clients.engines import memory, vectorised
from clients.engines.loop import Loop
from clients.engines.vectorised import Vectorised
from fedkd import federation as federations
from fedkd import learn, wire
from fedkd.config import Config
from fedkd.data import datasets
from fedkd.errors import ConfigError, PrivacyError
from fedkd.grid import LocalGrid
from fedkd.knowledge import Knowledge, Params
from fedkd.losses import cross_entropy, kl
from fedkd.method import Peer
from fedkd.models import IMAGE_MODELS, MODELS, build
from fedkd.optim import Adam, Sgd
from fedkd.registry import METHODS, method_class
from fedkd.task import Client, Task
from privacy import mechanisms
from privacy.accounting import Event
from privacy.dp_sgd import DpSgd
from strategies.fedavg import FedAvg
from strategies.fedmd import FedMD
from strategies.flower import KnowledgeStrategy

CLIENTS, SHAPE = 5, (1, 8, 8)
AMBASSADOR = {"mechanism": "ambassador", "delta": 1e-3, "steps": 3}
SGD = {"optimizer": "sgd", "momentum": 0.9}


def tiny(name: str, *models: str, **sections) -> Config:
    known = method_class(name)
    raw = {
        "seed": 5,
        "data": {"limit": 500, "test": 100, "partition": "dirichlet", "alpha": 0.7},
        "federation": {"clients": CLIENTS, "rounds": 2},
        "model": {"name": models[0], "by_client": list(models)},
        "method": {"name": name, "lr": 0.01, "batch": 16, "epochs": 2},
    }
    if name == "dense":  # its images seek disagreement: each step multiplies rounding errors, few leave them small
        raw["method"] |= {"synthesis_epochs": 1, "synthesis_batch": 16, "generator_steps": 2}
    if name == "fedproto":  # heads of a model without features learn nothing from prototypes, and are refused
        raw["method"]["inference"] = "prototype"
    if name == "kd3":
        raw["method"] |= {"student_epochs": 1, "student_batch": 16, "selection": "all"}
    if name == "rad":  # a choice of images is a jump: the last digit of a margin may decide it
        raw["method"] |= {"questions": 10, "student_epochs": 2, "selection": "uniform"}
    if name in ("swing", "swing_labels"):
        raw["method"]["score"] = "rarity" if name == "swing" else "none"
    raw["data"] |= {"public" if known.needs_public else "reserve": 60}
    for section, fields in sections.items():
        raw[section] = raw.get(section, {}) | fields
    return Config.from_raw(raw)


def opened(config: Config, engine, homes: dict | None = None) -> tuple[KnowledgeStrategy, LocalGrid]:
    here = site(config.to_json())
    grid = LocalGrid(engine, config.federation.clients, {"config": config.to_json()}, homes=homes)
    return KnowledgeStrategy(here.federation, here.mechanism), grid


def home(state: RecordDict) -> Params:
    return wire.from_record(state.array_records[PERSONAL]) if PERSONAL in state else {}


def run(config: Config, engine) -> tuple[list[Params], list]:
    """The server's state and every home after the last round; and what was scored and refused on the way."""
    strategy, grid = opened(config, engine)
    rounds = []
    strategy.on_round = rounds.append
    strategy.start(grid)
    said = [[(line.client, line.refused) for line in r.failures] for r in rounds]
    return [strategy.server, *(home(grid.context(k).state) for k in range(config.federation.clients))], said


def distance(one: list[Params], other: list[Params]) -> float:
    """Largest relative L2 distance of a tensor."""
    assert [{k: v.shape for k, v in p.items()} for p in one] == [{k: v.shape for k, v in p.items()} for p in other]
    gaps = [
        float((a[k].double() - b[k].double()).norm() / b[k].double().norm().clamp(min=1e-12))
        for a, b in zip(one, other, strict=True)
        for k in b
    ]
    return max(gaps, default=0.0)


def messages(config: Config, grid: LocalGrid, t: int = 1, kind: str = "train") -> list[Message]:
    here = site(config.to_json())
    task = here.federation.server_task
    server = config.method.server_init(task, config.seed)
    peers = [Peer(k, here.federation.client_models[k]) for k in range(config.federation.clients)]
    contents = [wire.pack(config.method.send(task, server, t, peer), {"round": t}) for peer in peers]
    return [Message(content, grid.node_of(k), kind, group_id="1") for k, content in enumerate(contents)]


def asked(config: Config, engine, homes: dict | None = None) -> tuple[list[Message], LocalGrid]:
    _, grid = opened(config, engine, homes)
    return list(grid.send_and_receive(messages(config, grid))), grid


def reasons(replies: list[Message]) -> list[str | None]:
    return [reply.error.reason if reply.has_error() else None for reply in replies]


def own(name: str) -> str:
    return f"{__name__}:{name}"


@pytest.fixture
def double(monkeypatch):
    """Everything in double precision, where only a mistake can tell two engines apart."""
    to_tensor, fits = datasets.to_tensor, Knowledge.fits

    def widened(self, schema, who):
        wide = {name: (shape, torch.float64) for name, (shape, dtype) in schema.items() if dtype.is_floating_point}
        fits(self, {**schema, **wide}, who)

    def forget():
        site.cache_clear()
        federations.from_json.cache_clear()

    forget()
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(datasets, "to_tensor", lambda x: to_tensor(x).double())
    monkeypatch.setattr(Knowledge, "fits", widened)
    yield
    torch.set_default_dtype(torch.float32)
    forget()


# --- Every method ----------------------------------------------------------------------------------------------------


def conformance() -> list:
    cases = []
    for name in METHODS:
        if method_class(name).beyond_vmap:
            continue
        for privacy in ({}, AMBASSADOR, {"mechanism": "gaussian"}):
            for models in (("mlp",), ("linear", "mlp")):
                try:
                    mechanisms.refuse(tiny(name, *models, privacy=privacy))
                except ConfigError:  # the method cannot
                    continue
                label = f"{name}-{privacy.get('mechanism', 'none')}-{'+'.join(models)}"
                cases.append(pytest.param(name, models, privacy, id=label))
    return cases


every_case = pytest.mark.parametrize(("name", "models", "privacy"), conformance())


def test_the_clients_are_of_unequal_size():
    sizes = [len(index) for index in site(tiny("local", "mlp").to_json()).federation.split.train]
    assert len(set(sizes)) == CLIENTS and max(sizes) > 1.5 * min(sizes)


@pytest.mark.slow
@every_case
def test_in_double_precision_blocks_of_any_size_do_exactly_what_the_loop_does(double, name, models, privacy):
    config = tiny(name, *models, privacy=privacy)
    expected, refused = run(config, Loop(app))
    for block in (None, 2):
        got, also = run(config, Vectorised(app, block=block))
        assert also == refused == [[], []]
        assert distance(got, expected) < 1e-10


@pytest.mark.slow
@every_case
def test_in_single_precision_the_answers_are_within_the_methods_tolerance(name, models, privacy):
    config = tiny(name, *models, privacy=privacy, method=SGD)
    tolerance = getattr(config.method, "tolerance", 1e-5)
    assert distance(run(config, Vectorised(app))[0], run(config, Loop(app))[0]) < tolerance


@pytest.mark.slow
def test_the_convolutional_models_are_vectorised_too(double):
    for model in ("cnn", "resnet8"):
        config = tiny("fedmd", model, federation={"clients": 3}, method={"epochs": 1, "loss": "kl"})
        assert distance(run(config, Vectorised(app))[0], run(config, Loop(app))[0]) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("privacy", [{}, AMBASSADOR], ids=["none", "ambassador"])
def test_a_partial_cohort(double, privacy):
    config = tiny("fedmd", "linear", "mlp", federation={"cohort": 3, "rounds": 4}, privacy=privacy)
    expected, got = run(config, Loop(app)), run(config, Vectorised(app))
    assert distance(got[0], expected[0]) < 1e-10 and got[1] == expected[1]


def test_the_weight_is_the_clients_own_number_of_records():
    config = tiny("fedavg", "linear")
    replies, _ = asked(config, Vectorised(app))
    sizes = [len(index) for index in site(config.to_json()).federation.split.train]
    assert [float(wire.unpack(reply.content)[0].weight) for reply in replies] == sizes


class Counting(FedAvg):
    """Weighs by the labels that it sees, and says what it was told apart from the others."""

    def send(self, task, server, t, to):
        return Knowledge({**super().send(task, server, t, to).tensors, "own": torch.full((2,), float(to.client))})

    def reply_schema(self, task, down):
        return {**super().reply_schema(task, down), "own": ((2,), torch.float32), "seen": ((3,), torch.float32)}

    def client_update(self, task, client, down):
        params = {name: value for name, value in down.tensors.items() if name != "own"}
        _, said = super().client_update(task, client, Knowledge(params))
        seen = torch.stack([(client.y >= 0).sum(), (client.y == 3).sum(), client.x.sum()])
        return {"kept": client.y.max()}, Knowledge({**said.tensors, "own": down.tensors["own"], "seen": seen}, seen[0])


def test_padding_can_be_told_from_records_and_each_client_hears_its_own():
    config = tiny(own("Counting"), "linear")
    expected, (got, grid) = asked(config, Loop(app))[0], asked(config, Vectorised(app))
    for k, (one, other) in enumerate(zip(got, expected, strict=True)):
        here, there = wire.unpack(one.content)[0], wire.unpack(other.content)[0]
        assert torch.equal(here.tensors["own"], torch.full((2,), float(k))) and here.weight == there.weight
        torch.testing.assert_close(here.tensors["seen"], there.tensors["seen"])
        assert one.content.config_records[wire.ABOUT] == other.content.config_records[wire.ABOUT]
        assert home(grid.context(k).state)["kept"] <= 9


def test_what_all_clients_hear_is_not_copied_for_each():
    config = tiny("fedavg", "linear")
    here = site(config.to_json())
    server = config.method.server_init(here.federation.server_task, 0)
    told = [wire.unpack(wire.pack(Knowledge(server), {}))[0].tensors for _ in range(3)]
    out, dims = vectorised._broadcast(told)
    assert all(dim is None for dim in dims.values())
    assert all(out[name].data_ptr() == value.data_ptr() for name, value in server.items())
    out, dims = vectorised._broadcast([*told, {name: value.clone() for name, value in server.items()}])
    assert all(dim == 0 for dim in dims.values()) and all(len(value) == 4 for value in out.values())


def test_homes_and_messages_do_not_keep_the_whole_block_alive():
    replies, grid = asked(tiny("fedmd", "linear"), Vectorised(app))
    for k, reply in enumerate(replies):
        for tensor in (*home(grid.context(k).state).values(), *wire.unpack(reply.content)[0].tensors.values()):
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


# --- Padding ---------------------------------------------------------------------------------------------------------


def client(records: int = 23, batch: int = 8, epochs: int = 2, seed: int = 0) -> Client:
    g = torch.Generator().manual_seed(seed)
    x, y = torch.rand((records, *SHAPE), generator=g), torch.randint(10, (records,), generator=g)
    order = learn.batches(np.random.default_rng(seed), records, batch, epochs)
    return Client(x, y, order, torch.empty((0, 1), dtype=torch.int64), {}, {})


def task(name: str, optimizer) -> Task:
    model = build(name, SHAPE, 10)
    return Task(model, {name: model}, 10, torch.empty((0, *SHAPE)), 1, optimizer, learn.fit, learn.sums)


@pytest.mark.parametrize("optimizer", [Sgd(0.1), Sgd(0.1, 0.9), Adam(0.01)], ids=["sgd", "momentum", "adam"])
def test_rows_of_padding_move_neither_parameters_nor_momentum(optimizer):
    here, small, large = task("mlp", optimizer), client(5, seed=1), client(40, epochs=3, seed=2)
    start = here.model.init(0)
    both = vectorised.stack([small, large])
    assert both.order.shape == (2, 15, 8) and (both.order[0, 2:] == -1).all() and (both.y[0, 5:] == -1).all()
    penalty = lambda p: 0.1 * sum(v.square().sum() for v in p.values())  # noqa: E731
    fitted = vmap(lambda c: learn.fit(here, start, c, penalty=penalty))(both)
    for k, alone in enumerate((small, large)):
        expected = learn.fit(here, start, alone, penalty=penalty)
        assert distance([{name: value[k] for name, value in fitted.items()}], [expected]) < 1e-5


def test_a_client_without_epochs_stays_where_it_is():
    here, idle, busy = task("mlp", Adam(0.01)), client(5, epochs=0), client(9)
    start = here.model.init(0)
    fitted = vmap(lambda c: learn.fit(here, start, c))(vectorised.stack([idle, busy]))
    assert all(torch.equal(fitted[name][0], start[name]) for name in start)
    assert not any(torch.equal(fitted[name][1], start[name]) for name in start)


@pytest.mark.parametrize("name", IMAGE_MODELS)
@pytest.mark.parametrize("loss", [cross_entropy, lambda s, y: kl(2.0)(s, torch.eye(10)[y])], ids=["ce", "kl"])
def test_dp_sgd_of_a_block_is_that_of_ghost_clipping(name, loss):
    here, dp = task(name, Sgd(0.1)), DpSgd(0.7, 1.3, 0.3, 4, 0.4, 8.0)
    clients = []
    for k, records in enumerate((7, 30, 2)):
        one = client(records, seed=k)
        clients.append(one._replace(draws=dp.draws(np.random.default_rng(k), records, here.model)))
    clients[1].draws["poisson"][2] = -1  # an empty sample, which still makes a step of noise
    clients[0].draws["poisson"][3] = -1
    start = here.model.init(0)
    fitted = vmap(lambda c: dp.fit(here, start, c, loss=loss))(vectorised.stack(clients))
    for k, alone in enumerate(clients):
        expected = dp.fit(here, start, alone, loss=loss)
        assert distance([{n: fitted[n][k] for n in expected}], [expected]) < 1e-5


def test_in_a_block_too_a_record_whose_gradient_overflows_counts_as_nothing():
    here, dp = task("linear", Sgd(0.1)), DpSgd(1.0, 0.0, 1.0, 1, 1.0, 3.0)
    one = client(3)
    one.x[1] *= 1e25
    one.y[1] = (here.model.apply(start := here.model.init(0), one.x[1:2]).argmax() + 1) % 10
    one = one._replace(draws=dp.draws(np.random.default_rng(0), 3, here.model))
    fitted = vmap(lambda c: dp.fit(here, start, c))(vectorised.stack([one]))
    expected = dp.fit(here, start, one)
    assert distance([{n: v[0] for n, v in fitted.items()}], [expected]) < 1e-5


def test_gradients_inside_and_outside_agree_also_for_unused_parameters():
    params = {"used": torch.randn(3, 4), "unused": torch.randn(3, 2)}
    stacked = vmap(lambda p: learn.gradient(lambda q: q["used"].square().sum(), p))(params)
    assert torch.equal(stacked["used"], 2 * params["used"]) and torch.equal(stacked["unused"], torch.zeros(3, 2))
    assert not learn.transformed() and vmap(lambda x: x + learn.transformed())(torch.zeros(2)).tolist() == [1.0, 1.0]


# --- Failures --------------------------------------------------------------------------------------------------------


def test_a_client_full_of_nan_fails_alone_and_keeps_its_state():
    config = tiny("fedmd", "linear")
    _, grid = asked(config, Loop(app))
    homes = {k: grid.context(k).state for k in range(CLIENTS)}
    sick = {name: torch.full_like(value, torch.nan) for name, value in home(homes[2]).items()}
    homes[2][PERSONAL] = wire.to_record(sick)
    expected, _ = asked(config, Loop(app), {k: RecordDict(dict(s)) for k, s in homes.items()})
    replies, after = asked(config, Vectorised(app), homes)
    assert reasons(replies) == reasons(expected) and [bool(r) for r in reasons(replies)] == [
        False,
        False,
        True,
        False,
        False,
    ]
    assert "NaN" in str(reasons(replies)[2])
    kept = home(after.context(2).state)
    assert all(kept[name].isnan().all() for name in sick)
    for one, other in zip(replies, expected, strict=True):
        if not one.has_error():
            said = [[dict(wire.unpack(r.content)[0].tensors)] for r in (one, other)]
            assert distance(*said) < 1e-5


@pytest.mark.slow
def test_a_client_without_budget_fails_alone_and_does_not_work():
    config = tiny("fedavg", "linear", privacy=AMBASSADOR)
    ledger = site(config.to_json()).mechanism.ledger()
    ledger.record(1, 1, Event(0.1, 1.0, 5))  # a loud release long ago
    homes = {1: RecordDict({LEDGER: ConfigRecord({"json": json.dumps(ledger.to_json())})})}
    expected, _ = asked(config, Loop(app), {1: RecordDict(dict(homes[1]))})
    replies, grid = asked(config, Vectorised(app), homes)
    assert reasons(replies) == reasons(expected)
    assert [str(reason).partition(":")[0] for reason in reasons(replies)] == ["None", "BudgetExhausted", *["None"] * 3]
    assert list(grid.context(1).state) == [LEDGER] and LEDGER in grid.context(0).state


class Reads(FedMD):
    how: str = "item"

    def client_update(self, task, client, down):
        w, said = super().client_update(task, client, down)
        w = dict(w)
        name = next(iter(w))
        if self.how == "item":
            w[name] = w[name] * (1 + 0 * w[name].sum().item())
        elif self.how == "if" and w[name].sum() > 1e9:
            w = {}
        elif self.how == "mask":
            w[name][w[name] > 1e9]
        elif self.how == "random":
            w[name] = w[name] + 0 * torch.rand(())
        elif self.how == "numpy":
            w[name].numpy()
        return w, said


@pytest.mark.parametrize(
    ("how", "cause"),
    [
        ("item", r"a tensor's value is read, by .item\(\)"),
        ("if", "an if or while depends on a tensor's value"),
        ("mask", "a boolean mask or nonzero"),
        ("random", "random numbers are drawn inside"),
        ("numpy", r"by .numpy\(\)"),
    ],
)
def test_a_method_beyond_vmap_stops_the_run_with_the_cause_and_the_way_out(how, cause):
    config = tiny(own("Reads"), "linear", method={"how": how})
    with pytest.raises(
        ConfigError, match=f"engine.name=vectorised: .*{cause}.*; use engine.name=loop or pool"
    ) as error:
        run(config, Vectorised(app))
    assert "\n" not in str(error.value)
    assert run(config, Loop(app))[1] == [[], []]


class Recurrent(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.cell = nn.LSTM(inputs, 8, batch_first=True)

    def forward(self, x):
        return self.cell(x)[0][:, -1]


@pytest.mark.parametrize(
    ("layer", "cause"),
    [
        (lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 8)), "BatchNorm.*use GroupNorm"),
        (lambda: nn.Sequential(nn.Flatten(2), nn.Flatten(0, 1), nn.Unflatten(0, (-1, 1)), Recurrent(64)), "LSTM"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(64, 8)), "random numbers"),
    ],
    ids=["batchnorm", "lstm", "dropout"],
)
def test_a_model_beyond_vmap_stops_the_run_too(monkeypatch, layer, cause):
    monkeypatch.setitem(MODELS, "odd", (lambda _, k: nn.Sequential(layer(), nn.Linear(8, k)), "odd"))
    config = tiny("fedavg", "odd")
    site.cache_clear()
    federations.from_json.cache_clear()
    with pytest.raises(ConfigError, match=f"fedavg with model 'odd' is beyond torch.func.vmap .*{cause}"):
        asked(config, Vectorised(app))
    site.cache_clear()
    federations.from_json.cache_clear()


def test_when_the_engine_gives_up_only_what_was_handed_out_has_happened(monkeypatch):
    layer = lambda k: nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(64, k))  # noqa: E731
    monkeypatch.setitem(MODELS, "odd", (lambda _, k: layer(k), "odd"))
    config = tiny("fedmd", "linear", "odd")
    _, grid = opened(config, Vectorised(app))
    jobs = [(message, grid.context(k)) for k, message in enumerate(messages(config, grid))]
    replies = iter(grid.engine(jobs))
    assert next(replies).metadata.src_node_id == grid.node_of(0)
    with pytest.raises(ConfigError, match="random numbers"):
        next(replies)
    assert [list(context.state) for _, context in jobs] == [[PERSONAL], [], [], [], []]


class Broken(FedAvg):
    how: str = "raise"

    def client_update(self, task, client, down):
        if self.how == "sleep":
            time.sleep(5)
        if self.how == "shape":
            return {}, Knowledge({"w": torch.zeros(3)})
        if self.how == "twice":
            task.fit(task, dict(down.tensors), client)
            task.fit(task, dict(down.tensors), client)
        raise RuntimeError("out of luck")


@pytest.mark.parametrize(("how", "privacy"), [("raise", {}), ("shape", {}), ("twice", AMBASSADOR)])
def test_a_method_that_fails_anywhere_fails_as_in_the_loop(how, privacy):
    config = tiny(own("Broken"), "linear", method={"how": how}, privacy=privacy)
    replies, grid = asked(config, Vectorised(app))
    assert reasons(replies) == reasons(asked(config, Loop(app))[0]) and all(reasons(replies))
    assert str(reasons(replies)[0]).startswith(
        PrivacyError.__name__ if how == "twice" else ("RuntimeError", "SchemaError")
    )
    assert all(list(grid.context(k).state) == [] for k in range(CLIENTS))


def test_a_block_that_takes_too_long_is_interrupted():
    config = tiny(own("Broken"), "linear", method={"how": "sleep"})
    start = time.monotonic()
    replies, _ = asked(config, Vectorised(app, timeout=0.02, block=3))
    assert reasons(replies) == [f"TimeoutError: no answer within {s} s" for s in answered_in(config, (0.06, 0.04))]
    assert time.monotonic() - start < 3


def answered_in(config: Config, seconds: tuple[float, float]) -> list[float]:
    """Seconds of each client's block: the three largest clients make the first."""
    sizes = [len(index) for index in site(config.to_json()).federation.split.train]
    largest = sorted(range(CLIENTS), key=lambda k: -sizes[k])[:3]
    return [seconds[0] if k in largest else seconds[1] for k in range(CLIENTS)]


def test_a_message_that_is_none_of_ours_is_an_error_reply():
    config = tiny("fedavg", "linear")
    for engine in (Loop(app), Vectorised(app)):
        _, grid = opened(config, engine)
        sent = messages(config, grid)
        sent[1].content["knowledge"] = ConfigRecord({"k": 1})
        sent[3].content["about"]["round"] = "soon"
        found = reasons(list(grid.send_and_receive(sent)))
        assert [bool(reason) for reason in found] == [False, True, False, True, False]
        assert str(found[1]).startswith("SchemaError") and str(found[3]).startswith("ValueError")


# --- Memory and order ------------------------------------------------------------------------------------------------


def blocks(monkeypatch) -> list[int]:
    """Sizes of the blocks, noted as they are run."""
    sizes, update = [], vectorised._update

    def noted(here, turns):
        sizes.append(len(turns))
        return update(here, turns)

    monkeypatch.setattr(vectorised, "_update", noted)
    return sizes


def test_blocks_are_of_one_architecture_and_of_the_size_asked_for(monkeypatch):
    sizes = blocks(monkeypatch)
    asked(tiny("fedmd", "linear", "mlp"), Vectorised(app, block=2))
    assert sizes == [2, 1, 2]  # linear: clients 0, 2, 4; mlp: 1, 3
    with pytest.raises(ConfigError, match="block: expected 1 or more clients, got 0"):
        Vectorised(app, block=0)


def test_memory_sets_the_size_of_blocks_and_one_client_always_fits(monkeypatch):
    sizes, config = blocks(monkeypatch), tiny("fedmd", "mlp")
    here = site(config.to_json())
    largest = max(range(CLIENTS), key=lambda k: len(here.federation.split.train[k]))
    turn = here.build(largest, 1, Knowledge({}), RecordDict())
    need = memory.client_bytes(here, turn)
    for free, expected in ((0, [1] * 5), (4 * need, [1] * 5), (8 * need, [2, 2, 1]), (1 << 40, [5])):
        sizes.clear()
        monkeypatch.setattr(memory, "available_memory", lambda _, free=free: free)
        asked(config, Vectorised(app))
        assert sizes == expected
    parameters = sum(p.numel() for p in here.federation.models["mlp"].net.parameters())
    assert need > 4 * 4 * parameters  # the model, its gradient and Adam's two moments


def test_this_machine_says_how_much_memory_it_has(monkeypatch):
    cpu = torch.device("cpu")
    assert memory.available_memory(cpu) > 1 << 24
    monkeypatch.setattr(memory.Path, "read_text", lambda *_, **__: "MemTotal: 5 kB\n")
    assert memory.available_memory(cpu) > 1 << 20
    monkeypatch.setattr(memory.os, "sysconf", lambda name: {}[name] if name else 0)
    monkeypatch.delattr(memory.os, "sysconf")
    assert memory.available_memory(cpu) == memory._UNKNOWN_MEMORY


@pytest.mark.parametrize("fits", [3, 1, 0])
@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError], ids=["cuda", "cpu"])
def test_a_block_that_runs_out_of_memory_is_halved(monkeypatch, fits, kind):
    config, update = tiny("fedavg", "linear"), vectorised._update
    expected = asked(config, Vectorised(app))[0]

    def small(here, turns):
        if len(turns) > fits:
            raise kind("DefaultCPUAllocator: can't allocate memory")
        return update(here, turns)

    monkeypatch.setattr(vectorised, "_update", small)
    replies, _ = asked(config, Vectorised(app))
    if not fits:
        assert reasons(replies) == [f"{kind.__name__}: DefaultCPUAllocator: can't allocate memory"] * CLIENTS
        return
    said = [[wire.unpack(reply.content)[0].tensors for reply in each] for each in (replies, expected)]
    assert distance(*said) < 1e-5


def test_replies_come_in_the_order_of_the_jobs_whatever_they_ask():
    config = tiny("fedavg", "linear", "linear")
    _, grid = opened(config, Vectorised(app, block=2))
    train, score, hello = (messages(config, grid, kind=kind) for kind in ("train", "evaluate", "query"))
    sent = [train[3], train[0], score[1], train[4], hello[2], train[1], score[4], score[3]]
    nodes = [message.metadata.dst_node_id for message in sent]
    replies = list(grid.send_and_receive(sent))
    assert [reply.metadata.src_node_id for reply in replies] == nodes and not any(reasons(replies))
    assert [next(iter(reply.content)) for reply in replies] == [
        "knowledge", "knowledge", "scores", "knowledge", "about", "knowledge", "scores", "scores",
    ]  # fmt: skip


def test_a_client_asked_twice_answers_twice_as_in_the_loop():
    config, states = tiny("local", "linear"), []
    for engine in (Loop(app), Vectorised(app)):
        _, first = asked(config, engine)  # a home to start from
        homes = {k: first.context(k).state for k in range(CLIENTS)}
        _, grid = opened(config, engine, homes)
        sent = messages(config, grid)
        assert len(list(grid.send_and_receive([sent[0], sent[1], messages(config, grid)[0]]))) == 3
        states.append([home(grid.context(k).state) for k in (0, 1)])
    assert distance(*states) < 1e-5
