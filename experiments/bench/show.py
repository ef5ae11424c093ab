"""The bench as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

_TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


def table(results: Mapping[str, Any]) -> Table:
    """One section a work."""
    grid = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("work", "who", "first", "median", "min to max", "ratio", "reach"):
        grid.add_column(name, justify="left" if name in ("work", "who", "reach") else "right", overflow="fold")
    for work in results["works"]:
        for i, one in enumerate(work["contenders"]):
            grid.add_row(work["name"] if not i else "", one["name"], *_cells(work, one))
        grid.add_row()
    return grid


def _cells(work: Mapping[str, Any], one: Mapping[str, Any]) -> tuple[str, ...]:
    value, unit = one["value"], work["unit"]
    first = "" if one["first"] is None else amount(one["first"], unit)
    if value is None:
        return first, "", "", "", one["trouble"] or ""
    span = f"{amount(value['min'], unit)} to {amount(value['max'], unit)}"
    return first, amount(value["median"], unit), span, times(one["ratio"]), one["trouble"] or verdict(one, unit)


def amount(value: float, unit: str) -> str:
    """A number with three digits and its unit."""
    if unit != "s":
        return f"{value:,.0f} {unit}"
    scale, name = next((pair for pair in _TIMES if value >= pair[0]), _TIMES[-1])
    value /= scale
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {name}"


def times(ratio: Mapping[str, float] | None) -> str:
    """A ratio to the reference."""
    if ratio is None:
        return ""
    value = ratio["median"]
    return f"{value:.0f}x" if value >= 100 else f"{value:.1f}x" if value >= 10 else f"{value:.2f}x"


def verdict(one: Mapping[str, Any], unit: str) -> str:
    """The limit and whether it is kept."""
    reach = one["reach"]
    if reach is None or reach["met"] is None:
        return ""
    limit = amount(reach["limit"], unit) if reach["of"] == "value" else f"{reach['limit']:.2f}x"
    return f"{'kept' if reach['met'] else 'missed'}: {limit}"
