"""Knowledge: the only thing that travels between parties."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from fedkd.errors import SchemaError

Params: TypeAlias = dict[str, Tensor]
"""Named tensors: a model's parameters, a server's state."""

Schema: TypeAlias = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""What a receiver expects: name -> (shape, dtype)."""


def _one() -> Tensor:
    return torch.ones(())


@dataclass(frozen=True)
class Knowledge:
    """What one party tells another: parameters, logits, prototypes, features.

    Attributes:
        tensors: Named tensors.
        weight: Scalar aggregation weight, by convention the client's number of training samples. It leaves the
            client as well, so every privacy mechanism replaces it by 1.
    """

    tensors: Mapping[str, Tensor]
    weight: Tensor = field(default_factory=_one)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors as they would travel, uncompressed and without framing."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def to(self, device: torch.device) -> Knowledge:
        """The same knowledge on a device; itself where it is there already."""
        if all(t.device == device for t in (*self.tensors.values(), self.weight)):
            return self
        return Knowledge({name: t.to(device) for name, t in self.tensors.items()}, self.weight.to(device))

    def fits(self, schema: Schema, who: str) -> None:
        """Raise `SchemaError` unless the tensors have exactly the names, shapes and types of ``schema``."""
        if self.tensors.keys() != schema.keys():
            raise SchemaError(f"{who}: expected tensors {_names(schema)}, got {_names(self.tensors)}")
        for name, (shape, dtype) in schema.items():
            got = self.tensors[name]
            if tuple(got.shape) != shape or got.dtype != dtype:
                raise SchemaError(
                    f"{who}: '{name}' should be {shape} {_dtype(dtype)}, got {tuple(got.shape)} {_dtype(got.dtype)}"
                )

    def check(self, schema: Schema, who: str) -> None:
        """As `fits`; moreover every value is finite and the weight a positive number."""
        self.fits(schema, who)
        for name, got in self.tensors.items():
            if not _finite(got):
                raise SchemaError(f"{who}: '{name}' holds NaN or infinite values")
        if not (bool(torch.isfinite(self.weight)) and float(self.weight) > 0):
            raise SchemaError(f"{who}: the weight should be a positive number, got {float(self.weight)}")


def _finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; both spoil a sum, and only a sum that overflows needs a closer look."""
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


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
