"""SinKD: Sinkhorn Distance Minimization for Knowledge Distillation.

Cui, Qin, Gao, Zhang, Xu, Wu, Li, Sun, Zhou, Li; COLING 2024; arXiv:2402.17110. Evidence: official-code (2018cx/SinKD,
loss.py and glue_train.py). The answers of a whole batch are moved onto the teacher's by entropic optimal transport:

    C_ij = || p_s^i - p_t^j ||_1,   P = 20 row and column normalisations of exp(-C / .1)
    L = (1 - alpha) CE(y, p_s) + alpha KD + weight sum_ij P_ij C_ij

Decided here:

* The plan is computed from logarithms, as a small ``epsilon`` would make whole rows of the kernel 0.
* KD is the KL, whose gradient is that of the code's cross-entropy; not scaled by T^2, as there.
* Two versions of the released code weigh the transport by .001 and by .002; we take the first.
* The transport is a sum over the batch, where the others are means. Record i's value is the number of records times
  ``weight sum_j P_ij C_ij``, so that the mean is L. Padding trades with padding only.

A record's value depends on the batch, so there is nothing to map over records, and the objective is refused under DP.
Stacked clients are fine.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import softmax

from fedkd.losses import cross_entropy, kl
from fedkd.method import Evidence
from fedkd.objectives.base import Objective, State


class SinKD(Objective):
    """KD, and a Sinkhorn distance between the batch's answers and the teacher's."""

    evidence: ClassVar[Evidence] = "official-code"
    mixes_records: ClassVar[bool] = True

    temperature: float = Field(2.0, gt=0, description="temperature T of all softmaxes")
    alpha: float = Field(0.8, ge=0, le=1, description="weight of the KD; the hard labels have what is left")
    weight: float = Field(1e-3, ge=0, description="weight of the transport's cost")
    epsilon: float = Field(0.1, gt=0, description="entropic regularisation of the transport")
    iterations: int = Field(20, ge=1, description="row and column normalisations")

    @property
    def needs_labels(self) -> bool:
        """For the cross-entropy, unless alpha is 1."""
        return self.alpha < 1

    def cost(self, student: Tensor, teacher: Tensor) -> Tensor:
        """C (b, b): what it costs to move record i's answer onto the teacher's of record j, in 0..2."""
        p_s, p_t = softmax(student / self.temperature, -1), softmax(teacher / self.temperature, -1)
        return (p_s.unsqueeze(1) - p_t).abs().sum(-1)

    def plan(self, cost: Tensor, real: Tensor) -> Tensor:
        """P (b, b): columns sum to 1, rows nearly. Between a record and padding, ``~real`` (b,), nothing moves."""
        log = torch.where(real.unsqueeze(1) == real, -cost / self.epsilon, -math.inf)
        for _ in range(self.iterations):
            log = log - log.logsumexp(1, keepdim=True)
            log = log - log.logsumexp(0, keepdim=True)
        return log.exp()

    def loss(self, state: State, student: Tensor, teacher: Tensor, index: Tensor, y: Tensor | None = None) -> Tensor:
        """``(1 - alpha) CE + alpha KD`` of each record, and its share of the transport's cost times the batch."""
        real, cost = index >= 0, self.cost(student, teacher)
        moved = real.sum() * (self.plan(cost, real) * cost).sum(1)
        value = self.alpha * kl(self.temperature)(student, teacher) / self.temperature**2 + self.weight * moved
        return value + (1 - self.alpha) * cross_entropy(student, self.labels(y)) if self.needs_labels else value
