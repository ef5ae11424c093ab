"""PS-KD: Self-Knowledge Distillation with Progressive Refinement of Targets.

Kim, Ji, Yoon, Hwang; ICCV 2021; arXiv:2006.12000. Evidence: official-code (lgcnsai/PS-KD-Pytorch, main.py). The student
is its own teacher: the target is ``(1 - a_e) y + a_e P_{e-1}(x)``, where ``P_{e-1}(x)`` is what it said of the record
the last time, before that step, and ``a_e = alpha (e + 1) / E`` in epoch e = 0..E-1. In the first epoch it is y.

A record's epoch is the number of times it has come up, so that orders other than plain epochs will do; past E the share
stays at ``alpha``. The predictions are state: they stay where the records are and cost no communication. A record reads
its own row only, and so per-record clipping means what it says.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import softmax

from fedkd.learn import members
from fedkd.method import Evidence
from fedkd.objectives.base import Objective, State, soft_cross_entropy


class PSKD(Objective):
    """Cross-entropy with labels that soften towards the student's own predictions of the epoch before."""

    evidence: ClassVar[Evidence] = "official-code"
    teachers: ClassVar[Literal["none", "one", "many"]] = "none"

    alpha: float = Field(0.8, ge=0, le=1, description="share of the own prediction in the last epoch's target")

    @property
    def needs_labels(self) -> bool:
        """Always."""
        return True

    def start(self, like: Tensor, steps: int | Tensor, epochs: int | Tensor) -> State:
        """Predictions (n + 1, K), how often each record came up (n + 1,), and E. Padding, -1, has the last row."""
        n, classes = len(like), like.shape[-1]
        return {
            "said": like.new_zeros((n + 1, classes)),
            "seen": like.new_zeros(n + 1),
            "epochs": like.new_zeros(()) + epochs,
        }

    def share(self, state: State, index: Tensor) -> Tensor:
        """a_e (b,): the own prediction's share in each record's target."""
        return (self.alpha * (state["seen"][index] + 1) / state["epochs"]).clamp(max=self.alpha)

    def loss(self, state: State, student: Tensor, teacher: Tensor, index: Tensor, y: Tensor | None = None) -> Tensor:
        """Cross-entropy with the refined target."""
        truth = members(self.labels(y), student.shape[-1]).to(student.dtype)
        before = torch.where(state["seen"][index].unsqueeze(-1) > 0, state["said"][index], truth)
        share = self.share(state, index).unsqueeze(-1)
        return soft_cross_entropy(student, (1 - share) * truth + share * before)

    def after(self, state: State, value: Tensor, student: Tensor, index: Tensor) -> State:
        """Remember the batch's predictions."""
        return {
            "said": state["said"].index_put((index,), softmax(student, -1)),
            "seen": state["seen"].index_put((index,), state["seen"][index] + 1),
            "epochs": state["epochs"],
        }
