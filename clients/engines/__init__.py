"""Engines: what runs a client app behind a local Grid. All give the same answers; they are imported when chosen."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from fedkd.config import Config
from fedkd.grid import Engine

APP = "clients.app:app"


@contextmanager
def open_engine(config: Config) -> Iterator[Engine]:
    """The engine of a configuration, closed afterwards."""
    engine, timeout = config.engine, config.federation.client_timeout
    workers = engine.workers or os.cpu_count() or 1
    if engine.name == "pool":
        from clients.engines.pool import Pool

        with Pool(APP, timeout, workers) as pool:
            yield pool
    elif engine.name == "ray":
        from clients.engines.ray import Ray

        with Ray(APP, timeout, workers, engine.gpus_per_client, engine.address) as ray:
            yield ray
    elif engine.name == "vectorised":
        from clients.app import app
        from clients.engines.vectorised import Vectorised

        yield Vectorised(app, timeout)
    else:
        from clients.app import app
        from clients.engines.loop import Loop

        yield Loop(app, timeout)
