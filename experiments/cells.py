"""What a sweep runs: cells of a grid, given on the command line or written down in a sweep file, times seeds."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.lists import MOST, parse_seeds, readable, split_values
from fedkd.config import Config
from fedkd.errors import ConfigError
from fedkd.overrides import Raw, override, read_toml
from fedkd.registry import near

LONGEST = 150  # bytes of a label, which names a folder
FILE_KEYS = ("base", "seeds", "grid", "cells")
CELL_KEYS = ("label", "overrides", "grid")
ALONE = "base"  # the label of a sweep over nothing but seeds

Grid = Mapping[str, Sequence[str]]  # key -> values as TOML or bare text


@dataclass(frozen=True)
class Cell:
    """One condition.

    Attributes:
        label: Names it in tables and figures, and its folder.
        overrides: ``key=value`` against the base.
        notes: Fields of the base that the overrides made moot.
        config: The configuration with the first seed.
    """

    label: str
    overrides: tuple[str, ...]
    notes: tuple[str, ...]
    config: Config


@dataclass(frozen=True)
class Plan:
    """A whole sweep."""

    cells: tuple[Cell, ...]
    seeds: tuple[int, ...]

    def runs(self) -> Iterator[tuple[Cell, Config]]:
        """All runs, seed by seed, so that a sweep cut short still has whole comparisons."""
        for seed, cell in itertools.product(self.seeds, self.cells):
            yield cell, replace(cell.config, seed=seed)

    def to_json(self) -> dict[str, Any]:
        """What is run where; its hash changes with any label, seed or configuration."""
        hashes: dict[str, dict[str, str]] = {cell.label: {} for cell in self.cells}
        for cell, config in self.runs():
            hashes[cell.label][str(config.seed)] = config.hash
        cells = [
            {
                "label": cell.label,
                "overrides": list(cell.overrides),
                "notes": list(cell.notes),
                "config": {k: v for k, v in cell.config.raw().items() if k not in ("seed", "compare")},
                "config_hash": hashes[cell.label],
            }
            for cell in self.cells
        ]
        name = hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()[:16]
        return {"hash": name, "seeds": list(self.seeds), "cells": cells}


def plan(conf: Path, arguments: Sequence[str] = (), seeds: str | None = None) -> Plan:
    """Work out all cells, and that each is a valid configuration.

    Args:
        conf: A configuration, or a sweep file: ``base`` (a path relative to the file), ``seeds``, ``[grid]`` (key ->
            list of values) and ``[[cells]]`` (``label``, ``overrides``, and a ``grid`` of its own if need be). The
            cells stand beside the grid, not across it.
        arguments: ``key=a,b,c``; several values sweep the key, one value holds for all cells.
        seeds: Such as ``0..4`` or ``0,2,5``; default those of the file.

    Raises:
        ConfigError: Something is not valid; a cell is named.
    """
    raw = read_toml(conf)
    given = [_argument(text) for text in arguments]
    _once([key for key, _ in given])
    if "base" in raw:
        swept = [key for key, values in given if len(values) > 1]
        if swept:
            raise ConfigError(f"sweep: {swept[0]} has several values, but {conf} is a sweep file; put it in its [grid]")
        base = read_toml(conf.parent / _text(raw, "base"))
        fixed = [f"{key}={values[0]}" for key, values in given]
        conditions = _from_file(raw)
        _both(fixed, conditions)
    else:
        base, fixed, conditions = raw, [], list(_product("", (), dict(given)))
    wanted = parse_seeds(seeds if seeds is not None else raw.get("seeds", base.get("seed", 0)))
    if len(conditions) * len(wanted) > MOST:
        raise ConfigError(f"sweep: {len(conditions)} cells x {len(wanted)} seeds are more than {MOST} runs; split it")
    cells = [_cell(base, label, [*fixed, *row], wanted[0]) for label, row in _named(conditions)]
    _distinct(cells)
    return Plan(tuple(cells), tuple(wanted))


def _argument(text: str) -> tuple[str, list[str]]:
    key, sep, value = text.partition("=")
    key = key.strip()
    if not sep or not key:
        raise ConfigError(f"sweep: expected key=value or key=a,b,c, such as method.mu=0.1,1, got '{text}'")
    _sweepable(key)
    values = split_values(value)
    if "" in values:
        raise ConfigError(f'sweep: {text} has an empty value; write "" for an empty text')
    return key, values


def _sweepable(key: str) -> None:
    if key == "seed":
        raise ConfigError("sweep: seeds are given by --seeds, such as --seeds 0..4")
    if key.partition(".")[0] == "compare":
        raise ConfigError(f"sweep: {key} has no effect, because the runs of a sweep have no comparison rows")


def _from_file(raw: Raw) -> list[tuple[str, tuple[str, ...]]]:
    """Label and overrides of each condition of a sweep file."""
    _known("", raw, FILE_KEYS)
    listed = raw.get("cells", [])
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise ConfigError("cells: expected tables, each under [[cells]]")
    grid = dict(_grid("grid", raw.get("grid", {})))
    conditions = list(_product("", (), grid)) if grid or not listed else []
    for one in listed:
        _known("cells.", one, CELL_KEYS)
        label, overrides = _text(one, "label", "cells."), one.get("overrides", [])
        if any(c in label for c in "/\\\0\n") or label.startswith(".") or len(label.encode()) > LONGEST:
            raise ConfigError(f"cells.label: expected a label that can name a folder, got {label!r}")
        if not isinstance(overrides, list) or not all(isinstance(item, str) for item in overrides):
            raise ConfigError(f"cells.'{label}'.overrides: expected a list of key=value, got {overrides!r}")
        keys = [item.partition("=")[0].strip() for item in overrides]
        own = dict(_grid(f"cells.'{label}'.grid", one.get("grid", {})))
        _once([*keys, *own])
        for key in keys:
            _sweepable(key)
        conditions += _product(label, tuple(overrides), own)
    return conditions


def _grid(name: str, raw: Any) -> Iterator[tuple[str, list[str]]]:
    """Values by dotted key; ``a.b = []`` and ``"a.b" = []`` are the same."""
    if not isinstance(raw, dict):
        raise ConfigError(f"{name}: expected a table of key = [values], got {raw!r}")
    rows = list(_flat(raw))
    _once([key for key, _ in rows])
    for key, values in rows:
        _sweepable(key)
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{name}.{key}: expected a list of values, got {values!r}")
        try:
            yield key, [json.dumps(value, ensure_ascii=False) for value in values]
        except TypeError:
            raise ConfigError(f"{name}.{key}: expected text, numbers or lists of these, got {values!r}") from None


def _flat(raw: Raw, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in raw.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _product(label: str, overrides: tuple[str, ...], grid: Grid) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every combination; the label names only keys that have several values."""
    size = 1
    for values in grid.values():
        size *= len(values)
    if size > MOST:
        raise ConfigError(f"sweep: the grid has {size} cells, more than {MOST}; split it")
    for row in itertools.product(*grid.values()):
        pairs = list(zip(grid, row, strict=True))
        parts = [f"{key}={readable(value)}" for key, value in pairs if len(grid[key]) > 1]
        name = ",".join([label, *parts] if label else parts)
        yield name or ALONE, (*overrides, *(f"{key}={value}" for key, value in pairs))


def _named(conditions: list[tuple[str, tuple[str, ...]]]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Labels that are short enough and, on any file system, distinct: the others end in a hash of the overrides."""
    uses = Counter(label.casefold() for label, _ in conditions)
    for label, row in conditions:
        if uses[label.casefold()] > 1 or len(label.encode()) > LONGEST:
            mark = hashlib.sha256(json.dumps(row).encode()).hexdigest()[:8]
            label = f"{label.encode()[: LONGEST - 9].decode(errors='ignore')}~{mark}"
        yield label, row


def _cell(base: Raw, label: str, overrides: list[str], seed: int) -> Cell:
    try:
        raw, notes = override(base, overrides)
        raw.pop("compare", None)  # a sweep is the comparison
        return Cell(label, tuple(overrides), tuple(notes), Config.from_raw({**raw, "seed": seed}))
    except ConfigError as error:
        raise ConfigError(f"cell '{label}': {error}") from None


def _distinct(cells: list[Cell]) -> None:
    seen: dict[str, str] = {}
    for cell in cells:
        if seen.setdefault(cell.config.to_json(), cell.label) != cell.label:
            other = seen[cell.config.to_json()]
            raise ConfigError(f"sweep: cells '{other}' and '{cell.label}' are the same configuration; drop one")
    twice = [label for label, uses in Counter(cell.label for cell in cells).items() if uses > 1]
    if twice:
        raise ConfigError(f"sweep: two cells are called '{twice[0]}'")


def _both(fixed: list[str], conditions: Iterable[tuple[str, Iterable[str]]]) -> None:
    keys = {text.partition("=")[0] for text in fixed}
    for label, row in conditions:
        for key in keys & {text.partition("=")[0].strip() for text in row}:
            raise ConfigError(f"sweep: {key} is given here, but cell '{label}' of the sweep file sets it too")


def _once(keys: list[str]) -> None:
    twice = [key for key, uses in Counter(keys).items() if uses > 1]
    if twice:
        raise ConfigError(f"sweep: {twice[0]} is given twice; write {twice[0]}=a,b to sweep it")


def _known(prefix: str, raw: Raw, keys: tuple[str, ...]) -> None:
    for key in raw:
        if key not in keys:
            raise ConfigError(f"unknown key '{prefix}{key}'; expected one of {', '.join(keys)}{near(key, [*keys])}")


def _text(raw: Raw, key: str, prefix: str = "") -> str:
    value = raw.get(key)
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{prefix}{key}: expected a text, got {value!r}")
    return value
