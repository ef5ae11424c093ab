"""The look of the figures: colours, sizes, and the way from a matplotlib figure to markup inside a page.

Colours are Okabe and Ito's, which readers with any colour vision can tell apart; line style and marker say the same
again. Every colour becomes a CSS variable, so that the page, not the figure, decides about light and dark.
"""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import blended_transform_factory

INK, MUTED, RULE, PLATE = "#1c2430", "#5b6675", "#d8dde4", "#ffffff"
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9"
LEAK = "#a84300"  # red for small letters
VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule", PLATE: "plate"} | {
    BLUE: "blue", ORANGE: "orange", GREEN: "green", RED: "red", PURPLE: "purple", SKY: "sky", LEAK: "bad",
}  # fmt: skip

WIDE, NARROW = 8.6, 3.8  # inches; the page shows the one or the other
SMALL, TINY = 8.5, 7.5  # points

RC: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedkd",
    "font.family": "DejaVu Sans",
    "font.size": SMALL,
    "text.parse_math": False,
    "text.usetex": False,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.labelsize": SMALL,
    "axes.grid": False,
    "axes.unicode_minus": True,
    "axes.formatter.useoffset": False,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": TINY,
    "ytick.labelsize": TINY,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "path.simplify": True,
}

_HEX = re.compile(r"#[0-9a-f]{6}\b")
_FONT = re.compile(r"(font: [^'\";]*?|font-family: )(?:'[^']*'|[A-Za-z-]+)(?:, ?(?:'[^']*'|[A-Za-z-]+))*(?=;|$)")
_REFERENCE = re.compile(r"#([\w-]+)")


def is_narrow(width: float) -> bool:
    """Whether a figure of this width is the telephone's."""
    return width < 5


def panel(fig: Figure, left: float, top: float, width: float, height: float, grid: str = "y") -> Axes:
    """Axes at a place given in inches from the top left corner, with quiet rules along `grid`."""
    whole_width, whole_height = fig.get_size_inches()
    box = (left / whole_width, 1 - (top + height) / whole_height, width / whole_width, height / whole_height)
    ax = fig.add_axes(box)
    ax.patch.set_visible(False)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines["left"].set_visible(grid == "both")
    if grid == "x":
        ax.spines["bottom"].set_visible(False)
    if grid in ("x", "y"):
        ax.grid(True, axis="x" if grid == "x" else "y")
    ax.set_axisbelow(True)
    return ax


def heading(fig: Figure, left: float, top: float, title: str, note: str = "") -> None:
    """A panel's title, and a quieter line under it, at a place in inches from the top left corner."""
    width, height = fig.get_size_inches()
    fig.text(left / width, 1 - top / height, title, weight="bold", size=9.5, va="top")
    if note:
        fig.text(left / width, 1 - (top + 0.18) / height, note, size=TINY + 0.5, color=MUTED, va="top")


def row_names(ax: Axes, names: Sequence[str], bold: int | None = None) -> None:
    """Name the rows of `ax` at the left edge of the figure, so that names and captions share one edge."""
    ax.set_yticks([])
    at = blended_transform_factory(ax.get_figure(root=True).transFigure, ax.transData)  # type: ignore[union-attr]
    for y, name in enumerate(names):
        ax.text(0.004, y, name, transform=at, va="center", size=SMALL, weight="bold" if y == bold else "normal")


def apart(places: list[float], gap: float) -> list[float]:
    """`places` moved as little as needed so that neighbours are at least `gap` apart; the order stays."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    groups: list[list[int]] = []
    for i in order:
        groups.append([i])
        while len(groups) > 1 and _start(groups[-1], places, gap) < _start(groups[-2], places, gap) + gap * len(
            groups[-2]
        ):
            groups[-2:] = [groups[-2] + groups[-1]]
    moved = list(places)
    for group in groups:
        start = _start(group, places, gap)
        for step, i in enumerate(group):
            moved[i] = start + gap * step
    return moved


def _start(group: list[int], places: list[float], gap: float) -> float:
    """Where a block of labels begins when it is centred on what it labels."""
    return sum(places[i] for i in group) / len(group) - gap * (len(group) - 1) / 2


def end_labels(ax: Axes, labels: list[tuple[float, str, str]], height: float, line: float = 0.165) -> None:
    """Write (y, text, colour) beside the right end of the lines of an axes `height` inches high."""
    low, high = ax.get_ylim()
    spots = apart([y for y, _, _ in labels], line * (high - low) / height)
    for (_, text, colour), spot in zip(labels, spots, strict=True):
        ax.annotate(
            text, (1, spot), xycoords=("axes fraction", "data"), xytext=(8, 0), textcoords="offset points",
            color=colour, va="center", size=SMALL, annotation_clip=False,
        )  # fmt: skip


@contextmanager
def drawing(**more: Any) -> Iterator[None]:
    """Our look for the body's time, whatever a reader's own matplotlibrc says; ``more`` goes on top."""
    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()
        mpl.rcParams.update(RC | more)
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def svg(draw: Callable[[float], Figure | None], slug: str, alt: str) -> str:
    """Draw one figure for wide and for narrow screens and return both as inline SVG; empty if there is none."""
    parts = []
    for name, width in (("wide", WIDE), ("narrow", NARROW)):
        with drawing():
            fig = draw(width)
            if fig is None:
                return ""
            buffer = io.StringIO()
            fig.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        parts.append(_inline(buffer.getvalue(), f"{slug}-{name}", name, alt))
    return "".join(parts)


def _inline(text: str, slug: str, name: str, alt: str) -> str:
    """Matplotlib's SVG as markup for a page: own ids, CSS variables, the page's font, nothing that points outside."""
    root = ET.fromstring(text)
    used = {found for node in root.iter() for value in node.attrib.values() for found in _REFERENCE.findall(value)}
    for node in list(root.iter()):
        node.tag = node.tag.rpartition("}")[2]
        node.attrib = dict(_attributes(node.attrib, slug, used))
        for child in list(node):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                node.remove(child)
    width = float(root.attrib.pop("width").removesuffix("pt")) * 96 / 72
    root.attrib = {
        "viewBox": root.attrib["viewBox"], "class": f"plot {name}", "role": "img", "aria-label": alt,
        "style": f"max-width:{width:.0f}px",
    }  # fmt: skip
    return ET.tostring(root, encoding="unicode").replace("\n", "") + "\n"


def _attributes(given: dict[str, str], slug: str, used: set[str]) -> list[tuple[str, str]]:
    """The attributes of one element, made safe to stand beside other figures."""
    kept = []
    for key, value in given.items():
        key = key.rpartition("}")[2]
        if key == "id":
            if value in used:
                kept.append((key, f"{slug}-{value}"))
        elif key == "style":
            kept.append((key, _FONT.sub(_font, _HEX.sub(_variable, value))))
        elif key == "href" or "url(#" in value:
            kept.append((key, value if value.startswith("data:") else value.replace("#", f"#{slug}-")))
        else:
            kept.append((key, value))
    return kept


def _font(found: re.Match[str]) -> str:
    """The page's own letters, of even width where the figure's are."""
    return f"{found[1]}var(--{'mono' if 'Mono' in found[0] else 'sans'})"


def _variable(found: re.Match[str]) -> str:
    """A colour as a CSS variable that falls back to itself."""
    name = VARIABLES.get(found.group())
    return f"var(--{name},{found.group()})" if name else found.group()


def caption(html: str) -> str:
    """The line under a figure; `html` is markup already."""
    return f"<figcaption>{html}</figcaption>" if html else ""


def figure(markup: str, note: str = "") -> str:
    """A figure element around `markup`, with `note` (plain text) under it."""
    return f'<figure class="card">{markup}{caption(escape(note))}</figure>\n' if markup else ""


def png(figure: Figure, dpi: int = 150) -> bytes:
    """A figure as PNG; equal figures give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor=PLATE, metadata={"Software": None})
    return buffer.getvalue()
