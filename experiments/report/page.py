"""Put the page together and write it."""

from __future__ import annotations

import os
import tempfile
from html import escape
from pathlib import Path

from experiments.report import sections
from experiments.report.load import load
from experiments.report.look import CSS
from experiments.report.model import Run
from experiments.report.tables import tiles
from experiments.report.values import plural
from experiments.report.verdict import verdict

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def render(run_dir: Path, out: Path | None = None) -> Path:
    """Write one self-contained page about a run.

    Args:
        run_dir: the run's directory: ``metrics.jsonl``, ``summary.json`` or both, and what else there is of
            ``config.toml``, ``clients.json`` and ``compare/<label>/``.
        out: where to write; ``run_dir/report.html`` when left out.

    Returns:
        The path of the page. Equal directories give equal bytes (where soft targets of text were tempered, with equal
        data at the configuration's path); the page runs no script and fetches nothing.

    Raises:
        ConfigError: `run_dir` is not a run directory, or one of its files cannot be read; nothing is written.
    """
    target = run_dir / "report.html" if out is None else out
    _write(target, page(load(run_dir)))
    return target


def page(run: Run) -> str:
    """The whole document."""
    parts = [(name, title, body) for name, title, draw in sections.ALL if (body := draw(run))]
    links = "".join(f'<a href="#{name}">{escape(title)}</a>\n' for name, title, _ in parts)
    body = "".join(
        f'<section id="{name}">\n<h2>{escape(title)}</h2>\n{text}</section>\n' for name, title, text in parts
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8" />\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}" />\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1" />\n'
        f"<title>{escape(run.method)} on {escape(run.dataset)}: fedkd report</title>\n<style>{CSS}</style>\n</head>\n"
        f"<body>\n<main>\n<header>\n{_eyebrow(run)}{_verdict(run)}</header>\n{tiles(run)}"
        f'<nav aria-label="Sections" style="margin-top:22px">\n{links}</nav>\n{body}'
        f"<footer>Written by fedkd from the files of the run; it holds no script and fetches nothing.</footer>\n"
        f"</main>\n</body>\n</html>\n"
    )


def _eyebrow(run: Run) -> str:
    """What was run, in one line."""
    facts = [f"<b>{escape(run.method)}</b> on {escape(run.dataset)}"]
    if run.clients:
        facts.append(plural(run.clients, "client"))
    rounds = run.planned or len(run.rounds)
    facts += [plural(rounds, "round")] if rounds else []
    facts += [f"mechanism: {escape(run.mechanism)}"] + ([f"seed {escape(run.seed)}"] if run.seed else [])
    return f'<p class="eyebrow">{" · ".join(facts)}</p>\n'


def _verdict(run: Run) -> str:
    """The sentence, and what to keep in mind."""
    said = verdict(run)
    heading = f"<h1><strong>{escape(said.lead)}</strong>{escape(said.rest)}</h1>"
    notes = "".join(f"<li>{escape(note)}</li>\n" for note in said.caveats)
    return f'<div class="verdict {said.tone}">{heading}</div>\n<ul class="caveats">\n{notes}</ul>\n' if notes else (
        f'<div class="verdict {said.tone}" style="margin-bottom:30px">{heading}</div>\n'
    )  # fmt: skip


def _write(target: Path, text: str) -> None:
    """Write beside the target, then rename: a reader sees the old page or the new one, never half of one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    beside = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        beside.chmod(0o644)
        beside.replace(target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
