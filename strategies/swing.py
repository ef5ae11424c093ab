"""Swing distillation: a privacy-preserving knowledge distillation framework.

Li et al., 2022; arXiv:2212.08349. Evidence: reconstruction. Known from the abstract: each token gets a temperature that
grows with the likelihood that it is private, and noise is injected into the soft targets. The formulas, the range of
temperatures, the noise and where the likelihood comes from are ours. So is the federation: a client's teacher learns
from the private text and stays at home, a student learns from the teacher on that text and leaves; the server averages
students. On images a token is a picture.

**What it does not promise.** It is no differentially private mechanism: the temperature depends on private data, and
so does whoever noticed that a token is private. A token that the score misses is taught as in plain distillation. The
argument for it is measured exposure, never an epsilon; and dropping the private positions from the loss
(``hard_label_on_private=drop``) is the simple rule that it has to beat.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy as nll
from torch.nn.functional import log_softmax, softmax

from fedkd import learn
from fedkd.data import private
from fedkd.data.private import PATTERNS
from fedkd.data.vocabulary import Vocabulary
from fedkd.errors import ConfigError
from fedkd.knowledge import Knowledge, Params, Schema
from fedkd.method import Evidence, Method, Peer, Pool, architecture, size
from fedkd.models import Model
from fedkd.task import Client, Records, Task

Score = Literal["none", "oracle", "marks", "regex", "pii", "rarity", "surprisal", "memorisation"]
TAUGHT = ("surprisal", "memorisation")
"""Scores that need models: they are made anew in each round."""


class Tempered(Method):
    """Soft targets whose temperature and noise follow a score s in [0, 1] of each token."""

    evidence: ClassVar[Evidence] = "reconstruction"
    text: ClassVar[bool] = True

    t_low: float = Field(2.0, description="temperature where nothing is private")
    t_high: float = Field(20.0, description="temperature where all is private")
    gamma: float = Field(1.0, gt=0, description="exponent of the score; above 1 a doubtful score heats less")
    noise: Literal["gaussian", "laplace", "none"] = Field("gaussian", description="noise on the soft targets")
    sigma: float = Field(0.1, ge=0, description="its standard deviation, on probabilities")
    noise_on: Literal["private", "all"] = Field("private", description="times the score, or everywhere alike")
    score: Score = Field("regex", description="who says how private a token is; see docs/text.md")
    patterns: list[str] = Field(list(PATTERNS), description="regular expressions of score 'regex'")
    recall: float = Field(1.0, ge=0, le=1, description="share of what the score found that it keeps; for experiments")
    missed: Literal["copies", "secrets"] = Field("copies", description="what is lost one by one, if recall is below 1")

    def check(self, tasks: Mapping[str, Task], held: np.ndarray) -> None:
        """Temperatures in order, and a score that fits the data."""
        if not 0 < self.t_low <= self.t_high < math.inf:
            raise ConfigError(
                f"method.t_low={self.t_low:g}, method.t_high={self.t_high:g}: expected 0 < t_low <= t_high; "
                "a private token needs at least the temperature of the others"
            )
        if self.recall < 1 and self.score in ("none", *TAUGHT):
            raise ConfigError(f"method.recall={self.recall:g}: score '{self.score}' finds no tokens to miss; remove it")
        if self.score in ("regex", "pii"):
            for task in tasks.values():
                self._read_by(task)

    def notes(self, task: Task, records: Records, rng: np.random.Generator) -> dict[str, Tensor]:
        """s, wherever it depends on the records alone."""
        if self.score in ("none", *TAUGHT):
            return {}
        found = private.check_scores(self._found(task, records), tuple(records.y.shape))
        if self.recall < 1:
            found = private.missed(found, self.recall, rng, self.missed, records.y.cpu().numpy())
        return {"scores": torch.from_numpy(found)}

    def _found(self, task: Task, records: Records) -> np.ndarray:
        y = records.y.cpu().numpy()
        if self.score == "oracle":
            return records.planted.cpu().numpy().astype(np.float32)
        if self.score == "marks":
            if records.marks is None:
                raise ConfigError(
                    "method.score=marks: the data mark nothing as private; give spans in a .jsonl, 'private' in an .npz"
                )
            return records.marks.cpu().numpy()
        if self.score == "rarity":
            return private.class_rarity(y, task.num_classes) if y.ndim == 1 else private.rarity(y, task.num_classes)
        spans = private.spans_by_pii if self.score == "pii" else private.regex(self.patterns)
        return private.of_records(self._read_by(task), records.x.cpu().numpy(), y, spans)

    def _read_by(self, task: Task) -> Vocabulary:
        """What a score that reads text needs."""
        if task.vocabulary is None:
            raise ConfigError(f"method.score={self.score}: reads text, and the data are images; use rarity or oracle")
        return task.vocabulary

    def adds_noise(self) -> bool:
        """Unless there is none."""
        return self.noise != "none" and self.sigma > 0

    def temperatures(self, s: Tensor) -> Tensor:
        """T = T_lo + (T_hi - T_lo) s^gamma, shaped as ``s``."""
        return self.t_low + (self.t_high - self.t_low) * s**self.gamma

    def soft_targets(self, z: Tensor, t: Tensor, s: Tensor, eta: Tensor | None) -> Tensor:
        """Return q = Pi(softmax(z / T) + s eta), with Pi: clip to >= 0 and renormalise.

        Args:
            z: The teacher's logits (..., K).
            t: Temperatures (...).
            s: Scores (...).
            eta: Noise (..., K), or None.
        """
        q = softmax(z / t[..., None], -1)
        return q if eta is None else project(q + (eta if self.noise_on == "all" else s[..., None] * eta))

    def eta(self, rng: np.random.Generator, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Noise of standard deviation ``sigma``, by name; nothing where there is none."""
        if not self.adds_noise():
            return {}
        if self.noise == "gaussian":
            drawn = rng.standard_normal(shape, dtype=np.float32) * self.sigma
        else:
            drawn = rng.laplace(scale=self.sigma / math.sqrt(2), size=shape)
        return {"noise": torch.from_numpy(drawn.astype(np.float32))}


class Swing(Tempered):
    """Clients' teachers stay at home; students taught at private temperatures leave and are averaged."""

    sends = "params"
    answers_parameters: ClassVar[bool] = True

    distil_epochs: int = Field(1, ge=0, description="the student's epochs a round; 'epochs' are the teacher's")
    beta: float = Field(0.5, ge=0, le=1, description="weight of the teacher in the student's loss; rest: hard labels")
    t2_scaling: Literal["base", "per_sample", "none"] = Field(
        "base", description="g(T): T_lo^2, T^2, which undoes the protection, or 1"
    )
    hard_label_on_private: Literal["mask", "keep", "drop"] = Field(
        "mask", description="where s >= threshold: no hard label, all the same, or nothing is learnt there at all"
    )
    threshold: float = Field(0.5, gt=0, le=1, description="score from which on a token counts as private")

    def reads_records(self) -> bool:
        """It learns from private records by losses of its own."""
        return True

    def draws(self, rng: np.random.Generator, task: Task, records: int) -> dict[str, Tensor]:
        """The student's minibatches, and eta."""
        order = learn.batches(rng, records, self.batch, self.distil_epochs)
        return {"order": order, **self.eta(rng, (records, *task.answer_shape))}

    def reply_schema(self, task: Task, down: Knowledge) -> Schema:
        """The student, as it came."""
        return {name: (tuple(value.shape), value.dtype) for name, value in down.tensors.items()}

    def server_init(self, task: Task, seed: int) -> Params:
        """The student; weights that clients start from are the teachers'."""
        return task.model.init(seed)

    def send(self, task: Task, server: Params, t: int, to: Peer) -> Knowledge:
        """The student."""
        return Knowledge(server)

    def client_update(self, task: Task, client: Client, down: Knowledge) -> tuple[Params, Knowledge]:
        """The teacher learns from the private records, and teaches the student on them."""
        teacher, student = task.fit(task, client.personal, client), dict(down.tensors)  # the teacher stays
        model, x, y = architecture(task, down), client.x, client.y
        z = task.model.logits(teacher, x)
        s = self.scores(z, y, client, model, student)
        t = self.temperatures(s)
        q = self.soft_targets(z, t, s, client.draws.get("method/noise"))

        def objective(p: Params, row: Tensor) -> Tensor:
            i = row.clamp(min=0)
            return learn.masked_mean(self.loss(model.apply(p, x[i]), q[i], t[i], s[i], y[i]), row)

        student = learn.descend(student, client.draws["method/order"], objective, task.optimizer)
        return teacher, Knowledge(student, size(client))

    def scores(self, z: Tensor, y: Tensor, client: Client, model: Model, student: Params) -> Tensor:
        """s, shaped as ``y``: what was noted, or what teacher and student make of the true token."""
        if self.score == "none":
            return torch.zeros(y.shape, dtype=z.dtype, device=z.device)
        if self.score not in TAUGHT:
            return client.notes["scores"]
        true = y.clamp(min=0)[..., None]
        said = log_softmax(z, -1).gather(-1, true)[..., 0]
        if self.score == "surprisal":  # of the teacher, 1 at a uniform guess
            found = -said / math.log(z.shape[-1])
        else:  # "memorisation": what the teacher knows and the federation's student does not
            found = said.exp() - softmax(model.logits(student, client.x), -1).gather(-1, true)[..., 0]
        return found.clamp(0, 1)

    def loss(self, student: Tensor, q: Tensor, t: Tensor, s: Tensor, y: Tensor) -> Tensor:
        """(1 - beta) CE(y, p) + beta g(T) KL(q || softmax(z_S / T)): one value (b,) a record, a mean over its tokens.

        Args:
            student: Logits (b, K) or (b, L, K).
            q: Soft targets, so shaped too.
            t: Temperatures (b,) or (b, L).
            s: Scores, so shaped too.
            y: True classes or tokens, so shaped too; -1 for none.
        """
        kept = y >= 0 if self.hard_label_on_private == "keep" else (y >= 0) & (s < self.threshold)
        taught = kept if self.hard_label_on_private == "drop" else y >= 0
        scale: dict[str, Tensor | float] = {"base": self.t_low**2, "per_sample": t**2, "none": 1.0}
        g = scale[self.t2_scaling]
        kl = (torch.xlogy(q, q) - q * log_softmax(student / t[..., None], -1)).sum(-1)
        values = self.beta * g * torch.where(taught, kl, 0.0)
        if self.beta < 1:
            hard = nll(student.flatten(0, -2), y.flatten().clamp(min=0), reduction="none").view(y.shape)
            values = values + (1 - self.beta) * torch.where(kept, hard, 0.0)
        if y.dim() == 1:
            return values
        return values.sum(-1) / taught.sum(-1).clamp(min=1)

    def aggregate(self, task: Task, server: Params, pool: Pool, t: int, rng: np.random.Generator) -> Params:
        """The mean of the students, weighted by how many tokens each saw."""
        return dict(pool.mean.tensors)

    def whole(self, task: Task, down: Knowledge, said: Params) -> tuple[Model, Params] | None:
        """The student."""
        return architecture(task, down), said

    def student(self, task: Task, server: Params) -> Params | None:
        """The mean of the students."""
        return server


def project(q: Tensor) -> Tensor:
    """Clip (..., K) to >= 0 and divide by the sum; uniform where nothing is left."""
    clipped = torch.nan_to_num(q).clamp(min=0)
    total = clipped.sum(-1, keepdim=True)
    return torch.where(total > 0, clipped / total.clamp(min=torch.finfo(q.dtype).tiny), 1 / q.shape[-1])
