"""Checkpoints: a run's whole state after a round, written beside and renamed, checked when read.

A checkpoint is a folder ``round-000007`` with ``server.safetensors``, ``homes.safetensors`` and ``state.json``, the
last holding the SHA-256 of the others. A kill at any moment leaves the previous checkpoint or the new one, whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, RecordDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedkd import wire
from fedkd.errors import ConfigError
from fedkd.knowledge import Params

_FORMAT = 1
_SEPARATOR = "\x1f"  # no architecture or record name holds it


@dataclass(frozen=True)
class Checkpoint:
    """State after a round.

    Attributes:
        round: The last finished round.
        server: The server's state.
        states: Each client's Flower state, by client id.
        extra: JSON values of the caller: ledger, scores.
    """

    round: int
    server: Params
    states: Mapping[int, RecordDict]
    extra: Mapping[str, Any]


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint and remove its predecessors."""
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / f"round-{checkpoint.round:06d}"
    draft = folder / f".draft-{os.getpid()}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    homes, configs = _flatten(checkpoint.states)
    _write(draft / "server.safetensors", checkpoint.server)
    _write(draft / "homes.safetensors", homes)
    state = {
        "format": _FORMAT,
        "round": checkpoint.round,
        "clients": sorted(checkpoint.states),
        "configs": configs,
        "extra": dict(checkpoint.extra),
        "sha256": {name: _sha(draft / name) for name in ("server.safetensors", "homes.safetensors")},
    }
    _sync(draft / "state.json", json.dumps(state))
    if new.exists():  # a run that was killed after this rename and resumed from before it cannot happen; be safe
        shutil.rmtree(new)
    draft.rename(new)
    for old in folder.iterdir():
        if old != new:
            shutil.rmtree(old, ignore_errors=True)


def load(folder: Path) -> Checkpoint:
    """Read the newest checkpoint.

    Raises:
        ConfigError: There is none, or it is damaged.
    """
    found = sorted(folder.glob("round-*")) if folder.is_dir() else []
    if not found:
        raise ConfigError(f"{folder}: no checkpoint here; run without --resume")
    newest = found[-1]
    try:
        state = json.loads((newest / "state.json").read_text(encoding="utf-8"))
        damaged = [name for name, sha in state["sha256"].items() if _sha(newest / name) != sha]
        if damaged or state["format"] != _FORMAT:
            raise ValueError(f"{', '.join(damaged) or 'state.json'} does not match its checksum or format")
        server = load_file(newest / "server.safetensors")
        states = _unflatten(state["clients"], load_file(newest / "homes.safetensors"), state["configs"])
        return Checkpoint(state["round"], server, states, state["extra"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ConfigError(
            f"{newest}: the checkpoint is damaged ({error}); delete it and run without --resume"
        ) from None


def _flatten(states: Mapping[int, RecordDict]) -> tuple[Params, dict[str, Any]]:
    tensors: Params = {}
    configs: dict[str, Any] = {}
    for client, state in states.items():
        for name, record in state.array_records.items():
            for key, value in wire.from_record(record).items():
                tensors[_SEPARATOR.join((str(client), name, key))] = value
        configs[str(client)] = {name: dict(record) for name, record in state.config_records.items()}
    return tensors, configs


def _unflatten(clients: list[int], tensors: Mapping[str, Tensor], configs: Mapping[str, Any]) -> dict[int, RecordDict]:
    arrays: dict[tuple[int, str], Params] = {}
    for flat, value in tensors.items():
        owner, name, key = flat.split(_SEPARATOR)
        arrays.setdefault((int(owner), name), {})[key] = value
    states = {client: RecordDict() for client in clients}
    for (client, name), params in arrays.items():
        states[client][name] = wire.to_record(params)
    for text, records in configs.items():
        for name, values in records.items():
            states[int(text)][name] = ConfigRecord(values)
    return states


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sha(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
