"""The picture of what can be made of features: private images, and below them their reconstructions at each cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from experiments.report.style import INK, LEAK, MUTED, SMALL, TINY, WIDE, drawing, heading, is_narrow, panel, png
from experiments.report.values import short
from privacy.audits.inversion import Inversion

Pictures = NDArray[np.float64]

GAP = 0.06  # inches between pictures
LARGEST = 0.8  # inches of a picture
TOP = 0.52
WORDS = 0.56  # inches that three lines beside a row need
ZOOM = 4  # bytes a pixel, either way


@dataclass(frozen=True, eq=False)
class Reconstructed:
    """One row.

    Attributes:
        name: Which features, for example ``"after block1"``.
        psnr: Mean PSNR over all images that were tried, in dB.
        baseline: That of the mean auxiliary image.
        identified: Share of images told from the other candidates.
        leaks: Whether that is more than by guessing.
        pictures: (s, C, H, W) reconstructions, in the range of the originals.
    """

    name: str
    psnr: float
    baseline: float
    identified: float
    leaks: bool
    pictures: Pictures


def reconstructions(originals: Pictures, rows: Sequence[Reconstructed], width: float) -> Figure | None:
    """The originals (s, C, H, W) above, a row of pictures for each cut, its PSNR at the side; None without either.

    As many of the pictures as fit: eight, on narrow screens four.
    """
    if not rows or not len(originals):
        return None
    narrow = is_narrow(width)
    left, right = (0.88, 1.12) if narrow else (1.35, 1.55)
    shown = min(len(originals), 4 if narrow else 8)
    side = min(LARGEST, (width - left - right) / shown - GAP)
    high = side * originals.shape[2] / originals.shape[3]
    pitch = max(high + GAP, WORDS)
    edge = left + shown * (side + GAP)
    fig = Figure(figsize=(width, TOP + (len(rows) + 1) * pitch))
    heading(
        fig,
        0.03,
        0.02,
        "Images made of what clients send",
        "at the side: mean PSNR; 59 dB is as near as rounding to 8 bits",
    )
    for i, (name, pictures) in enumerate([("private", originals), *((row.name, row.pictures) for row in rows)]):
        top = TOP + i * pitch
        for j, pixels in enumerate(_pixels(pictures[:shown], originals)):
            ax = panel(fig, left + j * (side + GAP), top, side, high, grid="none")
            ax.imshow(pixels, aspect="auto", interpolation="none")
            ax.set_axis_off()
        _text(fig, 0.03, top + high / 2, short(name, 12 if narrow else 20), INK, SMALL, "normal" if i else "bold")
    for i, row in enumerate(rows, start=1):
        middle = TOP + i * pitch + high / 2
        colour = LEAK if row.leaks else MUTED
        known = f"{100 * row.identified:.0f} % identified"
        _text(fig, edge + 0.08, middle - 0.17, f"{row.psnr:.1f} dB", colour, SMALL, "bold")
        _text(fig, edge + 0.08, middle, known, colour, TINY)
        _text(fig, edge + 0.08, middle + 0.15, f"mean image {row.baseline:.1f}", MUTED, TINY)
    return fig


def _pixels(pictures: Pictures, originals: Pictures) -> NDArray[np.uint8]:
    """Pictures (s, C, H, W) as bytes (s, H, W, 3), each pixel drawn large so that no reader smooths it away."""
    low, high = float(originals.min()), float(originals.max())
    scaled = np.clip((pictures - low) / max(high - low, 1e-9), 0, 1)
    colours = np.broadcast_to(scaled, (len(scaled), 3, *scaled.shape[2:]))
    bytes_ = np.round(255 * colours).astype(np.uint8).transpose(0, 2, 3, 1)
    return bytes_.repeat(ZOOM, axis=1).repeat(ZOOM, axis=2)


def _text(fig: Figure, left: float, top: float, text: str, colour: str, size: float, weight: str = "normal") -> None:
    """Text whose middle is at a place in inches from the top left corner."""
    width, high = fig.get_size_inches()
    fig.text(left / width, 1 - top / high, text, color=colour, size=size, weight=weight, va="center")


def row_of(found: Inversion, name: str) -> Reconstructed:
    """An audit's result as a row."""
    return Reconstructed(
        name, found.psnr, found.baseline, found.identified, found.leaks, np.asarray(found.reconstructions)
    )


def picture(found: Inversion, directory: Path) -> Path:
    """Write ``inversion.png`` into a run's directory."""
    place = directory / "inversion.png"
    with drawing():
        drawn = reconstructions(
            np.asarray(found.originals), [row_of(found, found.target.removeprefix("features "))], WIDE
        )
    if drawn is not None:
        place.write_bytes(png(drawn))
    return place
