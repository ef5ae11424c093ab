"""Swing distillation's release form: tempered and noised soft labels on public text.

The same paper and evidence as ``strategies.swing``, from which the soft targets come: a reconstruction. Clients'
teachers learn from private text and answer public text, one probability vector a token; the server's student learns
from their mean. The scores are of the *public* text, by a rule that everybody can apply, so the temperatures are public
too.

**What it promises.** By itself nothing: ``sigma`` is no calibrated noise, also with ``noise_on=all``. Under
``privacy.mechanism=gaussian`` the tempered vectors go through the gate like any other rows of probabilities: each has
norm at most 1, the noise is calibrated to all of them together and does not depend on a score, and the ledger books
it; then ``noise`` must be none, since the mechanism adds its own. Under ``ambassador`` a teacher trained by DP-SGD
answers.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import log_softmax

from fedkd import learn
from fedkd.knowledge import Knowledge, Params, Schema
from fedkd.method import Peer, Pool, logits_schema
from fedkd.task import Client, Task
from strategies.swing import Tempered, project


class SwingLabels(Tempered):
    """Clients' teachers answer public text with tempered, noised probabilities; the server's student learns those."""

    sends = "logits"
    needs_public: ClassVar[bool] = True

    score: Literal["none", "regex", "pii", "rarity"] = Field(
        "regex", description="who says how private a token of the public text is"
    )
    server_epochs: int = Field(1, ge=0, description="the student's epochs a round, on the public text")
    server_batch: int = Field(32, ge=1, description="its minibatch size")

    def row_norm(self) -> float:
        """Probabilities."""
        return 1.0

    def draws(self, rng: np.random.Generator, task: Task, records: int) -> dict[str, Tensor]:
        """Eta."""
        return self.eta(rng, (len(task.public_x), *task.answer_shape))

    def reply_schema(self, task: Task, down: Knowledge) -> Schema:
        """One probability vector for each public token."""
        return logits_schema(task)

    def server_init(self, task: Task, seed: int) -> Params:
        """The student; weights that clients start from are the teachers'."""
        return task.model.init(seed)

    def send(self, task: Task, server: Params, t: int, to: Peer) -> Knowledge:
        """Nothing: teachers learn at home."""
        return Knowledge({})

    def client_update(self, task: Task, client: Client, down: Knowledge) -> tuple[Params, Knowledge]:
        """The teacher learns from the private records and answers the public ones."""
        teacher = task.fit(task, client.personal, client)
        z, s = task.model.logits(teacher, task.public_x), self._scores(task)
        q = self.soft_targets(z, self.temperatures(s), s, client.draws.get("method/noise"))
        return teacher, Knowledge({"logits": q})

    def aggregate(self, task: Task, server: Params, pool: Pool, t: int, rng: np.random.Generator) -> Params:
        """The student learns the mean of the answers, at the temperatures that everybody knows."""
        x, q = task.public_x, project(pool.mean.tensors["logits"])
        temperature = self.temperatures(self._scores(task))

        def objective(p: Params, row: Tensor) -> Tensor:
            i = row.clamp(min=0)
            said = log_softmax(task.model.apply(p, x[i]) / temperature[i][..., None], -1)
            kl = (torch.xlogy(q[i], q[i]) - q[i] * said).sum(-1)
            return learn.masked_mean(self.t_low**2 * kl.flatten(1).mean(1) if kl.dim() > 1 else self.t_low**2 * kl, row)

        order = learn.batches(rng, len(x), self.server_batch, self.server_epochs).to(x.device)
        return learn.descend(server, order, objective, task.optimizer)

    def _scores(self, task: Task) -> Tensor:
        if self.score != "none":
            return task.public_notes["scores"]
        return torch.zeros((len(task.public_x), *task.answer_shape[:-1]), device=task.public_x.device)

    def student(self, task: Task, server: Params) -> Params | None:
        """The server's model."""
        return server
