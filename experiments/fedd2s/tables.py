"""The results as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import fmean
from typing import Any

from experiments.compare import Difference, paired
from experiments.fedd2s.results import Results
from experiments.markdown import difference, row, spread
from experiments.report.values import DASH, size

TITLES = {
    "alpha0.1": "Fashion-MNIST, Dirichlet 0.1",
    "alpha0.5": "Fashion-MNIST, Dirichlet 0.5",
    "pathological2": "Fashion-MNIST, two classes a client",
    "participation0.2": "Fashion-MNIST, Dirichlet 0.1, participation 0.2",
    "cifar10": "CIFAR-10, Dirichlet 0.1",
    "omniglot": "Omniglot by drawer",
    "schedule": "FedD2S, one change at a time (Fashion-MNIST, Dirichlet 0.1)",
    "inference0.1": "FedD2S scored with the server's head (Fashion-MNIST, Dirichlet 0.1)",
    "inference0.5": "FedD2S scored with the server's head (Fashion-MNIST, Dirichlet 0.5)",
    "inference-pathological2": "FedD2S scored with the server's head (Fashion-MNIST, two classes a client)",
}
CONTRASTS = (
    ("fedd2s", "rate 0"), ("rate 1", "rate 0"), ("fedd2s", "shallow to deep"), ("fedd2s", "random order"),
    ("fedd2s", "hard switch"), ("fedd2s", "shallowest cut only"), ("fedd2s", "KL on shared layers only"),
    ("fedd2s", "heads of one's own"), ("fedd2s", "class means"), ("answers in training", "fedd2s"),
    ("server's head", "own layers"), ("server's head", "server's head, rate 0"),
    ("server's head", "server's head, no KL"), ("fedd2s", "fedgkt"), ("fedd2s", "fedrep"), ("fedd2s", "feddistill"),
    ("fedd2s", "fedproto"),
)  # fmt: skip
"""Conditions to compare beside the baseline, where a sweep has both."""
HEAD = (
    "", "personal accuracy", "minus local, points", "Holm's p", "worst 10 %", "spread", "balanced", "server's model",
    "ECE", "bytes", "as good as local in the end",
)  # fmt: skip


def tables(found: Mapping[str, Results]) -> str:
    """All sweeps, each one a table."""
    lines = ["<!-- made by: python -m experiments.fedd2s draw -->", "", "# Results", "", *_key()]
    for name, results in found.items():
        lines += ["", f"## {TITLES[name]}", "", _ground(results), ""]
        lines += [row(HEAD), row(["---", *["---:"] * (len(HEAD) - 1)])]
        lines += [row(_cells(label, said)) for label, said in results["conditions"].items()]
        lines += ["", *(f"Note: {note}." for note in results["notes"])]
        wanted = [(one, two) for one, two in CONTRASTS if {one, two} <= results["conditions"].keys()]
        if len(wanted) > 1:
            lines += ["", row(("", "personal accuracy", "worst 10 %", "spread", "balanced", "ECE"))]
            lines += [row(["---", *["---:"] * 5])]
            lines += [row(_contrast(results, one, two)) for one, two in wanted]
    return "\n".join(lines).rstrip() + "\n"


def _key() -> Iterator[str]:
    yield (
        "Mean and sample standard deviation over seeds, of what clients score in the end. Personal: on their own test "
        "images; worst 10 %: of clients; spread: standard deviation over clients; balanced: on a test set with all "
        "classes alike; ECE: calibration error on own test images. Minus local: paired by seed, 95 % interval "
        "(Student's t); Holm's p: two-sided paired test, corrected over the methods of the table. Bytes: all clients, "
        "up and down, whole run. Last column: runs that reached the mean personal accuracy of local's last round, and "
        "the median round when they did."
    )


def _ground(results: Results) -> str:
    data, federation, machine = results["data"], results["federation"], results["machine"]
    n = max(len(said["values"]["personal"]) for said in results["conditions"].values())
    versions = ", ".join(f"{name} {results['versions'][name]}" for name in ("fedkd", "torch", "flwr", "numpy"))
    cohort = f", {federation['cohort']:.0%} a round" if federation.get("cohort") else ""
    return (
        f"{federation['clients']} clients{cohort}, {federation['rounds']} rounds, model `{results['model']}`, "
        f"{data.get('limit')} images, {n} seeds. {machine['processor']}, {machine['cores']} cores; {versions}."
    )


def _cells(label: str, said: Mapping[str, Any]) -> Iterator[str]:
    values = said["values"]
    yield label
    yield spread([*values.get("personal", {}).values()])
    beyond = said["minus_baseline"].get("personal") or {"mean": None, "low": None, "high": None, "holm": None}
    yield difference(Difference({}, beyond["mean"], None, beyond["low"], beyond["high"]))
    holm = beyond["holm"]
    yield DASH if holm is None else f"{holm:.2g}"
    for name in ("worst10", "personal_std", "balanced", "global", "personal_ece"):
        yield spread([*values.get(name, {}).values()])
    yield size(fmean(values["up"].values()) + fmean(values["down"].values()))
    reached = said["reached"]
    middle = reached["rounds"]["median"]
    yield f"{reached['reached']} of {reached['n']}" + ("" if middle is None else f"; round {middle:g}")


def _contrast(results: Results, one: str, two: str) -> Iterator[str]:
    """The first minus the second, in points, paired by seed."""
    yield f"{one} minus {two}"
    for name in ("personal", "worst10", "personal_std", "balanced", "personal_ece"):
        mine, theirs = (results["conditions"][label]["values"].get(name, {}) for label in (one, two))
        both = [{int(seed): value for seed, value in values.items()} for values in (mine, theirs)]
        yield difference(paired(*both))
