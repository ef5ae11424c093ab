"""FedKD: Communication-Efficient Federated Learning via Knowledge Distillation.

Wu, Wu, Lyu, Huang, Xie; Nature Communications 13, 2032 (2022); arXiv:2108.13323, Algorithm 1. Evidence: official-code
(wuch15/FedKD, run.py and model_bert.py). A client keeps a mentor of any architecture and trains it together with the
mentee, a copy of the global model (``model.name``). Each learns from the labels, from the other's answers and from the
other's features, the latter two weighted by 1 / (CE_mentor + CE_mentee): peers that are wrong are heard less. Only the
mentee's *update* travels, as singular vectors that hold more than the share E(t) of its energy; so does the mean of the
updates on the way down. E(t) rises linearly over the run.

Decided here, against traps of the released code:
- Rank: the smallest with energy above E(t), at least 1 and at most all. The released loop never tries full rank and
  leaves rank 0, zeros, where only full rank would do. Convolutions are matrices (out, in*kh*kw), rebuilt as (u*s) @ v.
- KL: summed over classes (their reduction divides by batch *and* classes). A model's loss takes the other's answers and
  features, and the weight, as constants of the step: otherwise a larger CE would be rewarded. CE sums below `FLOOR`
  count as `FLOOR`, or a client that has learnt its one class by heart would divide by nothing.
- Features: MSE of the last block below the head where both models agree in its shape, no term where they do not or
  where nothing below a head is learnt (the released code has projections but neither uses nor trains them; attention
  maps do not exist here).
- Factors may be larger than the matrix, where its spectrum is flat; they are sent and counted as they are.
- Updates are averaged by number of samples (released code: uniformly), and what compression drops is not made up for.
- Absence: the compressed step is of use to clients that answered the round before; the others get the mentee in full.
Clients are scored on their mentors. The joint objective is more than ``task.fit`` does: records are read here.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedkd import learn
from fedkd.errors import ConfigError, SchemaError
from fedkd.knowledge import Knowledge, Params, Schema, nest, pick
from fedkd.losses import cross_entropy, kl
from fedkd.method import Evidence, Method, Peer, Pool, size
from fedkd.models import Model
from fedkd.task import Client, Task

FLOOR = 1e-2


class FedKD(Method):
    """A mentor at home and a shared mentee teach one another; the mentee's updates travel compressed."""

    evidence: ClassVar[Evidence] = "official-code"
    sends = "params"
    needs_each: ClassVar[bool] = True
    beyond_vmap: ClassVar[str | None] = "the sizes of its messages depend on their values"

    energy_start: float = Field(0.95, gt=0, le=1, description="share of an update's energy that is sent, at first")
    energy_end: float = Field(0.98, gt=0, le=1, description="the same in the last round")

    def reads_records(self) -> bool:
        """It learns from private records by losses of its own."""
        return True

    def check(self, tasks: Mapping[str, Task], held: np.ndarray) -> None:
        """The threshold rises."""
        if self.energy_start > self.energy_end:
            raise ConfigError(
                f"method.energy_start={self.energy_start}: expected at most method.energy_end={self.energy_end}; "
                "lower it"
            )

    def energy(self, t: int, rounds: int) -> Tensor:
        """E(t)."""
        return _scalar(self.energy_start + (self.energy_end - self.energy_start) * min(1.0, t / rounds))

    def reply_schema(self, task: Task, down: Knowledge) -> Schema:
        """Singular vectors and values of each matrix; the rest (biases, norms) as it is."""
        schema: dict[str, tuple[tuple[int | str, ...], torch.dtype]] = {}
        for name, p in mentee_of(task, down).net.named_parameters():
            if p.dim() < 2:
                schema[name] = tuple(p.shape), p.dtype
            else:
                schema[f"{name}/u"] = (len(p), f"rank of {name}"), p.dtype
                schema[f"{name}/s"] = (f"rank of {name}",), p.dtype
                schema[f"{name}/v"] = (f"rank of {name}", p[0].numel()), p.dtype
        return schema

    def server_init(self, task: Task, seed: int) -> Params:
        """The mentee; nobody has it yet."""
        mentee = nest(f"full/{task.model.name}", task.initial(task.model, seed))
        return {**mentee, "answered": torch.empty(0, dtype=torch.int64)}

    def personal_init(self, task: Task, seed: int, client: int) -> Params:
        """The mentor."""
        return nest("mentor", task.initial(task.model, seed, client + 1))

    def send(self, task: Task, server: Params, t: int, to: Peer) -> Knowledge:
        """The last step for those who have the mentee it starts from, the mentee for the others."""
        kind = "step/" if to.client in server["answered"].tolist() else "full/"
        told = {name: value for name, value in server.items() if name.startswith(kind)}
        return Knowledge({**told, "energy": self.energy(t, task.rounds)})

    def client_update(self, task: Task, client: Client, down: Knowledge) -> tuple[Params, Knowledge]:
        """Adaptive mutual distillation; the mentor stays, the mentee's update is sent."""
        model, told = mentee_of(task, down), dict(down.tensors)
        start = pick(f"full/{model.name}", told)
        if not start:
            before = pick("mentee", client.personal)
            if not before:
                raise SchemaError(
                    "expected a mentee at home to take the step from, got none; next time it comes in full"
                )
            start = stepped(model, before, pick(f"step/{model.name}", told))
        mentor, mentee = pick("mentor", client.personal), start
        mentor, mentee = mutual(task, client, model, mentor, mentee)
        update = {name: mentee[name] - start[name] for name in start}
        said = Knowledge(packed(update, told["energy"]), size(client))
        return {**nest("mentor", mentor), **nest("mentee", start)}, said  # the next step starts where this one did

    def aggregate(self, task: Task, server: Params, pool: Pool, t: int, rng: np.random.Generator) -> Params:
        """The mean of the updates, compressed; the mentee moves as the clients' copies will."""
        model, where = task.model, task.model.name
        updates = [Knowledge(unpacked(model, a.knowledge.tensors), a.knowledge.weight) for a in pool.each]
        step = packed(dict(learn.mean(updates).tensors), self.energy(t, task.rounds))
        mentee = stepped(model, pick(f"full/{where}", server), step)
        answered = torch.tensor([a.peer.client for a in pool.each], dtype=torch.int64)
        return {**nest(f"full/{where}", mentee), **nest(f"step/{where}", step), "answered": answered}

    def judged(self, down: Knowledge, personal: Params) -> Params:
        """Every client is scored on its mentor."""
        return pick("mentor", personal)

    def student(self, task: Task, server: Params) -> Params | None:
        """The mentee."""
        return pick(f"full/{task.model.name}", server)


def mutual(task: Task, client: Client, model: Model, mentor: Params, mentee: Params) -> tuple[Params, Params]:
    """Train both on the client's records: CE + (KL + MSE of features) / (CE_mentor + CE_mentee), each way."""
    depths = len(task.model.blocks) - 1, len(model.blocks) - 1
    learnt = bool(task.model.under(depths[0]) and model.under(depths[1]))  # else the features are the inputs

    def objective(p: Params, row: Tensor) -> Tensor:
        index = row.clamp(min=0)
        x, y = client.x[index], client.y[index]
        a, b = pick("mentor", p), pick("mentee", p)
        h_a, h_b = task.model.features(a, x, depths[0]), model.features(b, x, depths[1])
        z_a, z_b = task.model.head(a, h_a, depths[0]), model.head(b, h_b, depths[1])
        right = learn.masked_mean(cross_entropy(z_a, y), row) + learn.masked_mean(cross_entropy(z_b, y), row)
        apart = kl(1.0)(z_a, z_b.detach()) + kl(1.0)(z_b, z_a.detach())
        if learnt and h_a.shape == h_b.shape:
            apart = apart + distance(h_a, h_b.detach()) + distance(h_b, h_a.detach())
        return right + learn.masked_mean(apart, row) / right.detach().clamp(min=FLOOR)

    both = learn.descend({**nest("mentor", mentor), **nest("mentee", mentee)}, client.order, objective, task.optimizer)
    return pick("mentor", both), pick("mentee", both)


def distance(h: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference (b,) of features."""
    return (h - target).square().flatten(1).mean(1)


def packed(update: Params, energy: Tensor) -> Params:
    """Each matrix as the singular vectors and values that hold more than ``energy`` of it."""
    out: Params = {}
    for name, value in update.items():
        if value.dim() < 2:
            out[name] = value
            continue
        u, s, v = torch.linalg.svd(value.flatten(1), full_matrices=False)
        r = rank(s, energy)
        out |= {f"{name}/u": u[:, :r].contiguous(), f"{name}/s": s[:r].clone(), f"{name}/v": v[:r].contiguous()}
    return out


def rank(s: Tensor, energy: Tensor) -> int:
    """The smallest number of singular values that hold more than ``energy`` of the energy; at least 1, at most all."""
    held = s.double().square().cumsum(0)
    short = (held <= energy.double() * held[-1]) & (held[-1] > 0)
    return min(int(short.sum()) + 1, len(s))


def unpacked(model: Model, said: Mapping[str, Tensor]) -> Params:
    """Undo `packed`, up to what it dropped."""
    return {
        name: said[name]
        if name in said
        else ((said[f"{name}/u"] * said[f"{name}/s"]) @ said[f"{name}/v"]).reshape(p.shape)
        for name, p in model.net.named_parameters()
    }


def stepped(model: Model, mentee: Params, step: Params) -> Params:
    """The mentee after a compressed step, for server and clients alike."""
    return {name: mentee[name] + value for name, value in unpacked(model, step).items()}


def mentee_of(task: Task, down: Knowledge) -> Model:
    """The mentee's architecture, by the name that its parameters travel under."""
    return task.models[next(name for name in down.tensors if "/" in name).split("/")[1]]


@cache
def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)  # one for all clients, so that a broadcast is packed once
