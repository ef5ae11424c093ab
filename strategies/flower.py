"""A `Method` as a Flower `Strategy`: rounds, refusals, the ledger, and resuming."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from fedkd import metrics, seeds, wire
from fedkd.cohort import cohort
from fedkd.errors import BudgetExhausted, ConfigError, FedkdError, QuorumError, SchemaError
from fedkd.federation import Federation
from fedkd.grid import LocalGrid
from fedkd.knowledge import Knowledge, Params
from fedkd.method import Peer
from fedkd.metrics import Accuracy, Score
from fedkd.transcript import Line, Transcript
from privacy.accounting import FINAL_INTERVAL
from privacy.events import DpEvent, read_event
from privacy.gate import Pool, Released, admit
from privacy.ledger import Ledger
from privacy.mechanism import Mechanism, with_control, without_control


@dataclass(frozen=True)
class Round:
    """What one finished round looked like.

    Attributes:
        accuracy: None in rounds that were not evaluated.
        epsilon: Spent so far, the largest over clients; None when nothing is promised.
        signal_to_noise: Of the mean of this round's answers; None where messages carry no noise.
        lines: The transcript of this round.
    """

    t: int
    cohort: int
    accuracy: Accuracy | None
    bytes_up: int
    bytes_down: int
    epsilon: float | None
    signal_to_noise: float | None
    failures: list[Line]
    lines: list[Line]
    seconds: float


class KnowledgeStrategy(Strategy):
    """Runs a method over any Flower Grid.

    Args:
        federation: What all parties know.
        mechanism: What stands at the clients' doors.
        on_round: Called with each finished round, after the server's state has moved on.
    """

    def __init__(
        self, federation: Federation, mechanism: Mechanism, on_round: Callable[[Round], None] = lambda _: None
    ) -> None:
        self.federation = federation
        self.config = federation.config
        self.method = federation.config.method
        self.mechanism = mechanism
        self.on_round = on_round
        self.task = federation.server_task
        self.server = self._here(self.method.server_init(self.task, self.config.seed))
        self.ledger: Ledger = mechanism.ledger()
        self.control: Params = mechanism.control()
        self.signal_to_noise: float | None = None
        self.transcript = Transcript()
        self.round = 0
        self.last = self.config.federation.rounds
        self.accuracy: Accuracy | None = None
        self.scores: dict[int, dict[str, float]] = {}
        self._node_of: Callable[[int], int] | None = None
        self._asked: dict[int, tuple[int, Knowledge]] = {}  # this round's cohort: (node id, what it was told)
        self._packed_last: tuple[tuple[object, ...], Knowledge, RecordDict] | None = None

    def resume(self, t: int, server: Params, ledger: Ledger, control: Mapping[str, float] | None = None) -> None:
        """Continue after round ``t``."""
        self.round, self.server, self.ledger = t, self._here(server), ledger
        self.control = {name: torch.tensor(value) for name, value in (control or {}).items()}

    def summary(self) -> None:
        """Flower's hook; the run's own output says more."""

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the rounds that are left and return the server's final state.

        ``num_rounds`` defaults to the configuration's; the method decides what is sent, so ``initial_arrays`` and the
        two configs are not used.
        """
        result = Result()
        empty, nothing = ArrayRecord(), ConfigRecord()
        self.last = num_rounds or self.config.federation.rounds
        for t in range(self.round + 1, self.last + 1):
            began = time.monotonic()
            replies = grid.send_and_receive(self.configure_train(t, empty, nothing, grid), timeout=timeout)
            _, counts = self.aggregate_train(t, replies)
            scores = None
            if self.evaluates(t):
                replies = grid.send_and_receive(self.configure_evaluate(t, empty, nothing, grid), timeout=timeout)
                scores = self.aggregate_evaluate(t, replies)
            if counts is not None:
                result.train_metrics_clientapp[t] = counts
            if scores is not None:
                result.evaluate_metrics_clientapp[t] = scores
            self.on_round(self._finish(t, scores is not None, time.monotonic() - began))
        result.arrays = wire.to_record(self.server)
        return result

    def evaluates(self, t: int) -> bool:
        """Whether clients are scored after round ``t``."""
        return t % self.config.federation.evaluate_every == 0 or t == self.last

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask the ledger, then the cohort.

        Raises:
            BudgetExhausted: This round would pass the budget of a client in the cohort; nothing has left.
        """
        chosen = cohort(self.config, server_round)
        for client in chosen:
            self.ledger.ask(client, *self._promised(client))
        self._asked, messages = {}, []
        for client in chosen:
            knowledge = self._said_to(server_round, client)
            self.transcript.write(server_round, client, "down", knowledge)
            messages.append(self._message(server_round, client, "train", knowledge, grid))
            self._asked[client] = messages[-1].metadata.dst_node_id, knowledge
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Refuse what is not an answer, then let the method aggregate the rest.

        Raises:
            QuorumError: Fewer usable answers than the quorum; the server's state has not moved.
        """
        released = self._admitted(server_round, replies)
        needed, asked = self.config.federation.quorum_size(), len(self._asked)
        if len(released) < needed:
            failures = self.transcript.failures()
            first = f"; client {failures[0].client}: {failures[0].refused}" if failures else ""
            raise QuorumError(
                f"round {server_round}: {len(released)} of {asked} clients gave a usable answer, "
                f"federation.quorum asks for {needed}{first}"
            )
        rng = seeds.generator(self.config.training_seed, "server", server_round)
        noise = seeds.generator(self.config.training_seed, "server noise", server_round)
        pool = Pool(released, self.mechanism, noise, next(iter(self._asked.values()))[1])
        self.server = self.method.aggregate(self.task, self.server, pool, server_round, rng)
        self.control, self.signal_to_noise = pool.control(self.control), pool.signal_to_noise()
        self.round = server_round
        counts = MetricRecord({"answers": len(released), "refused": asked - len(released)})
        return wire.to_record(self.server), counts

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask clients to score their models: all of them, or this round's cohort."""
        federation = self.config.federation
        everybody = federation.evaluate == "all" or server_round == self.last
        chosen = range(federation.clients) if everybody else self._asked
        t = server_round  # evaluation is the simulation's own window, not part of the protocol or its transcript
        return [self._message(t, client, "evaluate", self._said_to(t, client), grid) for client in chosen]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Means over the clients that answered."""
        found = dict(sorted((_scored(reply) for reply in replies if not reply.has_error()), key=itemgetter(0)))
        self.scores = {k: {"balanced": all_.accuracy, "personal": own.accuracy} for k, (all_, own) in found.items()}
        if not found:
            return None
        self.accuracy = self._accuracy(*zip(*found.values(), strict=True))
        summary = self.accuracy.to_json()
        return MetricRecord({name: value for name, value in summary.items() if value is not None})

    def _accuracy(self, balanced: Sequence[Score], own: Sequence[Score]) -> Accuracy:
        student = self.method.student(self.task, self.server)
        test = self.federation.test_x, self.federation.test_y
        server = None if student is None else metrics.score(self.method.student_model(self.task), student, *test)
        return metrics.over_clients(balanced, own, server)

    def _finish(self, t: int, scored: bool, seconds: float) -> Round:
        return Round(
            t=t,
            cohort=len(self._asked),
            accuracy=self.accuracy if scored else None,
            bytes_up=self.transcript.bytes("up"),
            bytes_down=self.transcript.bytes("down"),
            epsilon=self.epsilon(),
            signal_to_noise=self.signal_to_noise,
            failures=self.transcript.failures(),
            lines=self.transcript.flush(),
            seconds=seconds,
        )

    def _here(self, tensors: Mapping[str, Tensor]) -> Params:
        return dict(Knowledge(tensors).to(self.federation.device).tensors)

    def epsilon(self) -> float | None:
        """Spent so far, the largest over clients; None when nothing is promised."""
        if not self.mechanism.promises:
            return None
        spent, budget = self.ledger.spent(), self.mechanism.budget
        if budget is not None and spent > budget:  # the quick grid overstates; look closer before saying so
            return self.ledger.spent(interval=FINAL_INTERVAL)
        return spent

    def _promised(self, client: int) -> tuple[DpEvent, ...]:
        return self.mechanism.events(first=not self.ledger.releases(client))

    def _said_to(self, t: int, client: int) -> Knowledge:
        peer = Peer(client, self.federation.client_models[client])
        return with_control(self.method.send(self.task, self.server, t, peer), self.control)

    def _message(self, t: int, client: int, kind: str, knowledge: Knowledge, grid: Grid) -> Message:
        if self._node_of is None:
            self._node_of = roster(grid, self.config.federation.clients)
        return Message(self._packed(t, knowledge), self._node_of(client), kind, group_id=str(t))

    def _packed(self, t: int, knowledge: Knowledge) -> RecordDict:
        """A message's content; a broadcast is packed once, and no Grid lets one client edit another's."""
        key = t, *knowledge.identity()
        if self._packed_last is None or self._packed_last[0] != key:
            self._packed_last = key, knowledge, wire.pack(knowledge, {"round": t})
        return self._packed_last[2]

    def _admitted(self, t: int, replies: Iterable[Message]) -> list[Released]:
        """Usable answers in client order; the others are recorded with the reason."""
        by_node = {reply.metadata.src_node_id: reply for reply in replies}
        released = []
        for client, (node, down) in self._asked.items():
            try:
                released.append(self._admit(t, client, down, by_node.get(node)))
            except BudgetExhausted:
                raise
            except FedkdError as error:
                self.transcript.refuse(t, client, str(error))
        return released

    def _admit(self, t: int, client: int, down: Knowledge, reply: Message | None) -> Released:
        if reply is None:
            raise SchemaError(f"client {client}, round {t}: no answer")
        if reply.has_error():
            reason = reply.error.reason or "no reason given"
            if reason.startswith(BudgetExhausted.__name__):
                raise BudgetExhausted(reason)
            raise SchemaError(reason)
        for event in self._promised(client):  # it left, whatever it says of itself, and whether or not it is of use
            self.ledger.record(client, t, event)
        said, about = wire.unpack(reply.content)
        knowledge = said.to(self.federation.device)
        try:
            events = tuple(read_event(event) for event in json.loads(str(about["events"])))
            peer, at = Peer(int(about["client"]), str(about["model"])), int(about["round"])  # type: ignore[arg-type]
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise SchemaError(f"client {client}, round {t}: the answer does not say what it is ({error})") from error
        expected = Peer(client, self.federation.client_models[client])
        schema = self.method.reply_schema(self.federation.client_task(client), without_control(down))
        released = admit(Released(peer, at, knowledge, events), t, expected, schema, self.mechanism)
        self.transcript.write(t, client, "up", released.knowledge)
        return released


def _scored(reply: Message) -> tuple[int, tuple[Score, Score]]:
    """A client, and its model on the balanced test set and on its own."""
    said: Any = reply.content.metric_records["scores"]
    return int(said["client"]), (Score.from_metrics(said, "balanced"), Score.from_metrics(said, "personal"))


def roster(grid: Grid, clients: int, patience: float = 120.0) -> Callable[[int], int]:
    """From client to node id, learnt by asking; Flower's node ids are random and nodes appear one by one.

    Raises:
        ConfigError: Not the right number of nodes within ``patience`` seconds.
    """
    if isinstance(grid, LocalGrid):
        return grid.node_of
    deadline = time.monotonic() + patience
    while len(nodes := list(grid.get_node_ids())) < clients and time.monotonic() < deadline:
        time.sleep(0.1)
    if len(nodes) != clients:
        raise ConfigError(
            f"federation.clients={clients}, but the grid has {len(nodes)} nodes; start as many nodes as clients"
        )
    hellos = [Message(RecordDict(), node, "query") for node in nodes]
    replies = [r for r in grid.send_and_receive(hellos, timeout=patience) if not r.has_error()]
    found = {int(r.content.config_records[wire.ABOUT]["client"]): r.metadata.src_node_id for r in replies}  # type: ignore[arg-type]
    if sorted(found) != list(range(clients)):
        raise ConfigError(f"expected nodes with partition-id 0 to {clients - 1}, got {sorted(found)}")
    return found.__getitem__
