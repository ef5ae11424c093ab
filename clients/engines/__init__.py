"""Engines: what runs a client app behind a local Grid. All give the same answers; they are imported when chosen."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from clients.engines.heap import keep_freed_memory
from fedkd.errors import ConfigError

if TYPE_CHECKING:  # a nursery can be started before these imports, which take seconds
    from fedkd.config import Config
    from fedkd.grid import Engine

APP = "clients.app:app"
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
WORKER_BYTES = 400_000_000  # what an actor of Ray that has imported torch, flwr and opacus holds; a pool's is smaller


@contextmanager
def open_engine(config: Config, say: Callable[[str], None] = lambda _: None) -> Iterator[Engine]:
    """The engine of a configuration, closed afterwards.

    Args:
        config: Its ``engine`` section decides.
        say: Told what 'auto' chose.

    Raises:
        ConfigError: More workers than memory allows, or an engine that cannot run here.
    """
    with ExitStack() as stack:
        engine = _open(config, stack, say)
        keep_freed_memory()
        gc.freeze()  # what libraries and data made; collections would look through it again and again
        stack.callback(gc.unfreeze)
        yield engine


def _open(config: Config, stack: ExitStack, say: Callable[[str], None]) -> Engine:
    engine, timeout = config.engine, config.federation.client_timeout
    name, workers = engine.name, engine.workers or os.cpu_count() or 1
    if name == "pool" or (name == "ray" and engine.address is None):  # a cluster's memory is elsewhere
        check_memory(workers)
    if name == "ray":
        from clients.engines.ray import Ray

        return stack.enter_context(Ray(APP, timeout, workers, engine.gpus_per_client, engine.address))
    if name == "pool" or (name == "auto" and workers > 1):
        from clients.engines.pool import Pool

        pool = stack.enter_context(Pool(APP, timeout, workers))
        if name == "pool":
            return pool
    from clients.app import app
    from clients.engines.loop import Loop

    if name == "loop":
        return Loop(app, timeout)
    from clients.engines.vectorised import Vectorised

    vectorised = Vectorised(app, timeout, engine.block)
    if name == "vectorised":
        return vectorised
    from clients.engines.auto import Auto

    plain: dict[str, Engine] = {"pool": pool} if workers > 1 else {"loop": Loop(app, timeout)}
    return Auto({**plain, "vectorised": vectorised}, say)


def check_memory(workers: int) -> None:
    """Refuse more worker processes than this machine's free memory holds."""
    import torch

    from clients.engines.memory import available_memory

    free = available_memory(torch.device("cpu"))
    if workers * WORKER_BYTES > free:
        raise ConfigError(
            f"engine.workers={workers}: a worker takes about {WORKER_BYTES // 10**6} MB and {free // 10**6} MB are "
            f"free; use {max(1, free // WORKER_BYTES)} or fewer"
        )
