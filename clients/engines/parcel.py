"""Parcels: Flower records between processes, the contents of arrays laid down apart, the rest a short header.

Where contents lie is the engine's: the pool lays them into an `Arena` of shared memory, Ray into its object store. The
receiver reads them in place; small ones travel in the header. What several messages hold is laid down once. Only
processes of our own exchange parcels, so the header may be a pickle.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import flwr.app
import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from torch import Tensor

from clients.engines.loop import App, Loop
from fedkd import wire

Lay: TypeAlias = Callable[[object, object, np.ndarray], Any]
"""Lays bytes down, given what identifies them and what keeps that so; returns their place."""

Look: TypeAlias = Callable[[Any], np.ndarray]
"""The bytes at a place."""

_SMALL = 1024  # bytes; below this a place of its own costs more than a copy
_TENSOR, _BYTES = 0, 1  # kinds of array: ours, and Flower's own
_ALIGN = 64  # bytes; torch aligns so, and with other alignments its kernels may round differently


def pack_job(message: Message, context: Context, run_config: object, lay: Lay) -> bytes:
    """A message and its client's context; ``run_config`` is None where the receiver knows it."""
    content = None if message.has_error() else _encode(message.content, lay)
    told = context.run_id, context.node_id, context.node_config, run_config
    return pickle.dumps(({**message.__dict__, "_content": content}, told, _encode(context.state, lay)), 5)


class Desk:
    """Where a worker process answers parcels by a client app."""

    def __init__(self, app: App) -> None:
        self._loop = Loop(app)
        self._run_config: dict[str, Any] = {}

    def answer(self, letter: bytes, look: Look, lay: Lay) -> bytes:
        """The parcel that answers one: the reply's content or error, and the client's state if it changed."""
        parts, (run_id, node_id, node_config, run_config), state = pickle.loads(letter)
        if run_config is not None:
            self._run_config = run_config
        message = Message.__new__(Message)
        content = parts["_content"]
        message.__dict__.update(parts, _content=None if content is None else _decode(content, look))
        context = Context(run_id, node_id, node_config, _decode(state, look), dict(self._run_config))
        before = wire.snapshot(context.state)
        reply = next(self._loop([(message, context)]))
        error = (reply.error.code, reply.error.reason) if reply.has_error() else None
        content = None if error else _encode(reply.content, lay)
        after = _encode(context.state, lay) if wire.snapshot(context.state) != before else None
        return pickle.dumps((content, error, after), 5)


def failed(error: Exception) -> bytes:
    """The parcel that says that none could be made."""
    return pickle.dumps((None, (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, f"{type(error).__name__}: {error}"), None), 5)


def settle(message: Message, context: Context, letter: bytes, look: Look) -> Message:
    """The reply in an answer; the client's new state goes home.

    The reply's tensors lie where ``look`` finds them. The state's are copied, since homes outlast their round.
    """
    content, error, state = pickle.loads(letter)
    if state is not None:
        context.state = _decode(state, look, copy=True)
    return Message(Error(*error) if error else _decode(content, look), reply_to=message)


# --- Records ----------------------------------------------------------------------------------------------------------


def _encode(records: RecordDict, lay: Lay) -> list[tuple[str, Any]]:
    """Records as plain values; a general pickler that asks about every object takes three times as long."""
    return [
        (name, [(key, _place(array, lay)) for key, array in record.items()])
        if isinstance(record, ArrayRecord)
        else (name, record)
        for name, record in records.items()
    ]


def _decode(coded: list[tuple[str, Any]], look: Look, *, copy: bool = False) -> RecordDict:
    return wire.to_records(
        {
            name: wire.array_record({key: _array(array, look, copy) for key, array in record})
            if isinstance(record, list)
            else record
            for name, record in coded
        }
    )


def _place(array: flwr.app.Array, lay: Lay) -> object:
    if isinstance(array, wire.Array):
        tensor = array.tensor
        flat = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        place = flat.tobytes() if flat.nbytes < _SMALL else lay(_identity(tensor), tensor, flat)
        return _TENSOR, place, array.dtype, array.shape, tensor.device.type
    if len(array.data) < _SMALL:
        return array
    place = lay(id(array.data), array.data, np.frombuffer(array.data, np.uint8))
    return _BYTES, place, array.dtype, array.shape, array.stype


def _identity(tensor: Tensor) -> object:
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _array(coded: Any, look: Look, copy: bool) -> flwr.app.Array:
    if isinstance(coded, flwr.app.Array):
        return coded
    kind, place, dtype, shape, how = coded
    if kind == _BYTES:
        return flwr.app.Array(dtype, shape, how, look(place).tobytes())
    if isinstance(place, bytes):
        if not place:
            return wire.Array(torch.empty(shape, dtype=getattr(torch, dtype)))
        flat, copy = torch.frombuffer(bytearray(place), dtype=torch.uint8), True
    else:
        flat = _tensor(look(place))
    flat = flat.clone() if copy or flat.data_ptr() % _ALIGN else flat
    tensor = flat.view(getattr(torch, dtype)).view(shape)
    return wire.Array(tensor.to(how) if how != "cpu" and torch.cuda.is_available() else tensor)


def _tensor(values: np.ndarray) -> Tensor:
    if values.flags.writeable:
        return torch.from_numpy(values)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*not writable", UserWarning)  # as Ray's are; nobody writes into a message
        return torch.from_numpy(values)
