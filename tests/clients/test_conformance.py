"""Every method on every engine gives the loop engine's answer. A new method joins by being registered."""

from __future__ import annotations

import functools

import pytest
import torch

from clients.app import app
from clients.client import site
from clients.engines.loop import Loop
from clients.engines.pool import Pool
from clients.engines.vectorised import Vectorised
from fedkd import wire
from fedkd.config import Config
from fedkd.grid import Engine, LocalGrid
from fedkd.registry import METHODS, method_class
from strategies.flower import KnowledgeStrategy

CASES = [(name, mechanism) for name in METHODS for mechanism in ("none", "ambassador") if name != "local"]
CASES += [("local", "none"), ("fedmd", "gaussian")]


def configuration(name: str, mechanism: str) -> Config:
    kind = method_class(name)
    models = ["linear"] if kind.same_model else ["linear", "mlp"]
    raw = {
        "seed": 5,
        "data": {"name": "digits", "partition": "dirichlet", "alpha": 0.5, "test": 100},
        "federation": {"clients": 5, "rounds": 2, "cohort": 4},
        "model": {"name": "linear", "by_client": models},
        "method": {"name": name, "epochs": 1, **({"loss": "kl"} if name == "fedmd" else {})},
        "privacy": {"mechanism": mechanism},
    }
    if kind.needs_public:
        raw["data"]["public"] = 100
    if mechanism == "ambassador":
        raw["privacy"] |= {"delta": 1e-3, "steps": 2}
    return Config.from_raw(raw)


def outcome(config: Config, engine: Engine):
    """Everything a run arrives at: server, homes, ledger, scores."""
    text = config.to_json()
    here = site(text)
    grid = LocalGrid(engine, config.federation.clients, {"config": text})
    strategy = KnowledgeStrategy(here.federation, here.mechanism)
    strategy.start(grid)
    homes = {
        (client, name, key): value
        for client, state in grid.homes.items()
        for name, record in state.array_records.items()
        for key, value in wire.from_record(record).items()
    }
    return strategy.server, homes, strategy.ledger.to_json(), strategy.scores


@functools.cache
def expected(name: str, mechanism: str):
    return outcome(configuration(name, mechanism), Loop(app))


@pytest.fixture(scope="module", params=[1, 2, 4])
def pool(request):
    with Pool("clients.app:app", workers=request.param) as engine:
        yield engine


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mechanism"), CASES)
def test_the_pool_gives_the_loops_answer_bit_for_bit(pool, name, mechanism):
    server, homes, ledger, scores = outcome(configuration(name, mechanism), pool)
    wanted = expected(name, mechanism)
    same_bits(server, wanted[0])
    same_bits(homes, wanted[1])
    assert (ledger, scores) == wanted[2:]


@pytest.mark.parametrize(("name", "mechanism"), CASES)
def test_the_vectorised_engine_gives_the_loops_answer_within_the_methods_tolerance(name, mechanism):
    config = configuration(name, mechanism)
    server, homes, ledger, _ = outcome(config, Vectorised(app))
    wanted = expected(name, mechanism)
    tolerance = config.method.tolerance
    for got, want in ((server, wanted[0]), (homes, wanted[1])):
        assert got.keys() == want.keys()
        for key in want:
            torch.testing.assert_close(got[key], want[key], rtol=tolerance, atol=tolerance)
    assert ledger == wanted[2]


def same_bits(got, want) -> None:
    assert got.keys() == want.keys()
    for key in want:
        assert torch.equal(got[key], want[key]), key
