"""Figures of the clients one by one, and of the compared runs side by side."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.report.model import ClientRow, Run
from experiments.report.style import (
    BLUE,
    INK,
    MUTED,
    ORANGE,
    PLATE,
    RED,
    RULE,
    SMALL,
    TINY,
    heading,
    is_narrow,
    panel,
    row_names,
)
from experiments.report.values import fraction, short
from experiments.report.verdict import change

MANY = 30
ROW = 0.235
Metrics = tuple[tuple[str, str], ...]


def clients(run: Run, width: float) -> Figure | None:
    """Each client from training alone to this run: paired dots, or distributions when there are many clients."""
    rows = [row for row in run.rows if row.balanced is not None or row.personal is not None]
    if not rows:
        return None
    before = {row.client: row for row in run.baseline.rows} if run.baseline is not None else {}
    draw = _pairs if len(rows) <= MANY else _distributions
    return draw(rows, before, _metrics(run), width)


def _metrics(run: Run) -> Metrics:
    """Fields of a client and what they are called."""
    return ("balanced", run.shared.capitalize()), ("personal", "Personal")


def _sort_key(row: ClientRow) -> float:
    """Best balanced accuracy first, else best personal accuracy."""
    value = row.balanced if row.balanced is not None else row.personal
    return -(value or 0.0)


def _pairs(rows: list[ClientRow], before: dict[int, ClientRow], metrics: Metrics, width: float) -> Figure:
    """One row per client: hollow for training alone, filled for this run, the line between coloured by direction."""
    rows = sorted(rows, key=_sort_key)
    narrow = is_narrow(width)
    margin, gap, high = (1.2, 0.22, ROW * len(rows) + 0.1) if narrow else (1.5, 0.5, ROW * len(rows) + 0.1)
    each = (width - margin - gap - 0.12) / 2
    fig = Figure(figsize=(width, high + 1.12))
    marks = [("o", BLUE, BLUE, "this run")]
    if before:
        ours = "" if narrow else "this run, "
        marks = [
            ("s", ORANGE, PLATE, "training alone"),
            ("o", BLUE, BLUE, f"{ours}better"),
            ("o", RED, RED, f"{ours}worse"),
        ]
    _key(fig, marks)
    names = [short(f"client {row.client} · {row.model}", 17 if narrow else 22) for row in rows]
    for i, (name, title) in enumerate(metrics):
        left = margin + i * (each + gap)
        heading(fig, left, 0.4, title if narrow else f"{title} accuracy")
        ax = panel(fig, left, 0.65, each, high, grid="x")
        _dots(ax, rows, before, name)
        ax.set_ylim(len(rows) - 0.4, -0.6)
        row_names(ax, names if i == 0 else [])
        ax.xaxis.set_major_locator(MaxNLocator(nbins=3 if narrow else 6, steps=[1, 2, 5, 10]))
        ax.set_xlabel("accuracy (fraction)" if not narrow else "fraction correct")
        ax.margins(x=0.06)
    return fig


def _dots(ax: Axes, rows: list[ClientRow], before: dict[int, ClientRow], name: str) -> None:
    """The pairs of one panel."""
    for y, row in enumerate(rows):
        new = getattr(row, name)
        old = getattr(before[row.client], name) if row.client in before else None
        if new is not None and old is not None:
            ax.plot([old, new], [y, y], "-" if new >= old else ":", color=BLUE if new >= old else RED, linewidth=2)
        if old is not None:
            ax.plot(old, y, "s", color=ORANGE, markerfacecolor=PLATE, markersize=5, markeredgewidth=1.4)
        if new is not None:
            ax.plot(new, y, "o", color=RED if old is not None and new < old else BLUE, markersize=6, markeredgewidth=0)


def _key(fig: Figure, marks: Sequence[tuple[str, str, str, str]]) -> None:
    """What the marks mean, in one line above the panels; each is marker or line, edge, face and text."""
    width, height = fig.get_size_inches()
    ax = fig.add_axes((0, 1 - 0.28 / height, 1, 0.24 / height))
    ax.set_axis_off()
    ax.set_xlim(0, width)
    ax.set_ylim(0, 1)
    at = 0.04
    for mark, edge, face, text in marks:
        if mark in ("-", "--"):
            ax.plot([at, at + 0.28], [0.5, 0.5], mark, color=edge)
            at += 0.2
        else:
            ax.plot(at + 0.05, 0.5, mark, color=edge, markerfacecolor=face, markeredgewidth=1.4, markersize=5.5)
        ax.text(at + 0.16, 0.5, text, va="center", color=MUTED, size=SMALL)
        at += 0.42 + 0.072 * len(text)


def _distributions(rows: list[ClientRow], before: dict[int, ClientRow], metrics: Metrics, width: float) -> Figure:
    """Above: share of clients at or below an accuracy. Below: how far each client moved."""
    narrow, high = is_narrow(width), 1.95
    each = width - 0.7 if narrow else (width - 1.5) / 2
    kinds = [_cumulative, _moves] if any(row.client in before for row in rows) else [_cumulative]
    cells = [(metric, kind) for metric in metrics for kind in kinds]
    down = len(cells) if narrow else len(kinds)
    fig = Figure(figsize=(width, down * (high + 1.05) + 0.38))
    _key(fig, [("--", ORANGE, ORANGE, "training alone")] * bool(before) + [("-", BLUE, BLUE, "this run")])
    for i, ((name, metric), kind) in enumerate(cells):
        column, line = (0, i) if narrow else divmod(i, len(kinds))
        left, top = 0.6 + column * (each + 0.8), 0.93 + line * (high + 1.05)
        moves = _differences(rows, before, name)
        note = f"{sum(m < 0 for m in moves)} clients worse, {sum(m > 0 for m in moves)} better"
        if kind is _cumulative:
            title, note = f"{metric} accuracy", "further to the right is better"
        else:
            title = f"Change in {metric.lower()} accuracy"
        heading(fig, left - 0.5, top - 0.5, title, note)
        kind(panel(fig, left, top, each, high), rows, before, name)
    return fig


def _cumulative(ax: Axes, rows: list[ClientRow], before: dict[int, ClientRow], name: str) -> None:
    """The share of clients whose accuracy is at most x, for training alone and for this run."""
    runs = [([getattr(row, name) for row in rows], BLUE, "-")]
    if before:
        runs.insert(0, ([getattr(row, name) for row in before.values()], ORANGE, "--"))
    for values, colour, style in runs:
        known = sorted(value for value in values if value is not None)
        if not known:
            continue
        shares = [(i + 1) / len(known) for i in range(len(known))]
        ax.step([known[0], *known], [0, *shares], style, where="post", color=colour)
    ax.set_ylim(0, 1.03)
    ax.set_xlabel("accuracy (fraction correct)")
    ax.set_ylabel("share of clients at or below")


def _differences(rows: list[ClientRow], before: dict[int, ClientRow], name: str) -> list[float]:
    """This run minus training alone, in points, for every client that has both."""
    pairs = [(getattr(row, name), getattr(before[row.client], name)) for row in rows if row.client in before]
    return [100 * (new - old) for new, old in pairs if new is not None and old is not None]


def _moves(ax: Axes, rows: list[ClientRow], before: dict[int, ClientRow], name: str) -> None:
    """How many clients moved how far, in points; the losers hatched by colour."""
    moves = _differences(rows, before, name)
    ax.set_xlabel("this run minus training alone (points)")
    ax.set_ylabel("clients")
    if not moves:
        return
    step = max(0.5, (max(moves) - min(moves)) / 24)
    first = int(min(min(moves), 0) // step) - 1
    edges = [step * (first + i) for i in range(int((max(*moves, 0) - step * first) // step) + 2)]
    _, _, bars = ax.hist(moves, bins=edges, color=BLUE, edgecolor=PLATE, linewidth=0.6)
    for bar, left in zip(bars, edges, strict=False):  # type: ignore[arg-type]
        if left < -1e-9:
            bar.set_facecolor(RED)
    ax.axvline(0, color=MUTED, linewidth=1, linestyle="--")
    ax.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))


def comparison(run: Run, width: float) -> Figure | None:
    """Balanced and personal accuracy of this run and of every compared run; None without any to compare."""
    if not run.compare:
        return None
    rows = sorted((run, *run.compare), key=lambda row: -(row.accuracy.balanced_mean or -1.0))
    narrow, high = is_narrow(width), 0.29 * len(rows) + 0.12
    margin = 1.35 if narrow else 2.2
    fig = Figure(figsize=(width, high + 0.85))
    ax = panel(fig, margin, 0.38, width - margin - 0.25, high, grid="x")
    base = run.reference
    for y, row in enumerate(rows):
        worse = base is not None and change(row.accuracy.balanced_mean, base.accuracy.balanced_mean) == -1
        _comparison_row(ax, y, row, RED if worse else BLUE if row is run else MUTED)
    for value, style in ((base.accuracy.balanced_mean, "--"), (base.accuracy.personal_mean, ":")) if base else ():
        if value is not None:
            ax.axvline(value, color=ORANGE, linestyle=style, linewidth=1.1, zorder=1)
    names = [("this run" if row is run else short(row.label, 18 if narrow else 30)) for row in rows]
    row_names(ax, names, bold=rows.index(run))
    ax.set_ylim(len(rows) - 0.4, -0.6)
    low, right = ax.get_xlim()
    ax.set_xlim(low - (right - low) * (0.18 if narrow else 0.05), right + (right - low) * 0.03)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=4 if narrow else 8, steps=[1, 2, 5, 10]))
    ax.set_xlabel("accuracy (fraction correct)")
    marks = [("o", MUTED, MUTED, run.shared), ("D", MUTED, PLATE, "personal")]
    alone = "training alone" + ("" if narrow else f" (dashed: {run.shared}, dotted: personal)")
    _key(fig, marks + [("--", ORANGE, ORANGE, alone)] * (base is not None))
    return fig


def _comparison_row(ax: Axes, y: int, row: Run, colour: str) -> None:
    """One run: filled for balanced, hollow for personal accuracy."""
    balanced, personal = row.accuracy.balanced_mean, row.accuracy.personal_mean
    if balanced is not None and personal is not None:
        ax.plot([balanced, personal], [y, y], color=RULE, linewidth=1.5, zorder=1.5)
    if balanced is not None:
        ax.plot(balanced, y, "o", color=colour, markersize=7, markeredgewidth=0)
        ax.annotate(fraction(balanced), (balanced, y), xytext=(-8, 0), textcoords="offset points", ha="right",
                    va="center", size=TINY, color=INK, bbox={"fc": PLATE, "ec": "none", "pad": 0.8})  # fmt: skip
    if personal is not None:
        ax.plot(personal, y, "D", color=colour, markerfacecolor=PLATE, markersize=5.5, markeredgewidth=1.4)
