"""Run a sweep: its directory, its child processes, and what is shown meanwhile."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from experiments import files
from experiments.cells import Plan
from experiments.children import Children, Job
from fedkd.config import Config
from fedkd.errors import ConfigError

SWEEP = "sweep.json"
LOOK = 0.2  # seconds between two looks at the children
SHOWN = 60  # characters of a label in the progress


@dataclass
class Sweep:
    """A sweep and its directory, ``out/<label>/seed-<k>/`` for each run.

    Attributes:
        jobs: Runs at a time.
        children: The processes, once the sweep has begun.
    """

    plan: Plan
    out: Path
    jobs: int
    console: Console
    children: Children = field(default_factory=lambda: Children([]))

    def go(self) -> dict[str, str]:
        """Run what is not finished; return why runs failed, by label.

        Raises:
            ConfigError: A cell cannot be run, the directory holds something else, or another process works in it.
            KeyboardInterrupt: As it came, when all children have ended.
        """
        if self.jobs < 1:
            raise ConfigError(f"--jobs {self.jobs}: expected at least 1")
        if not (self.out / SWEEP).exists():
            self._check()
        with alone(self.out, "fedkd sweep"):
            self._claim()
            jobs = self._jobs()
            waiting = [job for job in jobs if not job.finished()]
            self.children = Children(waiting)
            watch(self.children, min(self.jobs, len(waiting)), Board(self.console, len(jobs), len(jobs) - len(waiting)))
        return self.children.failures

    def _check(self) -> None:
        """Set up each cell once, data, split and mechanism: what is wrong shows before anything runs."""
        from clients.client import site  # takes a second, and 'fedkd compare' reads plans too

        for cell in self.plan.cells:
            try:
                site(cell.config.to_json())
            except ConfigError as error:
                raise ConfigError(f"cell '{cell.label}': {error}") from None
        site.cache_clear()

    def _jobs(self) -> list[Job]:
        where = self.out.resolve()
        return [
            Job(f"{cell.label} seed {config.seed}", config, where / cell.label / f"seed-{config.seed}")
            for cell, config in self.plan.runs()
        ]

    def _claim(self) -> None:
        """Make the directory this sweep's, or see that it is."""
        path, plan = self.out / SWEEP, self.plan.to_json()
        if not path.exists():
            if any(self.out.iterdir()):
                raise ConfigError(f"{self.out}: not empty, and no sweep; choose another --out")
            files.write_json(path, plan)
        held = read_plan(self.out)["hash"]
        if held != plan["hash"]:
            raise ConfigError(
                f"{self.out}: holds another sweep ({held}, not {plan['hash']}); choose another --out: "
                "'fedkd compare' takes several directories"
            )


def read_plan(directory: Path) -> dict[str, object]:
    """The contents of ``sweep.json``.

    Raises:
        ConfigError: It is damaged.
    """
    path = directory / SWEEP
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(plan["hash"], str) and isinstance(plan["cells"], list):
            return dict(plan)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ConfigError(f"{path}: damaged; expected what 'fedkd sweep' wrote")


def watch(children: Children, jobs: int, board: Board) -> None:
    """Work off all that waits, so many at a time, and show it.

    Raises:
        KeyboardInterrupt: As it came, when all children have ended.
    """
    try:
        for _ in range(jobs):
            children.start()
        while not children.wait(LOOK):
            board.show(children)
        board.show(children)
    finally:
        children.stop()
        board.close()


@contextmanager
def alone(out: Path, command: str) -> Iterator[None]:
    """Make the directory, and keep others at the same command out of it; the lock goes with the process."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be made ({error})") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ConfigError(f"{out}: another '{command}' is at work there") from None
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        os.close(handle)


class Board:
    """Progress: one bar over runs, and one for each that is running, over its rounds."""

    def __init__(self, console: Console, total: int, done: int) -> None:
        self.console = console
        self._total, self._before, self._said = total, done, 0
        self._began = time.monotonic()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[said]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._all = self._progress.add_task("[bold]runs", total=total, completed=done, said="")
        self._tasks: dict[str, TaskID] = {}
        self._progress.start()

    def show(self, children: Children) -> None:
        """Draw where the children stand."""
        self._tell(children)
        running = {job.label: job for job in children.running}
        for label in set(self._tasks) - set(running):
            self._progress.remove_task(self._tasks.pop(label))
        parts = 0.0
        for label, job in running.items():
            made, rounds = rounds_made(job), job.config.federation.rounds
            if label not in self._tasks:
                name = escape(label if len(label) <= SHOWN else f"…{label[1 - SHOWN :]}")
                self._tasks[label] = self._progress.add_task(name, total=rounds, said="rounds")
            self._progress.update(self._tasks[label], completed=made)
            parts += min(1.0, made / rounds)
        failed, gained = len(children.failures), children.done + parts
        spent, left = time.monotonic() - self._began, self._total - self._before - gained
        said = f"about {span(spent * left / gained)} left" if gained >= 0.1 and left > 0 else ""
        said += f"{' · ' * bool(said)}[bold red]{failed} failed" if failed else ""
        self._progress.update(self._all, completed=self._before + children.done, said=said)

    def _tell(self, children: Children) -> None:
        """Where there is no terminal to draw on, print a line for each run that ended since the last look."""
        over = children.over[self._said :]
        self._said += len(over)
        for place, label in enumerate(over, start=self._before + self._said - len(over) + 1):
            if not self.console.is_terminal:
                text = f"{place}/{self._total} {label}{' failed' if label in children.failures else ''}"
                self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the bar over runs as it is."""
        for task in self._tasks.values():
            self._progress.remove_task(task)
        self._tasks.clear()
        self._progress.stop()


def rounds_made(job: Job) -> int:
    """Rounds that a run has behind it."""
    try:
        return (job.place / files.METRICS).read_bytes().count(b"\n")
    except OSError:
        return 0


def span(seconds: float) -> str:
    """A guess of a duration, as roughly as it deserves."""
    if seconds < 90:
        return f"{max(5, round(seconds / 5) * 5)} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def default_jobs(configs: list[Config]) -> int:
    """As many runs at a time as there are cores for the processes that each of them has."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    engines = {(config.engine.name, config.engine.workers) for config in configs}
    return max(1, cores // max(workers or cores if name in ("pool", "ray", "auto") else 1 for name, workers in engines))
