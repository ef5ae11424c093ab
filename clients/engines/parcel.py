"""Parcels: Flower records between processes of one machine, tensors in shared memory, the rest a short header.

The sender lays tensors into an `Arena`, a block of shared memory that it reuses for every batch; the receiver reads
them there. A tensor that many messages hold is laid down once. Only processes of our own exchange parcels, so the
header may be a pickle.
"""

from __future__ import annotations

import mmap
import os
import pickle
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any

import flwr.app
import torch

from fedkd import wire

_ALIGN = 64
_SMALL = 1024  # bytes; below this a place in shared memory costs more than a copy

Place = tuple[int, int]
"""(offset, size) of bytes in an arena."""


class Arena:
    """Shared memory that its owner writes and others read by `path`.

    On Linux the memory has no name in any file system and vanishes with its owner, however that ends.
    """

    def __init__(self) -> None:
        if hasattr(os, "memfd_create"):
            self._fd = os.memfd_create("fedkd")
            self.path = f"/proc/{os.getpid()}/fd/{self._fd}"
        else:
            self._fd, self.path = tempfile.mkstemp(prefix="fedkd-")
        self._map: mmap.mmap | None = None
        self._size = 0
        self._used = 0
        self._placed: dict[tuple[int, int], tuple[object, Place]] = {}

    def reset(self) -> None:
        """Forget what lies here; nobody may be reading any more."""
        self._used = 0
        self._placed.clear()

    def place(self, owner: object, address: int, data: memoryview) -> Place:
        """Lay down the bytes that ``owner`` keeps at an address, once however many messages hold them."""
        key = address, data.nbytes
        known = self._placed.get(key)
        if known is not None:
            return known[1]
        start = -(-self._used // _ALIGN) * _ALIGN
        self._used = start + data.nbytes
        self._ensure(self._used)
        if self._map is not None and data.nbytes:
            memoryview(self._map)[start : self._used] = data
        self._placed[key] = (owner, (start, data.nbytes))  # holding the owner keeps its address its own
        return start, data.nbytes

    def close(self) -> None:
        """Give the memory back."""
        os.close(self._fd)
        if not self.path.startswith("/proc/"):
            Path(self.path).unlink(missing_ok=True)

    def _ensure(self, size: int) -> None:
        if size > self._size:
            self._size = max(size, 2 * self._size, 1 << 20)
            os.ftruncate(self._fd, self._size)
            self._map = mmap.mmap(self._fd, self._size)


class Window:
    """A view of somebody else's arena."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._map: mmap.mmap | None = None

    def look(self, place: Place) -> memoryview:
        """The bytes at a place, not copied."""
        offset, size = place
        if self._map is None or len(self._map) < offset + size:
            with Path(self.path).open("r+b") as file:
                self._map = mmap.mmap(file.fileno(), 0)
        return memoryview(self._map)[offset : offset + size]


def pack(value: Any, arena: Arena) -> bytes:
    """Header of ``value``, its tensors and long byte strings laid down in ``arena``."""
    buffer = BytesIO()
    _Packer(buffer, arena).dump(value)
    return buffer.getvalue()


def unpack(header: bytes, window: Window, *, keep: bool) -> Any:
    """Undo `pack`.

    Args:
        header: What `pack` returned.
        window: Onto the sender's arena.
        keep: Whether tensors are copied out, to stay valid once the sender reuses its arena.
    """
    return _Unpacker(BytesIO(header), window, keep).load()


class _Packer(pickle.Pickler):
    def __init__(self, file: BytesIO, arena: Arena) -> None:
        super().__init__(file, protocol=5)
        self.arena = arena

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, wire.Array):
            tensor = obj.tensor
            if tensor.device.type != "cpu" or tensor.numel() * tensor.element_size() < _SMALL:
                return None
            flat = tensor.contiguous()
            address = flat.data_ptr() if flat is tensor else id(tensor)  # a copy's own address is new every time
            data = memoryview(flat.numpy().reshape(-1)).cast("B")
            return "tensor", self.arena.place((tensor, flat), address, data), obj.dtype, obj.shape
        if isinstance(obj, flwr.app.Array) and len(obj.data) >= _SMALL:
            return (
                "array",
                self.arena.place(obj.data, id(obj.data), memoryview(obj.data)),
                obj.dtype,
                obj.shape,
                obj.stype,
            )
        return None

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, wire.Array):  # a small one: by value, but still ours on the other side
            return _small, (obj.tensor.cpu().contiguous().numpy(),)
        return NotImplemented


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: BytesIO, window: Window, keep: bool) -> None:
        super().__init__(file)
        self.window = window
        self.keep = keep

    def persistent_load(self, pid: Any) -> Any:
        kind, place, dtype, shape, *rest = pid
        data = self.window.look(place)
        if kind == "array":
            return flwr.app.Array(dtype, shape, rest[0], bytes(data))
        tensor = torch.frombuffer(data, dtype=getattr(torch, dtype)).view(shape)
        return wire.Array(tensor.clone() if self.keep else tensor)


def _small(values: Any) -> wire.Array:
    return wire.Array(torch.from_numpy(values))
