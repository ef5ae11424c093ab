"""Foreign Flower apps, as any user of Flower would write them, and one that passes tensors by reference."""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn

from experiments.bench.data import Data
from experiments.bench.hand import descend, network
from experiments.bench.methods import knock
from fedkd import wire

APP = "experiments.bench.apps"

echo = ClientApp()
share = ClientApp()
train = ClientApp()
hello = ClientApp()


@echo.train()
def _echo(message: Message, context: Context) -> Message:
    """Answer the array plus one, through Flower's own Array."""
    value = message.content.array_records["arrays"]["w"].numpy() + 1
    return _reply(message, ArrayRecord({"w": Array(value)}), 1)


@share.train()
def _share(message: Message, context: Context) -> Message:
    """Answer the array plus one, through our Array: by reference where possible."""
    value = wire.from_record(message.content.array_records["arrays"])["w"] + 1
    return _reply(message, wire.to_record({"w": value}), 1)


@train.train()
def _train(message: Message, context: Context) -> Message:
    """One local epoch on the client's own images, as in Flower's tutorials."""
    about = message.content.config_records["config"]
    clients, samples = int(about["clients"]), int(about["samples"])  # type: ignore[arg-type]
    net, x, y = _at_hand(str(about["path"]), clients, samples, str(about["model"]))
    net.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    client = int(context.node_config["partition-id"])
    descend(net, x[client], y[client], float(about["lr"]), int(about["batch"]))  # type: ignore[arg-type]
    return _reply(message, ArrayRecord(net.state_dict()), len(y[client]))


@hello.train()
def _hello(message: Message, context: Context) -> Message:
    """Say that a client is at work."""
    knock()
    return Message(RecordDict(), reply_to=message)


@lru_cache(maxsize=1)
def _at_hand(path: str, clients: int, samples: int, model: str) -> tuple[nn.Module, list[Tensor], list[Tensor]]:
    """The network and all clients' images, loaded once a process."""
    torch.set_num_threads(1)
    x, y = Data(Path(path), clients, samples).tensors()
    return network(model), x, y


def _reply(message: Message, arrays: ArrayRecord, examples: int) -> Message:
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": examples})})
    return Message(content, reply_to=message)


class Stock:
    """Rounds of Flower's own FedAvg on any Grid, training only."""

    def __init__(self, grid: Grid, clients: int, cohort: int, arrays: ArrayRecord, config: ConfigRecord) -> None:
        logging.getLogger("flwr").setLevel(logging.ERROR)
        self.grid, self.arrays, self.config = grid, arrays, config
        self.round = 0
        self.strategy = FedAvg(
            fraction_train=cohort / clients,
            fraction_evaluate=0.0,
            min_train_nodes=cohort,
            min_available_nodes=clients,
        )
        self.cohort = cohort

    def __call__(self) -> None:
        """One round.

        Raises:
            RuntimeError: A client did not answer.
        """
        self.round += 1
        messages = self.strategy.configure_train(self.round, self.arrays, self.config, self.grid)
        replies = list(self.grid.send_and_receive(messages, timeout=600))
        usable = sum(not reply.has_error() for reply in replies)
        if usable != self.cohort:
            reasons = [reply.error.reason for reply in replies if reply.has_error()]
            raise RuntimeError(f"{usable} of {self.cohort} clients answered {reasons[:1]}")
        arrays, _ = self.strategy.aggregate_train(self.round, replies)
        if arrays is not None:
            self.arrays = arrays
