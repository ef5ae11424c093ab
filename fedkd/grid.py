"""A Flower Grid in this process: any Flower app, ours or not, without SuperLink and without Ray."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Protocol

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedkd import wire

RUN_ID = 1
_BATCH = 1024
_FIRST_NODE = 1000  # node ids are arbitrary in Flower; the SuperLink's own is 1


class Engine(Protocol):
    """What runs clients: takes jobs, yields their replies in the order of the jobs."""

    def __call__(self, jobs: Iterable[tuple[Message, Context]]) -> Iterator[Message]:
        """Answer each message with the client's state at hand; a failure is an error reply, never an exception."""
        ...


def failure(message: Message, reason: str) -> Message:
    """The reply of a client that could not answer."""
    return Message(Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason), reply_to=message)


def identify_server() -> None:
    """Let this process create Flower messages; outside a Flower run ``Message(...)`` raises until this is set."""
    TaskIdentity.run_id = RUN_ID
    TaskIdentity.task_id = 1
    TaskIdentity.node_id = SUPERLINK_NODE_ID


class LocalGrid(Grid):
    """Delivers messages to ``clients`` simulated nodes through an engine.

    A client's state is kept here between messages, so it lasts for the run as on a SuperNode.

    Args:
        engine: Runs the client app.
        clients: Number of nodes; node ``k`` has partition-id ``k``.
        run_config: Flower's flat run configuration, as both apps see it.
        on_reply: Called after each reply, for progress.
        homes: Where clients' states are kept between messages; by default a dictionary.
    """

    def __init__(
        self,
        engine: Engine,
        clients: int,
        run_config: Mapping[str, bool | float | int | str] | None = None,
        on_reply: Callable[[Message], None] = lambda _: None,
        homes: MutableMapping[int, RecordDict] | None = None,
    ) -> None:
        self.engine = engine
        self.clients = clients
        self.run_config = dict(run_config or {})
        self.on_reply = on_reply
        self.homes: MutableMapping[int, RecordDict] = {} if homes is None else homes
        self._sent: dict[str, Message] = {}
        self._replies: dict[str, Message] = {}
        self._ids = itertools.count(1)
        self._run = Run.create_empty(RUN_ID)
        identify_server()

    @staticmethod
    def node_of(client: int) -> int:
        """Node id of a client."""
        return _FIRST_NODE + client

    def client_of(self, node_id: int) -> int:
        """Client id (Flower's partition-id) of a node."""
        client = node_id - _FIRST_NODE
        if not 0 <= client < self.clients:
            raise ValueError(f"no node {node_id}: expected {_FIRST_NODE} to {_FIRST_NODE + self.clients - 1}")
        return client

    def context(self, client: int) -> Context:
        """The client's context, with a copy of its state's containers, so that a failed edit leaves the home alone."""
        home = self.homes.get(client) or RecordDict()
        return Context(
            run_id=RUN_ID,
            node_id=self.node_of(client),
            node_config={"partition-id": client, "num-partitions": self.clients},
            state=wire.own(home),
            run_config=dict(self.run_config),
        )

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Create a message from the server."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Ids of all nodes."""
        return range(_FIRST_NODE, _FIRST_NODE + self.clients)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Accept messages; they are delivered when replies are pulled."""
        ids = []
        for message in messages:
            self.client_of(message.metadata.dst_node_id)
            key = str(next(self._ids))
            message.metadata.__dict__["_message_id"] = key
            self._sent[key] = message
            ids.append(key)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies to the given messages, in their order."""
        ids = list(message_ids)
        fresh = [key for key in ids if key in self._sent]
        for batch in self._batches(fresh):
            self._deliver(batch)
        return [self._replies.pop(key) for key in ids if key in self._replies]

    def _batches(self, keys: list[str]) -> Iterator[list[str]]:
        """Split messages so that states are looked up a batch at a time, and no client has two in one batch."""
        batch: list[str] = []
        clients: set[int] = set()
        for key in keys:
            node = self._sent[key].metadata.dst_node_id
            if len(batch) == _BATCH or node in clients:
                yield batch
                batch, clients = [], set()
            batch.append(key)
            clients.add(node)
        if batch:
            yield batch

    def _deliver(self, keys: list[str]) -> None:
        messages = [self._delivered(self._sent.pop(key)) for key in keys]
        clients = [self.client_of(message.metadata.dst_node_id) for message in messages]
        contexts = [self.context(client) for client in clients]
        before = [wire.snapshot(context.state) for context in contexts]
        replies = self.engine(zip(messages, contexts, strict=True))
        for key, client, context, old, reply in zip(keys, clients, contexts, before, replies, strict=True):
            if wire.snapshot(context.state) != old:
                self.homes[client] = context.state
            reply.metadata.__dict__["_message_id"] = str(next(self._ids))
            self._replies[key] = reply
            self.on_reply(reply)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Deliver messages and return their replies in order.

        The engine limits the time of each client; ``timeout`` is not needed, since every reply is local.
        """
        return self.pull_messages(self.push_messages(messages))

    @staticmethod
    def _delivered(message: Message) -> Message:
        """A copy whose containers are the receiver's own.

        Stock strategies put one RecordDict into every message; in process a client that edits it would edit its
        neighbours'. Arrays are shared, containers are not.
        """
        if message.has_error():
            return message
        copy = Message.__new__(Message)
        copy.__dict__.update(message.__dict__, _content=wire.own(message.content))
        return copy
