"""A run's directory: what is in it, written so that a kill leaves each file old or new, never half."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from fedkd.config import Config, load
from fedkd.errors import ConfigError

CONFIG, METRICS, TRANSCRIPT = "config.toml", "metrics.jsonl", "transcript.jsonl"
LEDGER, SUMMARY, CLIENTS, CHECKPOINT, COMPARE = "ledger.json", "summary.json", "clients.json", "checkpoint", "compare"
HOMES, SECRETS = "homes", "secrets.json"


def write(path: Path, text: str) -> None:
    """Write beside, then rename."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def write_json(path: Path, value: Any) -> None:
    """JSON, indented; numbers that JSON does not know are an error rather than invalid output."""
    write(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def append(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Add lines to a JSON-lines file."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record, allow_nan=False) + "\n" for record in records)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of a JSON-lines file; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def truncate(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drop lines that a resumed run will write again."""
    lines = [record for record in read_lines(path) if keep(record)]
    write(path, "".join(json.dumps(record) + "\n" for record in lines))


def fresh(out: Path) -> None:
    """Make a new run directory.

    Raises:
        ConfigError: It exists and is not empty; nothing in it is touched.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: not empty; choose another --out, or --resume the run that is there")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be made ({error})") from None


def config_of(directory: Path) -> Config:
    """The configuration of the run in a directory.

    Raises:
        ConfigError: The directory holds no run.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise ConfigError(f"{directory}: no {CONFIG} here; expected the directory of a run")
    return load(path)[0]


def same_config(out: Path, config: Config) -> None:
    """Check that a directory holds a run of this configuration.

    Raises:
        ConfigError: It does not.
    """
    path = out / CONFIG
    if not path.is_file():
        raise ConfigError(f"{out}: no {CONFIG} here, so there is no run to resume; run without --resume")
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    if first != f"# config hash {config.hash}":
        raise ConfigError(f"{out}: holds a run with {first.lstrip('# ')}, not {config.hash}; choose another --out")
