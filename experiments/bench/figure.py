"""The bench as a figure: one panel a work, one row a contender, on a logarithmic axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from experiments.bench.show import amount, times, verdict
from experiments.report.style import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PLATE,
    RED,
    SMALL,
    TINY,
    WIDE,
    drawing,
    heading,
    panel,
    row_names,
)  # fmt: skip

_ROW, _HEAD, _FOOT, _LEFT, _PLOT = 0.23, 0.5, 0.42, 1.45, 4.3  # inches
_NOTE = 0.55


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Write ``path`` with .svg and .png; equal results give equal files."""
    with drawing(**{"svg.fonttype": "path"}):
        fig = figure(results)
        if fig is None:
            return
        fig.savefig(path.with_suffix(".svg"), metadata={"Date": None, "Creator": None})
        fig.savefig(path.with_suffix(".png"), dpi=160, metadata={"Software": None})


def figure(results: Mapping[str, Any]) -> Figure | None:
    """The figure; None when nothing was measured."""
    works = [(work, shown) for work in results["works"] if (shown := [c for c in work["contenders"] if c["value"]])]
    if not works:
        return None
    heights = [_HEAD + _ROW * len(shown) + _FOOT for _, shown in works]
    fig = Figure(figsize=(WIDE, sum(heights) + _NOTE), facecolor=PLATE)
    top = 0.1
    for (work, shown), height in zip(works, heights, strict=True):
        heading(fig, 0.04, top, f"{work['name']}: {work['what']}", _sizes(work))
        _panel(panel(fig, _LEFT, top + _HEAD, _PLOT, _ROW * len(shown), grid="x"), work, shown)
        top += height
    _legend(fig, results)
    return fig


def _sizes(work: Mapping[str, Any]) -> str:
    said = [f"{name.replace('_', ' ')} {value:,}" for name, value in work["sizes"].items()]
    return ", ".join(said) or "each in a process of its own"


def _panel(ax: Axes, work: Mapping[str, Any], shown: Sequence[Mapping[str, Any]]) -> None:
    unit = work["unit"]
    base = next((c["value"]["median"] for c in shown if c["name"] == work["reference"]), None)
    limits = [_limit(one, base) for one in shown]
    ax.set_xscale("log")
    ax.set_ylim(len(shown) - 0.4, -0.6)
    row_names(ax, [one["name"] for one in shown])
    for y, (one, limit) in enumerate(zip(shown, limits, strict=True)):
        value = one["value"]
        colour, marker = (BLUE, "o") if one["ours"] else (ORANGE, "s")
        if one["name"] == work["reference"]:
            colour, marker = INK, "D"
        ax.plot([value["min"], value["max"]], [y, y], color=colour, linewidth=1.4, solid_capstyle="butt")
        ax.plot([value["median"]], [y], marker, color=colour, markeredgewidth=0, markersize=5.5)
        if limit is not None:
            ax.plot([limit], [y], "|", color=GREEN if one["reach"]["met"] else RED, markersize=13, markeredgewidth=2)
        ax.annotate(
            _label(one, unit), (1, y), xycoords=("axes fraction", "data"), xytext=(8, 0), textcoords="offset points",
            va="center", size=SMALL, annotation_clip=False,
        )  # fmt: skip
    values = [v for one in shown for v in (one["value"]["min"], one["value"]["max"])]
    values += [limit for limit in limits if limit is not None]
    ax.set_xlim(min(values) / 1.5, max(values) * 1.5)
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0,) if max(values) / min(values) > 30 else (1.0, 2.0, 5.0)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _tick(x, unit)))
    ax.xaxis.set_minor_formatter(NullFormatter())


def _tick(value: float, unit: str) -> str:
    if unit != "s":
        return f"{value:,.0f} {unit}"
    scale, name = (1.0, "s") if value >= 0.999 else (1e-3, "ms") if value >= 0.999e-3 else (1e-6, "µs")
    return f"{value / scale:g} {name}"


def _limit(one: Mapping[str, Any], base: float | None) -> float | None:
    """Where the limit lies on the axis."""
    reach = one["reach"]
    if reach is None or reach["met"] is None or (reach["of"] == "ratio" and base is None):
        return None
    return float(reach["limit"] if reach["of"] == "value" else reach["limit"] * base)


def _label(one: Mapping[str, Any], unit: str) -> str:
    return "   ".join(
        part for part in (amount(one["value"]["median"], unit), times(one["ratio"]), verdict(one, unit)) if part
    )


def _legend(fig: Figure, results: Mapping[str, Any]) -> None:
    width, height = fig.get_size_inches()
    key = "circle: fedkd   square: others   diamond: what counts as 1.00x   line: smallest to largest   bar: to reach"
    place = results["machine"]
    about = (
        f"{place['processor']}, {place['usable_cores']} cores, 1 thread a process, median of {results['repeats']} turns"
    )
    quick = "; sizes cut for a test, the figures mean nothing" if results["quick"] else ""
    for at, text in ((0.38, key), (0.2, about + quick)):
        fig.text(0.04 / width, at / height, text, size=TINY + 0.5, color=MUTED, va="center")
