"""What a client half is given: the task everybody knows, and one client's own tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from fedkd.data.vocabulary import Vocabulary
from fedkd.knowledge import Params
from fedkd.losses import Loss, cross_entropy

if TYPE_CHECKING:
    from fedkd.models import Model
    from fedkd.optim import Optimizer

Penalty = Callable[[Params], Tensor]
"""A scalar added to the loss that reads parameters only, never a record: FedProx's proximal term."""


class Client(NamedTuple):
    """All that one client sees in one round. Tensors only, so that clients can be stacked.

    Every random choice of the round is in here, drawn beforehand from (seed, purpose, round, client). In a stack,
    clients are padded to the largest: x with zeros, labels and minibatches (whole rows at the end too) with -1.

    Attributes:
        x: Inputs (n, *shape).
        y: Labels (n,) int64; -1 marks what is no record. Of text the next tokens (n, L), -1 where there is none.
        order: Minibatches (steps, b) int64 as indices into x; -1 pads.
        public_order: Minibatches (steps, b) int64 as indices into the public set; -1 pads.
        draws: Further randomness, by name, that a method or mechanism asked for.
        personal: What stays at home between rounds.
        notes: What the method noted about the client's records before round 1, by name (n, ...).
    """

    x: Tensor
    y: Tensor
    order: Tensor
    public_order: Tensor
    draws: Mapping[str, Tensor]
    personal: Params
    notes: Mapping[str, Tensor] = {}  # nobody writes to it


class Records(NamedTuple):
    """Records as a method may take note of them, outside of any engine.

    Attributes:
        x: Inputs (n, *shape).
        y: Labels (n,), or of text the next tokens (n, L) with -1 where there is none; of public inputs of which nobody
            knows the labels, all -1.
        marks: Shaped as y, float32 in [0, 1]: what the user marked as private; None where the data have no marks.
        planted: Shaped as y, bool: a canary's label or secret. For experiments that need an oracle.
    """

    x: Tensor
    y: Tensor
    marks: Tensor | None
    planted: Tensor


class Fit(Protocol):
    """The verb by which a method learns from private records, and the only one it may use.

    `fedkd.learn.fit` is plain minibatch descent; under the ambassador mechanism the same call trains by DP-SGD.
    """

    def __call__(
        self,
        task: Task,
        params: Params,
        client: Client,
        /,
        *,
        loss: Loss = cross_entropy,
        penalty: Penalty | None = None,
    ) -> Params:
        """Return ``params`` trained on the client's records."""
        ...


class Sums(Protocol):
    """The verb by which a method sums up its private records, and the only one besides `Fit` it may read them by.

    `fedkd.learn.sums` is the plain one; under the ambassador mechanism each record's row is clipped. A method that
    answers with what this verb returned, as ``{"sums": ..., "counts": ...}``, is covered by a mechanism.
    """

    def __call__(
        self, task: Task, params: Params, client: Client, rows: Callable[[Params, Tensor], Tensor], /
    ) -> tuple[Tensor, Tensor]:
        """Sums (K, d) of ``rows(params, x)`` (n, ...) over the client's records of each class; their number (K,)."""
        ...


@dataclass(frozen=True, eq=False)
class Task:
    """What all parties know beforehand; closed over, never sent.

    Attributes:
        model: The architecture of whoever reads this: a client's own, or the server's student.
        models: Every architecture in the federation, by name.
        num_classes: K.
        public_x: Public unlabelled inputs (m, *shape); m = 0 for methods without a public set.
        rounds: Rounds of the run.
        optimizer: How `fit` and the other verbs descend.
        fit: How private records are learnt from.
        sums: How private records are summed up.
        labelled: Public inputs (l, *shape) with their labels (l,); l = 0 for methods that do not read any.
        given: Weights that clients' models start from, by architecture; empty where they start fresh.
        vocabulary: What the tokens of text mean; None for images.
        public_notes: What the method noted about the public inputs before round 1, by name (m, ...).
    """

    model: Model
    models: Mapping[str, Model]
    num_classes: int
    public_x: Tensor
    rounds: int
    optimizer: Optimizer
    fit: Fit
    sums: Sums
    labelled: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0, dtype=torch.int64))
    given: Mapping[str, Params] = field(default_factory=dict)
    vocabulary: Vocabulary | None = None
    public_notes: Mapping[str, Tensor] = field(default_factory=dict)

    def initial(self, model: Model, seed: int, client: int = 0) -> Params:
        """What a model of clients starts from: the weights given, else fresh ones of (seed, client)."""
        if model.name in self.given:
            return {name: value.clone() for name, value in self.given[model.name].items()}
        return model.init(seed, client)

    @property
    def answer_shape(self) -> tuple[int, ...]:
        """Shape of a model's answer to one input: (K,), or of text (L, K)."""
        return (self.num_classes,) if self.vocabulary is None else (*self.input_shape, self.num_classes)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input, public or private."""
        return tuple(self.public_x.shape[1:])
