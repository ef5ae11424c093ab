"""Measure works: contenders take turns, so that a noisy machine is noisy for all of them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from experiments.bench.spec import Contender, Reach, Settings, Step, Unavailable, Work

Tell = Callable[[str], None]


@dataclass
class Measured:
    """What one contender took.

    Attributes:
        first: The first time; None where it is not kept apart.
        samples: The others, in turn.
        trouble: Why it was left out or stopped; None when all went well.
    """

    contender: Contender
    first: float | None = None
    samples: list[float] = field(default_factory=list)
    trouble: str | None = None


def measure(work: Work, settings: Settings, repeats: int, tell: Tell = lambda _: None) -> dict[str, Any]:
    """Measure one work, as in ``bench.json``."""
    contenders = work.contenders(settings)
    repeats = min(repeats, work.most or repeats)
    with ExitStack() as stack:
        steps: list[tuple[Measured, Step]] = []
        measured = []
        for contender in contenders:
            tell(f"{work.name}: getting {contender.name} ready")
            one = Measured(contender)
            measured.append(one)
            try:
                steps.append((one, stack.enter_context(contender.open())))
            except Exception as error:
                one.trouble = _reason(error)
        gc.collect()
        for turn in range(repeats + 1 if work.warm else repeats):
            tell(
                f"{work.name}: turn {turn} of {repeats}" if work.warm else f"{work.name}: turn {turn + 1} of {repeats}"
            )
            for one, step in steps:
                if one.trouble is None:
                    _take(one, step, first=work.warm and turn == 0)
    return record(work, settings, measured)


def _take(one: Measured, step: Step, *, first: bool) -> None:
    try:
        value = step()
    except Exception as error:  # a contender that breaks must not take the others with it
        one.trouble = _reason(error)
        return
    if first:
        one.first = value
    else:
        one.samples.append(value)


def _reason(error: Exception) -> str:
    said = str(error).strip().splitlines()
    text = said[0] if said else type(error).__name__
    return text if isinstance(error, Unavailable) else f"failed: {type(error).__name__}: {text}"


def record(work: Work, settings: Settings, measured: Sequence[Measured]) -> dict[str, Any]:
    """A work's entry in ``bench.json``."""
    base = next((one.samples for one in measured if one.contender.name == work.reference), [])
    return {
        "name": work.name,
        "what": work.what,
        "unit": work.unit,
        "reference": work.reference,
        "sizes": work.sizes(settings),
        "contenders": [_entry(one, base) for one in measured],
    }


def _entry(one: Measured, base: Sequence[float]) -> dict[str, Any]:
    value, ratio = spread(one.samples), spread(paired(one.samples, base))
    return {
        "name": one.contender.name,
        "about": one.contender.about,
        "ours": one.contender.ours,
        "first": one.first,
        "samples": one.samples,
        "value": value,
        "ratio": ratio,
        "reach": reached(one.contender.reach, value, ratio),
        "trouble": one.trouble,
    }


def paired(samples: Sequence[float], base: Sequence[float]) -> list[float]:
    """Each sample over the reference's of the same turn: what slowed both down cancels."""
    return [ours / theirs for ours, theirs in zip(samples, base, strict=False) if theirs > 0]


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Median, smallest and largest; None of nothing."""
    return {"median": median(values), "min": min(values), "max": max(values)} if values else None


def reached(
    reach: Reach | None, value: Mapping[str, float] | None, ratio: Mapping[str, float] | None
) -> dict[str, Any] | None:
    """The limit, and whether the median keeps it; None where there is no limit."""
    if reach is None:
        return None
    got = value if reach.of == "value" else ratio
    return {"limit": reach.limit, "of": reach.of, "met": None if got is None else got["median"] <= reach.limit}
