"""Read a run directory into a `Run`; tolerant of what is missing, strict about what is not a run."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.report.model import Accuracy, ClientRow, Failure, Round, Run
from experiments.report.read_privacy import read_audit, read_privacy
from experiments.report.read_strip import read_strip
from experiments.report.values import count, flat, items, mapping, number, plain
from fedkd.errors import ConfigError


def load(run_dir: Path) -> Run:
    """Read a run and the runs it is compared with.

    Args:
        run_dir: a directory with ``metrics.jsonl``, ``summary.json`` or both.

    Returns:
        The run; ``compare`` holds one run per readable folder of ``run_dir/compare``, by name.

    Raises:
        ConfigError: `run_dir` is not a run directory, or one of its files is not what it should be.
    """
    folder = run_dir / "compare"
    others = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    run = _read(run_dir, plain(run_dir.name), tuple(_read(path, plain(path.name), ()) for path in others))
    return replace(run, strip=read_strip(run_dir / "config.toml", _config(run.config_text))) if run.is_text else run


def _read(path: Path, label: str, compare: tuple[Run, ...]) -> Run:
    """Read one directory."""
    if not path.is_dir():
        raise ConfigError(f"report: '{path}' is not a directory; expected the output directory of a run")
    rounds, summary = _rounds(path / "metrics.jsonl"), _json(path / "summary.json")
    if rounds is None and summary is None:
        raise ConfigError(f"report: '{path}' has neither metrics.jsonl nor summary.json, so it is not a run directory")
    head = mapping(summary, path / "summary.json") if summary is not None else {}
    text = _text(path / "config.toml")
    config = _config(text)
    rows = _clients(path / "clients.json")
    lines, told = rounds or (), mapping(head.get("bytes"), None)
    sent = {way: count(told.get(way)) for way in ("up", "down")}
    return Run(
        label=label,
        finished=summary is not None,
        method=plain(head.get("method") or _find(config, "method") or "unknown method"),
        dataset=plain(head.get("dataset") or _find(config, "dataset") or _find(config, "data") or "unknown data"),
        seed=plain(head.get("seed", _find(config, "seed"))),
        clients=count(head.get("clients")) or len(rows) or count(_find(config, "clients")),
        planned=count(head.get("rounds")) or count(_find(config, "rounds")),
        mechanism=_mechanism(head, config),
        accuracy=_final(head, lines),
        up=sent["up"] if sent["up"] is not None else _total(lines, "up"),
        down=sent["down"] if sent["down"] is not None else _total(lines, "down"),
        privacy=read_privacy(head.get("privacy")),
        audit=read_audit(head.get("audit")),
        failures=_failures(head, lines),
        seconds=_seconds(head, lines),
        rounds=lines,
        rows=rows,
        compare=compare,
        config_text=plain(text),
        facts=_facts(head, text),
        warnings=tuple(_doubts(head, sent, lines, text)),
        twin=mapping(config.get("audit"), None).get("twin") is True,
    )


def _text(path: Path) -> str:
    """A text file, or nothing."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _json(path: Path) -> Any:
    """A JSON file, or None when there is none."""
    if not path.is_file():
        return None
    try:
        return json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise ConfigError(f"report: '{path}' is not JSON ({error}); was it edited or cut short?") from error


def _rounds(path: Path) -> tuple[Round, ...] | None:
    """The metrics, by round; a last line cut short by a crash is left out, a resumed round counts once."""
    if not path.is_file():
        return None
    lines = [line for line in _text(path).splitlines() if line.strip()]
    found: dict[int, Round] = {}
    for place, line in enumerate(lines, start=1):
        try:
            one = _round(mapping(json.loads(line), path), place)
        except json.JSONDecodeError as error:
            if place == len(lines):
                break
            raise ConfigError(f"report: '{path}', line {place} is not JSON ({error})") from error
        found[one.number] = one
    return tuple(found[key] for key in sorted(found))


def _round(line: Mapping[str, Any], place: int) -> Round:
    """One line of the metrics."""
    asked = count(line.get("round"))
    at = place if asked is None else asked
    told = mapping(line.get("bytes"), None)
    lost = (mapping(one, None) for one in items(line.get("failures")))
    return Round(
        number=at,
        cohort=count(line.get("cohort")),
        accuracy=_accuracy(line.get("accuracy")),
        up=count(told.get("up")) or 0,
        down=count(told.get("down")) or 0,
        epsilon=number(line.get("epsilon")),
        failures=tuple(Failure(at, plain(one.get("client")), plain(one.get("reason"))) for one in lost),
        seconds=number(line.get("seconds")),
    )


def _accuracy(value: Any) -> Accuracy:
    """The accuracies and calibration errors of one scoring."""
    told = mapping(value, None)
    names = (
        "balanced_mean",
        "personal_mean",
        "personal_std",
        "personal_worst10",
        "global",
        "personal_ece",
        "global_ece",
        "balanced_perplexity",
        "personal_perplexity",
        "global_perplexity",
    )
    return Accuracy(*(number(told.get(name)) for name in names))


def _final(head: Mapping[str, Any], rounds: Iterable[Round]) -> Accuracy:
    """The summary's accuracy, else that of the last scored round."""
    if head.get("accuracy") is not None:
        return _accuracy(head["accuracy"])
    scored = [line.accuracy for line in rounds if line.accuracy != Accuracy()]
    return scored[-1] if scored else Accuracy()


def _clients(path: Path) -> tuple[ClientRow, ...]:
    """The clients, by number."""
    rows = [_client(mapping(one, path), place) for place, one in enumerate(items(_json(path)))]
    return tuple(sorted(rows, key=lambda row: row.client))


def _client(told: Mapping[str, Any], place: int) -> ClientRow:
    """One client of ``clients.json``."""
    asked = count(told.get("client"))
    return ClientRow(
        client=place if asked is None else asked,
        model=plain(told.get("model") or "model"),
        train=count(told.get("train")),
        test=count(told.get("test")),
        classes=tuple(count(value) or 0 for value in items(told.get("classes"))),
        balanced=number(told.get("balanced")),
        personal=number(told.get("personal")),
        epsilon=number(told.get("epsilon")),
    )


def _config(text: str) -> Mapping[str, Any]:
    """The resolved configuration; a page can do without it."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return {}


def _find(tree: Mapping[str, Any], key: str) -> Any:
    """The first plain value under `key`, or under a table of that name its ``name``."""
    value = tree.get(key)
    if isinstance(value, Mapping):
        value = value.get("name", value.get("number", value.get("count")))
    if value is not None and not isinstance(value, Mapping | list):
        return value
    inner = (_find(branch, key) for branch in tree.values() if isinstance(branch, Mapping))
    return next((found for found in inner if found is not None), None)


def _mechanism(head: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The mechanism's name, "none" when nothing guards the messages."""
    told = head.get("mechanism", _find(config, "mechanism"))
    return plain(told["name"] if isinstance(told, Mapping) and "name" in told else told or "none")


def _total(rounds: tuple[Round, ...], way: str) -> int | None:
    """Bytes of all rounds in one direction."""
    return sum(getattr(line, way) for line in rounds) if rounds else None


def _failures(head: Mapping[str, Any], rounds: tuple[Round, ...]) -> int:
    """How many answers were lost."""
    told = head.get("failures")
    if isinstance(told, list):
        return len(told)
    known = count(told)
    return sum(len(line.failures) for line in rounds) if known is None else known


def _seconds(head: Mapping[str, Any], rounds: tuple[Round, ...]) -> float | None:
    """Wall-clock time of the run."""
    known = number(head.get("seconds"))
    times = [line.seconds for line in rounds if line.seconds is not None]
    return known if known is not None else (math.fsum(times) if times else None)


def _comment_hash(text: str) -> str:
    """The hash in the first comment line of a resolved configuration: its longest hexadecimal word."""
    first = text.lstrip().splitlines()[0] if text.strip() else ""
    words = "".join(c if c.isalnum() else " " for c in first.lstrip("#")).split() if first.startswith("#") else []
    hashes = [word for word in words if len(word) >= 8 and set(word.lower()) <= set("0123456789abcdef")]
    return max(hashes, key=len, default="")


def _facts(head: Mapping[str, Any], text: str) -> dict[str, str]:
    """What someone needs to run it again."""
    facts = {"command": head.get("command"), "config hash": head.get("config_hash") or _comment_hash(text)}
    facts |= {"state hash": head.get("state_hash"), "versions": flat(head.get("versions"))}
    facts |= {"machine": head.get("machine")}
    return {name: plain(value) for name, value in facts.items() if value}


def _doubts(
    head: Mapping[str, Any], sent: Mapping[str, int | None], rounds: tuple[Round, ...], text: str
) -> Iterable[str]:
    """Files of one run that contradict one another."""
    for way in ("up", "down"):
        total = sum(getattr(line, way) for line in rounds)
        if rounds and sent[way] is not None and sent[way] != total:
            yield f"The rounds add up to {total:,} bytes {way}, but the summary says {sent[way]:,}."
    noted, stated = _comment_hash(text), plain(head.get("config_hash") or "")
    if noted and stated and not (noted.startswith(stated) or stated.startswith(noted)):
        yield f"The configuration says its hash is {noted}, but the summary says {stated}."
