"""What there is to choose from, as a table on a terminal or in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from fedkd.config import describe
from fedkd.data.datasets import DATASETS, TEXTS
from fedkd.errors import ConfigError
from fedkd.models import MODELS
from fedkd.registry import METHODS, method_class
from privacy.mechanisms import ABOUT

Row = tuple[str, ...]
METHOD: Row = ("method", "exchanged", "mixed models", "public data", "evidence", "what it does")


def text(what: str, markdown: bool = False) -> str:
    """A list, one line each.

    Raises:
        ConfigError: There is no such list.
    """
    if what not in LISTS:
        raise ConfigError(f"list: expected one of {', '.join(LISTS)}, got '{what}'")
    heads, rows = LISTS[what]
    return _markdown([heads, *rows()]) if markdown else _plain([heads, *rows()] if heads is METHOD else list(rows()))


def _plain(rows: list[Row]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _markdown(rows: list[Row]) -> str:
    first, *rest = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    body = [[f"`{name}`", *cells] for name, *cells in rest]
    lines = [[head.capitalize() for head in first], ["---"] * len(first), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _methods() -> Iterator[Row]:
    for name, (_, about) in METHODS.items():
        kind = method_class(name)
        yield name, kind.sends, _yes(not kind.same_model), _yes(kind.needs_public), kind.evidence, about


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _datasets() -> Iterator[Row]:
    for name, source in DATASETS.items():
        yield name, source.description
    yield from TEXTS.items()


def _models() -> Iterator[Row]:
    for name, (_, about) in MODELS.items():
        yield name, about


def _keys() -> Iterator[Row]:
    for section, keys in describe().items():
        for name, (about, default) in keys.items():
            yield f"{section}.{name}", f"{about} (default {default!r})" if about else f"(default {default!r})"


LISTS: dict[str, tuple[Row, Callable[[], Iterable[Row]]]] = {
    "methods": (METHOD, _methods),
    "datasets": (("data set", "what it is"), _datasets),
    "models": (("model", "what it is"), _models),
    "mechanisms": (("mechanism", "what it does"), ABOUT.items),
    "keys": (("key", "what it decides"), _keys),
}
