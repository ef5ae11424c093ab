"""The seam: what a student minimises in distillation, one value a record, with a state that is passed and returned."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.nn.functional import log_softmax

from fedkd.errors import ConfigError
from fedkd.method import Evidence

State = dict[str, Tensor]
"""What an objective remembers between steps: a schedule, a record's last prediction. Empty for most."""


class Objective(BaseModel):
    """Base class of objectives. An objective's fields are its hyper-parameters; it holds nothing else.

    All three verbs are pure functions of tensors, so that they work under `torch.func.grad` and, for stacked clients,
    `torch.func.vmap`. Where ``mixes_records`` is false, ``loss`` can be mapped over single records too.

    Attributes:
        evidence: Where the formula comes from.
        mixes_records: Whether a record's gradient depends on other records, in ``loss`` or through the state. Clipping
            record by record then bounds nothing: refuse such an objective for private records under DP.
        teachers: Logits that ``loss`` reads: ``one`` (b, K), ``many`` (b, K) or (b, t, K), ``none`` none at all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    evidence: ClassVar[Evidence]
    mixes_records: ClassVar[bool] = False
    teachers: ClassVar[Literal["none", "one", "many"]] = "one"

    @property
    def needs_labels(self) -> bool:
        """Whether ``loss`` reads hard labels with these settings; without, an unlabelled pool will do."""
        return False

    def start(self, like: Tensor, steps: int | Tensor, epochs: int | Tensor) -> State:
        """State before the first step.

        Args:
            like: Logits (n, ..., K) of all n records. Their size, type and device count, not their values.
            steps: Steps to come.
            epochs: How often a record will come up in them.
        """
        return {}

    @abstractmethod
    def loss(self, state: State, student: Tensor, teacher: Tensor, index: Tensor, y: Tensor | None = None) -> Tensor:
        """Loss (b,) of each record in nats; the caller averages, without the padding.

        Args:
            state: From `start`, or the last `after`.
            student: The student's logits (b, K).
            teacher: The teacher's logits (b, K), or (b, t, K) of t teachers where ``teachers`` is ``many``.
            index: The records' rows (b,) in the data set; -1 marks padding, whose value is of no meaning.
            y: Labels (b,), where there are any.

        Raises:
            ConfigError: ``needs_labels``, and there are none.
        """

    def after(self, state: State, value: Tensor, student: Tensor, index: Tensor) -> State:
        """State for the next step.

        Args:
            state: The state that ``loss`` was given.
            value: Mean loss of the batch, a detached scalar.
            student: The student's logits that ``loss`` was given, detached: those before the step.
            index: As for ``loss``.
        """
        return state

    def labels(self, y: Tensor | None) -> Tensor:
        """The labels ``y``, which this objective cannot do without."""
        if y is None:
            raise ConfigError(
                f"objective {type(self).__name__}: expected labels, got none; give them, or set the weight of the hard "
                "labels to 0 where there is one"
            )
        return y


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """``-sum target log softmax(logits)`` over the last dimension, in nats; the target's rows need not sum to 1."""
    return -(target * log_softmax(logits, -1)).sum(-1)
