"""A run's accuracies and calibration errors are those of its final models, worked out again from their logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clients.app import app
from clients.client import site
from clients.engines.loop import Loop
from clients.engines.pool import Pool
from fedkd import wire
from fedkd.config import Config
from fedkd.grid import LocalGrid
from strategies.flower import KnowledgeStrategy


def config(name: str) -> Config:
    held = {"public": 100} if name == "fedmd" else {"reserve": 100}
    return Config.from_raw(
        {
            "data": {"name": "digits", "partition": "dirichlet", "alpha": 0.3, "test": 100, **held},
            "federation": {"clients": 4, "rounds": 3, "cohort": 3},
            "model": {"name": "linear"},
            "method": {"name": name, "epochs": 2, "lr": 0.01},
        }
    )


def run(wanted: Config, engine):
    text = wanted.to_json()
    here = site(text)
    strategy = KnowledgeStrategy(here.federation, here.mechanism)
    rounds = []
    strategy.on_round = rounds.append
    grid = LocalGrid(engine, 4, {"config": text})
    result = strategy.start(grid)
    return strategy, grid, rounds, result


def error(logits: list[torch.Tensor], labels: list[torch.Tensor]) -> float:
    """Expected calibration error, bin by bin, over all samples."""
    p = torch.cat(logits).double().softmax(-1).numpy()
    sure, right = p.max(1), p.argmax(1) == torch.cat(labels).numpy()
    place = np.ceil(sure * 15).astype(int)
    return sum(abs((sure - right)[place == b].sum()) for b in range(1, 16)) / len(sure)


@pytest.mark.parametrize("name", ["fedmd", "fedavg"])
def test_scores_are_those_of_the_final_models(name):
    strategy, grid, rounds, result = run(config(name), Loop(app))
    federation, model = strategy.federation, strategy.task.model
    if name == "fedmd":
        params = [wire.from_record(grid.homes[k].array_records["personal"]) for k in range(4)]
    else:
        params = [strategy.server] * 4
    tests = [federation.own_test_set(k) for k in range(4)]
    logits = [model.logits(p, x) for p, (x, _) in zip(params, tests, strict=True)]
    own = [float((z.argmax(-1) == y).double().mean()) for z, (_, y) in zip(logits, tests, strict=True)]
    got = strategy.accuracy
    assert got is not None and rounds[-1].accuracy == got
    assert got.personal_mean == pytest.approx(np.mean(own))
    assert got.personal_ece == pytest.approx(error(logits, [y for _, y in tests]))
    last = dict(result.evaluate_metrics_clientapp[3])
    assert last["personal_ece"] == got.personal_ece
    if name == "fedmd":  # no model of the server's own
        assert got.global_ is None and got.global_ece is None and "global_ece" not in last
    else:
        z = model.logits(strategy.server, federation.test_x)
        assert got.global_ == pytest.approx(float((z.argmax(-1) == federation.test_y).double().mean()))
        assert got.global_ece == pytest.approx(error([z], [federation.test_y]))


@pytest.mark.slow
def test_worker_processes_report_the_same_calibration():
    wanted = config("fedavg")
    with Pool("clients.app:app", workers=2) as pool:
        there = run(wanted, pool)[2]
    here = run(wanted, Loop(app))[2]
    assert [r.accuracy for r in there] == [r.accuracy for r in here]
