"""Every method on every engine gives the loop engine's answer. A new method joins by being registered."""

from __future__ import annotations

import functools
import gc
import random
import warnings

import pytest
import torch

from clients.app import app
from clients.client import site
from clients.engines.loop import Loop
from clients.engines.pool import Pool
from clients.engines.ray import Ray
from clients.engines.vectorised import Vectorised
from fedkd import wire
from fedkd.config import Config
from fedkd.errors import ConfigError
from fedkd.grid import Engine, LocalGrid
from fedkd.knowledge import fingerprint
from fedkd.registry import METHODS, method_class
from fedkd.sections import MECHANISMS
from privacy import mechanisms
from strategies.flower import KnowledgeStrategy


def configuration(name: str, mechanism: str) -> Config:
    kind = method_class(name)
    models = ["linear"] if kind.same_model else ["linear", "mlp"]
    method = {"name": name, "epochs": 1}
    match name:  # what the smallest of all models and trainings is too small for, or the defaults too large
        case "fedmd":
            method["loss"] = "kl"
        case "fedper":
            models = ["mlp"]
        case "fedproto":
            method["inference"] = "prototype"
        case "fedrep":
            models, method["epochs"] = ["mlp"], 2
        case "kd3":
            models = ["mlp"]
            method |= {"student_epochs": 1, "student_batch": 16, "selection": "all"}
        case "rad" | "rad_clients":
            method |= {"questions": 10, "student_epochs": 2, "error_rate": 0.1}
        case "swing":
            method["score"] = "none" if mechanism == "labels" else "rarity"
        case "swing_labels":
            method |= {"score": "none", "noise": "laplace" if mechanism in ("none", "ambassador", "labels") else "none"}
        case "dense":
            method |= {"synthesis_epochs": 2, "synthesis_batch": 16, "generator_steps": 3}
    raw = {
        "seed": 5,
        "data": {"name": "digits", "partition": "dirichlet", "alpha": 0.5, "test": 100},
        "federation": {"clients": 5, "rounds": 2, "cohort": 4},
        "model": {"name": models[0], "by_client": models},
        "method": method,
        "privacy": {"mechanism": mechanism},
    }
    if kind.needs_public:
        raw["data"]["public"] = 100
    if mechanism == "ambassador":
        raw["privacy"] |= {"delta": 1e-3, "steps": 2}
    if mechanism == "labels":
        raw["privacy"]["delta"] = 1e-3
    return Config.from_raw(raw)


def cases() -> list[tuple[str, str]]:
    """Every registered method behind the mechanisms that it allows; those that are alike for many methods, with few."""
    alike = {
        "laplace": ("fedmd",),
        "votes": ("dsfl",),
        "local_votes": ("dsfl",),
        "labels": ("fedavg", "fedmd", "fedd2s"),
    }
    found = []
    for name in METHODS:
        for mechanism in MECHANISMS:
            if name not in alike.get(mechanism, (name,)):
                continue
            try:
                mechanisms.refuse(configuration(name, mechanism))
            except ConfigError:
                assert mechanism != "none"
                continue
            found.append((name, mechanism))
    return found


every_case = pytest.mark.parametrize(("name", "mechanism"), cases())


class Disorderly(LocalGrid):
    """Delivers in an order of its own each time, and hands the replies over in yet another."""

    order: random.Random

    def send_and_receive(self, messages, *, timeout=None):
        return self._mixed(super().send_and_receive(self._mixed(messages), timeout=timeout))

    def _mixed(self, things):
        things = list(things)
        return self.order.sample(things, len(things))


def outcome(config: Config, engine: Engine, order: int | None = None):
    """Everything a run arrives at: server, homes, ledger, scores."""
    text = config.to_json()
    here = site(text)
    kind = LocalGrid if order is None else Disorderly
    grid = kind(engine, config.federation.clients, {"config": text})
    grid.order = random.Random(order)
    strategy = KnowledgeStrategy(here.federation, here.mechanism)
    rounds = []
    strategy.on_round = rounds.append
    strategy.start(grid)
    assert [line for report in rounds for line in report.failures] == []
    homes = {
        (client, name, key): value
        for client, state in grid.homes.items()
        for name, record in state.array_records.items()
        for key, value in wire.from_record(record).items()
    }
    return strategy.server, homes, strategy.ledger.to_json(), strategy.scores


def bits(server, homes, ledger, scores):
    """The outcome with hashes in the tensors' place, one a tensor, so that a failure says where."""
    return {
        "server": fingerprint(server),
        "homes": {key: fingerprint({"": value}) for key, value in homes.items()},
        "ledger": ledger,
        "scores": scores,
    }


@functools.cache
def expected(name: str, mechanism: str):
    return outcome(configuration(name, mechanism), Loop(app))


@pytest.fixture(scope="module", params=[1, 2, 4])
def pool(request):
    """One pool of each size for all methods."""
    with Pool("clients.app:app", workers=request.param) as engine:
        yield engine


@pytest.fixture(scope="module")
def ray():
    """One Ray, with two actors, for all methods: it takes seconds to start."""
    pytest.importorskip("ray")
    with Ray("clients.app:app", workers=2) as engine:
        yield engine
    with warnings.catch_warnings():  # Ray leaves its log files and child processes to the garbage collector
        warnings.simplefilter("ignore", ResourceWarning)
        del engine
        gc.collect()


def test_every_registered_method_takes_part():
    assert {name for name, mechanism in cases() if mechanism == "none"} == METHODS.keys()


@pytest.mark.slow
@every_case
def test_a_pool_of_any_size_gives_the_loops_answer_bit_for_bit_in_any_order(pool, name, mechanism):
    config = configuration(name, mechanism)
    wanted = bits(*expected(name, mechanism))
    for order in (None, len(pool.pids())):
        assert bits(*outcome(config, pool, order)) == wanted


@every_case
def test_the_vectorised_engine_gives_the_loops_answer_within_the_methods_tolerance(name, mechanism):
    config = configuration(name, mechanism)
    reason = config.method.beyond_vmap
    if reason is not None:
        with pytest.raises(ConfigError, match=rf"{name} with model .* is beyond .*{reason}.* use engine.name="):
            outcome(config, Vectorised(app))
        return
    server, homes, ledger, _ = outcome(config, Vectorised(app))
    wanted = expected(name, mechanism)
    tolerance = config.method.tolerance
    for got, want in ((server, wanted[0]), (homes, wanted[1])):
        assert got.keys() == want.keys()
        for key in want:
            torch.testing.assert_close(got[key], want[key], rtol=tolerance, atol=tolerance)
    assert ledger == wanted[2]


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore:unclosed file <_io:ResourceWarning")
@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
@every_case
def test_ray_gives_the_loops_answer_bit_for_bit_in_any_order(ray, name, mechanism):
    assert bits(*outcome(configuration(name, mechanism), ray, order=1)) == bits(*expected(name, mechanism))
