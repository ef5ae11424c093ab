"""Tiles and tables of the page, as markup; everything that came from a file is escaped here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from statistics import fmean, median

from experiments.report.model import Accuracy, ClientRow, Failure, Run, Secret, Target
from experiments.report.values import DASH, duration, epsilon, fraction, hundredths, plural, short, signed, size, small
from experiments.report.verdict import change, worst

MOST_FAILURES = 100


def data(value: float | int | None, shown: str) -> str:
    """A number as the reader sees it, with the number as it was in the file behind it."""
    if value is None:
        return DASH
    exact = "inf" if math.isinf(value) else repr(value)
    return f'<data value="{exact}">{escape(shown)}</data>'


def tiles(run: Run) -> str:
    """The key figures."""
    got, base = run.accuracy, run.baseline
    std = "" if got.personal_std is None else f" ± {data(got.personal_std, fraction(got.personal_std))}"
    against = [None, None] if base is None else [base.accuracy.balanced_mean, base.accuracy.personal_mean]
    delta = run.privacy.delta if run.privacy is not None else None
    sends = f"all clients, {plural(len(run.rounds), 'round')}" if run.rounds else "all clients"
    spent = math.inf if run.epsilon is None and run.finished else run.epsilon
    cells = [
        (f"{run.shared.capitalize()} accuracy", data(got.balanced_mean, fraction(got.balanced_mean)),
         _gain(got.balanced_mean, against[0]) or ("share of next tokens, one test for all" if run.is_text else "")),
        ("Personal accuracy", data(got.personal_mean, fraction(got.personal_mean)) + std,
         _gain(got.personal_mean, against[1]) or "mean ± s.d. over clients"),
        ("Worst 10 % of clients", data(got.personal_worst10, fraction(got.personal_worst10)), "personal accuracy"),
        ("Calibration error", data(got.personal_ece, fraction(got.personal_ece)), _calibration(got.global_ece)),
        ("Server's model", data(got.global_model, fraction(got.global_model)), _server(got.global_model)),
        *_perplexities(got),
        ("Bytes up", data(run.up, size(run.up)), sends),
        ("Bytes down", data(run.down, size(run.down)), sends),
        ("Privacy spent", f"ε = {data(spent, epsilon(spent))}", _delta(spent, delta)),
        ("Lost answers", data(run.failures, f"{run.failures:,}"), "refused, failed or late"),
        ("Time", data(run.seconds, duration(run.seconds)), "wall clock"),
    ]  # fmt: skip
    body = "".join(
        f'<div class="tile"><dt>{name}</dt><dd>{value}</dd><dd class="note">{note or "&#160;"}</dd></div>\n'
        for name, value, note in cells
    )
    return f'<dl class="tiles">\n{body}</dl>\n'


def _perplexities(got: Accuracy) -> list[tuple[str, str, str]]:
    """Of text: the server's model's and the clients' own."""
    told = (("Server's perplexity", got.global_perplexity, "one test for all"),
            ("Clients' perplexity", got.balanced_perplexity, "one test for all"),
            ("Personal perplexity", got.personal_perplexity, "each model on its client's own test"))  # fmt: skip
    return [(name, data(value, hundredths(value)), note) for name, value, note in told if value is not None]


def _gain(new: float | None, old: float | None) -> str:
    """The difference to training alone."""
    return "" if new is None or old is None else f"{signed(new - old)} against training alone"


def _calibration(server: float | None) -> str:
    """What the tile of the calibration error is about."""
    return "ECE on own data" + ("" if server is None else f"; server's model {fraction(server)}")


def _server(value: float | None) -> str:
    """What the server's tile is about."""
    return "this run keeps none" if value is None else "global or student model"


def _delta(spent: float | None, delta: float | None) -> str:
    """The note under epsilon."""
    if spent is not None and math.isinf(spent):
        return "no formal protection"
    return f"δ = {small(delta)}" if delta is not None else "δ not stated"


def table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1, name: str = "", slim: bool = False
) -> str:
    """A table out of markup cells; the first `left` columns hold words, the others numbers."""

    def cell(kind: str, i: int, text: str) -> str:
        scope, side = ' scope="col"' if kind == "th" else "", "" if i < left else ' class="n"'
        return f"<{kind}{scope}{side}>{text}</{kind}>"

    head = "".join(cell("th", i, text) for i, text in enumerate(heads))
    body = "".join(f"<tr>{''.join(cell('td', i, text) for i, text in enumerate(row))}</tr>\n" for row in rows)
    region = f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(name or heads[0])}">'
    kind = ' class="slim"' if slim else ""
    return f"{region}<table{kind}><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>\n"


def comparison(run: Run) -> str:
    """This run and every compared run, with a plain word on each that fell behind training alone."""
    rows = sorted((run, *run.compare), key=lambda row: -(row.accuracy.balanced_mean or -1.0))
    heads = (
        "Run",
        "Against training alone",
        "Method",
        "Mechanism",
        "ε",
        run.shared.capitalize(),
        "Personal",
        "Worst 10 %",
        *(["Perplexity"] if run.is_text else []),
        "Bytes up",
        "AUROC",
    )
    return table(heads, (_compared(row, run) for row in rows), left=4, name="All runs side by side")


def _compared(row: Run, run: Run) -> list[str]:
    """One line of the comparison."""
    name = "<strong>this run</strong>" if row is run else escape(short(row.label, 60))
    if not row.finished:
        name += ' <span class="tag">unfinished</span>'
    got = row.accuracy
    spent = math.inf if row.epsilon is None else row.epsilon
    return [
        name,
        standing(row, run),
        escape(row.method),
        escape(row.mechanism),
        DASH if row.up == row.down == 0 else epsilon(spent),
        fraction(got.balanced_mean),
        fraction(got.personal_mean),
        fraction(got.personal_worst10),
        *([hundredths(got.balanced_perplexity)] if run.is_text else []),
        size(row.up),
        _leak(row),
    ]


def _leak(row: Run) -> str:
    """Membership AUROC of the worst that leaves a client."""
    found = worst(tuple(one for one in row.audit.targets if one.leaves)) if row.audit else None
    return DASH if found is None else fraction(found.auroc)


def standing(row: Run, run: Run) -> str:
    """How a row stands against the page's baseline: the mark of the comparison table."""
    base = run.reference
    mine = row.accuracy.balanced_mean
    if row.is_local:
        return "the baseline" if row is base else "training alone"
    if base is None or mine is None or base.accuracy.balanced_mean is None:
        return "no baseline"
    theirs = base.accuracy.balanced_mean
    word, tone = {1: ("better", "good"), 0: ("level", ""), -1: ("worse than training alone", "bad")}[
        change(mine, theirs) or 0
    ]
    marks = [f'<span class="tag {tone}">{word}</span> <span class="gap">{signed(mine - theirs)}</span>']
    home, old = row.accuracy.personal_mean, base.accuracy.personal_mean
    if change(home, old) == -1 and home is not None and old is not None:
        marks.append(f'<span class="tag bad">worse on own data</span> <span class="gap">{signed(home - old)}</span>')
    return "<br />".join(marks)


def architectures(run: Run) -> str:
    """Mean accuracy by model, when the clients do not all have the same one."""
    names = sorted({row.model for row in run.rows})
    if len(names) < 2:
        return ""
    before = {row.client: row for row in run.baseline.rows} if run.baseline is not None else {}
    lines = []
    for name in names:
        mine = [row for row in run.rows if row.model == name]
        old = [before[row.client] for row in mine if row.client in before]
        sides = (old, mine) if before else (mine,)
        means = [fraction(_mean(rows, metric)) for metric in ("balanced", "personal") for rows in sides]
        lines.append([escape(name), f"{len(mine)}", *means])
    heads = ["Model", "Clients"]
    for metric in (run.shared, "personal"):
        heads += (
            [f"{metric.capitalize()}, alone", f"{metric.capitalize()}, this run"] if before else [metric.capitalize()]
        )
    return table(heads, lines, name="Accuracy by model", slim=True)


def _mean(rows: Sequence[ClientRow], metric: str) -> float | None:
    """Mean over those clients that have the metric."""
    known = [value for row in rows if (value := getattr(row, metric)) is not None]
    return fmean(known) if known else None


def client_epsilons(rows: Sequence[ClientRow]) -> str:
    """Largest, median and smallest epsilon over the clients; the largest is the one that counts."""
    known = sorted((row.epsilon, row.client) for row in rows if row.epsilon is not None)
    if not known:
        return ""
    (low, least), (high, most) = known[0], known[-1]
    middle = median(value for value, _ in known)
    lines = [
        ["largest, the one that counts", f"client {most}", epsilon(high)],
        ["median", DASH, epsilon(middle)],
        ["smallest", f"client {least}", epsilon(low)],
    ]
    return table((f"ε over {plural(len(known), 'client')}", "Client", "ε"), lines, left=2, slim=True)


def audit(targets: Sequence[Target]) -> str:
    """The audit's numbers."""
    heads = (
        "Target",
        "Where",
        "Reading",
        "AUROC",
        "Interval",
        "Null band",
        "p",
        "Exposure (bits)",
        "Chance",
        "In / out",
    )
    lines = [
        [escape(one.name), "leaves the client" if one.leaves else "stays home", _reading(one), fraction(one.auroc),
         _pair(one.low, one.high), _pair(one.null_low, one.null_high), small(one.p_value),
         hundredths(one.exposure), hundredths(one.exposure_chance),
         f"{DASH if one.n_in is None else one.n_in} / {DASH if one.n_out is None else one.n_out}"]
        for one in targets
    ]  # fmt: skip
    return table(heads, lines, left=3, name="Audit by target")


def _pair(low: float | None, high: float | None) -> str:
    """An interval."""
    return DASH if low is None or high is None else f"{low:.2f} to {high:.2f}"


def _reading(one: Target) -> str:
    """One word on what a row shows."""
    if one.leaks is None:
        return "cannot be read"
    if one.leaks:
        return '<span class="tag bad">leak</span>' if one.leaves else '<span class="tag">remembers</span>'
    if one.auroc is not None and one.null_low is not None and one.auroc < one.null_low:
        return '<span class="tag">below chance</span>'
    return "none detected"


def secrets(found: Sequence[Secret]) -> str:
    """Every attack on every target: mean bits by number of copies, beside what it is held against."""
    copies = sorted({n for one in found for n, _ in one.planted})
    heads = (
        "Target", "Where", "Attack", *(f"{n}×" for n in copies), "First guesses", "Not planted", "Swapped", "Chance",
        "p",
    )  # fmt: skip
    lines = []
    for i, one in enumerate(found):
        planted = dict(one.planted)
        first = not i or found[i - 1].target != one.target
        where = "leaves the client" if one.leaves else "stays home"
        lines.append([
            escape(one.target) if first else "", where if first else "", escape(one.attack),
            *(hundredths(planted[n].mean) if n in planted else DASH for n in copies), _guessed(one),
            hundredths(one.unplanted.mean), hundredths(one.swapped.mean), hundredths(one.chance), small(one.p_value),
        ])  # fmt: skip
    return table(heads, lines, left=3, name="Secrets by target and attack")


def _guessed(one: Secret) -> str:
    """How many of the planted secrets have rank 1."""
    known = [(what.extracted, what.n) for _, what in one.planted]
    if not known or any(None in pair for pair in known):
        return DASH
    return f"{sum(got or 0 for got, _ in known)} of {sum(n or 0 for _, n in known)}"


def failures(lost: Sequence[Failure]) -> str:
    """Round, client and reason of each lost answer."""
    lines = [[f"{one.round}", escape(one.client) or DASH, escape(one.reason) or "no reason given"] for one in lost]
    rest = len(lines) - MOST_FAILURES
    more = f"<p>{rest:,} more are in metrics.jsonl.</p>\n" if rest > 0 else ""
    return table(("Round", "Client", "Reason"), lines[:MOST_FAILURES], left=3, name="Lost answers", slim=True) + more
