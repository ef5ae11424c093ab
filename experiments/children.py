"""Runs in child processes: each one ``fedkd run --quiet`` or such, in a folder of its own; half done, it is resumed.

A child holds one end of a pipe to its parent. When the parent ends, however it ends, the pipe closes and the child ends
too: no run outlives the command that started it, and none is ever written to by two processes.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import fedkd
from experiments import files
from fedkd.config import Config

GRACE = 10.0  # seconds that a child has to end by itself
INTERRUPTED = 130


@dataclass(frozen=True)
class Job:
    """One run to make.

    Attributes:
        place: Its directory, absolute. A half-made run in it is resumed if it has a checkpoint, else made anew.
    """

    label: str
    config: Config
    place: Path

    def finished(self) -> bool:
        """Whether the directory holds the results of this very configuration."""
        try:
            summary = json.loads((self.place / files.SUMMARY).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(summary, dict) and summary.get("config_hash") == self.config.hash

    def command(self, source: Path) -> list[str]:
        """What makes it, in words of the command line; with ``--resume`` it goes on."""
        return ["run", str(source), "--out", str(self.place), "--quiet"]


class Children:
    """Runs jobs, as many at a time as `start` was called; finished ones are not run again.

    Attributes:
        failures: Why a job has no result, by label.
        over: Labels of the jobs that are over, in that order.
    """

    def __init__(self, jobs: Iterable[Job]) -> None:
        self.failures: dict[str, str] = {}
        self.over: list[str] = []
        self._waiting = deque(jobs)
        self._running: dict[str, tuple[Job, subprocess.Popen[str]]] = {}
        self._lock = threading.Lock()  # guards the two above and the flag
        self._stopped = False
        self._threads: list[threading.Thread] = []

    @property
    def done(self) -> int:
        """How many jobs are over."""
        return len(self.over)

    @property
    def running(self) -> list[Job]:
        """The jobs that have a process now."""
        with self._lock:
            return [job for job, _ in self._running.values()]

    def start(self) -> None:
        """Begin with the next job, beside whatever is running, and go on until none is left."""
        thread = threading.Thread(target=self._work, daemon=True)
        self._threads.append(thread)
        thread.start()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the jobs, no longer than so many seconds; return whether all are over."""
        end = None if seconds is None else time.monotonic() + seconds
        for thread in self._threads:
            thread.join(None if end is None else max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def stop(self) -> None:
        """End the children, first politely; what was running can be resumed."""
        with self._lock:
            self._stopped = True
            children = [child for _, child in self._running.values()]
        for child in children:
            child.terminate()
        if not self.wait(GRACE):
            for child in children:
                child.kill()
            self.wait(GRACE)

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                self._run(job)
            except OSError as error:
                self.failures[job.label] = str(error)
            self.over.append(job.label)

    def _next(self) -> Job | None:
        with self._lock:
            return self._waiting.popleft() if self._waiting and not self._stopped else None

    def _run(self, job: Job) -> None:
        if job.finished():
            return
        resume = any(job.place.glob(f"{files.CHECKPOINT}/round-*"))
        if not resume:
            shutil.rmtree(job.place, ignore_errors=True)
        job.place.parent.mkdir(parents=True, exist_ok=True)
        source = job.place.with_name(f".{job.place.name}.toml")
        files.write(source, job.config.to_toml())
        child = self._spawn(job, job.command(source) + ["--resume"] * resume)
        if child is None:
            return
        with child:
            said = child.stderr.read() if child.stderr is not None else ""
            code = child.wait()
        with self._lock:
            del self._running[job.label]
        if code and not self._stopped:
            lines = said.strip().splitlines()
            self.failures[job.label] = lines[-1] if lines else _ending(code)
        source.unlink(missing_ok=True)

    def _spawn(self, job: Job, command: list[str]) -> subprocess.Popen[str] | None:
        """Start a process; None when no more are wanted."""
        root = str(Path(fedkd.__file__).parent.parent)
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        with self._lock:
            if self._stopped:
                return None
            child = subprocess.Popen(
                [sys.executable, "-m", "experiments.children", *command],
                stdin=subprocess.PIPE,  # never written to: its end is the parent's end
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C is the parent's to pass on
            )
            self._running[job.label] = (job, child)
        return child


def _ending(code: int) -> str:
    """What an exit code says where the process said nothing."""
    return f"ended by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"exit code {code}"


def _attached() -> None:
    """Be ``fedkd``, for as long as the parent lives; SIGTERM is an interruption like Ctrl-C."""

    def watch() -> None:
        os.read(0, 1)  # blocks until the parent's end of the pipe is closed
        os._exit(INTERRUPTED)  # as safe as kill -9, which every run survives

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    threading.Thread(target=watch, daemon=True).start()
    from experiments.cli import main

    main()


if __name__ == "__main__":
    _attached()
