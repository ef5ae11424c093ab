"""The audit's picture: how well canaries in can be told from canaries out, beside what chance would give."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, MultipleLocator
from matplotlib.transforms import blended_transform_factory

from experiments.report.model import Audit, Target
from experiments.report.style import BLUE, INK, LEAK, MUTED, PLATE, RED, RULE, SMALL, TINY, heading, is_narrow, panel
from experiments.report.values import short

ROW = 0.52


def audit_intervals(audit: Audit, width: float) -> Figure | None:
    """AUROC with interval and null band, and mean exposure with its chance level; one row per audited target."""
    rows = [one for one in audit.targets if one.auroc is not None or one.exposure is not None]
    if not rows:
        return None
    narrow, high = is_narrow(width), ROW * len(rows) + 0.1
    margin = 1.4 if narrow else 1.75
    fig = Figure(figsize=(width, 2 * (high + 1.3) if narrow else high + 1.25))
    room = width - margin - 0.2
    places = ((margin, 0.72, room), (margin, high + 1.4 + 0.72, room)) if narrow else (
        (margin, 0.72, room * 0.60), (margin + room * 0.60 + 0.45, 0.72, room * 0.40 - 0.45)
    )  # fmt: skip
    for i, (left, top, wide) in enumerate(places):
        ax = panel(fig, left, top, wide, high, grid="x")
        edge = 0.03 if narrow else left
        if i == 0:
            heading(fig, edge, top - 0.72, "Telling members from non-members", "AUROC: 0.5 is guessing, 1 is certain")
            _auroc(ax, rows, audit.chance_auroc)
        else:
            heading(fig, edge, top - 0.72, "Exposure of the canaries", "mean over canaries")
            _exposure(ax, rows, audit.chance_exposure)
        ax.set_ylim(len(rows) - 0.45, -0.55)
        ax.set_yticks([])
        if i == 0 or narrow:
            _names(ax, rows)
    return fig


def _colour(one: Target) -> str:
    """Red for a leak in what leaves, blue for the rest of what leaves, grey for what stays home."""
    return MUTED if not one.leaves else RED if one.leaks else BLUE


def _names(ax: Axes, rows: Sequence[Target]) -> None:
    """Two lines per target: its name, and whether anyone outside ever sees it."""
    at = blended_transform_factory(ax.get_figure(root=True).transFigure, ax.transData)  # type: ignore[union-attr]
    for y, one in enumerate(rows):
        where = "leaves the client" if one.leaves else "stays home"
        for text, dy, colour, weight, size in (
            (short(one.name, 18), 6, INK, "bold" if one.leaves else "normal", SMALL),
            (where, -6, LEAK if one.leaves and one.leaks else MUTED, "normal", TINY),
        ):
            ax.annotate(
                text, (0.004, y), xycoords=at, xytext=(0, dy), textcoords="offset points",
                va="center", color=colour, weight=weight, size=size, annotation_clip=False,
            )  # fmt: skip


def _auroc(ax: Axes, rows: Sequence[Target], chance: float) -> None:
    """Null band, interval and point of each target."""
    ax.axvline(chance, color=MUTED, linestyle="--", linewidth=1, zorder=1)
    for y, one in enumerate(rows):
        if one.null_low is not None and one.null_high is not None:
            ax.barh(y, one.null_high - one.null_low, left=one.null_low, height=0.42, color=RULE, zorder=0.8)
        if one.low is not None and one.high is not None:
            ax.plot(
                [one.low, one.high], [y, y], color=_colour(one), linewidth=2.2, solid_capstyle="butt", clip_on=False
            )
        if one.auroc is not None:
            _point(ax, one.auroc, y, one, (0, 8.5), "center")
    known = [value for one in rows for value in (one.auroc, one.low, one.null_low) if value is not None]
    ax.set_xlim(max(0.0, min([0.4, *known]) - 0.03), 1.0)
    ax.xaxis.set_major_locator(MultipleLocator(0.1))
    _chance(ax, chance, "chance")
    ax.set_xlabel("AUROC (line: interval, grey: null band)")


def _point(ax: Axes, x: float, y: int, one: Target, shift: tuple[float, float], ha: str) -> None:
    """The estimate, filled when it leaves the client, with its value beside it."""
    face = _colour(one) if one.leaves else PLATE
    ax.plot(
        x, y, "o" if one.leaves else "D", color=_colour(one), markerfacecolor=face, markersize=7, markeredgewidth=1.5,
        clip_on=False,
    )  # fmt: skip
    va = "bottom" if ha == "center" else "center"
    ax.annotate(
        f"{x:.2f}", (x, y), xytext=shift, textcoords="offset points", ha=ha, va=va,
        size=TINY, color=INK, bbox={"facecolor": PLATE, "edgecolor": "none", "pad": 0.5},
    )  # fmt: skip


def _chance(ax: Axes, x: float, text: str) -> None:
    """The name of the chance line, above the panel."""
    ax.annotate(text, (x, 1), xycoords=("data", "axes fraction"), xytext=(0, 2), textcoords="offset points",
                ha="center", va="bottom", size=TINY, color=MUTED)  # fmt: skip


def _exposure(ax: Axes, rows: Sequence[Target], chance: float) -> None:
    """Mean exposure of each target beside its own chance level."""
    ax.axvline(chance, color=MUTED, linestyle="--", linewidth=1, zorder=1)
    for y, one in enumerate(rows):
        if one.exposure is None:
            continue
        start = chance if one.exposure_chance is None else one.exposure_chance
        ax.plot([start, one.exposure], [y, y], color=_colour(one), linewidth=2.2, solid_capstyle="butt")
        ax.plot(start, y, "|", color=MUTED, markersize=12, markeredgewidth=1.5)
        _point(ax, one.exposure, y, one, (9, -0.5), "left")
    ax.set_xlim(0, 1.25 * max([2.0, *(one.exposure for one in rows if one.exposure is not None)]))
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5))
    _chance(ax, chance, f"chance {chance:.2f} bits")
    ax.set_xlabel("mean exposure (bits)")
