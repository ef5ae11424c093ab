"""Trouble planted on purpose, for controlled experiments: images far from the task, a teacher that is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fedkd.data import glyphs
from fedkd.data.cache import Images, frozen
from fedkd.data.pools import Pool, Shape, rendered
from fedkd.errors import ConfigError

BoolArray = NDArray[np.bool_]
Far = Literal["textures", "letters", "noise"]
Errors = Literal["random", "hardest"]


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
    return replace(pool, x=frozen(x), labels=labels, source=f"{pool.source}; {count} replaced by {kind}"), far


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
    return rendered(glyphs.LETTERS, glyphs.draw(glyphs.LETTERS, count, rng), glyphs.fonts(), shape)


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
