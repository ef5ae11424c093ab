"""Results of the privacy experiments as small JSON files: what each finished run says, and what only its state says."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments import files
from experiments.audit import Auditor, open_run
from experiments.bench import machine
from experiments.channels import FEATURES, canary_clients, inversion
from experiments.conditions import read
from fedkd.knowledge import RECORD
from fedkd.models import in_batches
from privacy.audits.inversion import Inversion
from privacy.audits.membership import audit_scores

Results = dict[str, Any]


def collected(directory: Path, more: Callable[[Path], Results] = lambda _: {}) -> Results:
    """What a sweep's finished runs say, by condition and seed; ``more`` reads further things from a run."""
    conditions, unfinished = read([directory])
    first = conditions[0].config
    found: Results = {"unfinished": len(unfinished), "versions": machine.versions(), "machine": machine.describe()}
    found |= {name: first[name] for name in ("data", "federation", "model", "audit")}
    found["conditions"] = [
        {
            "label": condition.label,
            "method": condition.config["method"],
            "privacy": condition.config["privacy"],
            "runs": {
                str(seed): {**of_run(condition.runs[seed].place), **more(condition.runs[seed].place)}
                for seed in condition.seeds
            },
        }
        for condition in conditions
    ]
    return found


def of_run(place: Path) -> Results:
    """Accuracies, what is claimed, and what the audit found."""
    summary = json.loads((place / files.SUMMARY).read_text(encoding="utf-8"))
    accuracy, audit = summary["accuracy"], summary["audit"] or {}
    return {
        "balanced": round(accuracy["balanced_mean"], 4),
        "personal": round(accuracy["personal_mean"], 4),
        "global": accuracy["global"],
        "epsilon": None if summary["privacy"] is None else summary["privacy"]["epsilon"],
        "targets": {one["target"]: round(one["auroc"], 4) for one in audit.get("targets", [])},
        "band": _band(audit),
        "verdicts": [
            {name: one[name] for name in ("target", "claimed", "audited", "outcome")}
            for one in audit.get("verdicts", [])
        ],
        "class_means": audit.get("class_means"),
        "seconds": round(summary["seconds"], 1),
        "state_hash": summary["state_hash"][:16],
    }


def noise(place: Path) -> Results:
    """What canary clients say of the noise of a condition's first run, where it has some that they can test."""
    found = canary_clients(open_run(place)) if place.name == "seed-0" else None
    return {} if found is None else {"noise": found.to_json()}


def rows(place: Path) -> Results:
    """Of features of single records: whether a canary's is among them, and what can be seen in them."""
    auditor = open_run(place)
    found = inversion(auditor)
    if found is None:
        return {}
    told = {name: value for name, value in found.to_json().items() if name != "each"}
    return {"inversion": told, "rows": _nearest(auditor)}


def pictures(places: Sequence[Path]) -> list[Inversion]:
    """Inversions of finished runs, with the pictures."""
    return [found for place in places if (found := inversion(open_run(place))) is not None]


def _nearest(auditor: Auditor) -> float:
    """AUROC of telling canaries by the nearest row that their owner sends with the canary's label."""
    federation = auditor.site.federation
    canaries, (x, wrong) = federation.split.canaries, federation.canary_set()
    scores = np.zeros(len(canaries))
    for client in range(federation.config.federation.clients):
        mine = torch.from_numpy(np.flatnonzero(canaries.owner == client))
        params, said = auditor.once_more(client)
        model = federation.client_task(client).model
        block = next(name.split("/")[1] for name in auditor.down(client).tensors if name.startswith("cut/"))
        depth = model.blocks.index(block) + 1
        sent, labels = said.tensors[FEATURES].flatten(1), said.tensors[f"{RECORD}y"]
        own = in_batches(lambda part, p=params, m=model, d=depth: m.features(p, part, d), x[mine]).flatten(1)  # type: ignore[misc]
        gaps = torch.cdist(own, sent)
        gaps[wrong[mine][:, None] != labels[None]] = float("inf")
        scores[mine.numpy()] = torch.nan_to_num(gaps.amin(1), posinf=1e9).double().numpy()
    found = audit_scores("rows", True, scores, canaries.included, federation.config.seed)
    return round(found.auroc, 4)


def _band(audit: Results) -> list[float] | None:
    targets = audit.get("targets")
    return [round(targets[0][name], 4) for name in ("null_low", "null_high")] if targets else None
