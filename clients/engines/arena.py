"""Arenas: shared memory that one process writes and others read in place, for as long as they like."""

from __future__ import annotations

import bisect
import ctypes
import mmap
import os
import tempfile
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

_ALIGN = 64
_LEAST = 1 << 20

Place = tuple[int, int]
"""(offset, size) of bytes in an arena."""


class Arena:
    """Shared memory that its owner writes and others read by `path`.

    On Linux the memory has no name in any file system and vanishes with its owner and readers, however they end.

    Attributes:
        taken: Places in use: where each begins -> its size.
        end: Where the last of them ends.
    """

    def __init__(self) -> None:
        if hasattr(os, "memfd_create"):
            self._fd = os.memfd_create("fedkd")
            self.path = f"/proc/{os.getpid()}/fd/{self._fd}"
        else:
            self._fd, self.path = tempfile.mkstemp(prefix="fedkd-")
        self._view = np.empty(0, np.uint8)
        self.end = 0
        self.taken: dict[int, int] = {}
        self._holes: list[Place] = []  # by offset, none beside another
        self._laid: dict[object, tuple[object, Place]] = {}

    def lay(self, key: object, owner: object, data: np.ndarray) -> Place:
        """Lay bytes down, once however often they come until `forget`; while ``owner`` lives, ``key`` means them."""
        known = self._laid.get(key)
        if known is not None:
            return known[1]
        start = self._take(-(-max(1, data.nbytes) // _ALIGN) * _ALIGN)
        self._view[start : start + data.nbytes] = data
        self._laid[key] = owner, (start, data.nbytes)
        return start, data.nbytes

    def forget(self) -> None:
        """Let go of the owners; what they had laid down stays, and will be laid down anew when it comes again."""
        self._laid.clear()

    def undo(self) -> None:
        """Take back what was laid down since the last `forget`."""
        self.free(start for _, (start, _) in self._laid.values())
        self.forget()

    def clear(self) -> None:
        """Take all places back; nobody may be reading any more."""
        self.forget()
        self.taken.clear()
        self._holes.clear()
        self.end = 0

    def free(self, starts: Iterable[int]) -> None:
        """Take back the places that begin here; nobody reads them any more."""
        for start in starts:
            size = self.taken.pop(start)
            at = bisect.bisect(self._holes, (start, 0))
            if at < len(self._holes) and self._holes[at][0] == start + size:
                size += self._holes.pop(at)[1]
            if at and sum(self._holes[at - 1]) == start:
                start, before = self._holes.pop(at - 1)
                size, at = size + before, at - 1
            if start + size == self.end:
                self.end = start
            else:
                self._holes.insert(at, (start, size))

    def close(self) -> None:
        """Give the memory back, once its readers let go of it."""
        os.close(self._fd)
        if not self.path.startswith("/proc/"):
            Path(self.path).unlink(missing_ok=True)

    def _take(self, size: int) -> int:
        """The hole that fits best, else room at the end: what is used again costs no page faults."""
        fitting = [(room, start) for start, room in self._holes if room >= size]
        if fitting:
            room, start = min(fitting)
            at = bisect.bisect(self._holes, (start, 0))
            self._holes[at : at + 1] = [(start + size, room - size)] if room > size else []
        else:
            start, self.end = self.end, self.end + size
            self._ensure(self.end)
        self.taken[start] = size
        return start

    def _ensure(self, size: int) -> None:
        if size > len(self._view):
            capacity = max(size, 2 * len(self._view), _LEAST)
            os.ftruncate(self._fd, capacity)
            self._view = np.frombuffer(mmap.mmap(self._fd, capacity), np.uint8)


class Window:
    """A view of somebody else's arena. What was read stays valid after its owner's death, and the window's own."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._map: mmap.mmap | None = None

    def look(self, place: Place) -> np.ndarray:
        """The bytes at a place, not copied: valid until the owner takes the place back."""
        return np.frombuffer(self._bytes(place), np.uint8)

    def lease(self, given_back: Callable[[int], object]) -> Callable[[Place], np.ndarray]:
        """As `look`, for the places of one letter; each is given back once nobody holds what was read there."""
        read: dict[Place, np.ndarray] = {}

        def look(place: Place) -> np.ndarray:
            if place not in read:
                held = self._bytes(place)
                weakref.finalize(held, given_back, place[0]).atexit = False
                read[place] = np.frombuffer(held, np.uint8)
            return read[place]

        return look

    def _bytes(self, place: Place) -> Any:
        """Unlike a memoryview, it lives as long as arrays and tensors made from it, and tells when it dies."""
        offset, size = place
        if self._map is None or len(self._map) < offset + size:
            with Path(self.path).open("r+b") as file:
                self._map = mmap.mmap(file.fileno(), 0)
        return (ctypes.c_ubyte * size).from_buffer(self._map, offset)
