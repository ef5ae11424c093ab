"""FedDF: Ensemble Distillation for Robust Model Fusion in Federated Learning.

Lin, Kong, Stich, Jaggi; NeurIPS 2020; arXiv:2006.07242, Algorithms 1 (one architecture) and 3 (several).
Evidence: official-code (epfml/federated-learning-public-code). The ensemble is the mean of the logits, as in the paper
(the released code's default argument averages losses); all architectures imitate the *whole* ensemble. The clients'
logits on the public set are computed once a round, since the teachers do not change while the students learn.
Decided here: a fixed number of fusion epochs at a constant rate instead of early stopping on validation
data, which the server does not have.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from pydantic import Field

from fedkd import learn
from fedkd.knowledge import Knowledge, Params, Schema, nest, pick
from fedkd.losses import kl
from fedkd.method import Evidence, Method, Peer, Pool, by_model, size
from fedkd.optim import Adam
from fedkd.task import Client, Task


class FedDF(Method):
    """The server averages weights per architecture, then distils the clients' ensemble into each average."""

    evidence: ClassVar[Evidence] = "official-code"
    text: ClassVar[bool] = True
    answers_parameters: ClassVar[bool] = True
    sends = "params"
    needs_public: ClassVar[bool] = True
    needs_each: ClassVar[bool] = True

    public_batch: int = Field(64, ge=1, description="minibatch size on public inputs")
    fusion_epochs: int = Field(2, ge=1, description="epochs over the public set of the server's fusion")
    fusion_lr: float = Field(1e-3, gt=0, description="learning rate of the fusion (Adam)")
    temperature: float = Field(1.0, gt=0, description="temperature of the KL")

    def reply_schema(self, task: Task, down: Knowledge) -> Schema:
        """All parameters of the client's own architecture."""
        return task.model.schema

    def server_init(self, task: Task, seed: int) -> Params:
        """One model for each architecture."""
        server: Params = {}
        for name, model in task.models.items():
            server |= nest(name, task.initial(model, seed))
        return server

    def personal_init(self, task: Task, seed: int, client: int) -> Params:
        """Nothing stays at home."""
        return {}

    def send(self, task: Task, server: Params, t: int, to: Peer) -> Knowledge:
        """The fused model of the client's architecture."""
        return Knowledge(pick(to.model, server))

    def client_update(self, task: Task, client: Client, down: Knowledge) -> tuple[Params, Knowledge]:
        """Client-LocalUpdate: train from the fused model."""
        return {}, Knowledge(task.fit(task, dict(down.tensors), client), size(client))

    def aggregate(self, task: Task, server: Params, pool: Pool, t: int, rng: np.random.Generator) -> Params:
        """Average each architecture's weights, then make each average imitate the ensemble."""
        groups = dict(by_model(pool.each))
        votes = [task.models[a].logits(dict(k.tensors), task.public_x) for a, ks in groups.items() for k in ks]
        ensemble = torch.stack(votes).mean(0)
        order = learn.batches(rng, len(task.public_x), self.public_batch, self.fusion_epochs)
        fused = dict(server)  # an architecture without a client in this round imitates the ensemble all the same
        for name, model in task.models.items():
            start = dict(learn.mean(groups[name]).tensors) if name in groups else pick(name, server)
            loss, adam = kl(self.temperature), Adam(self.fusion_lr)
            fused |= nest(name, learn.imitate(model, start, task.public_x, ensemble, order, loss, adam))
        return fused

    def judged(self, down: Knowledge, personal: Params) -> Params:
        """Every client is scored on the fused model of its architecture."""
        return dict(down.tensors)

    def student(self, task: Task, server: Params) -> Params | None:
        """The fused model of the server's architecture, if a client has it."""
        return pick(task.model.name, server) or None
