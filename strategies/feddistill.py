"""FD: Communication-Efficient On-Device Machine Learning, by Federated Distillation and Augmentation.

Jeong, Oh, Kim, Park, Bennis, Kim; NeurIPS 2018 workshop; arXiv:1811.11479, Federated Distillation (its augmentation is
not here). Evidence: reconstruction (the formulas from secondary sources; no official code found).
Decided here: a client's teacher for a record of class y is the plain mean of the *other* owners' class means,
(sum_j F_j,y - F_k,y) / (M_y - 1) over the M_y clients that hold y (public versions keep the client's own in). The pull
is a KL from softmax to softmax or a squared distance of logits; public versions feed raw logits to a cross-entropy as
if they were probabilities. Class means are taken over all records after local training, not over minibatches on the
way. The server remembers each client's last answer, so whoever is absent goes on teaching. All K rows travel, with
counts up and a mask down: a class that a client lacks is a row of zeros, and no message is shaped by it. A class
without another owner is learnt by cross-entropy alone. Messages are class means, not logits of inputs that anyone could
choose, hence ``sends = "prototypes"``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedkd.knowledge import Knowledge, Params, Schema
from fedkd.losses import Loss, cross_entropy, kl
from fedkd.method import Evidence, Method, Peer, Pool
from fedkd.task import Client, Task


def squared_logits(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the logits."""
    return (student - teacher).square().mean(-1)


class FedDistill(Method):
    """Clients exchange one mean of logits per class and learn from those of the others."""

    evidence: ClassVar[Evidence] = "reconstruction"
    sends = "prototypes"
    needs_each: ClassVar[bool] = True

    lam: float = Field(1.0, ge=0, description="weight of the pull to the others' class mean")
    loss: Literal["kl", "mse"] = Field("kl", description="the pull: KL of softmaxes, or squared distance of logits")
    temperature: float = Field(1.0, gt=0, description="temperature of the KL")

    def answers_sums(self) -> bool:
        """Sums of logits by class, and counts, say the same as means."""
        return True

    def summed(self, task: Task, down: Knowledge) -> Callable[[Params, Tensor], Tensor]:
        """Logits."""
        return task.model.apply

    def reply_schema(self, task: Task, down: Knowledge) -> Schema:
        """Sum of the logits of each class (K, K) and the client's records of it."""
        k = task.num_classes
        return {"sums": ((k, k), torch.float32), "counts": ((k,), torch.float32)}

    def server_init(self, task: Task, seed: int) -> Params:
        """Nobody has spoken."""
        return {}

    def send(self, task: Task, server: Params, t: int, to: Peer) -> Knowledge:
        """The mean of what the others said, class by class; nothing before anyone spoke."""
        if not server:
            return Knowledge({})
        total, said = server["total"], server["said"]
        others = total - said[to.client] if to.client < len(said) else total
        weight = others[:, -1:]
        held = weight > 1e-9 * total[:, -1:]  # not 0: what is left of a sum is rounded
        logits = torch.where(held, others[:, :-1] / torch.where(held, weight, 1.0), 0.0)
        return Knowledge({"logits": logits.float(), "held": held[:, 0].float()})

    def client_update(self, task: Task, client: Client, down: Knowledge) -> tuple[Params, Knowledge]:
        """Train towards labels and the others' class means, then answer with one's own."""
        taught = "logits" in down.tensors
        w = task.fit(task, client.personal, client, loss=self.pulled(down) if taught else cross_entropy)
        sums, counts = task.sums(task, w, client, self.summed(task, down))
        return w, Knowledge({"sums": sums, "counts": counts})

    def pulled(self, down: Knowledge) -> Loss:
        """CE(f(x), y) + lam * distance(f(x), F_y)."""
        table, held = down.tensors["logits"], down.tensors["held"]
        distance = kl(self.temperature) if self.loss == "kl" else squared_logits

        def loss(student: Tensor, y: Tensor) -> Tensor:
            index = y.clamp(min=0)
            return cross_entropy(student, y) + self.lam * held[index] * distance(student, table[index])

        return loss

    def aggregate(self, task: Task, server: Params, pool: Pool, t: int, rng: np.random.Generator) -> Params:
        """Note what each client said, as (sum, weight) per class, and the total over all clients."""
        k, answers = task.num_classes, pool.each
        new = torch.stack([_row(a.knowledge) for a in answers])
        known = server.get("said", new.new_zeros((0, k, k + 1)))
        index = [a.peer.client for a in answers]
        said = new.new_zeros((max(len(known), 1 + max(index)), k, k + 1))
        said[: len(known)] = known
        said[index] = new
        return {"said": said, "total": said.sum(0)}


def _row(knowledge: Knowledge) -> Tensor:
    """Means (K, K) and who counts (K,) side by side (K, K + 1), in doubles: later the own part is taken off again."""
    counts = knowledge.tensors["counts"]
    weight = (knowledge.weight * (counts > 0)).double()[:, None]
    means = knowledge.tensors["sums"] / torch.where(counts > 0, counts, 1.0)[:, None]
    return torch.cat([weight * means, weight], 1)
