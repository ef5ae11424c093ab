"""The figure of targets: after how many rounds and bytes each run was there, and which never were."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.compare import Comparison
from experiments.compare_curves import bytes_axis
from experiments.compare_figures import MOVES, ROW, TEXT, VALUES, key, offsets, row_labels
from experiments.compare_table import of_runs
from experiments.compare_targets import middle
from experiments.report.style import BLUE, INK, MUTED, ORANGE, PLATE, RED, SMALL, TINY, heading, panel, row_names
from experiments.report.values import size, unit_of

GUTTER, GAP = 0.45, 0.5  # inches; the gutter is for runs that never were there
WIDE = 30  # largest over smallest, from which on an axis is logarithmic


def reached_figure(found: Comparison) -> Figure | None:
    """For each target: rounds and bytes of every run, the median over seeds, and how many runs were there."""
    if not found.targets:
        return None
    rows, left = row_labels(found)
    high = ROW * len(rows) + 0.06
    block = high + 0.98
    figure = Figure(figsize=(left + VALUES + MOVES + 2 * GUTTER + GAP + TEXT, block * len(found.targets) + 0.5))
    key(figure, [
        ("s", ORANGE, PLATE, "run of the baseline"),
        ("o", BLUE, BLUE, "run (one a seed)"),
        ("x", RED, RED, "run that never was there"),
        ("|", INK, INK, "median, if more than half were"),
    ])  # fmt: skip
    for i, target in enumerate(found.targets):
        top = 0.92 + i * block
        heading(figure, 0.035, top - 0.42, target.title, "rounds and bytes until first there; less is better")
        rounds = panel(figure, left, top, VALUES, high, grid="x")
        sent = panel(figure, left + VALUES + GUTTER + GAP, top, MOVES, high, grid="x")
        when = [found.reached[condition.label, target.name] for condition in found.conditions]
        _axis(rounds, found, [one.rounds for one in when])
        _axis(sent, found, [one.sent for one in when], in_bytes=True)
        rounds.set_xlabel("rounds")
        row_names(rounds, rows, bold=list(found.conditions).index(found.baseline))
        for y, one in enumerate(when):
            half, total = middle(one.rounds), middle(one.sent)
            lines = [(f"{of_runs(one)} there" if one.rounds else "has none of this", INK)]
            if half is not None and total is not None:
                lines.append((f"median {half:.10g} rounds, {size(total)}", MUTED))
            for (text, colour), up in zip(lines, (4.5, -4.5) if len(lines) > 1 else (0,), strict=True):
                sent.annotate(text, (1, y), xycoords=("axes fraction", "data"), xytext=(8 + 72 * GUTTER, up),
                              textcoords="offset points", va="center", size=TINY, color=colour,
                              annotation_clip=False)  # fmt: skip
    return figure


def _axis(ax: Axes, found: Comparison, values: list[Mapping[int, int | None]], in_bytes: bool = False) -> None:
    """One panel: rounds, or bytes; logarithmic where bytes are of different orders."""
    height = offsets(found)
    known = sorted(value for one in values for value in one.values() if value is not None)
    scale, unit = unit_of(known[-1]) if in_bytes and known else (1.0, "rounds")
    positive = [value for value in known if value]
    wide = in_bytes and bool(positive) and positive[-1] > WIDE * positive[0]
    if wide:
        scale = 1.0
        bytes_axis(ax, positive, ticks=4)
    elif known:
        ax.set_xlim(0, known[-1] / scale * 1.06 or 1.0)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10], integer=not in_bytes))
    else:
        ax.set_xticks([])
    for y, (condition, one) in enumerate(zip(found.conditions, values, strict=True)):
        base = condition is found.baseline
        colour, mark, face = (ORANGE, "s", PLATE) if base else (BLUE, "o", BLUE)
        for seed, value in one.items():
            spot = y + height[seed]
            if value is None:
                ax.plot(1 + 0.5 * GUTTER / VALUES, spot, "x", color=RED, transform=ax.get_yaxis_transform(),
                        markersize=4, markeredgewidth=1.2, clip_on=False)  # fmt: skip
            elif value or not wide:
                ax.plot(value / scale, spot, mark, color=colour, markersize=3.6, markerfacecolor=face,
                        markeredgewidth=1.0 * base, alpha=0.9, clip_on=False)  # fmt: skip
        if wide and 0 in one.values():
            ax.annotate("nothing sent", (0.01, y), xycoords=("axes fraction", "data"), va="center", size=TINY,
                        color=MUTED)  # fmt: skip
        half = middle(one)
        if half is not None and (half or not wide):
            ax.plot([half / scale] * 2, [y - 0.33, y + 0.33], color=INK, linewidth=1.6, clip_on=False)
    if in_bytes:
        ax.set_xlabel("bytes up and down" if wide or not known else f"bytes up and down ({unit})")
    ax.annotate("never", (1, 0), xycoords="axes fraction", xytext=(36 * GUTTER, -4), textcoords="offset points",
                ha="center", va="top", size=SMALL, color=MUTED, annotation_clip=False)  # fmt: skip
    ax.set_yticks([])
    ax.set_ylim(len(values) - 0.45, -0.55)
