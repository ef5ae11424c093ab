"""The comparison of Swing distillation as tables, a frontier, and a strip of text with its temperatures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.markdown import row
from experiments.report.style import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, RED, TINY, drawing, panel, png
from experiments.report.values import DASH
from fedkd.data.text_canaries import DIGITS
from privacy.audits.exposure import null_mean_exact
from privacy.audits.secrets import reduction

SPACE = 10**DIGITS
Condition = dict[str, Any]
COPIES = ("1", "10", "50")
STUDENT, MESSAGE, TARGETS, HOME = "student", "message", "soft targets", "home model"
AS_SAID, ATTACKS = "as said", ("as said", "digits only", "rescaled")
BASELINE = "kd"


def student_of(said: Condition, seed: str) -> dict[str, Any]:
    """Exposures of the model that is judged, as said."""
    found: dict[str, Any] = said["runs"][seed]["exposure"][STUDENT][AS_SAID]
    return found


def planted(said: Condition, seed: str, copies: Sequence[str] = COPIES) -> np.ndarray:
    """Bits of a run's planted secrets, in the order of the canaries within a number of copies."""
    found = student_of(said, seed)
    return np.array([bits for n in copies for bits in found.get(n, [])])


def write(results: Path, runs: Path) -> None:
    """tables.md, frontier.png and strip.png beside the results."""
    found = json.loads((results / "swing.json").read_text(encoding="utf-8"))
    teachers = json.loads((results / "teachers.json").read_text(encoding="utf-8"))
    (results / "tables.md").write_text("\n".join(tables(found, teachers)) + "\n", encoding="utf-8")
    (results / "frontier.png").write_bytes(png(frontier(found)))
    place = runs / "swing" / "swing" / "seed-0"
    if place.is_dir():
        (results / "strip.png").write_bytes(png(strip(place)))


# --- Tables -----------------------------------------------------------------------------------------------------------


def tables(found: dict[str, Any], teachers: dict[str, Any]) -> list[str]:
    """All of them."""
    by_label = {said["label"]: said for said in found["conditions"]}
    baseline = by_label[BASELINE]
    chance = null_mean_exact(SPACE)
    lines = [
        "<!-- made by: python -m experiments.swing draw -->",
        "",
        "# Swing distillation: what the student still knows",
        "",
        f"{found['federation']['clients']} speakers, {found['audit']['canaries']} secrets a seed with a coin each, "
        f"{len(baseline['runs'])} seeds. {found['machine']['processor']}; torch {found['versions']['torch']}. Exposure "
        f"in bits, exact, chance {chance:.2f}, most {math.log2(SPACE):.2f}; mean over secrets and seeds.",
        "",
        *_teachers(teachers),
        "",
        "## Students",
        "",
        "Reduction is of the student's exposure against `kd`, over all planted secrets: raw, and with chance taken off "
        "both; 95 % interval by bootstrap over seeds, then secrets, the same draw for both.",
        "",
        *_head("condition", "perplexity", "on digits", "other text", "1 copy", "10", "50", "not planted", "swapped",
               "reduction", "chance taken off"),
        *(row(_students(said, baseline, chance)) for said in found["conditions"]),
    ]  # fmt: skip
    lines += ["", "## Where it leaks, and to an attacker who adapts", "", *_attacks(found["conditions"])]
    return lines


def _students(said: Condition, baseline: Condition, chance: float) -> list[str]:
    seeds = [seed for seed in said["runs"] if seed in baseline["runs"]]
    named = f"{said['label']}, ε = {_epsilon(said):.1f}" if _epsilon(said) is not None else said["label"]
    cells = [
        named,
        *(_spread([said["runs"][s]["perplexity"][part] for s in seeds]) for part in ("all", "digits", "other")),
    ]
    for copies in (*COPIES, "out"):
        values = [bits for s in seeds for bits in student_of(said, s).get(copies, [])]
        cells.append(f"{fmean(values):.2f}" if values else DASH)
    cells.append(f"{fmean(student_of(said, s)['swapped'] for s in seeds):.2f}")
    if said is baseline:
        return [*cells, DASH, DASH]
    got = reduction([planted(said, s) for s in seeds], [planted(baseline, s) for s in seeds], chance)
    return [
        *cells,
        _share(got.raw, got.raw_low, got.raw_high),
        _share(got.corrected, got.corrected_low, got.corrected_high),
    ]


def _epsilon(said: Condition) -> float | None:
    found = [run["epsilon"] for run in said["runs"].values() if run["epsilon"] is not None]
    return max(map(float, found)) if found else None


def _share(value: float | None, low: float | None, high: float | None) -> str:
    if value is None or low is None or high is None:
        return DASH
    return f"{100 * value:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"


def _spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.2f} ± {stdev(values):.2f}" if len(values) > 1 else f"{fmean(values):.2f}"


def _teachers(found: dict[str, Any]) -> list[str]:
    lines = ["## Teachers", "", *_head("teachers", "perplexity", "on digits", "1 copy", "10", "50", "not planted")]
    for said in found["conditions"]:
        runs = said["runs"].values()
        cells = [said["label"], *(_spread([run["perplexity"][part] for run in runs]) for part in ("all", "digits"))]
        for copies in (*COPIES, "out"):
            values = [b for run in runs for b in run["exposure"].get(HOME, {}).get(AS_SAID, {}).get(copies, [])]
            cells.append(f"{fmean(values):.2f}" if values else DASH)
        lines.append(row(cells))
    return lines


def _head(*cells: str) -> list[str]:
    return [row(cells), row("---" for _ in cells)]


def _attacks(conditions: Sequence[Condition]) -> list[str]:
    lines = _head("condition", "target", *(f"{attack}, {n} copies" for n in ("10", "50") for attack in ATTACKS))
    for said in conditions:
        for target in (TARGETS, MESSAGE, STUDENT):
            told = [run["exposure"][target] for run in said["runs"].values() if target in run["exposure"]]
            if told:
                cells = [_over(told, attack, copies) for copies in ("10", "50") for attack in ATTACKS]
                lines.append(row([said["label"], target, *cells]))
    return lines


def _over(told: Sequence[Mapping[str, Any]], attack: str, copies: str) -> str:
    means = []
    for one in told:
        value = one[attack].get(copies)
        value = fmean(value) if isinstance(value, list) and value else value
        if isinstance(value, float):
            means.append(value)
    return f"{fmean(means):.2f}" if means else DASH


# --- Figures ----------------------------------------------------------------------------------------------------------

KINDS = {
    "swing": (BLUE, "o"), "temperature": (ORANGE, "s"), "noise": (GREEN, "^"), "drop": (RED, "D"), "kd": (INK, "X"),
    "fedavg": (MUTED, "P"), "dp-sgd": (PURPLE, "*"),
}  # fmt: skip


def frontier(found: dict[str, Any]) -> Figure:
    """Exposure of often-planted secrets against perplexity, a panel for text and one for public numbers."""
    with drawing():
        figure = Figure(figsize=(11, 5.4))
        left, right = (panel(figure, at, 0.3, 4.7, 4.4, "both") for at in (0.6, 6.0))
        _cloud(left, found, "all", "Perplexity on all test text")
        _cloud(right, found, "digits", "Perplexity on public numbers")
        left.set_ylabel("Exposure of secrets with 50 copies, bits")
    return figure


def _cloud(ax: Axes, found: dict[str, Any], part: str, title: str) -> None:
    ax.axhline(null_mean_exact(SPACE), color=MUTED, lw=1, ls=":")
    ax.annotate("chance", (1, null_mean_exact(SPACE)), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                fontsize=TINY, color=MUTED)  # fmt: skip
    for said in found["conditions"]:
        kind = next(kind for kind in KINDS if said["label"].startswith(kind))
        colour, marker = KINDS[kind]
        x = [run["perplexity"][part] for run in said["runs"].values()]
        y = [fmean(bits) for s in said["runs"] if (bits := student_of(said, s).get("50"))]
        at = fmean(x), fmean(y)
        ax.errorbar(*at, xerr=_bar(x), yerr=_bar(y), color=colour, marker=marker, ms=6, lw=0.8, capsize=0)
        ax.annotate(said["label"], at, xytext=(5, 3), textcoords="offset points", fontsize=TINY, color=colour)
    ax.set_xlabel(title)
    ax.set_xscale("log")


def _bar(values: Sequence[float]) -> float:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def strip(place: Path) -> Figure:
    """Some of a client's training text, each character on the colour of its temperature."""
    from experiments.audit import open_run
    from strategies.swing import Swing

    federation = open_run(place).site.federation
    method, text = federation.config.method, federation.dataset.text
    if not isinstance(method, Swing) or text is None:
        raise TypeError(f"{place}: expected a run of swing on text")
    notes = federation.notes(0)["scores"]
    hot = notes.amax(1).nonzero().flatten()
    y = federation.train_set(0)[1]
    rows = [int(i) for i in (*range(2), *hot[:4], *range(2, 4))]
    with drawing():
        figure = Figure(figsize=(11, 0.45 * len(rows) + 0.9), layout="constrained")
        ax = figure.subplots()
        ax.set_xlim(-0.5, y.shape[1])
        ax.set_ylim(len(rows) - 0.4, -0.6)
        temperatures = method.temperatures(notes[rows]).numpy()
        shades = ax.pcolormesh(np.arange(y.shape[1] + 1) - 0.5, np.arange(len(rows) + 1) - 0.5, temperatures,
                               cmap="YlOrRd", vmin=method.t_low, vmax=1.6 * method.t_high)  # fmt: skip
        for line, i in enumerate(rows):
            for place_, token in enumerate(y[i].tolist()):
                piece = "·" if token < 0 else text.vocabulary.decode(np.array([token])).replace("\n", "⏎")
                ax.text(place_, line, piece, ha="center", va="center", fontsize=8, family="monospace", color=INK)
        ax.set_axis_off()
        bar = figure.colorbar(shades, ax=ax, orientation="horizontal", fraction=0.08, pad=0.02, aspect=60)
        bar.set_label("temperature of the teacher's answer", fontsize=TINY)
        bar.ax.set_xlim(method.t_low, method.t_high)
    return figure
