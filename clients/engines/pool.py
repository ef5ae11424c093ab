"""The pool engine: long-lived worker processes, one torch thread each.

Tensors of messages and states reach a worker through one block of shared memory, a broadcast laid down once a batch,
and come back through a block of the worker's own, where the main process reads them in place: with the next job it says
which it has let go of. Workers are given the clients that took longest last time first.
"""

from __future__ import annotations

import pickle
import signal
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait

import numpy as np
from flwr.app import Context, Message

from clients.engines.arena import Arena, Place, Window
from clients.engines.dispatch import Died, Dispatch, Job, Worker
from clients.engines.loop import imported
from clients.engines.nursery import Nursery
from clients.engines.parcel import Desk, Look, failed, pack_job, settle
from fedkd.errors import ConfigError

_LONG = 1 << 15  # bytes that surely fit into a socket


@dataclass(eq=False, kw_only=True)
class _Process(Worker):
    nursery: Nursery
    number: int
    door: Connection
    window: Window | None = None
    freed: list[int] = field(default_factory=list)
    told: object = None


class Pool(Dispatch[_Process]):
    """Runs a Flower ClientApp in worker processes.

    Args:
        app: The client app as ``"module:attribute"``, imported by every worker.
        timeout: Seconds one client may take.
        workers: Number of processes.

    Raises:
        ConfigError: Fewer than one worker, or a system without the means (Unix sockets).
    """

    def __init__(self, app: str, timeout: float | None = None, workers: int = 2) -> None:
        super().__init__(timeout, workers)
        if not hasattr(socket, "AF_UNIX"):
            raise ConfigError("engine.name=pool needs Unix sockets, which this system lacks; use engine.name=loop")
        self.app = app
        self._arena = Arena()
        self._took: dict[int, float] = {}
        self._nursery = Nursery.ready()
        self._workers = [self._hire() for _ in range(workers)]

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Dismiss the workers; tensors of earlier replies stay valid."""
        for worker in self._workers:
            worker.door.close()
            if worker.nursery is not self._nursery:
                worker.nursery.end(worker.number)
        if self._workers:
            self._nursery.close()
            self._arena.close()
        self._workers = []
        self._wanted = 0

    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [pid for worker in self._workers if (pid := worker.nursery.pid(worker.number)) is not None]

    def __call__(self, jobs: Iterable[tuple[Message, Context]]) -> Iterator[Message]:
        """Answer jobs, in order."""
        try:
            yield from super().__call__(jobs)
        finally:
            self._arena.forget()  # else what was sent would live on until the next call

    def _begin(self, jobs: list[Job]) -> Iterable[Job]:
        self._arena.clear()
        return sorted(jobs, key=lambda job: -self._took.get(job.context.node_id, 0.0))

    def _give(self, worker: _Process, job: Job) -> None:
        config = job.context.run_config
        known = worker.told is config or worker.told == config  # what it was told before is not repeated
        letter = pack_job(job.message, job.context, None if known else dict(config), self._arena.lay)
        worker.told = config
        freed = [worker.freed.pop() for _ in range(len(worker.freed))]  # others may be added meanwhile
        with suppress(OSError):  # it is dead; `_receive` finds out
            worker.door.send_bytes(pickle.dumps((freed, _folded(letter, self._arena)), 5))

    def _limit(self, worker: _Process) -> float | None:
        return self.timeout if worker.window is not None else None  # no client's clock runs while the app is imported

    def _wait(self, workers: Sequence[_Process], seconds: float | None) -> Iterable[_Process]:
        ready = wait([worker.door for worker in workers], seconds)
        return [worker for worker in workers if worker.door in ready]

    def _receive(self, worker: _Process) -> Message | None:
        try:
            letter = worker.door.recv_bytes()
        except (EOFError, OSError):
            raise Died(_how(worker.nursery.end(worker.number, patience=1.0))) from None
        if worker.window is None:
            worker.window = Window(letter.decode())
            return None
        job = worker.jobs[0]
        self._took[job.context.node_id] = time.monotonic() - worker.since
        look = worker.window.lease(worker.freed.append)
        return settle(job.message, job.context, _unfolded(pickle.loads(letter), look), look)

    def _hire(self) -> _Process:
        try:
            number, door = self._nursery.hire()
        except OSError:  # it died; its workers live on
            self._nursery.close()
            self._nursery = Nursery()
            number, door = self._nursery.hire()
        with suppress(OSError):  # it is dead; found out when it is given a job
            door.send_bytes(pickle.dumps((self.app, self._arena.path)))
        return _Process(nursery=self._nursery, number=number, door=door)

    def _dismiss(self, worker: _Process) -> None:
        worker.door.close()
        worker.nursery.end(worker.number)


def _how(code: int | None) -> str:
    if code is None:
        return "nobody knows how"
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def serve(door: Connection) -> None:
    """A worker's life: answer jobs until the door closes."""
    app, path = pickle.loads(door.recv_bytes())  # from our own parent
    desk, window, arena = Desk(imported(app)), Window(path), Arena()
    with suppress(EOFError, OSError):
        door.send_bytes(arena.path.encode())
        while True:
            freed, letter = pickle.loads(door.recv_bytes())
            arena.free(freed)
            try:
                reply = _folded(desk.answer(_unfolded(letter, window.look), window.look, arena.lay), arena)
            except Exception as error:
                arena.undo()
                reply = failed(error)
            arena.forget()
            door.send_bytes(pickle.dumps(reply, 5))


def _folded(letter: bytes, arena: Arena) -> bytes | Place:
    """A letter as it goes through a door: two that both send what the other has no room for would wait for ever."""
    return letter if len(letter) < _LONG else arena.lay(object(), letter, np.frombuffer(letter, np.uint8))


def _unfolded(letter: bytes | Place, look: Look) -> bytes:
    return letter if isinstance(letter, bytes) else look(letter).tobytes()
