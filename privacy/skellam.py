"""The Skellam mechanism for sums under secure aggregation: whole numbers, and noise that clients add in shares.

Agarwal, Kairouz, Liu; NeurIPS 2021; arXiv:2110.04995. Each client clips, scales and rounds its vector and adds a share
of the noise, a difference of two Poissons; the shares' sum is a Skellam of the full variance, exactly. What a release
costs says ``privacy.releases.skellam``, for the same clip and scale. Not covered: clients that drop out take their
share of the noise with them, so that the variance to account for is that of the shares that arrived.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from privacy.arguments import integer, positive


def share(rng: np.random.Generator, variance: float, cohort: int, shape: tuple[int, ...]) -> NDArray[np.int64]:
    """One client's share of noise whose sum over ``cohort`` clients has this variance in each coordinate.

    Args:
        rng: The client's own generator.
        variance: Of the sum, in units of the rounded numbers; the paper's mu.
        cohort: Clients that add a share.
        shape: Of the vector.

    Raises:
        ConfigError: The variance is not positive, or there is no client.
    """
    half = positive("variance", variance) / (2 * integer("cohort", cohort, 1))
    return rng.poisson(half, shape) - rng.poisson(half, shape)


def quantise(x: NDArray[np.floating], scale: float, clip: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """Clip ``x`` to L2 norm ``clip``, scale it, and round each number up or down so that its mean stays as it is.

    Args:
        x: Numbers of any shape; one vector as a whole. NaN and infinities become 0, since a refusal would tell.
        scale: Steps of the grid in one unit of ``x``.
        clip: L2 bound of ``x``.
        rng: For the rounding.

    Returns:
        Whole numbers of the same shape and of L2 norm ``scale * clip + sqrt(x.size)`` at most.

    Raises:
        ConfigError: Scale or clip are not positive and finite.

    Example:
        >>> quantise(np.array([3.0, 4.0]), scale=10.0, clip=2.5, rng=np.random.default_rng(0)).tolist()
        [15, 20]
    """
    scale, clip = positive("scale", scale), positive("clip", clip)
    finite = np.nan_to_num(np.asarray(x, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    largest = float(np.abs(finite).max(initial=0.0))
    norm = largest * float(np.linalg.norm(finite / largest)) if largest else 0.0  # squares of large numbers overflow
    scaled = finite * (scale * min(1.0, clip / norm if norm else math.inf))
    low = np.floor(scaled)
    return (low + (rng.random(scaled.shape) < scaled - low)).astype(np.int64)


def dequantise(total: NDArray[np.int64], scale: float) -> NDArray[np.float64]:
    """Whole numbers, or a sum of them, in the units they had before `quantise`.

    Raises:
        ConfigError: The scale is not positive and finite.
    """
    return total / positive("scale", scale)
