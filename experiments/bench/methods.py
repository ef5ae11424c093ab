"""Methods of the bench; importing this module, as every worker does, also registers the bench's architecture."""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from typing import ClassVar

import numpy as np
import torch
from torch import nn

import strategies.fedavg
from fedkd.knowledge import Knowledge, Params, Schema
from fedkd.method import Evidence, Method, Peer, Pool, size
from fedkd.models import MODELS
from fedkd.task import Client, Task

HERE = "experiments.bench.methods"
DOOR = "FEDKD_BENCH_DOOR"
"""Environment variable: the pipe that `knock` writes to."""
MLP = "bench-mlp"


def mlp(shape: tuple[int, ...], num_classes: int) -> nn.Sequential:
    """784-200-200-10 on 28x28 images: 199,210 parameters, as in McMahan et al. (2016)."""
    return nn.Sequential(
        OrderedDict(
            block1=nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 200), nn.ReLU()),
            block2=nn.Sequential(nn.Linear(200, 200), nn.ReLU()),
            head=nn.Linear(200, num_classes),
        )
    )


def knock() -> None:
    """Tell whoever waits at the door that a client has got its first message."""
    with open(os.environ[DOOR], "wb", buffering=0) as door:  # noqa: PTH123
        door.write(b".")


MODELS.setdefault(MLP, (mlp, "two hidden layers of 200 units, for the bench"))


class FedAvg(strategies.fedavg.FedAvg):
    """FedAvg as it is; naming it by this module brings the bench's architecture along."""


class Echo(Method):
    """A trivial client: it answers what it was told, plus one."""

    evidence: ClassVar[Evidence] = "baseline"
    sends = "params"
    numbers: int = 10

    def reply_schema(self, task: Task, down: Knowledge) -> Schema:
        """One array."""
        return {"w": ((self.numbers,), torch.float32)}

    def server_init(self, task: Task, seed: int) -> Params:
        """Zeros."""
        return {"w": torch.zeros(self.numbers)}

    def personal_init(self, task: Task, seed: int, client: int) -> Params:
        """Nothing stays at home."""
        return {}

    def send(self, task: Task, server: Params, t: int, to: Peer) -> Knowledge:
        """The mean of the last answers."""
        return Knowledge(server)

    def client_update(self, task: Task, client: Client, down: Knowledge) -> tuple[Params, Knowledge]:
        """Plus one."""
        return {}, Knowledge({"w": down.tensors["w"] + 1}, size(client))

    def aggregate(self, task: Task, server: Params, pool: Pool, t: int, rng: np.random.Generator) -> Params:
        """Weighted mean."""
        return dict(pool.mean.tensors)


class Hello(Echo):
    """Echo that says when a client is first at work."""

    def client_update(self, task: Task, client: Client, down: Knowledge) -> tuple[Params, Knowledge]:
        """Knock, then plus one."""
        knock()
        return super().client_update(task, client, down)
