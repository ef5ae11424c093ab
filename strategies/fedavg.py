"""FedAvg: Communication-Efficient Learning of Deep Networks from Decentralized Data.

McMahan, Moore, Ramage, Hampson, Agüera y Arcas; AISTATS 2017; arXiv:1602.05629, Algorithm 1. Evidence: paper.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from fedkd.knowledge import Knowledge, Params, Schema
from fedkd.method import Evidence, Method, Peer, Pool, size
from fedkd.task import Client, Penalty, Task


class FedAvg(Method):
    """Clients send weights, the server averages them by number of samples."""

    evidence: ClassVar[Evidence] = "paper"
    text: ClassVar[bool] = True
    answers_parameters: ClassVar[bool] = True
    sends = "params"
    same_model: ClassVar[bool] = True

    def reply_schema(self, task: Task, down: Knowledge) -> Schema:
        """All parameters of the shared architecture."""
        return task.model.schema

    def server_init(self, task: Task, seed: int) -> Params:
        """w_0."""
        return task.initial(task.model, seed)

    def personal_init(self, task: Task, seed: int, client: int) -> Params:
        """Nothing stays at home."""
        return {}

    def send(self, task: Task, server: Params, t: int, to: Peer) -> Knowledge:
        """w_t."""
        return Knowledge(server)

    def client_update(self, task: Task, client: Client, down: Knowledge) -> tuple[Params, Knowledge]:
        """ClientUpdate(k, w): E epochs of minibatch descent from w_t."""
        start = dict(down.tensors)
        return {}, Knowledge(task.fit(task, start, client, penalty=self.penalty(start)), size(client))

    def penalty(self, start: Params) -> Penalty | None:
        """What local training adds to the loss: nothing here, the proximal term in FedProx."""
        return None

    def aggregate(self, task: Task, server: Params, pool: Pool, t: int, rng: np.random.Generator) -> Params:
        """w_{t+1} = sum_k n_k / n w_{t+1}^k."""
        return dict(pool.mean.tensors)

    def judged(self, down: Knowledge, personal: Params) -> Params:
        """Every client is scored on the global model."""
        return dict(down.tensors)

    def student(self, task: Task, server: Params) -> Params | None:
        """The global model."""
        return server
