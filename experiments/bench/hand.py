"""The reference: what a careful person writes by hand for one machine, one thread and one method, and nothing more."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, l1_loss, log_softmax

from experiments.bench.child import Answer, Child, Turns
from experiments.bench.data import CLASSES, Data
from experiments.bench.spec import Open, Step, timed
from fedkd import models, seeds

SHAPE = (1, 28, 28)


def network(model: str) -> nn.Module:
    """A module of an architecture, with the same first weights in every process."""
    from experiments.bench import methods

    if model == methods.MLP:
        net: nn.Module = methods.mlp(SHAPE, CLASSES)
    else:
        net = models.build(model, SHAPE, CLASSES).net
    weights = models.build(model, SHAPE, CLASSES).init(0)
    net.load_state_dict(weights)
    return net


def descend(net: nn.Module, x: Tensor, y: Tensor, lr: float, batch: int) -> None:
    """One epoch of SGD."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    for index in torch.split(torch.randperm(len(y)), batch):
        optimizer.zero_grad()
        cross_entropy(net(x[index]), y[index]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


class FedAvg:
    """FedAvg over clients that all fit in memory.

    Args:
        workers: Into how many parts a cohort is cut; this one does the ``part``-th.
    """

    def __init__(
        self, data: Data, cohort: int, model: str, lr: float, batch: int, seed: int, part: int = 0, workers: int = 1
    ) -> None:
        torch.set_num_threads(1)
        self.x, self.y = data.tensors()
        self.net = network(model)
        self.params: list[Tensor] = list(self.net.parameters())
        self.server = [p.detach().clone() for p in self.params]
        self.sums = [torch.zeros_like(p) for p in self.server]
        self.lr, self.batch = lr, batch
        self.cohort, self.part, self.workers = cohort, part, workers
        self.rng = seeds.generator(seed, "hand-written loop")

    def __call__(self) -> None:
        """One round: every client of the cohort from the server's weights, and the mean in place."""
        chosen: np.ndarray = self.rng.choice(len(self.x), self.cohort, replace=False)
        chosen = chosen[self.part :: self.workers]
        total = sum(len(self.y[client]) for client in chosen)
        torch._foreach_zero_(self.sums)
        for client in chosen:
            with torch.no_grad():
                torch._foreach_copy_(self.params, self.server)
            descend(self.net, self.x[client], self.y[client], self.lr, self.batch)
            with torch.no_grad():
                torch._foreach_add_(self.sums, self.params, alpha=len(self.y[client]) / total)
        torch._foreach_copy_(self.server, self.sums)


def fedavg(data: Data, **how: Any) -> Open:
    """The loop in this process."""

    @contextmanager
    def opened() -> Iterator[Step]:
        yield timed(FedAvg(data, **how))

    return opened


def free(data: Data, workers: int, **how: Any) -> Open:
    """Free processes that each do their part of the cohort, and exchange nothing: the floor for ``workers`` cores."""

    @contextmanager
    def opened() -> Iterator[Step]:
        spec = {"path": str(data.path), "clients": data.clients, "samples": data.samples, "workers": workers, **how}
        with ExitStack() as stack:
            target = "experiments.bench.hand:serve"
            children = [stack.enter_context(Child(target, {**spec, "part": part})) for part in range(workers)]
            for child in children:
                child.await_ready()

            def act() -> None:
                for child in children:
                    child.go()
                for child in children:
                    child.answer()

            yield timed(act)

    return opened


def serve(spec: Mapping[str, Any], turns: Turns) -> None:
    """A free process."""
    how = dict(spec)
    loop = FedAvg(Data(Path(how.pop("path")), how.pop("clients"), how.pop("samples")), **how)

    def act() -> Answer:
        start = time.perf_counter()
        loop()
        return {"seconds": time.perf_counter() - start}

    turns.serve(act)


class Distiller:
    """What the hand-written KD rounds share: clients, a public set, and Adam."""

    def __init__(self, data: Data, public: int, model: str, lr: float, batch: int, public_batch: int) -> None:
        torch.set_num_threads(1)
        self.x, self.y = data.tensors()
        self.public = data.public(public)
        self.model, self.lr, self.batch, self.public_batch = model, lr, batch, public_batch

    def revisit(self, net: nn.Module, client: int) -> None:
        """Train on the client's own images."""
        x, y = self.x[client], self.y[client]
        optimizer = torch.optim.Adam(net.parameters(), lr=self.lr)
        for index in torch.split(torch.randperm(len(y)), self.batch):
            optimizer.zero_grad()
            cross_entropy(net(x[index]), y[index]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    def imitate(self, net: nn.Module, teacher: Tensor, *, soft: bool, epochs: int = 1) -> None:
        """Approach a teacher's logits on the public set: by KL if ``soft``, else by L1."""
        optimizer = torch.optim.Adam(net.parameters(), lr=self.lr)
        target = log_softmax(teacher, -1)
        for _ in range(epochs):
            for index in torch.split(torch.randperm(len(teacher)), self.public_batch):
                optimizer.zero_grad()
                said = net(self.public[index])
                if soft:
                    loss = kl_div(log_softmax(said, -1), target[index], reduction="batchmean", log_target=True)
                else:
                    loss = l1_loss(said, teacher[index])
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()

    @torch.no_grad()
    def logits(self, net: nn.Module) -> Tensor:
        """Logits of the whole public set."""
        return torch.cat([net(part) for part in torch.split(self.public, 500)])


class FedMD(Distiller):
    """Digest, revisit, communicate; the mean of the logits."""

    def __init__(self, data: Data, **how: Any) -> None:
        super().__init__(data, **how)
        self.nets = [network(self.model) for _ in self.x]
        self.consensus: Tensor | None = None

    def __call__(self) -> None:
        """One round."""
        votes = []
        for client, net in enumerate(self.nets):
            if self.consensus is not None:
                self.imitate(net, self.consensus, soft=False)
            self.revisit(net, client)
            votes.append(self.logits(net))
        self.consensus = torch.stack(votes).mean(0)


class FedDF(Distiller):
    """Local training from the fused model, then the mean of the weights imitates the ensemble."""

    def __init__(self, data: Data, epochs: int, **how: Any) -> None:
        super().__init__(data, **how)
        self.epochs = epochs
        self.net = network(self.model)
        self.server = [p.detach().clone() for p in self.net.parameters()]

    def __call__(self) -> None:
        """One round."""
        params: list[Tensor] = list(self.net.parameters())
        sums = [torch.zeros_like(p) for p in self.server]
        votes = []
        for client in range(len(self.x)):
            with torch.no_grad():
                torch._foreach_copy_(params, self.server)
            self.revisit(self.net, client)
            votes.append(self.logits(self.net))
            with torch.no_grad():
                torch._foreach_add_(sums, params, alpha=1 / len(self.x))
        with torch.no_grad():
            torch._foreach_copy_(params, sums)
        self.imitate(self.net, torch.stack(votes).mean(0), soft=True, epochs=self.epochs)
        self.server = [p.detach().clone() for p in params]


def rounds(loop: type[FedMD] | type[FedDF], data: Data, **how: Any) -> Open:
    """Hand-written KD rounds in this process."""

    @contextmanager
    def opened() -> Iterator[Step]:
        yield timed(loop(data, **how))

    return opened
