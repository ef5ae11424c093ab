"""The figures of the results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.fedd2s.results import BASELINE, Results
from experiments.fedd2s.tables import TITLES
from experiments.report.style import BLUE, GREEN, INK, MUTED, ORANGE, PLATE, RED, RULE, SMALL, TINY, drawing, png

PLOT, GAP, ROW = 1.55, 0.22, 0.19  # inches
FAR = 6.0  # points from which on a mean is a number instead of a mark
METHODS = ("alpha0.1", "alpha0.5", "pathological2", "participation0.2", "cifar10", "omniglot")


def figures(found: Mapping[str, Results]) -> dict[str, bytes]:
    """``methods.png``, ``rounds.png`` and ``schedule.png``, of what there is."""
    methods = {name: found[name] for name in METHODS if name in found}
    drawn = {}
    with drawing():
        if methods:
            drawn["methods.png"] = png(_differences(methods, PLOT))
            drawn["rounds.png"] = png(_rounds(methods))
        if "schedule" in found:
            drawn["schedule.png"] = png(_differences({"schedule": found["schedule"]}, 4.2))
    return drawn


def _differences(found: Mapping[str, Results], width: float) -> Figure:
    """Personal accuracy minus local's: every seed, the mean, and its 95 % interval."""
    rows = [label for label in next(iter(found.values()))["conditions"] if label != BASELINE]
    left, below = 0.35 + 0.075 * max(map(len, rows)), 0.62
    height = 0.5 + ROW * len(rows) + below
    fig = Figure(figsize=(max(left + (width + GAP) * len(found), 5.6), height))
    for column, (name, results) in enumerate(found.items()):
        at = left + column * (width + GAP)
        wide = fig.get_figwidth()
        ax = fig.add_axes((at / wide, below / height, width / wide, ROW * len(rows) / height))
        _strip(ax, rows, results)
        ax.set_yticks(range(len(rows)), rows if column == 0 else [""] * len(rows))
        ax.tick_params(axis="y", labelcolor=INK, labelsize=SMALL)
        ax.set_title(TITLES[name].replace(", ", "\n", 1), fontsize=TINY, color=INK, loc="left")
    fig.text(0.01, 0.02, "Points of personal accuracy beyond training alone: seeds, their mean, its 95 % interval.\n"
             f"Means beyond {FAR:g} points as numbers.", fontsize=TINY, color=MUTED)  # fmt: skip
    return fig


def _strip(ax: Axes, rows: Sequence[str], results: Results) -> None:
    base = results["conditions"][BASELINE]["values"]["personal"]
    ax.axvline(0, color=MUTED, linewidth=0.8)
    for y, label in enumerate(rows):
        said = results["conditions"].get(label)
        if said is None:
            continue
        points = [100 * (v - base[seed]) for seed, v in said["values"]["personal"].items() if seed in base]
        mean, interval = fmean(points), said["minus_baseline"]["personal"]
        colour = MUTED if abs(mean) < 0.05 else GREEN if mean > 0 else RED
        if abs(mean) > FAR:
            text, side = (f"{mean:+.0f} ▶", "right") if mean > 0 else (f"◀ {mean:+.0f}", "left")
            ax.annotate(text.replace("-", "−"), (math.copysign(FAR + 1, mean), y), ha=side, va="center",
                        fontsize=TINY, color=colour)  # fmt: skip
            continue
        ax.plot(np.clip(points, -FAR, FAR), [y] * len(points), "o", color=colour, markersize=2.6, alpha=0.5,
                markeredgewidth=0)  # fmt: skip
        if interval["low"] is not None:
            ends = np.clip([100 * interval["low"], 100 * interval["high"]], -FAR - 1, FAR + 1)
            ax.plot(ends, [y, y], "-", color=colour, linewidth=1.2)
        ax.plot(mean, y, "D", color=colour, markersize=4, markeredgecolor=PLATE, markeredgewidth=0.5)
    ax.set_xlim(-FAR - 1, FAR + 1)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.grid(axis="x", color=RULE, linewidth=0.6)
    ax.spines[["top", "right", "left"]].set_visible(False)


def _rounds(found: Mapping[str, Results]) -> Figure:
    """Personal accuracy by round, mean over seeds: FedD2S and FedGKT among the others."""
    fig = Figure(figsize=(8.6, 4.9))
    named = {"local": (INK, "-"), "fedd2s": (BLUE, "-"), "fedgkt": (GREEN, "--"), "fedrep": (ORANGE, "-."),
             "fedavg": (RED, ":")}  # fmt: skip
    for i, (name, results) in enumerate(found.items()):
        ax = fig.add_subplot(2, 3, i + 1)
        for label, said in results["conditions"].items():
            curve = {int(t): v for t, v in said["personal_by_round"].items()}
            colour, line = named.get(label, (RULE, "-"))
            ax.plot(list(curve), list(curve.values()), line, color=colour, linewidth=1.6 if label in named else 0.9,
                    zorder=3 if label in named else 1, label=label if label in named else None)  # fmt: skip
        ax.set_title(TITLES[name], fontsize=TINY, color=INK, loc="left")
        ax.spines[["top", "right"]].set_visible(False)
        alone = list(results["conditions"][BASELINE]["personal_by_round"].values())
        ax.set_ylim(alone[0] - 0.6 * (alone[-1] - alone[0]) - 0.02, alone[-1] + 0.6 * (alone[-1] - alone[0]) + 0.02)
        ax.set_xticks([int(t) for t in results["conditions"][BASELINE]["personal_by_round"]])
        ax.set_xlabel("round" if i >= 3 else "")
    handles, labels = fig.axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, fontsize=TINY, frameon=False, ncols=5, loc="lower right")
    fig.text(
        0.01,
        0.005,
        "Personal accuracy, mean over seeds; grey: the other methods. Curves far below are cut off.",
        fontsize=TINY,
        color=MUTED,
    )
    fig.tight_layout(rect=(0, 0.02, 1, 1))
    return fig
