"""FedKD: adaptive mutual distillation, and updates that travel as singular vectors."""

import numpy as np
import pytest
import torch
from flwr.app import RecordDict
from small import config, home, run

from clients.app import app
from clients.client import open_site, site
from clients.engines.vectorised import Vectorised
from fedkd import federation as federations
from fedkd import learn
from fedkd.config import Config
from fedkd.errors import ConfigError, SchemaError
from fedkd.grid import LocalGrid
from fedkd.knowledge import Knowledge, fingerprint, nest, pick
from fedkd.method import Peer
from privacy import mechanisms
from privacy.gate import Pool
from strategies.fedkd import FLOOR, FedKD, packed, rank, stepped, unpacked
from strategies.flower import KnowledgeStrategy


def matrix(s, out=6, inputs=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    u, _, v = torch.linalg.svd(torch.randn((out, inputs), generator=g, dtype=torch.float64), full_matrices=False)
    return ((u * torch.tensor(s, dtype=torch.float64)) @ v).float()


def prepared(by_client=("linear", "mlp"), client=0, model="mlp", **method):
    here = open_site(federations.build(config("fedkd", model, by_client, **method)))
    task, fedkd = here.federation.client_task(client), here.federation.config.method
    own = here.tensors(client, 1, fedkd.personal_init(task, 5, client))
    server = fedkd.server_init(here.federation.server_task, 5)
    return here, task, fedkd, own, fedkd.send(here.federation.server_task, server, 1, Peer(client, task.model.name))


# --- Compression ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("s", "energy", "expected"),
    [
        ([4.0, 2.0, 1.0], 0.7, 1),  # 16 of 21
        ([4.0, 2.0, 1.0], 0.9, 2),  # 20 of 21
        ([4.0, 2.0, 1.0], 0.96, 3),
        ([1.0, 1.0, 1.0, 1.0], 0.5, 3),  # exactly half is not more than half
        ([1.0] * 20, 0.96, 20),  # a flat spectrum: the released loop would end at rank 0
        ([3.0], 0.95, 1),  # one singular value: the released loop sends zeros
        ([2.0, 0.0], 1.0, 2),  # nothing is more than all: full rank
        ([0.0, 0.0, 0.0], 0.95, 1),
    ],
)
def test_the_rank_is_the_smallest_that_holds_more_than_the_energy(s, energy, expected):
    assert rank(torch.tensor(s), torch.tensor(energy)) == expected


@pytest.mark.parametrize("energy", [0.3, 0.7, 0.9, 0.96])
def test_what_is_sent_holds_the_energy_and_with_one_rank_less_it_would_not(energy):
    update = matrix([4.0, 3.0, 2.0, 1.0, 0.5])
    said = packed({"w": update}, torch.tensor(energy))
    r = len(said["w/s"])
    assert {n: tuple(t.shape) for n, t in said.items()} == {"w/u": (6, r), "w/s": (r,), "w/v": (r, 5)}
    rebuilt = (said["w/u"] * said["w/s"]) @ said["w/v"]
    share = float(rebuilt.square().sum() / update.square().sum())
    less = float(said["w/s"][:-1].square().sum() / update.square().sum())
    assert share > energy >= less


@pytest.mark.parametrize("model", ["linear", "mlp", "cnn", "resnet8"])
def test_at_full_rank_nothing_is_lost_convolutions_of_one_pixel_included(model):
    federation = federations.build(config("fedkd", model))
    net = federation.server_task.model
    update = net.init(3)
    back = unpacked(net, packed(update, torch.tensor(1.0)))
    assert {n: tuple(t.shape) for n, t in back.items()} == {n: shape for n, (shape, _) in net.schema.items()}
    for name, value in update.items():
        torch.testing.assert_close(back[name], value, rtol=1e-4, atol=1e-5)
    zero = unpacked(net, packed({n: torch.zeros_like(v) for n, v in update.items()}, torch.tensor(0.95)))
    assert not any(value.any() for value in zero.values())


def test_a_convolution_travels_as_a_matrix_of_its_filters():
    said = packed({"conv": torch.randn((8, 3, 5, 5))}, torch.tensor(1.0))
    assert {n: tuple(t.shape) for n, t in said.items()} == {"conv/u": (8, 8), "conv/s": (8,), "conv/v": (8, 75)}


@pytest.mark.parametrize(("t", "rounds", "expected"), [(1, 3, 0.96), (3, 3, 0.98), (1, 1, 0.98), (5, 3, 0.98)])
def test_the_energy_rises_linearly_to_its_end(t, rounds, expected):
    assert float(FedKD().energy(t, rounds)) == pytest.approx(expected, abs=1e-6)


# --- The client's half ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_client", [("mlp",), ("linear",)])  # the latter's "features" are 64 pixels, not 64 units
def test_a_step_of_mutual_distillation_worked_out_by_hand(by_client):
    _, task, fedkd, own, down = prepared(by_client, optimizer="sgd", batch=1000, energy_start=1.0, energy_end=1.0)
    assert len(own.order) == 1
    a = {n: v.clone().requires_grad_() for n, v in pick("mentor", own.personal).items()}
    b = {n: v.clone().requires_grad_() for n, v in pick("full/mlp", down.tensors).items()}
    same = task.model.name == "mlp"

    def forward(net, params, x):
        for name, block in net.named_children():
            if name == "head":
                features = x
            x = torch.func.functional_call(block, pick_dots(name, params), x)
        return features, x

    h_a, z_a = forward(task.model.net, a, own.x)
    h_b, z_b = forward(task.models["mlp"].net, b, own.x)
    ce, kl = torch.nn.functional.cross_entropy, torch.nn.KLDivLoss(reduction="batchmean")
    mse = torch.nn.functional.mse_loss
    total = (ce(z_a, own.y) + ce(z_b, own.y)).item()
    loss_a = ce(z_a, own.y) + kl(z_a.log_softmax(1), z_b.detach().softmax(1)) / total
    loss_b = ce(z_b, own.y) + kl(z_b.log_softmax(1), z_a.detach().softmax(1)) / total
    if same:
        loss_a = loss_a + mse(h_a, h_b.detach()) / total
        loss_b = loss_b + mse(h_b, h_a.detach()) / total
    loss_a.backward()
    loss_b.backward()
    kept, said = fedkd.client_update(task, own, down)
    for name, value in pick("mentor", kept).items():
        torch.testing.assert_close(value, (a[name] - 0.01 * a[name].grad).detach(), rtol=1e-4, atol=1e-6)
    for name, value in unpacked(task.models["mlp"], said.tensors).items():
        torch.testing.assert_close(value, -0.01 * b[name].grad, rtol=1e-3, atol=1e-6)
    assert fingerprint(pick("mentee", kept)) == fingerprint(pick("full/mlp", down.tensors))


def pick_dots(prefix, params):
    return {n.removeprefix(f"{prefix}."): v for n, v in params.items() if n.startswith(f"{prefix}.")}


def test_peers_that_agree_do_not_pull_at_all():
    _, task, fedkd, own, down = prepared(("mlp",), energy_start=1.0, energy_end=1.0)
    own = own._replace(personal=nest("mentor", pick("full/mlp", down.tensors)))
    kept, said = fedkd.client_update(task, own, down)
    alone = learn.fit(task, pick("full/mlp", down.tensors), own)
    for name, value in pick("mentor", kept).items():
        torch.testing.assert_close(value, alone[name], rtol=1e-3, atol=1e-5)
    assert said.tensors


def test_a_client_that_knows_its_one_class_by_heart_stays_finite():
    _, task, fedkd, own, down = prepared(("linear",), model="linear", lr=0.5, epochs=20)
    own = own._replace(y=torch.full_like(own.y, 3))
    kept, said = fedkd.client_update(task, own, down)
    assert all(bool(torch.isfinite(v).all()) for v in (*kept.values(), *said.tensors.values()))
    assert FLOOR > 0


# --- Rounds -----------------------------------------------------------------------------------------------------------


def test_clients_that_answer_every_round_hold_the_servers_mentee_and_are_sent_steps():
    strategy, rounds, grid = run(config("fedkd", "mlp", ["linear", "mlp"], federation={"rounds": 3}))
    here = open_site(strategy.federation)
    names = [{n.split("/")[0] for n in line.shapes} for r in rounds for line in r.lines if line.direction == "down"]
    assert names == [{"full", "energy"}] * 4 + [{"step", "energy"}] * 8
    copies = [pick("mentee", home(here, grid, k)) for k in range(4)]
    assert len({fingerprint(copy) for copy in copies}) == 1
    step = pick("step/mlp", strategy.server)
    now = stepped(strategy.task.model, copies[0], step)
    assert fingerprint(now) == fingerprint(strategy.method.student(strategy.task, strategy.server))


def test_bytes_are_those_of_the_factors_and_fewer_than_the_weights():
    _, rounds, _ = run(config("fedkd", federation={"rounds": 3}))
    whole = 4 * (64 * 128 + 128 + 128 * 64 + 64 + 64 * 10 + 10)
    for r in rounds:
        for line in r.lines:
            factors = [n.removesuffix("/s") for n in line.shapes if n.endswith("/s")]
            floats = sum(
                line.shapes[f"{n}/s"][0] * (line.shapes[f"{n}/u"][0] + 1 + line.shapes[f"{n}/v"][1]) for n in factors
            )
            plain = sum(int(np.prod(s, dtype=int)) for n, s in line.shapes.items() if n[-2:] not in ("/u", "/s", "/v"))
            assert line.bytes == 4 * (floats + plain)
            first_down = r is rounds[0] and line.direction == "down"
            if first_down:
                assert line.bytes == whole + 4
            else:
                assert len(factors) == 3 and line.bytes < whole


def test_who_was_away_gets_the_mentee_in_full_and_catches_up():
    cfg = config("fedkd", federation={"rounds": 6, "cohort": 2})
    strategy, rounds, _ = run(cfg)
    before, kinds = set(), set()
    for r in rounds:
        asked = {line.client: line for line in r.lines if line.direction == "down"}
        for client, line in asked.items():
            full = any(n.startswith("full/") for n in line.shapes)
            assert full == (client not in before)
            kinds.add(full)
        before = set(asked)
    assert kinds == {True, False}
    assert sorted(strategy.server["answered"].tolist()) == sorted(before)


def test_a_lost_home_is_said_in_one_line():
    here, task, fedkd, own, down = prepared(("mlp",))
    said = fedkd.client_update(task, own, down)[1]
    step = Knowledge({**nest("step/mlp", dict(said.tensors)), "energy": torch.tensor(0.95)})
    with pytest.raises(SchemaError, match="expected a mentee at home"):
        fedkd.client_update(task, own, step)
    assert here.federation.config.method_name == "fedkd"


def test_the_servers_step_is_the_weighted_mean_of_the_updates_compressed():
    here, *_ = prepared(("mlp",), energy_start=1.0, energy_end=1.0)
    task, fedkd = here.federation.server_task, here.federation.config.method
    server = fedkd.server_init(task, 5)
    down = fedkd.send(task, server, 1, Peer(0, "mlp"))
    released = [here.train(k, 1, down, RecordDict()) for k in range(4)]
    pool = Pool(released, here.mechanism, np.random.default_rng(0))
    after = fedkd.aggregate(task, server, pool, 1, np.random.default_rng(1))
    weights = [float(r.knowledge.weight) for r in released]
    updates = [unpacked(task.model, r.knowledge.tensors) for r in released]
    for name, value in fedkd.student(task, after).items():
        mean = np.average([u[name].numpy() for u in updates], axis=0, weights=weights)
        np.testing.assert_allclose(value.numpy(), server[f"full/mlp/{name}"].numpy() + mean, rtol=1e-3, atol=1e-5)
    assert after["answered"].tolist() == [0, 1, 2, 3]


def test_a_falling_threshold_is_refused():
    with pytest.raises(ConfigError, match=r"method\.energy_start=0\.99: expected at most method\.energy_end=0\.98"):
        federations.build(config("fedkd", energy_start=0.99))


def test_the_joint_training_is_refused_behind_an_ambassador():
    private = {"method": {"name": "fedkd"}, "privacy": {"mechanism": "ambassador", "delta": 1e-3}}
    with pytest.raises(ConfigError, match="fedkd reads records outside training"):
        mechanisms.refuse(Config.from_raw(private))


def test_the_vectorised_engine_refuses_ranks_that_depend_on_values():
    cfg = config("fedkd")
    here = site(cfg.to_json())
    grid = LocalGrid(Vectorised(app), 4, {"config": cfg.to_json()})
    with pytest.raises(ConfigError, match=r"fedkd with model 'mlp' is beyond torch\.func\.vmap"):
        KnowledgeStrategy(here.federation, here.mechanism).start(grid)


@pytest.mark.slow
def test_the_mentee_beats_staying_alone_with_a_quarter_of_the_bytes():
    data = {"limit": None, "test": 300, "alpha": 0.3, "reserve": 300}
    kept = {"data": data, "federation": {"clients": 5, "rounds": 6, "evaluate_every": 6}, "lr": 0.003, "seed": 0}
    _, rounds, _ = run(config("fedkd", **kept))
    assert rounds[-1].accuracy.global_ > run(config("local", **kept))[1][-1].accuracy.balanced_mean + 0.1
    whole = 4 * (64 * 128 + 128 + 128 * 64 + 64 + 64 * 10 + 10)
    assert sum(r.bytes_up for r in rounds) < 0.3 * 6 * 5 * whole
