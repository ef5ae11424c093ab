"""Run one federation: rounds, files, checkpoints, audit, summary, report."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from flwr.app import RecordDict

from clients.client import Site, site
from clients.engines import open_engine
from experiments import files, secrets
from experiments.audit import Auditor, summarise
from experiments.rows import Rows
from experiments.show import View
from fedkd import checkpoint, wire
from fedkd.checkpoint import Checkpoint
from fedkd.config import Config
from fedkd.errors import ConfigError
from fedkd.grid import Engine, LocalGrid
from fedkd.homes import Homes
from fedkd.knowledge import fingerprint
from fedkd.metrics import Accuracy
from privacy.ledger import Ledger
from strategies.flower import KnowledgeStrategy, Round

_PACKAGES = ("fedkd", "flwr", "torch", "opacus", "dp-accounting", "numpy")


@dataclass
class Run:
    """One run and its directory.

    Attributes:
        command: How it was started, for the report.
        view: Where progress is shown.
        spent: Seconds of the rounds so far, those before a resumption included.
    """

    config: Config
    out: Path
    command: str = ""
    view: View = field(default_factory=View)
    spent: float = 0.0

    def go(self, resume: bool = False) -> dict[str, Any]:
        """Run what is left and return the summary.

        Raises:
            ConfigError: Something in the configuration, data or directory is not usable; nothing was written.
            FedkdError: The run cannot go on; its last checkpoint stays.
        """
        torch.set_num_threads(1)  # more threads than cores a process costs 10 to 30 times on a busy machine
        here = site(self.config.to_json())
        rows = Rows(self.out, self.config)
        strategy = KnowledgeStrategy(here.federation, here.mechanism)
        if resume:
            files.same_config(self.out, self.config)
            homes = self._restore(strategy)
        else:
            files.fresh(self.out)
            files.write(self.out / files.CONFIG, self.config.to_toml())
            homes = Homes(self.out / files.HOMES, self.config.engine.home_bytes())
        strategy.on_round = lambda report: self._on_round(report, strategy, homes)
        rows.start()
        try:
            with open_engine(self.config, self.view.note) as engine:
                self.view.start(strategy.round, self.config)
                strategy.start(self._grid(engine, homes))
            summary = self.finish(here, strategy, homes)
            self._await(rows)
        finally:
            rows.stop()
            self.view.close()
        for label, reason in rows.failures.items():
            self.view.note(f"compare '{label}' failed: {reason}")
        return summary

    def _grid(self, engine: Engine, homes: Homes) -> LocalGrid:
        run_config = {"config": self.config.to_json()}
        return LocalGrid(engine, self.config.federation.clients, run_config, lambda _: self.view.reply(), homes)

    def _restore(self, strategy: KnowledgeStrategy) -> Homes:
        """Continue from the newest checkpoint; lines of rounds that will be run again are dropped."""
        saved = checkpoint.load(self.out / files.CHECKPOINT)
        homes = Homes.open(self.out / files.HOMES, saved.round, self.config.engine.home_bytes())
        homes.verify()
        ledger = Ledger.from_json(saved.extra["ledger"])
        strategy.resume(saved.round, saved.server, ledger, saved.extra.get("control"))
        strategy.scores = {int(k): v for k, v in saved.extra["scores"].items()}
        self.spent = float(saved.extra["seconds"])
        for name in (files.METRICS, files.TRANSCRIPT):
            files.truncate(self.out / name, lambda line: line["round"] <= saved.round)
        return homes

    def _on_round(self, report: Round, strategy: KnowledgeStrategy, homes: Homes) -> None:
        """Write what a finished round leaves: lines first, the checkpoint last."""
        self.spent += report.seconds
        files.append(self.out / files.METRICS, [metrics_line(report)])
        files.append(self.out / files.TRANSCRIPT, [line.to_json() for line in report.lines])
        files.write_json(self.out / files.LEDGER, strategy.ledger.to_json())
        extra = {
            "ledger": strategy.ledger.to_json(),
            "scores": strategy.scores,
            "seconds": self.spent,
            "control": {name: float(value) for name, value in strategy.control.items()},
        }
        homes.write(report.t)
        checkpoint.save(self.out / files.CHECKPOINT, Checkpoint(report.t, strategy.server, extra))
        homes.settle()
        self.view.round(report)

    def finish(self, here: Site, strategy: KnowledgeStrategy, homes: Homes) -> dict[str, Any]:
        """Audit, then write clients.json and summary.json."""
        began = time.monotonic()
        auditor = Auditor(here, strategy.server, homes, strategy.round, strategy.ledger, strategy.control)
        audit = summarise(auditor)
        if auditor.ranked and here.federation.secrets is not None:
            files.write_json(self.out / files.SECRETS, secrets.record(here.federation.secrets, auditor.ranked))
        lines = files.read_lines(self.out / files.METRICS)
        accuracy = next(line["accuracy"] for line in reversed(lines) if line["accuracy"] is not None)
        summary = {
            "method": self.config.method_name,
            "mechanism": self.config.privacy.mechanism,
            "dataset": self.config.data.name,
            "seed": self.config.seed,
            "clients": self.config.federation.clients,
            "rounds": self.config.federation.rounds,
            "accuracy": accuracy,
            "bytes": {way: sum(line["bytes"][way] for line in lines) for way in ("up", "down")},
            "privacy": _promise(auditor),
            "audit": audit,
            "failures": sum(len(line["failures"]) for line in lines),
            "seconds": round(self.spent + time.monotonic() - began, 2),
            "state_hash": state_hash(strategy, homes),
            "config_hash": self.config.hash,
            "versions": {name: version(name) for name in _PACKAGES},
            "machine": f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}, 1 thread",
            "command": self.command,
        }
        files.write_json(self.out / files.CLIENTS, _clients(here, strategy))
        files.write_json(self.out / files.SUMMARY, summary)
        return summary

    def _await(self, rows: Rows) -> None:
        rows.start()  # this process is idle from here on, so its core takes a row too
        while not rows.wait(0.2):
            self.view.waiting(rows.done, len(rows.configs))


def metrics_line(report: Round) -> dict[str, Any]:
    """A round's line of metrics.jsonl."""
    return {
        "round": report.t,
        "cohort": report.cohort,
        "accuracy": report.accuracy.to_json() if isinstance(report.accuracy, Accuracy) else None,
        "bytes": {"up": report.bytes_up, "down": report.bytes_down},
        "epsilon": _finite(report.epsilon),
        **({"signal_to_noise": report.signal_to_noise} if report.signal_to_noise is not None else {}),
        "failures": [{"client": line.client, "reason": line.refused} for line in report.failures],
        "seconds": round(report.seconds, 3),
    }


def state_hash(strategy: KnowledgeStrategy, homes: Mapping[int, RecordDict]) -> str:
    """SHA-256 of all that a run arrives at: the server's state, every client's home, the ledger."""
    sha = hashlib.sha256(fingerprint(strategy.server).encode())
    for client, state in homes.items():
        records = {name: fingerprint(wire.from_record(record)) for name, record in state.array_records.items()}
        sha.update(json.dumps([client, records], sort_keys=True).encode())
    if strategy.control:
        sha.update(fingerprint(strategy.control).encode())
    sha.update(json.dumps(strategy.ledger.to_json(), sort_keys=True).encode())
    return sha.hexdigest()


def default_out(path: Path, resume: bool) -> Path:
    """``runs/NAME``, then ``runs/NAME-2`` and so on: the first free one, or the newest to resume."""
    base = Path("runs") / path.stem
    names = [base, *(base.with_name(f"{base.name}-{i}") for i in range(2, 10_000))]
    free = next(i for i, name in enumerate(names) if not (name.exists() and any(name.iterdir())))
    if not resume:
        return names[free]
    if not free:
        raise ConfigError(f"{base}: no run here to resume; give --out")
    return names[free - 1]


def _finite(epsilon: float | None) -> float | str | None:
    return "inf" if epsilon is not None and math.isinf(epsilon) else epsilon


def _promise(auditor: Auditor) -> dict[str, Any] | None:
    claim = auditor.claim
    if claim is None:
        return None
    statement, trust = {**claim.to_json(), "text": str(claim)}, auditor.site.mechanism.trust
    return {"epsilon": _finite(claim.epsilon), "delta": claim.delta, "trust": trust, "statement": statement}


def _clients(here: Site, strategy: KnowledgeStrategy) -> list[dict[str, Any]]:
    federation = here.federation
    counts = federation.split.counts(federation.dataset.y, federation.dataset.num_classes)
    private = here.mechanism.promises
    return [
        {
            "client": client,
            "model": federation.client_models[client],
            "train": len(federation.split.train[client]),
            "test": len(federation.split.own_test[client]),
            "classes": counts[client].tolist(),
            **strategy.scores.get(client, {}),
            "epsilon": _finite(strategy.ledger.spent(client)) if private else None,
        }
        for client in range(federation.config.federation.clients)
    ]
