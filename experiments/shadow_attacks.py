"""What shadows tell about a run: LiRA and RMIA on everything that is audited.

Everything but the run's own scores comes from the shadows: which form of LiRA, its Gaussians, RMIA's references and its
constant ``a``. So the attacks' scores do not depend on the run's coins, and Steinke, Nasr and Jagielski's bound holds
for them as for the cross-entropy. LiRA's scores may contradict a claim, and pay for it (``Auditor.verdicts``); RMIA's
are shown and never judged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from scipy.special import log_expit

from experiments import files, shadows
from experiments.audit import HOME, Auditor, contradicted
from experiments.shadows import Scores
from fedkd.errors import ConfigError
from privacy.audits.lira import AttackResult, audit_attack, lira_offline, lira_online
from privacy.audits.membership import auroc
from privacy.audits.rmia import rmia
from privacy.audits.verdict import Verdict

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

PAPERS_A = 0.3
TRIED_A = (0.0, 0.25, 0.5, 0.75, 1.0)
MOST = 8  # shadows that take the target's part in turn, when RMIA's constant is chosen


@dataclass(frozen=True, eq=False)
class Attacks:
    """What LiRA and RMIA get out of a run.

    Attributes:
        models: How many shadows.
        population: How many records like the canaries RMIA compares with.
        results: One for each attack and target.
        lira: LiRA's scores (m,), by target, lower is more memorised.
        notes: What could not be done, and why.
    """

    models: int
    population: int
    results: Sequence[AttackResult]
    lira: Mapping[str, Floats]
    notes: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """Return the attacks as JSON values, the scores left out."""
        return {
            "models": self.models,
            "population": self.population,
            "attacks": [one.to_json() for one in self.results],
            "notes": list(self.notes),
        }

    def table(self) -> Table:
        """One line for each attack and target."""
        title = f"attacks with {self.models} shadow models, and {self.population} records like the canaries"
        grid = Table(box=None, header_style="bold", pad_edge=False, title=title, title_justify="left")
        for name in ("audited", "attack", "AUROC", "95 % interval", "null band", "p", "TPR at 1 %", "at 0.1 %"):
            grid.add_column(name)
        for one in self.results:
            audit, rare = one.audit, one.tpr_at_01_percent
            grid.add_row(
                audit.target,
                one.attack,
                f"{audit.auroc:.3f}",
                f"{audit.auroc_low:.3f} to {audit.auroc_high:.3f}",
                f"{audit.null_low:.3f} to {audit.null_high:.3f}",
                f"{audit.p_value:.2g}",
                f"{one.tpr_at_1_percent:.3f}",
                "-" if rare is None else f"{rare:.3f}",
            )
        return grid

    def write(self, directory: Path, verdicts: Sequence[Verdict]) -> None:
        """Add the attacks to summary.json, with verdicts that take the place of those without shadows.

        Raises:
            ConfigError: There is no summary.json with an audit.
        """
        path = directory / files.SUMMARY
        try:
            summary = json.loads(path.read_text(encoding="utf-8"))
            audit = dict(summary["audit"])
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(f"{path}: missing or damaged; expected that of a finished run with canaries") from None
        audit["shadows"] = self.to_json()
        if verdicts:
            noise = dict(audit.get("noise") or {}).get("outcome") == "contradicted"
            audit["verdicts"] = [one.to_json() for one in verdicts]
            audit["contradicted"] = contradicted(verdicts) or noise
        files.write_json(path, {**summary, "audit": audit})


def attacks(auditor: Auditor, directory: Path) -> Attacks | None:
    """Attack a run with the shadows that are in its directory; None without any.

    Raises:
        ConfigError: A shadow's file is damaged or another configuration's.
    """
    found = shadows.trained(directory)
    if not found:
        return None
    return attack(shadows.scores(auditor), found, auditor.site.federation.config.seed)


def attack(target: Scores, found: Sequence[Scores], seed: int) -> Attacks:
    """Attack a run, given its scores and those of its shadows.

    Args:
        target: The run's scores. Its coins are used to judge the attacks, never by them.
        found: The shadows' scores, at least one.
        seed: Seed of the bootstrap.
    """
    included, seen = target.included, np.stack([one.included for one in found])
    results, lira, notes = [], {}, []
    m, population = len(included), 0
    for name, own in target.log_odds.items():
        values = np.stack([one.log_odds[name] for one in found])
        population = own.size - m
        for kind in (_lira, _rmia):
            try:
                label, scores = kind(own, values, seen)
            except ConfigError as error:
                notes.append(f"{name}: {error}")
                continue
            results.append(audit_attack(label, name, name != HOME, scores, included, seed))
            if kind is _lira:
                lira[name] = scores
    return Attacks(len(found), population, results, lira, notes)


def _lira(own: Floats, values: Floats, seen: Bools) -> tuple[str, Floats]:
    """LiRA, offline where two shadows have not seen each canary, and two not."""
    m = seen.shape[1]
    if _fewest(~seen) < 2:
        raise ConfigError("LiRA: expected two shadows or more that did not see each canary; train more")
    if _fewest(seen) < 2:
        return "LiRA, offline", lira_offline(own[:m], values[:, :m], seen)
    return "LiRA, online", lira_online(own[:m], values[:, :m], seen)


def _rmia(own: Floats, values: Floats, seen: Bools) -> tuple[str, Floats]:
    """RMIA, offline, with the constant that is best where shadows take the target's part."""
    m = seen.shape[1]
    p, references = log_expit(own), log_expit(values)
    a = _best_a(references, seen)
    scores = rmia(p[:m], references[:, :m], p[m:], references[:, m:], included=seen, a=a)
    return f"RMIA, a = {a:g}", scores


def _best_a(references: Floats, seen: Bools) -> float:
    """The constant with the highest mean AUROC; the paper's, where no shadow can be attacked with the others."""
    m, reached = seen.shape[1], np.zeros(len(TRIED_A))
    for k in range(min(len(seen), MOST)):
        rest = np.delete(np.arange(len(seen)), k)
        if not 0 < int(seen[k].sum()) < m or _fewest(~seen[rest]) < 1:
            continue
        p, others = references[k], references[rest]
        for i, a in enumerate(TRIED_A):
            found = rmia(p[:m], others[:, :m], p[m:], others[:, m:], included=seen[rest], a=a)
            reached[i] += auroc(found[seen[k]], found[~seen[k]])
    return TRIED_A[int(np.argmax(reached))] if reached.any() else PAPERS_A


def _fewest(used: Bools) -> int:
    """Of all canaries, the fewest shadows that are used for one."""
    return int(used.sum(axis=0).min())
