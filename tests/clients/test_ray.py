"""The ray engine: the loop's answers, actors that die, hang or raise, and a Ray that is gone afterwards."""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict

from clients.app import app as our_app
from clients.client import site
from clients.engines.loop import Loop
from clients.engines.ray import Cargo, Ray
from fedkd import wire
from fedkd.config import Config
from fedkd.errors import ConfigError
from fedkd.grid import LocalGrid
from fedkd.knowledge import fingerprint
from strategies.flower import KnowledgeStrategy

pytestmark = [  # Ray leaves its log files and child processes to the garbage collector
    pytest.mark.filterwarnings("ignore:unclosed file <_io:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
]


@pytest.fixture(scope="module")
def session():
    """One Ray for the tests that do not need their own: engines reuse it and leave it running."""
    ray = pytest.importorskip("ray")
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")
    ray.init("local", num_cpus=6, include_dashboard=False, log_to_driver=False, logging_level="CRITICAL")
    yield ray
    ray.shutdown()
    gc.collect()


def ask(grid: LocalGrid, kind: str = "train", **order):
    content = RecordDict({"order": ConfigRecord(order)})
    return list(grid.send_and_receive([Message(content, node, kind) for node in grid.get_node_ids()]))


def seen(replies) -> list[int | None]:
    return [None if r.has_error() else r.content.metric_records["about"]["n"] for r in replies]


def wait_for(path: Path) -> None:
    until = time.monotonic() + 30
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.02)


# --- A Ray of its own: these tests come first, before the others share one --------------------------------------------


def run_and_fail(app: str, weights: torch.Tensor, seen: dict) -> None:
    with Ray(app, workers=1) as engine:
        seen.update(pids=engine.pids(), folder=engine._session.folders[0])
        assert ray_is_there() and seen["folder"].is_dir()
        grid = LocalGrid(engine, 2, {"lr": 0.5})
        content = RecordDict({"order": ConfigRecord({}), "w": wire.to_record({"w": weights})})
        messages = [Message(content, node, "train") for node in grid.get_node_ids()]
        seen.update(engine=engine, replies=list(grid.send_and_receive(messages)))
        raise KeyError


def ray_is_there() -> bool:
    return pytest.importorskip("ray").is_initialized()


@pytest.mark.integration
def test_ray_starts_and_stops_with_the_engine_and_tensors_outlive_it(app):
    before, weights, seen = signal.getsignal(signal.SIGTERM), torch.arange(200_000.0), {}
    with pytest.raises(KeyError):
        run_and_fail(app, weights, seen)
    assert not ray_is_there()
    assert not seen["folder"].exists()
    assert signal.getsignal(signal.SIGTERM) == before
    for reply in seen["replies"]:
        assert torch.equal(wire.from_record(reply.content.array_records["w"])["w"], weights)
    until = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in seen["pids"]) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in seen["pids"])
    seen["engine"].close()
    with pytest.raises(RuntimeError, match="closed"):
        next(seen["engine"]([]))
    gc.collect()


@pytest.mark.integration
def test_an_address_where_nobody_listens_is_refused_at_once():
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(ConfigError, match=r"no cluster at '127.0.0.1:\d+' that this machine has joined"):
            Ray(address=f"127.0.0.1:{free.getsockname()[1]}")
    for address in ("ray://127.0.0.1:10001", "head", "head:"):
        with pytest.raises(ConfigError, match=r"engine.address: expected HOST:PORT"):
            Ray(address=address)


# --- The same answers ------------------------------------------------------------------------------------------------

COMMON = {
    "data": {"name": "digits", "partition": "dirichlet", "alpha": 0.5, "test": 100},
    "federation": {"clients": 4, "rounds": 2, "cohort": 3},
}
PUBLIC = {**COMMON["data"], "public": 200}
MIXED = {"name": "linear", "by_client": ["linear", "mlp"]}
CASES = {
    "fedavg": {**COMMON, "model": {"name": "mlp"}, "method": {"name": "fedavg"}},
    "fedmd behind ambassadors": {
        **COMMON,
        "data": PUBLIC,
        "model": MIXED,
        "method": {"name": "fedmd", "loss": "kl", "student_epochs": 1},
        "privacy": {"mechanism": "ambassador", "delta": 1e-3, "steps": 2},
    },
    "feddf": {**COMMON, "data": PUBLIC, "model": MIXED, "method": {"name": "feddf"}},
}


def outcome(engine, config: Config) -> dict[str, object]:
    here = site(config.to_json())
    strategy = KnowledgeStrategy(here.federation, here.mechanism)
    rounds = []
    strategy.on_round = rounds.append
    grid = LocalGrid(engine, 4, {"config": config.to_json()})
    strategy.start(grid)
    assert not [line for report in rounds for line in report.failures]
    homes = {
        client: {name: fingerprint(wire.from_record(record)) for name, record in state.array_records.items()}
        for client, state in grid.homes.items()
    }
    assert len(homes) >= 3
    return {
        "server": fingerprint(strategy.server),
        "homes": homes,
        "ledger": strategy.ledger.to_json(),
        "accuracy": [report.accuracy and report.accuracy.to_json() for report in rounds],
    }


@pytest.fixture(scope="module")
def engines(session):
    """One actor and two, for all methods."""
    with Ray(workers=1) as one, Ray(workers=2) as two:
        yield {1: one, 2: two}


@pytest.mark.integration
@pytest.mark.parametrize("case", CASES)
def test_one_actor_and_two_give_the_loops_answer(case, engines):
    config = Config.from_raw(CASES[case])
    expected = outcome(Loop(our_app), config)
    for engine in engines.values():
        assert outcome(engine, config) == expected


# --- What goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.integration
def test_a_client_that_raises_exits_kills_its_actor_or_answers_nonsense(app, session, tmp_path):
    with Ray(app, workers=2) as engine:
        grid = LocalGrid(engine, 6, {"lr": 0.5})
        assert seen(ask(grid)) == [1] * 6
        before = set(engine.pids())
        replies = ask(grid, raises=1, exits=2, answers_nonsense=3, dies=4, dies_once=5, mark=str(tmp_path / "mark"))
        assert seen(replies) == [2, None, None, None, None, 2]
        assert replies[1].error.reason == "RuntimeError: no"
        for k in (2, 4):
            assert replies[k].error.reason.startswith("the worker died twice at this client")
        assert "'str' object has no attribute" in replies[3].error.reason
        assert [state.metric_records["seen"]["n"] for state in grid.homes.values()] == [2, 1, 1, 1, 1, 2]
        assert seen(ask(grid)) == [3, 2, 2, 2, 2, 3]  # no later round suffers
        assert set(engine.pids()) != before
        assert {r.content.metric_records["n"]["n"] for r in ask(grid, "query")} == {1}


@pytest.mark.integration
def test_an_actor_killed_from_outside_is_replaced_and_nobody_is_missing(app, session, tmp_path):
    with Ray(app, workers=2) as engine:
        grid = LocalGrid(engine, 5, {"lr": 0.5})

        victim = engine.pids()[0]

        def kill() -> None:
            wait_for(tmp_path / "0")
            os.kill(victim, signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        replies = ask(grid, takes=0.4, marks=str(tmp_path))
        killer.join()
        assert seen(replies) == [1] * 5
        assert victim not in engine.pids()
        os.kill(engine.pids()[0], signal.SIGKILL)  # between rounds
        assert seen(ask(grid)) == [2] * 5


@pytest.mark.integration
def test_a_client_past_its_time_is_killed_and_a_call_left_early_leaves_nothing(app, session):
    with Ray(app, timeout=3.0, workers=1) as engine:
        grid = LocalGrid(engine, 3, {"lr": 0.5})
        began = time.monotonic()
        replies = ask(grid, sleeps=1)
        assert time.monotonic() - began < 30
        assert seen(replies) == [1, None, 1]
        assert replies[1].error.reason == "TimeoutError: no answer within 3 s"
        assert sorted(grid.homes) == [0, 2]
        order = RecordDict({"order": ConfigRecord({"takes": 0.2})})
        jobs = [(Message(order, node, "train"), grid.context(k)) for k, node in enumerate(grid.get_node_ids())]
        answers = engine(jobs)
        assert not next(answers).has_error()
        answers.close()
        assert seen(ask(grid)) == [2, 1, 2]


# --- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.integration
def test_what_ray_would_wait_for_without_end_is_refused(app, session):
    with pytest.raises(ConfigError, match=r"engine.gpus_per_client=1000: this machine has .* GPUs, enough for 0 of 1"):
        Ray(app, gpus_per_client=1000)
    with pytest.raises(ConfigError, match=r"engine.workers=7: this machine has 6 CPUs"):
        Ray(app, workers=7)
    with pytest.raises(ConfigError, match=r"a worker cannot import 'no_such_app:app' \(ModuleNotFoundError"):
        Ray("no_such_app:app")
    assert session.is_initialized()


def test_bad_input_is_refused_without_starting_ray(monkeypatch):
    with pytest.raises(ConfigError, match=r"engine.workers: expected 1 or more, got 0"):
        Ray(workers=0)
    for gpus in (-1.0, 1.5):
        with pytest.raises(ConfigError, match=r"engine.gpus_per_client: expected 0 to 1 or a whole number"):
            Ray(gpus_per_client=gpus)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"Ray is not installed; pip install 'flwr\[simulation\]'"):
        Ray()


# --- What travels ----------------------------------------------------------------------------------------------------


def test_what_many_letters_need_is_laid_down_once():
    weights, cargo = np.ones(1000, np.uint8), Cargo()

    def write(lay) -> bytes:
        own = np.zeros(10, np.uint8)
        return bytes([lay("weights", weights, weights), lay(id(own), own, own)])

    letters = [cargo.load(write) for _ in range(3)]
    shared = cargo.shared()
    assert [values.nbytes for values in shared.values()] == [1000]
    assert all(len(arrays) == 2 and shared.keys() < arrays.keys() for _, arrays in letters)
    assert len({slot for _, arrays in letters for slot in arrays}) == 4
