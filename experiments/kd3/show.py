"""The comparison of KD3 as tables and as a figure."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from experiments.compare import paired
from experiments.markdown import difference, row, spread
from experiments.report.style import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, RED, TINY, drawing, panel, png
from experiments.report.values import DASH

TITLES = {
    "digits": "MNIST's digits, rendered digits and letters",
    "cifar10": "CIFAR-10, ImageNet at 32x32 and textures",
}
COLOURS = {
    "kd3": (BLUE, "-"), "random": (GREEN, "-"), "teacher selects": (ORANGE, "-"), "no selection": (RED, "-"),
    "naive KD": (INK, "--"), "answers, not features": (PURPLE, "-"),
}  # fmt: skip
Place = tuple[float, int]
"""Share of far images, and images in the pool."""


def values(results: dict[str, Any]) -> dict[str, dict[Place, dict[int, float]]]:
    """Accuracy of students, by label, place and seed."""
    found: dict[str, dict[Place, dict[int, float]]] = {}
    for said in results["conditions"]:
        accuracy = {int(seed): value for seed, value in said["student"].items()}
        found.setdefault(said["label"], {})[said["far"], said["pool"]] = accuracy
    return found


def tables(found: dict[str, dict[str, Any]]) -> str:
    """A table a world: accuracies, differences, what was kept."""
    lines = ["<!-- made by: python -m experiments.kd3 draw -->", "", "# KD3, its parts and its rivals"]
    for name, results in found.items():
        teachers = [value for said in results["conditions"] for value in said["teacher"].values()]
        data, models = results["data"], results["models"]
        lines += [
            "",
            f"## {TITLES[name]}",
            "",
            f"Teacher `{models['teacher']}` of {data['limit']} images ({fmean(teachers):.3f} on the test images), "
            f"student `{models['student']}`, {data['test']} test images. {results['machine']['processor']}; "
            f"torch {results['versions']['torch']}.",
            "",
            "Accuracy of the student, mean and sample standard deviation over seeds.",
            "",
            *_accuracies(results),
            "",
            "In points, paired by seed, 95 % interval (Student's t).",
            "",
            *_differences(results),
            "",
            "What is kept of the pool, and how much of that is far: as the teacher decides at the start, and as the "
            "student does at the end.",
            "",
            *_kept(results),
        ]
    return "\n".join(lines) + "\n"


def _places(results: dict[str, Any]) -> list[Place]:
    return sorted({(said["far"], said["pool"]) for said in results["conditions"]}, key=lambda place: place[::-1])


def _head(places: list[Place]) -> Iterator[str]:
    yield row(["", *(f"{pool} images, {100 * far:.0f} % far" for far, pool in places)])
    yield row(["---", *["---:"] * len(places)])


def _accuracies(results: dict[str, Any]) -> Iterator[str]:
    places = _places(results)
    yield from _head(places)
    for label, by_place in values(results).items():
        yield row([label, *(spread(list(by_place.get(place, {}).values())) for place in places)])


def _differences(results: dict[str, Any]) -> Iterator[str]:
    places, found = _places(results), values(results)
    pairs = [("kd3", other) for other in found if other != "kd3"]
    pairs += [("no selection", "naive KD"), ("answers, not features", "naive KD"), ("teacher selects", "no selection")]
    yield from _head(places)
    for one, other in pairs:
        cells = [paired(found.get(one, {}).get(p, {}), found.get(other, {}).get(p, {})) for p in places]
        if any(cell.mean is not None for cell in cells):
            yield row([f"{one} minus {other}", *(difference(cell) for cell in cells)])


def _kept(results: dict[str, Any]) -> Iterator[str]:
    places = _places(results)
    yield from _head(places)
    for label in ("kd3", "teacher selects"):
        at = {(said["far"], said["pool"]): said["kept"] for said in results["conditions"] if said["label"] == label}
        for when in ("first", "last") if label == "kd3" else ("first",):
            cells = []
            for place in places:
                runs = list(at.get(place, {}).values())
                mean = {key: fmean(run[key] for run in runs) for key in (when, f"{when}, far")} if runs else {}
                cells.append(f"{mean[when]:.3f}, {100 * mean[f'{when}, far']:.0f} % far" if mean else DASH)
            yield row([f"{label}, {'start' if when == 'first' else 'end'}", *cells])


def figure(found: dict[str, dict[str, Any]]) -> bytes:
    """Accuracy against the share of far images, a panel for each world and size of the pool, as PNG."""
    with drawing():
        fig = Figure(figsize=(8.6, 2.9))
        panels = [(name, pool) for name, results in found.items() for pool in sorted({p for _, p in _places(results)})]
        for i, (name, pool) in enumerate(panels):
            ax = panel(fig, 0.45 + 2.07 * i, 0.45, 1.65, 1.75)
            for label, (colour, line) in COLOURS.items():
                points = sorted((f, v) for (f, p), v in values(found[name]).get(label, {}).items() if p == pool and v)
                if points:
                    ax.plot([100 * f for f, _ in points], [fmean(v.values()) for _, v in points], line, color=colour,
                            label=label, linewidth=1.4, marker="o", markersize=3)  # fmt: skip
            ax.set_title(f"{name}, {pool} images", fontsize=TINY, color=INK, loc="left")
            ax.set_xlabel("far images, %", fontsize=TINY)
        handles, labels = fig.axes[1].get_legend_handles_labels()
        fig.legend(handles, labels, fontsize=TINY, frameon=False, loc="lower center", ncol=6)
        fig.text(0.01, 0.96, "accuracy of the student, mean over seeds", fontsize=TINY, color=MUTED)
        return png(fig)
