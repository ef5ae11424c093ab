"""The comparison rows of a run: each one a run of its own, in a child process beside the main one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import fedkd
from experiments import files
from fedkd.config import Config, override
from fedkd.errors import ConfigError


def configs(config: Config) -> dict[str, Config]:
    """The configuration of each row.

    Raises:
        ConfigError: A row is not a valid configuration.
    """
    rows = {}
    for label, overrides in config.compare.items():
        raw, _ = override(config.raw(), overrides)
        raw.pop("compare", None)
        try:
            rows[label] = Config.from_raw(raw)
        except ConfigError as error:
            raise ConfigError(f"compare.'{label}': {error}") from None
    return rows


class Rows:
    """Runs the rows in child processes: one at a time while the main run works, two when it is done.

    Attributes:
        failures: Why a row has no result, by label.
        done: Rows that are over.
    """

    def __init__(self, out: Path, config: Config) -> None:
        self.out = out.resolve() / files.COMPARE
        self.configs = configs(config)
        self.failures: dict[str, str] = {}
        self.done = 0
        self._waiting = list(self.configs)
        self._children: set[subprocess.Popen[str]] = set()
        self._stopped = False
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begin with the next row, beside whatever is running."""
        thread = threading.Thread(target=self._work, daemon=True)
        self._threads.append(thread)
        thread.start()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the rows; return whether all are done."""
        for thread in self._threads:
            thread.join(seconds)
        return not any(thread.is_alive() for thread in self._threads)

    def stop(self) -> None:
        """End the children; a row that was running can be resumed."""
        self._stopped = True
        for child in list(self._children):
            child.terminate()
        self.wait(10)

    def _work(self) -> None:
        while self._waiting and not self._stopped:
            label = self._waiting.pop(0)
            try:
                self._run(label, self.configs[label])
            except OSError as error:
                self.failures[label] = str(error)
            self.done += 1

    def _run(self, label: str, config: Config) -> None:
        place = self.out / label
        if (place / files.SUMMARY).exists():
            return
        resume = any(place.glob(f"{files.CHECKPOINT}/round-*"))
        if not resume:
            shutil.rmtree(place, ignore_errors=True)
        source = self.out / f".{label}.toml"
        self.out.mkdir(parents=True, exist_ok=True)
        files.write(source, config.to_toml())
        command = [sys.executable, "-m", "experiments.cli", "run", str(source), "--out", str(place), "--quiet"]
        root = str(Path(fedkd.__file__).parent.parent)
        child = subprocess.Popen(
            command + (["--resume"] if resume else []),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])},
        )
        self._children.add(child)
        _, said = child.communicate()
        self._children.discard(child)
        if child.returncode and not self._stopped:
            last = said.strip().splitlines()
            self.failures[label] = last[-1] if last else f"exit code {child.returncode}"
        source.unlink(missing_ok=True)
