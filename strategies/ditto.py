"""Ditto: Fair and Robust Federated Learning Through Personalization.

Li, Hu, Beirami, Smith; ICML 2021; arXiv:2012.04221, Algorithm 1 with FedAvg as its solver G. Evidence: official-code
(litian96/ditto, trainers_MTL/ditto.py). Next to its part in FedAvg, a client keeps a model v_k of its own and minimises
F_k(v) + lambda/2 ||v - w_t||^2, where w_t is the global model *as received*, not as just trained.
Decided here: v_k starts at w_0, which everybody can compute, so a client absent for rounds starts no further away than
the others; v_k and w see the same minibatches, as in the released code. With Adam the pull is a part of the gradient
that Adam rescales; the released code descends by plain SGD. There is no choice of lambda on validation data (the
paper's "dynamic" variant). Two trainings a round are more than an ambassador's ledger books, hence ``reads_records``.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from fedkd.knowledge import Knowledge, Params
from fedkd.method import Evidence
from fedkd.task import Client, Penalty, Task
from strategies.fedavg import FedAvg


class Ditto(FedAvg):
    """FedAvg, and at home a personal model that is drawn towards the global one."""

    evidence: ClassVar[Evidence] = "official-code"

    lam: float = Field(0.1, ge=0, description="strength of the pull towards the global model (lambda)")

    def reads_records(self) -> bool:
        """It trains twice a round."""
        return True

    def personal_init(self, task: Task, seed: int, client: int) -> Params:
        """v_k = w_0."""
        return self.server_init(task, seed)

    def client_update(self, task: Task, client: Client, down: Knowledge) -> tuple[Params, Knowledge]:
        """ClientUpdate of FedAvg for w; gradient steps with the pull towards w_t for v_k."""
        _, said = super().client_update(task, client, down)
        v = task.fit(task, client.personal, client, penalty=self.pull(dict(down.tensors)))
        return v, said

    def pull(self, w: Params) -> Penalty | None:
        """lambda/2 ||v - w||^2."""
        if self.lam == 0:
            return None

        def proximal(v: Params) -> Tensor:
            gaps = [(v[name] - w[name]).square().sum() for name in w]
            return self.lam / 2 * sum(gaps[1:], gaps[0])

        return proximal

    def judged(self, down: Knowledge, personal: Params) -> Params:
        """Every client is scored on its personal model."""
        return personal
