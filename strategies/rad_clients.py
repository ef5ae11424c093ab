"""Robust Active Distillation by the clients: each one names the images it would like to be told about.

Baykal, Trinh, Iliopoulos, Menghani, Vee; ICLR 2023. Evidence: reconstruction. The sampler and its game are those of
`strategies.rad`, but the student whose margins decide is a client's own, and the teacher is everybody::

    round t   client k   f_k minimises the objective on all answers so far, then CE on its own records
                         answers f_k(x) for the b images that were chosen in round t - 1
                         names b more, drawn by p(f_k) as `strategies.rad` has it
              server     answers = mean over k; the error rate as there
                         chooses the b images that most clients named, ties by lot

Decided here: the first b images are drawn uniformly. All answers so far travel down each round, 4 K b t bytes, so that
who was absent has missed nothing. The server's own student is taught as in `strategies.rad`.

Which images a client names tells about its records, and no noise on its answers covers that: the Gaussian mechanism is
refused. Under the ambassador, whose model learnt by DP-SGD, the names are post-processing like all it says.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedkd import learn, objectives
from fedkd.knowledge import Knowledge, Params, Schema, nest, pick
from fedkd.method import Evidence, Peer, Pool
from fedkd.task import Client, Task
from strategies.rad import RAD, asked_about


class RADClients(RAD):
    """Clients choose by their own models what all clients are asked about, and learn from the answers."""

    evidence: ClassVar[Evidence] = "reconstruction"
    needs_each: ClassVar[bool] = True
    clients_choose: ClassVar[bool] = True
    beyond_vmap: ClassVar[str | None] = "clients sort and draw candidates in NumPy"

    selection: Literal["rad", "uniform", "margin", "entropy", "least_confidence", "coreset", "cluster_margin"] = Field(
        "rad", description="images that a client names: a query strategy"
    )
    digest_epochs: int = Field(2, ge=0, description="a client's epochs over all answers, each round")

    def draws(self, rng: np.random.Generator, task: Task, records: int) -> dict[str, Tensor]:
        """What a client's own generator starts from."""
        return {"seed": torch.from_numpy(rng.integers(2**62, size=1))}

    def reply_schema(self, task: Task, down: Knowledge) -> Schema:
        """Answers (b + l, K), those on the labelled images last; images named, b or as many as are left."""
        left = len(task.public_x) - len(down.tensors["known/index"]) - len(down.tensors["index"])
        return {**super().reply_schema(task, down), "named": ((min(self.questions, left),), torch.int64)}

    def send(self, task: Task, server: Params, t: int, to: Peer) -> Knowledge:
        """The questions; all answers so far, and how many of the tested ones were right; the same for all."""
        known = {"index": server["question/index"][:0], "logits": torch.empty((0, task.num_classes))}
        seen = {name: server[name] for name in ("right", "tested")}
        return Knowledge({**pick("question", server), **nest("known", known | pick("answered", server)), **seen})

    def client_update(self, task: Task, client: Client, down: Knowledge) -> tuple[Params, Knowledge]:
        """Learn the answers, then one's own records; answer; name images."""
        rng, told = np.random.default_rng(int(client.draws["method/seed"])), down.tensors
        known, index = pick("known", told), torch.cat([told["known/index"], told["index"]])
        asked = torch.zeros(len(task.public_x), dtype=torch.bool, device=index.device).index_fill(0, index, True)
        x = asked_about(task, known)
        order = learn.batches(rng, len(x), self.batch, self.digest_epochs).to(x.device)
        w = client.personal
        if len(order):
            w = objectives.distil(task.model, w, x, known["logits"], order, self.goal(), task.optimizer)
        w, said = super().client_update(task, client._replace(personal=w), down)
        b = min(self.questions, len(asked) - len(index))
        named = self.preferred(task, w, asked, told, b, rng).index if b else np.empty(0, np.int64)
        return w, Knowledge({**said.tensors, "named": torch.from_numpy(named).to(index.device)}, said.weight)

    def choose(self, task: Task, server: Params, rng: np.random.Generator) -> Params:
        """The next round's questions: the images named most often, ties by lot."""
        asked = server["asked"].cpu().numpy()
        votes = server["named"].cpu().numpy() if "named" in server else np.zeros(len(asked))
        rank = np.where(asked, -1, votes + rng.random(len(asked)))
        return {"index": torch.from_numpy(np.sort(np.argsort(-rank)[: self.questions]))}

    def aggregate(self, task: Task, server: Params, pool: Pool, t: int, rng: np.random.Generator) -> Params:
        """Count who was named, then as there."""
        named, m = torch.cat([answer.knowledge.tensors["named"] for answer in pool.each]), len(task.public_x)
        votes = torch.bincount(named[(named >= 0) & (named < m)], minlength=m)
        return super().aggregate(task, {**server, "named": votes}, pool, t, rng)
