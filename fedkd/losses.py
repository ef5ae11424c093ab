"""Losses, one value per sample: the caller averages, so that padding and per-sample clipping stay possible.

Of text a sample is a record with an answer at each of its L positions, and its value is their mean.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import cross_entropy as nll
from torch.nn.functional import log_softmax, softmax

Loss = Callable[[Tensor, Tensor], Tensor]
"""(student logits (b, K), target) -> (b,). The target is labels (b,) or teacher logits (b, K).

Of text: logits (b, L, V), and labels (b, L) or teacher logits (b, L, V).
"""


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy (b,) in nats of labels y (b,); of text y (b, L) the mean where y >= 0, and 0 if that is nowhere."""
    if y.ndim < 2:
        return nll(logits, y, reduction="none")
    each = nll(logits.flatten(0, 1), y.flatten(), ignore_index=-1, reduction="none").reshape(y.shape)
    return each.sum(1) / (y >= 0).sum(1).clamp(min=1)


def kl(temperature: float) -> Loss:
    """``T^2 KL(softmax(teacher/T) || softmax(student/T))`` in nats (Hinton et al., 2015); of text over positions."""

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        target = softmax(teacher / temperature, -1)
        gap = log_softmax(teacher / temperature, -1) - log_softmax(student / temperature, -1)
        return temperature**2 * _of_sample((target * gap).sum(-1))

    return loss


def l1_logits(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean absolute difference of the logits (FedMD's digest); of text over all positions."""
    return _of_sample((student - teacher).abs().mean(-1))


def _of_sample(values: Tensor) -> Tensor:
    return values.mean(1) if values.ndim == 2 else values  # (b, L): over positions
