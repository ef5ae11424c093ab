"""FedGKT: FedD2S with one cut for ever, bit for bit, and a round of the paper's box written out in plain torch."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from clients.app import app
from clients.client import site
from clients.engines.loop import Loop
from fedkd import federation as federations
from fedkd import learn, seeds, wire
from fedkd.config import Config
from fedkd.errors import ConfigError
from fedkd.grid import LocalGrid
from fedkd.knowledge import fingerprint, pick
from fedkd.registry import method_class
from strategies.fedd2s import FedD2S
from strategies.fedgkt import FedGKT
from strategies.flower import KnowledgeStrategy

CLIENTS, K = 3, 10


def config(name: str, rounds: int = 3, model: str = "mlp", **method) -> Config:
    return Config.from_raw(
        {
            "seed": 5,
            "data": {"limit": 400, "test": 100, "partition": "dirichlet", "alpha": 1.0, "reserve": 60},
            "federation": {"clients": CLIENTS, "rounds": rounds, "evaluate_every": rounds},
            "model": {"name": model},
            "method": {"name": name, "lr": 0.01, "batch": 16, **method},
        }
    )


def run(config: Config):
    here, rounds = site(config.to_json()), []
    grid = LocalGrid(Loop(app), CLIENTS, {"config": config.to_json()})
    strategy = KnowledgeStrategy(here.federation, here.mechanism, rounds.append)
    strategy.start(grid)
    assert [line.refused for r in rounds for line in r.failures] == []
    return strategy, rounds, {k: wire.from_record(s.array_records["personal"]) for k, s in sorted(grid.homes.items())}


def prints(config: Config):
    strategy, rounds, homes = run(config)
    server = {k: v for k, v in strategy.server.items() if not k.startswith(("cuts/", "trained/"))}
    lines = [(line.direction, line.bytes, line.norm) for r in rounds for line in r.lines]
    return fingerprint(server), [fingerprint(home) for home in homes.values()], lines, rounds[-1].accuracy


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "block"), [("linear", "block1"), ("mlp", "block1"), ("mlp", "block2"), ("cnn", "block2")]
)
@pytest.mark.parametrize("schedule", [{"mode": "off"}, {"mode": "rate", "rate": 0.0}], ids=["off", "rate 0"])
def test_it_is_fedd2s_that_never_drops_a_layer_bit_for_bit(model, block, schedule):
    gkt = prints(config("fedgkt", model=model, after=block))
    assert gkt == prints(config("fedd2s", model=model, dropping=[block], kd_grad="all", **schedule))
    assert prints(config("fedgkt", model="mlp")) == prints(config("fedgkt", model="mlp", after="block2"))


def test_with_more_cuts_a_rate_of_nought_stays_at_the_first():
    one, two = (prints(config("fedd2s", mode="rate", rate=0.0, dropping=d)) for d in (["block2"], ["block1", "block2"]))
    assert one[1:] == two[1:]


class Reference:
    """Algorithm 1 with the extractor of an mlp's block1: torch modules, autograd, torch.optim, dictionaries by id."""

    def __init__(self, federation, start, t=3.0, alpha=1.5):
        self.federation, self.t, self.alpha = federation, t, alpha
        self.clients = [self.net(start) for _ in range(CLIENTS)]
        self.server = self.net(start)[2:]
        self.logits = [{} for _ in range(CLIENTS)]  # of the server, by client and record

    @staticmethod
    def net(start):
        def linear(name):
            layer = torch.nn.Linear(*reversed(start[f"{name}.weight"].shape))
            layer.load_state_dict({k: start[f"{name}.{k}"] for k in ("weight", "bias")})
            return layer

        relu = torch.nn.ReLU
        extractor = torch.nn.Sequential(torch.nn.Flatten(), linear("block1.1"), relu())
        return torch.nn.Sequential(extractor, torch.nn.Identity(), linear("block2.0"), relu(), linear("head"))

    def kd(self, student, teacher):
        soft = (teacher / self.t).softmax(1)
        return self.t**2 * kl_div((student / self.t).log_softmax(1), soft, reduction="batchmean")

    def round(self, t, batch, server_batch, when):
        sent = []
        for k, net in enumerate(self.clients):
            x, y = self.federation.train_set(k)
            optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
            for row in learn.batches(seeds.generator(5, "order", t, k), len(y), batch, 1):
                ids = row[row >= 0].tolist()
                loss = cross_entropy(net(x[ids]), y[ids])
                if self.logits[k]:
                    loss = loss + self.alpha * self.kd(net(x[ids]), torch.stack([self.logits[k][i] for i in ids]))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                sent += [(k, i, net[0](x[i : i + 1])[0], net(x[i : i + 1])[0], y[i]) for i in range(len(y))]
        h, z, y = (torch.stack([record[j] for record in sent]) for j in (2, 3, 4))
        optimizer, answers = torch.optim.SGD(self.server.parameters(), lr=0.05), torch.zeros_like(z)
        for row in learn.batches(seeds.generator(5, "server", t), len(sent), server_batch, 1):
            ids = row[row >= 0]
            out = self.server(h[ids])
            answers[ids] = out.detach()
            loss = cross_entropy(out, y[ids]) + self.alpha * self.kd(out, z[ids])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            for (k, i, *_), q in zip(sent, self.server(h) if when == "after" else answers, strict=True):
                self.logits[k][i] = q


@pytest.mark.parametrize("when", ["after", "training"])
def test_two_rounds_of_the_papers_box_in_plain_torch(when):
    settings = {"after": "block1", "server_batch": 50, "optimizer": "sgd", "lr": 0.05, "answers": when}
    strategy, _, homes = run(config("fedgkt", rounds=2, **settings))
    reference = Reference(strategy.federation, strategy.task.model.init(5))
    for t in (1, 2):
        reference.round(t, 16, 50, when)
    close = {"rtol": 1e-4, "atol": 1e-5}
    for k, net in enumerate(reference.clients):
        for name, value in homes[k].items():
            place = {"block1.1": net[0][1], "block2.0": net[2], "head": net[4]}[name.rpartition(".")[0]]
            torch.testing.assert_close(value, getattr(place, name.rpartition(".")[2]).detach(), **close)
        told = pick(f"client/{k:05d}", strategy.server)
        expected = torch.stack([reference.logits[k][i] for i in told["record/id"].tolist()])
        torch.testing.assert_close(told["record/q"], expected, **close)
    head = pick("head/mlp/1", strategy.server)
    for name, layer in (("block2.0", reference.server[0]), ("head", reference.server[2])):
        torch.testing.assert_close(head[f"{name}.weight"], layer.weight.detach(), **close)


def test_the_last_epochs_logits_are_those_before_each_step():
    late, early = (run(config("fedgkt", rounds=1, answers=a, server_batch=10_000)) for a in ("after", "training"))
    fresh = pick("head/mlp/2", early[0].method.server_init(early[0].task, 5))
    for k in range(CLIENTS):
        x, _ = early[0].federation.train_set(k)
        h = early[0].task.model.features(early[2][k], x, 2)
        for (strategy, _, _), head in ((early, fresh), (late, pick("head/mlp/2", late[0].server))):
            q = strategy.server[f"client/{k:05d}/record/q"]
            torch.testing.assert_close(q, strategy.task.model.head(head, h, 2), rtol=1e-4, atol=1e-5)
    assert fingerprint(pick("head", early[0].server)) == fingerprint(pick("head", late[0].server))


@pytest.mark.parametrize(
    "fields", [{"mode": "rate"}, {"kd_grad": "shared_only"}, {"dropping": ["block1"]}, {"rate": 0.5}]
)
def test_what_makes_it_fedd2s_cannot_be_set(fields):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        config("fedgkt", **fields)


@pytest.mark.parametrize(("after", "message"), [("head", "'head' is a model's last"), ("blok1", "got 'blok1'")])
def test_a_block_that_cannot_be_cut_after_is_refused(after, message):
    with pytest.raises(ConfigError, match=f"method.after: .*{message}"):
        federations.build(config("fedgkt", after=after))


def test_the_declared_traits():
    assert method_class("fedgkt") is FedGKT and issubclass(FedGKT, FedD2S)
    assert (FedGKT.evidence, FedGKT.sends, FedGKT.needs_public) == ("official-code", "features", False)
    assert (FedGKT.needs_each, FedGKT.same_model, FedGKT().reads_records()) == (True, False, True)
    assert {FedGKT().cut(t, (3, 2, 1), 10) for t in range(10)} == {3}


def test_bytes_are_features_logits_label_and_id_up_and_logits_and_id_down():
    strategy, rounds, _ = run(config("fedgkt", after="block1"))
    n = sum(len(i) for i in strategy.federation.split.train)
    assert [r.bytes_up for r in rounds] == [n * (4 * 128 + 4 * K + 16)] * 3
    assert [r.bytes_down for r in rounds] == [0, n * (4 * K + 8), n * (4 * K + 8)]


@pytest.mark.slow
def test_knowledge_from_others_beats_staying_alone():
    scores = {}
    for name in ("local", "fedgkt"):
        raw = {
            "data": {"name": "digits", "test": 300, "partition": "dirichlet", "alpha": 0.3, "reserve": 300},
            "federation": {"clients": CLIENTS, "rounds": 10, "evaluate_every": 10},
            "model": {"name": "linear"},
            "method": {"name": name, "lr": 0.003, "batch": 16},
        }
        scores[name] = np.mean(
            [run(Config.from_raw(raw | {"seed": seed}))[1][-1].accuracy.balanced_mean for seed in range(3)]
        )
    assert scores["fedgkt"] > scores["local"] + 0.04
