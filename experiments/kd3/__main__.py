"""Make the comparison of KD3 and its parts: ``python -m experiments.kd3 teachers|tune|run|collect|federated|draw``.

What is there is not made again. Needs FEDKD_DATA with MNIST, CIFAR-10 and ImageNet-32 (see README, data).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

HERE = Path(__file__).parent
RUNS = Path("runs") / "kd3"
WORLDS = {
    "digits": {"data.name": "mnist", "data.limit": "5000"},
    "cifar10": {"data.name": "cifar10", "data.limit": "10000"},
}
EPOCHS = {"digits": 12, "cifar10": 20}  # of the teachers
TUNED = {
    "digits": {"data.limit": "6000"},
    "cifar10": {
        "data.limit": "11000", "data.pool": "imagenet32", "data.far_kind": "textures", "data.public": "10000",
        "method.student_steps": "800", "method.student_epochs": "5",
    },
}  # fmt: skip
SEEDS, TUNING = range(3), 100

app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)
Names = Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(WORLDS)}; default both.")]
Jobs = Annotated[int, typer.Option(help="Runs at a time.")]


@app.command()
def teachers(names: Names = None) -> None:
    """Train a teacher for each seed, and for tuning one that has not seen the official test set's world."""
    for name in names or WORLDS:
        _teacher(name, TUNING, f"tune-{name}", {"data.name": "files", "data.path": str(_training_images(name))})
        for seed in SEEDS:
            _teacher(name, seed, name, {})


@app.command()
def tune(names: Names = None, jobs: Jobs = 2) -> None:
    """Try learning rates with half of the pool far; prints the accuracies."""
    for name in names or WORLDS:
        given = {
            "data.name": "files",
            "data.path": str(_training_images(name)),
            "data.far": "0.5",
            "model.weights": f"{RUNS}/teachers/tune-{name}-{{seed}}.safetensors",
            **TUNED[name],
        }
        place = RUNS / f"tune-{name}"
        _sweep(HERE / "tuning.toml", place, jobs, given)
        for path in sorted(place.glob("*/seed-*/summary.json")):
            accuracy = json.loads(path.read_text(encoding="utf-8"))["accuracy"]
            typer.echo(
                f"{name}: {path.parent.parent.name}: {accuracy['global']:.4f} (teacher {accuracy['balanced_mean']:.4f})"
            )


@app.command()
def run(names: Names = None, jobs: Jobs = 2) -> None:
    """Run the comparison."""
    for name in names or WORLDS:
        _sweep(HERE / f"{name}.toml", RUNS / name, jobs, {})


@app.command()
def collect(names: Names = None) -> None:
    """Read finished runs and write ``results/NAME.json``."""
    from experiments import files
    from experiments.kd3.results import collected

    for name in names or WORLDS:
        files.write_json(HERE / "results" / f"{name}.json", collected(RUNS / name))


@app.command()
def federated(jobs: Jobs = 2) -> None:
    """Run ``federated.toml`` and write ``results/federated.json``."""
    from experiments import files
    from experiments.bench import machine
    from experiments.conditions import by_seed

    place = RUNS / "federated"
    _sweep(HERE / "federated.toml", place, jobs, {})
    found = {"versions": machine.versions(), "machine": machine.describe()}
    files.write_json(
        HERE / "results" / "federated.json", found | {"conditions": by_seed(place, ("global", "balanced"))}
    )


@app.command()
def draw() -> None:
    """Make ``results/tables.md`` and the figures from ``results/*.json``."""
    from experiments.kd3.show import figure, tables

    found = {
        name: json.loads(path.read_text(encoding="utf-8"))
        for name in WORLDS
        if (path := HERE / "results" / f"{name}.json").exists()
    }
    (HERE / "results" / "tables.md").write_text(tables(found), encoding="utf-8")
    (HERE / "results" / "students.png").write_bytes(figure(found))


def _sweep(file: Path, place: Path, jobs: int, given: dict[str, str]) -> None:
    from rich.console import Console

    from experiments.cells import plan
    from experiments.sweep import Sweep

    typer.echo(place)
    what = plan(file, [f"{key}={value}" for key, value in given.items()])
    for label, reason in Sweep(what, place, jobs, Console(stderr=True)).go().items():
        typer.echo(f"{label} failed: {reason}", err=True)


def _teacher(name: str, seed: int, label: str, data: dict[str, str]) -> None:
    """Train alone and write the weights that `model.weights` reads."""
    from experiments.cli import export
    from experiments.cli import run as run_one

    file = RUNS / "teachers" / f"{label}-{seed}.safetensors"
    if file.exists():
        return
    place, given = RUNS / "teachers" / f"{label}-{seed}", {**WORLDS[name], **data}
    if label != name:
        given["data.limit"] = TUNED[name]["data.limit"]
    settings = {"method.name": "local", "method.lr": "1e-3", "method.epochs": str(EPOCHS[name]), "method.batch": "64"}
    alone = {
        "model.name": "resnet8",
        "model.by_client": "",
        "model.weights": "",
        "data.pool": "",
        "data.public": "0",
        "data.reserve": "0",
    }
    overrides = [f"{key}={value}" for key, value in {**settings, **alone, **given}.items()]
    run_one(HERE / f"{name}_base.toml", overrides, place, seed, quiet=True)
    export(place, file, client=0)


def _training_images(name: str) -> Path:
    """The official training set alone, as a file: who tunes on it cannot look at the test set."""
    import numpy as np

    from fedkd.data.datasets import load

    path = RUNS / f"{name}.npz"
    if not path.exists():
        data = load(WORLDS[name]["data.name"])
        some = np.random.default_rng(TUNING).permutation(len(data.y))[:20_000]
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, x=data.x[some], y=data.y[some])
    return path


if __name__ == "__main__":
    app()
