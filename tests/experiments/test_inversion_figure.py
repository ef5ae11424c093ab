"""The picture of reconstructions: originals above, a row for each cut, numbers at the side."""

import numpy as np
import pytest

from experiments.report.inversion_figure import ZOOM, Reconstructed, reconstructions
from experiments.report.style import NARROW, WIDE, drawing, svg

RNG = np.random.default_rng(0)
ORIGINALS = RNG.random((9, 1, 6, 6))
ROWS = [Reconstructed("after block1", 31.4, 12.0, 1.0, True, ORIGINALS), Reconstructed(
    "after block2", 12.1, 12.0, 0.01, False, 1 - ORIGINALS)]  # fmt: skip


def drawn(width, originals=ORIGINALS, rows=ROWS):
    with drawing():
        return reconstructions(originals, rows, width)


@pytest.mark.parametrize(("width", "shown"), [(WIDE, 8), (NARROW, 4)])
def test_a_row_of_pictures_for_each_cut_below_the_originals(width, shown):
    fig = drawn(width)
    images = [ax.images[0].get_array() for ax in fig.axes]
    assert len(images) == 3 * shown
    low, high = ORIGINALS.min(), ORIGINALS.max()
    first = np.round(255 * (ORIGINALS[0, 0] - low) / (high - low))
    for i in (0, shown):  # the original, and a perfect reconstruction of it
        assert images[i].shape == (6 * ZOOM, 6 * ZOOM, 3)
        np.testing.assert_array_equal(images[i][::ZOOM, ::ZOOM, 1], first)
    assert not np.array_equal(images[0], images[2 * shown])
    words = [text.get_text() for text in fig.texts]
    assert {"private", "after block1", "31.4 dB", "100 % identified", "12.1 dB", "mean image 12.0"} <= set(words)


def test_nothing_is_cut_off():
    for width in (WIDE, NARROW):
        with drawing():
            fig = reconstructions(ORIGINALS, ROWS, width)
            box = fig.get_tightbbox()
            assert box.x0 >= -0.01 and box.x1 <= width + 0.01 and box.y0 >= -0.01


def test_colours_stay_colours_and_what_leaves_the_range_is_clipped():
    colour = RNG.uniform(-1, 1, (2, 3, 4, 4))
    fig = drawn(WIDE, colour, [Reconstructed("after block1", 9.0, 9.0, 0.1, False, 5 * colour)])
    pixels = np.asarray(fig.axes[0].images[0].get_array())
    assert not np.array_equal(pixels[..., 0], pixels[..., 2])
    assert {0, 255} <= set(np.unique(fig.axes[2].images[0].get_array()))


def test_without_rows_or_pictures_there_is_no_figure():
    assert drawn(WIDE, rows=[]) is None and drawn(WIDE, originals=ORIGINALS[:0]) is None
    assert svg(lambda width: drawn(width, rows=[]), "inversion", "nothing") == ""
    assert svg(lambda width: reconstructions(ORIGINALS, ROWS, width), "inversion", "x").count("data:image/png") == 36
