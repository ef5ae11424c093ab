"""One client's side of a round: build its tensors, run the method's half, pass the gate."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache

from flwr.app import ConfigRecord, RecordDict

from fedkd import federation as federations
from fedkd import learn, seeds, wire
from fedkd.federation import Federation
from fedkd.knowledge import Knowledge, Params
from fedkd.method import Peer
from fedkd.metrics import accuracy
from fedkd.task import Client
from privacy import mechanisms
from privacy.gate import Gate, Released
from privacy.ledger import Ledger
from privacy.mechanisms import Mechanism

PERSONAL = "personal"
LEDGER = "ledger"


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
        config, task = self.federation.config, self.federation.client_task(client)
        peer, schema = Peer(client, task.model.name), config.method.reply_schema(task)
        gate = Gate(self.mechanism, self.ledger(state), peer, schema)
        gate.ask()
        tensors = self.tensors(client, t, self.personal(client, state))
        personal, raw = self.mechanism.update(config.method, task, tensors, self._here(down))
        released = gate.release(t, raw, seeds.generator(config.seed, "noise", t, client))
        state[PERSONAL] = wire.to_record({name: p.detach().cpu() for name, p in personal.items()})
        if released.event is not None:
            state[LEDGER] = ConfigRecord({"json": json.dumps(gate.ledger.to_json())})
        return released

    def evaluate(self, client: int, down: Knowledge, state: RecordDict) -> dict[str, float]:
        """Accuracy of the client's model on the balanced global test and on the client's own test split."""
        federation = self.federation
        task = federation.client_task(client)
        home = self.mechanism.home(self.personal(client, state))
        params = federation.config.method.judged(self._here(down), home)
        x, y = federation.own_test_set(client)
        return {
            "balanced": accuracy(task.model, params, federation.test_x, federation.test_y),
            "personal": accuracy(task.model, params, x, y),
        }

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
        federation, method, seed = self.federation, self.federation.config.method, self.federation.config.seed
        x, y = federation.train_set(client)
        order = learn.batches(seeds.generator(seed, "order", t, client), len(y), method.batch, method.epochs)
        rows = method.public_order(seeds.generator(seed, "public order", t, client), len(federation.public_x))
        task = federation.client_task(client)
        draws = self.mechanism.draws(seeds.generator(seed, "dp-sgd", t, client), len(y), task)
        device = federation.device
        return Client(
            x, y, order.to(device), rows.to(device), {name: d.to(device) for name, d in draws.items()}, personal
        )

    def _here(self, knowledge: Knowledge) -> Knowledge:
        device = self.federation.device
        if device.type == "cpu":
            return knowledge
        return Knowledge({name: v.to(device) for name, v in knowledge.tensors.items()}, knowledge.weight.to(device))


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
