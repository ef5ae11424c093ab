"""Divergences between the teacher's answer p_t and the student's p_s, both softened by the temperature T.

All are scaled by T^2 (Hinton et al., 2015, arXiv:1503.02531), so that gradients hardly depend on T. They need no labels
and no state.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import log_softmax, softmax

from fedkd.losses import kl
from fedkd.method import Evidence
from fedkd.objectives.base import Objective, State, soft_cross_entropy


class _Softened(Objective):
    """What the four share."""

    evidence: ClassVar[Evidence] = "paper"

    temperature: float = Field(1.0, gt=0, description="temperature T of both softmaxes")


class KL(_Softened):
    """``T^2 KL(p_t || p_s)``: knowledge distillation. Covers the teacher's modes."""

    def loss(self, state: State, student: Tensor, teacher: Tensor, index: Tensor, y: Tensor | None = None) -> Tensor:
        """`fedkd.losses.kl`."""
        return kl(self.temperature)(student, teacher)


class ReverseKL(_Softened):
    """``T^2 KL(p_s || p_t)``: the roles swapped. Seeks one of the teacher's modes."""

    def loss(self, state: State, student: Tensor, teacher: Tensor, index: Tensor, y: Tensor | None = None) -> Tensor:
        """`fedkd.losses.kl` of the teacher to the student."""
        return kl(self.temperature)(teacher, student)


class JS(_Softened):
    """``T^2 (KL(p_t || m) + KL(p_s || m)) / 2`` with ``m = (p_t + p_s) / 2``: symmetric, at most ``T^2 log 2``."""

    def loss(self, state: State, student: Tensor, teacher: Tensor, index: Tensor, y: Tensor | None = None) -> Tensor:
        """Jensen-Shannon divergence, from logarithms."""
        p, q = log_softmax(teacher / self.temperature, -1), log_softmax(student / self.temperature, -1)
        middle = torch.logaddexp(p, q) - math.log(2)
        return self.temperature**2 / 2 * (p.exp() * (p - middle) + q.exp() * (q - middle)).sum(-1)


class CrossEntropy(_Softened):
    """``-T^2 sum p_t log p_s``: cross-entropy on soft targets, `KL` plus ``T^2`` times the teacher's entropy."""

    def loss(self, state: State, student: Tensor, teacher: Tensor, index: Tensor, y: Tensor | None = None) -> Tensor:
        """Cross-entropy of the softened answers."""
        target = softmax(teacher / self.temperature, -1)
        return self.temperature**2 * soft_cross_entropy(student / self.temperature, target)
