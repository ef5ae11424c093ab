"""Decode pictures: a folder with one sub-folder a class, and JPEG images stored end to end."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedkd.errors import ConfigError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".pgm", ".ppm", ".tif", ".tiff"})
"""Files with another ending (notes, thumbnails' data bases) are not taken for images."""

IntArray = NDArray[np.int64]
Images = NDArray[np.uint8]


def folder(path: Path) -> tuple[Images, IntArray, None, Images | None, IntArray | None]:
    """Read a folder of images: sub-folders are the classes, numbered in sorted order of their names.

    A folder that holds ``train`` and ``test`` is read as a training set and an official test set of the same classes.

    Args:
        path: The folder. All images must have one size; they become greyscale when all are, else RGB.

    Returns:
        x (n, C, H, W), y (n,), None (a folder has no natural clients), and the test set's x and y, or None.

    Raises:
        ConfigError: No classes or images, an image of another size, an unreadable or transparent one.
    """
    parts = [path / "train", path / "test"]
    official = all(part.is_dir() for part in parts)
    classes = _subfolders(parts[0] if official else path)
    if not classes:
        raise ConfigError(
            f"{path}: expected IDX files (train-images-idx3-ubyte), CIFAR-10 batches (data_batch_1) or one sub-folder "
            "of images a class, got none of them; check the path"
        )
    files, y = _listed(parts[0] if official else path, classes, empty=False)
    if not official:
        return _decode(files), y, None, None, None
    test_files, test_y = _listed(parts[1], classes, empty=True)
    x = _decode(files + test_files)
    return x[: len(files)], y, None, x[len(files) :], test_y


def jpegs(data: NDArray[Any], offset: NDArray[Any], where: str) -> Images:
    """Decode RGB JPEG images of one size.

    Args:
        data: (bytes,) uint8, the files end to end.
        offset: (n + 1,) integers; image i is ``data[offset[i]:offset[i + 1]]``.
        where: What the file is called in errors.

    Returns:
        (n, 3, H, W).

    Raises:
        ConfigError: The offsets do not fit, or an image is broken or of another size.
    """
    bounds = offset.tolist() if offset.ndim == 1 and offset.dtype.kind in "iu" and data.dtype == np.uint8 else []
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != data.size or np.any(np.diff(offset) <= 0):
        raise ConfigError(
            f"{where}: expected offsets that rise from 0 to {data.size}, got others; write the file again"
        )
    view = memoryview(data.tobytes())
    images: Images | None = None
    for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
        pixels = _jpeg(view[start:stop], f"{where}: image {i}")
        if images is None:
            images = np.empty((len(bounds) - 1, *pixels.shape), np.uint8)
        if pixels.shape != images.shape[1:]:
            raise ConfigError(
                f"{where}: expected images of {images.shape[1:3]}, got {pixels.shape[:2]} at image {i}; resize them"
            )
        images[i] = pixels
    if images is None:
        raise ConfigError(f"{where}: expected at least one image, got none; write the file again")
    return images.transpose(0, 3, 1, 2)


def _jpeg(data: memoryview, where: str) -> Images:
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except (OSError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{where}: expected a JPEG image, got a broken one; write the file again") from error


def _subfolders(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _listed(path: Path, classes: Sequence[str], *, empty: bool) -> tuple[list[Path], IntArray]:
    """Return the image files in sorted order and their labels; a class may be ``empty`` (in a test set)."""
    extra = set(_subfolders(path)) - set(classes)
    if extra:
        raise ConfigError(f"{path}: expected the classes of the training set, got {min(extra)} too; remove it")
    files: list[Path] = []
    y: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(p for p in (path / name).glob("*") if p.suffix.lower() in SUFFIXES and p.name[0] != ".")
        if not found and not empty:
            raise ConfigError(f"{path / name}: expected images of one class, got none; add some or remove the folder")
        files += found
        y += [label] * len(found)
    return files, np.array(y, np.int64)


def _decode(files: Sequence[Path]) -> Images:
    """Return (n, C, H, W): greyscale when every image is."""
    pixels = [_pixels(file) for file in files]
    grey = all(p.ndim == 2 for p in pixels)
    for file, p in zip(files, pixels, strict=True):
        if p.shape[:2] != pixels[0].shape[:2]:
            (h, w), (height, width) = p.shape[:2], pixels[0].shape[:2]
            raise ConfigError(
                f"{file}: expected {width}x{height} pixels as in {files[0].name}, got {w}x{h}; resize the images"
            )
    if grey:
        return np.stack(pixels)[:, None]
    return np.stack([p if p.ndim == 3 else np.repeat(p[:, :, None], 3, axis=2) for p in pixels]).transpose(0, 3, 1, 2)


def _pixels(file: Path) -> Images:
    """Return (H, W) of a greyscale or (H, W, 3) of a colour image; nothing is dropped silently, alpha neither."""
    try:
        with Image.open(file) as image:
            if image.mode not in ("1", "L", "P", "RGB") or "transparency" in image.info:
                raise ConfigError(f"{file}: expected 8-bit greyscale or RGB, got mode {image.mode}; convert the image")
            return np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{file}: expected an image, got a file that cannot be read; remove or replace it") from error
