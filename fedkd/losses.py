"""Losses, one value per sample: the caller averages, so that padding and per-sample clipping stay possible."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import cross_entropy as nll
from torch.nn.functional import log_softmax, softmax

Loss = Callable[[Tensor, Tensor], Tensor]
"""(student logits (b, K), target) -> (b,). The target is labels (b,) or teacher logits (b, K)."""


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy (b,) in nats of labels y (b,)."""
    return nll(logits, y, reduction="none")


def kl(temperature: float) -> Loss:
    """``T^2 KL(softmax(teacher/T) || softmax(student/T))`` in nats (Hinton et al., 2015)."""

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        target = softmax(teacher / temperature, -1)
        gap = log_softmax(teacher / temperature, -1) - log_softmax(student / temperature, -1)
        return temperature**2 * (target * gap).sum(-1)

    return loss


def l1_logits(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean absolute difference of the logits (FedMD's digest)."""
    return (student - teacher).abs().mean(-1)
