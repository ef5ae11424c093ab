"""When clients fail: refused with the reason, counted, and the round goes on; below the quorum it stops."""

import json
import time

import flwr.app
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from pydantic import Field

from clients.app import app
from clients.client import site
from clients.engines.loop import Loop
from fedkd import wire
from fedkd.config import Config
from fedkd.errors import BudgetExhausted, ConfigError, QuorumError
from fedkd.grid import LocalGrid
from fedkd.knowledge import Knowledge, Params, fingerprint
from fedkd.task import Client, Task
from privacy.accounting import Event
from strategies.fedavg import FedAvg
from strategies.fedmd import FedMD
from strategies.flower import KnowledgeStrategy, Round, roster

CLIENTS, M, K = 4, 20, 10
BAD = 2  # the client that misbehaves


class Trouble(FedMD):
    """FedMD with clients in trouble, known by their inputs: a method is not told whose tensors it has."""

    how: str = "raise"
    victims: list[int] = Field([BAD])

    def client_update(self, task: Task, client: Client, down: Knowledge) -> tuple[Params, Knowledge]:
        w, said = super().client_update(task, client, down)
        if float(client.x.double().sum()) not in FINGERS[tuple(self.victims)]:
            return w, said
        logits = said.tensors["logits"]
        if self.how == "raise":
            raise RuntimeError("the dog ate it")
        if self.how == "sleep":
            time.sleep(30)
        if self.how == "nan":
            logits = logits.clone()
            logits[3, 3] = torch.nan
        if self.how == "shape":
            logits = logits[:, :-1]
        if self.how == "dtype":
            logits = logits.double()
        if self.how == "no weight":
            return w, Knowledge({"logits": logits}, torch.tensor(0.0))
        if self.how == "keys":
            return w, Knowledge({"logit": logits}, said.weight)
        if self.how == "more keys":
            return w, Knowledge({"logits": logits, "extra": logits}, said.weight)
        return w, Knowledge({"logits": logits}, said.weight)


class Diverging(FedAvg):
    """FedAvg whose every client runs away."""

    def client_update(self, task: Task, client: Client, down: Knowledge) -> tuple[Params, Knowledge]:
        _, said = super().client_update(task, client, down)
        return {}, Knowledge({name: t * torch.inf for name, t in said.tensors.items()}, said.weight)


FINGERS: dict[tuple[int, ...], set[float]] = {}
"""Clients in trouble -> the sums of their inputs."""


def configured(name: str = f"{__name__}:Trouble", **sections) -> Config:
    raw = {
        "seed": 8,
        "data": {"limit": 400, "test": 50},
        "federation": {"clients": CLIENTS, "rounds": 2, "quorum": 2},
        "model": {"name": "linear"},
        "method": {"name": name, "lr": 0.01},
    }
    if name.endswith(("Trouble", "fedmd")):
        raw["data"]["public"] = M
    for section, fields in sections.items():
        raw[section] = raw.get(section, {}) | fields
    return Config.from_raw(raw)


def started(config: Config, grid_type: type[LocalGrid] = LocalGrid) -> tuple[KnowledgeStrategy, LocalGrid, list[Round]]:
    here, rounds = site(config.to_json()), []
    victims = tuple(getattr(config.method, "victims", ()))
    FINGERS[victims] = {float(here.federation.train_set(k)[0].double().sum()) for k in victims}
    loop = Loop(app, config.federation.client_timeout)
    grid = grid_type(loop, config.federation.clients, {"config": config.to_json()})
    return KnowledgeStrategy(here.federation, here.mechanism, rounds.append), grid, rounds


def run(config: Config, grid_type: type[LocalGrid] = LocalGrid) -> tuple[KnowledgeStrategy, LocalGrid, list[Round]]:
    strategy, grid, rounds = started(config, grid_type)
    strategy.start(grid)
    return strategy, grid, rounds


REASONS = {
    "raise": "RuntimeError: the dog ate it",
    "nan": "SchemaError: client 2, round {t}: 'logits' holds NaN or infinite values",
    "shape": "SchemaError: client 2, round {t}: 'logits' should be (20, 10) float32, got (20, 9) float32",
    "dtype": "SchemaError: client 2, round {t}: 'logits' should be (20, 10) float32, got (20, 10) float64",
    "keys": "SchemaError: client 2, round {t}: expected tensors ['logits'], got ['logit']",
    "more keys": "SchemaError: client 2, round {t}: expected tensors ['logits'], got ['extra', 'logits']",
    "no weight": "SchemaError: client 2, round {t}: the weight should be a positive number, got 0.0",
}


# --- One client in trouble -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", REASONS)
def test_one_bad_answer_is_refused_with_the_reason_and_the_round_goes_on(how):
    config = configured(method={"how": how})
    strategy, grid, rounds = run(config)

    assert [r.t for r in rounds] == [1, 2] and strategy.round == 2
    for r in rounds:
        assert [(line.client, line.refused) for line in r.failures] == [(BAD, REASONS[how].format(t=r.t))]
        assert [line.client for line in r.lines if line.direction == "up" and line.refused is None] == [0, 1, 3]
        assert r.bytes_up == 3 * 4 * M * K
        assert r.accuracy is not None  # the client in trouble still has its fresh model to be scored
    assert "personal" not in grid.context(BAD).state and "personal" in grid.context(0).state


@pytest.mark.parametrize("how", ["raise", "nan"])
def test_the_aggregate_is_that_of_the_others(how):
    strategy, grid, _ = started(configured(method={"how": how}))
    messages = strategy.configure_train(1, ArrayRecord(), ConfigRecord(), grid)
    replies = [r for r in grid.send_and_receive(messages) if not r.has_error()]
    said = [wire.unpack(reply.content)[0] for reply in replies]
    _, counts = strategy.aggregate_train(1, replies)
    assert dict(counts) == {"answers": 3, "refused": 1}
    weights = torch.stack([k.weight for k in said])
    expected = (torch.stack([k.tensors["logits"] for k in said]) * (weights / weights.sum()).view(-1, 1, 1)).sum(0)
    torch.testing.assert_close(strategy.server["logits"], expected)


def test_flowers_result_counts_answers_and_refusals():
    strategy, grid, _ = started(configured())
    result = strategy.start(grid)
    assert {t: dict(c) for t, c in result.train_metrics_clientapp.items()} == {
        1: {"answers": 3, "refused": 1},
        2: {"answers": 3, "refused": 1},
    }
    assert sorted(result.evaluate_metrics_clientapp) == [1, 2]
    assert fingerprint(wire.from_record(result.arrays)) == fingerprint(strategy.server)


def test_a_client_that_sleeps_past_its_time_is_refused():
    began = time.monotonic()
    config = configured(method={"how": "sleep"}, federation={"rounds": 1, "client_timeout": 0.3})
    _, grid, rounds = run(config)
    assert [(line.client, line.refused) for line in rounds[0].failures] == [
        (BAD, "TimeoutError: no answer within 0.3 s")
    ]
    assert time.monotonic() - began < 10
    assert "personal" not in grid.context(BAD).state


def test_behind_the_gaussian_gate_nan_becomes_zero_and_a_wrong_shape_is_still_refused():
    privacy = {"mechanism": "gaussian", "epsilon": 5.0}
    strategy, _, rounds = run(configured(method={"how": "nan"}, privacy=privacy))
    assert all(r.failures == [] for r in rounds) and torch.isfinite(strategy.server["logits"]).all()

    strategy, grid, rounds = run(configured(method={"how": "shape"}, privacy=privacy))
    assert [len(r.failures) for r in rounds] == [1, 1]
    assert strategy.ledger.releases(BAD) == () and len(strategy.ledger.releases(0)) == 2
    assert "ledger" not in grid.context(BAD).state


# --- Quorum ----------------------------------------------------------------------------------------------------------


def test_below_the_quorum_the_run_stops_says_why_and_the_state_has_not_moved():
    config = configured(method={"victims": [0, 2, 3]})
    strategy, grid, rounds = started(config)
    before = fingerprint(strategy.server)
    with pytest.raises(QuorumError) as caught:
        strategy.start(grid)
    assert str(caught.value) == (
        "round 1: 1 of 4 clients gave a usable answer, federation.quorum asks for 2; "
        "client 0: RuntimeError: the dog ate it"
    )
    assert strategy.round == 0 and rounds == [] and fingerprint(strategy.server) == before


def test_just_enough_answers_are_enough():
    _, _, rounds = run(configured(method={"victims": [0, 2]}))
    assert [sorted(line.client for line in r.failures) for r in rounds] == [[0, 2]] * 2


def test_when_every_client_diverges_nothing_is_averaged():
    config = configured(f"{__name__}:Diverging", federation={"quorum": 1})
    strategy, grid, _ = started(config)
    before = fingerprint(strategy.server)
    with pytest.raises(QuorumError, match=r"0 of 4 clients .* NaN or infinite"):
        strategy.start(grid)
    assert fingerprint(strategy.server) == before


def test_the_quorum_is_one_of_the_cohort():
    config = configured(method={"victims": [0, 1, 2, 3]}, federation={"cohort": 2, "quorum": 1})
    strategy, grid, _ = started(config)
    with pytest.raises(QuorumError, match=r"round 1: 0 of 2 clients gave a usable answer, .* asks for 1"):
        strategy.start(grid)


# --- Replies that are missing, late, foreign or nonsense -------------------------------------------------------------


class Losing(LocalGrid):
    """Loses the reply of one client."""

    def send_and_receive(self, messages, *, timeout=None):
        replies = super().send_and_receive(messages, timeout=timeout)
        return [r for r in replies if self.client_of(r.metadata.src_node_id) != BAD]


def test_a_missing_reply_is_a_failure_and_its_client_is_not_scored():
    strategy, _, rounds = run(configured("fedmd"), Losing)
    for r in rounds:
        assert [(line.client, line.refused) for line in r.failures] == [(BAD, f"client {BAD}, round {r.t}: no answer")]
    assert sorted(strategy.scores) == [0, 1, 3]


def test_when_nobody_answers_the_evaluation_the_round_has_no_score():
    class Silent(LocalGrid):
        def send_and_receive(self, messages, *, timeout=None):
            messages = list(messages)
            replies = super().send_and_receive(messages, timeout=timeout)
            return [] if messages[0].metadata.message_type == "evaluate" else replies

    _, _, rounds = run(configured("fedmd"), Silent)
    assert [r.accuracy for r in rounds] == [None, None]


def tampered(edit) -> type[LocalGrid]:
    """A grid whose client BAD answers something else: ``edit`` gets its reply's content and returns another one."""

    class Tampered(LocalGrid):
        def send_and_receive(self, messages, *, timeout=None):
            replies = list(super().send_and_receive(messages, timeout=timeout))
            for i, reply in enumerate(replies):
                about = reply.has_content() and "about" in reply.content
                if about and self.client_of(reply.metadata.src_node_id) == BAD:
                    reply.content = edit(reply.content)
                    replies[i] = reply
            return replies

    return Tampered


def about(**changes):
    def edit(content: RecordDict) -> RecordDict:
        values = {**content.config_records["about"], **changes}
        content["about"] = ConfigRecord({key: v for key, v in values.items() if v is not None})
        return content

    return edit


def garbled(content: RecordDict) -> RecordDict:
    arrays = content.array_records["knowledge"]
    arrays["logits"] = flwr.app.Array("float32", (M, K), "numpy.ndarray", b"\x93NUMPY\x01\x00v\x00{'descr': (")
    return content


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda content: RecordDict(), "a message should hold"),
        (lambda content: RecordDict({"other": MetricRecord({"a": 1})}), "a message should hold"),
        (garbled, "a message should hold"),
        (about(round=7), "got a message of client 2, round 7"),
        (about(client=1), "got a message of client 1, round"),
        (about(model="mlp"), "got a message of client 2"),
        (about(round="soon"), "the answer does not say what it is"),
        (about(round=None), "the answer does not say what it is"),
        (about(events=None), "the answer does not say what it is"),
        (about(events="{"), "the answer does not say what it is"),
        (about(events="3"), "the answer does not say what it is"),
        (about(events="[[]]"), "the answer does not say what it is"),
        (about(events='["gaussian"]'), "the answer does not say what it is"),
        (about(events='[{"kind": "vogon"}]'), "event kind should be"),
        (about(events='[{"kind": "laplace"}]'), "a laplace event has the fields"),
        (about(events=json.dumps([Event(1.0).to_json()])), r"expected the release to book (), got (Event"),
    ],
)
def test_a_nonsensical_reply_is_refused_and_never_stops_the_server(edit, reason):
    _, _, rounds = run(configured("fedmd"), tampered(edit))
    assert [[line.client for line in r.failures] for r in rounds] == [[BAD], [BAD]]
    assert all(reason in str(r.failures[0].refused) for r in rounds)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (about(events=json.dumps([Event(1e6).to_json()])), "expected the release to book"),
        (about(events="[]"), "expected the release to book"),
        (about(events="{"), "the answer does not say what it is"),
        (about(events=None), "the answer does not say what it is"),
        (garbled, "a message should hold"),
    ],
    ids=["another", "none", "no JSON", "left out", "unreadable"],
)
def test_a_release_that_claims_another_booking_is_refused_and_booked_as_the_mechanism_says(edit, reason):
    config = configured("fedmd", privacy={"mechanism": "gaussian", "epsilon": 5.0}, federation={"rounds": 1})
    strategy, _, rounds = run(config, tampered(edit))
    assert reason in str(rounds[0].failures[0].refused)
    assert strategy.ledger.releases(BAD) == ((1, *strategy.mechanism.events()),)  # a false claim cannot stop the run


def test_a_client_whose_budget_is_spent_stops_the_run():
    def broke(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == BAD and message.metadata.message_type == "train":
            raise BudgetExhausted("client 2: epsilon is 9.9")
        return app(message, context)

    strategy, grid, _ = started(configured("fedmd"))
    grid.engine = Loop(broke)
    before = fingerprint(strategy.server)
    with pytest.raises(BudgetExhausted, match="client 2: epsilon is"):
        strategy.start(grid)
    assert fingerprint(strategy.server) == before


# --- Who is there ----------------------------------------------------------------------------------------------------


class Foreign(Grid):
    """Some other Grid, behind which the same nodes come in no particular order."""

    def __init__(self, inner: LocalGrid, drop: int = 0) -> None:
        self.inner, self.drop = inner, drop

    def set_run(self, run):
        self.inner.set_run(run)

    @property
    def run(self):
        return self.inner.run

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None):
        return self.inner.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self):
        return sorted(self.inner.get_node_ids(), reverse=True)[self.drop :]

    def push_messages(self, messages):
        return self.inner.push_messages(messages)

    def pull_messages(self, message_ids):
        return self.inner.pull_messages(message_ids)

    def send_and_receive(self, messages, *, timeout=None):
        return self.inner.send_and_receive(messages, timeout=timeout)


def test_clients_are_found_by_asking_and_the_run_is_the_same():
    config = configured("fedmd")
    strategy, grid, _ = run(config)
    other, inner, _ = started(config)
    found = roster(Foreign(inner), CLIENTS)
    assert [found(k) for k in range(CLIENTS)] == [inner.node_of(k) for k in range(CLIENTS)]
    other.start(Foreign(inner))
    assert fingerprint(other.server) == fingerprint(strategy.server)
    assert [roster(grid, CLIENTS)(k) for k in range(CLIENTS)] == [found(k) for k in range(CLIENTS)]


def test_too_few_nodes_or_nodes_that_stay_silent_are_a_config_error():
    _, inner, _ = started(configured("fedmd"))
    with pytest.raises(ConfigError, match="clients=4, but the grid has 3 nodes"):
        roster(Foreign(inner, drop=1), CLIENTS, patience=0.2)
    inner.engine = Loop(lambda message, context: 1 / 0)
    with pytest.raises(ConfigError, match=r"expected nodes with partition-id 0 to 3, got \[\]"):
        roster(Foreign(inner), CLIENTS, patience=0.2)
