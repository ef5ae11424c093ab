"""Contenders that are this package: a method on one of its engines, through the same strategy as any run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from clients.engines import open_engine
from experiments.bench.spec import Contender, Open, Reach, Step, timed
from fedkd.config import Config
from fedkd.errors import FedkdError
from fedkd.federation import Federation, build
from fedkd.grid import LocalGrid
from privacy import mechanisms
from strategies.flower import KnowledgeStrategy

ENGINES: dict[str, tuple[str, int | None]] = {
    "loop": ("loop", None),
    "pool 1": ("pool", 1),
    "pool 2": ("pool", 2),
    "vectorised": ("vectorised", None),
}
"""Name of a contender -> (engine, workers)."""

ABOUT = {
    "loop": "fedkd, in this process",
    "pool 1": "fedkd, one worker process",
    "pool 2": "fedkd, two worker processes",
    "vectorised": "fedkd, clients stacked by torch.func.vmap",
}

Made = Callable[[], Config]


def contenders(made: Made, names: str, reach: dict[str, Reach] | None = None) -> list[Contender]:
    """One contender an engine, of ``names`` separated by commas."""
    limits = reach or {}
    return [Contender(name, ABOUT[name], opener(made, name), limits.get(name)) for name in names.split(",")]


def opener(made: Made, name: str) -> Open:
    """Rounds of a configuration on one engine; the configuration, and so the data, are made when it opens."""

    @contextmanager
    def opened() -> Iterator[Step]:
        kind, workers = ENGINES[name]
        config = made()
        config = replace(config, engine=config.engine.model_copy(update={"name": kind, "workers": workers}))
        with rounds(build(config)) as step:
            yield step

    return opened


class Training(KnowledgeStrategy):
    """Any run's strategy, but nobody is evaluated: that is the simulation's own window, not the federation's work."""

    def evaluates(self, t: int) -> bool:
        """Never."""
        return False


@contextmanager
def rounds(federation: Federation) -> Iterator[Step]:
    """A step that runs one more round; a client that fails is an error here, not a refusal."""
    config = federation.config
    lost: list[str] = []
    strategy = Training(federation, mechanisms.build(federation))
    strategy.on_round = lambda report: lost.extend(line.refused or "" for line in report.failures)
    with open_engine(config) as engine:
        grid = LocalGrid(engine, config.federation.clients, {"config": config.to_json()})

        def act() -> None:
            strategy.start(grid, num_rounds=strategy.round + 1)
            if lost:
                raise FedkdError(lost[0])

        yield timed(act)
