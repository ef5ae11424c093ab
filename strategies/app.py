"""The Flower ServerApp: the same methods under ``flwr run`` and on a SuperLink.

Run config: ``config`` is the resolved configuration as JSON (``fedkd show --json`` prints it); ``out``, if set, is
a file for the results as JSON.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedkd import federation as federations
from fedkd.knowledge import fingerprint
from privacy import mechanisms
from strategies.flower import KnowledgeStrategy, Round

app = ServerApp()
log = logging.getLogger("fedkd")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation of the run config."""
    federation = federations.from_json(str(context.run_config["config"]))
    rounds: list[Round] = []
    strategy = KnowledgeStrategy(federation, mechanisms.build(federation), on_round=rounds.append)
    strategy.start(grid)
    results = {
        "rounds": [{"round": r.t, "accuracy": r.accuracy and r.accuracy.to_json()} for r in rounds],
        "failures": [line.to_json() for r in rounds for line in r.failures],
        "server_hash": fingerprint(strategy.server),
        "epsilon": rounds[-1].epsilon if rounds else None,
    }
    log.info("fedkd: %s", json.dumps(results))
    if context.run_config.get("out"):
        Path(str(context.run_config["out"])).write_text(json.dumps(results, indent=1), encoding="utf-8")
