"""Gaussian noise on a client's bounded message: client-level differential privacy.

Trust at the client: each message is noised before it leaves; against anyone who sees it, replacing all of a client's
data moves it by at most twice its bound. Trust at the server: the sum over clients is noised once and divided by the
*expected* cohort, a public number; adding or removing a client moves the sum by at most the bound. NaN and infinities
become 0, since refusing to answer would itself tell something. Weights become 1. Not covered: evaluation metrics,
participation.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedkd.errors import PrivacyError
from fedkd.knowledge import Knowledge, Params
from privacy.accounting import Event
from privacy.mechanism import NOTHING, Mechanism


@dataclass(frozen=True, kw_only=True)
class Gaussian(Mechanism):
    """What messages of any kind have in common.

    Attributes:
        clip: L2 bound, of what a subclass says.
        cohort: Clients that are asked in a round, the public number that a sum is divided by.
        noise_multiplier: Standard deviation of the noise over the sensitivity.
    """

    clip: float
    cohort: int
    noise_multiplier: float

    @property
    @abstractmethod
    def message_bound(self) -> float:
        """The largest L2 norm of a bounded message, or of its distance from what nobody's data could change."""

    @property
    def sensitivity(self) -> float:
        """L2 sensitivity of one client's message under the neighbouring relation."""
        return 2 * self.message_bound if self.relation == "replace" else self.message_bound

    def event(self) -> Event:
        """One Gaussian release; no amplification is claimed, since the server knows who takes part."""
        return Event(self.noise_multiplier)

    def noise(self, bounded: Knowledge, rng: np.random.Generator) -> Knowledge:
        """Noise on one message, when trust ends at the client."""
        return Knowledge(self._noised(bounded.tensors, 1.0, rng)) if self.trust == "client" else bounded

    def _noised(self, tensors: Mapping[str, Tensor], scale: float, rng: np.random.Generator) -> Params:
        std = self.noise_multiplier * self.sensitivity * scale
        noised = {}
        for name, value in tensors.items():
            z = torch.from_numpy(rng.standard_normal(tuple(value.shape), dtype=np.float32)).to(value.device)
            noised[name] = value + std * z
        return noised

    def view(self) -> str:
        """Depends on who is trusted."""
        if self.trust == "client":
            return "everyone, the server included, sees every client's noised message"
        return "clients and outsiders see the noised mean; the server is trusted with every bounded message"

    def sampling(self) -> str:
        """No amplification."""
        return "none claimed: every release of a client counts in full, since the server knows who takes part"

    def assumptions(self) -> tuple[str, ...]:
        """What the statement takes for granted."""
        return (
            "the public set does not depend on private data",
            "the noise comes from a seeded generator, as simulations need; a deployment must draw it afresh",
        )


@dataclass(frozen=True, kw_only=True)
class GaussianRows(Gaussian):
    """Rows of logits, each clipped to L2 norm ``clip``, or to what a row can have at most, if that is less.

    Attributes:
        rows: Rows in one message.
    """

    rows: int

    @property
    def message_bound(self) -> float:
        """Of all rows together."""
        return self.clip * math.sqrt(self.rows)

    def bound(self, raw: Knowledge, down: Knowledge = NOTHING) -> Knowledge:
        """Clip every row (..., K) to L2 norm ``clip``; weight 1."""
        logits = _finite(raw.tensors["logits"])
        scale = (self.clip / logits.norm(dim=-1, keepdim=True).clamp(min=1e-12)).clamp(max=1.0)
        return Knowledge({"logits": logits * scale})

    def noisy_mean(self, bounded: list[Knowledge], rng: np.random.Generator, down: Knowledge = NOTHING) -> Knowledge:
        """(sum + noise) / expected cohort, when trust ends at the server."""
        total = torch.stack([k.tensors["logits"] for k in bounded]).sum(0) / self.cohort
        return Knowledge(self._noised({"logits": total}, 1.0 / self.cohort, rng))


@dataclass(frozen=True, kw_only=True)
class GaussianUpdate(Gaussian):
    """The update of the parameters that came down, clipped as a whole to L2 norm ``clip``: DP-FedAvg.

    McMahan, Ramage, Talwar, Zhang, "Learning Differentially Private Recurrent Language Models", ICLR 2018,
    arXiv:1710.06963, with flat clipping and a fixed bound. An answer is what came down plus the clipped update, so that
    nobody's method has to know.
    """

    @property
    def message_bound(self) -> float:
        """Of the update."""
        return self.clip

    def bound(self, raw: Knowledge, down: Knowledge = NOTHING) -> Knowledge:
        """Clip ``raw - down``, all tensors together; weight 1.

        Raises:
            PrivacyError: The answer has a tensor that did not come down, so there is no update to clip.
        """
        if missing := raw.tensors.keys() - down.tensors.keys():
            raise PrivacyError(f"expected an answer of the parameters that came down, got {sorted(missing)} besides")
        update = {name: _finite(value) - down.tensors[name] for name, value in raw.tensors.items()}
        norm = math.sqrt(sum(float(part.double().square().sum()) for part in update.values()))
        scale = min(1.0, self.clip / max(norm, 1e-12))
        return Knowledge({name: down.tensors[name] + scale * part for name, part in update.items()})

    def noisy_mean(self, bounded: list[Knowledge], rng: np.random.Generator, down: Knowledge = NOTHING) -> Knowledge:
        """What came down plus (sum of updates + noise) / expected cohort, when trust ends at the server."""
        mean = {
            name: torch.stack([k.tensors[name] - down.tensors[name] for k in bounded]).sum(0) / self.cohort
            for name in bounded[0].tensors
        }
        noised = self._noised(mean, 1.0 / self.cohort, rng)
        return Knowledge({name: down.tensors[name] + part for name, part in noised.items()})


def _finite(value: Tensor) -> Tensor:
    return torch.nan_to_num(value, nan=0.0, posinf=0.0, neginf=0.0)
