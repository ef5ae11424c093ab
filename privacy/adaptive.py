"""Adaptive clipping of updates, which pays for what it learns from the clients.

Andrew, Thakkar, McMahan, Ramaswamy, "Differentially Private Learning with Adaptive Clipping", NeurIPS 2021,
arXiv:1905.03871, Algorithm 1: C_{t+1} = C_t exp(-eta (b_t - gamma)), where b_t is a noisy share of clients whose
update was *within* C_t, and gamma the share that should be. The bit b - 1/2 is part of the message and is noised as the
update is. Decided here: budget is shared by ``count_share`` rather than by the paper's sigma_b = m / 20; the noisy
share is cut to [0, 1], so that noise alone cannot throw the bound away; clients who are not heard of count as 1/2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedkd.knowledge import Knowledge, Params, Schema
from privacy.events import DpEvent, Event
from privacy.gaussian import GaussianUpdate, norm_of, update_of
from privacy.mechanism import CONTROL, NOTHING

CLIP, BELOW = f"{CONTROL}/clip", f"{CONTROL}/below"


@dataclass(frozen=True, kw_only=True)
class AdaptiveUpdate(GaussianUpdate):
    """Updates clipped at a quantile of their norms.

    Attributes:
        clip: C_1, before anything was learnt.
        quantile: gamma, the share of updates that should be within the bound.
        count_share: Share of the budget that the count costs, in 1 / noise_multiplier^2.
        rate: eta.
    """

    quantile: float
    count_share: float = 0.1
    rate: float = 0.2

    def events(self, first: bool = False) -> tuple[DpEvent, ...]:
        """The update's release and the bit's; together they cost as much as one at ``noise_multiplier``."""
        return Event(self._update_multiplier), Event(self._count_multiplier)

    def control(self) -> Params:
        """The first bound."""
        return {"clip": torch.tensor(self.clip)}

    def controlled(self, control: Params, mean: Mapping[str, Tensor]) -> Params:
        """The next bound, from the noisy mean of what clients said besides."""
        below = min(1.0, max(0.0, float(mean["below"]) + 0.5))
        return {"clip": control["clip"] * math.exp(-self.rate * (below - self.quantile))}

    def besides(self) -> Schema:
        """One bit, noised."""
        return {BELOW: ((), torch.float32)}

    def bound(self, raw: Knowledge, down: Knowledge = NOTHING) -> Knowledge:
        """Clip the update at the bound that came down; say whether it was within, as 1/2 or -1/2."""
        here, update = self._at(down), update_of(raw, down)
        clipped = GaussianUpdate.bound(here, raw, down)
        below = torch.tensor(0.5 if norm_of(update) <= here.clip else -0.5, device=next(iter(update.values())).device)
        return Knowledge({**clipped.tensors, BELOW: below})

    def noise(self, bounded: Knowledge, rng: np.random.Generator, down: Knowledge = NOTHING) -> Knowledge:
        """Noise on update and bit, when trust ends at the client."""
        if self.trust == "server":
            return bounded
        update, bit = self._parts(bounded)
        return Knowledge(self._noised(update, self._at(down)._std, rng) | self._noised(bit, self._bit_std, rng))

    def noisy_mean(self, bounded: list[Knowledge], rng: np.random.Generator, down: Knowledge = NOTHING) -> Knowledge:
        """Noisy means of updates and of bits, when trust ends at the server."""
        updates, bits = zip(*map(self._parts, bounded), strict=True)
        mean = GaussianUpdate.noisy_mean(self._at(down), [Knowledge(update) for update in updates], rng, down)
        share = torch.stack([bit[BELOW] for bit in bits]).sum() / self.cohort
        noised = self._noised({BELOW: share}, self._bit_std / (self.noise_cohort or self.cohort), rng)
        return Knowledge({**mean.tensors, **noised})

    def signal_to_noise(self, mean: Knowledge, answers: Sequence[Knowledge], down: Knowledge = NOTHING) -> float:
        """Of the update."""
        return GaussianUpdate.signal_to_noise(self._at(down), Knowledge(self._parts(mean)[0]), answers, down)

    @property
    def _std(self) -> float:
        return self._update_multiplier * self.sensitivity

    @property
    def _bit_std(self) -> float:
        return self._count_multiplier * (1.0 if self.relation == "replace" else 0.5)

    @property
    def _update_multiplier(self) -> float:
        return self.noise_multiplier / math.sqrt(1 - self.count_share)

    @property
    def _count_multiplier(self) -> float:
        return self.noise_multiplier / math.sqrt(self.count_share)

    def _at(self, down: Knowledge) -> AdaptiveUpdate:
        return replace(self, clip=float(down.tensors[CLIP]))

    @staticmethod
    def _parts(said: Knowledge) -> tuple[Params, Params]:
        update = dict(said.tensors)
        bit = {BELOW: update.pop(BELOW)} if BELOW in update else {}
        return update, bit
