"""Accuracy over rounds, and over the bytes sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from statistics import fmean, stdev

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from experiments.compare import Comparison
from experiments.compare_figures import LETTER, LONGEST
from experiments.compare_table import names
from experiments.compare_targets import in_round
from experiments.conditions import METRICS, Condition, Metric
from experiments.report.figures import rounds_axis
from experiments.report.style import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    SMALL,
    TINY,
    apart,
    heading,
    panel,
)
from experiments.report.values import number, short, unit_of

PLOT, LINE = 5.1, 0.165  # inches
ACCURACIES = [METRICS[name] for name in ("balanced", "personal", "global")]
STYLES = [
    (colour, marker, line)
    for line in ("-", "--", ":")
    for colour, marker in ((BLUE, "o"), (RED, "^"), (GREEN, "D"), (PURPLE, "v"), (SKY, "P"), (INK, "X"))
]


Points = dict[int, list[float]]
"""By round, the values of all seeds."""


def curve(condition: Condition, metric: Metric) -> Points:
    """Values by round, of the rounds that all seeds have."""
    found: Points = {}
    for run in condition.runs.values():
        for line in run.lines:
            value = number(metric.pick(line))
            if value is not None:
                found.setdefault(int(line["round"]), []).append(value)
    return {at: values for at, values in sorted(found.items()) if len(values) == len(condition.runs)}


def sent(condition: Condition) -> dict[int, float]:
    """Bytes up and down so far by round, all clients; mean over the seeds that got there."""
    found: dict[int, list[int]] = {}
    for run in condition.runs.values():
        for line, total in zip(run.lines, accumulate(map(in_round, run.lines)), strict=True):
            found.setdefault(int(line["round"]), []).append(total)
    return {at: fmean(totals) for at, totals in found.items()}


def curves_figure(found: Comparison) -> Figure | None:
    """Accuracies by round: mean over seeds, one standard deviation around it."""

    def axis(ax: Axes, drawn: Sequence[tuple[Condition, Points]]) -> None:
        rounds_axis(ax, [at for _, points in drawn for at in points])

    return _figure(found, lambda _, points: [float(at) for at in points], axis)


def bytes_figure(found: Comparison) -> Figure | None:
    """Accuracies by bytes sent so far; conditions that send nothing are level lines. None if that is all of them."""
    totals = {condition.label: sent(condition) for condition in found.conditions}
    largest = max((max(values.values(), default=0.0) for values in totals.values()), default=0.0)
    if not largest:
        return None

    def place(condition: Condition, points: Points) -> list[float]:
        return [totals[condition.label][at] for at in points]

    def axis(ax: Axes, drawn: Sequence[tuple[Condition, Points]]) -> None:
        bytes_axis(ax, [at for condition, points in drawn for at in place(condition, points) if at])
        ax.set_xlabel("sent so far by all clients and to them (bytes)")

    return _figure(found, place, axis, "; a level line sends nothing")


def bytes_axis(ax: Axes, at: Sequence[float], ticks: int = 9) -> None:
    """A logarithmic x axis with units at its ticks."""
    low, high = min(at, default=1.0), max(at, default=1.0)
    pad = max(1.05, (high / low) ** 0.03)
    ax.set_xscale("log")
    ax.set_xlim(low / pad, high * pad)
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,), numticks=ticks))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _round_size(value)))
    ax.xaxis.set_minor_formatter(NullFormatter())


def _round_size(value: float) -> str:
    scale, unit = unit_of(value)
    return f"{value / scale:.3g} {unit}"


def _figure(
    found: Comparison,
    place: Callable[[Condition, Points], list[float]],
    axis: Callable[[Axes, Sequence[tuple[Condition, Points]]], None],
    about: str = "",
) -> Figure | None:
    """One panel for each accuracy that there is; ``place`` says where on the x axis a condition's points are."""
    panels = []
    for metric in ACCURACIES:
        drawn = [(condition, curve(condition, metric)) for condition in found.conditions]
        if any(points for _, points in drawn):
            panels.append((metric, [(condition, points) for condition, points in drawn if points]))
    if not panels:
        return None
    high = max(2.4, LINE * len(found.conditions) + 0.1)
    labels = [condition.label for condition in found.conditions]
    brief = {label: short(name, LONGEST) for label, name in zip(labels, names(labels), strict=True)}
    width = 0.6 + PLOT + 0.9 + LETTER * max(map(len, brief.values()))
    figure = Figure(figsize=(width, len(panels) * (high + 1.15)))
    styles = _styles(found)
    for i, (metric, drawn) in enumerate(panels):
        top = 0.6 + i * (high + 1.15)
        several = any(len(condition.seeds) > 1 for condition, _ in drawn)
        note = "mean over seeds ± one standard deviation" if several else "one seed"
        heading(figure, 0.05, top - 0.5, metric.title, note + about)
        ax = panel(figure, 0.6, top, PLOT, high)
        alpha = min(0.1, 0.6 / len(drawn))
        ends = [_line(ax, place(one, points), points, *styles[one.label], alpha) for one, points in drawn]
        axis(ax, drawn)
        ax.set_ylabel("accuracy (fraction correct)")
        for target in found.targets:
            if target.metric is metric:
                ax.axhline(target.value, color=MUTED, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
                ax.annotate(f"target {target.value:.10g}", (0, target.value), xycoords=("axes fraction", "data"),
                            xytext=(3, 2), textcoords="offset points", size=TINY, color=MUTED)  # fmt: skip
        texts = [f"{brief[one.label]} {end:.3f}" for (one, _), end in zip(drawn, ends, strict=True)]
        _ends(ax, ends, texts, [styles[one.label] for one, _ in drawn], high)
    return figure


def _styles(found: Comparison) -> dict[str, tuple[str, str, str]]:
    """Colour, marker and line of each condition; the baseline's are always the same."""
    others = [condition.label for condition in found.conditions if condition is not found.baseline]
    styles = {label: STYLES[i % len(STYLES)] for i, label in enumerate(others)}
    return styles | {found.baseline.label: (ORANGE, "s", "--")}


def _line(ax: Axes, at: Sequence[float], points: Points, colour: str, marker: str, line: str, alpha: float) -> float:
    """One condition, level if all of it is at zero; returns where it ends."""
    means = [fmean(values) for values in points.values()]
    if not any(at):
        ax.axhline(means[-1], color=colour, linestyle=line)
        return means[-1]
    spreads = [stdev(values) if len(values) > 1 else 0.0 for values in points.values()]
    low = [m - s for m, s in zip(means, spreads, strict=True)]
    high = [m + s for m, s in zip(means, spreads, strict=True)]
    ax.fill_between(at, low, high, color=colour, alpha=alpha, linewidth=0)
    ax.plot(at, means, line, marker=marker, color=colour, markersize=4.2, markeredgewidth=0,
            markevery=max(1, len(at) // 10))  # fmt: skip
    return means[-1]


def _ends(ax: Axes, ends: list[float], texts: list[str], styles: list[tuple[str, str, str]], height: float) -> None:
    """Name the lines at their right ends, each beside a sample of itself."""
    low, high = ax.get_ylim()
    spots = inside(apart(ends, gap := LINE * (high - low) / height), gap, low, high)
    for text, spot, (colour, marker, line) in zip(texts, spots, styles, strict=True):
        trans = ax.get_yaxis_transform()
        ax.plot([1.02, 1.075], [spot, spot], line, color=colour, transform=trans, clip_on=False)
        ax.plot(1.0475, spot, marker, color=colour, markersize=4.2, markeredgewidth=0, transform=trans, clip_on=False)
        ax.annotate(text, (1.085, spot), xycoords=("axes fraction", "data"), va="center", size=SMALL, color=INK,
                    annotation_clip=False)  # fmt: skip
    ax.set_ylim(low, high)


def inside(spots: list[float], gap: float, low: float, high: float) -> list[float]:
    """Spots that are `gap` apart, pushed between two limits if there is room for them."""
    order = sorted(range(len(spots)), key=lambda i: spots[i])
    moved = list(spots)
    for place, i in enumerate(reversed(order)):
        moved[i] = min(moved[i], high - gap * place)
    for place, i in enumerate(order):
        moved[i] = max(moved[i], low + gap * place)
    return moved
