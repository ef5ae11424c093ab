"""Class presence: counts and zeros tell, noise does not."""

import numpy as np
import pytest

from fedkd.errors import ConfigError
from privacy.audits.presence import class_presence


def test_counts_and_zeros_say_which_classes_are_there():
    rng = np.random.default_rng(0)
    held = rng.integers(0, 3, (30, 10))
    for released in ({"counts": held}, {"sums": held[..., None] * np.ones(4)}):
        result = class_presence("message", held, **released)
        assert (result.accuracy, result.auroc, result.leaks) == (1.0, 1.0, True)
        assert result.majority == pytest.approx(max((held > 0).mean(), (held == 0).mean()))
    assert "100 % of 300 pairs" in str(result) and result.to_json()["read"] == "rows of zeros"


def test_noise_hides_which_classes_are_there():
    rng = np.random.default_rng(0)
    held = rng.integers(0, 3, (30, 10))
    result = class_presence("message", held, counts=held + 1000 * rng.normal(size=held.shape))
    assert not result.leaks and result.auroc == pytest.approx(0.5, abs=0.12)
    result = class_presence("message", held, sums=rng.normal(size=(30, 10, 4)))
    assert result.accuracy == pytest.approx((held > 0).mean()) and not result.leaks


def test_where_everybody_has_everything_presence_says_nothing():
    result = class_presence("message", np.ones((3, 2)), counts=np.ones((3, 2)))
    assert result.auroc is None and not result.leaks


@pytest.mark.parametrize(
    ("released", "said"),
    [
        ({}, "neither"),
        ({"counts": [[1]], "sums": [[[1]]]}, "both"),
        ({"counts": [[1, 2]]}, r"\(clients, K\)"),
        ({"counts": [[np.nan]]}, "finite"),
    ],
)
def test_bad_input(released, said):
    with pytest.raises(ConfigError, match=said):
        class_presence("message", [[1]], **released)
