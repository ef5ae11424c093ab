"""Results of a sweep as one small JSON file: every run's numbers, and what follows from them over seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experiments.bench import machine
from experiments.compare import Comparison, compare
from experiments.compare_curves import curve
from experiments.conditions import METRICS, Condition
from experiments.conditions import read as read_runs

BASELINE = "local"
SHOWN = ("personal", "personal_std", "worst10", "balanced", "global", "personal_ece", "up", "down", "seconds")
Results = dict[str, Any]


def collected(directory: Path) -> Results:
    """Compare a sweep's runs with training alone; the target is what that reached in the end, on average.

    Raises:
        ConfigError: No sweep, or no finished run of the baseline.
    """
    conditions, unfinished = read_runs([directory])
    base = next(condition for condition in conditions if condition.label == BASELINE)
    ends = base.values(METRICS["personal"])
    found = compare(conditions, BASELINE, SHOWN, unfinished, [f"personal={sum(ends.values()) / len(ends):.4f}"])
    target = found.targets[0].name
    said = found.to_json()
    return {
        "baseline": BASELINE,
        "target": target,
        "statistics": found.statistics,
        "notes": said["notes"],
        "versions": {name: ", ".join(found) for name, found in said["versions"].items()},
        "machine": machine.describe() | {"of a run": said["machines"]},
        "data": {k: v for k, v in base.config["data"].items() if k not in ("public", "reserve")},
        "federation": base.config["federation"],
        "model": base.config["model"]["name"],
        "conditions": {c.label: _condition(found, c, target) for c in found.conditions},
    }


def _condition(found: Comparison, condition: Condition, target: str) -> Results:
    values, differences = {}, {}
    for name in SHOWN:
        key = condition.label, name
        if found.spreads[key].values:
            values[name] = {str(seed): _short(value) for seed, value in found.spreads[key].values.items()}
        if name in ("personal", "personal_std", "worst10", "balanced") and key in found.differences:
            difference = found.differences[key]
            fields = ("mean", "low", "high", "p", "holm")
            differences[name] = {field: _short(getattr(difference, field)) for field in fields}
    points = curve(condition, METRICS["personal"])
    return {
        "method": {k: v for k, v in condition.config["method"].items() if v is not None},
        "rounds": condition.config["federation"]["rounds"],
        "public": condition.config["data"]["public"],
        "state_hash": {str(seed): str(run.summary["state_hash"])[:16] for seed, run in condition.runs.items()},
        "values": values,
        "minus_baseline": differences,
        "reached": found.reached[condition.label, target].to_json(),
        "personal_by_round": {str(at): _short(sum(v) / len(v)) for at, v in points.items()},
    }


def read(path: Path) -> Results:
    """What `collected` gave."""
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")
