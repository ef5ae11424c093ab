"""Text on the colours of its temperatures: how private a method took every character to be."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.report.model import Heated, Strip
from experiments.report.style import INK, MUTED, RED, RULE, TINY, is_narrow, panel

DEEPEST = 0.6  # opacity: letters stand on it, on light and on dark pages
ROW, GAP, KEY = 0.2, 0.11, 0.62  # inches
SWATCHES = 7


def strip(shown: Strip, width: float) -> Figure | None:
    """Each record on one line, or on several of equal length where it is too long for one; a scale below."""
    if not shown.lines:
        return None
    most = 36 if is_narrow(width) else 84
    longest = max(len(line.text) for line in shown.lines)
    columns = math.ceil(longest / math.ceil(longest / most))
    cell = min(width / columns, 0.1)
    rows = [math.ceil(len(line.text) / columns) for line in shown.lines]
    high = ROW * sum(rows) + GAP * len(rows)
    fig = Figure(figsize=(min(width, max(cell * columns, 0.44 * SWATCHES)), high + KEY))
    ax = panel(fig, 0, 0, cell * columns, high, grid="none")
    ax.set_axis_off()
    ax.set_xlim(0, columns)
    ax.set_ylim(high, 0)
    top = 0.0
    for line, taken in zip(shown.lines, rows, strict=True):
        for i in range(taken):
            part = slice(i * columns, (i + 1) * columns)
            _row(ax, top + ROW * (i + 0.5), Heated(line.text[part], line.heat[part]), shown, 72 * cell)
        top += ROW * taken + GAP
        ax.axhline(top - GAP / 2, color=RULE, linewidth=0.6)
    _scale(fig, shown, high)
    return fig


def _row(ax: Axes, y: float, line: Heated, shown: Strip, cell: float) -> None:
    """Letters ``cell`` points apart, on one bar for neighbours that are equally hot."""
    for start, length, t in _runs(line):
        if (shade := _shade(t, shown)) > 0:
            ax.barh(y, length, ROW, start, color=RED, alpha=shade, linewidth=0)
    for place, letter in enumerate(line.text):
        if letter != " ":
            ax.text(
                place + 0.5, y + 0.22 * ROW, "↵" if letter == "\n" else letter, ha="center", va="baseline",
                family="monospace", size=min(9.5, cell / 0.62), color=MUTED if letter == "\n" else INK,
            )  # fmt: skip


def _runs(line: Heated) -> Iterator[tuple[int, int, float | None]]:
    """Start, length and temperature of neighbours that have the same."""
    start = 0
    for t, group in groupby(line.heat):
        length = len(list(group))
        yield start, length, t
        start += length


def _shade(t: float | None, shown: Strip) -> float:
    """Opacity of a temperature: nothing at the lowest."""
    return 0.0 if t is None or shown.high <= shown.low else DEEPEST * (t - shown.low) / (shown.high - shown.low)


def _scale(fig: Figure, shown: Strip, top: float) -> None:
    """Swatches with their temperatures."""
    steps = SWATCHES if shown.high > shown.low else 1
    ax = panel(fig, 0.04, top + 0.24, 0.42 * steps, 0.14, grid="none")
    values = [shown.low + (shown.high - shown.low) * i / max(1, steps - 1) for i in range(steps)]
    for i, t in enumerate(values):
        ax.barh(0.5, 1, 1, i - 0.5, color=RED, alpha=_shade(t, shown), linewidth=0)
    ax.set_xlim(-0.5, steps - 0.5)
    ax.set_ylim(0, 1)
    ax.set_xticks(range(steps), [f"{t:.3g}" for t in values])
    ax.set_yticks([])
    ax.tick_params(axis="x", length=0, pad=3)
    ax.spines[["left", "right", "top", "bottom"]].set_visible(True)
    ax.set_title("temperature of the answer about a character", loc="left", size=TINY, color=MUTED, pad=3)
