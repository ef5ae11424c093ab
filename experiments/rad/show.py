"""The comparison of query strategies as tables and as a figure."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from experiments.compare import paired
from experiments.markdown import difference, row, spread
from experiments.report.style import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, RED, SKY, TINY, drawing, png
from experiments.report.values import DASH

COLOURS = {
    "rad": (BLUE, "-"), "uniform": (INK, "--"), "margin": (RED, "-"), "entropy": (ORANGE, "-"),
    "least_confidence": (ORANGE, ":"), "coreset": (GREEN, "-"), "cluster_margin": (PURPLE, "-"), "unixkd": (SKY, "-"),
}  # fmt: skip
Curves = dict[str, dict[str, dict[int, dict[str, Any]]]]
"""By teacher, strategy and seed."""


def grouped(results: dict[str, Any]) -> Curves:
    """The runs, by teacher, strategy and seed."""
    found: Curves = {}
    for key, run in results["runs"].items():
        teacher, strategy, seed = key.split("/")
        found.setdefault(teacher, {}).setdefault(strategy, {})[int(seed)] = run
    return found


def tables(results: dict[str, Any]) -> str:
    """A table a teacher: area under the budget curve, last accuracy, wrong answers, gain."""
    method, data, machine = results["method"], results["data"], results["machine"]
    lines = [
        "<!-- made by: python -m experiments.rad draw -->",
        "",
        "# Query strategies with a teacher that is wrong",
        "",
        f"{data['name']}, a pool of {data['public']} images, {data['labelled']} labelled ones, `mlp`, "
        f"{method['questions']} questions a round for {method['rounds']} rounds, student anew each round "
        f"({method['student_epochs']} epochs). {machine['processor']}; torch {results['versions']['torch']}.",
        "",
        "Area: accuracy of the student, mean over the budgets. Minus uniform, in points: paired by seed, 95 % interval "
        "(Student's t). Wrong: share of all answers. Gain: mean over all questions of 1 minus the student's margin.",
    ]
    for teacher, strategies in grouped(results).items():
        error = fmean(run["error"] for runs in strategies.values() for run in runs.values())
        lines += ["", f"## {teacher}: {100 * error:.1f} % wrong", ""]
        lines += ["| | area | minus uniform | last accuracy | wrong | gain |", "|---|---:|---:|---:|---:|---:|"]
        lines += list(_rows(strategies))
    return "\n".join(lines) + "\n"


def _rows(strategies: dict[str, dict[int, dict[str, Any]]]) -> Iterator[str]:
    areas = {name: {seed: fmean(run["accuracy"]) for seed, run in runs.items()} for name, runs in strategies.items()}
    for name, runs in sorted(strategies.items(), key=lambda item: -fmean(areas[item[0]].values())):
        against = DASH if name == "uniform" else difference(paired(areas[name], areas["uniform"]))
        last = [run["accuracy"][-1] for run in runs.values()]
        cells = [
            name,
            spread(list(areas[name].values())),
            against,
            spread(last),
            f"{100 * fmean(run['wrong'][-1] for run in runs.values()):.1f} %",
            f"{fmean(fmean(run['gain']) for run in runs.values()):.3f}",
        ]
        yield row(cells)


def federated_tables(results: dict[str, Any]) -> str:
    """The federated sweeps: the server's student, and what clients score."""
    bases = {"federated": "ask,method.selection=uniform", "clients": "local"}
    titles = {"federated": "In a federation: the server asks", "clients": "In a federation: clients ask"}
    lines = []
    for name, conditions in results["sweeps"].items():
        lines += ["", f"## {titles[name]}", "", f"In points beside '{bases[name]}', paired by seed, 95 % interval.", ""]
        keys = ("global",) if name == "federated" else ("global", "balanced", "personal")
        heads = {"global": "server's student", "balanced": "clients, balanced", "personal": "clients, own test"}
        lines += [row(["", *(text for key in keys for text in (heads[key], "difference"))])]
        lines += [row(["---", *["---:"] * (2 * len(keys))])]
        seeds = {
            label: {key: {int(k): v for k, v in said["values"][key].items()} for key in keys}
            for label, said in conditions.items()
        }
        for label, values in seeds.items():
            cells = [label.replace("method.", "")]
            for key in keys:
                against = DASH if label == bases[name] else difference(paired(values[key], seeds[bases[name]][key]))
                cells += [spread(list(values[key].values())), against]
            lines += [row(cells)]
    return "\n".join(lines) + "\n"


def figure(results: dict[str, Any]) -> bytes:
    """Accuracy minus uniform's against the budget, a panel a teacher, as PNG."""
    found = grouped(results)
    with drawing():
        fig = Figure(figsize=(8.6, 4.8))
        for i, (teacher, strategies) in enumerate(found.items()):
            ax = fig.add_subplot(2, 4, i + 1)
            base = strategies["uniform"]
            for name, runs in strategies.items():
                seeds = sorted(set(runs) & set(base))
                curve = [
                    100 * fmean(runs[s]["accuracy"][t] - base[s]["accuracy"][t] for s in seeds)
                    for t in range(len(runs[seeds[0]]["accuracy"]))
                ]
                colour, line = COLOURS[name]
                ax.plot(runs[seeds[0]]["asked"], curve, line, color=colour, label=name, linewidth=1.3)
            ax.set_title(teacher, fontsize=TINY, color=INK, loc="left")
            ax.spines[["top", "right"]].set_visible(False)
        handles, labels = fig.axes[0].get_legend_handles_labels()
        fig.legend(handles, labels, fontsize=TINY, frameon=False, loc="lower right", bbox_to_anchor=(0.99, 0.12))
        fig.text(0.01, 0.005, "student's accuracy minus uniform's, points, against questions asked; mean over seeds",
                 fontsize=TINY, color=MUTED)  # fmt: skip
        fig.tight_layout(rect=(0, 0.03, 1, 1))
        return png(fig)
