from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from experiments.cli import app

TINY = """
seed = 3
[data]
name = "digits"
partition = "dirichlet"
alpha = 0.5
public = 200
test = 100
[federation]
clients = 4
rounds = 4
[model]
name = "linear"
by_client = ["linear", "mlp"]
[method]
name = "fedmd"
loss = "kl"
student_epochs = 1
[privacy]
mechanism = "ambassador"
epsilon = 1.0
delta = 1e-3
steps = 2
[audit]
canaries = 40
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A federation of four clients that takes a second."""
    path = tmp_path / "tiny.toml"
    path.write_text(TINY, encoding="utf-8")
    return path


@pytest.fixture
def fedkd():
    """Run the command line as a user does, in a process of its own."""

    def run(*args: str | Path, **options) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "experiments.cli", *map(str, args)]
        env = {**os.environ, "COLUMNS": "120"}
        return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, check=False, **options)

    return run


@pytest.fixture
def fedkd_here():
    """Run the command line in this process: the same words and exit codes, without the seconds of importing torch."""

    def run(*args: str | Path) -> subprocess.CompletedProcess[str]:
        words = list(map(str, args))
        done = CliRunner().invoke(app, words, prog_name="fedkd", env={"COLUMNS": "120"}, catch_exceptions=False)
        return subprocess.CompletedProcess(words, done.exit_code, done.stdout, done.stderr)

    return run
