"""Canaries: natural images with a wrong label, planted with a coin each, to measure what a federation leaks.

A model has no reason to know a wrong label except from having trained on it, so an auditor who sees how models treat
canaries whose coin came up and canaries whose coin did not measures memory and nothing else. For that the coin must
be fair and independent of all else: the image, the wrong label and the owner are settled before the coin is looked at.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedkd.errors import ConfigError
from fedkd.seeds import generator

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Canaries:
    """The canaries of a split; secret from everybody but the clients and the auditor.

    Attributes:
        index: (m,) positions in ``dataset.x``, all different.
        label: (m,) the wrong label, uniform over the other classes.
        owner: (m,) client whose training set the canary belongs to.
        included: (m,) independent fair coins: False means that nobody trains on it, its owner neither.
    """

    index: IntArray
    label: IntArray
    owner: IntArray
    included: BoolArray

    def __len__(self) -> int:
        return len(self.index)


def choose(pool: IntArray, count: int, seed: int) -> IntArray:
    """Return ``count`` different images, uniformly from the pool.

    Args:
        pool: (n,) positions in ``dataset.x``.
        count: How many, m.
        seed: The run's seed.

    Raises:
        ConfigError: More canaries than images.
    """
    if count > len(pool):
        raise ConfigError(f"canaries: expected at most {len(pool)}, the images of the clients, got {count}; lower it")
    return generator(seed, "canary choice").choice(pool, count, replace=False)


def wrong_labels(y: IntArray, num_classes: int, seed: int) -> IntArray:
    """Return for each true label in ``y`` (m,) another class, uniformly."""
    shift = generator(seed, "canary label").integers(1, num_classes, size=len(y))
    return (y + shift) % num_classes


def shadow_coins(count: int, seed: int, shadow: int) -> BoolArray:
    """Return the fair coins of one shadow of the run, independent of one another and of the run's own.

    Shadow 2 is the opposite of shadow 1, 4 of 3, and so on: of an even number from 1, exactly half saw each canary.

    Args:
        count: How many, m.
        seed: The run's seed.
        shadow: Which shadow, from 1.
    """
    pair, opposite = divmod(shadow - 1, 2)
    drawn = generator(seed, "canary coin", round=pair + 1).integers(0, 2, size=count).astype(np.bool_)
    return ~drawn if opposite else drawn


def coins(count: int, seed: int) -> BoolArray:
    """Return ``count`` independent fair coins; a purpose of their own makes them independent of every other draw."""
    return generator(seed, "canary coin").integers(0, 2, size=count).astype(np.bool_)
