"""Run the bench: measure works, write ``bench.json``, ``bench.svg`` and ``bench.png``."""

from __future__ import annotations

import difflib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from clients.engines import ONE_THREAD
from experiments import files
from experiments.bench import machine
from experiments.bench.spec import Settings, Work
from fedkd.errors import ConfigError

FORMAT = 1
JSON, FIGURE = "bench.json", "bench"


def choose(names: Sequence[str]) -> list[Work]:
    """Works by name, in the bench's own order; all where none is named.

    Raises:
        ConfigError: There is no such work.
    """
    from experiments.bench.works import WORKS

    for name in names:
        if name not in WORKS:
            near = difflib.get_close_matches(name, WORKS, n=1, cutoff=0.5)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ConfigError(f"bench: expected works of {', '.join(WORKS)}, got '{name}'{hint}")
    return [work for name, work in WORKS.items() if not names or name in names]


def bench(
    names: Sequence[str],
    out: Path,
    repeats: int = 7,
    *,
    quick: bool = False,
    ray: bool = True,
    seed: int = 0,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure, write into ``out`` after each work, and return what ``bench.json`` holds.

    Raises:
        ConfigError: There is no such work, or ``out`` cannot be written.
    """
    os.environ.update(ONE_THREAD)  # for whatever is started from here on
    import torch

    from experiments.bench.figure import draw
    from experiments.bench.measure import measure

    works = choose(names)
    torch.set_num_threads(1)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be made ({error})") from None
    results: dict[str, Any] = {
        "format": FORMAT,
        "quick": quick,
        "seed": seed,
        "repeats": repeats,
        "threads": 1,
        "machine": machine.describe(),
        "load_before": machine.load(),
        "versions": machine.versions(),
        "works": [],
    }
    with tempfile.TemporaryDirectory(prefix="fedkd-bench-") as folder:
        settings = Settings(Path(folder), seed, quick, ray)
        for work in works:
            results["works"].append(measure(work, settings, repeats, tell))
            results["load_after"] = machine.load()
            files.write_json(out / JSON, results)
            draw(results, out / FIGURE)
    return results
