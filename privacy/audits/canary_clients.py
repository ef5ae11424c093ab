"""Canary clients: secret directions and coins, and the releases of a mechanism that they take part in.

Of what a mechanism says of itself, the bound sets how far a canary's raw message goes, a thousand times as far, so that
a missing clip shows. The rest is what the mechanism does. Messages of any schema of floats are flat arrays (d,) here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from fedkd.errors import ConfigError
from fedkd.knowledge import Knowledge, Params

Floats = npt.NDArray[np.float64]

NOTHING = Knowledge({})

_FAR = 1000.0  # length of a raw canary, in bounds: beyond the clip of a small tensor among large ones, too


class Noisy(Protocol):
    """What is audited: a mechanism that bounds a client's message and hides it in noise."""

    @property
    def delta(self) -> float:
        """Delta of the whole run."""

    @property
    def trust(self) -> Literal["client", "server"]:
        """Where trust ends."""

    @property
    def relation(self) -> Literal["add_remove", "replace"]:
        """How neighbouring inputs differ."""

    @property
    def message_bound(self) -> float:
        """Claimed largest L2 norm of a bounded message, or of its distance from the neutral one."""

    @property
    def sensitivity(self) -> float:
        """Claimed largest L2 distance between a client's message and its replacement, or its absence."""

    @property
    def noise_multiplier(self) -> float:
        """Claimed standard deviation of the noise over the sensitivity."""

    def bound(self, raw: Knowledge, down: Knowledge) -> Knowledge:
        """Limit what one client can change in the answer to ``down``."""

    def noise(self, bounded: Knowledge, rng: np.random.Generator) -> Knowledge:
        """Add noise to one message, where trust ends at the client."""

    def noisy_mean(self, bounded: list[Knowledge], rng: np.random.Generator, down: Knowledge) -> Knowledge:
        """Mean of messages with noise, where trust ends at the server."""


@dataclass(frozen=True, eq=False)
class Canaries:
    """Canary clients, and everything else that a release is made of.

    Attributes:
        mechanism: What is audited.
        down: What the messages answer.
        background: Bounded messages of other clients, in every mean.
        neutral: The bounded message that weighs nothing.
        coins: (m,) bool, whether a canary sends its heads.
        heads: Bounded messages.
        tails: Bounded messages; the neutral one itself for a client that stays away.
    """

    mechanism: Noisy
    down: Knowledge
    background: Sequence[Knowledge]
    neutral: Knowledge
    coins: npt.NDArray[np.bool_]
    heads: tuple[Knowledge, ...]
    tails: tuple[Knowledge, ...]

    def __len__(self) -> int:
        return len(self.coins)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of the T tensors that hold anything."""
        return tuple(name for name, tensor in self.neutral.tensors.items() if tensor.numel())

    @cached_property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Numbers in each tensor (T,)."""
        return np.array([self.neutral.tensors[name].numel() for name in self.names])

    @cached_property
    def streams(self) -> range:
        """Canaries whose releases hold all others': each its own where trust ends at the client, else any one."""
        return range(len(self) if self.mechanism.trust == "client" else 1)

    def flat(self, said: Knowledge) -> Floats:
        """A message (d,)."""
        return np.concatenate([said.tensors[name].detach().double().cpu().numpy().ravel() for name in self.names])

    def sums(self, values: Floats) -> Floats:
        """Sum (T,) over each tensor of values (d,)."""
        return np.asarray(np.add.reduceat(values, self.sizes.cumsum() - self.sizes))

    def apart(self, canary: int) -> Floats:
        """Difference (d,) of a canary's two messages: what its coin can change."""
        return self.flat(self.heads[canary]) - self.flat(self.tails[canary])

    def release(self, canary: int, heads: bool, rng: np.random.Generator) -> Floats:
        """What comes out (d,): the canary's message, or the mean, in which the others' coins are as tossed.

        Where nobody takes part in a mean, a client with nothing to say does.
        """
        if self.mechanism.trust == "client":
            return self.flat(self.mechanism.noise((self.heads if heads else self.tails)[canary], rng))
        coins = self.coins.copy()
        coins[canary] = heads
        said = [head if coin else tail for head, tail, coin in zip(self.heads, self.tails, coins, strict=True)]
        present = [one for one in said if one is not self.neutral]
        return self.flat(self.mechanism.noisy_mean([*self.background, *present] or [self.neutral], rng, self.down))

    def moved(self, canary: int, rng: np.random.Generator) -> Floats:
        """How far a canary's coin moves a release in the canary's direction, by tensor (T,), by one pair of releases.

        Both draw their noise from the same generator state, so that it cancels where no other source is used.
        """
        state = int(rng.integers(2**63))
        heads, tails = (self.release(canary, coin, np.random.default_rng(state)) for coin in (True, False))
        direction = self.apart(canary)
        length = np.sqrt(self.sums(direction**2))
        return np.divide(self.sums((heads - tails) * direction), length, out=np.zeros(len(length)), where=length > 0)


def plant(
    mechanism: Noisy,
    neutral: Knowledge,
    m: int,
    rng: np.random.Generator,
    down: Knowledge = NOTHING,
    background: Sequence[Knowledge] = (),
) -> Canaries:
    """Return m canary clients with directions and coins of their own; arguments as for ``audit_messages``.

    Raises:
        ConfigError: The neutral message is not of finite floats, is changed by the bound, or cannot be moved; or trust
            ends at the client, where a client that stays away is seen to.
    """
    if mechanism.trust == "client" and mechanism.relation != "replace":
        raise ConfigError(
            f"trust at the client: expected relation 'replace', got {mechanism.relation!r}: who stays away is seen to, "
            "whatever the noise"
        )
    tensors = neutral.tensors.values()
    if not neutral.nbytes or not all(t.is_floating_point() and bool(torch.isfinite(t).all()) for t in tensors):
        kinds = ", ".join(f"{name} {tensor.dtype}" for name, tensor in neutral.tensors.items())
        raise ConfigError(f"a neutral message should hold finite floats, got {kinds or 'nothing'}")
    quiet = mechanism.bound(neutral, down)
    change = math.hypot(*(float((quiet.tensors[name] - value).norm()) for name, value in neutral.tensors.items()))
    if change > 1e-3 * mechanism.message_bound:
        raise ConfigError(
            f"the bound should leave the neutral message as it is, got a change of {change:.3g}; give zeros for "
            "logits, what came down for an update"
        )
    far, heads, tails = _FAR * mechanism.message_bound, [], []
    for _ in range(m):
        step = _direction(neutral, rng)
        heads.append(mechanism.bound(_step(neutral, step, far), down))
        opposite = mechanism.relation == "replace"
        tails.append(mechanism.bound(_step(neutral, step, -far), down) if opposite else quiet)
    coins = rng.random(m) < 0.5
    canaries = Canaries(mechanism, down, background, quiet, coins, tuple(heads), tuple(tails))
    if not all(canaries.apart(canary).any() for canary in range(m)):
        raise ConfigError(f"a bound of {mechanism.message_bound:g} lets no canary through; there is nothing to audit")
    return canaries


def _direction(neutral: Knowledge, rng: np.random.Generator) -> Params:
    """Signs over the root of their number: of norm 1 together, each row and tensor as long as its size says."""
    size = sum(tensor.numel() for tensor in neutral.tensors.values())
    step = {}
    for name, tensor in neutral.tensors.items():
        signs = torch.from_numpy(rng.integers(0, 2, tuple(tensor.shape), dtype=np.int8)).to(tensor)
        step[name] = (2 * signs - 1) / math.sqrt(size)
    return step


def _step(neutral: Knowledge, step: Params, length: float) -> Knowledge:
    return Knowledge({name: tensor + length * step[name] for name, tensor in neutral.tensors.items()})
