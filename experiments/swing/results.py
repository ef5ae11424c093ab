"""Results of the comparison as one small JSON file: perplexities of the students, and every secret's exposure."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments import files
from experiments.audit import HOME, STUDENT, open_run
from experiments.bench import machine
from experiments.conditions import read
from experiments.secrets import AS_SAID
from fedkd.data.text_canaries import DIGITS
from fedkd.losses import cross_entropy
from privacy.audits.exposure import exposure_exact

SPACE = 10**DIGITS
Results = dict[str, Any]


def collected(directories: Sequence[Path]) -> Results:
    """What sweeps' finished runs say, by condition and seed."""
    conditions, unfinished = read(directories)
    found: Results = {"unfinished": len(unfinished), "versions": machine.versions(), "machine": machine.describe()}
    first = conditions[0].config
    found |= {name: first[name] for name in ("data", "federation", "model", "audit")}
    found["conditions"] = [
        {
            "label": condition.label,
            "method": {key: value for key, value in condition.config["method"].items() if key != "patterns"},
            "privacy": condition.config["privacy"],
            "runs": {str(seed): of_run(condition.runs[seed].place) for seed in condition.seeds},
        }
        for condition in conditions
    ]
    return found


def of_run(place: Path) -> Results:
    """One run's numbers."""
    summary = json.loads((place / files.SUMMARY).read_text(encoding="utf-8"))
    privacy = summary["privacy"]
    return {
        "perplexity": perplexities(place),
        "accuracy": _rounded(summary["accuracy"]["global"] or summary["accuracy"]["balanced_mean"]),
        "epsilon": None if privacy is None else privacy["epsilon"],
        "seconds": summary["seconds"],
        "state_hash": summary["state_hash"][:16],
        "exposure": exposures(place / files.SECRETS),
    }


def perplexities(place: Path) -> dict[str, float]:
    """Of the student, or where there is none of the clients' models, on the global test: all, digits, other text."""
    auditor = open_run(place)
    federation = auditor.site.federation
    method, text = federation.config.method, federation.dataset.text
    if text is None:
        raise TypeError(f"{place}: expected a run on text")
    student = method.student(federation.server_task, auditor.server)
    clients = range(federation.config.federation.clients)
    models = [auditor.model(None)] if student is not None else [auditor.model(k) for k in clients]
    x, y = federation.test_x, federation.test_y
    nats = torch.stack([_nats(model.logits(params, x), y) for model, params in models]).mean(0)
    digit = torch.isin(y, torch.from_numpy(text.vocabulary.digits()))
    parts = {"all": y >= 0, "digits": digit, "other": (y >= 0) & ~digit}
    return {name: _rounded(math.exp(min(float(nats[part].double().mean()), 700.0))) for name, part in parts.items()}


def _nats(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits.flatten(0, 1), y.flatten().clamp(min=0)).view(y.shape)


def exposures(path: Path) -> Results:
    """Bits by target and attack: of the planted secrets by number of copies, of the others, and swapped.

    Of what the student says, or where there is none the model at home, every secret is kept, in the order of the
    canaries; of all else the means.
    """
    if not path.is_file():
        return {}
    said = json.loads(path.read_text(encoding="utf-8"))
    copies = np.array([one["repetitions"] for one in said["canaries"]])
    included = np.array([one["included"] for one in said["canaries"]])
    found: Results = {}
    judged = STUDENT if any(one["target"] == STUDENT for one in said["ranks"]) else HOME
    for one in said["ranks"]:
        bits = exposure_exact(one["ranks"], SPACE)
        swapped = exposure_exact(one["swapped"], SPACE)[included]
        groups = {str(n): bits[included & (copies == n)] for n in np.unique(copies)} | {"out": bits[~included]}
        whole = one["attack"] == AS_SAID and one["target"] == judged
        told: Results = {name: _list(group) if whole else _mean(group) for name, group in groups.items()}
        found.setdefault(one["target"], {})[one["attack"]] = told | {"swapped": _mean(swapped)}
    return found


def _list(values: np.ndarray) -> list[float]:
    return [round(float(value), 2) for value in values]


def _mean(values: np.ndarray) -> float | None:
    return round(float(values.mean()), 3) if len(values) else None


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
