"""Epsilon against the number of releases and against the size of the cohort."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from experiments.report.style import BLUE, GREEN, INK, MUTED, ORANGE, PLATE, TINY, drawing, heading, panel
from privacy.calculator import Question, against_cohort, against_rounds
from privacy.releases import EVERYONE, WithoutReplacement
from privacy.statement import rounded_up

POINTS = 9  # of one line; each costs one query of the accountant


def write(asked: Question, place: Path) -> Path:
    """Draw the figure into a .png or .svg file."""
    with drawing():
        drawn = figure(asked)
        metadata = {"Software": None} if place.suffix == ".png" else {"Date": None, "Creator": None}
        place.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(place, dpi=150, facecolor=PLATE, metadata=metadata)
    return place


def figure(asked: Question) -> Figure:
    """Two panels; the second only for Gaussian noise over a sampled population of known size."""
    both = asked.units is not None and asked.kind == "gaussian" and asked.sampling != EVERYONE
    drawn = Figure(figsize=(8.6 if both else 6.4, 3.9))
    heading(drawn, 0.2, 0.12, "Epsilon against rounds", _setting(asked))
    left = panel(drawn, 0.62, 0.66, 3.5 if both else 5.5, 2.25)
    _rounds(left, asked)
    if both:
        heading(drawn, 4.8, 0.12, "Epsilon against the cohort", f"of {asked.units}, after {asked.steps} releases")
        _cohort(panel(drawn, 5.02, 0.66, 3.3, 2.25), asked)
    words = f"one {asked.unit}, {asked.relation}, delta {asked.delta:g}, seen by the {asked.observer}; upper bounds by "
    words += "RDP" if isinstance(asked.sampling, WithoutReplacement) else "PLD"
    words += "; not covered: see the statement"
    drawn.text(0.2 / drawn.get_figwidth(), 0.035, words, size=TINY, color=MUTED)
    return drawn


def _setting(asked: Question) -> str:
    return f"{asked.kind}, noise {asked.noise:.4g}, sampling: {str(asked.sampling).partition(',')[0].partition(':')[0]}"


def _rounds(ax: Axes, asked: Question) -> None:
    if asked.answers is not None and asked.kind == "confident-votes":  # keep the share of answers
        share = asked.answers / asked.steps
        at: Callable[[int], Question] = lambda n: replace(asked, steps=n, answers=round(share * n))  # noqa: E731
    else:
        at = lambda n: replace(asked, steps=n)  # noqa: E731
    rounds = _spread(1, 2 * asked.steps, include=asked.steps)
    values = [against_rounds(at(n), [n])[0] for n in rounds]
    ax.plot(rounds, values, color=BLUE, marker="o")
    if asked.sampling != EVERYONE and asked.kind in ("gaussian", "laplace"):
        whole = against_rounds(replace(asked, sampling=EVERYONE), rounds)
        ax.plot(rounds, whole, color=ORANGE, linestyle="--", label="no amplification")
        ax.plot([], [], color=BLUE, marker="o", label="as sampled")
        _logarithmic(ax, ax.yaxis)
        ax.legend(frameon=False, fontsize=TINY, loc="upper left", bbox_to_anchor=(0, -0.22), ncols=2)
    _mark(ax, asked.steps, values[rounds.index(asked.steps)])
    ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    ax.set_xlabel("releases")
    ax.set_ylabel("epsilon")


def _cohort(ax: Axes, asked: Question) -> None:
    units = asked.units or 1
    rate = asked.sampling.cohort / units if isinstance(asked.sampling, WithoutReplacement) else asked.sampling.rate  # type: ignore[union-attr]
    now = max(1, round(rate * units))
    cohorts = _spread(max(1, now // 8), min(units, 8 * now), include=now)
    same = against_cohort(asked, cohorts, mean_noise=False)
    ax.plot(cohorts, same, color=BLUE, marker="o", label="same noise on the sum")
    mean = against_cohort(asked, cohorts, mean_noise=True)
    ax.plot(cohorts, mean, color=GREEN, marker="s", linestyle="--", label="same noise on the mean")
    _mark(ax, now, same[cohorts.index(now)])
    _logarithmic(ax, ax.xaxis)
    _logarithmic(ax, ax.yaxis)
    ax.set_xlabel("units in one release" + ("" if isinstance(asked.sampling, WithoutReplacement) else ", expected"))
    ax.legend(frameon=False, fontsize=TINY, loc="upper left", bbox_to_anchor=(0, -0.22), ncols=2)


def _logarithmic(ax: Axes, axis: Axis) -> None:
    """A logarithmic axis with plain numbers."""
    (ax.set_xscale if axis is ax.xaxis else ax.set_yscale)("log")
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_locator(NullLocator())


def _mark(ax: Axes, x: float, y: float) -> None:
    ax.plot([x], [y], "o", color=INK, markersize=6, markerfacecolor=PLATE, zorder=5)
    ax.annotate(rounded_up(y), (x, y), xytext=(2, -13), textcoords="offset points", size=TINY, color=INK)


def _spread(low: int, high: int, include: int) -> list[int]:
    """Whole numbers from low to high, evenly spaced in ratio, one of them given and no other one close to it."""
    ratio = (high / low) ** (1 / (POINTS - 1))
    spaced = {round(low * ratio**i) for i in range(POINTS)}
    return sorted({include, *(n for n in spaced if not 0.8 < n / include < 1.25)})
