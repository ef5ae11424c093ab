"""Small tasks, clients and federations that the tests of several methods share."""

from __future__ import annotations

import numpy as np
import torch
from flwr.app import RecordDict

from clients.app import app
from clients.client import site
from clients.engines.loop import Loop
from fedkd import learn, models, wire
from fedkd.config import Config
from fedkd.grid import LocalGrid
from fedkd.optim import Adam
from fedkd.registry import method_class
from fedkd.task import Client, Task
from strategies.flower import KnowledgeStrategy

K, SHAPE = 4, (1, 4, 4)


def make_task(*names: str, public: int = 0) -> Task:
    built = {name: models.build(name, SHAPE, K) for name in names or ("mlp",)}
    x = torch.rand((public, *SHAPE), generator=torch.Generator().manual_seed(9))
    return Task(built[next(iter(built))], built, K, x, 3, Adam(0.01), learn.fit, learn.sums)


def make_client(task: Task, labels: list[int], seed: int = 0) -> Client:
    g = torch.Generator().manual_seed(seed)
    order = learn.batches(np.random.default_rng(seed), len(labels), 4, 2)
    x = torch.randn((len(labels), *SHAPE), generator=g)
    return Client(x, torch.tensor(labels), order, torch.empty((0, 1), dtype=torch.int64), {}, task.model.init(1))


def padded(client: Client, rows: int = 3) -> Client:
    return client._replace(
        x=torch.cat([client.x, torch.zeros((rows, *SHAPE))]),
        y=torch.cat([client.y, torch.full((rows,), -1)]),
        order=torch.cat([client.order, torch.full((len(client.order), 1), -1)], 1),
    )


def config(name, model="mlp", by_client=(), seed=5, data=None, federation=None, **method):
    return Config.from_raw(
        {
            "seed": seed,
            "data": {"limit": 500, "test": 100, "partition": "dirichlet", "alpha": 1.0, **(data or {})},
            "federation": {"clients": 4, "rounds": 2, **(federation or {})},
            "model": {"name": model, "by_client": list(by_client)},
            "method": {"name": name, "lr": 0.01, "batch": 16, **method},
        }
    )


def run(cfg):
    """The strategy after the run, its rounds, and the grid; a client that fails is an error."""
    here, rounds = site(cfg.to_json()), []
    grid = LocalGrid(Loop(app), cfg.federation.clients, {"config": cfg.to_json()})
    strategy = KnowledgeStrategy(here.federation, here.mechanism, rounds.append)
    strategy.start(grid)
    assert [line for r in rounds for line in r.failures] == []
    return strategy, rounds, grid


def home(here, grid, client):
    return here.personal(client, grid.homes.get(client) or RecordDict())


def homes_of(grid):
    """What every client that has been asked holds, by its id as text."""
    return {
        str(k): wire.from_record(s.array_records["personal"]) for k, s in sorted(grid.homes.items()) if "personal" in s
    }


def on_digits(name: str, rounds: int = 6, one_class: bool = False, model: str = "linear", **method):
    """A skewed federation of five clients, or of ten with one class each who take turns: strategy, rounds, homes."""
    split = {"partition": "pathological", "classes": 1} if one_class else {"partition": "dirichlet", "alpha": 0.3}
    held_out = "public" if method_class(name).needs_public else "reserve"
    cfg = Config.from_raw(
        {
            "data": {"name": "digits", "test": 300, held_out: 300, **split},
            "federation": {"clients": 10 if one_class else 5, "rounds": rounds, "evaluate_every": rounds}
            | ({"cohort": 3} if one_class else {}),
            "model": {"name": model},
            "method": {"name": name, "lr": 0.003, "batch": 16, **method},
        }
    )
    strategy, reports, grid = run(cfg)
    return strategy, reports, homes_of(grid)
