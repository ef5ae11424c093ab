"""The pool engine: workers that die, hang, or meet strange messages."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.app import Message as FlowerMessage

from clients.engines.parcel import Arena, Window, pack, unpack
from clients.engines.pool import Pool
from fedkd import wire
from fedkd.errors import ConfigError
from fedkd.grid import LocalGrid

APP = """
import os, time
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
import numpy as np

app = ClientApp()

@app.train()
def train(message, context):
    client = int(context.node_config["partition-id"])
    order = message.content.config_records["order"]
    if client == order.get("sleeps", -1):
        time.sleep(60)
    if client == order.get("raises", -1):
        raise RuntimeError("no")
    if client == order.get("dies", -1):
        os.kill(os.getpid(), 9)
    if client == order.get("dies_once", -1) and not os.path.exists(order["mark"]):
        open(order["mark"], "w").close()
        os.kill(os.getpid(), 9)
    seen = context.state.get("seen")
    if seen is None:
        context.state["seen"] = seen = MetricRecord({"n": 0})
    seen["n"] = seen["n"] + 1
    value = message.content.array_records["w"]["w"].numpy()
    context.state["last"] = ArrayRecord({"w": Array(value + client)})
    about = MetricRecord({"client": client, "n": seen["n"], "pid": os.getpid(), "lr": context.run_config["lr"]})
    return Message(RecordDict({"about": about, "w": ArrayRecord({"w": Array(value + client)})}), reply_to=message)
"""


@pytest.fixture
def app(tmp_path, monkeypatch) -> str:
    name = f"pool_app_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(APP)
    monkeypatch.syspath_prepend(str(tmp_path))
    return f"{name}:app"


def ask(grid: LocalGrid, size: int = 10, **order):
    record = ArrayRecord({"w": Array(np.arange(size, dtype=np.float64))})
    content = RecordDict({"w": record, "order": ConfigRecord(order)})
    messages = [FlowerMessage(content, node, "train") for node in grid.get_node_ids()]
    return list(grid.send_and_receive(messages))


def about(reply) -> MetricRecord:
    return reply.content.metric_records["about"]


@pytest.mark.slow
def test_a_foreign_app_with_state_in_order_and_on_several_workers(app):
    with Pool(app, workers=2) as pool:
        grid = LocalGrid(pool, 5, {"lr": 0.5})
        for t in (1, 2, 3):
            replies = ask(grid, size=3000)
            assert [about(reply)["client"] for reply in replies] == [0, 1, 2, 3, 4]
            assert [about(reply)["n"] for reply in replies] == [t] * 5
            assert {about(reply)["lr"] for reply in replies} == {0.5}
            for client, reply in enumerate(replies):
                got = reply.content.array_records["w"]["w"].numpy()
                np.testing.assert_array_equal(got, np.arange(3000) + client)
        assert {about(reply)["pid"] for reply in replies} <= set(pool.pids())
        last = grid.homes[4].array_records["last"]["w"].numpy()
        np.testing.assert_array_equal(last, np.arange(3000) + 4)


@pytest.mark.slow
def test_a_client_that_raises_and_one_that_kills_its_worker_twice(app):
    with Pool(app, workers=2) as pool:
        grid = LocalGrid(pool, 6, {"lr": 0.5})
        before = set(pool.pids())
        replies = ask(grid, raises=1, dies=3)
        assert [reply.has_error() for reply in replies] == [False, True, False, True, False, False]
        assert "RuntimeError: no" in replies[1].error.reason
        assert "died twice" in replies[3].error.reason
        assert "SIGKILL" in replies[3].error.reason
        assert len(pool.pids()) == 2
        assert before != set(pool.pids())
        assert sorted(grid.homes) == [0, 2, 4, 5]
        assert not any(reply.has_error() for reply in ask(grid))  # no later round suffers
        assert [grid.homes[k].metric_records["seen"]["n"] for k in range(6)] == [2, 1, 2, 1, 2, 2]


@pytest.mark.slow
def test_a_worker_that_dies_once_is_replaced_and_its_client_answers(app, tmp_path):
    with Pool(app, workers=2) as pool:
        grid = LocalGrid(pool, 4, {"lr": 0.5})
        replies = ask(grid, dies_once=2, mark=str(tmp_path / "mark"))
        assert [about(reply)["n"] for reply in replies] == [1] * 4
        os.kill(pool.pids()[0], signal.SIGKILL)  # between rounds
        assert [about(reply)["n"] for reply in ask(grid)] == [2] * 4


@pytest.mark.slow
def test_a_client_past_its_time_is_killed_and_the_others_answer(app):
    with Pool(app, timeout=1.5, workers=2) as pool:
        grid = LocalGrid(pool, 4, {"lr": 0.5})
        ask(grid)  # importing the app counts against the first client's time
        began = time.monotonic()
        replies = ask(grid, sleeps=0)
        assert time.monotonic() - began < 15
        assert [reply.has_error() for reply in replies] == [True, False, False, False]
        assert "within 1.5 s" in replies[0].error.reason


@pytest.mark.slow
def test_replies_nobody_waited_for_do_not_reach_the_next_round(app):
    with Pool(app, workers=2) as pool:
        grid = LocalGrid(pool, 4, {"lr": 0.5})
        jobs = [(m, grid.context(k)) for k, m in enumerate(_messages(grid))]
        next(pool(iter(jobs)))
        replies = ask(grid, size=50)
        assert [about(reply)["client"] for reply in replies] == [0, 1, 2, 3]
        assert all(len(reply.content.array_records["w"]["w"].numpy()) == 50 for reply in replies)


def _messages(grid):
    content = RecordDict({"w": ArrayRecord({"w": Array(np.zeros(10))}), "order": ConfigRecord({})})
    messages = [FlowerMessage(content, node, "train") for node in grid.get_node_ids()]
    for key, message in enumerate(messages):
        message.metadata.__dict__["_message_id"] = f"x{key}"
    return messages


@pytest.mark.slow
def test_an_app_that_cannot_be_imported_is_an_error_reply_not_a_hang():
    with Pool("no_such_module:app", workers=1) as pool:
        grid = LocalGrid(pool, 2, {"lr": 0.5})
        assert ["died twice" in reply.error.reason for reply in ask(grid)] == [True, True]


@pytest.mark.slow
def test_nothing_is_left_behind(app):
    pool = Pool(app, workers=2)
    pids = pool.pids()
    ask(LocalGrid(pool, 2, {"lr": 0.5}))
    pool.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_no_workers_is_refused():
    with pytest.raises(ConfigError, match=r"engine\.workers"):
        Pool("clients.app:app", workers=0)


def test_parcels_share_what_is_equal_by_identity_and_keep_types():
    import torch

    arena = Arena()
    big, small = torch.arange(5000.0), torch.tensor([1, 2])
    record = wire.to_record({"big": big, "again": big.detach(), "small": small, "strided": torch.arange(6000.0)[::2]})
    foreign = ArrayRecord({"x": Array(np.arange(1000))})
    value = [RecordDict({"a": record, "f": foreign}), RecordDict({"a": record}), ("text", 3)]
    header = pack(value, arena)
    assert len(header) < 4000
    arena_bytes = arena._used
    pack(value, arena)
    assert arena._used == arena_bytes  # laid down once
    got = unpack(header, Window(arena.path), keep=False)
    tensors = wire.from_record(got[0].array_records["a"])
    for name, want in wire.from_record(record).items():
        assert torch.equal(tensors[name], want)
        assert tensors[name].dtype == want.dtype
    np.testing.assert_array_equal(got[0].array_records["f"]["x"].numpy(), np.arange(1000))
    kept = wire.from_record(unpack(header, Window(arena.path), keep=True)[1].array_records["a"])["big"]
    arena.reset()
    pack(wire.to_record({"other": torch.zeros(9000)}), arena)
    assert torch.equal(kept, big)
    assert got[2] == ("text", 3)
    arena.close()
