"""The verdict: one sentence, worked out from the numbers alone, that claims no more than they show.

A difference of less than one percentage point is called level: one run cannot tell it from chance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from experiments.report.model import Audit, Run, Target
from experiments.report.values import epsilon, fraction, hundredths, plural, points, size, small

TIE = 0.01
WEAK = 10.0
_PROTECTED = {
    "client": "what left each client is",
    "server": "the server itself sees unprotected messages, but what it gives away is",
}
"""What is protected, by who is trusted until then."""


@dataclass(frozen=True)
class Verdict:
    """The sentence in two parts (so that the first can be set apart), its tone, and what to keep in mind."""

    lead: str
    rest: str
    tone: str
    caveats: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """The whole sentence."""
        return f"{self.lead}{self.rest}"


def verdict(run: Run) -> Verdict:
    """Judge a run on accuracy, traffic, privacy, audit and failures, in this order."""
    lead, rest, tone = _accuracy(run)
    if not run.finished:
        lead = f"Unfinished: {_stopped(run)}, and so far {lead[0].lower()}{lead[1:]}"
        tone = "unsure" if tone == "good" else tone
    parts = [rest + _traffic(run), _privacy(run), _audit(run.audit), _failures(run)]
    return Verdict(lead, "; ".join(part for part in parts if part) + ".", tone, tuple(_caveats(run)))


def change(new: float | None, old: float | None) -> int | None:
    """1 for better, -1 for worse, 0 for level, None where one of the two is missing."""
    if new is None or old is None:
        return None
    return 0 if round(abs(new - old), 9) < TIE else 1 if new > old else -1


def gained(run: Run, baseline: Run) -> tuple[int, int]:
    """How many clients' balanced accuracy rose over the baseline, and how many are in both runs."""
    before = {row.client: row.balanced for row in baseline.rows}
    pairs = [(row.balanced, before.get(row.client)) for row in run.rows]
    both = [(new, old) for new, old in pairs if new is not None and old is not None]
    return sum(new > old for new, old in both), len(both)


def _stopped(run: Run) -> str:
    """Where an unfinished run is."""
    if run.last_round is None:
        return "no round has ended yet"
    whole = f" of {run.planned}" if run.planned else ""
    return f"the last round on file is {run.last_round}{whole}"


def _accuracy(run: Run) -> tuple[str, str, str]:
    """Lead, rest and tone of the clause on accuracy."""
    mine, base = run.accuracy.balanced_mean, run.baseline
    if mine is None:
        return f"No {run.shared} accuracy was recorded", ", so nothing can be said of what was learned", "unsure"
    ended = f"{run.shared} accuracy {'ended' if run.finished else 'is'} at {fraction(mine)}"
    if run.accuracy.balanced_perplexity is not None:
        ended += f" and perplexity at {hundredths(run.accuracy.balanced_perplexity)}"
    if run.is_local:
        return "This is training alone, the baseline itself", f": {ended}", "unsure"
    if base is None or base.accuracy.balanced_mean is None:
        why = ", because there is no run of training alone to compare with"
        return "Whether distillation helped is unknown", f"{why}: {ended}", "unsure"
    return _against(run, base, mine, base.accuracy.balanced_mean)


def _against(run: Run, base: Run, mine: float, theirs: float) -> tuple[str, str, str]:
    """The clause when there is a baseline: first balanced accuracy, then the clients' own data."""
    balanced = change(mine, theirs)
    home = change(run.accuracy.personal_mean, base.accuracy.personal_mean)
    up, both = gained(run, base)
    every = 0 < up == both == len(run.rows)
    some = f"; {up} of {both} clients gained" if both and not every else ""
    numbers = f"({fraction(mine)} against {fraction(theirs)}{some})"
    if balanced == 1:
        lead = "Distillation helped, at a price" if home == -1 else "Distillation helped"
        moved = f"{points(mine - theirs)} of {run.shared} accuracy"
        who = f"every client's model gained, {moved} on average," if every else f"the clients' models gained {moved}"
        rest = f": {who} over training alone {numbers}"
    elif balanced == -1:
        lead = "Distillation hurt"
        lost = f"{points(mine - theirs)} of {run.shared} accuracy"
        rest = f": the clients' models ended {lost} below training alone {numbers}"
    else:
        lead = {1: "Distillation helped on the clients' own data only", -1: "Distillation hurt"}.get(
            home or 0, "Distillation made no clear difference"
        )
        rest = f": {run.shared} accuracy ended within one point of training alone {numbers}"
    tone = "bad" if -1 in (balanced, home) else "good" if 1 in (balanced, home) else "unsure"
    return lead, rest + _at_home(run, base, home), tone


def _at_home(run: Run, base: Run, home: int | None) -> str:
    """What became of accuracy on the clients' own data."""
    mine, theirs = run.accuracy.personal_mean, base.accuracy.personal_mean
    if home is None or mine is None or theirs is None:
        return ""
    numbers = f"({fraction(mine)} against {fraction(theirs)})"
    if home == 0:
        return f", and accuracy on the clients' own data stayed level {numbers}"
    moved = f"{'rose' if home == 1 else 'fell'} by {points(mine - theirs)}"
    return f", and accuracy on the clients' own data {moved} {numbers}"


def _traffic(run: Run) -> str:
    """What it cost to send."""
    if run.up is None or run.down is None:
        return ""
    if run.up == run.down == 0:
        return ", with nothing sent"
    return f", for {size(run.up)} up and {size(run.down)} down"


def _privacy(run: Run) -> str:
    """What protects that which left, for whom, and how well."""
    spent, private = run.epsilon, run.privacy
    if run.up == run.down == 0 and run.finished:
        return "nothing left the clients"
    if spent is None and private is None and not run.finished and run.mechanism not in ("none", ""):
        return "what was spent on privacy is not on file yet"
    if spent is None or math.isinf(spent):
        return "what left the clients is NOT private (ε = ∞)"
    if private is None:
        when = "was" if run.finished else "is so far"
        return f"ε = {epsilon(spent)} {when} spent, with no statement on file of what it protects"
    weak = ", a weak guarantee" if spent > WEAK else ""
    cost = f"(ε = {epsilon(spent)}{weak}, δ = {small(private.delta) if private.delta is not None else 'not stated'})"
    unit = f"{private.unit}-level " if private.unit else ""
    what = _PROTECTED.get(private.trust, "to an observer whom the statement does not name, the run is")
    return f"{what} {cost} {unit}private"


def worst(targets: tuple[Target, ...]) -> Target | None:
    """The target furthest above its null band, else the one with the highest AUROC."""
    readable = [one for one in targets if one.auroc is not None]

    def excess(one: Target) -> tuple[float, float]:
        auroc = one.auroc or 0.0
        return (auroc - one.null_high if one.null_high is not None else -1.0, auroc)

    return max(readable, key=excess, default=None)


def _audit(audit: Audit | None) -> str:
    """What the audit found in that which leaves; never a proof of privacy."""
    if audit is None or not any(one.auroc is not None for one in audit.targets):
        return "no audit was run"
    if any(one.contradicted for one in audit.certified):
        return "the audit CONTRADICTS the claimed epsilon"
    seen = worst(tuple(one for one in audit.targets if one.leaves))
    if seen is None:
        return "the audit looked only at what stays home, so it says nothing of what leaves"
    name = seen.name if seen.name.startswith(("the ", "The ")) else f"the {seen.name}"
    if seen.null_low is None or seen.null_high is None or seen.auroc is None:
        return f"the audit of {name}, which leaves the client, has no null band and cannot be read"
    numbers = f"(AUROC {seen.auroc:.2f}, null band {seen.null_low:.2f}–{seen.null_high:.2f})"
    if seen.auroc > seen.null_high:
        return f"the audit finds leakage in {name}, which leaves the client {numbers}"
    if seen.auroc < seen.null_low:
        return f"the audit of {name} fell below its null band {numbers}, which calls for a second look"
    return f"no leak was detected in what leaves {numbers}, which is not proof that there is none"


def _failures(run: Run) -> str:
    """Lost answers."""
    return (
        f"{plural(run.failures, 'client answer')} {'was' if run.failures == 1 else 'were'} lost" if run.failures else ""
    )


def _caveats(run: Run) -> list[str]:
    """What to keep in mind when quoting the sentence."""
    said = [*run.warnings]
    base = run.baseline
    if base is not None:
        said += [
            f"The baseline is not the same experiment: its {name} is {theirs}, this run's is {mine}."
            for name, mine, theirs in (
                ("data set", run.dataset, base.dataset),
                ("seed", run.seed, base.seed),
                ("number of clients", run.clients, base.clients),
            )
            if mine != theirs
        ]
        if not base.finished:
            said.append("The baseline is unfinished too.")
    if run.finished and run.planned and run.last_round and run.last_round < run.planned:
        said.append(f"The run ended after round {run.last_round} of {run.planned}.")
    if run.privacy is not None and run.privacy.upper_bound is False:
        said.append("The ε of this run is an estimate, not an upper bound.")
    if base is not None and run.seed:
        said.append(f"One seed ({run.seed}): a difference of less than one point is called level.")
    return said
