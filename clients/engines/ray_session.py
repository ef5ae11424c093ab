"""Ray itself: imported, started or joined, and left as it was found."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from clients.engines import ONE_THREAD
from fedkd.errors import ConfigError

_SHIPPED = ("fedkd", "privacy", "clients", "strategies")
_SWITCHES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else Ray warns of a change to come
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # else under uv Ray builds an environment for the actors
}


class Session:
    """A Ray that runs: our own for this run, somebody's cluster, or one that was there before."""

    def __init__(self, ray: ModuleType, cpus: int, app: str, address: str | None) -> None:
        self.ray = ray
        self.ours = not ray.is_initialized()
        self.folders: list[Path] = []
        self.on_sigterm = signal.getsignal(signal.SIGTERM)
        if not self.ours:
            return
        how: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "CRITICAL"}
        if address is None:
            how |= {"address": "local", "num_cpus": cpus}  # never somebody else's cluster that happens to run here
        else:
            _knock(address)
            self.folders.append(_stage(app))
            how |= {
                "address": address,
                "runtime_env": {"working_dir": str(self.folders[0]), "env_vars": ONE_THREAD},
            }
        try:
            with _environment(ONE_THREAD):  # the actors inherit it
                found = ray.init(**how)
        except Exception as error:
            self.close()
            raise ConfigError(f"engine.name=ray: {_unreachable(address)} ({last_line(error)})") from None
        if address is None:
            self.folders.append(Path(found.address_info["session_dir"]))

    def close(self) -> None:
        """Stop what was started here; twice is as good as once."""
        if not self.ours:
            return
        self.ours = False
        self.ray.shutdown()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.on_sigterm)
        for folder in self.folders:
            shutil.rmtree(folder, ignore_errors=True)  # code; logs, and clients' tensors that did not fit in memory


def import_ray() -> ModuleType:
    """The module, told to keep to itself."""
    for name, value in _SWITCHES.items():
        os.environ.setdefault(name, value)
    try:
        return import_module("ray")
    except ImportError:
        raise ConfigError("engine.name=ray: Ray is not installed; pip install 'flwr[simulation]'") from None


def _stage(app: str) -> Path:
    """A folder with the packages that an actor imports; the machines of a cluster need not have them installed."""
    folder = Path(tempfile.mkdtemp(prefix="fedkd-"))
    for name in dict.fromkeys((*_SHIPPED, app.partition(":")[0].partition(".")[0])):
        spec = find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            source = next(iter(spec.submodule_search_locations))
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif spec is not None and spec.origin:
            shutil.copy(spec.origin, folder)
    return folder


def check(ray: ModuleType, workers: int, gpus: float, address: str | None) -> None:
    """Refuse what Ray would wait for without end."""
    there = ray.cluster_resources()
    where = "this machine" if address is None else f"the cluster at {address}"
    cpus = int(there.get("CPU", 0))
    if workers > cpus:
        raise ConfigError(f"engine.workers={workers}: {where} has {cpus} CPUs for Ray, and each worker takes one")
    if gpus:
        found = there.get("GPU", 0)
        fit = int(found) * int(1 / gpus) if gpus <= 1 else int(found / gpus)
        if fit < workers:
            raise ConfigError(
                f"engine.gpus_per_client={gpus:g}: {where} has {found:g} GPUs, enough for {fit} of {workers} workers"
            )


def _knock(address: str) -> None:
    """Refuse an address where nobody listens; Ray itself would knock for ten minutes."""
    host, _, port = address.rpartition(":")
    if address == "auto":
        return
    if not host or not port.isdecimal() or "://" in address:
        raise ConfigError(
            f"engine.address: expected HOST:PORT of a Ray head that this machine has joined, or auto, got '{address}'"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        raise ConfigError(f"engine.name=ray: {_unreachable(address)} ({error})") from None


def _unreachable(address: str | None) -> str:
    if address is None:
        return "Ray did not start"
    return f"no cluster at '{address}' that this machine has joined; join it: ray start --address=HEAD:6379"


def last_line(error: BaseException) -> str:
    """What Ray says after all its explanations."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Environment variables for the body's time."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
