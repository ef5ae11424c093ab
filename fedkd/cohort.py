"""Who takes part in a round: a public, data-independent choice that follows from the seed."""

from __future__ import annotations

from collections import Counter

from fedkd import seeds
from fedkd.config import Config


def cohort(config: Config, t: int) -> list[int]:
    """Clients of round ``t``, in ascending order: a uniform choice of fixed size without replacement."""
    size, clients = config.federation.cohort_size(), config.federation.clients
    if size == clients:
        return list(range(clients))
    rng = seeds.generator(config.seed, "cohort", t)
    chosen: list[int] = sorted(rng.choice(clients, size, replace=False).tolist())
    return chosen


def participations(config: Config) -> int:
    """The largest number of rounds that any one client takes part in over the whole run."""
    counts = Counter(k for t in range(1, config.federation.rounds + 1) for k in cohort(config, t))
    return max(counts.values())
