"""The tables of a comparison, and the one way its numbers are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rich.table import Table
from rich.text import Text

from experiments.compare import Comparison, Difference, Spread
from experiments.compare_targets import Reached, middle
from experiments.conditions import Metric
from experiments.report.values import DASH, epsilon, size, small, unit_of

POINTS = 100.0


def table(comparison: Comparison) -> Table:
    """One block a metric, one line a condition."""
    grid = Table(box=None, header_style="bold", pad_edge=False)
    grid.add_column("condition", overflow="fold")
    for name in ("n", "mean ± s.d.", "difference", "95 % interval", "p", "Holm"):
        grid.add_column(name, justify="right", no_wrap=True)
    brief = names([condition.label for condition in comparison.conditions])
    for metric in comparison.metrics:
        scale, unit = scale_of(metric, largest(comparison, metric))
        grid.add_row(Text(metric.title if unit in metric.title else f"{metric.title}, {unit}", style="bold"))
        for name, condition in zip(brief, comparison.conditions, strict=True):
            key = condition.label, metric.name
            base = condition is comparison.baseline
            found = comparison.spreads[key]
            cells = [] if base else difference_cells(metric, comparison.differences[key], scale)
            label = Text(f"  {name} (baseline)" if base else f"  {name}")
            grid.add_row(label, str(len(found.values)), spread_cell(metric, found, scale), *cells)
        grid.add_section()
    return grid


def targets_table(comparison: Comparison) -> Table:
    """One block a target, one line a condition: how many runs reached it, in how many rounds, with how many bytes."""
    grid = Table(box=None, header_style="bold", pad_edge=False)
    grid.add_column("condition", overflow="fold")
    for name in ("reached", "rounds (median)", "range", "bytes up and down (median)", "range"):
        grid.add_column(name, justify="right", no_wrap=True)
    brief = names([condition.label for condition in comparison.conditions])
    for target in comparison.targets:
        grid.add_row(Text(target.title, style="bold"))
        for name, condition in zip(brief, comparison.conditions, strict=True):
            found = comparison.reached[condition.label, target.name]
            cells = [*_when(found.rounds, "{:.10g}".format), *_when(found.sent, size)]
            label = Text(f"  {name} (baseline)" if condition is comparison.baseline else f"  {name}")
            grid.add_row(label, of_runs(found), *cells)
        grid.add_section()
    return grid


def of_runs(found: Reached) -> str:
    """How many runs reached a target."""
    return f"{found.count} of {len(found.rounds)}" if found.rounds else DASH


def _when(values: Mapping[int, int | None], write: Callable[[float], str]) -> tuple[str, str]:
    """Median over all runs and range over those that reached the target."""
    known = [value for value in values.values() if value is not None]
    if not known:
        return ("never" if values else DASH), ""
    half = middle(values)
    ends = [write(end) for end in (min(known), max(known))]
    return DASH if half is None else write(half), ends[0] if ends[0] == ends[1] else " to ".join(ends)


def names(labels: Sequence[str]) -> list[str]:
    """Labels as a table or figure has room for: values, with as much of their key as tells them apart."""

    def brief(part: str) -> str:
        key, sep, value = part.partition("=")
        last = key.rpartition(".")[2]
        return value if sep and last in ("name", "mechanism") else f"{last}={value}" if sep else part

    briefs = [", ".join(brief(part) for part in label.split(",")) for label in labels]
    return [one if briefs.count(one) == 1 else label for one, label in zip(briefs, labels, strict=True)]


def largest(comparison: Comparison, metric: Metric) -> float:
    """The largest mean of a metric."""
    return max((comparison.spreads[c.label, metric.name].mean or 0.0 for c in comparison.conditions), default=0.0)


def scale_of(metric: Metric, largest_value: float) -> tuple[float, str]:
    """By what a metric's values are divided to be shown, and the unit that they then have."""
    return unit_of(largest_value) if metric.unit == "bytes" else (1.0, metric.unit)


def shown(metric: Metric, value: float, scale: float) -> str:
    """A value without its unit."""
    if metric.unit == "ε":
        return epsilon(value)
    value /= scale
    return f"{value:.3f}" if metric.unit in ("fraction", "AUROC") else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def spread_cell(metric: Metric, found: Spread, scale: float) -> str:
    """Mean and standard deviation."""
    if found.mean is None:
        return DASH
    std = "" if found.std is None else f" ± {_short(metric, found.std, scale)}"
    return shown(metric, found.mean, scale) + std


def _short(metric: Metric, value: float, scale: float) -> str:
    return f"{value / scale:.3f}" if metric.unit in ("fraction", "AUROC") else f"{value / scale:.2g}"


def signed(metric: Metric, value: float, scale: float) -> str:
    """A difference; accuracies in percentage points."""
    sign = "+" if value > 0 else "−" if value < 0 else ""
    value = abs(value) * POINTS if metric.unit == "fraction" else abs(value) / scale
    digits = 3 if metric.unit == "AUROC" else 1 if metric.unit == "fraction" or value >= 10 else 2
    return f"{sign}{value:.{digits}f}"


def difference_unit(metric: Metric, unit: str) -> str:
    """The unit of `signed`."""
    return "points" if metric.unit == "fraction" else unit


def interval(metric: Metric, found: Difference, scale: float) -> str:
    """The interval, or why there is none."""
    if found.low is None or found.high is None:
        return DASH if found.std is None else f"same in all {len(found.values)}"
    return f"{signed(metric, found.low, scale)} to {signed(metric, found.high, scale)}"


def difference_cells(metric: Metric, found: Difference, scale: float) -> list[str]:
    """Difference, interval and both p-values."""
    if found.mean is None:
        return [DASH] * 4
    mean = signed(metric, found.mean, scale) + (" points" if metric.unit == "fraction" else "")
    return [mean, interval(metric, found, scale), small(found.p), small(found.holm)]
