"""What has been decoded, resized or rendered once is kept as an uint8 memory map.

It lies in the folder that the environment variable ``FEDKD_CACHE`` names, else in ``~/.cache/fedkd``. Where the folder
cannot be written, everything still works, in memory.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedkd.errors import ConfigError

Images = NDArray[np.uint8]

FOLDER = "FEDKD_CACHE"
RECIPE = 1
"""To be raised when images come to be decoded, resized or rendered differently, so that old caches are left alone."""


def stamp(files: Sequence[Path]) -> list[tuple[str, int, int]]:
    """Return what changes when a file does: its full name, size and time of change."""
    stamps = []
    for file in files:
        try:
            state = file.stat()
        except OSError as error:
            raise ConfigError(f"{file}: expected a file, got {error.strerror}; remove or replace it") from error
        stamps.append((str(file), state.st_size, state.st_mtime_ns))
    return stamps


def cached(name: str, key: object, make: Callable[[], Images]) -> Images:
    """Return the images of a key, read-only: from the cache, else made and kept there."""
    file = _cache_folder() / f"{name}-{hashlib.sha256(repr((RECIPE, key)).encode()).hexdigest()[:24]}.npy"
    if (kept := _kept(file)) is not None:
        return kept
    x = make()
    try:
        _keep(file, x)
    except OSError as error:
        warnings.warn(f"pool {name}: expected a cache folder to write to, got {error}; set {FOLDER}", stacklevel=2)
        return frozen(x)
    kept = _kept(file)
    return frozen(x) if kept is None else kept


def _cache_folder() -> Path:
    try:
        return Path(os.environ.get(FOLDER) or "~/.cache/fedkd").expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{FOLDER}: expected a folder or a user with a home, got neither; set it") from error


def _kept(file: Path) -> Images | None:
    """Return a cached file as a memory map; None if there is none or it is broken."""
    try:
        x = np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception:  # numpy may raise nearly anything on a broken header
        return None
    return x if isinstance(x, np.memmap) and x.ndim == 4 and x.dtype == np.uint8 else None


def _keep(file: Path, x: Images) -> None:
    """Write a cached file beside its place and rename it, so that nobody ever sees a part of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(f".{os.urandom(8).hex()}")
    try:
        with beside.open("xb") as stream:
            np.save(stream, x)
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)


def frozen(x: Images) -> Images:
    """Make images read-only, and return them."""
    x.flags.writeable = False
    return x
