"""The pool engine: long-lived worker processes, one torch thread each.

Messages and states reach a worker through one block of shared memory (a broadcast is laid down once, not once a
client) and come back through a block of the worker's own. Workers are given the clients that took longest last time
first. A worker that dies is replaced and its client tried once more; one that passes the time limit is killed, and its
client counts as failed. Replies are handed out in the order of the jobs, so the number of workers changes nothing.
"""

from __future__ import annotations

import itertools
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

from flwr.app import Context, Error, Message

from clients.engines import ONE_THREAD
from clients.engines.loop import Loop, imported
from clients.engines.parcel import Arena, Window, pack, unpack
from fedkd import wire
from fedkd.errors import ConfigError
from fedkd.grid import failure

_QUEUE = 2  # jobs a worker holds: the next one waits at its door while it works; and so the replies not yet read
_TRIES = 2
_ARENAS = b"\xff"  # first byte of the letter that says where a worker's arenas are; else the arena that a reply uses


@dataclass
class _Job:
    index: int
    message: Message
    context: Context
    tries: int = 0


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    door: Connection
    windows: list[Window] = field(default_factory=list)
    jobs: deque[_Job] = field(default_factory=deque)
    since: float = 0.0
    told: object = None


class Pool:
    """Runs a Flower ClientApp in worker processes.

    Args:
        app: The client app as ``"module:attribute"``, imported by every worker.
        timeout: Seconds one client may take.
        workers: Number of processes.

    Raises:
        ConfigError: Fewer than one worker, or a system without the means (Unix sockets).
    """

    def __init__(self, app: str, timeout: float | None = None, workers: int = 2) -> None:
        if workers < 1:
            raise ConfigError(f"engine.workers: expected 1 or more, got {workers}")
        if not hasattr(socket, "AF_UNIX"):
            raise ConfigError("engine.name=pool needs Unix sockets, which this system lacks; use engine.name=loop")
        self.app = app
        self.timeout = timeout
        self._arena = Arena()
        self._took: dict[int, float] = {}
        self._workers = [self._hire() for _ in range(workers)]

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Dismiss the workers."""
        for worker in self._workers:
            worker.door.close()
            worker.process.kill()
        for worker in self._workers:
            worker.process.wait()
        if self._workers:
            self._arena.close()
        self._workers = []

    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.process.pid for worker in self._workers]

    def __call__(self, jobs: Iterable[tuple[Message, Context]]) -> Iterator[Message]:
        """Answer jobs, in order."""
        for worker in [w for w in self._workers if w.jobs]:  # whoever asked last did not wait for all replies
            worker.jobs.clear()
            self._replace(worker, deque())
        todo = [_Job(index, message, context) for index, (message, context) in enumerate(jobs)]
        self._arena.reset()
        waiting = deque(sorted(todo, key=lambda job: -self._took.get(job.context.node_id, 0.0)))
        replies: dict[int, Message] = {}
        for index in range(len(todo)):
            while index not in replies:
                self._hand_out(waiting)
                self._collect(waiting, replies)
            yield replies.pop(index)

    def _hand_out(self, waiting: deque[_Job]) -> None:
        for depth in range(1, _QUEUE + 1):  # everybody gets a first job before anybody gets a second
            for worker in self._workers:
                if waiting and len(worker.jobs) < depth:
                    self._give(worker, waiting.popleft())

    def _give(self, worker: _Worker, job: _Job) -> None:
        """Hand one job to a worker; what it was told before (the run's configuration) is not repeated."""
        context = job.context
        config = None if worker.told is context.run_config or worker.told == context.run_config else context.run_config
        told = (context.run_id, context.node_id, context.node_config, config)
        letter = pack((job.message, told, context.state), self._arena)
        if not worker.jobs:
            worker.since = time.monotonic()
        worker.jobs.append(job)
        worker.told = context.run_config
        with suppress(OSError):  # it is dead; `_collect` finds out
            worker.door.send_bytes(letter)

    def _collect(self, waiting: deque[_Job], replies: dict[int, Message]) -> None:
        """Wait for something to happen, then see to it."""
        doors = {worker.door: worker for worker in self._workers if worker.jobs}
        ready = wait(list(doors), self._patience(doors.values()))
        for door in ready:
            worker = doors[cast(Connection, door)]
            try:
                letter = worker.door.recv_bytes()
            except (EOFError, OSError):
                self._bury(worker, waiting, replies)
                continue
            self._receive(worker, letter, replies)
        if self.timeout is not None:
            for worker in _started(doors.values()):
                if worker.jobs and time.monotonic() - worker.since > self.timeout and not worker.door.poll():
                    job = worker.jobs.popleft()
                    replies[job.index] = failure(job.message, f"TimeoutError: no answer within {self.timeout:g} s")
                    self._replace(worker, waiting)

    def _patience(self, workers: Iterable[_Worker]) -> float | None:
        if self.timeout is None:
            return None
        first = min((worker.since for worker in _started(workers)), default=time.monotonic())
        return max(0.0, first + self.timeout - time.monotonic()) + 0.01

    def _receive(self, worker: _Worker, letter: bytes, replies: dict[int, Message]) -> None:
        kind, header = letter[:1], letter[1:]
        if kind == _ARENAS:
            worker.windows = [Window(path) for path in header.decode().split("\n")]
            worker.since = time.monotonic()
            return
        job = worker.jobs.popleft()
        now = time.monotonic()
        self._took[job.context.node_id] = now - worker.since
        worker.since = now
        content, error, state = unpack(header, worker.windows[kind[0]], keep=True)
        if state is not None:
            job.context.state = state
        if error is not None:
            replies[job.index] = Message(Error(*error), reply_to=job.message)
        else:
            replies[job.index] = Message(content, reply_to=job.message)

    def _bury(self, worker: _Worker, waiting: deque[_Job], replies: dict[int, Message]) -> None:
        """A worker died: its first job is to blame and is tried once more, those behind it are handed out again."""
        job = worker.jobs.popleft()
        job.tries += 1
        if job.tries < _TRIES:
            waiting.appendleft(job)
        else:
            with suppress(subprocess.TimeoutExpired):  # its door closes a moment before it is gone
                worker.process.wait(1)
            code = worker.process.poll()
            how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
            replies[job.index] = failure(job.message, f"the worker died twice at this client ({how})")
        self._replace(worker, waiting)

    def _replace(self, worker: _Worker, waiting: deque[_Job]) -> None:
        waiting.extendleft(reversed(worker.jobs))
        worker.door.close()
        worker.process.kill()
        worker.process.wait()
        self._workers[self._workers.index(worker)] = self._hire()

    def _hire(self) -> _Worker:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-c", "from clients.engines.pool import serve; serve()", str(theirs.fileno())]
        paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
        process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], env={**os.environ, **ONE_THREAD, "PYTHONPATH": paths}
        )
        theirs.close()
        door = Connection(ours.detach())
        with suppress(OSError):  # it is dead; found out when it is given a job
            door.send_bytes(pickle.dumps((self.app, self._arena.path)))
        return _Worker(process, door)


def _started(workers: Iterable[_Worker]) -> list[_Worker]:
    """Workers that have imported the app; until then no client's clock runs."""
    return [worker for worker in workers if worker.windows]


def serve() -> None:
    """A worker's life: answer jobs until the door closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which then closes the door
    import torch

    torch.set_num_threads(1)
    door = Connection(int(sys.argv[1]))
    app, path = pickle.loads(door.recv_bytes())  # from our own parent
    loop = Loop(imported(app))
    window, arenas = Window(path), [Arena() for _ in range(_QUEUE)]
    run_config: dict[str, Any] = {}
    try:
        door.send_bytes(_ARENAS + "\n".join(arena.path for arena in arenas).encode())
        for turn in itertools.cycle(range(_QUEUE)):
            # An arena's last reply has been read: the job at hand was given out only after that.
            arena = arenas[turn]
            message, (run_id, node_id, node_config, config), state = unpack(door.recv_bytes(), window, keep=False)
            run_config = run_config if config is None else config
            context = Context(run_id, node_id, node_config, state, dict(run_config))
            before = wire.snapshot(state)
            reply = next(loop([(message, context)]))
            arena.reset()
            after = context.state if wire.snapshot(context.state) != before else None
            error = (reply.error.code, reply.error.reason) if reply.has_error() else None
            content = None if error else reply.content
            door.send_bytes(bytes([turn]) + pack((content, error, after), arena))
    except (EOFError, OSError):
        return
