"""Make the comparison: ``python -m experiments.fedd2s run|collect|teachers|drawings|draw``; no run is made twice."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

HERE = Path(__file__).parent
RUNS = Path("runs") / "fedd2s"
OMNIGLOT = ("limit=4840", "partition=natural", "test=484", "test_fraction=0.2", "min_size=5")
SMALL_BATCHES = ("method.batch=4", "federation.evaluate_every=15")  # six steps an epoch instead of one
SWEEPS: dict[str, tuple[str, tuple[str, ...], str | None]] = {
    "alpha0.1": ("methods", (), None),
    "alpha0.5": ("methods", ("data.alpha=0.5",), None),
    "pathological2": ("methods", ("data.partition=pathological", "data.classes=2"), None),
    "participation0.2": ("methods", ("federation.cohort=0.2",), None),
    "cifar10": ("methods", ("data.name=cifar10", "data.limit=10000"), "0..2"),
    "omniglot": (
        "omniglot",
        ("data.name=omniglot", "federation.clients=160", *(f"data.{text}" for text in OMNIGLOT), *SMALL_BATCHES),
        None,
    ),
    "schedule": ("schedule", (), None),
    "inference0.1": ("inference", (), None),
    "inference0.5": ("inference", ("data.alpha=0.5",), None),
    "inference-pathological2": ("inference", ("data.partition=pathological", "data.classes=2"), None),
}
"""Name -> sweep file, what holds for all its cells, and seeds where they are not the file's."""

app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)
Place = Annotated[Path, typer.Option(help="Where the sweeps are.")]
Names = Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(SWEEPS)}; default all.")]


@app.command()
def run(names: Names = None, out: Place = RUNS, jobs: Annotated[int, typer.Option(help="Runs at a time.")] = 2) -> None:
    """Run the sweeps, one after another: hours on two cores. Needs Fashion-MNIST; FEDKD_DATA for the others."""
    from rich.console import Console

    from experiments.cells import plan
    from experiments.sweep import Sweep

    for name in names or SWEEPS:
        file, overrides, seeds = SWEEPS[name]
        typer.echo(name)
        failures = Sweep(plan(HERE / f"{file}.toml", overrides, seeds), out / name, jobs, Console(stderr=True)).go()
        for label, reason in failures.items():
            typer.echo(f"{label} failed: {reason}", err=True)


@app.command()
def collect(names: Names = None, out: Place = RUNS) -> None:
    """Read finished sweeps and write ``results/NAME.json``: every run's numbers, hashes, versions and machine."""
    from experiments import files
    from experiments.fedd2s.results import collected

    for name in names or SWEEPS:
        files.write_json(HERE / "results" / f"{name}.json", collected(out / name))


@app.command()
def teachers(out: Place = RUNS) -> None:
    """Compare clients with the heads that answer them, in finished runs, and write ``results/teachers.json``."""
    from experiments import files
    from experiments.fedd2s.teacher import compared

    found = {
        f"{name}/{method}/{place.name}": compared(place)
        for name in ("alpha0.1", "alpha0.5", "pathological2")
        for method in ("fedd2s", "fedgkt")
        for place in sorted((out / name / method).glob("seed-*"))
        if (place / files.SUMMARY).exists()
    }
    files.write_json(HERE / "results" / "teachers.json", found)


@app.command()
def drawings(out: Place = RUNS) -> None:
    """Score Omniglot's finished runs on other people's drawings of a client's characters: ``results/drawings.json``."""
    from experiments import files
    from experiments.fedd2s.teacher import others_drawings

    found = {
        f"{place.parent.name}/{place.name}": others_drawings(place)
        for place in sorted((out / "omniglot").glob("*/seed-*"))
        if (place / files.SUMMARY).exists()
    }
    files.write_json(HERE / "results" / "drawings.json", found)


@app.command()
def draw() -> None:
    """Make ``results/tables.md`` and the figures from ``results/*.json``."""
    from experiments.fedd2s.figures import figures
    from experiments.fedd2s.results import read
    from experiments.fedd2s.tables import tables

    found = {name: read(path) for name in SWEEPS if (path := HERE / "results" / f"{name}.json").exists()}
    (HERE / "results" / "tables.md").write_text(tables(found), encoding="utf-8")
    for name, picture in figures(found).items():
        (HERE / "results" / name).write_bytes(picture)


if __name__ == "__main__":
    app()
