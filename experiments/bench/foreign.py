"""Contenders that run a foreign Flower app: on our Grid, and on Flower's own Ray runtime."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from experiments.bench.child import Answer, Child, Turns
from experiments.bench.spec import Open, Settings, Step, Unavailable, timed

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, ConfigRecord, Context
    from flwr.serverapp import Grid

_SWITCHES = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@dataclass(frozen=True)
class Foreign:
    """A stock Flower federation.

    Attributes:
        app: Its client app, an attribute of ``experiments.bench.apps``.
        numbers: Size of the one float32 array that travels; 0 for a model's weights.
        config: What every message says; ``model`` names the architecture.
    """

    app: str
    clients: int
    cohort: int
    numbers: int = 10
    config: dict[str, str | int | float] = field(default_factory=dict)

    def start(self) -> tuple[ArrayRecord, ConfigRecord]:
        """What the server has before round 1."""
        import torch
        from flwr.app import ArrayRecord, ConfigRecord

        from experiments.bench.hand import network
        from fedkd import wire

        about = ConfigRecord(dict(self.config))
        if not self.numbers:
            return ArrayRecord(network(str(self.config["model"])).state_dict()), about
        tensors = {"w": torch.zeros(self.numbers)}
        return (wire.to_record(tensors) if self.app == "share" else ArrayRecord(tensors)), about


def local(what: Callable[[], Foreign], workers: int | None) -> Open:
    """The app on our Grid: in this process, or in worker processes."""

    @contextmanager
    def opened() -> Iterator[Step]:
        from clients.engines.loop import Loop
        from clients.engines.pool import Pool
        from experiments.bench import apps
        from fedkd.grid import LocalGrid

        made = what()
        if workers is None:
            grid = LocalGrid(Loop(getattr(apps, made.app)), made.clients)
            yield timed(apps.Stock(grid, made.clients, made.cohort, *made.start()))
            return
        with Pool(f"{apps.APP}:{made.app}", None, workers) as pool:
            grid = LocalGrid(pool, made.clients)
            yield timed(apps.Stock(grid, made.clients, made.cohort, *made.start()))

    return opened


def flower(settings: Settings, what: Callable[[], Foreign]) -> Open:
    """The app on Flower's Ray runtime, in a child; a round is timed there, inside the server app."""

    @contextmanager
    def opened() -> Iterator[Step]:
        require_ray(settings)
        with Child("experiments.bench.foreign:serve", asdict(what()), switches(settings)) as child:
            child.await_ready()

            def step() -> float:
                child.go()
                return float(child.answer()["seconds"])

            yield step

    return opened


def require_ray(settings: Settings) -> None:
    """Raise `Unavailable` if Flower's runtime cannot or should not run here."""
    if not settings.ray:
        raise Unavailable("left out: --no-ray")
    if find_spec("ray") is None:
        raise Unavailable("not installed: ray")


def switches(settings: Settings) -> dict[str, str]:
    """The environment of Flower's runtime: a home of its own, and no word to the outside."""
    home = settings.folder / "flower"
    home.mkdir(exist_ok=True)
    return {**_SWITCHES, "FLWR_HOME": str(home)}


def serve(spec: Mapping[str, Any], turns: Turns) -> None:
    """Flower's simulation with a server app that waits for its turn before every round."""
    from experiments.bench import apps

    made = Foreign(**spec)

    def main(grid: Grid, context: Context) -> None:
        strategy = apps.Stock(grid, made.clients, made.cohort, *made.start())

        def act() -> Answer:
            start = time.perf_counter()
            strategy()
            return {"seconds": time.perf_counter() - start}

        turns.serve(act)

    simulate(main, made.app, made.clients)


def simulate(main: Callable[[Grid, Context], None], app: str, clients: int) -> None:
    """Run a server function under Flower's simulation: every core, one a client."""
    import logging
    import warnings

    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    warnings.simplefilter("ignore")
    logging.getLogger("flwr").setLevel(logging.ERROR)
    server = ServerApp()
    server.main()(main)
    try:
        run_simulation(
            server_app=server,
            client_app=getattr(import_module("experiments.bench.apps"), app),
            num_supernodes=clients,
            backend_config={
                "init_args": {"address": "local", "num_cpus": os.cpu_count() or 1, "include_dashboard": False},
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            },
        )
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        sys.stderr.write(f"\n{type(cause).__name__}: {cause}\n")
        sys.stderr.flush()
        os._exit(1)  # the server app's thread waits for its turn and would wait for ever
