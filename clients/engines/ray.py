"""The ray engine: long-lived Ray actors behind the local Grid, on this machine or on a cluster.

Homes, order, retries and checkpoints stay with the main process, so the answers are those of the other engines; the
actors only compute. Tensors travel through Ray's object store: what several messages of one call hold goes in once,
and replies are read where they lie. Whoever receives a tensor must not write into it, as in the loop engine.
"""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias, cast

import flwr.app
import numpy as np
import torch
from flwr.app import Context, Error, Message, RecordDict
from torch import Tensor

from clients.engines import ONE_THREAD
from clients.engines.loop import Loop, imported
from fedkd import wire
from fedkd.errors import ConfigError
from fedkd.grid import failure

Arrays: TypeAlias = dict[int, np.ndarray]
"""Slot -> bytes of an array; Ray keeps them apart from what it pickles, and the receiver reads them in place."""

_QUEUE = 2  # jobs an actor holds: the next one waits at its door while it works
_TRIES = 2
_PATIENCE = 120.0  # seconds an actor may take to start
_ALIGN = 64  # bytes; torch aligns so, and with other alignments its kernels may round differently
_SHIPPED = ("fedkd", "privacy", "clients", "strategies")
_SWITCHES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else Ray warns of a change to come
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # else under uv Ray builds an environment for the actors
}


@dataclass
class _Job:
    index: int
    message: Message
    context: Context
    header: bytes
    own: Arrays
    tries: int = 0


@dataclass(eq=False)
class _Worker:
    actor: Any
    loading: Any  # what its start will give; None once it is up
    since: float
    pid: int = 0
    jobs: deque[tuple[_Job, Any]] = field(default_factory=deque)

    @property
    def next(self) -> Any:
        """What it will give next."""
        return self.loading or self.jobs[0][1]


class Ray:
    """Runs a Flower ClientApp in Ray actors of one CPU and one thread each.

    Starts Ray at once, so that bad input is found before a run begins; `close` stops it.

    Args:
        app: The client app as ``"module:attribute"``, imported by every actor.
        timeout: Seconds one client may take.
        workers: Number of actors.
        gpus_per_client: GPUs an actor has for itself; 0.5 lets two share one.
        address: Of a Ray cluster this machine has joined, or ``"auto"``; by default Ray runs here, for this run only.

    Raises:
        ConfigError: Ray is not installed, the cluster is out of reach, has too few CPUs or GPUs, or cannot import
            the app.
    """

    def __init__(
        self,
        app: str = "clients.app:app",
        timeout: float | None = None,
        workers: int = 1,
        gpus_per_client: float = 0.0,
        address: str | None = None,
    ) -> None:
        if workers < 1:
            raise ConfigError(f"engine.workers: expected 1 or more, got {workers}")
        if gpus_per_client < 0 or (gpus_per_client > 1 and gpus_per_client != int(gpus_per_client)):
            raise ConfigError(f"engine.gpus_per_client: expected 0 to 1 or a whole number, got {gpus_per_client:g}")
        self.app = app
        self.timeout = timeout
        self._wanted = workers
        self._workers: list[_Worker] = []
        self._lost = ""
        self._ray = _import_ray()
        self._session = _Session(self._ray, workers, app, address)
        try:
            _check(self._ray, workers, gpus_per_client, address)
            options = {"num_cpus": 1, "num_gpus": gpus_per_client, "max_restarts": 0, "max_task_retries": 0}
            self._actor = self._ray.remote(**options)(_Actor)
            self._workers = [self._hire() for _ in range(workers)]
            for worker in self._workers:
                self._await(worker)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Ray:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Dismiss the actors and stop Ray; tensors of earlier replies stay valid."""
        for worker in self._workers:
            self._dismiss(worker)
        self._workers = []
        self._session.close()

    def pids(self) -> list[int]:
        """Process ids of the actors that are up, each on its own machine."""
        return [worker.pid for worker in self._workers if worker.pid]

    def __call__(self, jobs: Iterable[tuple[Message, Context]]) -> Iterator[Message]:
        """Answer jobs, in order."""
        waiting: deque[_Job] = deque()
        self._recover(waiting)
        cargo = _Cargo()
        waiting.extend(_Job(i, m, c, *cargo.pack((m, c))) for i, (m, c) in enumerate(jobs))
        shared = cargo.shared()
        for job in waiting:
            job.own = {slot: values for slot, values in job.own.items() if slot not in shared}
        broadcast = [self._ray.put(shared)] if shared else []
        replies: dict[int, Message] = {}
        for index in range(len(waiting)):
            while index not in replies:
                self._hand_out(waiting, broadcast, replies)
                self._collect(waiting, replies)
            yield replies.pop(index)

    def _recover(self, waiting: deque[_Job]) -> None:
        """Make the actors whole again after a call that was not read to its end, or that lost some for good."""
        for worker in [w for w in self._workers if w.jobs]:
            worker.jobs.clear()
            self._replace(worker, waiting)
        self._workers += [self._hire() for _ in range(self._wanted - len(self._workers))]

    def _hand_out(self, waiting: deque[_Job], broadcast: list[Any], replies: dict[int, Message]) -> None:
        for depth in range(1, _QUEUE + 1):  # everybody gets a first job before anybody gets a second
            for worker in self._workers:
                if waiting and worker.loading is None and len(worker.jobs) < depth:
                    job = waiting.popleft()
                    if not worker.jobs:
                        worker.since = time.monotonic()
                    worker.jobs.append((job, worker.actor.answer.remote(job.header, job.own, broadcast)))
        if not self._workers:
            for job in waiting:
                replies[job.index] = failure(job.message, f"no worker is left, and none would start: {self._lost}")
            waiting.clear()

    def _collect(self, waiting: deque[_Job], replies: dict[int, Message]) -> None:
        """Wait for something to happen, then see to it."""
        busy = {worker.next: worker for worker in self._workers if worker.loading is not None or worker.jobs}
        if not busy:
            return
        now = time.monotonic()
        limits = [w.since + limit - now for w in busy.values() if (limit := self._limit(w)) is not None]
        patience = max(0.0, min(limits)) if limits else None
        done, _ = self._ray.wait(list(busy), num_returns=1, timeout=patience)
        for ref in done:
            self._receive(busy[ref], waiting, replies)
        for worker in [w for w in self._workers if w.loading is not None or w.jobs]:
            limit = self._limit(worker)
            if limit is not None and time.monotonic() - worker.since > limit and not self._is_there(worker.next):
                self._expire(worker, waiting, replies)

    def _limit(self, worker: _Worker) -> float | None:
        return self.timeout if worker.loading is None else _PATIENCE

    def _is_there(self, ref: Any) -> bool:
        return bool(self._ray.wait([ref], timeout=0)[0])

    def _receive(self, worker: _Worker, waiting: deque[_Job], replies: dict[int, Message]) -> None:
        if worker.loading is not None:
            try:
                self._await(worker)
            except ConfigError as error:
                self._lose(worker, str(error))
            return
        job, ref = worker.jobs[0]
        try:
            answer = self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:
            reply = failure(job.message, f"{type(error.cause).__name__}: {error.cause}")
        except self._ray.exceptions.RayError as error:
            self._bury(worker, type(error).__name__, waiting, replies)
            return
        else:
            reply = _settle(job, *answer)
        worker.jobs.popleft()
        worker.since = time.monotonic()
        replies[job.index] = reply

    def _bury(self, worker: _Worker, how: str, waiting: deque[_Job], replies: dict[int, Message]) -> None:
        """An actor died: its first job is to blame and is tried once more, those behind it are handed out again."""
        job, _ = worker.jobs.popleft()
        job.tries += 1
        self._replace(worker, waiting)
        if job.tries < _TRIES:
            waiting.appendleft(job)
        else:
            replies[job.index] = failure(job.message, f"the worker died twice at this client ({how})")

    def _expire(self, worker: _Worker, waiting: deque[_Job], replies: dict[int, Message]) -> None:
        """Time is up: for a start, the place stays empty until the next call; for a client, it counts as failed."""
        if worker.loading is not None:
            self._lose(worker, f"no answer within {_PATIENCE:g} s")
            return
        job, _ = worker.jobs.popleft()
        replies[job.index] = failure(job.message, f"TimeoutError: no answer within {self.timeout:g} s")
        self._replace(worker, waiting)

    def _replace(self, worker: _Worker, waiting: deque[_Job]) -> None:
        waiting.extendleft(job for job, _ in reversed(worker.jobs))
        self._dismiss(worker)
        self._workers[self._workers.index(worker)] = self._hire()

    def _lose(self, worker: _Worker, reason: str) -> None:
        self._lost = reason
        self._dismiss(worker)
        self._workers.remove(worker)

    def _hire(self) -> _Worker:
        if not self._ray.is_initialized():  # Ray would start, or join, another one by itself
            raise RuntimeError("the ray engine was closed")
        actor = self._actor.remote()
        return _Worker(actor, actor.load.remote(self.app, list(sys.path)), time.monotonic())

    def _await(self, worker: _Worker) -> None:
        """Wait until an actor is up.

        Raises:
            ConfigError: It does not come up, or cannot import the app.
        """
        try:
            worker.pid = self._ray.get(worker.loading, timeout=_PATIENCE)
        except self._ray.exceptions.RayTaskError as error:
            raise ConfigError(
                f"engine.name=ray: a worker cannot import '{self.app}' ({type(error.cause).__name__}: {error.cause})"
            ) from None
        except self._ray.exceptions.RayError as error:
            raise ConfigError(f"engine.name=ray: a worker did not start ({_last_line(error)})") from None
        worker.loading = None

    def _dismiss(self, worker: _Worker) -> None:
        if self._ray.is_initialized():  # else `kill` would start, or join, another Ray
            with suppress(self._ray.exceptions.RayError):
                self._ray.kill(worker.actor, no_restart=True)


class _Session:
    """Ray itself: started or joined, and left as it was found."""

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
            raise ConfigError(f"engine.name=ray: {_unreachable(address)} ({_last_line(error)})") from None
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


class _Actor:
    """A worker's side."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._loop: Loop | None = None
        self._told: tuple[list[Any], Arrays] = ([], {})

    def load(self, app: str, paths: list[str]) -> int:
        """Import the app; return this process's id."""
        sys.path += [path for path in paths if path not in sys.path and Path(path).exists()]
        self._loop = Loop(imported(app))
        return os.getpid()

    def answer(self, header: bytes, own: Arrays, broadcast: list[Any]) -> tuple[bytes, Arrays]:
        """Answer one message: the reply's content or error, and the client's state if it changed."""
        if broadcast and self._told[0] != broadcast:
            import ray

            self._told = broadcast, ray.get(broadcast[0])
        message, context = _unpack(header, own | self._told[1] if broadcast else own)
        before = wire.snapshot(context.state)
        reply = next(cast(Loop, self._loop)([(message, context)]))
        after = context.state if wire.snapshot(context.state) != before else None
        error = (reply.error.code, reply.error.reason) if reply.has_error() else None
        return _Cargo().pack((None if error else reply.content, error, after))


class _Cargo:
    """The arrays of one call, each laid down once however many messages hold it."""

    def __init__(self) -> None:
        self._slots: dict[object, int] = {}
        self._values: list[np.ndarray] = []
        self._owners: list[object] = []  # holding them keeps their addresses their own
        self._uses: dict[int, int] = {}

    def pack(self, value: Any) -> tuple[bytes, Arrays]:
        """A header, and the arrays that it needs."""
        buffer = BytesIO()
        packer = _Packer(buffer, self)
        packer.dump(value)
        for slot in packer.slots:
            self._uses[slot] = self._uses.get(slot, 0) + 1
        return buffer.getvalue(), {slot: self._values[slot] for slot in sorted(packer.slots)}

    def shared(self) -> Arrays:
        """The arrays that more than one header needs."""
        return {slot: self._values[slot] for slot, uses in self._uses.items() if uses > 1}

    def tensor(self, tensor: Tensor) -> int:
        """Slot of a tensor."""
        key = tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        if key not in self._slots:
            self._add(key, tensor, tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return self._slots[key]

    def data(self, data: bytes) -> int:
        """Slot of a byte string."""
        if id(data) not in self._slots:
            self._add(id(data), data, np.frombuffer(data, np.uint8))
        return self._slots[id(data)]

    def _add(self, key: object, owner: object, values: np.ndarray) -> None:
        self._slots[key] = len(self._values)
        self._owners.append(owner)
        self._values.append(values)


class _Packer(pickle.Pickler):
    def __init__(self, file: BytesIO, cargo: _Cargo) -> None:
        super().__init__(file, protocol=5)
        self.cargo = cargo
        self.slots: set[int] = set()

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, wire.Array):
            tensor = obj.tensor
            slot = self.cargo.tensor(tensor)
            self.slots.add(slot)
            return slot, tensor.dtype, obj.shape, tensor.device.type
        if isinstance(obj, flwr.app.Array):
            slot = self.cargo.data(obj.data)
            self.slots.add(slot)
            return slot, obj.dtype, obj.shape, obj.stype
        return None


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: BytesIO, arrays: Arrays) -> None:
        super().__init__(file)
        self.arrays = arrays

    def persistent_load(self, pid: Any) -> Any:
        slot, dtype, shape, how = pid
        values = self.arrays[slot]
        if not isinstance(dtype, torch.dtype):
            return flwr.app.Array(dtype, shape, how, values.tobytes())
        if not values.size:
            tensor = torch.empty(shape, dtype=dtype)
        else:
            flat = torch.from_numpy(values)
            tensor = (flat.clone() if flat.data_ptr() % _ALIGN else flat).view(dtype).view(shape)
        return wire.Array(tensor.to(how) if how == "cpu" or torch.cuda.is_available() else tensor)


def _unpack(header: bytes, arrays: Arrays) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*not writable", UserWarning)  # nobody writes, see above
        return _Unpacker(BytesIO(header), arrays).load()


def _settle(job: _Job, header: bytes, arrays: Arrays) -> Message:
    """Take the client's new state home, and return its reply."""
    content, error, state = _unpack(header, arrays)
    if state is not None:
        job.context.state = _copied(state)
    return Message(Error(*error), reply_to=job.message) if error else Message(content, reply_to=job.message)


def _copied(state: RecordDict) -> RecordDict:
    """A state that lives in this process: homes outlast their round, and would fill the object store."""
    for record in state.array_records.values():
        for name, array in record.items():
            if isinstance(array, wire.Array):
                record[name] = wire.Array(array.tensor.clone())
    return state


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


def _import_ray() -> ModuleType:
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


def _check(ray: ModuleType, workers: int, gpus: float, address: str | None) -> None:
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


def _last_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
