"""Make the comparison of query strategies: ``python -m experiments.rad run|federated|draw``; what is there stays."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "central.json"
STRATEGIES = ("rad", "uniform", "margin", "entropy", "least_confidence", "coreset", "cluster_margin", "unixkd")
SEEDS = range(5)
FEDERATED = ("federated", "clients")
DATA: dict[str, Any] = {"name": "mnist5k", "test": 1000, "public": 2000, "labelled": 50}
METHOD: dict[str, Any] = {"questions": 40, "student_epochs": 20, "student_lr": 1e-3, "rounds": 10}

app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="File of the results.")] = RESULTS,
    seeds: Annotated[str, typer.Option(help="Such as 0..4.")] = f"{SEEDS[0]}..{SEEDS[-1]}",
) -> None:
    """Every strategy with every teacher, seed by seed."""
    import torch
    from rich.progress import track

    from experiments import files
    from experiments.bench import machine
    from experiments.lists import parse_seeds
    from experiments.rad.central import TEACHERS, config, rounds, scene

    torch.set_num_threads(1)
    results: dict[str, Any] = {"runs": {}}
    if out.exists():
        results = json.loads(out.read_text(encoding="utf-8"))
    if results.get("data", DATA) != DATA or results.get("method", METHOD) != METHOD:
        raise SystemExit(f"{out}: holds runs with other settings; choose another --out")
    results |= {"data": DATA, "method": METHOD, "versions": machine.versions(), "machine": machine.describe()}
    todo = [
        (seed, teacher, strategy)
        for seed, teacher, strategy in product(parse_seeds(seeds), TEACHERS, STRATEGIES)
        if f"{teacher}/{strategy}/{seed}" not in results["runs"]
    ]
    for seed, teacher, strategy in track(todo, description="runs"):
        seen = scene(seed, teacher, DATA, METHOD)
        rate = float(seen.wrong.float().mean())
        lines = list(rounds(seen, config(seed, strategy, rate, DATA, METHOD)))
        curves = {name: [round(line[name], 4) for line in lines] for name in lines[0]}
        results["runs"][f"{teacher}/{strategy}/{seed}"] = {"error": round(rate, 4), **curves}
        files.write_json(out, results)


@app.command()
def federated(
    out: Annotated[Path, typer.Option(help="Where the sweeps are.")] = Path("runs"),
    jobs: Annotated[int, typer.Option(help="Runs at a time.")] = 2,
) -> None:
    """Run ``federated.toml`` and ``clients.toml``, and write ``results/federated.json``."""
    from rich.console import Console

    from experiments import files
    from experiments.bench import machine
    from experiments.cells import plan
    from experiments.conditions import by_seed
    from experiments.sweep import Sweep

    results: dict[str, Any] = {"versions": machine.versions(), "machine": machine.describe(), "sweeps": {}}
    for name in FEDERATED:
        place = out / f"rad_{name}"
        for label, reason in Sweep(plan(HERE / f"{name}.toml"), place, jobs, Console(stderr=True)).go().items():
            typer.echo(f"{label} failed: {reason}", err=True)
        results["sweeps"][name] = by_seed(place, ("global", "balanced", "personal"))
    files.write_json(HERE / "results" / "federated.json", results)


@app.command()
def draw() -> None:
    """Make ``results/tables.md`` and ``results/budget.png`` from the results."""
    from experiments.rad.show import federated_tables, figure, tables

    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    text = tables(results)
    if (other := HERE / "results" / "federated.json").exists():
        text += federated_tables(json.loads(other.read_text(encoding="utf-8")))
    (HERE / "results" / "tables.md").write_text(text, encoding="utf-8")
    (HERE / "results" / "budget.png").write_bytes(figure(results))


if __name__ == "__main__":
    app()
