"""One teacher with known errors, one pool, one student: what each query strategy makes of a growing budget.

The method's own server half runs round by round; only the clients are replaced, by a teacher whose errors are planted,
so that which answers are wrong is known.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot, softmax

from fedkd import learn, seeds
from fedkd.config import Config
from fedkd.data.planted import wrong_teacher
from fedkd.federation import Federation, build
from fedkd.knowledge import Knowledge, Params, pick
from fedkd.losses import cross_entropy
from fedkd.method import Peer
from fedkd.metrics import accuracy
from fedkd.optim import Adam
from fedkd.query.rad import gain
from privacy.gate import Pool, Released
from privacy.mechanism import Mechanism
from strategies.rad import RAD, asked_about

TEACHERS = ("natural", "random 0.05", "random 0.1", "random 0.3", "hardest 0.05", "hardest 0.1", "hardest 0.3")
SURE = 4.0  # logit of the class that a planted teacher names
TAUGHT = 300  # images that a natural teacher has learnt from


@dataclass(frozen=True)
class Scene:
    """A seed's data, and one teacher's answers about all of its pool.

    Attributes:
        federation: Data and models; its clients take no part.
        answers: Logits (m, K) of the teacher.
        truth: True classes (m,) of the pool.
        model: Parameters of the teacher where it is a model; None where its answers are planted.
    """

    federation: Federation
    answers: Tensor
    truth: Tensor
    model: Params | None

    def answer(self, questions: Params) -> Tensor:
        """Logits (b, K) of what is asked. Of a blend of images, a planted teacher's are the blend of its answers."""
        if "partner" not in questions:
            return self.answers[questions["index"]]
        task = self.federation.server_task
        if self.model is not None:
            return task.model.logits(self.model, asked_about(task, questions))
        share, p = questions["share"][:, None], softmax(self.answers, 1)
        return ((1 - share) * p[questions["index"]] + share * p[questions["partner"]]).log()

    @property
    def wrong(self) -> Tensor:
        """Which answers are (m,)."""
        return self.answers.argmax(1) != self.truth


def config(seed: int, strategy: str, error_rate: float, data: dict[str, Any], method: dict[str, Any]) -> Config:
    """A run of `RAD` with a given strategy and error rate."""
    raw = {"name": "rad", "selection": strategy, "error_rate": error_rate, "aggregation": "mean_logits", **method}
    return Config.from_raw(
        {
            "seed": seed,
            "data": data,
            "federation": {"clients": 1, "rounds": method.get("rounds", 10)},
            "model": {"name": "mlp"},
            "method": {key: value for key, value in raw.items() if key != "rounds"},
        }
    )


@lru_cache(maxsize=1)
def _data(
    seed: int, data: tuple[tuple[str, Any], ...], method: tuple[tuple[str, Any], ...]
) -> tuple[Federation, Params]:
    """The federation, and a teacher that has learnt a part of the client's images."""
    federation = build(config(seed, "uniform", 0.0, dict(data), dict(method)))
    task, (x, y) = federation.server_task, federation.train_set(0)
    rng = seeds.generator(seed, "natural teacher")
    part = torch.from_numpy(rng.permutation(len(y))[:TAUGHT])
    order = learn.batches(rng, len(part), 32, 30)
    start = task.model.init(seed, client=1)
    return federation, learn.imitate(task.model, start, x[part], y[part], order, cross_entropy, Adam(1e-3))


def scene(seed: int, teacher: str, data: dict[str, Any], method: dict[str, Any]) -> Scene:
    """A seed with one of `TEACHERS`.

    A planted teacher names the true class except in the given share of cases: at random, or where the natural teacher's
    margins are smallest.
    """
    federation, natural = _data(seed, tuple(data.items()), tuple(method.items()))
    task, truth = federation.server_task, torch.from_numpy(federation.dataset.y[federation.public_index])
    logits = task.model.logits(natural, task.public_x)
    if teacher == "natural":
        return Scene(federation, logits, truth, natural)
    kind, rate = teacher.split()
    margin = 1 - gain(softmax(logits.double(), 1).numpy())
    sure = SURE * one_hot(truth, task.num_classes).numpy().astype(np.float32)
    rng = seeds.generator(seed, f"planted {teacher}")
    planted, _ = wrong_teacher(sure, float(rate), "random" if kind == "random" else "hardest", rng, margin)
    return Scene(federation, torch.from_numpy(planted), truth, None)


def rounds(seen: Scene, run: Config) -> Iterator[dict[str, float]]:
    """The student after each batch of questions: its accuracy, and what was asked."""
    federation, method = seen.federation, run.method
    if not isinstance(method, RAD):
        raise TypeError(f"expected RAD, got {run.method_name}")
    task = federation.server_task
    server = method.server_init(task, run.seed)
    for t in range(1, run.federation.rounds + 1):
        questions = pick("question", server)
        probs = softmax(task.model.logits(pick("student", server), task.public_x).double(), 1).numpy()
        said = Released(Peer(0, task.model.name), t, Knowledge({"logits": seen.answer(questions)}), ())
        pool = Pool([said], Mechanism(), seeds.generator(run.seed, "nothing"))
        server = method.aggregate(task, server, pool, t, seeds.generator(run.seed, "server", t))
        student = method.student(task, server) or {}
        yield {
            "asked": len(server["answered/index"]),
            "accuracy": accuracy(task.model, student, federation.test_x, federation.test_y),
            "wrong": float(seen.wrong[server["answered/index"]].float().mean()),
            "gain": float(gain(probs)[questions["index"].numpy()].mean()),
        }
