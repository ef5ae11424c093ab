"""`fedkd privacy`: a calculator. What noise promises, what noise a promise needs, and what the promise leaves out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from experiments.exits import errors

if TYPE_CHECKING:
    from privacy.calculator import Question

app = typer.Typer(
    name="privacy",
    no_args_is_help=True,
    help="A privacy calculator: epsilon of noise, noise for an epsilon, and all that an epsilon means.",
)

Steps = Annotated[int, typer.Option("--steps", help="Releases: rounds, or steps of DP-SGD.")]
Delta = Annotated[float, typer.Option("--delta", help="Probability with which the loss may exceed epsilon.")]
Noise = Annotated[
    float | None,
    typer.Option(
        "--noise", help="Noise over the clipping norm; of counts and votes in counts; of labels one report's."
    ),
]
Std = Annotated[float | None, typer.Option("--std", help="Standard deviation of the noise, instead of --noise.")]
Clip = Annotated[float, typer.Option("--clip", help="Clipping norm of one contribution.")]
Rate = Annotated[float | None, typer.Option("--rate", help="Share of the units in one release, in (0, 1].")]
SamplingOption = Annotated[
    str, typer.Option("--sampling", help="poisson, everyone, fixed (needs --n) or shuffle: what the sampler does.")
]
RelationOption = Annotated[
    str | None, typer.Option("--relation", help="add_remove or replace; default what the rest has a price for.")
]
UnitOption = Annotated[str | None, typer.Option("--unit", help="record, client or label; default record.")]
View = Annotated[str, typer.Option("--view", help="Against whom: server, client or outsider.")]
Kind = Annotated[
    str, typer.Option("--kind", help="gaussian, laplace, counts, labels (k-ary), votes or confident-votes.")
]
Units = Annotated[int | None, typer.Option("--n", help="Number of units; delta must be below 1/n.")]
Classes = Annotated[int, typer.Option("--classes", help="Of labels.")]
Threshold = Annotated[float | None, typer.Option("--threshold-noise", help="Of confident votes' test, in votes.")]
Answers = Annotated[int | None, typer.Option("--answers", help="Queries that pass confident votes' test.")]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]
Plot = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE.png|svg", help="Draw epsilon against rounds and cohort.")
]


@app.command("epsilon")
def epsilon_(
    context: typer.Context,
    steps: Steps,
    delta: Delta,
    noise: Noise = None,
    std: Std = None,
    clip: Clip = 1.0,
    rate: Rate = None,
    sampling: SamplingOption = "poisson",
    relation: RelationOption = None,
    unit: UnitOption = None,
    view: View = "server",
    kind: Kind = "gaussian",
    n: Units = None,
    classes: Classes = 10,
    threshold_noise: Threshold = None,
    answers: Answers = None,
    as_json: AsJson = False,
    plot: Plot = None,
) -> None:
    """Epsilon of given noise: `fedkd privacy epsilon --noise 1 --rate 0.01 --steps 1000 --delta 1e-5`."""
    with errors():
        asked = _question(**_told(context))
        _show(asked, as_json)
        _draw(asked, plot)


@app.command()
def sigma(
    context: typer.Context,
    epsilon: Annotated[float, typer.Option("--epsilon", help="Largest epsilon allowed.")],
    steps: Steps,
    delta: Delta,
    clip: Clip = 1.0,
    rate: Rate = None,
    sampling: SamplingOption = "poisson",
    relation: RelationOption = None,
    unit: UnitOption = None,
    view: View = "server",
    kind: Kind = "gaussian",
    n: Units = None,
    classes: Classes = 10,
    threshold_noise: Threshold = None,
    answers: Answers = None,
    as_json: AsJson = False,
    plot: Plot = None,
) -> None:
    """Noise for an epsilon: `fedkd privacy sigma --epsilon 3 --rate 0.01 --steps 1000 --delta 1e-5`."""
    with errors():
        told = _told(context)
        asked = _question(noise=1.0, std=None, **told).with_epsilon(epsilon)
        if not as_json:
            typer.echo(_noise_line(asked))
        _show(asked, as_json)
        _draw(asked, plot)


@app.command()
def explain(
    context: typer.Context,
    steps: Steps,
    delta: Delta,
    noise: Noise = None,
    std: Std = None,
    clip: Clip = 1.0,
    rate: Rate = None,
    sampling: SamplingOption = "poisson",
    relation: RelationOption = None,
    unit: UnitOption = None,
    view: View = "server",
    kind: Kind = "gaussian",
    n: Units = None,
    classes: Classes = 10,
    threshold_noise: Threshold = None,
    answers: Answers = None,
    allocation: Annotated[
        bool, typer.Option("--allocation", help="Price random allocation too (pld-accounting, half a minute).")
    ] = False,
    plot: Plot = None,
) -> None:
    """All that an epsilon means, what it leaves out, and what other accountants and samplings would say."""
    with errors():
        from rich.console import Console

        asked = _question(**_told(context))
        said = asked.statement()
        typer.echo(_paragraphs(asked, said.to_json()))
        Console(width=110, highlight=False).print(_comparison_table(asked, allocation))
        typer.echo(
            f"All for one {said.unit}, delta {said.delta:g}, where {said.view}; exclusions as above. Each epsilon is "
            "an upper bound under its own line's reading; which one is true is up to what the run does."
        )
        _draw(asked, plot)


def _question(
    *,
    steps: int,
    delta: float,
    noise: float | None,
    std: float | None,
    clip: float,
    rate: float | None,
    sampling: str,
    relation: str | None,
    unit: str | None,
    view: str,
    kind: str,
    n: int | None,
    classes: int,
    threshold_noise: float | None,
    answers: int | None,
) -> Question:
    from fedkd.errors import ConfigError
    from privacy.calculator import Question

    if (noise is None) == (std is None):
        raise ConfigError("noise: expected one of --noise (over the clipping norm) and --std, got " + _both(noise))
    if not 0 < clip < math.inf:
        raise ConfigError(f"clip should be positive and finite, got {clip:g}: an unbounded contribution has no epsilon")
    labels = kind == "labels"
    drawn = _sampling(sampling, rate, n)
    only_replace = labels or unit == "label" or sampling == "fixed"
    settled: dict[str, Any] = {
        "kind": kind,
        "relation": relation or ("replace" if only_replace else "add_remove"),
        "unit": unit or ("label" if labels else "record"),
        "observer": view,
        "sampling": drawn,
    }
    asked = Question(
        noise=noise if noise is not None else (std or 0.0) / clip,
        steps=steps,
        delta=delta,
        clip=clip,
        units=n,
        classes=classes,
        threshold_noise=threshold_noise,
        answers=answers,
        **settled,
    )
    asked.events()  # refuses what nobody prices, before anything is printed
    return asked


def _told(context: typer.Context) -> dict[str, Any]:
    """The options that make up a question; a figure that cannot be written is refused first."""
    from fedkd.errors import ConfigError

    place = context.params["plot"]
    if place is not None and not str(place).endswith((".png", ".svg")):
        raise ConfigError(f"plot: expected a file ending in .png or .svg, got {place}")
    others = "as_json", "plot", "allocation", "epsilon"
    return {name: value for name, value in context.params.items() if name not in others}


def _both(noise: float | None) -> str:
    return "neither" if noise is None else "both"


def _sampling(name: str, rate: float | None, n: int | None) -> Any:
    from fedkd.errors import ConfigError
    from privacy import releases

    if rate is not None and not 0 < rate <= 1:
        raise ConfigError(f"rate should be in (0, 1], got {rate:g}")
    if name not in ("poisson", "everyone", "fixed", "shuffle"):
        raise ConfigError(f"sampling should be poisson, everyone, fixed or shuffle, got '{name}'")
    if name == "shuffle":
        return releases.Shuffled()
    if rate is None or rate == 1 or name == "everyone":
        return releases.EVERYONE
    if name == "poisson":
        return releases.Poisson(rate)
    if n is None:
        raise ConfigError("sampling=fixed: needs the number of units, --n")
    return releases.WithoutReplacement(max(1, round(rate * n)), n)


def _noise_line(asked: Question) -> str:
    if asked.kind == "labels":
        return f"each report: epsilon {math.floor(asked.noise * 1e4) / 1e4:.4f}"
    # Rounded up, lest somebody copies a number that is too small.
    up = f"{math.ceil(asked.noise * 1e4) / 1e4:.4f}"
    if asked.kind in ("gaussian", "laplace"):
        std = math.ceil(asked.noise * asked.clip * 1e4) / 1e4
        return f"noise multiplier (noise over clip): {up}; for clip {asked.clip:g}: {std:.4f}"
    return f"noise on each count: {up}"


def _show(asked: Question, as_json: bool) -> None:
    said = asked.statement()
    if as_json:
        typer.echo(
            json.dumps({"noise": asked.noise, "clip": asked.clip, **said.to_json(), "text": str(said)}, indent=1)
        )
    else:
        typer.echo(str(said))


def _paragraphs(asked: Question, said: dict[str, Any]) -> str:
    from privacy.calculator import ABOUT
    from privacy.statement import rounded_up

    value = math.inf if said["epsilon"] is None else said["epsilon"]
    ratio = (
        "" if said["rdp_ratio"] is None else f"; RDP says {rounded_up(said['rdp'])}, {said['rdp_ratio']:.3f} times that"
    )
    rows = [
        ("mechanism", f"{asked.kind}: {ABOUT[asked.kind]}; {asked.steps} releases"),
        ("epsilon", f"at most {rounded_up(value)} at delta {said['delta']:g}{ratio}"),
        ("in words", _in_words(value, said)),
        ("unit", said["unit"]),
        ("relation", "adding or removing one" if said["relation"] == "add_remove" else "replacing one by another"),
        ("view", said["view"]),
        ("sampling", said["sampling"]),
        ("accountant", said["accountant"]),
        *(("assumed", text) for text in said["assumptions"]),
        *(("not covered", text) for text in said["exclusions"]),
    ]  # fmt: skip
    return "\n".join(f"{name:<12}{text}" for name, text in rows) + "\n"


def _in_words(epsilon: float, said: dict[str, Any]) -> str:
    if epsilon > 100:
        return "what is seen may tell nearly everything"
    absent = said["relation"] == "add_remove"
    other = "without it" if absent else "with another in its place"
    return (
        f"nothing that is seen is more than {math.exp(epsilon):,.3g} times as likely with one {said['unit']} as "
        f"{other}, or the other way round, but for a probability of {said['delta']:g}"
    )


def _comparison_table(asked: Question, allocation: bool) -> Any:
    from rich.table import Table

    from privacy.calculator import comparisons
    from privacy.statement import rounded_up

    grid = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("the same noise, read as", "relation", "accountant"):
        grid.add_column(name)
    grid.add_column("epsilon", justify="right")
    for row in comparisons(asked, allocation):
        value = "no price" if row.epsilon is None else rounded_up(row.epsilon)
        grid.add_row(row.reading, row.relation, row.accountant, value)
    return grid


def _draw(asked: Question, plot: Path | None) -> None:
    if plot is None:
        return
    from experiments.privacy_plot import write

    typer.echo(f"written: {write(asked, plot)}", err=True)
