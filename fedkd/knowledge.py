"""Knowledge: the only thing that travels between parties."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from fedkd.errors import SchemaError

Params: TypeAlias = dict[str, Tensor]
"""Named tensors: a model's parameters, a server's state."""

Schema: TypeAlias = Mapping[str, tuple[tuple[int | str, ...], torch.dtype]]
"""What a receiver expects: name -> (shape, dtype). A size that is a word is the sender's to choose, once a message."""

RECORD = "record/"
"""Prefix of tensors with one row for each record of a client, in its own order, at home and in messages alike.

Engines that stack clients pad them, floats with 0 and integers with -1, and cut the answers to the client's own rows.
"""


_ONE = torch.ones(())  # one for all, so that a broadcast made anew for each client is still seen to be the same


@dataclass(frozen=True)
class Knowledge:
    """What one party tells another: parameters, logits, prototypes, features.

    Attributes:
        tensors: Named tensors.
        weight: Scalar aggregation weight, by convention the client's number of training samples. It leaves the
            client as well, so every privacy mechanism replaces it by 1.
    """

    tensors: Mapping[str, Tensor]
    weight: Tensor = field(default_factory=lambda: _ONE)

    def identity(self) -> tuple[object, ...]:
        """Equal for two knowledges that hold the very same tensors by the same names, while one of them lives."""
        return id(self.weight), *((name, id(tensor)) for name, tensor in self.tensors.items())

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the tensors as they would travel, uncompressed and without framing."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    @cached_property
    def norm(self) -> float:
        """L2 norm of all tensors together: how much is said. Infinite or NaN if a value is, or if it overflows."""
        floats = [t if t.is_floating_point() else t.float() for t in self.tensors.values() if t.numel()]
        return math.hypot(*torch.stack(torch._foreach_norm(floats)).tolist()) if floats else 0.0

    def to(self, device: torch.device) -> Knowledge:
        """The same knowledge on a device; itself where it is there already."""
        if all(t.device == device for t in (*self.tensors.values(), self.weight)):
            return self
        return Knowledge({name: t.to(device) for name, t in self.tensors.items()}, self.weight.to(device))

    def fits(self, schema: Schema, who: str) -> None:
        """Raise `SchemaError` unless the tensors have exactly the names, types and shapes of ``schema``."""
        if self.tensors.keys() != schema.keys():
            raise SchemaError(f"{who}: expected tensors {_names(schema)}, got {_names(self.tensors)}")
        chosen: dict[str, int] = {}
        for name, (shape, dtype) in schema.items():
            got = self.tensors[name]
            sizes = tuple(got.shape)
            right = len(sizes) == len(shape) and all(
                s == (chosen.setdefault(e, s) if isinstance(e, str) else e) for e, s in zip(shape, sizes, strict=True)
            )
            if not right or got.dtype != dtype:
                wanted = str(tuple(chosen.get(e, e) if isinstance(e, str) else e for e in shape)).replace("'", "")
                raise SchemaError(
                    f"{who}: '{name}' should be {wanted} {_dtype(dtype)}, got {sizes} {_dtype(got.dtype)}"
                )

    def check(self, schema: Schema, who: str) -> None:
        """As `fits`; moreover every value is finite and the weight a positive number."""
        self.fits(schema, who)
        if not math.isfinite(self.norm):  # one pass for all; only where it fails a closer look
            for name, got in self.tensors.items():
                if not bool(torch.isfinite(got).all()):
                    raise SchemaError(f"{who}: '{name}' holds NaN or infinite values")
        weight = float(self.weight)
        if not (math.isfinite(weight) and weight > 0):
            raise SchemaError(f"{who}: the weight should be a positive number, got {weight}")


def fingerprint(*parts: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, types and bytes; equal tensors give equal fingerprints on any engine."""
    sha = hashlib.sha256()
    for part in parts:
        for name in sorted(part):
            tensor = part[name].detach().cpu().contiguous()
            sha.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            if tensor.numel():
                sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        sha.update(b"|")
    return sha.hexdigest()


def nest(prefix: str, params: Mapping[str, Tensor]) -> Params:
    """Return ``params`` with ``prefix/`` before every name."""
    return {f"{prefix}/{name}": value for name, value in params.items()}


def pick(prefix: str, params: Mapping[str, Tensor]) -> Params:
    """Undo `nest`: the entries under ``prefix/``, with their own names."""
    start = f"{prefix}/"
    return {name[len(start) :]: value for name, value in params.items() if name.startswith(start)}


def _names(tensors: Mapping[str, object]) -> str:
    names = sorted(tensors)
    return str(names) if len(names) <= 4 else f"{names[:3]} and {len(names) - 3} more"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
