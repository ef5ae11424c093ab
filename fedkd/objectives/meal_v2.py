"""MEAL V2: Boosting Vanilla ResNet-50 to 80%+ Top-1 Accuracy on ImageNet without Tricks.

Shen, Savvides; 2020; arXiv:2009.08453. Evidence: official-code (szq0214/MEAL-V2, loss.py and README), without its
discriminator. ``L = -sum p log p_s``, where p is the mean of the teachers' softmaxes; no hard labels, no temperature.

The discriminator, which learns to tell the student's outputs from the teachers', is left out: it is a second network
that is trained in turn with the student, and an objective has no parameters of its own.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor
from torch.nn.functional import softmax

from fedkd.method import Evidence
from fedkd.objectives.base import Objective, State, soft_cross_entropy


class MealV2(Objective):
    """Cross-entropy with the mean of several teachers' probabilities; one teacher is `CrossEntropy` with T = 1."""

    evidence: ClassVar[Evidence] = "official-code"
    teachers: ClassVar[Literal["none", "one", "many"]] = "many"

    def loss(self, state: State, student: Tensor, teacher: Tensor, index: Tensor, y: Tensor | None = None) -> Tensor:
        """The teachers are averaged as probabilities, not as logits."""
        p = softmax(teacher, -1)
        return soft_cross_entropy(student, p.mean(-2) if p.ndim > student.ndim else p)
