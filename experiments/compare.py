"""Compare conditions: means over seeds, and differences to a baseline, paired by seed.

A run's seed decides its partition, its canaries and its initial weights, so runs of equal seed are a pair, and the
spread that all conditions share cancels in their difference. Intervals and p-values are Student's, over the pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from statistics import fmean, stdev
from typing import Any

from scipy import stats

from experiments.compare_targets import TARGETS, Reached, Target, doubts, parse, reached
from experiments.conditions import LOCAL, METRICS, Condition, Metric, check_pairs
from fedkd.errors import ConfigError
from fedkd.registry import near

LEVEL = 0.95
STATISTICS = (
    "±: sample standard deviation over seeds. Difference: to the baseline, paired by seed. 95 % interval: Student's t "
    "over the pairs; none for one pair, or where all pairs differ by the same amount. p: two-sided paired t-test. "
    "Holm: p corrected over the conditions of one metric, not over metrics. Audit: the worst of what leaves a client; "
    "none where nothing leaves. ε: none where there is no mechanism, hence no guarantee."
)


@dataclass(frozen=True)
class Spread:
    """Values by seed; an infinite one makes the mean infinite."""

    values: Mapping[int, float]
    mean: float | None
    std: float | None


@dataclass(frozen=True)
class Difference:
    """Values minus the baseline's, by seed.

    Attributes:
        low: Lower end of the interval; None for fewer than two pairs, or where all differ by the same amount.
        high: Upper end.
        p: Two-sided; None where there is no interval.
        holm: `p` corrected over the conditions.
    """

    values: Mapping[int, float]
    mean: float | None
    std: float | None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    holm: float | None = None


@dataclass(frozen=True)
class Comparison:
    """All numbers of a comparison.

    Attributes:
        spreads: By label and metric.
        differences: By label and metric; the baseline has none.
        notes: What a reader has to know besides.
        targets: What it was asked when the runs reached.
        reached: By label and target.
    """

    conditions: Sequence[Condition]
    baseline: Condition
    metrics: Sequence[Metric]
    spreads: Mapping[tuple[str, str], Spread]
    differences: Mapping[tuple[str, str], Difference]
    notes: Sequence[str]
    targets: Sequence[Target] = ()
    reached: Mapping[tuple[str, str], Reached] = field(default_factory=dict)

    @property
    def statistics(self) -> str:
        """How the numbers were worked out."""
        return f"{STATISTICS} {TARGETS}" if self.targets else STATISTICS

    def to_json(self) -> dict[str, Any]:
        """As in compare.json; equal runs give equal bytes, wherever they are."""
        return {
            "baseline": self.baseline.label,
            "statistics": self.statistics,
            "notes": list(self.notes),
            "metrics": {m.name: {"title": m.title, "unit": m.unit, "better": m.better} for m in self.metrics},
            "targets": {target.name: target.to_json() for target in self.targets},
            "conditions": [self._condition(condition) for condition in self.conditions],
            "versions": _all(self.conditions, "versions") | {"scipy": [version("scipy")]},
            "machines": sorted({str(r.summary.get("machine")) for c in self.conditions for r in c.runs.values()}),
        }

    def _condition(self, condition: Condition) -> dict[str, Any]:
        named = [(metric.name, (condition.label, metric.name)) for metric in self.metrics]
        return {
            "label": condition.label,
            "seeds": condition.seeds,
            "config": condition.config,
            "runs": {
                str(seed): {key: condition.runs[seed].summary.get(key) for key in ("config_hash", "state_hash")}
                for seed in condition.seeds
            },
            "values": {name: _plain(self.spreads[key]) for name, key in named},
            "differences": {name: _plain(self.differences[key]) for name, key in named if key in self.differences},
            "reached": {t.name: self.reached[condition.label, t.name].to_json() for t in self.targets},
        }


def compare(
    conditions: Sequence[Condition],
    baseline: str | None = None,
    metrics: Sequence[str] = (),
    unfinished: Sequence[str] = (),
    targets: Sequence[str] = (),
) -> Comparison:
    """Work out a comparison.

    Args:
        conditions: What to compare.
        baseline: Label; default the first condition that trains alone, else the first.
        metrics: Names of `METRICS`; default all that some run has.
        unfinished: Runs that are left out, for the notes.
        targets: ``metric=value``: when did the runs first reach it?

    Raises:
        ConfigError: An unknown name or no target, or conditions whose clients hold different records.
    """
    check_pairs(conditions)
    base = _baseline(conditions, baseline)
    wanted = [_metric(name) for name in dict.fromkeys(metrics)] or [
        metric for metric in METRICS.values() if any(condition.values(metric) for condition in conditions)
    ]
    spreads, differences = {}, {}
    for metric in wanted:
        for condition in conditions:
            spreads[condition.label, metric.name] = spread(condition.values(metric))
        others = [condition for condition in conditions if condition is not base]
        found = [paired(condition.values(metric), base.values(metric)) for condition in others]
        for condition, difference in zip(others, holm(found), strict=True):
            differences[condition.label, metric.name] = difference
    aims = [parse(text) for text in dict.fromkeys(targets)]
    when = {(c.label, aim.name): reached(c, aim) for c in conditions for aim in aims}
    notes = [*_notes(conditions, base, unfinished), *(doubts(conditions) if aims else [])]
    return Comparison(conditions, base, wanted, spreads, differences, notes, aims, when)


def spread(values: Mapping[int, float]) -> Spread:
    """Mean and sample standard deviation (n - 1) over seeds; no deviation for one seed or infinite values."""
    known = list(values.values())
    if not known or not all(map(math.isfinite, known)):
        return Spread(values, math.inf if known else None, None)
    return Spread(values, fmean(known), stdev(known) if len(known) > 1 else None)


def paired(values: Mapping[int, float], base: Mapping[int, float]) -> Difference:
    """Difference to the baseline over common seeds, with a Student interval and test over the pairs."""
    seeds = sorted(seed for seed in values.keys() & base.keys() if math.isfinite(values[seed] - base[seed]))
    found = {seed: values[seed] - base[seed] for seed in seeds}
    if not found:
        return Difference({}, None, None)
    n, mean = len(found), fmean(found.values())
    if n == 1:
        return Difference(found, mean, None)
    std = stdev(found.values())
    size = max(abs(x) for seed in seeds for x in (values[seed], base[seed]))
    if std <= 1e-12 * size:  # equal differences, up to rounding: nothing random to test
        return Difference(found, mean, 0.0)
    error = std / math.sqrt(n)
    reach = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, n - 1))
    return Difference(found, mean, std, mean - reach, mean + reach, p)


def holm(differences: Sequence[Difference]) -> list[Difference]:
    """Holm's step-down correction of all p-values that there are."""
    order = sorted((d.p, i) for i, d in enumerate(differences) if d.p is not None)
    corrected, highest = list(differences), 0.0
    for rank, (p, i) in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p))
        d = differences[i]
        corrected[i] = Difference(d.values, d.mean, d.std, d.low, d.high, d.p, highest)
    return corrected


def _baseline(conditions: Sequence[Condition], label: str | None) -> Condition:
    if label is None:
        return next((condition for condition in conditions if condition.method == LOCAL), conditions[0])
    labels = [condition.label for condition in conditions]
    if label not in labels:
        raise ConfigError(f"--baseline: expected one of {', '.join(labels)}, got '{label}'{near(label, labels)}")
    return conditions[labels.index(label)]


def _metric(name: str) -> Metric:
    if name not in METRICS:
        raise ConfigError(f"--metric: expected one of {', '.join(METRICS)}, got '{name}'{near(name, METRICS)}")
    return METRICS[name]


def _notes(conditions: Sequence[Condition], base: Condition, unfinished: Sequence[str]) -> list[str]:
    notes = []
    if unfinished:
        shown = ", ".join(unfinished[:3]) + (", ..." if len(unfinished) > 3 else "")
        notes.append(f"{len(unfinished)} unfinished runs are left out: {shown}")
    for condition in conditions:
        common = len(set(condition.seeds) & set(base.seeds))
        if common < max(len(condition.seeds), len(base.seeds)):
            notes.append(f"'{condition.label}' shares {common} seeds with '{base.label}'; differences are over these")
        elif common == 1 and condition is not base:
            notes.append(f"'{condition.label}' has one pair: a difference, but no interval")
    mixed = [name for name, found in _all(conditions, "versions").items() if len(found) > 1]
    if mixed:
        notes.append(f"the runs were made with different versions of {', '.join(mixed)}")
    return notes


def _all(conditions: Sequence[Condition], key: str) -> dict[str, list[str]]:
    """All values of a table of the summaries, by name."""
    tables = [dict(run.summary.get(key) or {}) for condition in conditions for run in condition.runs.values()]
    names = sorted({name for table in tables for name in table})
    return {name: sorted({str(table.get(name)) for table in tables}) for name in names}


def _plain(found: Spread | Difference) -> dict[str, Any]:
    """As JSON, with the number of values; infinity is text."""
    raw: dict[str, Any] = {"n": len(found.values), **vars(found)}
    raw["values"] = {str(seed): _finite(value) for seed, value in found.values.items()}
    return {key: _finite(value) for key, value in raw.items()}


def _finite(value: Any) -> Any:
    return "inf" if isinstance(value, float) and math.isinf(value) else value
