"""Pools: unlabelled, web-like images for a server without private data, decoded or rendered once."""

from __future__ import annotations

import contextlib
import difflib
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image

from fedkd.data import checks, glyphs, pictures
from fedkd.data.cache import Images, cached, frozen, stamp
from fedkd.data.datasets import ENVIRONMENT
from fedkd.errors import ConfigError
from fedkd.seeds import generator

IntArray = NDArray[np.int64]
Shape = tuple[int, int, int]

GLYPHS = 10_000
"""Glyphs in a pool whose limit is not given."""

IMAGENET32 = ("imagenet32_train_jpeg.npz", "imagenet32_classes.tsv")
CIFAR10_WNIDS = (
    "",  # airplane: none
    "n02814533 n03100240 n03670208 n04285008",  # automobile
    "n01855672 n02002724 n02056570 n02058221",  # bird
    "n02123045 n02123394 n02124075",  # cat
    "n02423022",  # deer
    "n02085620 n02094433 n02099601 n02099712 n02106662 n02113799",  # dog
    "n01641577 n01644900",  # frog
    "",  # horse: none
    "n03662601 n03447447",  # ship
    "n03796401 n03977966 n04487081 n04465501",  # truck
)
"""The ImageNet classes of the pool that are one of CIFAR-10's, by CIFAR-10's class."""


@dataclass(frozen=True, eq=False)
class Pool:
    """Images without labels, in the order of their source: shuffle before taking a part.

    Attributes:
        name: One of ``POOLS``.
        x: (m, C, H, W) uint8, read-only; a memory map unless a part was taken or the cache could not be written.
        labels: (m,) int64 true class of each image, -1 where it is none of the task's; None where nobody knows. For
            controlled experiments only, never handed to a method.
        source: Where it was found or how it was made.

    Raises:
        ConfigError: The arrays do not fit together.
    """

    name: str
    x: Images
    labels: IntArray | None
    source: str

    def __post_init__(self) -> None:
        if self.x.ndim != 4 or self.x.dtype != np.uint8:
            raise ConfigError(f"{self.name}: expected x (m, C, H, W) uint8, got {self.x.shape} {self.x.dtype}; convert")
        if self.labels is not None and (self.labels.shape != self.x.shape[:1] or self.labels.dtype != np.int64):
            raise ConfigError(
                f"{self.name}: expected {len(self.x)} int64 labels, got {self.labels.shape} {self.labels.dtype}; "
                "give one an image, -1 for none of the classes"
            )

    def __len__(self) -> int:
        return len(self.x)


def load(name: str, shape: Shape, path: Path | None = None, limit: int | None = None, seed: int = 0) -> Pool:
    """Load a pool at the task's shape.

    Whole images are scaled to the shape, so their proportions may change; colour becomes grey and grey becomes
    colour. All images are decoded and cached before ``limit`` takes its part.

    Args:
        name: A key of ``POOLS``.
        shape: (C, H, W) of the task's inputs, C 1 or 3.
        path: For ``files`` the folder or ``.npz``, needed; for ``imagenet32`` its file or folder instead of
            ``FEDKD_DATA``; refused by ``glyphs``.
        limit: Use so many images, a random part of those there are; of ``glyphs`` the first so many, of which there
            is no end (``GLYPHS`` if it is not given).
        seed: The run's seed, for the part that is taken and for what is rendered.

    Raises:
        ConfigError: Unknown name, a shape that images do not have, a pool that is missing or broken (the message
            names the file), fewer images than ``limit``.

    Example:
        >>> pool = load("glyphs", (1, 8, 8), limit=5)
        >>> pool.x.shape, pool.labels.tolist()
        ((5, 1, 8, 8), [1, 5, 0, 7, 3])
    """
    if name not in POOLS:
        near = difflib.get_close_matches(name, POOLS) or sorted(POOLS)
        raise ConfigError(f"pool {name!r}: expected a known name, got another; did you mean {', '.join(near)}?")
    if len(shape) != 3 or shape[0] not in checks.CHANNELS or min(shape) < 1:
        raise ConfigError(f"pool {name}: expected a shape (1 or 3, height, width), got {shape}; a pool holds images")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit: expected 1 or more, got {limit}; raise it or leave it out")
    path = None if path is None else Path(path).expanduser().absolute()
    if name == "glyphs":
        return _glyphs(shape, path, GLYPHS if limit is None else limit, seed)
    pool = (_imagenet32 if name == "imagenet32" else _files)(shape, path)
    return pool if limit is None else _part(pool, limit, generator(seed, "pool limit"))


POOLS: Mapping[str, str] = MappingProxyType(
    {
        "imagenet32": "100,000 32x32 pictures of 200 ImageNet classes, 13 % of them of a class of cifar10",
        "glyphs": "digits rendered from fonts (pip install 'fedkd[glyphs]' for more of them), for tasks of digits",
        "files": "your own images by path: a folder of pictures, at any depth, or an .npz file",
    }
)
"""What ``load`` knows, and one true line about it."""


def _part(pool: Pool, limit: int, rng: np.random.Generator) -> Pool:
    """Return ``limit`` random images, in the pool's order."""
    if limit > len(pool):
        raise ConfigError(f"limit: expected at most {len(pool)}, the images of the pool, got {limit}; lower it")
    index = np.sort(rng.choice(len(pool), limit, replace=False))
    labels = None if pool.labels is None else pool.labels[index]
    return replace(pool, x=frozen(np.asarray(pool.x[index])), labels=labels)


# The pools


def _imagenet32(shape: Shape, path: Path | None) -> Pool:
    variable = os.environ.get(ENVIRONMENT)
    base = path if path is not None else Path(variable).expanduser().absolute() if variable else None
    file = base / IMAGENET32[0] if base is not None and base.is_dir() else base
    if file is None or not file.is_file():
        sought = f"{ENVIRONMENT}/{IMAGENET32[0]} (it is not set)" if file is None else file
        raise ConfigError(
            f"imagenet32: expected {sought}, got nothing there; set {ENVIRONMENT} to the folder with that file"
        )
    x = cached("imagenet32", (shape, stamp([file])), lambda: _archive(file, shape))
    source = file.name if path is not None else f"{ENVIRONMENT}/{file.name}"
    return Pool("imagenet32", x, _cifar10_labels(file, len(x)), source)


def _cifar10_labels(file: Path, count: int) -> IntArray | None:
    """Return CIFAR-10's class of each image, -1 for none of them; None without the list of the classes."""
    names = file.with_name(IMAGENET32[1])
    if not names.is_file():
        return None
    cifar10 = {wnid: label for label, wnids in enumerate(CIFAR10_WNIDS) for wnid in wnids.split()}
    table = np.array([cifar10.get(line.split("\t")[0], -1) for line in names.read_text("utf-8").splitlines()], np.int64)
    with _archived(file) as archive:
        labels = checks.labels(archive["label"], count, f"{file}: label")
    if labels.max() >= len(table):
        raise ConfigError(f"{names}: expected {labels.max() + 1} classes or more, got {len(table)}; use {file.name}'s")
    return table[labels]


def _glyphs(shape: Shape, path: Path | None, count: int, seed: int) -> Pool:
    if path is not None:
        raise ConfigError(f"glyphs: expected no path, they are rendered, got {path}; use the pool 'files'")
    fonts = glyphs.fonts()
    drawn = glyphs.draw(glyphs.DIGITS, count, generator(seed, "glyphs"))
    key = (shape, count, seed, fonts.source, glyphs.SETTINGS, PIL.__version__)
    x = cached("glyphs", key, lambda: rendered(glyphs.DIGITS, drawn, fonts, shape))
    return Pool("glyphs", x, drawn.character, f"rendered from {fonts.source}")


def rendered(alphabet: str, drawn: glyphs.Glyphs, fonts: glyphs.Fonts, shape: Shape) -> Images:
    """Glyphs as images (m, C, H, W), grey in all channels."""
    grey = glyphs.render(alphabet, drawn, fonts, *shape[1:])
    return np.repeat(grey[:, None], shape[0], axis=1)


def _files(shape: Shape, path: Path | None) -> Pool:
    if path is None:
        raise ConfigError("pool files: expected the path of your images, got none; give a folder or an .npz file")
    if path.is_file() and path.suffix == ".npz":
        x = cached("files", (shape, stamp([path])), lambda: _archive(path, shape))
    elif path.is_dir():
        files = _pictures(path)
        x = cached("files", (shape, stamp(files)), lambda: _decoded(files, shape))
    else:
        found = "another file" if path.exists() else "nothing there"
        raise ConfigError(f"{path}: expected a folder of images or an .npz file, got {found}; check the path")
    return Pool("files", x, None, path.name or str(path))


# Decoding


def _pictures(folder: Path) -> list[Path]:
    """Return the picture files of a folder and its sub-folders, hidden ones left out, in order of their names."""
    found: list[str] = []
    for base, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        shown = (name for name in names if not name.startswith("."))
        found += [f"{base}/{name}" for name in shown if name.lower().endswith(tuple(pictures.SUFFIXES))]
    if not found:
        raise ConfigError(
            f"{folder}: expected image files ({', '.join(sorted(pictures.SUFFIXES))}), got none; add some"
        )
    return [Path(name) for name in sorted(found)]


def _decoded(files: Sequence[Path], shape: Shape) -> Images:
    x = np.empty((len(files), *shape), np.uint8)
    for i, file in enumerate(files):
        try:
            with Image.open(file) as image:
                if image.mode not in ("1", "L", "P", "RGB", "CMYK", "YCbCr") or "transparency" in image.info:
                    raise ConfigError(
                        f"{file}: expected 8-bit greyscale or colour without transparency, got mode {image.mode}; "
                        "convert or remove it"
                    )
                image.draft(_mode(shape), (2 * shape[2], 2 * shape[1]))  # JPEG is decoded no larger than it need be
                x[i] = _fitted(image, shape)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ConfigError(f"{file}: expected an image, got a file that cannot be read; remove it") from error
    return x


def _archive(path: Path, shape: Shape) -> Images:
    """Return the images of an ``.npz`` file: ``x`` or ``x_train``, or ``jpeg`` and ``offset``."""
    with _archived(path) as archive:
        key = next((key for key in ("x", "x_train", "jpeg") if key in archive), None)
        if key is None or (key == "jpeg" and "offset" not in archive):
            raise ConfigError(f"{path}: expected the key x (or jpeg and offset), got {sorted(archive)}; rename it")
        stored = archive[key]
        x = pictures.jpegs(stored, archive["offset"], str(path)) if key == "jpeg" else stored
    x = checks.images(x, f"{path}: {key}")
    if x.dtype != np.uint8:
        raise ConfigError(f"{path}: expected uint8 images (0..255), got {x.dtype}; scale and cast them")
    if x.shape[1:] == shape:
        return x
    rows = (Image.fromarray(row[0] if len(row) == 1 else np.ascontiguousarray(row.transpose(1, 2, 0))) for row in x)
    return np.stack([_fitted(row, shape) for row in rows])


@contextlib.contextmanager
def _archived(path: Path) -> Iterator[Mapping[str, NDArray[Any]]]:
    """Open an ``.npz`` file; what numpy raises on a broken one becomes one line."""
    broken = (OSError, EOFError, ValueError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error)
    try:
        # Opened here, since numpy leaves a file open that turns out to be no archive.
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ConfigError(f"{path}: expected an .npz archive, got a single array; use numpy.savez(x=...)")
            with archive:
                yield archive
    except broken as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{path}: expected an .npz file without pickled objects, got {reason}; replace it") from error


def _mode(shape: Shape) -> str:
    return "L" if shape[0] == 1 else "RGB"


def _fitted(image: Image.Image, shape: Shape) -> Images:
    """Return one image as (C, H, W)."""
    size = (shape[2], shape[1])
    image = image.convert(_mode(shape))
    pixels = np.asarray(image if image.size == size else image.resize(size, Image.Resampling.BICUBIC))
    return pixels[None] if shape[0] == 1 else pixels.transpose(2, 0, 1)
