"""The sections of the page in reading order; each one gives markup, or nothing where the run has nothing to show."""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape

from experiments.report import audit_figure, figures, partition, spread, tables
from experiments.report.model import Run
from experiments.report.style import figure, svg
from experiments.report.values import DASH, epsilon, fraction, plural, size, small
from experiments.report.verdict import gained


def accuracy(run: Run) -> str:
    """Accuracy by round."""
    got = run.accuracy
    alt = (
        f"Accuracy by round. Balanced accuracy ends at {fraction(got.balanced_mean)}, "
        f"personal accuracy at {fraction(got.personal_mean)}."
    )
    base = run.baseline
    if base is not None:
        alt += f" Training alone: {fraction(base.accuracy.balanced_mean)} and {fraction(base.accuracy.personal_mean)}."
    note = (
        "Solid with dots: this run. Dashed: training alone. Balanced accuracy is taken on a test set that all clients "
        "share and in which every class counts the same; personal accuracy on each client's own test split. The shaded "
        "band is one standard deviation over clients."
    )
    drawn = figure(svg(lambda width: figures.accuracy_curves(run, width), "curves", alt), note)
    return drawn or "<p>No round has been scored.</p>\n"


def clients(run: Run) -> str:
    """The clients one by one."""
    if not run.rows:
        return ""
    alt = f"Accuracy of each of {plural(len(run.rows), 'client')}, balanced and personal"
    lede, base = "", run.baseline
    if base is not None:
        up, both = gained(run, base)
        alt += f", beside training alone; balanced accuracy rose for {up} of {both}"
        lede = f"<p>Balanced accuracy rose for {up} of {both} clients.</p>\n" if both else ""
    note = "Sorted by balanced accuracy in this run."
    if len(run.rows) > spread.MANY:
        note = "Each curve climbs by one client at that client's accuracy: further to the right is better."
    drawn = figure(svg(lambda width: spread.clients(run, width), "clients", alt + "."), note)
    return lede + drawn + tables.architectures(run) if drawn else ""


def comparison(run: Run) -> str:
    """All rows side by side."""
    if not run.compare:
        return "<p>There is no other run to compare with.</p>\n"
    alt = "Balanced and personal accuracy of " + ", ".join(
        f"{'this run' if row is run else row.label} ({fraction(row.accuracy.balanced_mean)}, "
        f"{fraction(row.accuracy.personal_mean)})"
        for row in (run, *run.compare)
    )
    drawn = svg(lambda width: spread.comparison(run, width), "comparison", alt + ".")
    drawing = figure(drawn, "Sorted by balanced accuracy, whose value is written out; red: worse than training alone.")
    note = "<p>AUROC: membership of the canaries, told from the worst of what leaves the clients.</p>\n"
    return drawing + tables.comparison(run) + note


def traffic(run: Run) -> str:
    """What was sent."""
    alt = f"Bytes sent so far by round; in the end {size(run.up)} up and {size(run.down)} down."
    drawn = figure(svg(lambda width: figures.traffic(run, width), "traffic", alt))
    if not drawn:
        return "<p>Nothing was sent.</p>\n" if run.up == run.down == 0 else ""
    each = f", {size(run.up / run.clients)} up per client" if run.clients and run.up else ""
    return f"<p>All clients together: {size(run.up)} up, {size(run.down)} down{each}.</p>\n{drawn}"


def data(run: Run) -> str:
    """Who holds what."""
    table = partition.counts(run)
    if table.size == 0 or table.max() <= 0:
        return ""
    rows, columns = table.shape
    per = table.sum(axis=1)
    held = (table > 0).sum(axis=1)
    words = (
        f"{plural(rows, 'client')}, {plural(columns, 'class').replace('classs', 'classes')}, "
        f"{plural(int(per.sum()), 'record')}: a client holds {per.min():,} to {per.max():,} records of "
        f"{held.min()} to {held.max()} classes."
    )
    alt = f"Records by client and class. {words}"
    note = "A deeper blue means more records, an empty cell none. Bars: totals of each class and of each client."
    return f"<p>{words}</p>\n" + figure(svg(lambda width: partition.partition(run, width), "partition", alt), note)


def privacy(run: Run) -> str:
    """The statement, its small print, and how the budget was spent."""
    said = run.privacy
    nothing_sent = run.up == run.down == 0 and run.finished
    if said is None and nothing_sent:
        return "<p>Nothing left the clients, so there is no release to make a statement about.</p>\n"
    if said is None:
        open_end = "" if run.finished else " The run has no summary yet, so no statement is on file."
        text = f"What left the clients is NOT private: no statement was made, ε = ∞.{open_end}"
        if run.epsilon is not None and math.isfinite(run.epsilon):
            text = f"ε = {epsilon(run.epsilon)} has been spent so far.{open_end}"
        return f'<p class="statement">{text}</p>\n' + _spent(run)
    text = said.text or f"(ε, δ) = ({epsilon(said.epsilon)}, {small(said.delta)}); no wording was given."
    facts = [("unit", said.unit), ("neighbours", said.relation), ("seen by", said.view), ("sampling", said.sampling),
             ("accountant", said.accountant), ("kind of bound", _bound(said.upper_bound))]  # fmt: skip
    lists = [("This holds if", said.assumptions), ("This does not cover", said.exclusions)]
    sides = "".join(
        f"<div><h3>{title}</h3>\n<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul></div>\n"
        for title, lines in lists
        if lines
    )
    return f'<p class="statement">{escape(text)}</p>\n{definitions(facts)}<div class="two">\n{sides}</div>\n' + _spent(
        run
    )


def _bound(upper: bool | None) -> str:
    """Whether epsilon may be relied on."""
    return "" if upper is None else "upper bound" if upper else "estimate, not a bound"


def _spent(run: Run) -> str:
    """Epsilon by round and over clients."""
    alt = f"Privacy loss ε spent by round, {epsilon(run.epsilon)} in the end."
    drawn = svg(lambda width: figures.epsilon_curve(run, width), "epsilon", alt)
    note = "Privacy loss adds up: every release spends some of it, and none comes back."
    return figure(drawn, note) + tables.client_epsilons(run.rows)


def audit(run: Run) -> str:
    """What an outsider could find out."""
    found = run.audit
    if found is None or not found.targets:
        return "<p>No audit was run: nothing is known of what could be found out in practice.</p>\n"
    rows = "; ".join(
        f"{one.name} ({'leaves the client' if one.leaves else 'stays home'}) AUROC {fraction(one.auroc)}, "
        f"exposure {DASH if one.exposure is None else f'{one.exposure:.2f}'} bits"
        for one in found.targets
    )
    drawn = svg(lambda width: audit_figure.audit_intervals(found, width), "audit", f"Audit of {rows}.")
    note = (
        "How to read it: planted records (canaries) were trained on or left out at random, and the audit asks whether "
        "the target gives away which. A point to the right of its grey band does so better than chance: it leaks. A "
        "point inside the band means that no leak was detected with this many canaries, which is no proof that there "
        f"is none. Exposure is read against its chance level, {found.chance_exposure:.2f} bits, not against 0. Filled "
        "points leave the client; hollow ones stay home, with an owner who has the records anyway."
    )
    return figure(drawn, note) + tables.audit(found.targets)


def failures(run: Run) -> str:
    """Lost answers."""
    lost = [one for line in run.rounds for one in line.failures]
    if not lost:
        return f"<p>{run.failures:,} in the summary; no reasons are on file.</p>\n" if run.failures else ""
    hit = len({one.round for one in lost})
    return f"<p>{plural(len(lost), 'answer')} in {plural(hit, 'round')}.</p>\n" + tables.failures(lost)


def definitions(pairs: list[tuple[str, str]]) -> str:
    """A list of names and texts; those without a text are left out."""
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>\n" for name, text in pairs if text)
    return f'<dl class="facts">\n{rows}</dl>\n' if rows else ""


def reproduce(run: Run) -> str:
    """What someone needs to run it again."""
    command = f"<pre>{escape(run.facts['command'])}</pre>\n" if "command" in run.facts else ""
    facts = [("seed", run.seed), *((name, text) for name, text in run.facts.items() if name != "command")]
    config = f"<h3>Configuration, resolved</h3>\n<pre>{escape(run.config_text)}</pre>\n" if run.config_text else ""
    return command + definitions(facts) + config


ALL: tuple[tuple[str, str, Callable[[Run], str]], ...] = (
    ("accuracy", "Accuracy by round", accuracy),
    ("clients", "Client by client", clients),
    ("comparison", "All runs side by side", comparison),
    ("traffic", "What was sent", traffic),
    ("data", "Who holds what", data),
    ("privacy", "What is protected", privacy),
    ("audit", "What an auditor could find out", audit),
    ("failures", "Lost answers", failures),
    ("reproduce", "Run it again", reproduce),
)
