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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedkd.errors import PrivacyError
from fedkd.knowledge import Knowledge, Params
from privacy.events import DpEvent, Event
from privacy.mechanism import NOTHING, PUBLIC_SET, SEEDED, UNAMPLIFIED, Mechanism


@dataclass(frozen=True, kw_only=True)
class Gaussian(Mechanism):
    """What messages of any kind have in common.

    Attributes:
        clip: L2 bound, of what a subclass says.
        cohort: Clients that are asked in a round, the public number that a sum is divided by.
        noise_multiplier: Standard deviation of the noise over the sensitivity.
        noise_cohort: Where trust ends at the server: clients of the federation that is simulated. The mean gets the
            noise that theirs would get, which is less, so that a small run shows the accuracy of a large one; none of
            its numbers is private. (pfl-research calls it ``noise_cohort_size``.)
    """

    clip: float
    cohort: int
    noise_multiplier: float
    noise_cohort: int | None = None

    @property
    @abstractmethod
    def message_bound(self) -> float:
        """The largest L2 norm of a bounded message, or of its distance from what nobody's data could change."""

    @property
    def sensitivity(self) -> float:
        """L2 sensitivity of one client's message under the neighbouring relation."""
        return 2 * self.message_bound if self.relation == "replace" else self.message_bound

    @property
    def noisy_messages(self) -> bool:
        """They do."""
        return True

    @property
    def hypothetical(self) -> bool:
        """A federation of another size is simulated."""
        return self.noise_cohort is not None

    def events(self, first: bool = False) -> tuple[DpEvent, ...]:
        """One Gaussian release; no amplification is claimed, since the server knows who takes part."""
        return (Event(self.noise_multiplier),)

    def noise(self, bounded: Knowledge, rng: np.random.Generator, down: Knowledge = NOTHING) -> Knowledge:
        """Noise on one message, when trust ends at the client."""
        return Knowledge(self._noised(bounded.tensors, self._std, rng)) if self.trust == "client" else bounded

    def signal_to_noise(self, mean: Knowledge, answers: Sequence[Knowledge], down: Knowledge = NOTHING) -> float:
        """L2 norm of the mean over that of its noise, estimated from what was released, so that it tells nothing more.

        The noise's expected square is taken off the mean's own; 0 where nothing is left.
        """
        std = self._mean_std if self.trust == "server" else self._std / math.sqrt(len(answers))
        noise = self._square(std) * sum(value.numel() for value in mean.tensors.values())
        square = sum(float(part.double().square().sum()) for part in self._moved(mean, down).values())
        return math.sqrt(max(0.0, square - noise) / noise)

    @property
    def _std(self) -> float:
        return self.noise_multiplier * self.sensitivity

    @property
    def _mean_std(self) -> float:
        return self._std / (self.noise_cohort or self.cohort)

    def _square(self, std: float) -> float:
        """Expected square of one number of the noise."""
        return std**2

    def _moved(self, said: Knowledge, down: Knowledge) -> Mapping[str, Tensor]:
        """What of a message depends on anybody's data."""
        return said.tensors

    def _noised(self, tensors: Mapping[str, Tensor], std: float, rng: np.random.Generator) -> Params:
        noised = {}
        for name, value in tensors.items():
            noised[name] = value + std * normal(rng, value)
        return noised

    def view(self) -> str:
        """Depends on who is trusted."""
        if self.trust == "client":
            return "everyone, the server included, sees every client's noised message"
        return "clients and outsiders see the noised mean; the server is trusted with every bounded message"

    def sampling(self) -> str:
        """No amplification."""
        return UNAMPLIFIED

    def assumptions(self) -> tuple[str, ...]:
        """What the statement takes for granted."""
        simulated = (
            f"a simulation: the noise is that of {self.noise_cohort} clients a round, while {self.cohort} took part; a "
            "run of that size would have this epsilon, this run has not"
        )
        return (
            *((simulated,) if self.hypothetical else ()),
            PUBLIC_SET,
            SEEDED,
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
        return Knowledge({"logits": clipped_rows(raw.tensors["logits"], self.clip)})

    def noisy_mean(self, bounded: list[Knowledge], rng: np.random.Generator, down: Knowledge = NOTHING) -> Knowledge:
        """(sum + noise) / expected cohort, when trust ends at the server."""
        total = torch.stack([k.tensors["logits"] for k in bounded]).sum(0) / self.cohort
        return Knowledge(self._noised({"logits": total}, self._mean_std, rng))


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
        update = update_of(raw, down)
        scale = min(1.0, self.clip / max(norm_of(update), 1e-12))
        return Knowledge({name: down.tensors[name] + scale * part for name, part in update.items()})

    def noisy_mean(self, bounded: list[Knowledge], rng: np.random.Generator, down: Knowledge = NOTHING) -> Knowledge:
        """What came down plus (sum of updates + noise) / expected cohort, when trust ends at the server."""
        mean = {
            name: torch.stack([k.tensors[name] - down.tensors[name] for k in bounded]).sum(0) / self.cohort
            for name in bounded[0].tensors
        }
        noised = self._noised(mean, self._mean_std, rng)
        return Knowledge({name: down.tensors[name] + part for name, part in noised.items()})

    def _moved(self, said: Knowledge, down: Knowledge) -> Mapping[str, Tensor]:
        return update_of(said, down)


def clipped_rows(rows: Tensor, bound: float) -> Tensor:
    """Rows (..., K) scaled down to L2 norm ``bound`` where they are longer; NaN and infinities become 0."""
    rows = finite(rows)
    clipped: Tensor = rows * (bound / rows.norm(dim=-1, keepdim=True).clamp(min=1e-12)).clamp(max=1.0)
    return clipped


def normal(rng: np.random.Generator, like: Tensor) -> Tensor:
    """Standard normal noise, shaped as a tensor and where it is."""
    return torch.from_numpy(rng.standard_normal(tuple(like.shape), dtype=np.float32)).to(like.device)


def finite(value: Tensor) -> Tensor:
    """NaN and infinities become 0."""
    return torch.nan_to_num(value, nan=0.0, posinf=0.0, neginf=0.0)


def update_of(raw: Knowledge, down: Knowledge) -> Params:
    """``raw - down``; NaN and infinities in ``raw`` count as 0."""
    if missing := raw.tensors.keys() - down.tensors.keys():
        raise PrivacyError(f"expected an answer of the parameters that came down, got {sorted(missing)} besides")
    return {name: finite(value) - down.tensors[name] for name, value in raw.tensors.items()}


def norm_of(update: Mapping[str, Tensor]) -> float:
    """L2 norm of all tensors together."""
    return math.sqrt(sum(float(part.double().square().sum()) for part in update.values()))
