"""FedRep: Exploiting Shared Representations for Personalized Federated Learning.

Collins, Hassani, Mokhtari, Shakkottai; ICML 2021; arXiv:2102.07078, Algorithm 1. Evidence: paper.
FedPer's split, but a client first fits its head to the received base, which is held fixed, and only then the base under
the new head, which is held fixed in turn.
Decided here: ``head_epochs`` of a round's ``epochs`` go to the head and the rest to the base (the paper's experiments
give most to the head, its theory one step to the base); bases are averaged by number of samples, like FedPer's, not
uniformly. Two trainings a round, each of a part of the model, is more than ``task.fit`` does: records are read here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedkd import learn
from fedkd.errors import ConfigError
from fedkd.knowledge import Knowledge, Params
from fedkd.losses import cross_entropy
from fedkd.method import Evidence
from fedkd.task import Client, Task
from strategies.fedper import FedPer, parted


class FedRep(FedPer):
    """FedPer whose clients train the head first, then the base."""

    evidence: ClassVar[Evidence] = "paper"

    epochs: int = Field(2, ge=1, description="local epochs a round, the head's included")
    head_epochs: int = Field(1, ge=1, description="how many of them train the head; the others train the base")

    def reads_records(self) -> bool:
        """It trains its head and its base in turn."""
        return True

    def check(self, tasks: Mapping[str, Task], held: np.ndarray) -> None:
        """Head and base both need an epoch."""
        if self.head_epochs >= self.epochs:
            raise ConfigError(
                f"method.head_epochs={self.head_epochs}: expected fewer than method.epochs={self.epochs}, "
                "so that some are left for the base; raise method.epochs"
            )
        super().check(tasks, held)

    def client_update(self, task: Task, client: Client, down: Knowledge) -> tuple[Params, Knowledge]:
        """Head updates with phi fixed, then representation updates with h fixed; send phi."""
        first, rest = self.phases(client.order)
        head = descend(task, client, dict(client.personal), dict(down.tensors), first)
        base = descend(task, client, dict(down.tensors), head, rest)
        return parted({**head, **base}, client, down)

    def phases(self, order: Tensor) -> tuple[Tensor, Tensor]:
        """The head's and the base's minibatches.

        In a stack each client has its own number of steps an epoch, and so its own place to cut; a row past a client's
        own is padding, which comes last in both parts.
        """
        rows = len(order)
        most = rows * self.head_epochs // self.epochs
        cut = (order >= 0).any(1).sum() * self.head_epochs // self.epochs
        step = torch.arange(rows, device=order.device)
        later = step[: rows - most] + cut
        first = torch.where((step[:most] < cut)[:, None], order[:most], -1)
        return first, torch.where((later < rows)[:, None], order[later.clamp(max=rows - 1)], -1)


def descend(task: Task, client: Client, params: Params, fixed: Params, order: Tensor) -> Params:
    """Train a part of the model on the client's records while the other part is held fixed."""

    def objective(p: Params, row: Tensor) -> Tensor:
        index = row.clamp(min=0)
        logits = task.model.apply({**fixed, **p}, client.x[index])
        return learn.masked_mean(cross_entropy(logits, client.y[index]), row)

    return learn.descend(params, order, objective, task.optimizer)
