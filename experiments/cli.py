"""The command line. Heavy imports wait until a command needs them, so that ``--help`` is quick."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from experiments import privacy_cli, shadows_cli
from experiments.exits import CONTRADICTED, FAILED, INTERRUPTED
from experiments.exits import errors as _errors

app = typer.Typer(
    name="fedkd",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Federated and privacy-aware knowledge distillation: run a federation, audit what it leaked, read the report.",
)

app.add_typer(privacy_cli.app)
app.command()(shadows_cli.shadows)
app.command(hidden=True)(shadows_cli.shadow)


@app.command()
def run(
    conf: Annotated[Path, typer.Argument(help="Configuration, TOML (`experiments/conf/main.toml` is the main job).")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Override keys: `method.name=fedprox method.mu=0.1`."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory, new or empty; default `runs/CONF`.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed; everything random follows from it.")] = None,
    engine: Annotated[
        str | None, typer.Option(help="Short for engine.name=...: loop, pool, vectorised, ray or auto.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Short for engine.workers=...")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the directory.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show nothing while running.")] = False,
) -> None:
    """Run a federation: rounds, checkpoints, audit, `summary.json` and `report.html`.

    Ctrl-C leaves a checkpoint that `--resume` goes on from, with the same result as an undisturbed run.
    All keys: `fedkd list keys`. Exit code 0: finished; 1: could not go on; 2: bad input, nothing written.
    """
    with _errors():
        if engine in ("pool", "auto"):
            from clients.engines.nursery import Nursery

            Nursery.ahead()  # its imports run beside ours
        from rich.console import Console

        from experiments.report import render
        from experiments.run import Run, default_out
        from experiments.show import Live, View, table
        from fedkd.config import load

        console = Console(stderr=True)
        short = {"engine.name": engine, "engine.workers": workers}
        overrides = [*(overrides or []), *(f"{key}={value}" for key, value in short.items() if value is not None)]
        config, notes = load(conf, overrides, seed)
        place = out or default_out(conf, resume)
        view = View() if quiet else Live(console)
        for note in notes:
            view.note(f"note: {note}")
        job = Run(config, place, shlex.join(["fedkd", *sys.argv[1:]]), view)
        try:
            summary = job.go(resume)
        except KeyboardInterrupt:
            view.close()
            typer.echo(f"interrupted; go on with: fedkd run {conf} --out {place} --resume", err=True)
            raise typer.Exit(INTERRUPTED) from None
        page = render(place)
        if not quiet:
            console.print(table({"this run": summary, **_compared(place)}))
            console.print(f"report: {page}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def distill(
    conf: Annotated[Path, typer.Argument(help="Configuration, TOML (`experiments/conf/distill.toml` is an example).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Override keys: `method.selection=all`.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory, new or empty; default `runs/CONF`.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed; everything random follows from it.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the directory.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show nothing while running.")] = False,
    teacher: Annotated[
        Path | None, typer.Option(help="Weights of a teacher that learns no more (`fedkd export` writes such a file).")
    ] = None,
) -> None:
    """Distil centrally: one teacher trained on all data, one pool of public images, one student.

    It is `fedkd run` with a single client, the teacher, whose accuracy is the personal one; the student is the server's
    model. The method must train one: kd3, rad, feddf, or fedmd with `method.student_epochs`. The teacher's architecture
    is the first of `model.by_client`, the student's is `model.name`.
    """
    alone = [*(overrides or []), "federation.clients=1", "federation.cohort=", "data.partition=iid"]
    if teacher is not None:
        alone += [f"model.weights={teacher}", "method.epochs=0"]
    with _errors():
        from fedkd.config import load
        from fedkd.errors import ConfigError
        from fedkd.method import Method

        config, _ = load(conf, alone, seed)
        if type(config.method).student is Method.student:
            raise ConfigError(f"distill: {config.method_name} trains no student at the server; use kd3 or rad")
    run(conf, alone, out, seed, None, None, resume, quiet)


@app.command()
def show(
    conf: Annotated[Path, typer.Argument(help="Configuration, TOML.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="As for `run`.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON, as `flwr run` takes it.")] = False,
) -> None:
    """Print the resolved configuration without running it."""
    with _errors():
        from fedkd.config import load

        config, notes = load(conf, overrides or [])
        for note in notes:
            typer.echo(f"note: {note}", err=True)
        typer.echo(config.to_json() if as_json else config.to_toml(), nl=as_json)


@app.command()
def audit(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A finished run's directory.")],
) -> None:
    """Audit a run again from its checkpoint: exposure and membership AUROC of all that could give a canary away, the
    epsilon that these certify, and whether noise on messages is what is booked. Exit code 3 if the run claims less.

    Where the run has shadows (`fedkd shadows DIR`), LiRA and RMIA attack it, too, and go to `summary.json`.
    """
    with _errors():
        from rich.console import Console
        from rich.table import Table

        from experiments.audit import class_means, contradicted, open_run
        from experiments.channels import canary_clients, inversion
        from experiments.report.inversion_figure import picture
        from experiments.shadow_attacks import attacks

        auditor = open_run(directory)
        results, noise = auditor.results(), canary_clients(auditor)
        if noise is not None:
            typer.echo(str(noise))
        if (seen := inversion(auditor)) is not None:
            typer.echo(f"{seen} See {picture(seen, directory)}.")
        if not results:
            typer.echo("no canaries were planted; run with audit.canaries=200")
            if contradicted((), noise):
                raise typer.Exit(CONTRADICTED)
            return
        grid = Table(box=None, header_style="bold", pad_edge=False)
        for name in ("audited", "leaves", "AUROC", "95 % interval", "null band", "p", "exposure", "chance", "in/out"):
            grid.add_column(name)
        for r in results:
            grid.add_row(
                r.target,
                "leaves" if r.leaves_client else "stays home",
                f"{r.auroc:.3f}",
                f"{r.auroc_low:.3f} to {r.auroc_high:.3f}",
                f"{r.null_low:.3f} to {r.null_high:.3f}",
                f"{r.p_value:.2g}",
                f"{r.exposure_mean:.2f} bits",
                f"{r.exposure_chance:.2f} bits",
                f"{r.n_in}/{r.n_out}",
            )
        Console().print(grid)
        if secrets := auditor.secrets():
            from experiments.show import secrets_table

            Console().print(secrets_table(secrets))
        if (labels := auditor.labels()) is not None:
            typer.echo(str(labels))
        if auditor.summed is not None:
            for told in class_means(auditor, auditor.summed).values():
                typer.echo(told["sentence"])
        found = attacks(auditor, directory)
        verdicts = auditor.verdicts(found.lira if found is not None else None)
        if found is not None:
            found.write(directory, verdicts)
            Console().print(found.table())
            for note in found.notes:
                typer.echo(f"note: {note}")
        for verdict in verdicts:
            typer.echo(str(verdict))
        if contradicted(verdicts, noise):
            raise typer.Exit(CONTRADICTED)


@app.command()
def vocabulary(
    file: Annotated[Path, typer.Argument(help="JSON file to write; `data.vocabulary` reads it.")],
    path: Annotated[Path, typer.Option("--text", help="Public text: a folder of .txt files, a .txt or a .jsonl file.")],
    size: Annotated[int, typer.Option(min=1, help="Tokens, the 256 bytes among them.")] = 512,
) -> None:
    """Learn a byte-pair vocabulary from text. Learnt from private text it gives that text away: use public text."""
    with _errors():
        from fedkd.data import text
        from fedkd.data.vocabulary import byte_pairs

        learnt = byte_pairs(text.load("text", path).texts, size)
        learnt.write(file)
        typer.echo(f"{file}: {len(learnt)} tokens")


@app.command()
def export(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A run's directory, finished or interrupted.")],
    file: Annotated[
        Path,
        typer.Argument(help="safetensors file to write; `model.weights` reads it. With {client} in it, one a client."),
    ],
    client: Annotated[int | None, typer.Option(min=0, help="A client's model; default the server's.")] = None,
) -> None:
    """Write a model of a run to a file: the server's, or a client's. Under no mechanism's promise if a client's."""
    with _errors():
        from safetensors.torch import save_file

        from experiments.audit import open_run

        auditor = open_run(directory)
        config = auditor.site.federation.config
        everybody = range(config.federation.clients) if "{client}" in str(file) and client is None else [client]
        for one in everybody:
            model, params = auditor.model(one)
            place = Path(str(file).replace("{client}", str(one)))
            about = {"architecture": model.name, "dataset": config.data.name, "config_hash": config.hash}
            place.parent.mkdir(parents=True, exist_ok=True)
            draft = place.with_name(f".{place.name}.draft")
            save_file({name: value.detach().cpu().contiguous() for name, value in params.items()}, draft, about)
            draft.replace(place)
            typer.echo(f"{place}: {model.name}, {sum(value.numel() for value in params.values())} parameters")


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A run's directory, finished or not.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="File; default DIR/report.html.")] = None,
) -> None:
    """Write a run's report: one HTML file that needs no network and no scripts."""
    with _errors():
        from experiments.report import render

        typer.echo(render(directory, output))


@app.command()
def flower(
    directory: Annotated[Path, typer.Argument(metavar="APP_DIR", help="A Flower app's folder, with pyproject.toml.")],
    workers: Annotated[int, typer.Option(min=1, help="Worker processes; 1 runs the clients in this process.")] = 1,
    num_clients: Annotated[int, typer.Option(min=1, help="Number of nodes.")] = 10,
    run_config: Annotated[
        list[str] | None, typer.Option(help="Override its run config, once or more: `lr=0.1`; or one TOML file.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(min=0.001, help="Seconds a client may take; default no limit.")
    ] = None,
) -> None:
    """Run any Flower app, unmodified, on the local Grid: its own ServerApp and ClientApp, without SuperLink and Ray.

    Replies come in the order of the nodes, so an app that seeds itself gives the same result twice, for any number of
    workers. Exit code 0: the ServerApp finished; 1: it raised; 2: bad input, nothing was run.
    """
    with _errors():
        from experiments.flower_app import engine_maker, read
        from experiments.flower_app import run as run_app

        tally = run_app(read(directory, run_config or []), num_clients, engine_maker(workers, timeout))
        typer.echo(f"finished: {tally}")


@app.command()
def sweep(
    conf: Annotated[
        Path, typer.Argument(help="Configuration, or a sweep file: `base`, `seeds`, `[grid]`, `[[cells]]`.")
    ],
    grid: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=A,B,C]...", help="Keys to sweep, and keys with one value for all runs."),
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds: `0..4` or `0,2,5`; default the file's.")] = None,
    out: Annotated[Path | None, typer.Option(help="Sweep directory; default `runs/CONF-sweep`.")] = None,
    jobs: Annotated[int | None, typer.Option(help="Runs at a time; default as many as there are cores.")] = None,
) -> None:
    """Run a grid of configurations times seeds, several at a time, in `DIR/<label>/seed-<k>/`.

    The same command again goes on where it stopped: finished runs stay, half-made ones resume, failed ones start anew.
    Exit code 0: all finished; 1: some runs failed, one line each; 2: bad input, nothing was run.
    """
    with _errors():
        from rich.console import Console

        from experiments.cells import plan
        from experiments.sweep import Sweep, default_jobs

        what = plan(conf, grid or [], seeds)
        place = out or Path("runs") / f"{conf.stem}-sweep"
        at_once = default_jobs([cell.config for cell in what.cells]) if jobs is None else jobs
        try:
            failures = Sweep(what, place, at_once, Console(stderr=True)).go()
        except KeyboardInterrupt:
            typer.echo(f"interrupted; go on with: {shlex.join(['fedkd', *sys.argv[1:]])}", err=True)
            raise typer.Exit(INTERRUPTED) from None
        for label, reason in failures.items():
            typer.echo(f"{label} failed: {reason}", err=True)
        total = len(what.cells) * len(what.seeds)
        typer.echo(f"{total - len(failures)} of {total} runs finished; see: fedkd compare {shlex.quote(str(place))}")
        if failures:
            raise typer.Exit(FAILED)


@app.command()
def compare(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Sweep and run directories.")],
    baseline: Annotated[str | None, typer.Option(help="Label to compare with; default training alone.")] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="Metric, once for each one wanted: `balanced`; default all there are.")
    ] = None,
    where: Annotated[list[str] | None, typer.Option(help="Only runs of this configuration: `data.alpha=0.3`.")] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(metavar="METRIC=VALUE", help="Rounds and bytes until then, once or more: `personal=0.8`."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Directory; default the sweep's own, else `runs/compare`.")
    ] = None,
) -> None:
    """Compare sweeps and runs, paired by seed: tables, `compare.json`, and figures as `.svg` and `.png`.

    `compare` shows the metrics, `-curves` accuracy by round, `-bytes` by bytes sent, `-clients` every client's, and
    `-targets` what `--target` asks. Differences to the baseline have 95 % intervals (Student's t over the pairs) and
    Holm-corrected p-values.
    """
    with _errors():
        from rich.console import Console

        from experiments.compare import compare as work_out
        from experiments.compare_files import default_place, write
        from experiments.compare_table import table, targets_table
        from experiments.conditions import read

        conditions, unfinished = read(directories, where or [])
        found = work_out(conditions, baseline, metric or [], unfinished, target or [])
        written = write(found, output or default_place(directories))
        console = Console(width=None if sys.stdout.isatty() else 140)
        console.print(table(found))
        if found.targets:
            console.print(targets_table(found))
        for line in (found.statistics, *(f"note: {note}" for note in found.notes)):
            console.print(line, style="dim", highlight=False, markup=False)
        typer.echo("written: " + " ".join(map(str, written)), err=True)


@app.command()
def bench(
    works: Annotated[
        list[str] | None, typer.Argument(metavar="[WORK]...", help="Works to measure; default all.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes: shows that it works, measures nothing.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Samples of each contender, taken in turn.")] = 7,
    ray: Annotated[bool, typer.Option("--ray/--no-ray", help="Whether Flower's Ray runtime takes part.")] = True,
    out: Annotated[Path, typer.Option("-o", "--out", help="Directory of bench.json, .svg and .png.")] = Path(
        "runs/bench"
    ),
) -> None:
    """Time engines against a hand-written loop and Flower's Ray runtime, on the same work in one run."""
    with _errors():
        from rich.console import Console

        from experiments.bench.run import bench as measure
        from experiments.bench.show import table

        say = Console(stderr=True)
        results = measure(
            works or [], out, repeats, quick=quick, ray=ray, tell=lambda text: say.print(text, markup=False)
        )
        Console(width=None if sys.stdout.isatty() else 140).print(table(results))


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(metavar="methods|datasets|models|mechanisms|keys", help="What to list.")],
    markdown: Annotated[bool, typer.Option("--markdown", help="As a Markdown table.")] = False,
) -> None:
    """List what there is, one line each; of methods also what they exchange and need."""
    with _errors():
        from experiments.listing import text

        typer.echo(text(what, markdown))


def _compared(place: Path) -> dict[str, Any]:
    found = sorted(place.glob("compare/*/summary.json"))
    return {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in found}


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
