"""Careful readers for values out of JSON, and the one way each kind of number is written on the page."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedkd.errors import ConfigError

DASH = "–"


def number(value: Any) -> float | None:
    """A float; the string "inf" is infinity; anything else, NaN included, is missing."""
    if isinstance(value, str):
        return math.inf if value.strip().lower() in ("inf", "infinity", "+inf") else None
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        return None
    return float(value)


def count(value: Any) -> int | None:
    """A whole number, or missing."""
    known = number(value)
    return None if known is None or math.isinf(known) else int(known)


def plain(value: Any) -> str:
    """Text that any markup or figure can carry: control characters, lone surrogates and direction marks go."""
    return "".join("�" if _unprintable(c) else c for c in ("" if value is None else str(value)))


def _unprintable(c: str) -> bool:
    """Whether a character is not text: no glyph, not allowed in XML, or able to turn a line around."""
    turns = "\u202a" <= c <= "\u202e" or "\u2066" <= c <= "\u2069"
    return turns or (c not in "\n\t" and unicodedata.category(c) in ("Cc", "Cs", "Cn"))


def short(text: str, limit: int) -> str:
    """`text` cut to `limit` characters for a figure, with an ellipsis where something is gone."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


def items(value: Any) -> list[Any]:
    """A list, empty when there is none."""
    return value if isinstance(value, list) else []


def mapping(value: Any, path: Path | None) -> Mapping[str, Any]:
    """A JSON object; from a file that must hold one, anything else is an error."""
    if isinstance(value, Mapping):
        return value
    if path is None:
        return {}
    raise ConfigError(f"report: '{path}' should hold a JSON object, got {type(value).__name__}")


def flat(value: Any) -> str:
    """A small table of versions on one line."""
    return ", ".join(f"{key} {value[key]}" for key in sorted(value)) if isinstance(value, Mapping) else plain(value)


def fraction(value: float | None) -> str:
    """An accuracy or an AUROC: three decimals."""
    return DASH if value is None else f"{value:.3f}"


def hundredths(value: float | None) -> str:
    """A perplexity, or an exposure in bits: two decimals."""
    return DASH if value is None else f"{value:.2f}"


def points(difference: float) -> str:
    """A difference of two accuracies in percentage points, without sign."""
    return f"{abs(difference) * 100:.1f} points"


def signed(difference: float) -> str:
    """A difference of two accuracies in percentage points, with sign."""
    return f"{'+' if difference >= 0 else '−'}{points(difference)}"


def size(value: float | None) -> str:
    """Bytes in decimal units: 9.8 MB."""
    if value is None:
        return DASH
    scale, unit = unit_of(value)
    return f"{value / scale:.0f} {unit}" if scale == 1 or value / scale >= 100 else f"{value / scale:.1f} {unit}"


def unit_of(value: float) -> tuple[float, str]:
    """The decimal unit in which `value` bytes is a handy number."""
    for scale, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= 0.99995 * scale:
            return scale, unit
    return 1.0, "bytes"


def epsilon(value: float | None) -> str:
    """A privacy loss, rounded up: never less than what was spent. Two decimals below 10, one below 100."""
    if value is None:
        return DASH
    if math.isinf(value):
        return "∞"
    scale = 100 if value < 10 else 10 if value < 100 else 1
    return f"{math.ceil(value * scale - 1e-6) / scale:.10g}"


def small(value: float | None) -> str:
    """A delta or a p-value: 1e-3, 2.5e-4, 0.04."""
    if value is None:
        return DASH
    if value == 0 or value >= 0.01:
        return f"{value:.2g}"
    mantissa, power = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(power)}"


def duration(value: float | None) -> str:
    """Seconds, or minutes and hours where those read better."""
    if value is None:
        return DASH
    if value < 120:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"


def plural(n: int, word: str) -> str:
    """1 client, 2 clients."""
    return f"{n:,} {word}{'' if n == 1 else 's'}"
