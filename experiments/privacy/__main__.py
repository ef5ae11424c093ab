"""Make the evidence on privacy: ``python -m experiments.privacy run|collect|draw``; no run is made twice."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

HERE = Path(__file__).parent
RUNS = Path("runs") / "privacy"
SWEEPS: dict[str, tuple[str, tuple[str, ...], str | None]] = {
    "tuning": ("tuning", (), None),
    "frontier": ("frontier", (), None),
    "leaks": ("leaks", (), None),
    "claims": ("claims", (), None),
    "claims_cifar10": ("claims", ("data.name=cifar10", "data.limit=8000"), "0..1"),
}
"""Name -> sweep file, what holds for all its cells, and seeds where they are not the file's."""

app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)
Names = Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(SWEEPS)}; default all.")]


@app.command()
def run(names: Names = None, jobs: Annotated[int, typer.Option(help="Runs at a time.")] = 2) -> None:
    """Run the sweeps: an hour and a half on two cores. CIFAR-10 is looked for where FEDKD_DATA says."""
    from rich.console import Console

    from experiments.cells import plan
    from experiments.sweep import Sweep

    for name in names or SWEEPS:
        file, overrides, seeds = SWEEPS[name]
        failures = Sweep(plan(HERE / f"{file}.toml", overrides, seeds), RUNS / name, jobs, Console(stderr=True)).go()
        for label, reason in failures.items():
            typer.echo(f"{label} failed: {reason}", err=True)


@app.command()
def collect(names: Names = None) -> None:
    """Read finished sweeps and write ``results/*.json``."""
    from experiments import files
    from experiments.privacy import results

    more = {"frontier": results.noise, "leaks": results.rows}
    for name in names or SWEEPS:
        found = results.collected(RUNS / name, more[name]) if name in more else results.collected(RUNS / name)
        files.write_json(HERE / "results" / f"{name}.json", found)


@app.command()
def draw() -> None:
    """Make the tables and the figures from ``results/*.json``; the pictures of inversion need the runs too."""
    from experiments.privacy import show

    show.write(HERE / "results", RUNS)


if __name__ == "__main__":
    app()
