"""The same method files under Flower's own simulation runtime (Ray), started as a user starts it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from clients.app import app
from clients.client import site
from clients.engines.loop import Loop
from fedkd.config import Config
from fedkd.grid import LocalGrid
from fedkd.knowledge import fingerprint
from strategies.flower import KnowledgeStrategy

ROOT = Path(__file__).parents[2]
CONFIG = Config.from_raw(
    {
        "data": {"name": "digits", "partition": "dirichlet", "alpha": 0.5, "public": 200, "test": 100},
        "federation": {"clients": 3, "rounds": 2},
        "model": {"name": "linear", "by_client": ["linear", "mlp", "cnn"]},
        "method": {"name": "fedmd", "loss": "kl", "student_epochs": 1},
        "privacy": {"mechanism": "ambassador", "epsilon": 1.0, "delta": 1e-3, "steps": 2},
    }
)


@pytest.fixture
def flower(tmp_path: Path):
    """Flower's home in a folder of its own; the SuperLink that ``flwr run`` leaves behind is stopped."""
    home = tmp_path / "flower"
    home.mkdir()
    switches = {
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "OMP_NUM_THREADS": "1",
        "RAY_ADDRESS": "local",  # else Ray looks for a cluster that a killed run may have left the address of
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    yield {**os.environ, **switches}
    for pid in started_under(home):
        os.kill(pid, signal.SIGKILL)


def started_under(home: Path) -> list[int]:
    """Processes whose environment names this Flower home."""
    mark = f"FLWR_HOME={home}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.integration
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the SuperLink to stop through /proc")
def test_flwr_run_gives_the_local_grids_answer(tmp_path, flower):
    bundle = tmp_path / "app"
    bundle.mkdir()
    for room in ("fedkd", "strategies", "clients", "privacy"):
        shutil.copytree(ROOT / room, bundle / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, bundle)
    out = tmp_path / "results.json"
    run_config = tmp_path / "run.toml"
    run_config.write_text(f"config = {json.dumps(CONFIG.to_json())}\nout = {json.dumps(str(out))}\n", encoding="utf-8")
    command = [
        "flwr", "run", str(bundle), "--stream", "-c", str(run_config),
        "--federation-config", "num-supernodes=3 client-resources-num-cpus=1",
    ]  # fmt: skip
    done = subprocess.run(command, env=flower, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    runs = subprocess.run(
        ["flwr", "ls", "--format", "json"], env=flower, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert json.loads(runs.stdout)["runs"][0]["status"] == "finished:completed", done.stdout + done.stderr
    results = json.loads(out.read_text())

    here = site(CONFIG.to_json())
    strategy = KnowledgeStrategy(here.federation, here.mechanism)
    strategy.start(LocalGrid(Loop(app), 3, {"config": CONFIG.to_json()}))
    assert results["failures"] == []
    assert results["server_hash"] == fingerprint(strategy.server)
    assert results["epsilon"] == pytest.approx(strategy.ledger.spent())
