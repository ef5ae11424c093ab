"""Contenders in processes of their own: a child gets ready, then does the work once for each line it is sent."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import IO, Any, Self

from clients.engines import ONE_THREAD
from experiments.bench.spec import Unavailable

MARK = "FEDKD_BENCH_CHILD"
_READY, _GO = "ready", "go"
_GRACE = 30.0  # seconds that a child may take to end

Answer = dict[str, Any]


class Process:
    """A process of this Python; all that it starts is ended with it, as far as the system has /proc."""

    def __init__(self, arguments: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self.mark = f"{os.getpid()}-{uuid.uuid4().hex}"
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (`close` closes it)
        paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env={**os.environ, **ONE_THREAD, "PYTHONPATH": paths, **(env or {}), MARK: self.mark},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def last_words(self) -> str:
        """The last line of its standard error."""
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def close(self) -> None:
        """Let it end; then end what is left of it."""
        with contextlib.suppress(OSError):
            if self.process.stdin is not None:
                self.process.stdin.close()
        try:
            self.process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for pid in _marked(self.mark):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        for folder in (Path(tempfile.gettempdir()) / "ray").glob(f"session_*_{self.process.pid}"):
            shutil.rmtree(folder, ignore_errors=True)  # Ray leaves its logs
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.errors.close()


class Child(Process):
    """A process that does ``target``, a function given as ``"module:function"``.

    The function is called with ``spec`` and with a `Turns`.
    """

    def __init__(self, target: str, spec: Mapping[str, Any], env: Mapping[str, str] | None = None) -> None:
        super().__init__(["-m", "experiments.bench.child", target, json.dumps(dict(spec))], env)

    def await_ready(self, patience: float = 180.0) -> None:
        """Wait until it is ready.

        Raises:
            Unavailable: It ended instead, or took too long.
        """
        if self.hear(patience) != _READY:
            raise Unavailable(f"did not get ready: {self.last_words()}")

    def go(self) -> None:
        """Tell it to do the work once."""
        stdin = self.process.stdin
        if stdin is not None:
            stdin.write(f"{_GO}\n".encode())
            stdin.flush()

    def answer(self, patience: float = 600.0) -> Answer:
        """What it says once it has done the work."""
        answer: Answer = json.loads(self.hear(patience))
        return answer

    def hear(self, patience: float) -> str:
        """The next line it says.

        Raises:
            Unavailable: It ended instead, or took too long.
        """
        stdout = self.process.stdout
        if stdout is None or not select.select([stdout], [], [], patience)[0]:
            raise Unavailable(f"no answer within {patience:g} s")
        line = stdout.readline().decode().strip()
        if not line:
            raise Unavailable(f"the process ended: {self.last_words()}")
        return line


def _marked(mark: str) -> list[int]:
    """Processes that a child has started and left: they carry its mark in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


class Turns:
    """The child's side: says what it has to say on the real standard output, which nothing else may use."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def say(self, line: str) -> None:
        """Say one line."""
        self._out.write(f"{line}\n")
        self._out.flush()

    def serve(self, act: Callable[[], Answer]) -> None:
        """Say ready, then act once for each line that comes."""
        self.say(_READY)
        for _ in iter(sys.stdin.readline, ""):
            self.say(json.dumps(act()))


def main() -> None:
    """Entry point of a child."""
    target, spec = sys.argv[1:]
    module, _, function = target.partition(":")
    turns = Turns()
    getattr(import_module(module), function)(json.loads(spec), turns)


if __name__ == "__main__":
    main()
