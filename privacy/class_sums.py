"""Sums by class with counts, for prototypes, class means of logits, and features by class: noisy sum and noisy count.

The means are post-processing. All classes travel, held or not, so that no message is shaped by which classes a client
has; a class whose noisy count is less than ``min_count`` standard deviations of its noise counts as absent.

Record level: a record adds its row, clipped to L2 norm B, to one sum and 1 to one count. In units of B and of records
that moves the message by sqrt(2). What the rows are computed by must not depend on the records otherwise: a model
trained by DP-SGD, whose cost is booked beside. Client level: shares of classes and their means, clipped to B, scaled
together to norm 1 (which leaves their ratio alone); then the whole message is a client's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedkd import learn
from fedkd.knowledge import Knowledge, Params
from fedkd.task import Client, Task
from privacy.gaussian import Gaussian, clipped_rows, finite, normal
from privacy.mechanism import NOTHING


@dataclass(frozen=True)
class RecordSums:
    """Record-level, add or remove one: what noise does to ``{"sums": (K, d), "counts": (K,)}``.

    Attributes:
        clip: B, the L2 bound of one record's row.
        noise_multiplier: Standard deviation of the noise over the sensitivity sqrt(2), in units of B and of records.
        min_count: In standard deviations of the noise on a count.
    """

    clip: float
    noise_multiplier: float
    min_count: float

    def sums(
        self, task: Task, params: Params, client: Client, rows: Callable[[Params, Tensor], Tensor], /
    ) -> tuple[Tensor, Tensor]:
        """`fedkd.learn.sums` of clipped rows."""
        return learn.sums(task, params, client, lambda p, x: clipped_rows(rows(p, x).flatten(1), self.clip))

    def noised(self, said: Knowledge, rng: np.random.Generator) -> Knowledge:
        """Noise on every sum and every count; then what is too few is absent."""
        std = math.sqrt(2) * self.noise_multiplier
        sums = said.tensors["sums"] + self.clip * std * normal(rng, said.tensors["sums"])
        counts = said.tensors["counts"] + std * normal(rng, said.tensors["counts"])
        return _present(sums, counts, self.min_count * std)


@dataclass(frozen=True, kw_only=True)
class GaussianSums(Gaussian):
    """Client-level: shares of classes and clipped means, scaled to norm 1, then noised.

    Attributes:
        clip: L2 bound of a class's mean.
        min_count: In standard deviations of the noise on a count.
    """

    min_count: float

    @property
    def message_bound(self) -> float:
        """Of the scaled message."""
        return 1.0

    def bound(self, raw: Knowledge, down: Knowledge = NOTHING) -> Knowledge:
        """Means times shares in units of ``clip``, and shares, as long as 1 together; nothing held stays nothing."""
        counts = finite(raw.tensors["counts"]).clamp(min=0)
        shares = counts / counts.sum().clamp(min=1e-12)
        means = finite(raw.tensors["sums"]) / torch.where(counts > 0, counts, 1.0)[:, None]
        sums = shares[:, None] * clipped_rows(means, self.clip) / self.clip
        scale = 1 / torch.hypot(sums.norm(), shares.norm()).clamp(min=1e-12)
        return Knowledge({"sums": scale * sums, "counts": scale * shares})

    def noise(self, bounded: Knowledge, rng: np.random.Generator, down: Knowledge = NOTHING) -> Knowledge:
        """Noise on one message, when trust ends at the client."""
        return self._released(bounded, self._std, rng) if self.trust == "client" else bounded

    def noisy_mean(self, bounded: list[Knowledge], rng: np.random.Generator, down: Knowledge = NOTHING) -> Knowledge:
        """(sum + noise) / expected cohort, when trust ends at the server."""
        mean = {
            name: torch.stack([k.tensors[name] for k in bounded]).sum(0) / self.cohort for name in bounded[0].tensors
        }
        return self._released(Knowledge(mean), self._mean_std, rng)

    def signal_to_noise(self, mean: Knowledge, answers: Sequence[Knowledge], down: Knowledge = NOTHING) -> float:
        """Of the sums of classes that are present: elsewhere there is no noise, and counts are chosen by their own."""
        heard, std = ([mean], self._mean_std) if self.trust == "server" else (answers, self._std / len(answers))
        present = sum(int((one.tensors["counts"] > 0).sum()) for one in heard)
        sums = mean.tensors["sums"].double() / self.clip
        noise = std**2 * present * sums.shape[1]
        return math.sqrt(max(0.0, float(sums.square().sum()) - noise) / noise) if noise else 0.0

    def _released(self, said: Knowledge, std: float, rng: np.random.Generator) -> Knowledge:
        noised = self._noised(said.tensors, std, rng)
        return _present(self.clip * noised["sums"], noised["counts"], self.min_count * std)


def _present(sums: Tensor, counts: Tensor, least: float) -> Knowledge:
    held = counts > least
    return Knowledge({"sums": torch.where(held[:, None], sums, 0.0), "counts": torch.where(held, counts, 0.0)})
