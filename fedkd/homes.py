"""Homes: what each client keeps between rounds, in memory up to a limit and on disk above it.

A home on disk is one file, ``CLIENT-ROUND.safetensors``, that holds its own fingerprint. A round writes the homes that
changed beside the old ones; the old ones go once the round's checkpoint is there. So a round costs what its cohort
costs, however large the federation, and a kill at any moment leaves a home of the last checkpoint for every client.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator, MutableMapping
from pathlib import Path

from flwr.app import ConfigRecord, RecordDict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fedkd import wire
from fedkd.errors import ConfigError
from fedkd.knowledge import Params, fingerprint

_SEPARATOR = "\x1f"  # no record has it in its name
_DRAFT = "draft"


class Homes(MutableMapping[int, RecordDict]):
    """Client id -> Flower state.

    Args:
        folder: Where homes are written; None keeps all in memory.
        limit: Bytes of tensors kept in memory.
    """

    def __init__(self, folder: Path | None = None, limit: int = 2 << 30) -> None:
        self.folder = folder
        self.limit = limit
        self._memory: OrderedDict[int, RecordDict] = OrderedDict()
        self._bytes = 0
        self._changed: set[int] = set()
        self._files: dict[int, Path] = {}
        self._drafts: dict[int, Path] = {}
        self._old: list[Path] = []

    @classmethod
    def open(cls, folder: Path, t: int, limit: int = 2 << 30) -> Homes:
        """The homes as they were after round ``t``; files of later rounds are ignored, and replaced when written."""
        homes = cls(folder, limit)
        for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else []:
            client, _, written = path.stem.partition("-")
            if written != _DRAFT and int(written) <= t:
                homes._files[int(client)] = path  # sorted by round, so the newest stays
        return homes

    def __getitem__(self, client: int) -> RecordDict:
        """The state of a client.

        Raises:
            KeyError: It has none yet.
            ConfigError: Its file is damaged.
        """
        if client in self._memory:
            self._memory.move_to_end(client)
            return self._memory[client]
        state = _read(self._drafts.get(client) or self._files[client])
        self._keep(client, state)
        return state

    def __setitem__(self, client: int, state: RecordDict) -> None:
        """Replace the state of a client."""
        self._forget(client)
        self._drafts.pop(client, None)
        self._changed.add(client)
        self._keep(client, state)

    def __delitem__(self, client: int) -> None:
        """Homes are not torn down."""
        raise TypeError("a client's home cannot be deleted")

    def __iter__(self) -> Iterator[int]:
        """Client ids, ascending."""
        return iter(sorted({*self._memory, *self._files, *self._drafts}))

    def __len__(self) -> int:
        """Number of clients with a home."""
        return len({*self._memory, *self._files, *self._drafts})

    def write(self, t: int) -> None:
        """Write what changed as of round ``t``, beside what is there."""
        if self.folder is None:
            return
        for client in sorted(self._changed):
            path = self.folder / f"{client:08d}-{t:06d}.safetensors"
            draft = self._drafts.pop(client, None) or self._write(client, self._memory[client])
            draft.replace(path)
            before = self._files.get(client)
            if before is not None and before != path:
                self._old.append(before)
            self._files[client] = path
        self._changed.clear()
        self._evict()

    def verify(self) -> None:
        """Read every home on disk once.

        Raises:
            ConfigError: One is damaged.
        """
        for path in self._files.values():
            _read(path)

    def settle(self) -> None:
        """Drop what `write` superseded; call it once the round's checkpoint is there."""
        for path in self._old:
            path.unlink(missing_ok=True)
        self._old.clear()

    def _keep(self, client: int, state: RecordDict) -> None:
        self._memory[client] = state
        self._bytes += _size(state)
        self._evict()

    def _forget(self, client: int) -> None:
        if client in self._memory:
            self._bytes -= _size(self._memory.pop(client))

    def _evict(self) -> None:
        """Move the homes used longest ago to disk, all but the last."""
        while self.folder is not None and self._bytes > self.limit and len(self._memory) > 1:
            client, state = next(iter(self._memory.items()))
            if client in self._changed:
                self._drafts[client] = self._write(client, state)
            self._forget(client)

    def _write(self, client: int, state: RecordDict) -> Path:
        folder = self.folder or Path()
        folder.mkdir(parents=True, exist_ok=True)
        tensors = _tensors(state)
        configs = json.dumps({name: dict(record) for name, record in state.config_records.items()}, sort_keys=True)
        path = folder / f"{client:08d}-{_DRAFT}.safetensors"
        copies = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
        save_file(copies, path, {"configs": configs, "sha256": fingerprint(tensors) + _sha(configs)})
        return path


def _tensors(state: RecordDict) -> Params:
    return {
        _SEPARATOR.join((name, key)): value
        for name, record in state.array_records.items()
        for key, value in wire.from_record(record).items()
    }


def _size(state: RecordDict) -> int:
    return sum(t.numel() * t.element_size() for t in _tensors(state).values())


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _read(path: Path) -> RecordDict:
    try:
        with safe_open(path, "pt") as file:
            tensors: Params = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            said = file.metadata()
        if fingerprint(tensors) + _sha(said["configs"]) != said["sha256"]:
            raise ValueError("its content does not match its fingerprint")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ConfigError(f"{path}: a client's home is damaged ({error}); run without --resume") from None
    arrays: dict[str, Params] = {}
    for flat, value in tensors.items():
        name, key = flat.split(_SEPARATOR)
        arrays.setdefault(name, {})[key] = value
    state = RecordDict({name: wire.to_record(params) for name, params in arrays.items()})
    for name, values in json.loads(said["configs"]).items():
        state[name] = ConfigRecord(values)
    return state
