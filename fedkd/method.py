"""A method: one paper, both halves of its algorithm box, and its hyper-parameters."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from fedkd import learn
from fedkd.errors import ConfigError
from fedkd.knowledge import Knowledge, Params, Schema
from fedkd.models import Model
from fedkd.optim import Adam, Optimizer, Sgd
from fedkd.task import Client, Records, Task

Evidence = Literal["official-code", "proved", "paper", "reconstruction", "baseline"]


@dataclass(frozen=True)
class Peer:
    """Whom a message is for, or from.

    Attributes:
        client: Client id, from 0.
        model: Name of the client's architecture.
    """

    client: int
    model: str


class Answer(Protocol):
    """One client's released message, as a server half sees it."""

    @property
    def peer(self) -> Peer:
        """Who sent it."""
        ...

    @property
    def knowledge(self) -> Knowledge:
        """What was sent."""
        ...


class Pool(Protocol):
    """What a server half may read of one round's answers, in client order."""

    @property
    def mean(self) -> Knowledge:
        """Weighted mean; uniform and noised when trust ends at the server."""
        ...

    @property
    def each(self) -> Sequence[Answer]:
        """Every single answer. Raises `PrivacyError` when trust ends at the server."""
        ...


class Method(BaseModel):
    """Base class of methods. A method's fields are its hyper-parameters, its attributes what it needs and sends.

    ``client_update`` is written for one client and must be a pure function of tensors: whatever runs it (a loop, a
    worker process, vmap, a real Flower client) is not its business. It may learn from private records through
    ``task.fit`` and sum them up by ``task.sums`` only; `reads_records` says so where a method cannot keep to that.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    evidence: ClassVar[Evidence]
    sends: ClassVar[Literal["nothing", "logits", "params", "features", "prototypes"]]
    needs_public: ClassVar[bool] = False
    needs_each: ClassVar[bool] = False
    same_model: ClassVar[bool] = False
    reads_labelled: ClassVar[bool] = False
    clients_choose: ClassVar[bool] = False  # whether a message says which public inputs a client's model chose
    answers_parameters: ClassVar[bool] = False  # whether an answer is the parameters that came down, trained
    text: ClassVar[bool] = False  # whether it works on text, where a model gives one answer for each position
    beyond_vmap: ClassVar[str | None] = None  # why clients cannot be stacked, where they cannot
    tolerance: ClassVar[float] = 1e-5  # of the vectorised engine's answer, relative, in float32 without chaotic steps

    optimizer: Literal["adam", "sgd"] = Field("adam", description="update rule of the clients' own training")
    lr: float = Field(1e-3, gt=0, description="learning rate")
    momentum: float = Field(0.0, ge=0, lt=1, description="heavy-ball momentum (sgd only)")
    batch: int = Field(32, ge=1, description="minibatch size")
    epochs: int = Field(1, ge=0, description="local epochs a round")

    def descent(self) -> Optimizer:
        """The optimiser of local training; its state starts anew each round."""
        return Adam(self.lr) if self.optimizer == "adam" else Sgd(self.lr, self.momentum)

    def public_order(self, rng: np.random.Generator, m: int) -> torch.Tensor:
        """A client's minibatches of the ``m`` public inputs in one round (steps, b); none by default."""
        return learn.batches(rng, m, 1, 0)

    def draws(self, rng: np.random.Generator, task: Task, records: int) -> Mapping[str, torch.Tensor]:
        """What else a client draws in one round, by name: ``client.draws["method/NAME"]``; nothing by default."""
        return {}

    def notes(self, task: Task, records: Records, rng: np.random.Generator) -> Mapping[str, torch.Tensor]:
        """What to note about records before round 1, by name (n, ...): once for each client's own, which become
        ``client.notes``, and once for the public inputs, ``task.public_notes``; nothing by default.
        """
        return {}

    def rows(self, task: Task) -> int:
        """Rows of logits in one answer, where logits are sent: by default one for each public input, or token."""
        return math.prod((len(task.public_x), *task.answer_shape[:-1]))

    def row_norm(self) -> float:
        """The largest L2 norm that a row of ``logits`` can have by construction: 1 for probabilities; default none."""
        return math.inf

    def reads_records(self) -> bool:
        """Whether it reads private records by other ways than ``task.fit``, once a round, and ``task.sums``."""
        return False

    def answers_sums(self) -> bool:
        """Whether an answer is what ``task.sums`` returned, ``{"sums": (K, d), "counts": (K,)}``, and nothing else."""
        return False

    def summed(self, task: Task, down: Knowledge) -> Callable[[Params, torch.Tensor], torch.Tensor] | None:
        """What of a record is summed up by class, as a function of parameters and inputs (n, *shape) to rows (n, ...).

        None where an answer to ``down`` holds no sums.
        """
        return None

    def adds_noise(self) -> bool:
        """Whether answers carry noise of the method's own, which no ledger knows."""
        return False

    def check(self, tasks: Mapping[str, Task], held: np.ndarray) -> None:
        """Raise `ConfigError` for what cannot work, before round 1.

        Args:
            tasks: The task as seen with each client architecture, by its name.
            held: (K,) whether any client holds a training record of the class.
        """

    @abstractmethod
    def reply_schema(self, task: Task, down: Knowledge) -> Schema:
        """Tensors that a client with ``task.model`` answers to ``down``."""

    @abstractmethod
    def server_init(self, task: Task, seed: int) -> Params:
        """The server's state before round 1: a flat mapping of named tensors."""

    def personal_init(self, task: Task, seed: int, client: int) -> Params:
        """What a client holds at home before its first round: by default a model of its own."""
        return task.initial(task.model, seed, client + 1)

    @abstractmethod
    def send(self, task: Task, server: Params, t: int, to: Peer) -> Knowledge:
        """What the server tells one client in round ``t`` (from 1)."""

    @abstractmethod
    def client_update(self, task: Task, client: Client, down: Knowledge) -> tuple[Params, Knowledge]:
        """One client's round: (what stays at home, what it would say)."""

    @abstractmethod
    def aggregate(self, task: Task, server: Params, pool: Pool, t: int, rng: np.random.Generator) -> Params:
        """The server's half of round ``t``."""

    def judged(self, down: Knowledge, personal: Params) -> Params:
        """The parameters that a client is scored on, given what `send` gives it after the round."""
        return personal

    def whole(self, task: Task, down: Knowledge, said: Params) -> tuple[Model, Params] | None:
        """The model that an answer to ``down`` holds, for whoever wants to ask it about other inputs; None for none."""
        held = {name: said[name] for name in task.model.schema if name in said}
        return (task.model, held) if len(held) == len(task.model.schema) else None

    def student(self, task: Task, server: Params) -> Params | None:
        """Parameters of the server's own model, or None where the method has none."""
        return None

    def student_model(self, task: Task) -> Model:
        """The architecture of `student`: ``model.name``'s, unless a method builds its own."""
        return task.model


def logits_schema(task: Task) -> Schema:
    """Schema of one row of logits for each public input, or one for each of its tokens."""
    return {"logits": ((len(task.public_x), *task.answer_shape), torch.float32)}


def size(client: Client) -> torch.Tensor:
    """The client's number of records, or of text the tokens it learns to predict: the usual aggregation weight."""
    return (client.y >= 0).sum().to(torch.get_default_dtype())  # -1 is padding


def by_model(answers: Sequence[Answer]) -> Iterator[tuple[str, list[Knowledge]]]:
    """Group answers by architecture, names sorted, clients in order."""
    groups: dict[str, list[Knowledge]] = {}
    for answer in answers:
        groups.setdefault(answer.peer.model, []).append(answer.knowledge)
    yield from sorted(groups.items())


def architecture(task: Task, down: Knowledge) -> Model:
    """The architecture whose parameters a message holds; it has to differ from the others in them."""
    told = {name: tuple(value.shape) for name, value in down.tensors.items()}
    for model in task.models.values():
        if {name: shape for name, (shape, _) in model.schema.items()} == told:
            return model
    raise ConfigError(
        f"a message's parameters fit none of the architectures {', '.join(task.models)}; same model.name?"
    )
