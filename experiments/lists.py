"""Lists as they are written on a command line: values of a key, seeds."""

from __future__ import annotations

import re
from typing import Any

from fedkd.errors import ConfigError
from fedkd.overrides import override

MOST = 10_000  # runs of one sweep
_STRING = re.compile(r'"""(?:[^\\]|\\.)*?"""|\'\'\'.*?\'\'\'|"(?:[^"\\]|\\.)*"|\'[^\']*\'', re.DOTALL)
_SEEDS = re.compile(r"\s*(\d{1,18})(?:\s*\.\.\s*(\d{1,18}))?\s*", re.ASCII)


def split_values(text: str) -> list[str]:
    """Split at commas, but not inside a TOML array, table or string.

    As in TOML, a quote or a bracket opens something only where a value begins; inside bare text it is a character.

    Example:
        >>> split_values('["mlp", "cnn"],["cnn"]'), split_values("3, 10"), split_values("it's,a")
        (['["mlp", "cnn"]', '["cnn"]'], ['3', '10'], ["it's", 'a'])
    """
    pieces, start, depth, i = [], 0, 0, 0
    while i < len(text):
        c, opens = text[i], depth or not text[start:i].strip()
        if opens and c in "\"'":
            found = _STRING.match(text, i)
            if found is None:
                raise ConfigError(f"sweep: a quote is not closed in {text}")
            i = found.end()
            continue
        if opens and c in "[{":
            depth += 1
        elif depth and c in "]}":
            depth -= 1
        elif c == "," and not depth:
            pieces.append(text[start:i].strip())
            start = i + 1
        i += 1
    if depth:
        raise ConfigError(f"sweep: a bracket is not closed in {text}")
    return [*pieces, text[start:].strip()]


def parse_seeds(given: Any) -> list[int]:
    """Seeds as ``0..4`` (both ends included), ``0,2,5``, a number, or a list of numbers.

    Example:
        >>> parse_seeds("0..2,7"), parse_seeds(3)
        ([0, 1, 2, 7], [3])
    """
    expected = f"seeds: expected such as 0..4 or 0,2,5, got {given!r}"
    parts = given.split(",") if isinstance(given, str) else given if isinstance(given, list) else [given]
    seeds: list[int] = []
    for part in parts:
        found = _SEEDS.fullmatch(str(part)) if isinstance(part, str | int) and not isinstance(part, bool) else None
        if found is None:
            raise ConfigError(expected)
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first or last - first >= MOST:
            raise ConfigError(f"{expected}; a range goes up, over at most {MOST} seeds")
        seeds += range(first, last + 1)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"{expected}; each seed once")
    return seeds


def readable(text: str) -> str:
    """A value, as TOML or bare text, in letters that a folder's name can have.

    Example:
        >>> readable('["mlp", "cnn"]'), readable("2e-3"), readable("'a/b'")
        ('mlp+cnn', '2e-3', 'a_b')
    """
    value = override({}, [f"v={text}"])[0]["v"]
    shown = "+".join(map(str, value)) if isinstance(value, list) else value if isinstance(value, str) else text.strip()
    return re.sub(r"[^\w.+-]+", "_", shown) or "empty"
