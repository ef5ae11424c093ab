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
    """Runs the rows one after the other while the main run works; finished rows are not run again.

    Attributes:
        failures: Why a row has no result, by label.
    """

    def __init__(self, out: Path, config: Config) -> None:
        self.out = out / files.COMPARE
        self.configs = configs(config)
        self.failures: dict[str, str] = {}
        self.done = 0
        self._child: subprocess.Popen[str] | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._work, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the rows; return whether all are done."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def stop(self) -> None:
        """End the child; a row that was running can be resumed."""
        self._stopped = True
        if self._child is not None and self._child.poll() is None:
            self._child.terminate()
        if self._thread.is_alive():
            self._thread.join(10)

    def _work(self) -> None:
        for label, config in self.configs.items():
            if self._stopped:
                return
            try:
                self._run(label, config)
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
        self._child = subprocess.Popen(
            command + (["--resume"] if resume else []),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])},
        )
        _, said = self._child.communicate()
        if self._child.returncode:
            last = said.strip().splitlines()
            self.failures[label] = last[-1] if last else f"exit code {self._child.returncode}"
        source.unlink(missing_ok=True)
