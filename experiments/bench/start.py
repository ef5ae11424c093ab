"""From the start of a process to a client's first message, as a user starts it."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments.bench import data
from experiments.bench.child import Process, Turns
from experiments.bench.foreign import require_ray, simulate, switches
from experiments.bench.methods import DOOR, HERE
from experiments.bench.spec import Open, Settings, Step, Unavailable, timed

_PATIENCE = 120.0


def command(*arguments: str) -> Open:
    """``fedkd`` with these arguments, until it ends."""

    @contextmanager
    def opened() -> Iterator[Step]:
        def act() -> None:
            with Process(["-m", "experiments.cli", *arguments]) as process:
                process.process.communicate(timeout=_PATIENCE)
                if process.process.returncode:
                    raise Unavailable(f"exit code {process.process.returncode}: {process.last_words()}")

        yield timed(act)

    return opened


def run(settings: Settings, engine: str) -> Open:
    """``fedkd run`` on one engine, until a client has its first message."""

    @contextmanager
    def opened() -> Iterator[Step]:
        if engine == "ray":
            require_ray(settings)
        conf = settings.folder / f"start-{engine}.toml"  # all are open at once
        made = data.make(settings, 10, 4, (1, 8, 8))
        how = {"name": engine, "workers": 2} if engine in ("pool", "ray") else {"name": engine}
        config = data.config(settings, made, 10, {"name": f"{HERE}:Hello"}, engine=how)
        conf.write_text(config.to_toml(), encoding="utf-8")
        outs = iter(range(10**6))

        def step() -> float:
            out = settings.folder / f"start-{engine}-{next(outs)}"
            arguments = ["-m", "experiments.cli", "run", str(conf), "--out", str(out), "--quiet"]
            return knocked(settings.folder, arguments, {})

        yield step

    return opened


def flower(settings: Settings) -> Open:
    """Flower's simulation, until a client has its first message."""

    @contextmanager
    def opened() -> Iterator[Step]:
        require_ray(settings)
        arguments = ["-m", "experiments.bench.child", "experiments.bench.start:serve", "{}"]
        yield lambda: knocked(settings.folder, arguments, switches(settings))

    return opened


def knocked(folder: Path, arguments: Sequence[str], env: Mapping[str, str]) -> float:
    """Start a process and wait until a client of it knocks; then stop it."""
    path = folder / "door"
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    door = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    try:
        start = time.perf_counter()
        with Process(arguments, {**env, DOOR: str(path)}) as process:
            while not select.select([door], [], [], 0.5)[0]:
                if process.process.poll() is not None:
                    raise Unavailable(f"the process ended: {process.last_words()}")
                if time.perf_counter() - start > _PATIENCE:
                    raise Unavailable(f"no client had a message within {_PATIENCE:g} s")
            took = time.perf_counter() - start
            process.process.send_signal(signal.SIGINT)
        return took
    finally:
        os.close(door)


def serve(spec: Mapping[str, Any], turns: Turns) -> None:
    """Flower's simulation of two nodes; the server asks one of them, as soon as it is there."""
    from flwr.app import Context, Message, RecordDict
    from flwr.serverapp import Grid

    def main(grid: Grid, context: Context) -> None:
        while not (nodes := list(grid.get_node_ids())):
            time.sleep(0.01)
        grid.send_and_receive([Message(RecordDict(), nodes[0], "train")], timeout=_PATIENCE)

    simulate(main, "hello", 2)
