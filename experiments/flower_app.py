"""Any Flower app on the local Grid: its own ServerApp and ClientApp, unmodified, without SuperLink and without Ray."""

from __future__ import annotations

import importlib
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TypeVar

import click
from flwr.app import Context, Message, RecordDict
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp
from flwr.common.config import flatten_dict, fuse_dicts, get_project_config, parse_config_args
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import ServerApp

from clients.engines.loop import Loop
from fedkd.errors import ConfigError
from fedkd.grid import RUN_ID, Engine, LocalGrid

MakeEngine = Callable[[str], Engine]
"""``"module:attribute"`` of a client app -> what runs it; closed after the run if it has a ``close``."""

_OURS = ("fedkd", "strategies", "clients", "privacy", "experiments")
App = TypeVar("App", ServerApp, ClientApp)


@dataclass(frozen=True)
class FlowerApp:
    """What an app's pyproject.toml says.

    Attributes:
        directory: Where it lies; on ``sys.path`` while it runs.
        server: ``"module:attribute"`` of the ServerApp.
        client: The same of the ClientApp.
        run_config: Flat, as both apps see it.
    """

    directory: Path
    server: str
    client: str
    run_config: UserConfig


@dataclass
class Tally:
    """What the grid saw.

    Attributes:
        rounds: Group ids of the training messages, which old strategies set to the round; without one, what was sent
            together is a round.
        failures: Error replies among ``replies``.
        first: Which client failed first, and why.
    """

    rounds: set[str] = field(default_factory=set)
    replies: int = 0
    failures: int = 0
    first: str = ""
    seconds: float = 0.0

    def sent(self, messages: list[Message]) -> None:
        """Count what was sent together."""
        turn = f"turn {len(self.rounds)}"
        trained = [message.metadata for message in messages if message.metadata.message_type.startswith("train")]
        self.rounds |= {metadata.group_id or turn for metadata in trained}

    def received(self, reply: Message, client: int) -> None:
        """Count one reply."""
        self.replies += 1
        if reply.has_error():
            self.failures += 1
            reason = " ".join((reply.error.reason or "no reason given").split())
            self.first = self.first or f"client {client}: {reason}"

    def __str__(self) -> str:
        parts = [f"{self.seconds:.2f} s", f"{len(self.rounds)} rounds", f"{self.replies} replies"]
        failures = f"{self.failures} failures" + (f", the first of {self.first}" if self.failures else "")
        return ", ".join([*parts, failures])


class SerialGrid(LocalGrid):
    """A local Grid for one thread at a time: Flower's older strategies ask each client from a thread of its own."""

    def __init__(self, engine: Engine, clients: int, run_config: UserConfig, tally: Tally) -> None:
        super().__init__(engine, clients, run_config, lambda reply: self._count(reply))
        self.tally = tally
        self._lock = threading.RLock()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Accept messages."""
        with self._lock:
            messages = list(messages)
            self.tally.sent(messages)
            return super().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies to the given messages, in their order."""
        with self._lock:
            return super().pull_messages(message_ids)

    def _count(self, reply: Message) -> None:
        self.tally.received(reply, self.client_of(reply.metadata.src_node_id))


def read(directory: Path, overrides: list[str]) -> FlowerApp:
    """Read an app's pyproject.toml and override its run config, both by Flower's rules.

    Raises:
        ConfigError: There is no such file, it names no components, or an override is malformed or unknown.
    """
    directory = directory.absolute()
    try:
        app = get_project_config(directory)["tool"]["flwr"]["app"]
        run_config = flatten_dict(app.get("config", {}))
    except FileNotFoundError:
        raise ConfigError(f"{directory}: no pyproject.toml here; give the folder of a Flower app") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{directory / 'pyproject.toml'}: {' '.join(str(error).split())}") from None
    components = app["components"]
    if not {"serverapp", "clientapp"} <= set(components):
        raise ConfigError(f"{directory / 'pyproject.toml'}: [tool.flwr.app.components] needs serverapp and clientapp")
    return FlowerApp(
        directory, components["serverapp"], components["clientapp"], _overridden(run_config, overrides, directory)
    )


def run(app: FlowerApp, clients: int, engine: MakeEngine) -> Tally:
    """Run an app to its end.

    Args:
        app: The app.
        clients: Number of nodes.
        engine: Makes what runs the ClientApp.

    Returns:
        What the grid saw.

    Raises:
        ConfigError: An app cannot be imported, or is not a Flower app.
    """
    tally = Tally()
    with ExitStack() as stack:
        stack.enter_context(_on_path(app.directory))
        server = _load(app.server, ServerApp)
        _load(app.client, ClientApp)  # the engine does so too, but cannot tell why it failed
        if "torch" in sys.modules:  # as in every engine: the answer does not depend on the number of workers
            sys.modules["torch"].set_num_threads(1)
        runner = engine(app.client)
        stack.callback(getattr(runner, "close", lambda: None))
        grid = SerialGrid(runner, clients, app.run_config, tally)
        context = Context(
            run_id=RUN_ID,
            node_id=SUPERLINK_NODE_ID,
            node_config={},
            state=RecordDict(),
            run_config=dict(app.run_config),
        )
        began = time.monotonic()
        server(grid, context)
        tally.seconds = time.monotonic() - began
    return tally


def engine_maker(workers: int = 1, timeout: float | None = None) -> MakeEngine:
    """The loop for one worker, the pool for several."""
    if workers == 1:
        return lambda app: Loop(_load(app, ClientApp), timeout)
    from clients.engines.pool import Pool

    return lambda app: Pool(app, timeout=timeout, workers=workers)


def _overridden(run_config: UserConfig, overrides: list[str], directory: Path) -> UserConfig:
    for text in overrides:
        if "=" not in text and not text.endswith(".toml"):
            raise ConfigError(f"--run-config: expected key=value, got '{text}'")
    try:
        given: UserConfig = parse_config_args(overrides)
    except (OSError, ValueError, click.ClickException):
        raise ConfigError(
            f"--run-config: expected key=value with TOML values, such as 'lr=0.1 name=\"mlp\"', or one TOML file, "
            f"got {' '.join(overrides)}"
        ) from None
    unknown = sorted(set(given) - set(run_config))
    if unknown:
        known = ", ".join(run_config) or "nothing"
        raise ConfigError(f"--run-config: {directory.name} has no '{unknown[0]}' in its config, only {known}")
    return fuse_dicts(run_config, given)


def _load(reference: str, kind: type[App]) -> App:
    """Import ``"module:attribute"``.

    Raises:
        ConfigError: That fails, or gives something else.
    """
    name, _, attributes = reference.partition(":")
    if not name or not attributes:
        raise ConfigError(f"expected module:attribute for the {kind.__name__}, got '{reference}'")
    try:
        found: object = importlib.import_module(name)
        for attribute in attributes.split("."):
            found = getattr(found, attribute)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        what = " ".join(str(error).split())
        raise ConfigError(
            f"cannot load the {kind.__name__} '{reference}' ({type(error).__name__}: {what}; "
            f"{Path(last.filename).name}, line {last.lineno})"
        ) from None
    if not isinstance(found, kind):
        raise ConfigError(f"'{reference}' should be a flwr {kind.__name__}, got {type(found).__name__}")
    return found


@contextmanager
def _on_path(directory: Path) -> Iterator[None]:
    """Import from a folder first. Its modules stay imported: a second app in this process needs other names.

    Raises:
        ConfigError: A module there would hide one of fedkd's.
    """
    for name in _OURS:
        theirs = PathFinder.find_spec(name, [str(directory)])
        ours = sys.modules[name].__file__ if name in sys.modules else None
        if theirs is not None and theirs.origin and ours and Path(theirs.origin).resolve() != Path(ours).resolve():
            raise ConfigError(f"{directory}: its module '{name}' has the name of one of fedkd's own; rename it")
    sys.path.insert(0, str(directory))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(directory))
