"""What a comparison leaves: ``compare.json`` and its figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from experiments.compare import Comparison
from experiments.compare_figures import pictures
from experiments.sweep import SWEEP
from fedkd.errors import ConfigError


def default_place(directories: Sequence[Path]) -> Path:
    """The first directory, if it is a sweep's."""
    return directories[0] if (directories[0] / SWEEP).exists() else Path("runs") / "compare"


def write(found: Comparison, place: Path) -> list[Path]:
    """Write all files of a comparison, each old or new and never half; equal comparisons give equal bytes.

    Raises:
        ConfigError: The directory cannot be written to.
    """
    text = json.dumps(found.to_json(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    contents = {"compare.json": text.encode(), **pictures(found)}
    try:
        place.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            draft = place / f".{name}.part"
            draft.write_bytes(content)
            draft.replace(place / name)
    except OSError as error:
        raise ConfigError(f"{place}: cannot be written ({error})") from None
    return [place / name for name in contents]
