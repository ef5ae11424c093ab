"""Split a data set: a global test set, public images, and each client's training and own test images.

A split is a pure function of the data set, the specification and the seed. The parts come in this order, each from
what the earlier ones left: the subset (``limit``), the global test, the public images, the natural clients to keep,
the choice of the canaries and their wrong labels, the partition, the own tests, and last the canaries' coins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from fedkd.data import canaries as canary
from fedkd.data import partition
from fedkd.data.canaries import Canaries
from fedkd.data.datasets import Dataset
from fedkd.data.ragged import IntArray, Ragged
from fedkd.data.shares import apportion
from fedkd.errors import ConfigError
from fedkd.seeds import generator

Partition = Literal["iid", "dirichlet", "pathological", "quantity", "natural"]

_NEEDS_ALPHA = ("dirichlet", "quantity")
_NEEDS_CLASSES = ("pathological",)


@dataclass(frozen=True)
class SplitSpec:
    """How to split.

    Attributes:
        clients: How many.
        partition: ``iid``; ``dirichlet`` (label skew); ``pathological`` (exactly ``classes`` classes a client);
            ``quantity`` (skewed sizes, iid labels); ``natural`` (writers, drawers).
        alpha: Concentration of ``dirichlet`` and ``quantity``, 0.001 to 1,000,000; None for the others.
        classes: Classes a client, for ``pathological``; None for the others.
        test: Images of the class-balanced global test set.
        public: Images of the public set, class-balanced as far as possible.
        min_size: Smallest allowed client, its own test images and all its canaries counted.
        test_fraction: Share of a client's images that becomes its own test, in [0, 1); 0 for none.
        canaries: How many mislabelled images to plant, half of them on average (see ``fedkd.data.canaries``).
        coins: The shadow whose coins decide which canaries are planted, from 1; None for the run's own.
        limit: Use a random subset of this many images, with the classes in the data set's proportions; None for all.

    Raises:
        ConfigError: A value out of range, or ``alpha`` or ``classes`` missing or without use.
    """

    clients: int
    partition: Partition
    alpha: float | None = None
    classes: int | None = None
    test: int = 0
    public: int = 0
    min_size: int = 2
    test_fraction: float = 0.2
    canaries: int = 0
    coins: int | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.partition not in get_args(Partition):
            raise ConfigError(
                f"partition: expected one of {', '.join(get_args(Partition))}, got {self.partition!r}; choose one"
            )
        for name, low in (("clients", 1), ("min_size", 1), ("test", 0), ("public", 0), ("canaries", 0)):
            if getattr(self, name) < low:
                raise ConfigError(f"{name}: expected {low} or more, got {getattr(self, name)}; raise it")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit: expected 1 or more, got {self.limit}; raise it or leave it out")
        if not 0 <= self.test_fraction < 1:
            raise ConfigError(f"test_fraction: expected a share in [0, 1), got {self.test_fraction}; 0.2 is usual")
        self._check_option("alpha", self.alpha, _NEEDS_ALPHA)
        self._check_option("classes", self.classes, _NEEDS_CLASSES)

    def _check_option(self, name: str, value: float | None, partitions: tuple[str, ...]) -> None:
        if (value is not None) != (self.partition in partitions):
            wanted, todo = ("none", "leave it out") if value is not None else ("a number", "give it")
            raise ConfigError(f"{name}: expected {wanted} for partition {self.partition}, got {value}; {todo}")
        if value is not None and not 1e-3 <= value <= 1e6:  # beyond, Dirichlet draws underflow or are all alike
            raise ConfigError(f"{name}: expected 0.001 to 1000000, got {value}; choose within")


@dataclass(frozen=True, eq=False)
class Split:
    """Who has which image; all indices are positions in ``dataset.x`` except an official ``test``'s.

    Attributes:
        test: Class-balanced global test set, positions in ``dataset.test_x`` when it is official.
        test_is_official: Whether ``test`` points into ``dataset.test_x``.
        public: Images that every party may see, disjoint from all clients and the test.
        train: Each client's training images, its included canaries among them (with their wrong label, see
            ``labels``), excluded ones not.
        own_test: Each client's own test images, never a canary.
        canaries: The canaries, included or not.
    """

    test: IntArray
    test_is_official: bool
    public: IntArray
    train: Ragged
    own_test: Ragged
    canaries: Canaries

    def labels(self, y: IntArray) -> IntArray:
        """Return the labels that clients train on: ``y`` (n,) copied, with every canary's wrong label.

        Nothing else changes: no canary is in a test or in the public images, and an excluded one is in no part.

        Args:
            y: ``dataset.y``.
        """
        trained = y.copy()
        trained[self.canaries.index] = self.canaries.label
        return trained

    def counts(self, y: IntArray, num_classes: int) -> IntArray:
        """Return how many images of each true class each client has, training and own test together.

        Args:
            y: ``dataset.y``.
            num_classes: K.

        Returns:
            (clients, K).
        """
        held = (np.concatenate(pair) for pair in zip(self.train, self.own_test, strict=True))
        return np.array([np.bincount(y[index], minlength=num_classes) for index in held], np.int64)


def split(dataset: Dataset, spec: SplitSpec, seed: int) -> Split:
    """Split a data set; equal arguments give equal splits.

    Args:
        dataset: The data. Its official test set gives the global test if it has one.
        spec: How to split.
        seed: The run's seed.

    Raises:
        ConfigError: The data cannot be split so: too few images, too few of a class, too small clients, no natural
            clients, or a client that is left without training images by the canaries' coins.
    """
    test, public, pool = _held_out(dataset, spec, seed)
    pool = _natural_pool(dataset, pool, spec, seed)
    chosen = canary.choose(pool, spec.canaries, seed)
    wrong = canary.wrong_labels(dataset.y[chosen], dataset.num_classes, seed)
    parts = _parts(dataset, pool, _relabelled(dataset.y, chosen, wrong), spec, seed)
    own_test = Ragged(_own_test(dataset.y, part, chosen, spec, seed, client) for client, part in enumerate(parts))
    shadow, m = spec.coins, len(chosen)
    included = canary.coins(m, seed) if shadow is None else canary.shadow_coins(m, seed, shadow)
    planted = Canaries(chosen, wrong, _owners(parts, chosen), included)
    train = _train(parts, own_test, planted)
    return Split(test, dataset.test_y is not None, public, train, own_test, planted)


def _held_out(dataset: Dataset, spec: SplitSpec, seed: int) -> tuple[IntArray, IntArray, IntArray]:
    """Return the global test, the public images and what is left for the clients."""
    y, num_classes = dataset.y, dataset.num_classes
    pool = _limited(y, spec, num_classes, seed)
    if dataset.test_y is not None:
        test = _test(dataset.test_y, np.arange(len(dataset.test_y)), num_classes, spec, seed)
    else:
        test = _test(y, pool, num_classes, spec, seed)
        pool = np.setdiff1d(pool, test)
    public = _public(y, pool, num_classes, spec, seed)
    pool = np.setdiff1d(pool, public)
    if len(pool) < spec.clients * spec.min_size:
        raise ConfigError(
            f"clients: expected {spec.clients} x min_size={spec.min_size} images or more, got {len(pool)} "
            "after test and public; lower clients, min_size, test or public"
        )
    return test, public, pool


def _limited(y: IntArray, spec: SplitSpec, num_classes: int, seed: int) -> IntArray:
    """Return the images to use, all or a subset in which classes keep their proportions."""
    if spec.limit is None:
        return np.arange(len(y))
    if spec.limit > len(y):
        raise ConfigError(f"limit: expected at most {len(y)}, the images there are, got {spec.limit}; lower it")
    rng = generator(seed, "limit")
    quota = apportion(np.bincount(y, minlength=num_classes), spec.limit, rng)
    return _draw(y, np.arange(len(y)), quota, rng)


def _test(y: IntArray, pool: IntArray, num_classes: int, spec: SplitSpec, seed: int) -> IntArray:
    """Return the global test: as many of each class, give or take the one that does not divide."""
    rng = generator(seed, "test")
    have = np.bincount(y[pool], minlength=num_classes)
    if spec.test > len(pool):
        raise ConfigError(f"test: expected at most {len(pool)}, the images there are, got {spec.test}; lower it")
    quota = apportion(np.ones(num_classes), spec.test, rng, cap=have)
    if quota.max() - quota.min() > 1:
        scarce = int(np.argmin(have))
        raise ConfigError(
            f"test: expected {spec.test / num_classes:g} images of each of {num_classes} classes, got "
            f"{have[scarce]} of class {scarce}; lower test"
        )
    return _draw(y, pool, quota, rng)


def _public(y: IntArray, pool: IntArray, num_classes: int, spec: SplitSpec, seed: int) -> IntArray:
    if spec.public > len(pool):
        raise ConfigError(
            f"public: expected at most {len(pool)}, what the test leaves, got {spec.public}; lower test or it"
        )
    rng = generator(seed, "public")
    have = np.bincount(y[pool], minlength=num_classes)
    return _draw(y, pool, apportion(np.ones(num_classes), spec.public, rng, cap=have), rng)


def _draw(y: IntArray, pool: IntArray, quota: IntArray, rng: np.random.Generator) -> IntArray:
    """Return ``quota[k]`` random images of each class k from the pool, in ascending order."""
    chosen = [rng.choice(pool[y[pool] == k], quota[k], replace=False) for k in np.flatnonzero(quota)]
    return np.sort(np.concatenate([np.empty(0, np.int64), *chosen]))


def _natural_pool(dataset: Dataset, pool: IntArray, spec: SplitSpec, seed: int) -> IntArray:
    """Return the images of the natural clients to keep; the pool itself for the other partitions."""
    if spec.partition != "natural":
        return pool
    if dataset.groups is None:
        raise ConfigError(f"partition natural: expected data with natural clients, got {dataset.name}; choose another")
    rng = generator(seed, "natural clients")
    return pool[partition.choose_groups(dataset.groups[pool], spec.clients, spec.min_size, rng)]


def _owners(parts: Ragged, index: IntArray) -> IntArray:
    """Return the client of each image in ``index``."""
    images = parts.values
    clients = np.repeat(np.arange(len(parts)), parts.sizes)
    order = np.argsort(images)
    return clients[order[np.searchsorted(images[order], index)]]


def _relabelled(y: IntArray, index: IntArray, label: IntArray) -> IntArray:
    labels = y.copy()
    labels[index] = label
    return labels


def _parts(dataset: Dataset, pool: IntArray, labels: IntArray, spec: SplitSpec, seed: int) -> Ragged:
    """Return each client's images; canaries take part under their wrong label."""
    rng = generator(seed, "partition")
    held = labels[pool]
    alpha, classes = spec.alpha or 0.0, spec.classes or 0  # SplitSpec has checked that the needed one is there
    match spec.partition:
        case "iid":
            parts = partition.iid(len(pool), spec.clients, rng)
        case "dirichlet":
            parts = partition.dirichlet(held, spec.clients, alpha, spec.min_size, rng)
        case "quantity":
            parts = partition.quantity(len(pool), spec.clients, alpha, spec.min_size, rng)
        case "pathological":
            parts = partition.pathological(held, spec.clients, classes, rng)
        case "natural":
            groups = np.empty(0, np.int64) if dataset.groups is None else dataset.groups
            parts = partition.natural(groups[pool])
    smallest = int(parts.sizes.min())
    if smallest < spec.min_size:
        raise ConfigError(
            f"partition {spec.partition}: expected every client to have min_size={spec.min_size} images, got one of "
            f"{smallest}; lower min_size or clients"
        )
    return Ragged(pool[part] for part in parts)


def _own_test(y: IntArray, part: IntArray, canaries: IntArray, spec: SplitSpec, seed: int, client: int) -> IntArray:
    """Return the client's own test: classes in its proportions, no canary, and something left to train on."""
    rng = generator(seed, "own test", client=client)
    natural = np.setdiff1d(part, canaries)
    size = min(max(round(spec.test_fraction * len(part)), 1), len(part) - 1, len(natural))
    if spec.test_fraction == 0 or size == 0:
        return np.empty(0, np.int64)
    return _draw(y, natural, apportion(np.bincount(y[natural]), size, rng), rng)


def _train(parts: Ragged, own_test: Ragged, planted: Canaries) -> Ragged:
    """Return each client's training images: its own minus its own test and the canaries whose coin is out."""
    out = planted.index[~planted.included]
    train = Ragged(np.setdiff1d(np.setdiff1d(part, test), out) for part, test in zip(parts, own_test, strict=True))
    empty = np.flatnonzero(train.sizes == 0)
    if len(empty):
        raise ConfigError(
            f"canaries: expected every client to keep a training image, got none for client {empty[0]} after its "
            "coins; lower canaries or test_fraction, or raise min_size"
        )
    return train
