"""BD-KD: Balancing the Divergences for Online Knowledge Distillation.

Amara, Sepahvand, Meyer, Gross, Clark; 2022; arXiv:2212.12965. Evidence: reconstruction. The abstract says that the
student's forward and reverse KL are weighted sample by sample, summaries that the entropy gap of teacher and student
decides; the weights themselves could not be read. Decided here:

* ``L = CE(y, p_s) + lam (a KL(p_t || p_s) + b KL(p_s || p_t))``. An over-confident student, ``H(p_s) < H(p_t)``, has
  ``a = 1 + delta`` to cover the teacher's modes, an under-confident one ``b = 1 + delta``; else the weight is 1.
* delta, lam and T are ours. Both KLs are scaled by T^2, entropies are those of the softened answers.
* The teacher stands still. The paper's learns along with the student, with a reverse KL of its own.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor
from torch.nn.functional import softmax

from fedkd.losses import cross_entropy, kl
from fedkd.method import Evidence
from fedkd.objectives.base import Objective, State, soft_cross_entropy


class BDKD(Objective):
    """Forward and reverse KL, the one that counters the student's over- or under-confidence weighted up."""

    evidence: ClassVar[Evidence] = "reconstruction"

    lam: float = Field(1.0, ge=0, description="weight of the two divergences")
    delta: float = Field(1.0, ge=0, description="what is added to the weight of the divergence that the record needs")
    temperature: float = Field(1.0, gt=0, description="temperature T of both softmaxes")
    hard: float = Field(1.0, ge=0, description="weight of the hard labels' cross-entropy")

    @property
    def needs_labels(self) -> bool:
        """For the cross-entropy."""
        return self.hard > 0

    def weights(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b), each (b,): weights of the forward and of the reverse KL. No gradient flows through them."""
        gap = self._entropy(teacher) - self._entropy(student)
        return 1 + self.delta * (gap > 0).to(gap.dtype), 1 + self.delta * (gap < 0).to(gap.dtype)

    def loss(self, state: State, student: Tensor, teacher: Tensor, index: Tensor, y: Tensor | None = None) -> Tensor:
        """``hard CE + lam (a KL(p_t || p_s) + b KL(p_s || p_t))``."""
        a, b = self.weights(student, teacher)
        divergence = kl(self.temperature)
        value = self.lam * (a * divergence(student, teacher) + b * divergence(teacher, student))
        return value + self.hard * cross_entropy(student, self.labels(y)) if self.needs_labels else value

    def _entropy(self, logits: Tensor) -> Tensor:
        softened = logits / self.temperature
        return soft_cross_entropy(softened, softmax(softened, -1))
