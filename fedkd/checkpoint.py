"""Checkpoints: a run's state after a round, written beside and renamed, checked when read.

A checkpoint is a folder ``round-000007`` with ``server.safetensors`` and ``state.json``, the latter holding the SHA-256
of the former; the clients' homes lie beside (`fedkd.homes`). A kill at any moment leaves the previous checkpoint or the
new one, whole.
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

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedkd.errors import ConfigError
from fedkd.knowledge import Params

_FORMAT = 1
_SERVER, _STATE = "server.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """State after a round, without the clients' homes.

    Attributes:
        round: The last finished round.
        server: The server's state.
        extra: JSON values of the caller: ledger, scores.
    """

    round: int
    server: Params
    extra: Mapping[str, Any]


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint and remove its predecessors."""
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / f"round-{checkpoint.round:06d}"
    draft = folder / f".draft-{os.getpid()}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    _write(draft / _SERVER, checkpoint.server)
    state = {
        "format": _FORMAT,
        "round": checkpoint.round,
        "names": list(checkpoint.server),
        "extra": dict(checkpoint.extra),
        "sha256": {_SERVER: _sha(draft / _SERVER)},
    }
    _sync(draft / _STATE, json.dumps(state))
    if new.exists():
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
        state = json.loads((newest / _STATE).read_text(encoding="utf-8"))
        damaged = [name for name, sha in state["sha256"].items() if _sha(newest / name) != sha]
        if damaged or state["format"] != _FORMAT:
            raise ValueError(f"{', '.join(damaged) or 'state.json'} does not match its checksum or format")
        server = load_file(newest / _SERVER)
        names = state.get("names", server)  # in their order, in which noise is drawn; the file has one of its own
        return Checkpoint(state["round"], {name: server[name] for name in names}, state["extra"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ConfigError(
            f"{newest}: the checkpoint is damaged ({error}); delete it and run without --resume"
        ) from None


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
