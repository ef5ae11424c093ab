"""Laplace noise on rows of logits, each clipped in L1: client-level differential privacy.

Dwork, McSherry, Nissim, Smith, "Calibrating Noise to Sensitivity in Private Data Analysis", TCC 2006. For few rows of
few classes it may need less noise than Gaussian; the more numbers a message has, the less so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedkd.knowledge import Knowledge, Params
from privacy.events import DpEvent, Laplace
from privacy.gaussian import GaussianRows, finite
from privacy.mechanism import NOTHING


@dataclass(frozen=True, kw_only=True)
class LaplaceRows(GaussianRows):
    """As `GaussianRows`, in L1: ``clip`` bounds a row's L1 norm, ``noise_multiplier`` is scale over L1 sensitivity."""

    @property
    def message_bound(self) -> float:
        """The largest L1 norm of all rows together."""
        return self.clip * self.rows

    def events(self, first: bool = False) -> tuple[DpEvent, ...]:
        """One Laplace release of a vector."""
        return (Laplace(self.noise_multiplier),)

    def bound(self, raw: Knowledge, down: Knowledge = NOTHING) -> Knowledge:
        """Clip every row (..., K) to L1 norm ``clip``; weight 1."""
        logits = finite(raw.tensors["logits"])
        length = logits.abs().sum(-1, keepdim=True)
        return Knowledge({"logits": torch.where(length > self.clip, logits / length * self.clip, logits)})

    def _square(self, std: float) -> float:
        return 2 * std**2

    def _noised(self, tensors: Mapping[str, Tensor], std: float, rng: np.random.Generator) -> Params:
        noised = {}
        for name, value in tensors.items():
            z = torch.from_numpy(rng.laplace(size=tuple(value.shape)).astype(np.float32)).to(value.device)
            noised[name] = value + std * z
        return noised
