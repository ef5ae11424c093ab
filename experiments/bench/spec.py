"""What is measured: works, and the contenders that do the same work."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Step = Callable[[], float]
"""Does the work once and returns what it took, in the work's unit."""

Open = Callable[[], AbstractContextManager[Step]]
"""Gets a contender ready; whatever it started ends with the context."""


class Unavailable(Exception):
    """A contender that cannot run here; its message says why, in the table."""


@dataclass(frozen=True)
class Reach:
    """What a contender should reach.

    Attributes:
        limit: At most this.
        of: ``"value"`` in the work's unit, or ``"ratio"`` to the work's reference.
    """

    limit: float
    of: Literal["value", "ratio"]


@dataclass(frozen=True)
class Contender:
    """One way to do a work.

    Attributes:
        name: Short and unique within its work.
        about: What it is, in one line.
        ours: Whether it is this package, rather than something to compare it with.
    """

    name: str
    about: str
    open: Open
    reach: Reach | None = None
    ours: bool = True


@dataclass(frozen=True)
class Settings:
    """How a bench is run.

    Attributes:
        folder: Scratch space; synthetic data and apps' outputs go here.
        quick: Whether sizes are small enough for a test; the figures mean nothing then.
        ray: Whether Flower's Ray runtime takes part.
    """

    folder: Path
    seed: int = 0
    quick: bool = False
    ray: bool = True

    def size(self, full: int, quick: int) -> int:
        """One of two sizes."""
        return quick if self.quick else full


@dataclass(frozen=True)
class Work:
    """Something to do, and who does it.

    Attributes:
        name: As on the command line.
        what: One line about it; ``sizes`` has the numbers.
        reference: Name of the contender that counts as 1.0x; None where there is none.
        sizes: The numbers that define it, under the given settings.
        contenders: Who does it; run in this order, again and again.
        warm: Whether the first time is different and kept apart.
        most: Repeats at most; for works that start processes.
    """

    name: str
    what: str
    reference: str | None
    sizes: Callable[[Settings], dict[str, int]]
    contenders: Callable[[Settings], Sequence[Contender]]
    unit: Literal["s", "MB"] = "s"
    warm: bool = True
    most: int | None = None


def timed(act: Callable[[], object]) -> Step:
    """A step that times ``act`` in this process."""

    def step() -> float:
        start = time.perf_counter()
        act()
        return time.perf_counter() - start

    return step
