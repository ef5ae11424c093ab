"""FedMD: Heterogenous Federated Learning via Model Distillation.

Li, Wang; NeurIPS 2019 workshop; arXiv:1910.03581, Algorithm 1. Evidence: official-code (diogenes0319/FedMD_clean).
Decided here: the digest's loss is the paper's L1 on logits or, by ``loss = "kl"``, a KL at ``temperature``, which did
better on our data; there is no transfer-learning stage on *labelled* public data (our public sets have no labels), so
round 1 has nothing to digest. ``student_epochs`` adds a model of the server's own, trained on the consensus only; it
is not in the paper, and shows what whoever holds the consensus can know.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from fedkd import learn
from fedkd.knowledge import Knowledge, Params, Schema, nest, pick
from fedkd.losses import Loss, kl, l1_logits
from fedkd.method import Evidence, Method, Peer, Pool, logits_schema, size
from fedkd.task import Client, Task


class FedMD(Method):
    """Clients with models of their own agree on logits of public inputs."""

    evidence: ClassVar[Evidence] = "official-code"
    text: ClassVar[bool] = True
    sends = "logits"
    needs_public: ClassVar[bool] = True
    tolerance: ClassVar[float] = 1e-4  # the L1's gradient jumps

    loss: Literal["l1", "kl"] = Field("l1", description="how the consensus is imitated")
    temperature: float = Field(1.0, gt=0, description="temperature of the KL")
    public_batch: int = Field(64, ge=1, description="minibatch size on public inputs")
    digest_epochs: int = Field(1, ge=1, description="epochs over the public set a round")
    student_epochs: int = Field(0, ge=0, description="epochs a round of a server student; 0 for none")

    def public_order(self, rng: np.random.Generator, m: int) -> Tensor:
        """The digest's minibatches."""
        return learn.batches(rng, m, self.public_batch, self.digest_epochs)

    def distance(self) -> Loss:
        """The digest's loss."""
        return l1_logits if self.loss == "l1" else kl(self.temperature)

    def reply_schema(self, task: Task, down: Knowledge) -> Schema:
        """Logits (m, K) of the public inputs."""
        return logits_schema(task)

    def server_init(self, task: Task, seed: int) -> Params:
        """No consensus yet; a student where one is wanted."""
        return nest("student", task.model.init(seed)) if self.student_epochs else {}

    def send(self, task: Task, server: Params, t: int, to: Peer) -> Knowledge:
        """Distribute: the consensus of the round before."""
        return Knowledge({k: v for k, v in server.items() if k == "logits"})

    def client_update(self, task: Task, client: Client, down: Knowledge) -> tuple[Params, Knowledge]:
        """Digest, revisit, communicate."""
        w = client.personal
        if "logits" in down.tensors:  # Digest: approach the consensus on the public set
            consensus = down.tensors["logits"]
            order = client.public_order
            w = learn.imitate(task.model, w, task.public_x, consensus, order, self.distance(), task.optimizer)
        w = task.fit(task, w, client)  # Revisit: train on one's own records
        return w, Knowledge({"logits": task.model.logits(w, task.public_x)}, size(client))  # Communicate

    def aggregate(self, task: Task, server: Params, pool: Pool, t: int, rng: np.random.Generator) -> Params:
        """Aggregate: the mean of the clients' logits."""
        consensus = pool.mean.tensors["logits"]
        student = pick("student", server)
        if self.student_epochs:
            order = learn.batches(rng, len(task.public_x), self.public_batch, self.student_epochs)
            student = learn.imitate(
                task.model, student, task.public_x, consensus, order, kl(self.temperature), task.optimizer
            )
        return {"logits": consensus, **nest("student", student)}

    def student(self, task: Task, server: Params) -> Params | None:
        """The server's student, where one is trained."""
        return pick("student", server) or None
