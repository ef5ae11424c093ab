"""What a comparison leaves: ``compare.json`` and its figures."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from experiments.compare import Comparison
from experiments.compare_clients import clients_figure
from experiments.compare_curves import bytes_figure, curves_figure
from experiments.compare_figures import comparison_figure
from experiments.compare_reached import reached_figure
from experiments.report.style import PLATE, drawing
from experiments.sweep import SWEEP
from fedkd.errors import ConfigError

MOST_PIXELS = 60_000  # a side; matplotlib draws no more
FIGURES: dict[str, Callable[[Comparison], Figure | None]] = {
    "compare": comparison_figure,
    "compare-curves": curves_figure,
    "compare-bytes": bytes_figure,
    "compare-clients": clients_figure,
    "compare-targets": reached_figure,
}


def default_place(directories: Sequence[Path]) -> Path:
    """The first directory, if it is a sweep's."""
    return directories[0] if (directories[0] / SWEEP).exists() else Path("runs") / "compare"


def pictures(found: Comparison) -> dict[str, bytes]:
    """The files of a comparison's figures, by name; equal figures give equal bytes."""
    files = {}
    for name, draw in FIGURES.items():
        with drawing():
            figure = draw(found)
            if figure is None:
                continue
            for kind, about in (("svg", {"Date": None, "Creator": None}), ("png", {"Software": None})):
                buffer = io.BytesIO()
                dpi = min(160.0, MOST_PIXELS / max(figure.get_size_inches()))
                figure.savefig(buffer, format=kind, facecolor=PLATE, dpi=dpi, metadata=about)
                files[f"{name}.{kind}"] = buffer.getvalue()
    return files


def write(found: Comparison, place: Path) -> list[Path]:
    """Write all files of a comparison, each old or new and never half; equal comparisons give equal bytes.

    Raises:
        ConfigError: The directory cannot be written to.
    """
    text = json.dumps(found.to_json(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    contents = {"compare.json": text.encode(), **pictures(found)}
    try:
        place.mkdir(parents=True, exist_ok=True)
        for old in [place / f"{name}.{kind}" for name in FIGURES for kind in ("svg", "png")]:
            if old.name not in contents:  # an earlier comparison's
                old.unlink(missing_ok=True)
        for name, content in contents.items():
            draft = place / f".{name}.part"
            draft.write_bytes(content)
            draft.replace(place / name)
    except OSError as error:
        raise ConfigError(f"{place}: cannot be written ({error})") from None
    return [place / name for name in contents]
