"""What engines with worker processes share: who gets which job, and what happens when a worker dies or is late.

A worker holds two jobs at most, so that the next one waits at its door while it works. One that dies is replaced and
its first client, which is to blame, tried once more; one that passes the time limit is dismissed, and its client counts
as failed. Those behind are handed out again. Replies are handed out in the order of the jobs, so the number of workers
changes nothing.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from flwr.app import Context, Message

from fedkd.errors import ConfigError
from fedkd.grid import failure

_QUEUE = 2
_TRIES = 2


@dataclass(eq=False)
class Job:
    """A message to a client; ``index`` is its place among the replies."""

    index: int
    message: Message
    context: Context
    tries: int = 0


@dataclass(eq=False)
class Worker:
    """A process that answers jobs; ``since`` is when it began what it does now."""

    jobs: deque[Job] = field(default_factory=deque)
    since: float = field(default_factory=time.monotonic)


class Died(Exception):
    """A worker is gone; says how."""


class Unfit(Exception):
    """A worker did not come up, and another would not either; says why."""


W = TypeVar("W", bound=Worker)


class Dispatch(ABC, Generic[W]):
    """An engine over workers; a kind of worker fills in the rest.

    Args:
        timeout: Seconds one client may take.
        workers: How many there shall be.

    Raises:
        ConfigError: Fewer than one worker.
    """

    def __init__(self, timeout: float | None, workers: int) -> None:
        if workers < 1:
            raise ConfigError(f"engine.workers: expected 1 or more, got {workers}")
        self.timeout = timeout
        self._wanted = workers
        self._workers: list[W] = []
        self._lost = ""

    @abstractmethod
    def _hire(self) -> W:
        """Start a worker."""

    @abstractmethod
    def _dismiss(self, worker: W) -> None:
        """Stop a worker, whatever it is doing."""

    @abstractmethod
    def _begin(self, jobs: list[Job]) -> Iterable[Job]:
        """Prepare a call; returns the jobs in the order they shall be started."""

    @abstractmethod
    def _give(self, worker: W, job: Job) -> None:
        """Send a job to a worker, which may be dead."""

    @abstractmethod
    def _wait(self, workers: Sequence[W], seconds: float | None) -> Iterable[W]:
        """Those from whom something has come, once there is one or time is up."""

    @abstractmethod
    def _receive(self, worker: W) -> Message | None:
        """What has come: the reply to the worker's first job, or None if it only says that it is up.

        Raises:
            Died: It is gone.
            Unfit: It cannot start.
        """

    def _loading(self, worker: W) -> bool:
        """Whether a worker is not up, and must not be given jobs yet."""
        return False

    def _limit(self, worker: W) -> float | None:
        """Seconds a worker may take for what it is doing."""
        return self.timeout

    def __call__(self, jobs: Iterable[tuple[Message, Context]]) -> Iterator[Message]:
        """Answer jobs, in order."""
        for worker in [w for w in self._workers if w.jobs]:  # whoever asked last did not wait for all replies
            worker.jobs.clear()
            self._replace(worker, deque())
        self._workers += [self._hire() for _ in range(self._wanted - len(self._workers))]
        todo = [Job(index, message, context) for index, (message, context) in enumerate(jobs)]
        waiting = deque(self._begin(todo))
        replies: dict[int, Message] = {}
        for index in range(len(todo)):
            while index not in replies:
                self._hand_out(waiting, replies)
                self._collect(waiting, replies)
            yield replies.pop(index)

    def _hand_out(self, waiting: deque[Job], replies: dict[int, Message]) -> None:
        for depth in range(1, _QUEUE + 1):  # everybody gets a first job before anybody gets a second
            for worker in self._workers:
                if waiting and len(worker.jobs) < depth and not self._loading(worker):
                    job = waiting.popleft()
                    if not worker.jobs:
                        worker.since = time.monotonic()
                    worker.jobs.append(job)
                    self._give(worker, job)
        if not self._workers:
            for job in waiting:
                replies[job.index] = failure(job.message, f"no worker is left, and none would start: {self._lost}")
            waiting.clear()

    def _collect(self, waiting: deque[Job], replies: dict[int, Message]) -> None:
        """Wait for something to happen, then see to it."""
        busy = [worker for worker in self._workers if worker.jobs or self._loading(worker)]
        now = time.monotonic()
        ends = [w.since + limit - now for w in busy if (limit := self._limit(w)) is not None]
        for worker in self._wait(busy, max(0.0, min(ends)) if ends else None) if busy else ():
            try:
                reply = self._receive(worker)
            except Died as died:
                self._bury(worker, str(died), waiting, replies)
                continue
            except Unfit as unfit:
                self._lose(worker, str(unfit))
                continue
            worker.since = time.monotonic()
            if reply is not None:
                replies[worker.jobs.popleft().index] = reply
        if ends:
            for worker in [w for w in busy if w in self._workers and (w.jobs or self._loading(w))]:
                limit = self._limit(worker)
                if limit is not None and time.monotonic() - worker.since > limit and not self._wait([worker], 0):
                    self._expire(worker, limit, waiting, replies)

    def _bury(self, worker: W, how: str, waiting: deque[Job], replies: dict[int, Message]) -> None:
        job = worker.jobs.popleft()
        job.tries += 1
        self._replace(worker, waiting)
        if job.tries < _TRIES:
            waiting.appendleft(job)
        else:
            replies[job.index] = failure(job.message, f"the worker died twice at this client ({how})")

    def _expire(self, worker: W, limit: float, waiting: deque[Job], replies: dict[int, Message]) -> None:
        if self._loading(worker):
            self._lose(worker, f"no answer within {limit:g} s")
            return
        job = worker.jobs.popleft()
        replies[job.index] = failure(job.message, f"TimeoutError: no answer within {limit:g} s")
        self._replace(worker, waiting)

    def _replace(self, worker: W, waiting: deque[Job]) -> None:
        waiting.extendleft(reversed(worker.jobs))
        self._dismiss(worker)
        self._workers[self._workers.index(worker)] = self._hire()

    def _lose(self, worker: W, reason: str) -> None:
        """A worker did not start: its place stays empty until the next call."""
        self._lost = reason
        self._dismiss(worker)
        self._workers.remove(worker)
