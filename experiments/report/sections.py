"""The sections of the page in reading order; each one gives markup, or nothing where the run has nothing to show."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from experiments.report import audit_figure, claim_figure, figures, partition, secrets_figure, spread, tables
from experiments.report import strip as strips
from experiments.report.model import Certified, Run, Secret
from experiments.report.style import figure, svg
from experiments.report.values import epsilon, fraction, hundredths, plural, size, small
from experiments.report.verdict import gained


def accuracy(run: Run) -> str:
    """Accuracy by round."""
    got = run.accuracy
    alt = (
        f"Accuracy by round. {run.shared.capitalize()} accuracy ends at {fraction(got.balanced_mean)}, "
        f"personal accuracy at {fraction(got.personal_mean)}."
    )
    base = run.baseline
    if base is not None:
        alt += f" Training alone: {fraction(base.accuracy.balanced_mean)} and {fraction(base.accuracy.personal_mean)}."
    what = (
        "Accuracy is the share of next tokens that a model guesses right: first on a test text that all clients share, "
        "then on each client's own."
        if run.is_text
        else "Balanced accuracy is taken on a test set that all clients share and in which every class counts the "
        "same; personal accuracy on each client's own test split."
    )
    lines = "Solid with dots: this run. Dashed: training alone."
    note = f"{lines} {what} The shaded band is one standard deviation over clients."
    drawn = figure(svg(lambda width: figures.accuracy_curves(run, width), "curves", alt), note)
    return drawn + _perplexity(run) if drawn else "<p>No round has been scored.</p>\n"


def _perplexity(run: Run) -> str:
    """Of text: perplexity by round."""
    got = run.accuracy
    alt = (
        f"Perplexity by round. It ends at {hundredths(got.balanced_perplexity)} on the shared test, and at "
        f"{hundredths(got.personal_perplexity)} on the clients' own."
    )
    note = "Perplexity is exp of the cross-entropy a token: as many tokens, equally likely, would be as hard to guess."
    return figure(svg(lambda width: figures.perplexity_curves(run, width), "perplexity", alt), note)


def clients(run: Run) -> str:
    """The clients one by one."""
    if not run.rows:
        return ""
    alt = f"Accuracy of each of {plural(len(run.rows), 'client')}, {run.shared} and personal"
    lede, base = "", run.baseline
    if base is not None:
        up, both = gained(run, base)
        alt += f", beside training alone; {run.shared} accuracy rose for {up} of {both}"
        lede = f"<p>{run.shared.capitalize()} accuracy rose for {up} of {both} clients.</p>\n" if both else ""
    note = f"Sorted by {run.shared} accuracy in this run."
    if len(run.rows) > spread.MANY:
        note = "Each curve climbs by one client at that client's accuracy: further to the right is better."
    drawn = figure(svg(lambda width: spread.clients(run, width), "clients", alt + "."), note)
    return lede + drawn + tables.architectures(run) if drawn else ""


def comparison(run: Run) -> str:
    """All rows side by side."""
    if not run.compare:
        return "<p>There is no other run to compare with.</p>\n"
    alt = f"{run.shared.capitalize()} and personal accuracy of " + ", ".join(
        f"{'this run' if row is run else row.label} ({fraction(row.accuracy.balanced_mean)}, "
        f"{fraction(row.accuracy.personal_mean)})"
        for row in (run, *run.compare)
    )
    drawn = svg(lambda width: spread.comparison(run, width), "comparison", alt + ".")
    order = f"Sorted by {run.shared} accuracy, whose value is written out; red: worse than training alone."
    drawing = figure(drawn, order)
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
    if columns == 1:
        spans = f"{per.min():,}" if per.min() == per.max() else f"{per.min():,} to {per.max():,}"
        words = f"{plural(rows, 'client')}, {plural(int(per.sum()), 'record')}: a client holds {spans}."
        alt = f"Records by client. {words}"
        note = "Training and test records together; of text a record is a window of consecutive tokens."
        return f"<p>{words}</p>\n" + figure(svg(lambda width: partition.partition(run, width), "partition", alt), note)
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
        f"exposure {hundredths(one.exposure)} bits"
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
    also = "".join(f"<li>{escape(one)}</li>\n" for one in found.inferences)
    inferred = f"<p>What else was inferred from messages:</p>\n<ul>\n{also}</ul>\n" if also else ""
    return figure(drawn, note) + tables.audit(found.targets) + inferred + _certified(found.certified)


def _certified(found: Sequence[Certified]) -> str:
    """Upper bounds beside lower ones."""
    if not found:
        return ""
    said = "".join(f"<li>{escape(one.sentence)}</li>\n" for one in found)
    alt = "Claimed and certified epsilon: " + " ".join(one.sentence for one in found)
    note = (
        "A certified epsilon is a lower bound that holds at 95 %, a claimed one an upper bound. A point past its line "
        "contradicts the claim. A point before it proves nothing: the grey mark says how little this many canaries see."
    )
    drawn = svg(lambda width: claim_figure.claims(found, width), "claims", alt)
    against = any(one.contradicted for one in found)
    lost = '<p class="statement">The audit CONTRADICTS what is claimed.</p>\n' if against else ""
    return f"{lost}{figure(drawn, note)}<ul>\n{said}</ul>\n"


def secrets(run: Run) -> str:
    """What is left of secrets that were planted in text."""
    found = run.audit.secrets if run.audit is not None else ()
    if not found:
        return ""
    said = [one for one in found if one.attack == found[0].attack]
    blocks = "; ".join(
        f"{one.target} ({'leaves the client' if one.leaves else 'stays home'}) "
        + ", ".join(f"{n} copies {hundredths(what.mean)}" for n, what in one.planted)
        + f", not planted {hundredths(one.unplanted.mean)}, swapped {hundredths(one.swapped.mean)}"
        for one in said
    )
    drawn = svg(lambda width: secrets_figure.exposure(said, width), "secrets", f"Mean exposure in bits of {blocks}.")
    return f"<p>{_planted(found[0], run.twin)}</p>\n" + figure(drawn, _how_to_read(found[0])) + tables.secrets(found)


def _planted(one: Secret, twin: bool) -> str:
    """What was planted, in words."""
    drawn = [(n, what.n) for n, what in one.planted if what.n is not None]
    hit, lost = sum(n for _, n in drawn), one.unplanted.n or 0
    if twin:
        return (
            f"{plural(hit + lost, 'secret')} were drawn, a coin for each, and none was planted: this run is a twin, "
            "which shows what chance and the text itself give. Where it says planted, read: the coin said yes."
        )
    by_copies = ", ".join(f"{n} of {copies if copies > 1 else 'one'}" for copies, n in drawn)
    records = sum(n * copies for copies, n in drawn)
    return (
        f"{plural(hit + lost, 'line')} with a random secret each were drawn, and a fair coin for each: {hit} were "
        f"planted in their owners' training text, {lost} were not. By copies, {by_copies} "
        f"make {plural(records, 'record')}."
    )


def _how_to_read(one: Secret) -> str:
    """The caption: one sentence how to read it, and what the grey rows are."""
    space = one.space or 2
    sampled = space % 10 == 1  # a random sample and the secret itself
    many = f"{space - sampled:,} {'random secrets and itself' if sampled else 'possible ones'}"
    return (
        f"How to read it: to whoever knows the words before a secret, {math.log2(space):.2f} bits mean that it is the "
        f"first guess among {many}, and {hundredths(one.chance)} bits that it is as good as unknown; so hold every row "
        "against the grey ones of its block. Not planted: secrets whose coin said no. Swapped: planted secrets under "
        "the words before another one; if these are high, the target knows which digits are about, not which belong "
        "together. p: how often chance alone gives such a difference to the secrets that were not planted. Filled "
        "points leave the client, red ones with p below 0.05; hollow ones stay home. The table has the attacks of "
        "someone who adapts, too: digits only forgets all tokens but digits, rescaled undoes a temperature."
    )


def strip(run: Run) -> str:
    """Some text and its temperatures."""
    shown = run.strip
    if shown is None:
        return ""
    if shown.trouble:
        return f"<p>The text of this run could not be read again: {escape(shown.trouble)}</p>\n"
    hottest = max((t for line in shown.lines for t in line.heat if t is not None), default=shown.low)
    whose = "public text" if shown.client is None else f"client {shown.client}'s training text"
    alt = (
        f"{plural(len(shown.lines), 'record')} of {whose}, each character on the colour of the temperature of the "
        f"answer about it, up to {hottest:.3g} of {shown.high:.3g}."
    )
    note = (
        "The first records are those with the lowest scores, the others those with the highest. Without colour: "
        f"taught at the lowest temperature, {shown.low:.3g}, as in plain distillation. "
    )
    if shown.client is not None:
        note += (
            f"This is the simulation's own window on client {shown.client}'s private text: nobody in the federation "
            "sees it, the server included. Whoever gets this page does."
        )
    return figure(svg(lambda width: strips.strip(shown, width), "strip", alt), note)


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
    ("secrets", "Secrets in the text", secrets),
    ("strip", "How private each character was taken to be", strip),
    ("failures", "Lost answers", failures),
    ("reproduce", "Run it again", reproduce),
)
