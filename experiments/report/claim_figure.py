"""What is claimed beside what an audit certified: an upper and a lower bound of the same epsilon, by target."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import blended_transform_factory

from experiments.report.model import Certified
from experiments.report.style import BLUE, INK, LEAK, MUTED, RED, RULE, SMALL, TINY, heading, is_narrow, panel
from experiments.report.values import short

ROW = 0.5


def claims(found: Sequence[Certified], width: float) -> Figure | None:
    """A row a target: the claim as a line, the certified epsilon as a point, and what the audit could have seen."""
    rows = [(one, one.audited) for one in found if one.audited is not None]
    if not rows:
        return None
    margin, high = 1.4 if is_narrow(width) else 1.75, ROW * len(rows) + 0.1
    fig = Figure(figsize=(width, high + 1.3))
    ax = panel(fig, margin, 0.72, width - margin - 0.35, high, grid="x")
    heading(fig, 0.03, 0.02, "Claimed and certified epsilon", "line: claimed at most; point: certified at least")
    names = blended_transform_factory(fig.transFigure, ax.transData)
    for y, (one, audited) in enumerate(rows):
        colour = RED if one.contradicted else BLUE
        ax.annotate(short(one.target, 18), (0.004, y), xycoords=names, va="center", size=SMALL, weight="bold",
                    color=LEAK if one.contradicted else INK, annotation_clip=False)  # fmt: skip
        if one.claimed is not None:
            ax.barh(y, one.claimed, height=0.42, color=RULE, zorder=0.8)
            ax.plot([one.claimed, one.claimed], [y - 0.3, y + 0.3], color=INK, linewidth=2, solid_capstyle="butt")
            if one.visible is not None:
                ax.plot(one.visible, y, "|", color=MUTED, markersize=13, markeredgewidth=1.5)
        ax.plot(audited, y, "o", color=colour, markersize=7, clip_on=False)
        ax.annotate(f"{audited:.2f}", (audited, y), xytext=(7, 0), textcoords="offset points",
                    va="center", size=TINY, color=colour)  # fmt: skip
    far = max(value for one, audited in rows for value in (audited, one.claimed, 1.0) if value is not None)
    ax.set_xlim(0, 1.08 * far)
    ax.set_ylim(len(rows) - 0.45, -0.55)
    ax.set_yticks([])
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6))
    ax.set_xlabel("epsilon (grey mark: what this audit sees of a mechanism with the claimed one)")
    return fig
