"""One client's side of a round: build its tensors, run the method's half, pass the gate."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache

from flwr.app import ConfigRecord, RecordDict

from fedkd import federation as federations
from fedkd import learn, seeds, wire
from fedkd.federation import Federation
from fedkd.knowledge import Knowledge, Params, nest
from fedkd.method import Peer
from fedkd.metrics import score
from fedkd.task import Client, Task
from privacy import mechanisms
from privacy.gate import Gate, Released
from privacy.ledger import Ledger
from privacy.mechanism import Mechanism, without_control

PERSONAL = "personal"
LEDGER = "ledger"


@dataclass(frozen=True, eq=False)
class Turn:
    """One client's part in a round, ready for the method: the gate has agreed.

    Attributes:
        round: The round, from 1.
        task: What everybody knows.
        client: What the client alone knows.
        down: What the server said, on whatever device it came.
        gate: What the answer has to pass.
    """

    round: int
    task: Task
    client: Client
    down: Knowledge
    gate: Gate


@dataclass(frozen=True, eq=False)
class Site:
    """Where clients of one federation work, in whatever process they run.

    A client's memory between rounds is a Flower state (`RecordDict`) that whoever runs it keeps: the parameters that
    stay at home, and its own ledger.
    """

    federation: Federation
    mechanism: Mechanism

    def train(self, client: int, t: int, down: Knowledge, state: RecordDict) -> Released:
        """Answer round ``t``. ``state`` changes only if the answer is complete."""
        turn = self.build(client, t, down, state)
        personal, raw = self.update(turn.task, turn.client, turn.down.to(self.federation.device))
        return self.conclude(turn, personal, raw, state)

    def build(self, client: int, t: int, down: Knowledge, state: RecordDict) -> Turn:
        """Ask the gate, then lay out what the client's half needs."""
        task, told = self.federation.client_task(client), down
        down = without_control(told)
        peer, schema = Peer(client, task.model.name), self.federation.config.method.reply_schema(task, down)
        gate = Gate(self.mechanism, self.ledger(state), peer, schema, told)
        gate.ask()
        return Turn(t, task, self.tensors(client, t, self.personal(client, state)), down, gate)

    def update(self, task: Task, client: Client, down: Knowledge) -> tuple[Params, Knowledge]:
        """The client's half: (what stays at home, the raw answer). A pure function of tensors."""
        return self.mechanism.update(self.federation.config.method, task, client, down)

    def conclude(self, turn: Turn, personal: Params, raw: Knowledge, state: RecordDict) -> Released:
        """Pass the gate, then write home; a refused answer leaves ``state`` as it was."""
        gate, t = turn.gate, turn.round
        noise = seeds.generator(self.federation.config.training_seed, "noise", t, gate.peer.client)
        released = gate.release(t, raw, noise)
        home = wire.to_record({name: p.detach().cpu() for name, p in personal.items()})
        ledger = ConfigRecord({"json": json.dumps(gate.ledger.to_json())}) if released.events else None
        state[PERSONAL] = home
        if ledger is not None:
            state[LEDGER] = ledger
        return released

    def evaluate(self, client: int, down: Knowledge, state: RecordDict) -> dict[str, float | int | list[float]]:
        """The client's model on the balanced global test and on its own test split, as two `Score`."""
        federation = self.federation
        task = federation.client_task(client)
        home = self.mechanism.home(self.personal(client, state))
        params = federation.config.method.judged(without_control(down).to(self.federation.device), home)
        balanced = score(task.model, params, federation.test_x, federation.test_y, calibrated=False)
        own = score(task.model, params, *federation.own_test_set(client))
        return {**balanced.to_metrics("balanced"), **own.to_metrics("personal")}

    def personal(self, client: int, state: RecordDict) -> Params:
        """What the client holds at home; made on its first round."""
        if PERSONAL in state:
            params = wire.from_record(state.array_records[PERSONAL])
        else:
            config, task = self.federation.config, self.federation.client_task(client)
            params = self.mechanism.personal_init(config.method, task, config.seed, client)
        return {name: p.to(self.federation.device) for name, p in params.items()}

    def ledger(self, state: RecordDict) -> Ledger:
        """The client's own ledger."""
        if LEDGER in state:
            return Ledger.from_json(json.loads(str(state.config_records[LEDGER]["json"])))
        return self.mechanism.ledger()

    def tensors(self, client: int, t: int, personal: Params) -> Client:
        """The client's records and this round's randomness."""
        federation, method, seed = self.federation, self.federation.config.method, self.federation.config.training_seed
        x, y = federation.train_set(client)
        y = self.mechanism.labels(y, federation.dataset.outputs, seeds.generator(seed, "labels", client=client))
        order = learn.batches(seeds.generator(seed, "order", t, client), len(y), method.batch, method.epochs)
        rows = method.public_order(seeds.generator(seed, "public order", t, client), len(federation.public_x))
        task = federation.client_task(client)
        draws = self.mechanism.draws(seeds.generator(seed, "dp-sgd", t, client), len(y), task)
        draws |= nest("method", method.draws(seeds.generator(seed, "method", t, client), task, len(y)))
        device = federation.device
        return Client(
            x,
            y,
            order.to(device),
            rows.to(device),
            {name: d.to(device) for name, d in draws.items()},
            personal,
            federation.notes(client),
        )


def answer(released: Released) -> RecordDict:
    """The content of the reply that carries what was released."""
    about: dict[str, str | int | float] = {
        "round": released.round,
        "client": released.peer.client,
        "model": released.peer.model,
        "events": json.dumps([event.to_json() for event in released.events]),
    }
    return wire.pack(released.knowledge, about)


def open_site(federation: Federation) -> Site:
    """The site of a federation.

    Raises:
        ConfigError: The method cannot honour the mechanism.
    """
    return Site(federation, mechanisms.build(federation))


@lru_cache(maxsize=2)
def site(config_json: str) -> Site:
    """The site of a configuration, opened once a process; how a Flower ClientApp finds its data."""
    return open_site(federations.from_json(config_json))
