"""Pools: unlabelled, web-like images for a server without private data, and trouble planted in them for experiments.

What has been decoded, resized or rendered is kept as an uint8 memory map in the folder that the environment variable
``FEDKD_CACHE`` names, else in ``~/.cache/fedkd``, so that it happens once.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image

from fedkd.data import checks, glyphs, pictures
from fedkd.data.datasets import ENVIRONMENT
from fedkd.errors import ConfigError
from fedkd.seeds import generator

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
Images = NDArray[np.uint8]
Shape = tuple[int, int, int]
Far = Literal["textures", "letters", "noise"]
Errors = Literal["random", "hardest"]

CACHE = "FEDKD_CACHE"
RECIPE = 1
"""To be raised when images come to be decoded, resized or rendered differently, so that old caches are left alone."""
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
    return replace(pool, x=_frozen(np.asarray(pool.x[index])), labels=labels)


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
    x = _cached("imagenet32", (shape, _stamp([file])), lambda: _archive(file, shape))
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
    x = _cached("glyphs", key, lambda: _rendered(glyphs.DIGITS, drawn, fonts, shape))
    return Pool("glyphs", x, drawn.character, f"rendered from {fonts.source}")


def _rendered(alphabet: str, drawn: glyphs.Glyphs, fonts: glyphs.Fonts, shape: Shape) -> Images:
    grey = glyphs.render(alphabet, drawn, fonts, *shape[1:])
    return np.repeat(grey[:, None], shape[0], axis=1)


def _files(shape: Shape, path: Path | None) -> Pool:
    if path is None:
        raise ConfigError("pool files: expected the path of your images, got none; give a folder or an .npz file")
    if path.is_file() and path.suffix == ".npz":
        x = _cached("files", (shape, _stamp([path])), lambda: _archive(path, shape))
    elif path.is_dir():
        files = _pictures(path)
        x = _cached("files", (shape, _stamp(files)), lambda: _decoded(files, shape))
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


# The cache


def _stamp(files: Sequence[Path]) -> list[tuple[str, int, int]]:
    """Return what changes when a file does: its full name, size and time of change."""
    stamps = []
    for file in files:
        try:
            state = file.stat()
        except OSError as error:
            raise ConfigError(f"{file}: expected a file, got {error.strerror}; remove or replace it") from error
        stamps.append((str(file), state.st_size, state.st_mtime_ns))
    return stamps


def _cached(name: str, key: object, make: Callable[[], Images]) -> Images:
    """Return the images of a key, read-only: from the cache, else made and kept there."""
    file = _cache_folder() / f"{name}-{hashlib.sha256(repr((RECIPE, key)).encode()).hexdigest()[:24]}.npy"
    if (kept := _kept(file)) is not None:
        return kept
    x = make()
    try:
        _keep(file, x)
    except OSError as error:
        warnings.warn(f"pool {name}: expected a cache folder to write to, got {error}; set {CACHE}", stacklevel=2)
        return _frozen(x)
    kept = _kept(file)
    return _frozen(x) if kept is None else kept


def _cache_folder() -> Path:
    try:
        return Path(os.environ.get(CACHE) or "~/.cache/fedkd").expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{CACHE}: expected a folder or a user with a home, got neither; set it") from error


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


def _frozen(x: Images) -> Images:
    x.flags.writeable = False
    return x


# Planted trouble


def with_far(pool: Pool, share: float, kind: Far, rng: np.random.Generator) -> tuple[Pool, BoolArray]:
    """Replace a share of a pool's images by images that are far from every class of the task.

    Args:
        pool: m images.
        share: Of the images, in [0, 1]; rounded to whole images, chosen uniformly.
        kind: ``textures`` (three plane waves of random direction and frequency between two random colours),
            ``letters`` (rendered from fonts, those that look like digits left out) or ``noise`` (independent uniform
            pixels).
        rng: Chooses and makes them.

    Returns:
        The pool, in memory, with label -1 where labels are known; and (m,) which images are far.

    Raises:
        ConfigError: A share out of range or an unknown kind.
    """
    _check_plan("share", share, kind, get_args(Far))
    count = round(share * len(pool))
    far = _some(len(pool), count, rng)
    x = np.array(pool.x)
    x[far] = _FAR[kind](count, x.shape[1:], rng)
    labels = None if pool.labels is None else np.where(far, -1, pool.labels)
    return replace(pool, x=_frozen(x), labels=labels, source=f"{pool.source}; {count} replaced by {kind}"), far


def wrong_teacher(
    answers: NDArray[np.floating[Any]],
    rate: float,
    kind: Errors,
    rng: np.random.Generator,
    margin: NDArray[np.floating[Any]] | None = None,
) -> tuple[NDArray[np.floating[Any]], BoolArray]:
    """Make a teacher err: its value for the class it names is exchanged with that of another, uniformly drawn class.

    An exchange keeps what a row sums to and how sure it is. What counts as an error is an answer unlike the given one:
    start from a teacher that is right (one-hot labels, for example) where the rate must be exact.

    Args:
        answers: (n, K) logits or soft labels; the answer is the class with the largest value, the first of equals.
        rate: Share of wrong answers, in [0, 1]; rounded to whole answers.
        kind: ``random`` errs on uniformly chosen points, ``hardest`` on those with the smallest margins.
        rng: Chooses the points or breaks ties of their margins, and chooses the classes.
        margin: (n,) for ``hardest``: how easy each point is, for example a model's top probability minus its second.
            None takes the gap between the two largest values of ``answers``.

    Returns:
        (n, K) the answers, a copy of the same type; and (n,) which are wrong.

    Raises:
        ConfigError: A rate out of range, an unknown kind, answers or margins of another shape, not finite, without a
            largest class, or with equal margins throughout (as one-hot answers have) where they must tell points apart.
    """
    _check_plan("rate", rate, kind, get_args(Errors))
    if answers.ndim != 2 or answers.shape[1] < 2 or not np.isfinite(answers).all():
        raise ConfigError(f"answers: expected finite values (n, K >= 2), got shape {answers.shape}; give logits")
    rows, top = np.arange(len(answers)), answers.argmax(1)
    best = answers[rows, top]
    lower = answers < best[:, None]
    if not lower.any(1).all():
        raise ConfigError(
            f"answers: expected a largest class, got equal values in row {lower.any(1).argmin()}; drop it"
        )
    count = round(rate * len(answers))
    wrong = _some(len(answers), count, rng) if kind == "random" else _hardest(answers, count, margin, rng)
    # A class that shares the first place would leave the answer's value where it is.
    other = np.where(lower, rng.random(answers.shape), -1.0).argmax(1)
    planted = answers.copy()
    planted[rows[wrong], top[wrong]] = answers[rows, other][wrong]
    planted[rows[wrong], other[wrong]] = best[wrong]
    return planted, wrong


def _check_plan(name: str, share: float, kind: str, kinds: Sequence[str]) -> None:
    if not 0 <= share <= 1:
        raise ConfigError(f"{name}: expected a share in [0, 1], got {share}; choose within")
    if kind not in kinds:
        raise ConfigError(f"kind: expected one of {', '.join(kinds)}, got {kind!r}; choose one")


def _some(n: int, count: int, rng: np.random.Generator) -> BoolArray:
    """Return ``count`` of n places, uniformly."""
    some = np.zeros(n, np.bool_)
    some[rng.choice(n, count, replace=False)] = True
    return some


def _hardest(
    answers: NDArray[np.floating[Any]],
    count: int,
    margin: NDArray[np.floating[Any]] | None,
    rng: np.random.Generator,
) -> BoolArray:
    """Return the ``count`` points with the smallest margins."""
    if margin is None:
        second, first = np.partition(answers, (-2, -1), axis=1)[:, -2:].T
        margin = first - second
    if margin.shape != (len(answers),) or not np.isfinite(margin).all():
        raise ConfigError(f"margin: expected {len(answers)} finite values, got shape {margin.shape}; give one a point")
    if 0 < count < len(margin) and margin.min() == margin.max():
        raise ConfigError(
            "margin: expected values that tell hard points from easy ones, got equal ones; give a model's"
        )
    hardest = np.zeros(len(margin), np.bool_)
    hardest[np.lexsort((rng.random(len(margin)), margin))[:count]] = True
    return hardest


# Far images


def _noise(count: int, shape: Shape, rng: np.random.Generator) -> Images:
    return rng.integers(0, 256, (count, *shape), np.uint8)


def _letters(count: int, shape: Shape, rng: np.random.Generator) -> Images:
    return _rendered(glyphs.LETTERS, glyphs.draw(glyphs.LETTERS, count, rng), glyphs.fonts(), shape)


def _textures(count: int, shape: Shape, rng: np.random.Generator) -> Images:
    x = np.empty((count, *shape), np.uint8)
    for start in range(0, count, 1000):  # the waves of a whole pool in floating point would fill the memory
        block = x[start : start + 1000]
        block[:] = _waves(len(block), shape, rng)
    return x


def _waves(count: int, shape: Shape, rng: np.random.Generator) -> NDArray[np.float32]:
    """Return (count, C, H, W) in 0..255: sums of three plane waves of 1 to max(2, side / 3) periods an image."""
    channels, height, width = shape
    side = max(height, width)
    size = (count, 3, 1)
    angular = 2 * np.pi * rng.uniform(1, max(2, side / 3), size) / side
    direction, phase = rng.uniform(0, 2 * np.pi, (2, *size))
    across = np.exp(1j * angular * np.cos(direction) * np.arange(width))
    down = np.exp(1j * (angular * np.sin(direction) * np.arange(height) + phase))
    field = (down.swapaxes(1, 2) @ across).real[:, None].astype(np.float32)  # cos(a + b) is the real part of a product
    contrast = rng.uniform(0.3, 3, (count, 1, 1, 1)).astype(np.float32)
    one = rng.uniform(0, 255, (count, channels, 1, 1)).astype(np.float32)
    other = (one + rng.uniform(64, 191, one.shape).astype(np.float32)) % 255  # never much alike: the wave shows
    mixed: NDArray[np.float32] = one + (other - one) * (1 + np.tanh(contrast * field)) / 2
    return mixed


_FAR: Mapping[str, Callable[[int, Shape, np.random.Generator], Images]] = MappingProxyType(
    {"textures": _textures, "letters": _letters, "noise": _noise}
)
