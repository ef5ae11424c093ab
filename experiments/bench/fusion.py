"""FedDF's server step beside the training of its student alone: what the ensemble costs on top."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.bench.spec import Open, Step, timed
from fedkd import learn, seeds
from fedkd.config import Config
from fedkd.federation import Federation, build
from fedkd.knowledge import Knowledge, Params
from fedkd.losses import kl
from fedkd.method import Peer
from fedkd.optim import Adam
from privacy import mechanisms
from privacy.gate import Pool, Released
from strategies.feddf import FedDF

Made = Callable[[], Config]


@dataclass(frozen=True)
class _Scene:
    """A round's end: what the server has, and what each client answered."""

    federation: Federation
    method: FedDF
    server: Params
    pool: Pool

    @classmethod
    def of(cls, config: Config) -> _Scene:
        federation = build(config)
        method = config.method
        if not isinstance(method, FedDF):
            raise TypeError(f"expected FedDF, got {config.method_name}")
        task, mechanism = federation.server_task, mechanisms.build(federation)
        answers = [
            Released(Peer(k, task.model.name), 1, Knowledge(task.model.init(config.seed, k + 1)), ())
            for k in range(config.federation.cohort_size())
        ]
        pool = Pool(answers, mechanism, seeds.generator(config.seed, "server noise", 1))
        return cls(federation, method, method.server_init(task, config.seed), pool)

    def step(self) -> Callable[[], Params]:
        """The server's step."""
        task = self.federation.server_task
        return lambda: self.method.aggregate(
            task, self.server, self.pool, 1, seeds.generator(self.federation.config.seed, "server", 1)
        )

    def student(self) -> Callable[[], Params]:
        """The training of the student in that step, given the ensemble."""
        method, task, x = self.method, self.federation.server_task, self.federation.public_x
        start = dict(learn.mean([answer.knowledge for answer in self.pool.each]).tensors)
        votes = [task.model.logits(dict(answer.knowledge.tensors), x) for answer in self.pool.each]
        ensemble: Tensor = torch.stack(votes).mean(0)
        rng = seeds.generator(self.federation.config.seed, "server", 1)
        order = learn.batches(rng, len(x), method.public_batch, method.fusion_epochs)
        loss, adam = kl(method.temperature), Adam(method.fusion_lr)
        return lambda: learn.imitate(task.model, start, x, ensemble, order, loss, adam)


def server_step(made: Made) -> Open:
    """The whole server step."""

    @contextmanager
    def opened() -> Iterator[Step]:
        yield timed(_Scene.of(made()).step())

    return opened


def student_alone(made: Made) -> Open:
    """The student's training alone."""

    @contextmanager
    def opened() -> Iterator[Step]:
        yield timed(_Scene.of(made()).student())

    return opened
