"""OFA-KD: One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation.

Hao, Guo, Han, Tang, Hu, Wang, Xu; NeurIPS 2023; arXiv:2310.19444. Evidence: official-code (Hao840/OFAKD,
distillers/ofa.py, defaults of train.py). Each stage of the student has a projector to logits, and each is taught by

    l = -sum_k ((p_t + 1_y)^eps - 1_y) log p_s

which is the cross-entropy with p_t for eps = 1; a larger eps raises the true class and lowers the others, for a teacher
whose architecture is far from the student's. The sum over stages and final logits, each with weight 1, is added to the
hard labels' cross-entropy.

The projectors are part of the student, not of the objective, since they are trained with it: a model that answers
(b, s, K), its stages' logits and the final ones last, is taught at every stage. One that answers (b, K) is taught at
the final logits only. One eps serves all; their code takes one for each stage.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor
from torch.nn.functional import softmax

from fedkd.learn import members
from fedkd.losses import cross_entropy
from fedkd.method import Evidence
from fedkd.objectives.base import Objective, State, soft_cross_entropy


class OFA(Objective):
    """Cross-entropy with a teacher whose true class is raised, at the final logits and at the stages' where given."""

    evidence: ClassVar[Evidence] = "official-code"

    eps: float = Field(1.0, ge=1, description="exponent on the true class; raise it for teachers of another kind")
    temperature: float = Field(1.0, gt=0, description="temperature T of both softmaxes")
    hard: float = Field(1.0, ge=0, description="weight of the hard labels' cross-entropy")
    final: float = Field(1.0, ge=0, description="weight of the final logits")
    stages: float = Field(1.0, ge=0, description="weight of each stage's logits")

    @property
    def needs_labels(self) -> bool:
        """For the cross-entropy, and to raise the true class."""
        return self.hard > 0 or self.eps > 1

    def loss(self, state: State, student: Tensor, teacher: Tensor, index: Tensor, y: Tensor | None = None) -> Tensor:
        """``hard CE + final l(final logits) + stages sum l(stage)``, student (b, K) or (b, s, K)."""
        if student.ndim == teacher.ndim:
            student = student.unsqueeze(-2)
        target = softmax(teacher / self.temperature, -1)
        if self.eps > 1:
            true = members(self.labels(y), target.shape[-1]).to(target.dtype)
            target = (target + true) ** self.eps - true
        each = soft_cross_entropy(student / self.temperature, target.unsqueeze(-2))
        value = self.final * each[..., -1] + self.stages * each[..., :-1].sum(-1)
        return value + self.hard * cross_entropy(student[..., -1, :], self.labels(y)) if self.hard else value
