"""The main figure of a comparison: values and paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.compare import LEVEL, Comparison, Difference
from experiments.compare_table import (
    POINTS,
    difference_unit,
    interval,
    largest,
    names,
    scale_of,
    signed,
)
from experiments.conditions import Condition, Metric
from experiments.report.style import BLUE, INK, MUTED, ORANGE, PLATE, RED, SMALL, TINY, heading, panel, row_names
from experiments.report.values import short, small

ROW, VALUES, GAP, MOVES, TEXT = 0.3, 2.6, 0.4, 2.2, 1.75  # inches
LETTER, LONGEST = 0.072, 64  # inches; letters of a name


def comparison_figure(found: Comparison) -> Figure | None:
    """For each metric: every run and the mean of each condition, and beside it the paired differences."""
    metrics = [m for m in found.metrics if any(_finite(found, c, m) for c in found.conditions)]
    if not metrics:
        return None
    high = ROW * len(found.conditions) + 0.06
    block = high + 0.98
    rows, left = row_labels(found)
    figure = Figure(figsize=(left + VALUES + GAP + MOVES + TEXT, block * len(metrics) + 0.5))
    key(figure, [
        ("s", ORANGE, PLATE, "run of the baseline"),
        ("o", BLUE, BLUE, "run (one a seed)"),
        ("|", INK, INK, "mean"),
        ("D", BLUE, BLUE, "better (Holm p < 0.05)"),
        ("D", RED, RED, "worse"),
        ("D", MUTED, PLATE, "undecided; 95 % intervals"),
    ])  # fmt: skip
    for i, metric in enumerate(metrics):
        top = 0.92 + i * block
        scale, unit = scale_of(metric, largest(found, metric))
        heading(figure, 0.035, top - 0.42, metric.title, "more is better" if metric.better > 0 else "less is better")
        values = panel(figure, left, top, VALUES, high, grid="x")
        axes = [values]
        _values(values, found, metric, scale)
        row_names(values, rows, bold=list(found.conditions).index(found.baseline))
        values.set_xlabel("fraction correct" if metric.better > 0 and metric.unit == "fraction" else unit)
        if any(found.differences[c.label, metric.name].values for c in found.conditions if c is not found.baseline):
            moves = panel(figure, left + VALUES + GAP, top, MOVES, high, grid="x")
            axes.append(moves)
            _moves(moves, found, metric, scale)
            moves.set_xlabel(f"difference to baseline ({difference_unit(metric, unit)})")
        else:
            note = "no differences: the baseline has none of this" if len(rows) > 1 else ""
            values.annotate(note, (1, 0.5), xycoords="axes fraction", xytext=(24, 0), textcoords="offset points",
                            va="center", size=SMALL, color=MUTED, annotation_clip=False)  # fmt: skip
        for ax in axes:
            ax.set_yticks([])
            ax.set_ylim(len(rows) - 0.45, -0.55)
            ax.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    return figure


def row_labels(found: Comparison) -> tuple[list[str], float]:
    """A short name for each condition, and where the panel beside them begins, in inches."""
    rows = [short(name, LONGEST) for name in names([c.label for c in found.conditions])]
    return rows, max(1.3, LETTER * max(map(len, rows)) + 0.25)


def _finite(found: Comparison, condition: Condition, metric: Metric) -> dict[int, float]:
    values = found.spreads[condition.label, metric.name].values
    return {seed: value for seed, value in values.items() if math.isfinite(value)}


def offsets(found: Comparison) -> dict[int, float]:
    """A height within the row for each seed: the same in all rows, so that pairs can be followed."""
    seeds = sorted({seed for condition in found.conditions for seed in condition.seeds})
    step = 0.42 / max(1, len(seeds) - 1)
    return {seed: -0.21 + step * i if len(seeds) > 1 else 0.0 for i, seed in enumerate(seeds)}


def _values(ax: Axes, found: Comparison, metric: Metric, scale: float) -> None:
    """The runs, and each condition's mean as an upright stroke."""
    height = offsets(found)
    for y, condition in enumerate(found.conditions):
        values = _finite(found, condition, metric)
        base = condition is found.baseline
        colour = ORANGE if base else BLUE
        for seed, value in values.items():
            mark, face = ("s", PLATE) if base else ("o", colour)
            ax.plot(value / scale, y + height[seed], mark, color=colour, markersize=3.6, markerfacecolor=face,
                    markeredgewidth=1.0 * base, alpha=0.9)  # fmt: skip
        if values:
            mean = fmean(values.values())
            ax.plot([mean / scale] * 2, [y - 0.33, y + 0.33], color=INK, linewidth=1.6)
        else:
            infinite = found.spreads[condition.label, metric.name].mean is not None
            text = "infinite" if infinite else "no guarantee" if metric.unit == "ε" else "none"
            ax.annotate(text, (0.01, y), xycoords=("axes fraction", "data"), va="center", size=TINY, color=MUTED)
    ax.margins(x=0.06)


def _moves(ax: Axes, found: Comparison, metric: Metric, scale: float) -> None:
    """The differences of the pairs, their mean and its interval, and both as numbers."""
    height, factor = offsets(found), POINTS if metric.unit == "fraction" else 1 / scale
    ax.axvline(0, color=ORANGE, linewidth=1.2, linestyle="--", zorder=1)
    for y, condition in enumerate(found.conditions):
        if condition is found.baseline:
            continue
        d = found.differences[condition.label, metric.name]
        colour, face = verdict(d, metric.better)
        for seed, value in d.values.items():
            ax.plot(value * factor, y + height[seed], "o", color=MUTED, markersize=3.2, markeredgewidth=0, alpha=0.7)
        if d.low is not None and d.high is not None:
            ax.plot([d.low * factor, d.high * factor], [y, y], color=colour, linewidth=2, solid_capstyle="butt")
        if d.mean is not None:
            ax.plot(d.mean * factor, y, "D", color=colour, markerfacecolor=face, markersize=5.5, markeredgewidth=1.4)
            _say(ax, y, d, metric, scale)
    low, high = ax.get_xlim()
    pad = 0.06 * (high - low)
    ax.set_xlim(min(low, -pad), max(high, pad))


def _say(ax: Axes, y: int, d: Difference, metric: Metric, scale: float) -> None:
    """The numbers, right of the panel."""
    lines = [(signed(metric, d.mean or 0.0, scale), INK)]
    if d.low is not None:
        lines = [(f"{lines[0][0]}  [{interval(metric, d, scale)}]", INK), (f"Holm p = {small(d.holm)}", MUTED)]
    else:
        lines.append(("one pair: no interval" if d.std is None else f"the same for all {len(d.values)} seeds", MUTED))
    for (text, colour), up in zip(lines, (4.5, -4.5) if len(lines) > 1 else (0,), strict=True):
        ax.annotate(text, (1, y), xycoords=("axes fraction", "data"), xytext=(8, up), textcoords="offset points",
                    va="center", size=TINY, color=colour, annotation_clip=False)  # fmt: skip


def verdict(d: Difference, better: int) -> tuple[str, str]:
    """Edge and face of a difference: blue for better, red for worse, hollow where the corrected p decides neither."""
    if d.mean is None or d.holm is None or d.holm >= 1 - LEVEL:
        return MUTED, PLATE
    colour = BLUE if d.mean * better > 0 else RED
    return colour, colour


def key(figure: Figure, marks: Sequence[tuple[str, str, str, str]]) -> None:
    """What the marks mean, in one line at the top; each is marker, edge, face and text."""
    width, height = figure.get_size_inches()
    ax = figure.add_axes((0, 1 - 0.32 / height, 1, 0.24 / height))
    ax.set_axis_off()
    ax.set_xlim(0, width)
    ax.set_ylim(0, 1)
    at = 0.09
    for mark, edge, face, text in marks:
        ax.plot(
            at, 0.5, mark, color=edge, markerfacecolor=face, markersize=5 if mark != "|" else 9, markeredgewidth=1.4
        )
        ax.text(at + 0.1, 0.5, text, va="center", color=MUTED, size=SMALL)
        at += 0.36 + 0.068 * len(text)
