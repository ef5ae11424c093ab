"""TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge Transfer in Language Models.

Shing, Misaki, Bao, Yokoi, Akiba; ICLR 2025; arXiv:2501.16937. Evidence: official-code (SakanaAI/TAID,
src/distil_losses/taid.py). ``L = -sum p_tau log p_s`` with ``p_tau = softmax((1 - t) z_s + t z_t)``, no gradient
through the target. t moves from the student (0) to the teacher (1), at least linearly, faster while the loss falls:

    d = (L_prev - L) / (L_prev + 1e-15),   m = beta m + (1 - beta) d
    t = min(t_end, max(t_start + (t_end - t_start) step / steps, t + alpha sigmoid(m) (1 - t)))

As there, the first step only sets L_prev, steps count from 0, and neither temperature nor hard labels come in.

t depends on the losses of whole batches, and every later gradient on t: that is why it is said to mix records, though
``loss`` itself, given the state, does not and can be mapped over them.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import softmax

from fedkd.errors import ConfigError
from fedkd.method import Evidence
from fedkd.objectives.base import Objective, State, soft_cross_entropy


class TAID(Objective):
    """Cross-entropy with a target that moves from the student's own answer to the teacher's."""

    evidence: ClassVar[Evidence] = "official-code"
    mixes_records: ClassVar[bool] = True

    t_start: float = Field(0.4, ge=0, lt=1, description="share of the teacher in the target at first")
    t_end: float = Field(1.0, gt=0, le=1, description="share of the teacher in the target at most")
    alpha: float = Field(5e-4, ge=0, le=1, description="size of the adaptive steps of that share; 0 leaves it linear")
    beta: float = Field(0.99, ge=0, lt=1, description="momentum of the loss's relative change")

    @model_validator(mode="after")
    def _forwards(self) -> TAID:
        if self.t_start > self.t_end:
            raise ConfigError(f"taid: expected t_start <= t_end, got {self.t_start} and {self.t_end}")
        return self

    def start(self, like: Tensor, steps: int | Tensor, epochs: int | Tensor) -> State:
        """The share t, its momentum m, the last loss, and the time."""
        zero = like.new_zeros(())
        return {"t": zero + self.t_start, "m": zero, "last": zero + math.inf, "step": zero, "steps": zero + steps}

    def loss(self, state: State, student: Tensor, teacher: Tensor, index: Tensor, y: Tensor | None = None) -> Tensor:
        """Cross-entropy with the interpolated target."""
        target = softmax((1 - state["t"]) * student.detach() + state["t"] * teacher, -1)
        return soft_cross_entropy(student, target)

    def after(self, state: State, value: Tensor, student: Tensor, index: Tensor) -> State:
        """Raise t; it never falls."""
        t, last, first = state["t"], state["last"], state["last"].isinf()
        m = self.beta * state["m"] + (1 - self.beta) * (last - value) / (last + 1e-15)
        linear = self.t_start + (self.t_end - self.t_start) * state["step"] / state["steps"]
        raised = torch.maximum(linear, t + self.alpha * torch.sigmoid(m) * (1 - t)).clamp(max=self.t_end)
        return {
            "t": torch.where(first, t, raised),
            "m": torch.where(first, state["m"], m),
            "last": value,
            "step": state["step"] + 1,
            "steps": state["steps"],
        }
