"""Share a pool of images among clients: functions of labels or groups that return positions in the pool.

Every function uses each position exactly once, returns the clients' positions in ascending order and raises
``ConfigError`` for what cannot be done. ``fedkd.data.split`` holds the smallest allowed client and the whole recipe.
"""

from __future__ import annotations

import numpy as np

from fedkd.data.ragged import IntArray, Ragged
from fedkd.data.shares import apportion, fill
from fedkd.errors import ConfigError

TRIES = 5000
"""How often a Dirichlet partition with too small clients is drawn again."""


def iid(count: int, clients: int, rng: np.random.Generator) -> Ragged:
    """Share ``count`` positions uniformly at random; sizes differ by one at most."""
    return Ragged(np.sort(part) for part in np.array_split(rng.permutation(count), clients))


def dirichlet(labels: IntArray, clients: int, alpha: float, min_size: int, rng: np.random.Generator) -> Ragged:
    """Share each class in proportions drawn from Dirichlet(alpha), as in Yurochkin et al. (2019) and PFLlib.

    PFLlib's capacity rule: class by class, a client that already holds its even share gets nothing more. The whole
    draw is repeated until every client has ``min_size``.

    Args:
        labels: (n,) classes.
        clients: How many.
        alpha: Concentration; small is skewed, large nearly iid.
        min_size: Smallest allowed client.
        rng: The partition's generator.

    Raises:
        ConfigError: No such draw in ``TRIES`` tries.
    """
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    counts = _large_enough_counts(members, clients, alpha, min_size, rng)
    cut = [np.split(rng.permutation(m), np.cumsum(c)[:-1]) for m, c in zip(members, counts, strict=True)]
    return Ragged(np.sort(np.concatenate(part)) for part in zip(*cut, strict=True))


def quantity(count: int, clients: int, alpha: float, min_size: int, rng: np.random.Generator) -> Ragged:
    """Share ``count`` positions at random in sizes drawn from Dirichlet(alpha); labels stay iid.

    Args:
        count: How many positions, at least ``clients * min_size``.
        clients: How many.
        alpha: Concentration; small makes very unequal sizes.
        min_size: Smallest allowed client: smaller ones are raised to it and the others shrink in proportion, since
            drawing again would hardly ever help many clients.
        rng: The partition's generator.
    """
    sizes = apportion(rng.dirichlet(np.full(clients, alpha)), count, rng, low=min_size)
    return Ragged(np.sort(part) for part in np.split(rng.permutation(count), np.cumsum(sizes)[:-1]))


def pathological(labels: IntArray, clients: int, classes: int, rng: np.random.Generator) -> Ragged:
    """Give every client exactly ``classes`` classes, every class to somebody, and sizes as equal as that allows.

    A class goes to more clients the more images it has (McMahan et al. (2017) deal shards of sorted images, which
    gives a client *up to* so many classes). Sizes are then evened out among the clients that share a class.

    Args:
        labels: (n,) classes.
        clients: How many.
        classes: How many distinct classes each client holds.
        rng: The partition's generator.

    Raises:
        ConfigError: Fewer classes than asked for, too few clients to hold all classes, or too few images.
    """
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    holds = _class_holders([len(m) for m in members], clients, classes, rng)
    parts: list[list[IntArray]] = [[] for _ in range(clients)]
    for m, who, amounts in zip(members, holds, _even_amounts(members, holds, clients, rng), strict=True):
        for client, part in zip(who, np.split(rng.permutation(m), np.cumsum(amounts)[:-1]), strict=True):
            parts[client].append(part)
    return Ragged(np.sort(np.concatenate(part)) for part in parts)


def natural(groups: IntArray) -> Ragged:
    """Make each group that occurs a client, in ascending order of the group."""
    return Ragged(np.flatnonzero(groups == group) for group in np.unique(groups))


def choose_groups(groups: IntArray, clients: int, min_size: int, rng: np.random.Generator) -> IntArray:
    """Return the positions of ``clients`` natural clients, drawn among the groups of at least ``min_size``.

    Args:
        groups: (n,) group of each position.
        clients: How many groups to keep.
        min_size: Smallest allowed client; smaller groups are not eligible.
        rng: The choice's generator.

    Raises:
        ConfigError: Too few groups are large enough.
    """
    ids, sizes = np.unique(groups, return_counts=True)
    eligible = ids[sizes >= min_size]
    if clients > len(eligible):
        raise ConfigError(
            f"partition natural: expected at most {len(eligible)} clients, the groups with {min_size} images or more, "
            f"got clients={clients}; lower clients, min_size, test or public"
        )
    return np.flatnonzero(np.isin(groups, rng.choice(eligible, clients, replace=False)))


def _large_enough_counts(
    members: list[IntArray], clients: int, alpha: float, min_size: int, rng: np.random.Generator
) -> IntArray:
    """Return the first draw in which every client has ``min_size`` images in all."""
    best = 0
    for _ in range(TRIES):
        counts = _dirichlet_counts(members, clients, alpha, rng)
        smallest = int(counts.sum(axis=0).min())
        if smallest >= min_size:
            return counts
        best = max(best, smallest)
    raise ConfigError(
        f"partition dirichlet: expected min_size={min_size} images for every client, got a smallest client of {best} "
        f"at best in {TRIES} draws with alpha={alpha} and {clients} clients; raise alpha, or lower min_size or clients"
    )


def _dirichlet_counts(members: list[IntArray], clients: int, alpha: float, rng: np.random.Generator) -> IntArray:
    """Return how many images of each class (rows) each client (columns) gets."""
    even_share = sum(len(m) for m in members) / clients
    counts = np.zeros((len(members), clients), np.int64)
    for row, m in zip(counts, members, strict=True):
        open_ = counts.sum(axis=0) < even_share
        proportions = rng.dirichlet(np.full(clients, alpha)) * open_
        if proportions.sum() < 1e-12:  # a tiny alpha gave all to closed clients: what is left of Dirichlet is a choice
            proportions = np.eye(clients)[rng.choice(np.flatnonzero(open_))]
        upto = np.cumsum(proportions)
        # Divided by its own end, which is exactly 1 then: rounding must not give the rest to a closed last client.
        row[:] = np.diff(np.rint(upto / upto[-1] * len(m)).astype(np.int64), prepend=0)
    return counts


def _class_holders(sizes: list[int], clients: int, classes: int, rng: np.random.Generator) -> list[IntArray]:
    """Return for each class the clients that hold it; every client is in exactly ``classes`` of them."""
    slots, cap = clients * classes, np.minimum(clients, sizes)
    if classes > len(sizes):
        raise ConfigError(f"partition pathological: expected classes <= {len(sizes)}, got {classes}; lower classes")
    if slots < len(sizes):
        raise ConfigError(
            f"partition pathological: expected clients * classes >= {len(sizes)} so that every class has a client, "
            f"got {clients} * {classes}; raise one of them"
        )
    if slots > cap.sum():
        raise ConfigError(
            f"partition pathological: expected images for {clients} clients of {classes} classes, got classes of only "
            f"{min(sizes)} images; lower clients or classes"
        )
    holders: list[IntArray] = [np.empty(0, np.int64)] * len(sizes)
    free = np.full(clients, classes)
    degree = apportion(np.array(sizes), slots, rng, low=1, cap=cap)
    # Serving the clients with most free places first never gets stuck (Havel-Hakimi), in any order of the classes.
    for label in rng.permutation(len(sizes)):
        holders[label] = np.sort(np.lexsort((rng.random(clients), -free))[: degree[label]])
        free[holders[label]] -= 1
    return holders


def _even_amounts(
    members: list[IntArray], holders: list[IntArray], clients: int, rng: np.random.Generator
) -> list[IntArray]:
    """Return for each class how many images each of its holders gets, at least 1, so that sizes are near equal.

    Class by class the images are poured on what the holders have of other classes. The sum of squared sizes is convex
    and each class has its own constraint, so the sweeps settle at its minimum; rounding costs at most 1 a class.
    """
    amounts = [np.full(len(who), len(m) / len(who)) for m, who in zip(members, holders, strict=True)]
    size = np.zeros(clients)
    for who, amount in zip(holders, amounts, strict=True):
        size[who] += amount
    for _ in range(100):
        before = size.copy()
        for label, who in enumerate(holders):
            size[who] -= amounts[label]
            amounts[label] = fill(size[who], len(members[label]))
            size[who] += amounts[label]
        if np.abs(size - before).max() < 0.01:
            break
    return [apportion(amount, len(m), rng, low=1) for amount, m in zip(amounts, members, strict=True)]
