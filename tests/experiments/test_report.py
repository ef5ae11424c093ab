"""The report: its sentence by value, its numbers against the files, its markup, its bytes."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import plays
import pytest
from rich.console import Console

from experiments import show
from experiments.report import render, sections
from experiments.report.load import load
from experiments.report.model import Heated, Strip
from experiments.report.page import page
from experiments.report.read_strip import of
from experiments.report.strip import strip
from experiments.report.style import NARROW, WIDE, apart, drawing
from experiments.report.values import epsilon, size, small
from experiments.report.verdict import verdict
from fedkd.errors import ConfigError
from fedkd.federation import build
from privacy.audits.secrets import SecretResult, judge

MODELS = ("mlp", "cnn", "resnet")
CONFIG = (
    '# resolved by fedkd, sha256 3fa9c1d27b\nmethod = "fedmd"\nseed = 0\n[data]\nname = "mnist5k"\n[run]\nrounds = 10\n'
)
TEXT = (
    "(ε, δ) = (9.9, 0.001) for each training record of each client, under adding or removing one record, against the "
    "server, which sees every message; Poisson sampling; PLD accountant; an upper bound."
)
STATEMENT = {
    "epsilon": 9.9, "delta": 1e-3, "unit": "record", "relation": "add or remove one", "view": "server",
    "sampling": "Poisson, q = 0.35", "accountant": "dp-accounting 0.6 PLD", "upper_bound": True, "text": TEXT,
    "assumptions": ["Noise comes from a seeded generator: right for a simulation, not for a deployment.",
                    "The public set shares no record with any client.", "Each record belongs to one client."],
    "exclusions": ["Accuracies, timings and drop-outs that this page shows.", "The number of records of each client.",
                   "Hyper-parameters that were chosen by looking at private data."],
}  # fmt: skip


def target(name: str, leaves: bool, auroc: float, low: float, high: float, exposure: float) -> dict[str, Any]:
    return {
        "target": name, "leaves_client": leaves, "auroc": auroc, "auroc_low": low, "auroc_high": high,
        "null_low": 0.43, "null_high": 0.57, "p_value": 0.0004 if auroc > 0.57 else 0.31, "exposure_mean": exposure,
        "exposure_chance": 1.43, "n_in": 101, "n_out": 99,
    }  # fmt: skip


TARGETS = [
    target("home model", False, 0.85, 0.79, 0.90, 3.61),
    target("message", True, 0.62, 0.55, 0.69, 2.02),
    target("aggregate", True, 0.55, 0.47, 0.62, 1.60),
    target("student", True, 0.53, 0.45, 0.61, 1.49),
]


def make_run(
    path: Path, method: str = "fedmd", balanced: float = 0.723, personal: float = 0.916, clients: int = 10,
    classes: int = 10, rounds: int = 10, finished: bool = True, eps: float | None = 9.9, audit: bool = True,
    failures: bool = False, up: int = 980_000, student: bool = True, spread: float = 0.04, **more: Any,
) -> Path:  # fmt: skip
    """Write a run directory as ``fedkd run`` does."""
    rng = np.random.default_rng(7)
    path.mkdir(parents=True)
    lost = [{"client": 3, "reason": "NaN in 'logits'"}] if failures else []
    lines = []
    for t in range(1, rounds + 1):
        grown = 1 - math.exp(-0.55 * t)
        whole = 1 - math.exp(-0.55 * rounds)
        lines.append({
            "round": t, "cohort": clients, "seconds": 4.2, "failures": lost if t == 4 else [],
            "accuracy": {
                "balanced_mean": 0.1 + (balanced - 0.1) * grown / whole, "personal_mean": personal * grown / whole,
                "personal_std": 0.05, "personal_worst10": (personal - 0.11) * grown / whole,
                "global": 0.851 * grown / whole if student else None, "personal_ece": 0.061,
                "global_ece": 0.032 if student else None,
            },
            "bytes": {"up": up, "down": up // 3}, "epsilon": None if eps is None else eps * math.sqrt(t / rounds),
        })  # fmt: skip
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shares = rng.dirichlet([0.3] * classes, clients)
    noise = np.random.default_rng(round(1000 * balanced)).normal(0, spread, (2, clients))
    rows = [
        {"client": i, "model": MODELS[i % 3], "train": 280, "test": 70,
         "classes": np.round(shares[i] * 350).astype(int).tolist(),
         "balanced": float(np.clip(balanced + noise[0, i] - noise[0].mean(), 0, 1)),
         "personal": float(np.clip(personal + noise[1, i] - noise[1].mean(), 0, 1)),
         "epsilon": None if eps is None else eps * (1 - i / (3 * clients))}
        for i in range(clients)
    ]  # fmt: skip
    (path / "clients.json").write_text(json.dumps(rows))
    (path / "config.toml").write_text(CONFIG)
    if finished:
        final = lines[-1]["accuracy"]
        private = (
            None
            if eps is None
            else {"epsilon": eps, "delta": 1e-3, "trust": "client", "statement": {**STATEMENT, "epsilon": eps}}
        )
        summary = {
            "method": method, "dataset": "mnist5k", "seed": 0, "clients": clients, "rounds": rounds,
            "mechanism": "none" if eps is None else "ambassador", "accuracy": final,
            "bytes": {"up": up * rounds, "down": up // 3 * rounds}, "privacy": private,
            "audit": {"exposure_mean": 2.02, "auroc": 0.62, "chance": {"auroc": 0.5, "exposure": 1.43},
                      "targets": TARGETS} if audit else None,
            "failures": len(lost), "seconds": 42.3, "state_hash": "9c1d" * 16, "config_hash": "3fa9c1d27b",
            "versions": {"fedkd": "0.1.0", "torch": "2.13.0"}, "machine": "2 cores, Linux",
            "command": "fedkd run conf/fedmd.toml method.mu=0.1", **more,
        }  # fmt: skip
        (path / "summary.json").write_text(json.dumps(summary))
    return path


def with_baseline(path: Path, **changes: Any) -> Path:
    """A run with training alone beside it."""
    clients = changes.get("clients", 10)
    classes = changes.get("classes", 10)
    run = make_run(path, **changes)
    make_run(path / "compare" / "local", "local", 0.540, 0.914, clients, classes, eps=None, audit=False, up=0,
             student=False)  # fmt: skip
    return run


def full(path: Path) -> Path:
    """A run with everything."""
    run = with_baseline(path, failures=True)
    others = path / "compare"
    make_run(others / "fedmd plain", "fedmd", 0.747, 0.917, eps=None)
    make_run(others / "fedd2s shared_only 0.25", "fedd2s", 0.491, 0.876, eps=None, audit=False)
    make_run(others / "ambassador eps 3", "fedmd", 0.713, 0.914, eps=3.0)
    make_run(others / "dp-sgd own model", "fedmd", 0.608, 0.869, eps=10.0)
    make_run(others / "logits client-level noise", "fedmd", 0.312, 0.803, eps=10.0)
    return run


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without figures, for tests that look at the words only."""
    monkeypatch.setattr(sections, "svg", lambda draw, name, alt: "")


def sentence(path: Path) -> str:
    return verdict(load(path)).sentence


def edit(run: Path, **changes: Any) -> Path:
    """Change the summary of a run."""
    file = run / "summary.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return run


class Document(HTMLParser):
    """Checks that tags nest, and collects attributes and the exact values behind the shown numbers."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.values: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            assert not name.startswith("on"), f"{name} would run a script"
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "xlink:href", "data", "action"):
                self.links.append(value or "")
            if tag == "data" and name == "value":
                self.values.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


def check_markup(text: str) -> Document:
    """One well-formed document that fetches nothing and runs nothing."""
    seen = Document(text)
    assert len(seen.ids) == len(set(seen.ids))
    assert not seen.tags & {"script", "link", "iframe", "object", "embed", "img", "base", "form", "foreignobject"}
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in seen.links)
    assert {link[1:] for link in seen.links if link.startswith("#")} <= set(seen.ids)
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(seen.ids)
    assert not re.search(r"https?://|//[a-z]+\.|@import|javascript:", text.split("<h2>Run it again</h2>")[0])
    for part in re.findall(r"<svg .*?</svg>", text, re.S):
        root = ET.fromstring(part)
        assert root.get("role") == "img" and len(root.get("aria-label") or "") > 20
    return seen


HELPED = (
    "Distillation helped: every client's model gained, 18.3 points of balanced accuracy on average, over training "
    "alone (0.723 against 0.540), and accuracy on the clients' own data stayed level (0.916 against 0.914), for 9.8 MB "
    "up and 3.3 MB down; what left each client is (ε = 9.9, δ = 1e-3) record-level private; the audit finds leakage in "
    "the message, which leaves the client (AUROC 0.62, null band 0.43–0.57)."
)


def test_sentence_when_distillation_helped(tmp_path: Path) -> None:
    run = with_baseline(tmp_path / "run")
    assert sentence(run) == HELPED
    assert verdict(load(run)).tone == "good"


@pytest.mark.parametrize(
    ("balanced", "personal", "start", "part", "tone"),
    [
        (0.509, 0.914, "Distillation hurt: the clients' models ended 3.1 points of balanced accuracy below training "
         "alone (0.509 against 0.540; ", "own data stayed level (0.914 against 0.914)", "bad"),
        (0.72, 0.834, "Distillation helped, at a price: ", "own data fell by 8.0 points (0.834 against 0.914)", "bad"),
        (0.545, 0.95, "Distillation helped on the clients' own data only: balanced accuracy ended within one point of "
         "training alone (0.545 against 0.540; ", "own data rose by 3.6 points (0.950 against 0.914)", "good"),
        (0.545, 0.86, "Distillation hurt: balanced accuracy ended within one point of training alone (0.545 against ",
         "own data fell by 5.4 points (0.860 against 0.914)", "bad"),
        (0.549, 0.914, "Distillation made no clear difference", "clients gained)", "unsure"),
        (0.55, 0.914, "Distillation helped: the clients' models gained 1.0 points of balanced accuracy", "", "good"),
    ],
)  # fmt: skip
def test_sentence_against_the_baseline(
    tmp_path: Path, balanced: float, personal: float, start: str, part: str, tone: str
) -> None:
    said = verdict(load(with_baseline(tmp_path / "run", balanced=balanced, personal=personal)))
    assert said.sentence.startswith(start)
    assert part in said.sentence
    assert said.tone == tone
    assert ("every client's model" in said.sentence) == (balanced == 0.72)


def test_sentence_without_a_baseline(tmp_path: Path) -> None:
    said = sentence(make_run(tmp_path / "run"))
    assert said.startswith(
        "Whether distillation helped is unknown, because there is no run of training alone to compare with: balanced "
        "accuracy ended at 0.723, for 9.8 MB up"
    )


def test_sentence_of_the_baseline_itself(tmp_path: Path, undrawn: None) -> None:
    run = make_run(tmp_path / "run", "local", 0.54, 0.914, eps=None, audit=False, up=0)
    assert sentence(run) == (
        "This is training alone, the baseline itself: balanced accuracy ended at 0.540, with nothing sent; nothing "
        "left the clients; no audit was run."
    )
    assert "Nothing was sent." in page(load(run))


def test_sentence_without_privacy_says_not_private(tmp_path: Path, undrawn: None) -> None:
    run = make_run(tmp_path / "run", eps=None)
    assert "; what left the clients is NOT private (ε = ∞); " in sentence(run)
    text = page(load(run))
    assert 'ε = <data value="inf">∞</data>' in text
    assert "What left the clients is NOT private" in text


def test_infinite_epsilon_is_not_private(tmp_path: Path) -> None:
    run = edit(make_run(tmp_path / "run"), privacy={"epsilon": "inf", "delta": 0, "statement": STATEMENT})
    assert "what left the clients is NOT private (ε = ∞)" in sentence(run)


@pytest.mark.parametrize(
    ("trust", "eps", "expected"),
    [
        ("client", 9.9, "what left each client is (ε = 9.9, δ = 1e-3) record-level private"),
        ("client", 50.0, "what left each client is (ε = 50, a weak guarantee, δ = 1e-3) record-level private"),
        ("server", 3.0, "the server itself sees unprotected messages, but what it gives away is (ε = 3, δ = 1e-3)"),
        ("", 3.0, "to an observer whom the statement does not name, the run is (ε = 3, δ = 1e-3) record-level private"),
    ],
)
def test_sentence_names_whom_the_guarantee_holds_against(tmp_path: Path, trust: str, eps: float, expected: str) -> None:
    said = {**STATEMENT, "epsilon": eps}
    run = edit(make_run(tmp_path / "run"), privacy={"epsilon": eps, "delta": 1e-3, "trust": trust, "statement": said})
    assert expected in sentence(run)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (TARGETS[2:], "no leak was detected in what leaves (AUROC 0.55, null band 0.43–0.57), which is not proof that "
         "there is none."),
        (TARGETS[:1], "the audit looked only at what stays home, so it says nothing of what leaves."),
        ([target("message", True, 0.31, 0.25, 0.38, 1.2)], "the audit of the message fell below its null band (AUROC "),
        ([{**TARGETS[1], "null_low": None}], "the audit of the message, which leaves the client, has no null band"),
        ([], "no audit was run."),
    ],
)  # fmt: skip
def test_sentence_on_the_audit(tmp_path: Path, targets: list[dict[str, Any]], expected: str) -> None:
    run = make_run(tmp_path / "run")
    edit(
        run, audit={"exposure_mean": 2.0, "auroc": 0.6, "chance": {"auroc": 0.5, "exposure": 1.43}, "targets": targets}
    )
    assert expected in sentence(run)


def test_sentence_of_an_unfinished_run(tmp_path: Path) -> None:
    assert "ε = 9.9 is so far spent, with no statement on file" in sentence(
        make_run(tmp_path / "other", finished=False)
    )
    run = make_run(tmp_path / "run", finished=False, rounds=4, eps=None, audit=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"round": 5, "accuracy": {"balanced')  # killed while writing
    said = sentence(run)
    assert said.startswith(
        "Unfinished: the last round on file is 4 of 10, and so far whether distillation helped is unknown"
    )
    assert "balanced accuracy is at 0.723, for 3.9 MB up and 1.3 MB down" in said
    text = page(load(run))
    check_markup(text)
    assert "fedmd on mnist5k" in text.replace("<b>", "").replace("</b>", "")


def test_failures_are_in_the_sentence_and_in_the_table(tmp_path: Path, undrawn: None) -> None:
    run = make_run(tmp_path / "run", failures=True)
    assert sentence(run).endswith("; 1 client answer was lost.")
    assert "<td>4</td><td>3</td><td>NaN in &#x27;logits&#x27;</td>" in page(load(run))


def test_caveats_name_what_does_not_fit(tmp_path: Path) -> None:
    run = with_baseline(tmp_path / "run")
    edit(run, bytes={"up": 5, "down": 3_266_660}, config_hash="ffff0000", rounds=12)
    edit(run / "compare" / "local", seed=1)
    assert verdict(load(run)).caveats == (
        "The rounds add up to 9,800,000 bytes up, but the summary says 5.",
        "The configuration says its hash is 3fa9c1d27b, but the summary says ffff0000.",
        "The baseline is not the same experiment: its seed is 1, this run's is 0.",
        "The run ended after round 10 of 12.",
        "One seed (0): a difference of less than one point is called level.",
    )


def test_full_page_numbers_markup_and_bytes(tmp_path: Path) -> None:
    run = full(tmp_path / "run")
    path = render(run)
    assert path == run / "report.html"
    text = path.read_text(encoding="utf-8")
    seen = check_markup(text)
    summary = json.loads((run / "summary.json").read_text())
    accuracy, sent = summary["accuracy"], summary["bytes"]
    names = ("balanced_mean", "personal_mean", "personal_std", "personal_worst10", "personal_ece", "global")
    expected = [*(accuracy[name] for name in names), sent["up"], sent["down"], 9.9, 1, 42.3]
    assert [float(value) for value in seen.values] == expected
    assert "ECE on own data; server&#x27;s model 0.032" in text or "ECE on own data; server's model 0.032" in text
    parts = ("accuracy", "clients", "comparison", "traffic", "data", "privacy", "audit", "failures", "reproduce")
    places = [text.index(f'<section id="{name}">') for name in parts]
    assert places == sorted(places)
    assert text.count("worse than training alone</span>") == 2
    assert text.count("worse on own data</span>") == 3
    for shown in (
        *STATEMENT["assumptions"],
        *STATEMENT["exclusions"],
        "fedkd run conf/fedmd.toml",
        "9c1d" * 16,
        "torch 2.13.0",
    ):
        assert shown in text
    other = render(run, tmp_path / "elsewhere" / "page.html")
    assert other.read_bytes() == path.read_bytes()
    assert [child.name for child in other.parent.iterdir()] == ["page.html"]


@pytest.mark.parametrize(("clients", "classes"), [(3, 10), pytest.param(160, 242, marks=pytest.mark.slow)])
def test_small_and_large_federations(tmp_path: Path, clients: int, classes: int) -> None:
    run = with_baseline(tmp_path / "run", clients=clients, classes=classes, spread=0.1)
    text = page(load(run))
    check_markup(text)
    assert len(text) < 1_500_000
    assert f"{clients} clients, {classes} classes, " in text


@pytest.mark.parametrize("keep", ["metrics.jsonl", "summary.json"])
def test_one_file_is_enough(tmp_path: Path, keep: str) -> None:
    run = make_run(tmp_path / "run", failures=True)
    for path in run.iterdir():
        if path.name != keep:
            path.unlink()
    check_markup(page(load(run)))


def test_bare_files_still_make_a_page(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"round": 1}\n')
    (tmp_path / "summary.json").write_text("{}")
    text = page(load(tmp_path))
    check_markup(text)
    assert "No balanced accuracy was recorded" in text


EVIL = '<script>alert("1")</script> $x^{2$ & \' ]]> 漢字 \x1b[31m‮ https://example.org'


@pytest.mark.slow
def test_hostile_text_stays_text(tmp_path: Path) -> None:
    run = full(tmp_path / "run")
    (run / "compare" / "dp-sgd own model").rename(run / "compare" / EVIL.replace("/", "|"))
    rows = json.loads((run / "clients.json").read_text())
    (run / "clients.json").write_text(json.dumps([{**row, "model": EVIL} for row in rows]))
    said = {**STATEMENT, "text": EVIL, "assumptions": [EVIL], "unit": EVIL, "view": EVIL}
    evil_targets = [{**one, "target": EVIL} for one in TARGETS]
    edit(run, method=EVIL, dataset=EVIL, seed=EVIL, mechanism=EVIL, command=EVIL, machine=EVIL, versions={EVIL: EVIL},
         privacy={"epsilon": 1, "delta": 1e-3, "statement": said}, audit={"targets": evil_targets})  # fmt: skip
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[0]["failures"] = [{"client": EVIL, "reason": EVIL}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "config.toml").write_text(EVIL)
    text = page(load(run))
    seen = Document(text)
    assert "script" not in seen.tags
    assert all(link.startswith(("#", "data:image/png")) for link in seen.links)
    assert "\x1b" not in text and "‮" not in text
    for part in re.findall(r"<svg .*?</svg>", text, re.S):
        ET.fromstring(part)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "not a run directory"),
        ({"summary.json": "{"}, "is not JSON"),
        ({"summary.json": "[]"}, "should hold a JSON object, got list"),
        ({"metrics.jsonl": 'oops\n{"round": 2}\n'}, "line 1 is not JSON"),
        ({"metrics.jsonl": "{}", "clients.json": "[3]"}, "should hold a JSON object, got int"),
    ],
)
def test_what_is_not_a_run_is_refused(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        render(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a directory"):
        render(tmp_path / "nowhere")


def test_a_resumed_round_counts_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", finished=False, rounds=3)
    line = (run / "metrics.jsonl").read_text().splitlines()[-1]
    with (run / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    assert load(run).up == 3 * 980_000


def test_a_failed_write_keeps_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undrawn: None) -> None:
    run = make_run(tmp_path / "run")
    (run / "report.html").write_text("old")

    def refuse(self: Path, target: Path) -> Path:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        render(run)
    assert (run / "report.html").read_text() == "old"
    assert not list(run.glob(".report*"))


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (epsilon(9.901), "9.91"), (epsilon(9.9), "9.9"), (epsilon(12.01), "12.1"), (epsilon(math.inf), "∞"),
        (epsilon(None), "–"), (size(999), "999 bytes"), (size(9_800_000), "9.8 MB"), (size(0), "0 bytes"),
        (size(999_999), "1.0 MB"), (small(1e-3), "1e-3"), (small(2.5e-5), "2.5e-5"), (small(0.31), "0.31"),
    ],
)  # fmt: skip
def test_numbers_as_written(shown: str, expected: str) -> None:
    assert shown == expected


def test_labels_move_apart_and_keep_their_order() -> None:
    places = [0.50, 0.51, 0.90, 0.52, 0.10]
    moved = apart(places, 0.05)
    assert np.all(np.diff(np.sort(moved)) >= 0.05 - 1e-9)
    assert np.argsort(moved).tolist() == np.argsort(places).tolist()
    assert moved[2] == 0.90 and moved[4] == 0.10


# --- Text -------------------------------------------------------------------------------------------------------------


def secret_results() -> list[SecretResult]:
    """Two targets under two attacks: one knows what was planted, the other nothing."""
    rng = np.random.default_rng(5)
    coins, copies = np.arange(12) % 2 == 0, np.resize([1, 10, 50], 12)
    said = []
    for target, leaves in (("home model", False), ("student", True)):
        for attack in ("as said", "digits only"):
            ranks, swapped = rng.integers(1, 10_001, (2, 12))
            ranks = np.where(coins & (not leaves), 1, ranks)
            said.append(judge(target, attack, leaves, ranks, swapped, copies, coins, 10_000, seed=0))
    return said


def text_run(path: Path, config: str = CONFIG, rows: bool = True) -> Path:
    """A run on text as ``fedkd run`` leaves it."""
    run = make_run(path, "swing", 0.38, 0.40, clients=4, classes=1, rounds=3, eps=None)
    perplexities = {"balanced_perplexity": 8.63, "personal_perplexity": 7.61, "global_perplexity": 7.56}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["accuracy"] |= {name: value + 3 - line["round"] for name, value in perplexities.items()}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = [one.to_json() for one in secret_results()] if rows else []
    audit = {"chance": {"auroc": 0.5, "exposure": 1.44}, "targets": TARGETS, "secrets": said}
    (run / "config.toml").write_text(config)
    return edit(run, accuracy=lines[-1]["accuracy"], dataset="text", audit=audit)


def test_a_page_about_text_speaks_of_next_tokens_perplexity_and_sizes(tmp_path: Path) -> None:
    text = page(load(text_run(tmp_path / "run")))
    check_markup(text)
    assert "DejaVu" not in text  # which a reader may not have
    assert "next-token accuracy ended at 0.380 and perplexity at 8.63" in text
    assert "alanced accuracy" not in text
    assert "It ends at 8.63 on the shared test, and at 7.61 on the clients' own." in text
    assert "4 clients, 1,400 records: a client holds 350." in text
    assert "per class" not in text


def test_secrets_are_told_with_what_they_are_held_against(tmp_path: Path) -> None:
    text = page(load(text_run(tmp_path / "run")))
    assert "12 lines with a random secret each were drawn, and a fair coin for each: 6 were planted" in text
    assert "2 of one, 2 of 10, 2 of 50 make 122 records." in text
    assert "13.29 bits mean that it is the first guess among 10,000 possible ones, and 1.44 bits" in text
    section = text.split('<section id="secrets">')[1].split("</section>")[0]
    for shown in (
        "chance 1.44",
        "most 13.29",
        "not planted",
        "swapped",
        "stays home",
        "leaves the client",
        "50 copies",
    ):
        assert shown in section
    home = secret_results()[0]
    row = '</td><td class="n">'.join(["13.29"] * 3 + ["6 of 6", f"{home.excluded_mean:.2f}", f"{home.swap_mean:.2f}"])
    assert row in section
    twin = text_run(tmp_path / "twin", "[audit]\ntwin = true\n")
    assert "12 secrets were drawn, a coin for each, and none was planted" in page(load(twin))
    assert '<section id="secrets">' not in page(load(text_run(tmp_path / "none", rows=False)))


def test_a_strip_shows_whose_text_is_hot(tmp_path: Path) -> None:
    config = plays.config(plays.write(tmp_path), method={"score": "oracle"})
    shown = of(build(config))
    assert shown is not None and shown.client == 0
    assert all(set(line.heat) <= {None, 2.0} for line in shown.lines[:2])
    hot = ["".join(c for c, t in zip(line.text, line.heat, strict=True) if t == 20.0) for line in shown.lines[2:]]
    assert len(set(hot)) == len(hot) > 0 and all(re.fullmatch(r"\d{4}", digits) for digits in hot)
    run = text_run(tmp_path / "run", config.to_toml())
    text = page(load(run))
    check_markup(text)
    section = text.split('<section id="strip">')[1]
    assert "nobody in the federation sees it" in section and "var(--mono)" in section
    (tmp_path / "plays.jsonl").unlink()
    (run / "config.toml").write_text(config.to_toml().replace("seed = 3", "seed = 4"))
    assert "could not be read again: " in (said := page(load(run))) and "plays.jsonl: expected a file of text" in said


def test_public_text_is_shown_where_that_is_what_is_tempered(tmp_path: Path) -> None:
    config = plays.config(plays.write(tmp_path), "swing_labels", data={"public": 10}, method={"score": "rarity"})
    shown = of(build(config))
    assert shown is not None and shown.client is None and len(shown.lines) == 6
    assert of(build(plays.config(tmp_path / "plays.jsonl", method={"score": "surprisal"}))) is None


def test_a_page_runs_no_method_but_ours(tmp_path: Path) -> None:
    evil = tmp_path / "run"
    text_run(evil, '[method]\nname = "nowhere:Method"\nscore = "regex"\n')
    assert load(evil).strip is None


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_long_records_are_wrapped_and_any_letter_is_a_letter(width: float) -> None:
    letters = ("<&>$_^\n" + "x" * 100)[:100]
    shown = Strip((Heated(letters, (None, *[2.0] * 98, 20.0)), Heated("short", (None, *[11.0] * 4))), 2.0, 20.0, 0)
    with drawing():
        fig = strip(shown, width)
    assert fig is not None
    seen = [one.get_text() for one in fig.axes[0].texts]
    assert "".join(seen) == letters.replace("\n", "↵") + "short"
    assert len({round(one.get_position()[1], 3) for one in fig.axes[0].texts}) == (3 if width == WIDE else 4)
    shades = sorted({round(bar.get_alpha() or 0, 3) for bar in fig.axes[0].patches})
    assert shades == [0.3, 0.6]


def test_the_table_of_secrets_fits_a_terminal() -> None:
    console = Console(width=80, file=None, record=True, quiet=False)
    with console.capture() as caught:
        console.print(
            show.secrets_table([*secret_results(), judge("x", "as said", True, [1], [2], [7], [True], 100, 0)])
        )
    lines = caught.get().splitlines()
    assert "chance 1.40 or 1.44" in lines[0]
    assert lines[1].split() == ["audited", "attack", "1x", "7x", "10x", "50x", "not", "planted", "swapped", "p"]
    assert len(lines) == 7 and "…" not in caught.get()
    home = secret_results()[0]
    assert lines[2].split()[:8] == ["home", "model", "as", "said", "13.29", "-", "13.29", "13.29"]
    assert lines[2].split()[8:10] == [f"{home.excluded_mean:.2f}", f"{home.swap_mean:.2f}"]
    assert lines[3].lstrip().startswith("digits only")
    assert lines[6].split()[:8] == ["x", "as", "said", "-", "6.64", "-", "-", "-"]
