"""Many small index arrays as one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedkd.data.ragged import Ragged


@given(st.lists(st.lists(st.integers(-(2**62), 2**62), max_size=5), max_size=6))
def test_it_is_the_sequence_it_was_made_of(parts):
    ragged = Ragged(np.array(part, np.int64) for part in parts)
    assert [part.tolist() for part in ragged] == parts
    assert len(ragged) == len(parts) and ragged.sizes.tolist() == [len(part) for part in parts]
    assert ragged.values.tolist() == [value for part in parts for value in part]
    assert [part.tolist() for part in ragged[1:]] == parts[1:]
    for index in range(-len(parts), len(parts)):
        assert ragged[index].tolist() == parts[index]
    with pytest.raises(IndexError):
        ragged[len(parts)]


def test_what_it_hands_out_cannot_be_written():
    with pytest.raises(ValueError, match="read-only"):
        Ragged([np.arange(3)])[0][0] = 7
