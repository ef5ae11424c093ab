"""FML: Federated Mutual Learning.

Shen, Zhang, Jia, Zhang, Huang, Zhou, Kuang, Wu, Wu; 2020; arXiv:2006.16765, the deep mutual learning update. Evidence:
official-code (ZJU-DAI/Federated-Mutual-Learning, Trainer.py). A client keeps a personal model of any architecture and
trains it together with the meme, a copy of the global model: each learns from the labels and from what the other says.
The other's answer is a constant of each step (detached), as in the released code; the KL is a mean over samples.
Decided here: memes are averaged by number of samples (the released code averages uniformly); both models use the
method's one optimiser. The meme has the architecture ``model.name``; a client knows it by its parameters. The joint
objective is more than ``task.fit`` does: records are read here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from pydantic import Field
from torch import Tensor

from fedkd import learn
from fedkd.errors import ConfigError
from fedkd.knowledge import Knowledge, Params, Schema, nest, pick
from fedkd.losses import cross_entropy, kl
from fedkd.method import Evidence, Method, Peer, Pool, architecture, size
from fedkd.models import Model
from fedkd.task import Client, Task


class FML(Method):
    """A personal model of any architecture and a shared meme model teach one another."""

    evidence: ClassVar[Evidence] = "official-code"
    text: ClassVar[bool] = True
    answers_parameters: ClassVar[bool] = True
    sends = "params"

    alpha: float = Field(0.5, ge=0, le=1, description="weight of the labels in the personal model's loss; rest: meme")
    beta: float = Field(0.5, ge=0, le=1, description="weight of the labels in the meme's loss; rest: personal model")

    def reads_records(self) -> bool:
        """It learns from private records by losses of its own."""
        return True

    def check(self, tasks: Mapping[str, Task], held: np.ndarray) -> None:
        """An architecture is known by its parameters."""
        models = next(iter(tasks.values())).models
        for model in models.values():
            names = [name for name, other in models.items() if other.schema == model.schema]
            if len(names) > 1:
                raise ConfigError(
                    f"model.by_client: expected architectures with different parameters, got {' and '.join(names)}, "
                    "which fml's clients cannot tell apart; rename a layer in one of them"
                )

    def whole(self, task: Task, down: Knowledge, said: Params) -> tuple[Model, Params] | None:
        """The meme."""
        return architecture(task, down), said

    def reply_schema(self, task: Task, down: Knowledge) -> Schema:
        """The meme, as it came."""
        return {name: (tuple(value.shape), value.dtype) for name, value in down.tensors.items()}

    def server_init(self, task: Task, seed: int) -> Params:
        """The meme."""
        return task.initial(task.model, seed)

    def send(self, task: Task, server: Params, t: int, to: Peer) -> Knowledge:
        """Fork: the meme."""
        return Knowledge(server)

    def client_update(self, task: Task, client: Client, down: Knowledge) -> tuple[Params, Knowledge]:
        """Deep mutual learning; the personal model stays, the meme is sent."""
        local, meme = task.model, architecture(task, down)

        def objective(p: Params, row: Tensor) -> Tensor:
            index = row.clamp(min=0)
            x, y = client.x[index], client.y[index]
            a, b = local.apply(pick("local", p), x), meme.apply(pick("meme", p), x)
            of_local = self.alpha * cross_entropy(a, y) + (1 - self.alpha) * kl(1.0)(a, b.detach())
            of_meme = self.beta * cross_entropy(b, y) + (1 - self.beta) * kl(1.0)(b, a.detach())
            return learn.masked_mean(of_local + of_meme, row)

        both = {**nest("local", client.personal), **nest("meme", down.tensors)}
        both = learn.descend(both, client.order, objective, task.optimizer)
        return pick("local", both), Knowledge(pick("meme", both), size(client))

    def aggregate(self, task: Task, server: Params, pool: Pool, t: int, rng: np.random.Generator) -> Params:
        """Merge: the mean of the memes."""
        return dict(pool.mean.tensors)

    def student(self, task: Task, server: Params) -> Params | None:
        """The meme."""
        return server
