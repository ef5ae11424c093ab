"""The clients of a comparison one by one: who gains, who loses, and how far apart they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from statistics import fmean, median

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments import files
from experiments.compare import Comparison
from experiments.compare_figures import GAP, MOVES, TEXT, VALUES, key, row_labels
from experiments.compare_table import POINTS
from experiments.conditions import Condition
from experiments.report.style import BLUE, INK, MUTED, ORANGE, PLATE, RED, TINY, heading, panel, row_names
from experiments.report.values import number, plural
from fedkd.errors import ConfigError

HIGH, REACH = 0.66, 0.4  # a row's height in inches; how far from its middle, in rows, the first and last client are
MANY = 4000  # dots; more are drawn as a picture

Scores = Mapping[tuple[int, int], float]
"""Personal accuracy by seed and client."""


def scores(condition: Condition) -> Scores:
    """Each client's model on its own test split after the last round."""
    found: dict[tuple[int, int], float] = {}
    for seed, run in condition.runs.items():
        path = run.place / files.CLIENTS
        try:
            rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
            known = {(seed, int(row["client"])): number(row.get("personal")) for row in rows}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"{path}: cannot be read ({error})") from None
        found |= {who: value for who, value in known.items() if value is not None}
    return found


def clients_figure(found: Comparison) -> Figure | None:
    """A dot for every client of every seed, at the same height in every row, and the differences to the baseline."""
    rows, left = row_labels(found)
    values = [scores(condition) for condition in found.conditions]
    if not any(values):
        return None
    at = list(found.conditions).index(found.baseline)
    heights = order(values[at], values)
    moves = [moved(one, values[at]) if i != at else {} for i, one in enumerate(values)]
    high = HIGH * len(rows)
    figure = Figure(figsize=(left + VALUES + GAP + MOVES + TEXT, high + 1.45))
    key(figure, [
        ("s", ORANGE, ORANGE, "client of the baseline"),
        ("o", BLUE, BLUE, "client"),
        ("|", INK, INK, "mean"),
        ("v", INK, PLATE, "mean of the worst 10 %"),
        ("o", BLUE, BLUE, "better"),
        ("o", RED, RED, "worse"),
    ])  # fmt: skip
    note = "every client of every seed on its own test split; the same client at the same height in every row, the "
    heading(figure, 0.035, 0.42, "Personal accuracy, client by client", f"{note}baseline's best at the top")
    sides = [panel(figure, left, 0.92, VALUES, high, grid="x")]
    size = 3.4 if len(heights) <= 60 else 2.4 if len(heights) <= 400 else 1.4
    many = sum(map(len, values)) > MANY
    for y, one in enumerate(values):
        _values(sides[0], y, one, heights, size, ORANGE if y == at else BLUE, many)
    row_names(sides[0], rows, bold=at)
    sides[0].set_xlabel("fraction correct")
    if any(moves):
        sides.append(panel(figure, left + VALUES + GAP, 0.92, MOVES, high, grid="x"))
        sides[1].axvline(0, color=ORANGE, linewidth=1.2, linestyle="--", zorder=1)
        for y, differences in enumerate(moves):
            _moves(sides[1], y, differences, heights, size, many)
        sides[1].set_xlabel("difference to baseline (points)")
    for ax in sides:
        ax.set_yticks([])
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
        ax.margins(x=0.04)
    return figure


def order(base: Scores, values: list[Scores]) -> dict[tuple[int, int], float]:
    """A height within the row for each client: by the baseline's accuracy, best on top; those it lacks below."""
    everyone = sorted({who for one in values for who in one}, key=lambda who: (-base.get(who, -1.0), who))
    step = 2 * REACH / max(1, len(everyone) - 1)
    return {who: -REACH + step * i if len(everyone) > 1 else 0.0 for i, who in enumerate(everyone)}


def moved(new: Scores, base: Scores) -> dict[tuple[int, int], float]:
    """New minus baseline in points, for every client of a seed that both have."""
    return {who: POINTS * (value - base[who]) for who, value in new.items() if who in base}


def gain(points: float) -> str:
    """A difference in points, with its sign where it has one."""
    shown = f"{abs(points):.1f}"
    return shown if shown == "0.0" else f"{'−' if points < 0 else '+'}{shown}"


def _values(
    ax: Axes, y: int, one: Scores, heights: Mapping[tuple[int, int], float], size: float, colour: str, many: bool
) -> None:
    """One condition: its clients, their mean, and the mean of the worst tenth of each seed's."""
    if not one:
        ax.annotate("none", (0.01, y), xycoords=("axes fraction", "data"), va="center", size=TINY, color=MUTED)
        return
    ax.plot(list(one.values()), [y + heights[who] for who in one], "s" if colour == ORANGE else "o", color=colour,
            markersize=size, markeredgewidth=0, alpha=0.75, rasterized=many)  # fmt: skip
    mean, low = fmean(one.values()), worst(one)
    ax.plot([mean, mean], [y - REACH, y + REACH], color=INK, linewidth=1.4)
    ax.plot(low, y + REACH, "v", color=INK, markerfacecolor=PLATE, markersize=5, markeredgewidth=1.2)


def worst(one: Scores) -> float:
    """Mean over seeds of the mean of the lowest tenth, as in the metric of that name."""
    lowest = []
    for seed in sorted({seed for seed, _ in one}):
        own = sorted(value for (at, _), value in one.items() if at == seed)
        lowest.append(fmean(own[: max(1, len(own) // 10)]))
    return fmean(lowest)


def _moves(
    ax: Axes, y: int, differences: Scores, heights: Mapping[tuple[int, int], float], size: float, many: bool
) -> None:
    """How far each client moved, and how many did in words."""
    if not differences:
        return
    level = 1e-9
    sides = {MUTED: 0, RED: 0, BLUE: 0}
    for colour in sides:
        some = {
            who: d for who, d in differences.items() if (BLUE if d > level else RED if d < -level else MUTED) == colour
        }
        sides[colour] = len(some)
        ax.plot(list(some.values()), [y + heights[who] for who in some], "o", color=colour, markersize=size,
                markeredgewidth=0, alpha=0.75, rasterized=many)  # fmt: skip
    middle = median(differences.values())
    lines = [
        (f"{sides[BLUE]:,} better, {sides[RED]:,} worse", INK),
        (f"of {plural(len(differences), 'client')}; median {gain(middle)}", MUTED),
    ]
    for (text, colour), up in zip(lines, (5, -5), strict=True):
        ax.annotate(text, (1, y), xycoords=("axes fraction", "data"), xytext=(8, up), textcoords="offset points",
                    va="center", size=TINY, color=colour, annotation_clip=False)  # fmt: skip
