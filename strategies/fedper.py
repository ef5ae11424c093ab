"""FedPer: Federated Learning with Personalization Layers.

Arivazhagan, Aggarwal, Singh, Choudhary; 2019; arXiv:1912.00818, Algorithms 1 (client) and 2 (server). Evidence: paper.
Base layers are averaged by number of samples, personalisation layers never leave; a client trains both jointly.
Decided here: the personalisation layers are whole blocks (``head_blocks``, the paper's K_P), and every client draws its
own at first. The server has no head, hence no model of its own. A model whose base has no parameters is refused: it
would share nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from pydantic import Field

from fedkd.errors import ConfigError
from fedkd.knowledge import Knowledge, Params, Schema
from fedkd.method import Evidence, Method, Peer, Pool, size
from fedkd.models import Model
from fedkd.task import Client, Task


class FedPer(Method):
    """The base of the model is shared, its head stays at home."""

    evidence: ClassVar[Evidence] = "paper"
    text: ClassVar[bool] = True
    answers_parameters: ClassVar[bool] = True
    sends = "params"
    same_model: ClassVar[bool] = True

    head_blocks: int = Field(1, ge=1, description="blocks, from the top, that stay at home")

    def base(self, model: Model) -> tuple[str, ...]:
        """Names of the shared parameters."""
        return model.under(len(model.blocks) - self.head_blocks)

    def check(self, tasks: Mapping[str, Task], held: np.ndarray) -> None:
        """Something has to be shared."""
        for name, task in tasks.items():
            depth = len(task.model.blocks) - self.head_blocks
            if depth < 1:
                raise ConfigError(
                    f"method.head_blocks={self.head_blocks}: expected fewer than the {len(task.model.blocks)} blocks "
                    f"of '{name}'; lower it"
                )
            if not self.base(task.model):
                raise ConfigError(
                    f"model.name={name}: expected parameters in its lowest {depth} blocks, which would be shared, "
                    "got none; lower method.head_blocks or take a deeper model, such as 'mlp' or 'cnn'"
                )

    def reply_schema(self, task: Task, down: Knowledge) -> Schema:
        """The base."""
        return {name: task.model.schema[name] for name in self.base(task.model)}

    def server_init(self, task: Task, seed: int) -> Params:
        """W_B^0."""
        start = task.initial(task.model, seed)
        return {name: start[name] for name in self.base(task.model)}

    def personal_init(self, task: Task, seed: int, client: int) -> Params:
        """W_P^0 of this client."""
        start, shared = task.initial(task.model, seed, client + 1), self.base(task.model)
        return {name: value for name, value in start.items() if name not in shared}

    def send(self, task: Task, server: Params, t: int, to: Peer) -> Knowledge:
        """The base."""
        return Knowledge(server)

    def client_update(self, task: Task, client: Client, down: Knowledge) -> tuple[Params, Knowledge]:
        """FedPer-Client: descend on (W_B, W_P) jointly, send W_B."""
        trained = task.fit(task, {**down.tensors, **client.personal}, client)
        return parted(trained, client, down)

    def aggregate(self, task: Task, server: Params, pool: Pool, t: int, rng: np.random.Generator) -> Params:
        """FedPer-Server: the mean of the bases, weighted by number of samples."""
        return dict(pool.mean.tensors)

    def judged(self, down: Knowledge, personal: Params) -> Params:
        """Every client is scored on the shared base under its own head."""
        return {**down.tensors, **personal}


def parted(params: Params, client: Client, down: Knowledge) -> tuple[Params, Knowledge]:
    """The head stays, the base is said."""
    head = {name: params[name] for name in client.personal}
    return head, Knowledge({name: params[name] for name in down.tensors}, size(client))
