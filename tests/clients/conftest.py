"""A foreign Flower app whose clients do what their message orders, for the engines that run it in other processes."""

from __future__ import annotations

import pytest

APP = """
import os, sys, time
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

@app.train()
def train(message, context):
    client = int(context.node_config["partition-id"])
    order = message.content.config_records["order"]
    seen = context.state.get("seen")
    if seen is None:
        context.state["seen"] = seen = MetricRecord({"n": 0})
    seen["n"] = seen["n"] + 1
    if order.get("marks"):
        open(os.path.join(order["marks"], str(client)), "w").close()
    if client == order.get("sleeps", -1):
        time.sleep(60)
    if client == order.get("raises", -1):
        raise RuntimeError("no")
    if client == order.get("exits", -1):
        sys.exit(3)
    if client == order.get("answers_nonsense", -1):
        return "nonsense"
    if client == order.get("dies", -1):
        os.kill(os.getpid(), 9)
    if client == order.get("dies_once", -1) and not os.path.exists(order["mark"]):
        open(order["mark"], "w").close()
        os.kill(os.getpid(), 9)
    time.sleep(order.get("takes", 0.0))
    if order.get("keeps"):
        context.state["last"] = ArrayRecord({"w": Array(message.content.array_records["w"]["w"].numpy() + client)})
    about = {"client": client, "n": seen["n"], "pid": os.getpid(), "lr": context.run_config["lr"]}
    return Message(RecordDict({**message.content, "about": MetricRecord(about)}), reply_to=message)

@app.query()
def look(message, context):
    return Message(RecordDict({"n": MetricRecord({"n": len(context.state)})}), reply_to=message)

@app.evaluate()
def noise(message, context):
    import random, numpy, torch
    own = [torch.full((1000,), float(context.node_config["partition-id"])), torch.zeros(3)]
    about = {"a": random.random(), "b": float(numpy.random.rand()), "threads": torch.get_num_threads()}
    from fedkd import wire
    context.state["own"] = wire.to_record({"own": own[0]})
    content = {"about": MetricRecord(about), "own": wire.to_record({"own": own[0], "small": own[1]})}
    return Message(RecordDict(content), reply_to=message)
"""


@pytest.fixture
def app(tmp_path, monkeypatch) -> str:
    """``module:attribute`` of that app, importable here and so by workers."""
    name = f"app_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(APP)
    monkeypatch.syspath_prepend(str(tmp_path))
    return f"{name}:app"
