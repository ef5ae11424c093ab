"""Counter-based randomness: every draw is a pure function of (seed, purpose, round, client).

No generator is shared, so the numbers do not depend on the engine, the order of clients or the number of workers.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence


def generator(seed: int, purpose: str, round: int = 0, client: int = 0) -> np.random.Generator:
    """Return the generator of one purpose.

    Args:
        seed: The run's seed.
        purpose: What the numbers are for, for example ``"partition"``; two purposes are independent.
        round: Round, from 1; 0 outside rounds.
        client: Client id; 0 where no client is meant.

    Example:
        >>> a, b = (generator(0, "order", 3, 7).integers(1000, size=4).tolist() for _ in range(2))
        >>> a == b
        True
    """
    label = f"{seed}/{purpose}/{round}/{client}".encode()
    key = np.frombuffer(hashlib.sha256(label).digest()[:16], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(_Key(key)))  # type: ignore[arg-type]


class _Key(ISeedSequence):
    """A key as it is: ``Philox(key=...)`` is the same, but first asks the system for entropy that it does not use."""

    def __init__(self, key: np.ndarray) -> None:
        self.key = key

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        """The key, for Philox asks for two words of 64 bits."""
        return self.key
