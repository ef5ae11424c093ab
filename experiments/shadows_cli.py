"""`fedkd shadows`: train shadow pipelines of a run, for LiRA and RMIA."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from experiments.exits import FAILED, INTERRUPTED, errors


def shadows(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A finished run's directory; canaries among images.")
    ],
    runs: Annotated[int, typer.Option(help="How many shadows; from 4, LiRA fits both of its Gaussians.")] = 16,
    jobs: Annotated[int | None, typer.Option(help="Shadows at a time; default as many as there are cores.")] = None,
    first: Annotated[int, typer.Option(help="Number of the first: to share the work out, or to add to it.")] = 1,
) -> None:
    """Train shadows of a run: the whole federation again, with the canaries' coins and all noise drawn anew.

    They go to `DIR/shadows/<number>/`; `fedkd audit DIR` then attacks the run by LiRA and RMIA, too. The same command
    again goes on where it stopped. Each shadow costs about as much as the run itself. Exit code 0: all trained; 1: some
    failed, one line each; 2: bad input, nothing was trained.
    """
    with errors():
        from rich.console import Console

        from experiments.shadows import Shadows

        try:
            failures = Shadows(directory, runs, first, jobs, Console(stderr=True)).go()
        except KeyboardInterrupt:
            typer.echo(f"interrupted; go on with: {shlex.join(['fedkd', *sys.argv[1:]])}", err=True)
            raise typer.Exit(INTERRUPTED) from None
        for label, reason in failures.items():
            typer.echo(f"{label} failed: {reason}", err=True)
        typer.echo(f"{runs - len(failures)} of {runs} shadows trained; see: fedkd audit {shlex.quote(str(directory))}")
        if failures:
            raise typer.Exit(FAILED)


def shadow(
    conf: Annotated[Path, typer.Argument()],
    out: Annotated[Path, typer.Option()],
    resume: Annotated[bool, typer.Option("--resume")] = False,
) -> None:
    """Train one shadow: what `fedkd shadows` starts."""
    with errors():
        from experiments.shadows import train
        from fedkd.config import load

        try:
            train(load(conf)[0], out, resume)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
