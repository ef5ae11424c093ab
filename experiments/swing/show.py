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
from experiments.report.read_strip import of
from experiments.report.strip import strip as draw_strip
from experiments.report.style import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, RED, TINY, WIDE, drawing, panel, png
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


BREAK = 2.75
"""Bits where the frontier's axis is broken: most conditions are below."""


def frontier(found: dict[str, Any]) -> Figure:
    """Exposure of often-planted secrets against perplexity, on all text and on digits; the low part enlarged."""
    conditions = [said for said in found["conditions"] if "twin" not in said["label"]]
    with drawing():
        figure = Figure(figsize=(12.5, 7.2))
        for left, part, title in (
            (0.55, "all", "Perplexity on all test text"),
            (5.2, "digits", "Perplexity on digits"),
        ):
            high, low = panel(figure, left, 0.2, 4.3, 2.9, "both"), panel(figure, left, 3.3, 4.3, 3.3, "both")
            for ax in (high, low):
                _cloud(ax, conditions, part)
                ax.set_xscale("log")
                ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
                ax.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if value < 20 else "")
            low.set_xlim(high.get_xlim())
            high.set_ylim(BREAK, math.log2(SPACE) + 0.4)
            low.set_ylim(0.7, BREAK)
            high.tick_params(labelbottom=False, which="both")
            low.axhline(null_mean_exact(SPACE), color=MUTED, lw=1, ls=":")
            low.annotate("chance", (1, null_mean_exact(SPACE)), xycoords=("axes fraction", "data"), ha="right",
                         va="bottom", fontsize=TINY, color=MUTED)  # fmt: skip
            low.set_xlabel(title)
            if part == "all":
                high.set_ylabel("Exposure of secrets with 50 copies, bits")
                low.set_ylabel("the same, enlarged")
        for number, said in enumerate(conditions, 1):
            colour, _ = _kind(said)
            y = 1 - (0.3 + 0.225 * number) / 7.2
            figure.text(9.95 / 12.5, y, f"{number}", color=colour, weight="bold", size=TINY + 1, ha="right")
            figure.text(10.05 / 12.5, y, said["label"], size=TINY + 1)
    return figure


def _kind(said: Condition) -> tuple[str, str]:
    return next(KINDS[kind] for kind in KINDS if said["label"].startswith(kind))


def _cloud(ax: Axes, conditions: Sequence[Condition], part: str) -> None:
    for number, said in enumerate(conditions, 1):
        colour, marker = _kind(said)
        x = [run["perplexity"][part] for run in said["runs"].values()]
        y = [fmean(bits) for s in said["runs"] if (bits := student_of(said, s).get("50"))]
        at = fmean(x), fmean(y)
        ax.errorbar(*at, xerr=_bar(x), yerr=_bar(y), color=colour, marker=marker, ms=5, lw=0.8, capsize=0, alpha=0.8)
        ax.annotate(f"{number}", at, xytext=(4, 2), textcoords="offset points", fontsize=TINY, color=colour,
                    weight="bold", annotation_clip=True)  # fmt: skip


def _bar(values: Sequence[float]) -> float:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def strip(place: Path) -> Figure:
    """Some of a client's training text, each character on the colour of its temperature."""
    from experiments.audit import open_run

    shown = of(open_run(place).site.federation)
    with drawing():
        figure = None if shown is None else draw_strip(shown, WIDE)
    if figure is None:
        raise TypeError(f"{place}: expected a run on text whose method scores its tokens")
    return figure
