"""The ray engine: long-lived Ray actors behind the local Grid, on this machine or on a cluster.

Homes, order, retries and checkpoints stay with the main process, so the answers are those of the other engines; the
actors only compute. Tensors travel through Ray's object store: what several messages of one call hold goes in once,
and replies are read where they lie. Whoever receives a tensor must not write into it, as in the loop engine.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from flwr.app import Message

from clients.engines.dispatch import Died, Dispatch, Job, Unfit, Worker
from clients.engines.loop import imported
from clients.engines.parcel import Desk, Lay, pack_job, settle
from clients.engines.ray_session import Session, check, import_ray, last_line
from fedkd.errors import ConfigError
from fedkd.grid import failure

Arrays: TypeAlias = dict[int, np.ndarray]
"""Slot -> bytes of an array; Ray keeps them apart from what it pickles, and the receiver reads them in place."""

_PATIENCE = 120.0  # seconds an actor may take to start


@dataclass(eq=False, kw_only=True)
class _Remote(Worker):
    actor: Any
    loading: Any  # what its start will give; None once it is up
    pid: int = 0


class Ray(Dispatch[_Remote]):
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
        super().__init__(timeout, workers)
        if gpus_per_client < 0 or (gpus_per_client > 1 and gpus_per_client != int(gpus_per_client)):
            raise ConfigError(f"engine.gpus_per_client: expected 0 to 1 or a whole number, got {gpus_per_client:g}")
        self.app = app
        self._letters: dict[Job, tuple[bytes, Arrays]] = {}
        self._sent: dict[Job, Any] = {}
        self._broadcast: list[Any] = []
        self._ray = import_ray()
        self._session = Session(self._ray, workers, app, address)
        try:
            check(self._ray, workers, gpus_per_client, address)
            options = {"num_cpus": 1, "num_gpus": gpus_per_client, "max_restarts": 0, "max_task_retries": 0}
            self._actor = self._ray.remote(**options)(_Actor)
            self._workers = [self._hire() for _ in range(workers)]
            for worker in self._workers:
                self._await(worker)
        except Unfit as unfit:
            self.close()
            raise ConfigError(f"engine.name=ray: {unfit}") from None
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

    def _begin(self, jobs: list[Job]) -> Iterable[Job]:
        """Lay all messages out, since what several of them hold goes into the object store once."""
        cargo = Cargo()
        letters = {job: cargo.load(partial(pack_job, job.message, job.context, job.context.run_config)) for job in jobs}
        shared = cargo.shared()
        self._broadcast = [self._ray.put(shared)] if shared else []
        self._letters = {
            job: (letter, {slot: values for slot, values in own.items() if slot not in shared})
            for job, (letter, own) in letters.items()
        }
        self._sent = {}
        return jobs

    def _give(self, worker: _Remote, job: Job) -> None:
        self._sent[job] = worker.actor.answer.remote(*self._letters[job], self._broadcast)

    def _loading(self, worker: _Remote) -> bool:
        return worker.loading is not None

    def _limit(self, worker: _Remote) -> float | None:
        return _PATIENCE if self._loading(worker) else self.timeout

    def _wait(self, workers: Sequence[_Remote], seconds: float | None) -> Iterable[_Remote]:
        expected = {worker.loading or self._sent[worker.jobs[0]]: worker for worker in workers}
        return [expected[ref] for ref in self._ray.wait(list(expected), num_returns=1, timeout=seconds)[0]]

    def _receive(self, worker: _Remote) -> Message | None:
        if self._loading(worker):
            self._await(worker)
            return None
        job = worker.jobs[0]
        try:
            letter, arrays = self._ray.get(self._sent[job])
        except self._ray.exceptions.RayTaskError as error:
            return failure(job.message, f"{type(error.cause).__name__}: {error.cause}")
        except self._ray.exceptions.RayError as error:
            raise Died(type(error).__name__) from None
        del self._sent[job], self._letters[job]
        return settle(job.message, job.context, letter, arrays.__getitem__)

    def _hire(self) -> _Remote:
        if not self._ray.is_initialized():  # Ray would start, or join, another one by itself
            raise RuntimeError("the ray engine was closed")
        actor = self._actor.remote()
        return _Remote(actor=actor, loading=actor.load.remote(self.app, list(sys.path)))

    def _await(self, worker: _Remote) -> None:
        """Wait until an actor is up."""
        try:
            worker.pid = self._ray.get(worker.loading, timeout=_PATIENCE)
        except self._ray.exceptions.RayTaskError as error:
            raise Unfit(f"a worker cannot import '{self.app}' ({type(error.cause).__name__}: {error.cause})") from None
        except self._ray.exceptions.RayError as error:
            raise Unfit(f"a worker did not start ({last_line(error)})") from None
        worker.loading = None

    def _dismiss(self, worker: _Remote) -> None:
        if self._ray.is_initialized():  # else `kill` would start, or join, another Ray
            with suppress(self._ray.exceptions.RayError):
                self._ray.kill(worker.actor, no_restart=True)


class _Actor:
    """A worker's side."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._desk: Desk | None = None
        self._told: tuple[list[Any], Arrays] = ([], {})

    def load(self, app: str, paths: list[str]) -> int:
        """Import the app; return this process's id."""
        sys.path += [path for path in paths if path not in sys.path and Path(path).exists()]
        self._desk = Desk(imported(app))
        return os.getpid()

    def answer(self, letter: bytes, own: Arrays, broadcast: list[Any]) -> tuple[bytes, Arrays]:
        """Answer one message."""
        if broadcast and self._told[0] != broadcast:
            import ray

            self._told = broadcast, ray.get(broadcast[0])
        look = (own | self._told[1] if broadcast else own).__getitem__
        return Cargo().load(lambda lay: cast(Desk, self._desk).answer(letter, look, lay))


class Cargo:
    """The arrays of one call, each laid down once however many letters need it."""

    def __init__(self) -> None:
        self._slots: dict[object, int] = {}
        self._values: list[np.ndarray] = []
        self._owners: list[object] = []  # holding them keeps what identifies them their own
        self._uses: dict[int, int] = {}

    def load(self, write: Callable[[Lay], bytes]) -> tuple[bytes, Arrays]:
        """A letter, and the arrays that were laid down while it was written."""
        slots: set[int] = set()

        def lay(key: object, owner: object, data: np.ndarray) -> int:
            slot = self._slots.setdefault(key, len(self._values))
            if slot == len(self._values):
                self._values.append(data)
                self._owners.append(owner)
            slots.add(slot)
            return slot

        letter = write(lay)
        for slot in slots:
            self._uses[slot] = self._uses.get(slot, 0) + 1
        return letter, {slot: self._values[slot] for slot in sorted(slots)}

    def shared(self) -> Arrays:
        """The arrays that more than one letter needs."""
        return {slot: self._values[slot] for slot, uses in self._uses.items() if uses > 1}
