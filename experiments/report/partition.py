"""The picture of who holds what: clients down, classes across."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from experiments.report.model import Run
from experiments.report.style import BLUE, INK, MUTED, RULE, SMALL, TINY, is_narrow, panel

HEAT = "#0b70ae"  # the same on light and on dark pages: white letters stand on it
Counts = NDArray[np.int64]


def counts(run: Run) -> Counts:
    """Records per client (rows) and class (columns); short rows are filled with zeros."""
    width = max((len(row.classes) for row in run.rows), default=0)
    table = np.zeros((len(run.rows), width), dtype=np.int64)
    for line, row in zip(table, run.rows, strict=True):
        line[: len(row.classes)] = row.classes
    return table


def partition(run: Run, width: float) -> Figure | None:
    """A heat map of record counts with the totals of each class above and of each client beside it.

    Bars with the clients' sizes where there is a single class, as in text.
    """
    table = counts(run)
    if table.size == 0 or table.max() <= 0:
        return None
    rows, columns = table.shape
    if columns == 1:
        return _sizes(run, table[:, 0], width)
    narrow = is_narrow(width)
    across = min(width - 0.6 - (0.75 if narrow else 1.1), max(2.2, columns * 0.62))
    high = float(np.clip(rows * 0.27, 0.9, 5.4))
    fig = Figure(figsize=(width, high + 2.0))
    ax = panel(fig, 0.6, 0.75, across, high, grid="none")
    _heat(ax, table)
    _ticks(ax, run, table, across, high)
    if across / columns >= 0.3 and high / rows >= 0.16:
        _numbers(ax, table)
    _totals(panel(fig, 0.6, 0.16, across, 0.53, grid="none"), table.sum(axis=0), upright=True)
    side = 0.6 if narrow else 0.9
    _totals(panel(fig, 0.6 + across + 0.06, 0.75, side, high, grid="none"), table.sum(axis=1), upright=False)
    fig.text((0.6 + across + 0.08) / width, 1 - 0.7 / (high + 2.0), "per client", size=TINY, color=MUTED, va="bottom")
    _scale(fig, int(table.max()), high)
    return fig


def _sizes(run: Run, sizes: Counts, width: float) -> Figure:
    """Records of each client."""
    rows = len(sizes)
    high = float(np.clip(rows * 0.27, 0.6, 5.4))
    fig = Figure(figsize=(width, high + 0.65))
    ax = panel(fig, 0.6, 0.1, width - 0.6 - 0.7, high, grid="x")
    ax.barh(np.arange(rows), sizes, height=0.66, color=BLUE)
    ax.set_ylim(rows - 0.5, -0.5)
    ax.set_xlim(0, sizes.max())
    every = _every(rows, high, 0.19)
    ax.set_yticks(range(0, rows, every), [str(run.rows[i].client) for i in range(0, rows, every)])
    ax.tick_params(axis="y", length=0, pad=4)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=4 if is_narrow(width) else 8, integer=True))
    ax.set_xlabel("records")
    ax.set_ylabel("client (number)")
    if every == 1:
        for y, value in enumerate(sizes):
            ax.annotate(f"{value:,}", (value, y), xytext=(5, 0), textcoords="offset points", va="center", size=SMALL,
                        color=INK, annotation_clip=False)  # fmt: skip
    return fig


def _shade(share: NDArray[np.float64]) -> NDArray[np.float64]:
    """Opacity for a share of the largest count: by its square root, so that single records can still be seen."""
    return np.where(share > 0, 0.10 + 0.90 * np.sqrt(share), 0.0)


def _heat(ax: Axes, table: Counts) -> None:
    """The cells: one blue, more opaque with more records, clear where there are none."""
    pixels = np.zeros((*table.shape, 4))
    pixels[..., :3] = mpl.colors.to_rgb(HEAT)
    pixels[..., 3] = _shade(table / table.max())
    if table.size <= 1200:
        rows, columns = table.shape
        ax.pcolormesh(np.arange(columns + 1) - 0.5, np.arange(rows + 1) - 0.5, pixels, linewidth=0)
        ax.set_ylim(rows - 0.5, -0.5)
    else:
        ax.imshow(np.round(pixels * 255).astype(np.uint8), aspect="auto", interpolation="none")
    ax.spines[["left", "right", "top", "bottom"]].set_visible(True)
    ax.spines[["left", "right", "top", "bottom"]].set_color(RULE)


def _ticks(ax: Axes, run: Run, table: Counts, across: float, high: float) -> None:
    """As many class and client numbers as there is room for."""
    rows, columns = table.shape
    every = _every(columns, across, 0.26)
    ax.set_xticks(range(0, columns, every), [str(i) for i in range(0, columns, every)])
    every = _every(rows, high, 0.19)
    ax.set_yticks(range(0, rows, every), [str(run.rows[i].client) for i in range(0, rows, every)])
    ax.tick_params(axis="both", length=0, pad=4)
    ax.set_xlabel("class (number)")
    ax.set_ylabel("client (number)")


def _every(n: int, room: float, each: float) -> int:
    """The round step (1, 2, 5, 10, 20, ...) at which n labels of `each` inches fit."""
    steps = (int(step * 10**power) for power in range(7) for step in (1, 2, 5))
    return next(step for step in steps if n / step * each <= max(room, each))


def _numbers(ax: Axes, table: Counts) -> None:
    """The counts themselves."""
    top = table.max()
    for (y, x), value in np.ndenumerate(table):
        if value:
            colour = "#fefefe" if value / top > 0.3 else INK
            ax.text(x, y, f"{value}", ha="center", va="center", size=TINY - 0.5, color=colour)


def _totals(ax: Axes, sums: Counts, upright: bool) -> None:
    """Bars with the totals of the rows or of the columns, and the largest written out."""
    places = np.arange(len(sums))
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.set_xticks([])
    ax.set_yticks([])
    if upright:
        ax.bar(places, sums, width=0.72, color=MUTED, alpha=0.55)
        ax.set_xlim(-0.5, len(sums) - 0.5)
        ax.set_ylim(0, sums.max() * 1.3)
        ax.set_title(f"records per class (largest {sums.max():,})", loc="left", size=TINY, color=MUTED, pad=2)
    else:
        ax.barh(places, sums, height=0.72, color=MUTED, alpha=0.55)
        ax.set_ylim(len(sums) - 0.5, -0.5)
        ax.set_xlim(0, sums.max() * 1.05)
        ax.set_xlabel(f"max {sums.max():,}", size=TINY, labelpad=6)


def _scale(fig: Figure, top: int, high: float) -> None:
    """Five swatches with their counts."""
    values = sorted({1, *(max(1, round(top * share)) for share in (0.06, 0.25, 0.56, 1.0))})
    ax = panel(fig, 0.6, high + 1.5, 0.55 * len(values), 0.14, grid="none")
    pixels = np.zeros((1, len(values), 4))
    pixels[..., :3] = mpl.colors.to_rgb(HEAT)
    pixels[0, :, 3] = _shade(np.array(values) / top)
    ax.pcolormesh(np.arange(len(values) + 1) - 0.5, [0, 1], pixels, linewidth=0)
    ax.set_xticks(range(len(values)), [f"{value:,}" for value in values])
    ax.set_yticks([])
    ax.tick_params(axis="x", length=0, pad=3)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.set_title("records of one class at one client", loc="left", size=TINY, color=MUTED, pad=3)
