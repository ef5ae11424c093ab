"""The nursery: a process that has imported what every worker needs, and of which workers are copies.

So imports are paid once and not once a worker, beside the main process's own where somebody says so `ahead` of time; a
worker that died is replaced within milliseconds, and the memory of libraries is shared. The nursery imports torch,
Flower and this package, none of which starts threads or touches a GPU; a worker imports its app itself.
"""

from __future__ import annotations

import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from typing import NoReturn

from clients.engines import ONE_THREAD
from clients.engines.heap import keep_freed_memory

_BOOT = """
import gc, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which then closes the door
gc.disable()  # makes imports a tenth faster
from clients.engines.nursery import keep
keep(int(sys.argv[1]))
"""


class Nursery:
    """The main process's side: workers are known by a number, since their process ids are a while in coming."""

    _waiting: Nursery | None = None

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, **ONE_THREAD, "PYTHONPATH": paths},
        )
        theirs.close()
        self._door = Connection(ours.detach())
        self._hired = 0
        self._pids: list[int] = []

    @classmethod
    def ahead(cls) -> None:
        """Start one before it is needed; worth it before imports that take a while."""
        if cls._waiting is None and hasattr(socket, "AF_UNIX"):
            cls._waiting = cls()

    @classmethod
    def ready(cls) -> Nursery:
        """The one that was started ahead, or a new one."""
        found, cls._waiting = cls._waiting, None
        return cls() if found is None else found

    def hire(self) -> tuple[int, Connection]:
        """Order a worker; returns its number, and the way to talk to it.

        Raises:
            OSError: The nursery is dead.
        """
        ours, theirs = socket.socketpair()
        door = Connection(ours.detach())
        with theirs:
            self._door.send_bytes(
                pickle.dumps(("hire", dict(os.environ), [path or str(Path.cwd()) for path in sys.path]))
            )
            send_handle(self._door, theirs.fileno(), self._process.pid)
        self._hired += 1
        return self._hired - 1, door

    def pid(self, number: int) -> int | None:
        """Process id of a worker, once it has one; None if the nursery died before."""
        with suppress(OSError, EOFError):
            while len(self._pids) <= number:
                self._pids.append(self._answer())
        return self._pids[number] if number < len(self._pids) else None

    def end(self, number: int, patience: float = 0.0) -> int | None:
        """Exit code of a worker, killed if it has not ended after some seconds; None if nobody knows."""
        self.pid(self._hired - 1)  # all are in, so that the next answer is the code
        try:
            self._door.send_bytes(pickle.dumps(("end", self._pids[number], patience)))
            return self._answer()
        except (OSError, EOFError, IndexError):
            if number < len(self._pids):
                with suppress(ProcessLookupError):
                    os.kill(self._pids[number], signal.SIGKILL)
            return None

    def close(self) -> None:
        """End all workers, and the nursery."""
        with suppress(OSError, EOFError):
            if self._hired and not self._pids and not self._door.poll():  # still importing: nothing to clear away
                self._process.kill()
        self._door.close()
        self._process.wait()

    def _answer(self) -> int:
        return int(self._door.recv_bytes())


# --- The nursery's side -----------------------------------------------------------------------------------------------


def keep(descriptor: int) -> None:
    """A nursery's life: copy itself and end copies as told, until the door closes."""
    import gc

    import torch

    torch.set_num_threads(1)
    keep_freed_memory()
    gc.freeze()  # a collection in a worker would touch, and so copy, every page
    gc.enable()
    door, children, codes = Connection(descriptor), set[int](), dict[int, int]()
    try:
        while True:
            kind, *told = pickle.loads(door.recv_bytes())  # from our own parent
            if kind == "hire":
                theirs = Connection(recv_handle(door))
                pid = os.fork()
                if not pid:
                    door.close()
                    _live(theirs, *told)
                theirs.close()
                children.add(pid)
                answer = pid
            else:
                answer = _ended(*told) if told[0] in children else codes[told[0]]
                children.discard(told[0])
                codes[told[0]] = answer
            door.send_bytes(str(answer).encode())
    except (EOFError, OSError):
        for pid in children:
            os.kill(pid, signal.SIGKILL)  # ours until waited for, so the number is nobody else's
        for pid in children:
            os.waitpid(pid, 0)


def _live(door: Connection, environment: dict[str, str], paths: list[str]) -> NoReturn:
    """What a copy does."""
    import numpy as np

    from clients.engines.pool import serve

    code = 1
    try:
        os.environ.clear()
        os.environ.update(environment | ONE_THREAD)
        sys.path[:] = paths
        random.seed()
        np.random.seed()  # noqa: NPY002 - not ours, but that of apps: copies shall not draw alike
        serve(door)
        code = 0
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _ended(pid: int, patience: float) -> int:
    until = time.monotonic() + patience
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
