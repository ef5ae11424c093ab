"""Knowledge to Flower records and back.

A Flower `Array` keeps bytes, and copies on both sides. Ours keeps the tensor and makes the bytes only if somebody asks
for them, so that messages between parties of one process travel by reference while any Flower transport still works.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flwr.app
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray
from torch import Tensor

from fedkd.errors import SchemaError
from fedkd.knowledge import Knowledge, Params

KNOWLEDGE = "knowledge"
ABOUT = "about"
WEIGHT = "weight"


class Array(flwr.app.Array):  # the name is part of Flower's encoding: the other side reads a plain Array
    """A Flower Array that holds a tensor by reference and encodes it when ``data`` is first read."""

    def __init__(self, tensor: Tensor) -> None:
        tensor = tensor.detach()
        self.__dict__.update(
            tensor=tensor,
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(tensor.shape),
            stype="numpy.ndarray",
        )

    def __getattr__(self, name: str) -> Any:  # reached only while ``data`` has not been made
        if name != "data":
            raise AttributeError(name)
        data = flwr.app.Array(self.__dict__["tensor"].cpu().numpy()).data
        self.__dict__["data"] = data
        return data

    def numpy(self) -> NDArray[Any]:
        """The values, the caller's own; Flower's would write and read bytes."""
        values: NDArray[Any] = self.__dict__["tensor"].cpu().numpy().copy()
        return values

    def __reduce__(self) -> tuple[type[flwr.app.Array], tuple[str, tuple[int, ...], str, bytes]]:
        return flwr.app.Array, (self.dtype, self.shape, self.stype, self.data)


def to_record(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Wrap named tensors, by reference."""
    return array_record({name: Array(tensor) for name, tensor in tensors.items()})


def array_record(arrays: Mapping[str, flwr.app.Array]) -> ArrayRecord:
    """What ``ArrayRecord(arrays)`` gives, which would copy every array into Flower's own."""
    record = ArrayRecord()
    record.__dict__["_data"] = dict(arrays)
    return record


def to_records(records: Mapping[str, ArrayRecord | MetricRecord | ConfigRecord]) -> RecordDict:
    """What ``RecordDict(records)`` gives; its ``__setitem__`` evaluates type expressions, a fifth of a small round."""
    content = RecordDict()
    content.__dict__["_data"] = dict(records)
    return content


def own(content: RecordDict) -> RecordDict:
    """A copy whose containers are the caller's own; arrays are shared."""
    return to_records({name: record.copy() for name, record in content.items()})


def from_record(record: ArrayRecord) -> Params:
    """Named tensors of a record: by reference where possible, else decoded."""
    return {name: _tensor(array) for name, array in record.items()}


def _tensor(array: flwr.app.Array) -> Tensor:
    return array.tensor if isinstance(array, Array) else torch.from_numpy(array.numpy())


def pack(knowledge: Knowledge, about: Mapping[str, str | int | float]) -> RecordDict:
    """One message's content: the tensors, the weight, and scalars that say what they are about."""
    record = to_record({**knowledge.tensors, WEIGHT: knowledge.weight})
    return to_records({KNOWLEDGE: record, ABOUT: ConfigRecord(dict(about))})


def unpack(content: RecordDict) -> tuple[Knowledge, ConfigRecord]:
    """Undo `pack`.

    Raises:
        SchemaError: The content was not made by `pack`.
    """
    try:
        record, about = content[KNOWLEDGE], content[ABOUT]  # `array_records` would make a copy first
        if not (isinstance(record, ArrayRecord) and isinstance(about, ConfigRecord)):
            raise TypeError(f"{type(record).__name__} and {type(about).__name__}")
        tensors = from_record(record)
        weight = tensors.pop(WEIGHT)
    except TimeoutError:
        raise
    except Exception as error:  # another party's bytes: numpy's reader fails in many ways
        raise SchemaError(f"a message should hold '{KNOWLEDGE}' and '{ABOUT}', got {list(content)}") from error
    if weight.numel() != 1 or weight.is_complex():
        raise SchemaError(f"the weight should be a real scalar, got shape {tuple(weight.shape)} {weight.dtype}")
    return Knowledge(tensors, weight.reshape(())), about


def snapshot(state: RecordDict) -> list[object]:
    """Something that compares equal exactly while a state has not changed, edits in place included.

    No array is compared: one counts as the same while it holds the very same content object, not written to.
    """
    found: list[object] = []
    for name, record in state.items():
        if isinstance(record, ArrayRecord):
            found.append((name, [(key, _version(array)) for key, array in record.items()]))
        else:
            found.append((name, {key: value[:] if isinstance(value, list) else value for key, value in record.items()}))
    return found


def _version(array: flwr.app.Array) -> object:
    if not isinstance(array, Array):
        return _Held(array.data), 0
    tensor = array.tensor
    return _Held(tensor), object() if tensor.is_inference() else tensor._version


class _Held:
    """Equal to another only if it holds the very same object; holding it keeps its identity its own."""

    def __init__(self, held: object) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held) and self.held is other.held

    def __hash__(self) -> int:
        return id(self.held)
