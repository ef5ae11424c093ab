"""FedProto: Federated Prototype Learning across Heterogeneous Clients.

Tan, Long, Liu, Zhou, Lu, Jiang, Zhang; AAAI 2022; arXiv:2105.00243, Algorithm 1. Evidence: official-code
(yuetan031/FedProto).
Decided here: a prototype is the mean input of the head over a client's records of a class, taken after local training
(the released code: over the last epoch's minibatches); the pull is the squared distance averaged over the features, as
in the released code, and absent for classes that have no prototype. ``weighting = "counts"`` is the paper's mean over
owners by number of records, ``"uniform"`` the released code's. Clients send sums and weights per class, which say the
same as means and make the server's part a ratio of two plain means. A class nobody held this round keeps its
prototype. All K rows travel; a class that a client lacks is a row of zeros, not a missing key.
Clients are scored with their own head, which keeps them comparable with other methods;
``inference = "prototype"`` is the paper's nearest prototype, as the linear head that decides the same:
argmin |h - C_y|^2 = argmax 2 h.C_y - |C_y|^2. Architectures may differ where their heads' inputs are of one width.
On digits (dirichlet 0.3, mlp) scoring by head did not beat staying alone, and a strong pull cost accuracy.
What ``linear``'s head reads is the record itself, which no pull moves: it is refused but for nearest prototypes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedkd.errors import ConfigError
from fedkd.knowledge import Knowledge, Params, Schema
from fedkd.losses import cross_entropy
from fedkd.method import Evidence, Method, Peer, Pool
from fedkd.models import Model, feature_shape, with_features
from fedkd.task import Client, Task

HEAD = ("head.weight", "head.bias")
NEVER = -1e9  # logit of a class without a prototype


class FedProto(Method):
    """Clients exchange one mean feature per class and keep their features near those of all."""

    evidence: ClassVar[Evidence] = "official-code"
    sends = "prototypes"

    lam: float = Field(1.0, ge=0, description="weight of the pull to the global prototypes")
    weighting: Literal["counts", "uniform"] = Field("counts", description="mean over the owners of a class")
    inference: Literal["head", "prototype"] = Field("head", description="how clients are scored")

    def check(self, tasks: Mapping[str, Task], held: np.ndarray) -> None:
        """Features that the pull can move, of one width; for nearest prototypes, a linear head to put them in."""
        for name, task in tasks.items():
            if self.inference == "head" and not task.model.under(len(task.model.blocks) - 1):
                raise ConfigError(
                    f"fedproto: expected parameters below the head, '{name}' has none: it would train alone; choose "
                    "another model, or method.inference=prototype"
                )
        widths = {name: width(task) for name, task in tasks.items()}
        if len(set(widths.values())) > 1:
            got = ", ".join(f"{name} {size}" for name, size in widths.items())
            raise ConfigError(
                f"fedproto: expected heads with inputs of one width, got {got}; choose client models of one width"
            )
        for name, task in tasks.items():
            head = {HEAD[0]: (task.num_classes, widths[name]), HEAD[1]: (task.num_classes,)}
            got_head = {key: shape for key, (shape, _) in task.model.schema.items() if key in _head(task.model)}
            if self.inference == "prototype" and got_head != head:
                raise ConfigError(
                    f"method.inference=prototype: expected a linear head {head}, '{name}' has {got_head}; "
                    "use method.inference=head"
                )

    def answers_sums(self) -> bool:
        """Unless every owner of a class is to weigh the same, which is a function of the sums."""
        return self.weighting == "counts"

    def reads_records(self) -> bool:
        """As `answers_sums`."""
        return not self.answers_sums()

    def summed(self, task: Task, down: Knowledge) -> Callable[[Params, Tensor], Tensor]:
        """What the head reads."""
        return partial(task.model.features, depth=len(task.model.blocks) - 1)

    def reply_schema(self, task: Task, down: Knowledge) -> Schema:
        """Weighted sums of features per class (K, d), and the weights."""
        k = task.num_classes
        return {"sums": ((k, width(task)), torch.float32), "counts": ((k,), torch.float32)}

    def server_init(self, task: Task, seed: int) -> Params:
        """No prototypes yet."""
        return {}

    def send(self, task: Task, server: Params, t: int, to: Peer) -> Knowledge:
        """The global prototypes, and the weight behind each: 0 where there is none yet."""
        return Knowledge(server)

    def client_update(self, task: Task, client: Client, down: Knowledge) -> tuple[Params, Knowledge]:
        """LocalUpdate: minimise CE + lam |h(x) - C_y|^2, then compute one's own prototypes."""
        model, depth = task.model, len(task.model.blocks) - 1
        told = down.tensors

        def pulled(out: Tensor, y: Tensor) -> Tensor:
            y, h = y.clamp(min=0), out[:, : -task.num_classes]
            pull: Tensor = (told["weights"][y] > 0) * (h - told["prototypes"][y]).square().mean(-1)
            return cross_entropy(out[:, -task.num_classes :], y) + self.lam * pull

        if "prototypes" in told:
            w = task.fit(replace(task, model=with_features(model, depth)), client.personal, client, loss=pulled)
        else:
            w = task.fit(task, client.personal, client)
        sums, counts = task.sums(task, w, client, self.summed(task, down))
        if self.weighting == "uniform":
            sums, counts = sums / counts.clamp(min=1)[:, None], counts.clamp(max=1)
        return w, Knowledge({"sums": sums, "counts": counts})

    def aggregate(self, task: Task, server: Params, pool: Pool, t: int, rng: np.random.Generator) -> Params:
        """C_y: the mean over the owners of class y; as it was where there are none."""
        sums, weights = pool.mean.tensors["sums"], pool.mean.tensors["counts"]
        held = weights > 0
        old = server or {"prototypes": torch.zeros_like(sums), "weights": torch.zeros_like(weights)}
        means = sums / torch.where(held, weights, 1.0)[:, None]
        return {
            "prototypes": torch.where(held[:, None], means, old["prototypes"]),
            "weights": torch.where(held, weights, old["weights"]),
        }

    def judged(self, down: Knowledge, personal: Params) -> Params:
        """The client's model; its head decides by the nearest prototype where that is asked for."""
        if self.inference == "head" or "prototypes" not in down.tensors:
            return personal
        c, held = down.tensors["prototypes"], down.tensors["weights"] > 0
        bias = torch.where(held, -c.square().sum(1), NEVER)
        return {**personal, HEAD[0]: 2 * c, HEAD[1]: bias}


def width(task: Task) -> int:
    """Numbers in the input of the head."""
    return math.prod(feature_shape(task.model, len(task.model.blocks) - 1, task.input_shape))


def _head(model: Model) -> set[str]:
    return set(model.schema) - set(model.under(len(model.blocks) - 1))
