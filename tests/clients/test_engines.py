"""Opening an engine: what is refused, and on whose account."""

from __future__ import annotations

import subprocess
import sys

import pytest

from clients.engines import open_engine
from fedkd.config import Config
from fedkd.errors import ConfigError

FEDERATION = {"data": {"name": "digits"}, "federation": {"clients": 2}, "method": {"name": "fedavg"}}


def opened(**engine) -> None:
    with open_engine(Config.from_raw({**FEDERATION, "engine": engine})):
        pass


def test_workers_of_a_cluster_elsewhere_are_not_held_against_this_machines_memory():
    pytest.importorskip("ray")
    for engine in ({"name": "ray"}, {"name": "pool"}):
        with pytest.raises(ConfigError, match=r"engine\.workers=1000000: a worker takes about"):
            opened(workers=1_000_000, **engine)
    with pytest.raises(ConfigError, match=r"no cluster at '127\.0\.0\.1:1'"):
        opened(name="ray", workers=1_000_000, address="127.0.0.1:1")


@pytest.mark.slow
def test_the_client_app_and_the_nursery_do_not_import_what_they_need_not():
    for module, absent in (("clients.app", "opacus"), ("clients.engines.nursery", "torch")):
        code = f"import sys, {module}; sys.exit({absent!r} in sys.modules)"
        subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
