"""The evidence on privacy as tables and figures."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.markdown import row, spread
from experiments.privacy import results as collecting
from experiments.report.inversion_figure import reconstructions, row_of
from experiments.report.style import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, RED, TINY, WIDE, drawing, panel, png
from experiments.report.style import row_names as name_rows
from experiments.report.values import DASH

Condition = dict[str, Any]
LEVELS = {
    "record": "Record level: ambassadors, DP-SGD",
    "client": "Client level: noise on messages",
    "as of 1000": "Client level, noise as of 1,000 clients",
}
METHODS = {
    "fedavg": (INK, "o"),
    "fedmd": (BLUE, "s"),
    "fedproto": (GREEN, "^"),
    "fedd2s": (ORANGE, "D"),
    "kd3": (PURPLE, "v"),
}
CHANNELS = (
    ("fedavg", "message", "weights: a client's model after one more round"),
    ("fedavg", "student", "weights: the average"),
    ("fedmd", "message", "logits on public images: a client's"),
    ("fedmd", "aggregate", "logits on public images: their mean"),
    ("feddf", "student", "student distilled from weights (FedDF)"),
    ("kd3", "student", "student distilled from weights (KD3)"),
    ("feddistill", "message", "mean logits by class"),
    ("fedproto", "message", "mean features by class, before the head"),
    ("fedd2s means,method.dropping=block3", "message", "mean features by class, block 3"),
    ("fedd2s means,method.dropping=block2", "message", "mean features by class, block 2"),
    ("fedd2s means,method.dropping=block1", "message", "mean features by class, block 1"),
    ("fedd2s rows,method.dropping=block3", "rows", "features of each record, block 3"),
    ("fedd2s rows,method.dropping=block2", "rows", "features of each record, block 2"),
    ("fedd2s rows,method.dropping=block1", "rows", "features of each record, block 1"),
)
"""Condition, target, and what it is."""


def write(results: Path, runs: Path) -> None:
    """tables.md and the figures beside the results that are there."""
    found = {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(results.glob("*.json"))
        if path.stem in ("frontier", "leaks", "claims", "claims_cifar10")
    }
    lines = [f"{len(found)} sweeps, versions {found[next(iter(found))]['versions']}, machine in the JSON files.", ""]
    if "frontier" in found:
        lines += _frontier_table(found["frontier"]) + _noise_table(found["frontier"])
        (results / "frontier.png").write_bytes(png(frontier(found["frontier"])))
    if "leaks" in found:
        lines += _leaks_table(found["leaks"]) + _means_table(found["leaks"])
        (results / "leaks.png").write_bytes(png(leaks(found["leaks"])))
        places = sorted((runs / "leaks").glob("fedd2s rows*/seed-0"))
        shown = collecting.pictures(places)
        with drawing():
            named = [row_of(one, one.target.removeprefix("features ")) for one in shown]
            drawn = reconstructions(np.asarray(shown[0].originals), named, WIDE) if shown else None
        if drawn is not None:
            (results / "inversion.png").write_bytes(png(drawn))
    both: dict[str, dict[str, Any]] = {name: found[name] for name in ("claims", "claims_cifar10") if name in found}
    if both:
        for name, one in both.items():
            lines += _claims_table(name, one)
        (results / "claims.png").write_bytes(png(claims(both)))
    (results / "tables.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


# --- Frontier --------------------------------------------------------------------------------------------------------


def _conditions(found: dict[str, Any]) -> dict[str, Condition]:
    return {one["label"]: one for one in found["conditions"]}


def _values(one: Condition, name: str) -> list[float]:
    return [run[name] for run in one["runs"].values() if run[name] is not None]


def _points(found: dict[str, Any], level: str, method: str) -> list[tuple[float, list[float]]]:
    """Epsilon and balanced accuracies."""
    there = [one for label, one in _conditions(found).items() if label.startswith(f"{level} {method},")]
    return sorted((one["privacy"]["epsilon"], _values(one, "balanced")) for one in there)


def frontier(found: dict[str, Any]) -> Figure:
    """Balanced accuracy of the clients' models against epsilon; dotted where there is no mechanism."""
    conditions = _conditions(found)
    with drawing():
        figure = Figure(figsize=(12.0, 4.4))
        for number, (level, title) in enumerate(LEVELS.items()):
            ax = panel(figure, 0.6 + 3.9 * number, 0.55, 3.3, 3.2, "both")
            _level(ax, found, conditions, level)
            ax.set_title(title, loc="left", weight="bold", fontsize=9)
            ax.set_xlabel("epsilon of the whole run, delta 0.001")
            if not number:
                ax.set_ylabel("balanced accuracy of clients' models")
    return figure


def _level(ax: Axes, found: dict[str, Any], conditions: dict[str, Condition], level: str) -> None:
    local = fmean(_values(conditions["local"], "balanced"))
    ax.axhline(local, color=MUTED, lw=1, ls="--")
    ax.annotate(
        "training alone",
        (1.0, local),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
        fontsize=TINY,
        color=MUTED,
    )
    for method, (colour, marker) in METHODS.items():
        points = _points(found, level, method)
        if not points:
            continue
        x, means = [epsilon for epsilon, _ in points], [fmean(values) for _, values in points]
        bars = [stdev(values) if len(values) > 1 else 0.0 for _, values in points]
        ax.errorbar(x, means, yerr=bars, color=colour, marker=marker, label=method, capsize=2)
        free = conditions.get(f"none {method}")
        if free is not None:
            ax.axhline(fmean(_values(free, "balanced")), color=colour, lw=0.8, ls=":")
    ax.set_xscale("log")
    ax.set_xticks([1, 3, 10], ["1", "3", "10"])
    ax.minorticks_off()
    ax.set_ylim(0, 1)
    ax.legend(frameon=False, fontsize=TINY, loc="upper left")


def _frontier_table(found: dict[str, Any]) -> list[str]:
    lines = [
        "## Accuracy against epsilon",
        "",
        *_head("condition", "epsilon", "balanced", "personal", "server's model"),
    ]
    for label, one in _conditions(found).items():
        spent = one["privacy"].get("epsilon")
        name = label.split(",")[0]
        served = _values(one, "global")
        lines.append(
            row(
                [
                    name,
                    DASH if spent is None else f"{spent:g}",
                    spread(_values(one, "balanced")),
                    spread(_values(one, "personal")),
                    spread(served) if served else DASH,
                ]
            )
        )
    return [*lines, ""]


def _noise_table(found: dict[str, Any]) -> list[str]:
    lines = [
        "## Claimed and implemented noise, by canary clients",
        "",
        *_head(
            "condition", "epsilon", "mu claimed", "mu measured", "epsilon at least (Gaussian)", "by one run", "outcome"
        ),
    ]
    for label, one in _conditions(found).items():
        for seed, run in one["runs"].items():
            if "noise" in run:
                noise = run["noise"]
                least = "infinite" if noise["epsilon"] is None else f"{noise['epsilon']:.2f}"
                lines.append(
                    row(
                        [
                            f"{label.split(',')[0]}, seed {seed}",
                            f"{one['privacy']['epsilon']:g}",
                            f"{noise['claimed']:.4f}",
                            f"{noise['mu']:.4f} ({noise['mu_low']:.4f} to {noise['mu_high']:.4f})",
                            least,
                            f"{noise['one_run']['epsilon']:.2f}",
                            noise["outcome"],
                        ]
                    )
                )
    return [*lines, ""]


# --- Channels --------------------------------------------------------------------------------------------------------


def _aurocs(found: dict[str, Any], label: str, target: str) -> list[float]:
    runs = _conditions(found).get(label, {"runs": {}})["runs"].values()
    return [
        value for run in runs if (value := run["rows"] if target == "rows" else run["targets"].get(target)) is not None
    ]


def _certified(found: dict[str, Any], label: str, target: str) -> list[float]:
    runs = _conditions(found).get(label, {"runs": {}})["runs"].values()
    return [one["audited"] for run in runs for one in run["verdicts"] if one["target"] == target]


def leaks(found: dict[str, Any]) -> Figure:
    """AUROC of telling planted records by each channel, on one axis."""
    rows = [(name, values) for label, target, name in CHANNELS if (values := _aurocs(found, label, target))]
    bands = [run["band"] for one in found["conditions"] for run in one["runs"].values() if run["band"]]
    with drawing():
        figure = Figure(figsize=(WIDE, 0.9 + 0.27 * len(rows)))
        ax = panel(figure, 3.5, 0.3, WIDE - 3.7, 0.27 * len(rows), "x")
        ax.axvspan(min(band[0] for band in bands), max(band[1] for band in bands), color=MUTED, alpha=0.15, lw=0)
        for y, (_, values) in enumerate(rows):
            ax.plot(values, [y] * len(values), "o", color=RED, ms=3, alpha=0.5)
            ax.plot([fmean(values)], [y], "|", color=INK, ms=12, mew=2)
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.set_xlim(0.4, 1.02)
        ax.set_xlabel("AUROC of telling planted records from others; grey: what no leak gives")
        name_rows(ax, [name for name, _ in rows])
    return figure


def _leaks_table(found: dict[str, Any]) -> list[str]:
    lines = [
        "## What leaks by which channel, without a mechanism",
        "",
        *_head("channel", "AUROC", "epsilon certified by one run", "PSNR of inversion, dB", "images identified"),
    ]
    for label, target, name in CHANNELS:
        values, sure = _aurocs(found, label, target), _certified(found, label, target)
        seen = [
            run["inversion"]
            for run in _conditions(found).get(label, {"runs": {}})["runs"].values()
            if "inversion" in run
        ]
        quality = spread([one["psnr"] for one in seen]) if seen else DASH
        told = f"{100 * fmean(one['identified'] for one in seen):.0f} %" if seen else DASH
        lines.append(row([name, spread(values), spread(sure) if sure else DASH, quality, told]))
    return [*lines, ""]


def _means_table(found: dict[str, Any]) -> list[str]:
    lines = [
        "## What class means give away besides",
        "",
        *_head("condition", "lone records found", "chance", "class presence told"),
    ]
    for label, one in _conditions(found).items():
        told = [run["class_means"] for run in one["runs"].values() if run["class_means"]]
        alone = [part for means in told for part in means["records"]["by_records"] if part["records"] == 1]
        if told:
            hits, tried = sum(part["found"] for part in alone), sum(part["classes"] for part in alone)
            lines.append(
                row(
                    [
                        label,
                        f"{hits} of {tried}",
                        f"{told[0]['records']['chance']:.3f}",
                        f"{100 * fmean(means['presence']['accuracy'] for means in told):.0f} %",
                    ]
                )
            )
    return [*lines, ""]


# --- Claims ----------------------------------------------------------------------------------------------------------


def _verdicts(found: dict[str, Any]) -> list[tuple[str, str, float | None, float]]:
    """Method, target, epsilon of the run, epsilon certified."""
    return [
        (one["method"]["name"], told["target"], one["privacy"].get("epsilon"), told["audited"])
        for one in found["conditions"]
        for run in one["runs"].values()
        for told in run["verdicts"]
    ]


def claims(found: dict[str, dict[str, Any]]) -> Figure:
    """Certified against claimed epsilon; above the diagonal a claim would be contradicted."""
    looks = {"message": (BLUE, "o"), "aggregate": (GREEN, "s"), "student": (ORANGE, "^")}
    with drawing():
        figure = Figure(figsize=(5.0 * len(found) + 0.4, 4.4))
        for number, (name, one) in enumerate(found.items()):
            ax = panel(figure, 0.6 + 5.0 * number, 0.5, 4.1, 3.3, "both")
            top = 512.0
            for method, target, claimed, audited in _verdicts(one):
                colour, marker = looks[target]
                ax.plot(
                    [top if claimed is None else claimed],
                    [audited],
                    marker,
                    color=colour,
                    alpha=0.6,
                    mfc="none" if method == "fedmd" else colour,
                )
            line = np.geomspace(1, 8)
            ax.plot(line, line, color=RED, lw=1, label="certified = claimed")
            ax.set_xscale("log")
            ax.set_ylim(-0.2, 8)
            ticks = [1, 4, 16, 64, 256, top]
            ax.set_xticks(ticks, ["1", "4", "16", "64", "256", "none"])
            ax.set_xlabel("epsilon claimed")
            ax.set_ylabel("epsilon certified, one run, 95 %")
            ax.set_title("MNIST" if name == "claims" else "CIFAR-10", loc="left", weight="bold", fontsize=9)
            for target, (colour, marker) in looks.items():
                ax.plot([], [], marker, color=colour, label=target)
            ax.plot([], [], "o", color=MUTED, mfc="none", label="hollow: FedMD, full: FedAvg")
            ax.legend(frameon=False, fontsize=TINY, loc="upper left")
    return figure


def _claims_table(name: str, found: dict[str, Any]) -> list[str]:
    lines = [
        f"## Certified of what is claimed: {name}",
        "",
        *_head("method", "target", "claimed", "certified", "balanced accuracy"),
    ]
    for label, one in _conditions(found).items():
        targets = sorted({told["target"] for run in one["runs"].values() for told in run["verdicts"]})
        claimed = one["privacy"].get("epsilon")
        for target in targets:
            lines.append(
                row(
                    [
                        label.split(",")[0],
                        target,
                        DASH if claimed is None else f"{claimed:g}",
                        spread(_certified(found, label, target)),
                        spread(_values(one, "balanced")),
                    ]
                )
            )
    return [*lines, ""]


def _head(*cells: str) -> list[str]:
    return [row(cells), row("---" for _ in cells)]
