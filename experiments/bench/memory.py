"""Peak memory of a run, by how many clients are registered; the cohort and the data stay the same."""

from __future__ import annotations

import resource
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments.bench import data
from experiments.bench.child import Answer, Child, Turns
from experiments.bench.spec import Open, Settings, Step

_SHAPE = (1, 4, 4)
_HOME_MEMORY = 1  # megabytes


def peak(settings: Settings, clients: int, images: int, cohort: int, rounds: int) -> Open:
    """A run in a process of its own, every client with a model at home."""

    @contextmanager
    def opened() -> Iterator[Step]:
        made = data.make(settings, clients, images // clients - 1, _SHAPE)
        engine = {"home_memory": _HOME_MEMORY}
        config = data.config(settings, made, cohort, {"name": "local"}, model="mlp", engine=engine)

        def step() -> float:
            homes = settings.folder / f"homes-{clients}"
            shutil.rmtree(homes, ignore_errors=True)
            spec = {"config": config.to_json(), "rounds": rounds, "homes": str(homes)}
            with Child("experiments.bench.memory:serve", spec) as child:
                child.await_ready()
                child.go()
                return float(child.answer()["megabytes"])

        yield step

    return opened


def serve(spec: Mapping[str, Any], turns: Turns) -> None:
    """Run, checkpointing homes as any run does, and say the largest resident size."""

    def act() -> Answer:
        import torch

        from clients.app import app
        from clients.client import site
        from clients.engines.loop import Loop
        from experiments.bench.ours import Training
        from fedkd.grid import LocalGrid
        from fedkd.homes import Homes
        from strategies.flower import Round

        torch.set_num_threads(1)
        here = site(spec["config"])
        config = here.federation.config
        homes = Homes(Path(spec["homes"]), config.engine.home_bytes())

        def settle(report: Round) -> None:
            homes.write(report.t)
            homes.settle()

        grid = LocalGrid(Loop(app), config.federation.clients, {"config": spec["config"]}, homes=homes)
        Training(here.federation, here.mechanism, settle).start(grid, num_rounds=spec["rounds"])
        return {"megabytes": peak_megabytes()}

    turns.serve(act)


def peak_megabytes() -> float:
    """Largest resident size of this process so far.

    Linux lets a process start with its parent's ``ru_maxrss``, so there the process's own record is read instead.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text(encoding="ascii", errors="replace").splitlines()
        found = next((line.split()[1] for line in lines if line.startswith("VmHWM:")), None)
        if found is not None:
            return int(found) / 1024
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
