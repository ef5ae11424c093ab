"""The checks that data from outside must pass: every failure is one line with what was expected, got and to do."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedkd.errors import ConfigError

CHANNELS = (1, 3)
"""Channel counts that are understood: greyscale and RGB."""


def images(x: NDArray[Any], where: str) -> NDArray[Any]:
    """Return a batch of images as (n, C, H, W), uint8 or float32.

    Args:
        x: (n, H, W), (n, H, W, C) or (n, C, H, W) with C = 1 or 3; uint8 in 0..255, or any float type.
        where: What the array is called in errors, for example ``"mine.npz: x"``.

    Raises:
        ConfigError: Another type or shape, no image at all, a channel axis that cannot be told, or a value that is
            not finite.
    """
    if x.dtype != np.uint8 and not np.issubdtype(x.dtype, np.floating):
        raise ConfigError(
            f"{where}: expected uint8 (0..255) or floating-point images, got {x.dtype}; cast them, for example with "
            "x.astype('uint8')"
        )
    batch = _channels_first(x, where)
    if 0 in batch.shape:
        raise ConfigError(f"{where}: expected at least one image with pixels, got shape {x.shape}; check the file")
    if batch.dtype == np.uint8:
        return np.ascontiguousarray(batch)
    if not np.isfinite(batch).all() or np.abs(batch).max() > np.finfo(np.float32).max:
        raise ConfigError(f"{where}: expected finite float32 values, got NaN, infinity or too large; clean the images")
    return np.ascontiguousarray(batch, dtype=np.float32)


def labels(y: NDArray[Any], count: int, where: str) -> NDArray[np.int64]:
    """Return labels as (n,) int64.

    Args:
        y: (n,) integers from 0.
        count: How many images there are, n.
        where: What the array is called in errors.

    Raises:
        ConfigError: Another type or shape, another length than ``count``, or a negative label.
    """
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        raise ConfigError(
            f"{where}: expected integer labels of shape (n,), got {y.dtype} of shape {y.shape}; "
            "give class numbers, not names or one-hot rows"
        )
    if len(y) != count:
        raise ConfigError(f"{where}: expected {count} labels, one an image, got {len(y)}; check that the files match")
    if y.min() < 0:
        raise ConfigError(f"{where}: expected labels from 0, got {y.min()}; renumber the classes 0..K-1")
    return y.astype(np.int64)


def shares(values: NDArray[Any], count: int, where: str) -> NDArray[np.float32]:
    """Return values in [0, 1], one an image, as (n,) float32; booleans become 0 and 1.

    Args:
        values: (n,) numbers or booleans.
        count: How many images there are, n.
        where: What the array is called in errors.

    Raises:
        ConfigError: Another shape, or a value outside [0, 1], NaN included.
    """
    if values.shape != (count,) or not (values.dtype == np.bool_ or np.issubdtype(values.dtype, np.number)):
        raise ConfigError(f"{where}: expected {count} numbers, one an image, got {values.dtype} {values.shape}")
    if not np.all((values >= 0) & (values <= 1)):
        raise ConfigError(f"{where}: expected values in [0, 1], got {values.min():g} to {values.max():g}; rescale them")
    return values.astype(np.float32)


def every_class(y: NDArray[np.int64], where: str) -> int:
    """Return the number of classes of training labels, after checking that none is empty.

    Raises:
        ConfigError: Fewer than two classes, or a gap (labels from 1 instead of 0 are the usual reason).
    """
    present = np.unique(y)
    if len(present) < 2:
        raise ConfigError(f"{where}: expected at least 2 classes, got {len(present)}; add images of another class")
    if present[-1] != len(present) - 1:
        missing = next(i for i, label in enumerate(present) if i != label)
        raise ConfigError(
            f"{where}: expected labels 0..K-1 without a gap, got {len(present)} classes in {present[0]}..{present[-1]} "
            f"and none with label {missing}; renumber the classes"
        )
    return len(present)


def groups(values: NDArray[Any], count: int, where: str) -> NDArray[np.int64]:
    """Return the natural clients as (n,) int64 ids, contiguous from 0, in sorted order of the given names.

    Args:
        values: (n,) integers or strings.
        count: How many images there are, n.
        where: What the array is called in errors.

    Raises:
        ConfigError: Another type, shape or length.
    """
    if values.shape != (count,) or values.dtype.kind not in "iuUS":
        raise ConfigError(
            f"{where}: expected integers or strings of shape ({count},), got {values.dtype} of shape {values.shape}; "
            "give one client id an image"
        )
    return np.unique(values, return_inverse=True)[1].astype(np.int64)


def _channels_first(x: NDArray[Any], where: str) -> NDArray[Any]:
    """Return (n, C, H, W); the channel axis is the only one of the two candidates that is 1 or 3 long."""
    if x.ndim == 3:
        return x[:, None]
    if x.ndim != 4:
        raise ConfigError(
            f"{where}: expected images (n, H, W), (n, H, W, C) or (n, C, H, W), got shape {x.shape}; reshape the array"
        )
    first, last = x.shape[1] in CHANNELS, x.shape[3] in CHANNELS
    if first == last:
        found = "both axes 1 and 3 have" if first else "neither axis 1 nor axis 3 has"
        raise ConfigError(
            f"{where}: expected one channel axis of length 1 or 3, got shape {x.shape} where {found} one; "
            "give greyscale as (n, H, W), or pad, crop or convert the images"
        )
    return x if first else x.transpose(0, 3, 1, 2)
