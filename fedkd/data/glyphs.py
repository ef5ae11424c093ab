"""Characters rendered from fonts: a web-like stand-in for handwriting, and letters that are none of the digits.

The fonts are those of ``PACKAGES`` that are installed (``pip install 'fedkd[glyphs]'``); without any, the DejaVu fonts
that come with matplotlib. Ink is 255 on a background of 0, as in scikit-learn's digits and MNIST.
"""

from __future__ import annotations

import math
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
Images = NDArray[np.uint8]

PACKAGES = (
    "font-roboto", "font-source-sans-pro", "font-source-serif-pro", "font-caladea", "font-amatic-sc",
    "font-fredoka-one", "font-hanken-grotesk", "font-intuitive", "font-manrope",
)  # fmt: skip

DIGITS = "0123456789"
LETTERS = "CEFHJKLMNPRUVWXYacdefhkmnprtuvwxy"
"""Without those that pass for a digit: ABDGIOQSTZ, bgijloqsz."""

MARGINLESS = 16
"""Below so many pixels a character fills its image, as in scikit-learn's digits; else it leaves MNIST's margin."""
FILL = (1.0, 20 / 28)
"""Longer side of a character of ordinary size, of the image's shorter side: without and with the margin."""
SIZE = (0.85, 1.1)
"""Of the ordinary size."""
SHIFT = 0.04
"""Largest shift of the centre to either side, of the image's side."""
ROTATION = 12.0
"""Largest rotation to either side, degrees."""
STROKES = 3
"""Thickness: 0 to 2 pixels of extra ink around a character drawn with EM pixels to the em."""
EM = 64

SETTINGS = repr((DIGITS, MARGINLESS, FILL, SIZE, SHIFT, ROTATION, STROKES, EM))
"""All that decides how a pool of digits looks, besides its fonts and its draws."""


class Fonts(NamedTuple):
    """Installed fonts: the files of each family in order of their names, and the packages with their versions."""

    families: tuple[tuple[Path, ...], ...]
    source: str


class Glyphs(NamedTuple):
    """What to render: one entry for each of m images.

    Attributes:
        character: (m,) index into the alphabet.
        family, member: (m,) uniform in [0, 1): which family, and which of its files.
        stroke: (m,) extra ink, see ``STROKES``.
        size: (m,) see ``SIZE``.
        rotation: (m,) radians, to the left.
        shift: (m, 2) to the right and down, of the image's side.
    """

    character: IntArray
    family: FloatArray
    member: FloatArray
    stroke: IntArray
    size: FloatArray
    rotation: FloatArray
    shift: FloatArray


def fonts() -> Fonts:
    """Return the fonts of ``PACKAGES`` that are installed, else matplotlib's DejaVu as one family."""
    families, names = [], []
    for package in PACKAGES:
        try:
            distribution = metadata.distribution(package)
        except metadata.PackageNotFoundError:
            continue
        if files := _font_files(distribution):
            families.append(files)
            names.append(f"{package} {distribution.version}")
    if not families:
        import matplotlib  # a tenth of a second that only a machine without fonts needs

        folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
        # The Display files have mathematical signs only.
        families.append(tuple(p for p in sorted(folder.glob("DejaVu*.ttf")) if "Display" not in p.name))
        names.append(f"DejaVu of matplotlib {matplotlib.__version__}")
    return Fonts(tuple(families), ", ".join(names))


def _font_files(distribution: metadata.Distribution) -> tuple[Path, ...]:
    """Return a package's TrueType files, or its OpenType ones where it has none; the package is not imported."""
    listed = [Path(str(distribution.locate_file(file))) for file in distribution.files or ()]
    found = (sorted(p for p in listed if p.suffix == suffix and p.is_file()) for suffix in (".ttf", ".otf"))
    return tuple(next(filter(None, found), ()))


def draw(alphabet: str, count: int, rng: np.random.Generator) -> Glyphs:
    """Draw ``count`` glyphs of an alphabet, its characters and the font families equally often on average.

    The first ``k`` of them do not depend on ``count``, so a smaller pool is the beginning of a larger one.
    """
    u = rng.random((count, 8))
    return Glyphs(
        character=(u[:, 0] * len(alphabet)).astype(np.int64),
        family=u[:, 1],
        member=u[:, 2],
        stroke=(u[:, 3] * STROKES).astype(np.int64),
        size=SIZE[0] + u[:, 4] * (SIZE[1] - SIZE[0]),
        rotation=np.radians((2 * u[:, 5] - 1) * ROTATION),
        shift=(2 * u[:, 6:] - 1) * SHIFT,
    )


def render(alphabet: str, glyphs: Glyphs, available: Fonts, height: int, width: int) -> Images:
    """Return the glyphs as images.

    Args:
        alphabet: What ``glyphs.character`` points into.
        glyphs: m of them.
        available: From ``fonts``.
        height: Of the images, pixels.
        width: Of the images, pixels.

    Returns:
        (m, height, width), ink 255 on 0.
    """
    # Drawn about as large as the characters themselves, then averaged: fine shifts and turns survive at 8x8.
    scale = max(1, round(EM / min(height, width)))
    longest = FILL[min(height, width) >= MARGINLESS] * min(height, width) * scale
    ink_of = _Inks(alphabet)
    out = np.empty((len(glyphs.character), height, width), np.uint8)
    for i, (character, family, member, stroke, size, rotation, shift) in enumerate(zip(*glyphs, strict=True)):
        files = available.families[int(family * len(available.families))]
        ink = ink_of[files[int(member * len(files))], int(character), int(stroke)]
        # Where the output's pixel (x, y) comes from: its shifted centre to the origin, turn, zoom, to the ink's centre.
        zoom = (max(ink.size) - 2) / (size * longest)  # without its rim
        cos, sin = zoom * math.cos(rotation), zoom * math.sin(rotation)
        x, y = (0.5 + shift[0]) * width * scale, (0.5 + shift[1]) * height * scale
        source = (cos, sin, ink.width / 2 - cos * x - sin * y, -sin, cos, ink.height / 2 + sin * x - cos * y)
        large = (width * scale, height * scale)
        out[i] = np.asarray(
            ink.transform(large, Image.Transform.AFFINE, source, Image.Resampling.BILINEAR).reduce(scale)
        )
    return out


class _Inks(dict[tuple[Path, int, int], Image.Image]):
    """The characters of an alphabet by font file, index and stroke, drawn when asked for the first time."""

    def __init__(self, alphabet: str) -> None:
        super().__init__()
        self._alphabet = alphabet
        self._faces: dict[Path, ImageFont.FreeTypeFont] = {}

    def __missing__(self, key: tuple[Path, int, int]) -> Image.Image:
        """Draw one character, cropped to its ink and a rim of one pixel."""
        file, character, stroke = key
        if file not in self._faces:
            # Raqm, where it is installed, would place characters otherwise.
            self._faces[file] = ImageFont.truetype(file, EM, layout_engine=ImageFont.Layout.BASIC)
        image = Image.new("L", (3 * EM, 3 * EM))
        text = self._alphabet[character]
        ImageDraw.Draw(image).text((EM, 2 * EM), text, 255, self._faces[file], anchor="ls", stroke_width=stroke)
        left, top, right, bottom = image.getbbox() or (1, 1, 2, 2)
        self[key] = image.crop((left - 1, top - 1, right + 1, bottom + 1))
        return self[key]
