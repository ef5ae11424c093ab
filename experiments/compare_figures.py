"""The figures of a comparison: values and paired differences, and accuracy over rounds."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from statistics import fmean, stdev

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments import files
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
from experiments.report.figures import rounds_axis
from experiments.report.style import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PLATE,
    PURPLE,
    RED,
    SKY,
    SMALL,
    TINY,
    apart,
    drawing,
    heading,
    panel,
    row_names,
)
from experiments.report.values import number, short, small

ROW, VALUES, GAP, MOVES, TEXT = 0.3, 2.6, 0.4, 2.2, 1.75  # inches
LETTER, LONGEST = 0.072, 64  # inches; letters of a name
PLOT, LINE = 5.1, 0.165  # inches
MOST_PIXELS = 60_000  # a side; matplotlib draws no more
STYLES = [
    (colour, marker, line)
    for line in ("-", "--", ":")
    for colour, marker in ((BLUE, "o"), (RED, "^"), (GREEN, "D"), (PURPLE, "v"), (SKY, "P"), (INK, "X"))
]


def saved(draw: Callable[[], Figure | None], *formats: str) -> list[bytes]:
    """A figure in each format; equal figures give equal bytes. Nothing when there is no figure."""
    with drawing():
        figure = draw()
        if figure is None:
            return []
        parts = []
        for kind in formats:
            buffer = io.BytesIO()
            about = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
            dpi = min(160.0, MOST_PIXELS / max(figure.get_size_inches()))
            figure.savefig(buffer, format=kind, facecolor=PLATE, dpi=dpi, metadata=about)
            parts.append(buffer.getvalue())
    return parts


def comparison_figure(found: Comparison) -> Figure | None:
    """For each metric: every run and the mean of each condition, and beside it the paired differences."""
    metrics = [m for m in found.metrics if any(_finite(found, c, m) for c in found.conditions)]
    if not metrics:
        return None
    high = ROW * len(found.conditions) + 0.06
    block = high + 0.98
    rows = [short(name, LONGEST) for name in names([c.label for c in found.conditions])]
    left = max(1.3, LETTER * max(map(len, rows)) + 0.25)
    figure = Figure(figsize=(left + VALUES + GAP + MOVES + TEXT, block * len(metrics) + 0.5))
    _key(figure, found)
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


def _finite(found: Comparison, condition: Condition, metric: Metric) -> dict[int, float]:
    values = found.spreads[condition.label, metric.name].values
    return {seed: value for seed, value in values.items() if math.isfinite(value)}


def _offsets(found: Comparison) -> dict[int, float]:
    """A height within the row for each seed: the same in all rows, so that pairs can be followed."""
    seeds = sorted({seed for condition in found.conditions for seed in condition.seeds})
    step = 0.42 / max(1, len(seeds) - 1)
    return {seed: -0.21 + step * i if len(seeds) > 1 else 0.0 for i, seed in enumerate(seeds)}


def _values(ax: Axes, found: Comparison, metric: Metric, scale: float) -> None:
    """The runs, and each condition's mean as an upright stroke."""
    height = _offsets(found)
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
    height, factor = _offsets(found), POINTS if metric.unit == "fraction" else 1 / scale
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


def _key(figure: Figure, found: Comparison) -> None:
    """What the marks mean, in one line at the top."""
    width, height = figure.get_size_inches()
    ax = figure.add_axes((0, 1 - 0.32 / height, 1, 0.24 / height))
    ax.set_axis_off()
    ax.set_xlim(0, width)
    ax.set_ylim(0, 1)
    at = 0.09
    for mark, edge, face, text in (
        ("s", ORANGE, PLATE, "run of the baseline"),
        ("o", BLUE, BLUE, "run (one a seed)"),
        ("|", INK, INK, "mean"),
        ("D", BLUE, BLUE, "better (Holm p < 0.05)"),
        ("D", RED, RED, "worse"),
        ("D", MUTED, PLATE, "undecided; 95 % intervals"),
    ):
        ax.plot(
            at, 0.5, mark, color=edge, markerfacecolor=face, markersize=5 if mark != "|" else 9, markeredgewidth=1.4
        )
        ax.text(at + 0.1, 0.5, text, va="center", color=MUTED, size=SMALL)
        at += 0.36 + 0.068 * len(text)


def curve(condition: Condition, key: str) -> dict[int, list[float]]:
    """Values by round, of the rounds that all seeds have."""
    found: dict[int, list[float]] = {}
    for seed in condition.seeds:
        for line in files.read_lines(condition.runs[seed].place / files.METRICS):
            value = number((line.get("accuracy") or {}).get(key))
            if value is not None:
                found.setdefault(int(line["round"]), []).append(value)
    return {at: values for at, values in sorted(found.items()) if len(values) == len(condition.runs)}


def curves_figure(found: Comparison) -> Figure | None:
    """Balanced accuracy and the server's model by round: mean over seeds, one standard deviation around it."""
    panels = []
    for title, key in (("Balanced accuracy", "balanced_mean"), ("Server's model", "global")):
        drawn = [(condition, curve(condition, key)) for condition in found.conditions]
        if any(points for _, points in drawn):
            panels.append((title, [(condition, points) for condition, points in drawn if points]))
    if not panels:
        return None
    high = max(2.4, LINE * len(found.conditions) + 0.1)
    labels = [condition.label for condition in found.conditions]
    brief = {label: short(name, LONGEST) for label, name in zip(labels, names(labels), strict=True)}
    width = 0.6 + PLOT + 0.9 + LETTER * max(map(len, brief.values()))
    figure = Figure(figsize=(width, len(panels) * (high + 1.15)))
    styles = _styles(found)
    for i, (title, drawn) in enumerate(panels):
        top = 0.6 + i * (high + 1.15)
        several = any(len(condition.seeds) > 1 for condition, _ in drawn)
        heading(figure, 0.05, top - 0.5, title, "mean over seeds ± one standard deviation" if several else "one seed")
        ax = panel(figure, 0.6, top, PLOT, high)
        ends = [_line(ax, points, *styles[condition.label], min(0.1, 0.6 / len(drawn))) for condition, points in drawn]
        rounds_axis(ax, [at for _, points in drawn for at in points])
        ax.set_ylabel("accuracy (fraction correct)")
        texts = [f"{brief[condition.label]} {end:.3f}" for (condition, _), end in zip(drawn, ends, strict=True)]
        _ends(ax, ends, texts, [styles[condition.label] for condition, _ in drawn], high)
    return figure


def _styles(found: Comparison) -> dict[str, tuple[str, str, str]]:
    """Colour, marker and line of each condition; the baseline's are always the same."""
    others = [condition.label for condition in found.conditions if condition is not found.baseline]
    styles = {label: STYLES[i % len(STYLES)] for i, label in enumerate(others)}
    return styles | {found.baseline.label: (ORANGE, "s", "--")}


def _line(ax: Axes, points: dict[int, list[float]], colour: str, marker: str, line: str, alpha: float) -> float:
    """One condition; returns where it ends."""
    at, means = list(points), [fmean(values) for values in points.values()]
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


def pictures(found: Comparison) -> dict[str, bytes]:
    """The files of a comparison's figures, by name."""
    both = zip(("compare.svg", "compare.png"), saved(lambda: comparison_figure(found), "svg", "png"), strict=False)
    curves = zip(("compare-curves.svg",), saved(lambda: curves_figure(found), "svg"), strict=False)
    return {**dict(both), **dict(curves)}
