"""Local training: no exchange. The baseline that any federation has to beat.

Evidence: baseline. Each client trains its own model on its own records, round after round, and says nothing.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from fedkd.knowledge import Knowledge, Params, Schema
from fedkd.method import Evidence, Method, Peer, Pool
from fedkd.task import Client, Task


class Local(Method):
    """Every client trains alone."""

    evidence: ClassVar[Evidence] = "baseline"
    text: ClassVar[bool] = True
    sends = "nothing"

    def reply_schema(self, task: Task, down: Knowledge) -> Schema:
        """Nothing is sent."""
        return {}

    def server_init(self, task: Task, seed: int) -> Params:
        """The server knows nothing."""
        return {}

    def send(self, task: Task, server: Params, t: int, to: Peer) -> Knowledge:
        """An empty message: go on training."""
        return Knowledge({})

    def client_update(self, task: Task, client: Client, down: Knowledge) -> tuple[Params, Knowledge]:
        """Train on one's own records."""
        return task.fit(task, client.personal, client), Knowledge({})

    def aggregate(self, task: Task, server: Params, pool: Pool, t: int, rng: np.random.Generator) -> Params:
        """Nothing to aggregate."""
        return server
