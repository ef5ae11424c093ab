"""The picture of secrets planted in text: exposure by number of copies, beside secrets that nobody planted."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator
from matplotlib.transforms import blended_transform_factory

from experiments.report.model import Exposure, Secret
from experiments.report.style import (
    BLUE,
    INK,
    LEAK,
    MUTED,
    PLATE,
    RED,
    SMALL,
    TINY,
    heading,
    is_narrow,
    panel,
)
from experiments.report.values import hundredths, short, small

ROW, GAP = 0.2, 0.14  # inches


def exposure(found: Sequence[Secret], width: float) -> Figure | None:
    """Mean exposure with its interval, one block of rows per target; None where nothing was ranked."""
    rows = [(one, _rows(one)) for one in found if _rows(one)]
    if not rows:
        return None
    narrow = is_narrow(width)
    high = sum(ROW * (1 + len(lines)) + GAP for _, lines in rows)
    fig = Figure(figsize=(width, high + 1.25))
    heading(fig, 0.03, 0, "Exposure of the secrets, as said", "mean bits; line: 95 % interval")
    left = 1.12 if narrow else 1.4
    ax = panel(fig, left, 0.68, width - left - (1.25 if narrow else 2.0), high, grid="x")
    most = math.log2(max(one.space or 2 for one, _ in rows))
    ax.set_xlim(0, most)
    ax.set_ylim(high, 0)
    ax.set_yticks([])
    ax.xaxis.set_major_locator(MultipleLocator(4 if narrow else 2))
    ax.set_xlabel("exposure (bits)")
    chance = rows[0][0].chance
    if chance is not None:
        _level(ax, chance, f"chance {chance:.2f}")
    _level(ax, most, f"most {most:.2f}")
    y = GAP
    for one, lines in rows:
        _title(ax, y + ROW / 2, one)
        for i, line in enumerate(lines, start=1):
            _line(ax, y + ROW * (i + 0.5), one, *line, narrow)
        y += ROW * (1 + len(lines)) + GAP
    return fig


def _rows(one: Secret) -> list[tuple[str, Exposure, bool]]:
    """Name, exposure and whether it was planted: most copies first, then what it is held against."""
    planted = [("1 copy" if copies == 1 else f"{copies} copies", what, True) for copies, what in reversed(one.planted)]
    rows = [*planted, ("not planted", one.unplanted, False), ("swapped", one.swapped, False)]
    return [row for row in rows if row[1].mean is not None]


def _level(ax: Axes, x: float, text: str) -> None:
    """A dashed line with its name above."""
    ax.axvline(x, color=MUTED, linestyle="--", linewidth=1, zorder=1, clip_on=False)
    ax.annotate(text, (x, 1), xycoords=("data", "axes fraction"), xytext=(0, 2), textcoords="offset points",
                ha="center", va="bottom", size=TINY, color=MUTED)  # fmt: skip


def _title(ax: Axes, y: float, one: Secret) -> None:
    """A target's name, whether anyone outside ever sees it, and the p-value against the unplanted."""
    at = blended_transform_factory(ax.get_figure(root=True).transFigure, ax.transData)  # type: ignore[union-attr]
    where = "leaves the client" if one.leaves else "stays home"
    name = ax.text(0.004, y, short(one.target, 18), transform=at, va="center", size=SMALL,
                   color=INK, weight="bold" if one.leaves else "normal")  # fmt: skip
    ax.annotate(where, (1, 0), xycoords=name, xytext=(7, 0), textcoords="offset points", va="bottom",
                size=TINY, color=LEAK if one.leaves and one.leaks else MUTED, annotation_clip=False,
                bbox={"facecolor": PLATE, "edgecolor": "none", "pad": 0.5})  # fmt: skip
    if one.p_value is not None:
        _beside(ax, y, f"p = {small(one.p_value)}", LEAK if one.leaves and one.leaks else MUTED)


def _line(ax: Axes, y: float, one: Secret, name: str, what: Exposure, planted: bool, narrow: bool) -> None:
    """One row: filled when it leaves the client, hollow when not, grey for what was not planted there."""
    if what.mean is None:
        return
    colour = MUTED if not planted or not one.leaves else RED if one.leaks else BLUE
    at = blended_transform_factory(ax.get_figure(root=True).transFigure, ax.transData)  # type: ignore[union-attr]
    ax.text(0.02, y, name, transform=at, va="center", size=SMALL, color=INK if planted else MUTED)
    if what.low is not None and what.high is not None:
        ax.plot([what.low, what.high], [y, y], color=colour, linewidth=2.2, solid_capstyle="butt", clip_on=False)
    ax.plot(
        what.mean, y, ("o" if one.leaves else "D") if planted else "s", color=colour,
        markerfacecolor=colour if one.leaves or not planted else PLATE, markersize=6.5 if planted else 4.5,
        markeredgewidth=1.5 if planted else 0, clip_on=False,
    )  # fmt: skip
    ink = INK if planted else MUTED
    _beside(ax, y, hundredths(what.mean), ink)
    if what.extracted is not None and what.n is not None:
        _beside(ax, y, f"{what.extracted} of {what.n}" + ("" if narrow else " guessed first"), ink, 42)


def _beside(ax: Axes, y: float, text: str, colour: str, shift: float = 0) -> None:
    """Text to the right of a row, ``shift`` points further on."""
    ax.annotate(text, (1, y), xycoords=("axes fraction", "data"), xytext=(12 + shift, 0), textcoords="offset points",
                va="center", size=SMALL, color=colour, annotation_clip=False)  # fmt: skip
