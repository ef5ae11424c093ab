"""Results of the comparison of KD3 as one small JSON file, and what selection kept in finished runs."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from torch import Tensor

from experiments import files
from experiments.bench import machine
from experiments.conditions import METRICS, read
from fedkd import checkpoint
from fedkd.config import Config
from fedkd.federation import build, web_like
from fedkd.knowledge import pick
from strategies.kd3 import KD3, Selection, confident, select

Results = dict[str, Any]


def collected(directory: Path) -> Results:
    """Accuracy of students and teachers in a sweep's finished runs, by condition, and what selection kept there."""
    conditions, unfinished = read([directory])
    found: Results = {"unfinished": len(unfinished), "versions": machine.versions(), "machine": machine.describe()}
    first = conditions[0].config
    found["data"] = {k: v for k, v in first["data"].items() if k not in ("far", "public")}
    found["models"] = {"student": first["model"]["name"], "teacher": first["model"]["by_client"][0]}
    found["conditions"] = []
    for condition in conditions:
        data, method = condition.config["data"], condition.config["method"]
        kept = {}
        if method["name"] == "kd3" and method["selection"] in ("kd3", "teacher"):
            kept = {str(seed): selected(condition.runs[seed].place) for seed in condition.seeds}
        found["conditions"].append(
            {
                "label": condition.label.split(",data.")[0],
                "far": data["far"],
                "pool": data["public"],
                "method": {key: value for key, value in method.items() if value is not None},
                "student": {str(k): round(v, 4) for k, v in condition.values(METRICS["global"]).items()},
                "student_ece": {str(k): round(v, 4) for k, v in condition.values(METRICS["global_ece"]).items()},
                "teacher": {str(k): round(v, 4) for k, v in condition.values(METRICS["balanced"]).items()},
                "seconds": {str(k): v for k, v in condition.values(METRICS["seconds"]).items()},
                "state_hash": {str(k): str(run.summary["state_hash"])[:16] for k, run in condition.runs.items()},
                "kept": kept,
            }
        )
    return found


def selected(place: Path) -> dict[str, float]:
    """What a finished run's selection keeps of its pool: share of the pool, and share of far images in that.

    ``first``: as it decides when the teacher decides alone; ``last``: as the taught student does, at the end. For
    selection by the teacher both are the same.
    """
    config = Config.from_raw(tomllib.loads((place / files.CONFIG).read_text(encoding="utf-8")))
    method = config.method
    if not isinstance(method, KD3):
        raise TypeError(f"{place}: expected KD3, got {config.method_name}")
    federation, server = build(config), checkpoint.load(place / files.CHECKPOINT).server
    _, far = web_like(config, federation.dataset)
    task = federation.server_task
    teacher = method.teaching(task)
    logits = teacher.logits(pick(f"average/{teacher.name}", server), task.public_x)
    student = method.student_model(task).logits(method.student(task, server) or {}, task.public_x)

    def chosen(alpha: float) -> Selection:
        return (
            confident(logits, method.tau)
            if method.selection == "teacher"
            else select(logits, student, alpha, method.tau)
        )

    def share(keep: Tensor, prefix: str) -> dict[str, float]:
        rows = keep.numpy()
        return {
            f"{prefix}": round(float(rows.mean()), 4),
            f"{prefix}, far": round(float(far[rows].mean()) if rows.any() else 0.0, 4),
        }

    return share(chosen(1.0).keep, "first") | share(chosen(0.0).keep, "last")
