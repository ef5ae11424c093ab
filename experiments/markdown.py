"""Numbers over seeds as cells of Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean, stdev

from experiments.compare import Difference
from experiments.report.values import DASH


def row(cells: Iterable[str]) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


def spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation."""
    if not values:
        return DASH
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def difference(found: Difference) -> str:
    """A paired difference in points, with its interval where it has one."""
    if found.mean is None:
        return DASH
    text = f"{100 * found.mean:+.1f}"
    if found.low is not None and found.high is not None:
        text += f" [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
    return text.replace("-", "−")
