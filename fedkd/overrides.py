"""TOML, and ``key=value`` overrides of it."""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedkd.data.datasets import TEXTS
from fedkd.errors import ConfigError
from fedkd.registry import method_class
from fedkd.sections import ENGINE_FIELDS, MECHANISMS, PARTITION_FIELD, NoPrivacy

Raw = dict[str, Any]
"""A configuration as parsed, not yet validated."""


def read_toml(path: Path) -> Raw:
    """Parse a TOML file.

    Raises:
        ConfigError: It is missing, cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give the path of a TOML configuration") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML ({error})") from None


def override(raw: Raw, overrides: Iterable[str]) -> tuple[Raw, list[str]]:
    """Apply ``key=value`` overrides to a nested mapping; ``key=`` takes a key away, so that its default holds.

    Overriding a ``name``, ``partition`` or ``mechanism`` drops the fields that only its predecessor had, unless they
    are overridden too; an unknown key stays, to be refused by `Config.from_raw`.
    """
    raw = copy.deepcopy(raw)
    given: dict[str, Any] = {}
    for text in overrides:
        key, sep, value = text.partition("=")
        if not sep or not key.strip():
            raise ConfigError(f"override: expected key=value, such as method.mu=0.1, got '{text}'")
        given[key.strip()] = _value(value.strip())
    notes = [note for key, value in given.items() for note in _drop(raw, key, value, given)]
    for key, value in given.items():
        *tables, last = key.split(".")
        table = raw
        for name in tables:
            table = table.setdefault(name, {})
            if not isinstance(table, dict):
                raise ConfigError(f"override: '{key}' does not name a field, because '{name}' is not a table")
        if value is None:
            table.pop(last, None)
        else:
            table[last] = value
    return raw, notes


def _value(text: str) -> Any:
    if not text:
        return None
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def _drop(raw: Raw, key: str, value: Any, given: Mapping[str, Any]) -> list[str]:
    """Delete what only the predecessor of a newly chosen variant had; return notes."""
    section, _, last = key.partition(".")
    table = raw.get(section)
    if not isinstance(table, dict) or not isinstance(value, str):
        return []
    notes = []
    data = raw.get("data")
    public = data.get("public") if isinstance(data, dict) else None
    if key == "method.name" and isinstance(public, int) and public and not method_class(value).needs_public:
        raw["data"]["reserve"] = raw["data"].get("reserve", 0) + raw["data"].pop("public")
        notes.append(f"{value} uses no public set: data.public={public} is held out as data.reserve instead")
    old, new = _fields(key, table.get(last)), _fields(key, value)
    for name in [n for n in table if n in old and n not in new and f"{section}.{n}" not in given]:
        notes.append(f"{section}.{name}={table.pop(name)} dropped: {key}={value} has no such field")
    return notes


def _fields(key: str, variant: Any) -> set[str]:
    """Names of the fields that a variant has, for the keys that choose one."""
    if not isinstance(variant, str):
        variant = ""
    if key == "method.name":
        return set(method_class(variant or "local").model_fields)
    if key == "privacy.mechanism":
        return set(MECHANISMS.get(variant or "none", NoPrivacy).model_fields)
    if key == "data.partition":
        return {PARTITION_FIELD[variant]} if variant in PARTITION_FIELD else set()
    if key == "data.name":
        own = {"path"} if variant in ("files", "text") else set()
        return own | {"context", "vocabulary"} if variant in TEXTS else own
    if key == "data.pool":
        return {"pool_path"} if variant == "files" else set()
    if key == "engine.name":
        return ENGINE_FIELDS.get(variant, set())
    return set()
