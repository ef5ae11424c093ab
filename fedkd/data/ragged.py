"""Many small index arrays as one, since an array object for each of 100,000 clients would outweigh their indices."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


class Ragged(Sequence[IntArray]):
    """A sequence of int64 arrays of any lengths; what it hands out are views, and read-only.

    Args:
        parts: The arrays, taken one at a time.
    """

    def __init__(self, parts: Iterable[IntArray]) -> None:
        values, ends = array("q"), array("q", [0])
        for part in parts:
            values.frombytes(np.ascontiguousarray(part, np.int64).tobytes())
            ends.append(len(values))
        self._values: IntArray = np.frombuffer(values, np.int64) if values else np.empty(0, np.int64)
        self._ends: IntArray = np.frombuffer(ends, np.int64)
        self._values.flags.writeable = False

    @property
    def values(self) -> IntArray:
        """All arrays, one after the other."""
        return self._values

    @property
    def sizes(self) -> IntArray:
        """Length of each array."""
        return np.diff(self._ends)

    def __len__(self) -> int:
        """How many arrays."""
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> IntArray: ...

    @overload
    def __getitem__(self, index: slice) -> list[IntArray]: ...

    def __getitem__(self, index: int | slice) -> IntArray | list[IntArray]:
        """One array, or several."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        return self._values[self._ends[at] : self._ends[at + 1]]
