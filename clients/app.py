"""The Flower ClientApp: the same methods under ``flwr run``, on SuperNodes, and on the local Grid."""

from __future__ import annotations

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from clients.client import Site, answer, site
from fedkd import wire

app = ClientApp()


def _site(context: Context) -> tuple[Site, int]:
    return site(str(context.run_config["config"])), int(context.node_config["partition-id"])


@app.query()
def hello(message: Message, context: Context) -> Message:
    """Say which client this node is."""
    about = ConfigRecord({"client": int(context.node_config["partition-id"])})
    return Message(RecordDict({wire.ABOUT: about}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round's client half, through the gate."""
    here, client = _site(context)
    down, about = wire.unpack(message.content)
    released = here.train(client, int(about["round"]), down, context.state)  # type: ignore[arg-type]
    return Message(answer(released), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score the client's model."""
    here, client = _site(context)
    down, _ = wire.unpack(message.content)
    scores = here.evaluate(client, down, context.state)
    return Message(RecordDict({"scores": MetricRecord({"client": client, **scores})}), reply_to=message)
