"""DENSE: one round, then the server distils the ensemble on images it makes up."""

from functools import cache

import numpy as np
import pytest
import torch
from flwr.app import RecordDict
from small import config, home, run

from clients.client import open_site
from fedkd import federation as federations
from fedkd import learn
from fedkd.errors import ConfigError
from fedkd.knowledge import Knowledge, fingerprint, pick
from fedkd.losses import kl
from fedkd.method import Peer
from privacy.gate import Pool
from strategies.dense import Dense, ensemble_of, generator

QUICK = {"synthesis_epochs": 2, "synthesis_batch": 16, "generator_steps": 4}
WHOLE = {"linear": 4 * (64 * 10 + 10), "mlp": 4 * (64 * 128 + 128 + 128 * 64 + 64 + 64 * 10 + 10)}


@cache
def answered(by_client=("linear", "mlp")):
    """The site, the student, and every client's answer to round 1."""
    here = open_site(federations.build(config("dense", "linear", by_client, epochs=5, **QUICK)))
    task, dense = here.federation.server_task, here.federation.config.method
    server = dense.server_init(task, 5)
    downs = [dense.send(task, server, 1, Peer(k, here.federation.client_models[k])) for k in range(4)]
    return here, server, [here.train(k, 1, down, RecordDict()) for k, down in enumerate(downs)]


def test_one_round_is_enough_and_weights_travel_once():
    strategy, rounds, _ = run(config("dense", "mlp", federation={"rounds": 1}, **QUICK))
    assert [(r.bytes_up, r.bytes_down) for r in rounds] == [(4 * WHOLE["mlp"], 4 * WHOLE["mlp"])]
    assert rounds[0].accuracy.global_ is not None
    assert strategy.method.student(strategy.task, strategy.server).keys() == strategy.task.model.schema.keys()


def test_clients_of_another_architecture_are_sent_nothing_and_go_on_from_home():
    strategy, rounds, grid = run(config("dense", "linear", ["linear", "mlp"], **QUICK))
    here = open_site(strategy.federation)
    for r in rounds:
        size = {(line.client, line.direction): line.bytes for line in r.lines}
        assert [size[k, "down"] for k in range(4)] == [WHOLE["linear"], 0] * 2
        assert [size[k, "up"] for k in range(4)] == [WHOLE["linear"], WHOLE["mlp"]] * 2
    task, w = strategy.federation.client_task(1), strategy.federation.client_task(1).model.init(5, 2)
    for t in (1, 2):
        w = learn.fit(task, w, here.tensors(1, t, {}))
    assert fingerprint(home(here, grid, 1)) == fingerprint(w)
    own = home(here, grid, 1)
    assert strategy.method.judged(Knowledge({}), own) is own


def test_the_ensemble_is_the_plain_mean_of_all_clients_logits():
    here, _, released = answered()
    x = here.federation.test_x[:7]
    each = [here.federation.client_task(k).model.logits(r.knowledge.tensors, x) for k, r in enumerate(released)]
    got = ensemble_of(here.federation.server_task, released)(x)
    torch.testing.assert_close(got, torch.stack(each).mean(0), rtol=1e-4, atol=1e-5)


def test_the_generators_cost_worked_out_by_hand():
    student = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[3.0, 1.0, 0.0], [2.0, 0.0, 1.0]], requires_grad=True)  # they differ on the second only
    wanted = torch.tensor([1, 0])
    p, q = teacher[1].softmax(0), student[1].softmax(0)
    ce = torch.nn.functional.cross_entropy(teacher, wanted)
    expected = 0.7 * ce - 0.4 * (p * (p.log() - q.log())).sum() / 2
    dense = Dense(oh=0.7, adv=0.4)
    cost = dense.cost(student, teacher, wanted)
    torch.testing.assert_close(cost, expected)
    cost.backward()
    assert not student.grad[0].any() and student.grad[1].any()  # agreeing samples say nothing about the student


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 30, 31)])
def test_generated_images_have_the_shape_and_the_range_of_the_data(shape):
    net = generator(shape, 12, 8)
    x = net.apply(net.init(0), 10 * torch.randn((5, 12), generator=torch.Generator().manual_seed(0)))
    assert x.shape == (5, *shape)
    assert float(x.min()) >= (0 if shape[0] == 1 else -1) and float(x.max()) <= 1
    assert float(x.std()) > 0


def test_generated_images_are_what_the_ensemble_takes_for_the_wanted_classes():
    here, server, released = answered()
    task, ensemble = here.federation.server_task, ensemble_of(here.federation.server_task, released)
    losses = []
    for steps in (1, 40):
        dense = Dense(synthesis_batch=64, generator_steps=steps, adv=0.0, generator_lr=0.02)
        rng = np.random.default_rng(0)
        x = dense.generate(task, pick("linear", server), ensemble, rng)
        rng = np.random.default_rng(0)
        rng.standard_normal((64, dense.latent), dtype=np.float32)
        wanted = torch.from_numpy(rng.integers(10, size=64))
        losses.append(float(torch.nn.functional.cross_entropy(ensemble(x), wanted)))
        assert not x.requires_grad
    assert losses[1] < losses[0] - 0.1


@pytest.mark.slow
def test_the_adversary_makes_student_and_ensemble_disagree_more():
    here, server, released = answered()
    task, ensemble = here.federation.server_task, ensemble_of(here.federation.server_task, released)
    student, apart = pick("linear", server), []
    for adv in (0.0, 10.0):
        dense = Dense(synthesis_batch=64, generator_steps=30, adv=adv)
        x = dense.generate(task, student, ensemble, np.random.default_rng(0))
        apart.append(float(kl(1.0)(task.model.apply(student, x), ensemble(x)).mean()))
    assert apart[1] > apart[0]


@pytest.mark.slow
def test_the_student_comes_nearer_to_the_ensemble_on_images_nobody_trained_on():
    here, server, released = answered()
    task, dense = here.federation.server_task, Dense(synthesis_epochs=10, synthesis_batch=64, generator_steps=8)
    pool = Pool(released, here.mechanism, np.random.default_rng(0))
    after = dense.aggregate(task, server, pool, 1, np.random.default_rng(1))
    votes = ensemble_of(task, released)(here.federation.test_x)
    gaps = [
        float(kl(1.0)(task.model.logits(pick("linear", s), here.federation.test_x), votes).mean())
        for s in (server, after)
    ]
    assert gaps[1] < 0.8 * gaps[0]


def test_no_global_generator_is_touched():
    here, server, released = answered()
    task, dense = here.federation.server_task, here.federation.config.method
    prints = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        pool = Pool(released, here.mechanism, np.random.default_rng(0))
        prints.append(fingerprint(dense.aggregate(task, server, pool, 1, np.random.default_rng(1))))
        assert torch.initial_seed() == seed
    assert prints[0] == prints[1]


def test_a_cohort_of_one_and_clients_with_one_class_work():
    data = {"partition": "pathological", "classes": 1, "alpha": None, "limit": 900}
    federation = {"clients": 10, "rounds": 2, "cohort": 1}
    _, rounds, _ = run(config("dense", "linear", data=data, federation=federation, **QUICK))
    assert [len(r.lines) for r in rounds] == [2, 2]


@pytest.mark.parametrize("field", [{"width": 12}, {"oh": -1.0}, {"generator_steps": 0}])
def test_bad_fields_are_refused(field):
    with pytest.raises(ConfigError, match=next(iter(field))):
        config("dense", **field)


@pytest.mark.slow
def test_the_student_of_one_round_beats_staying_alone():
    data = {"limit": None, "test": 300, "alpha": 0.3, "reserve": 300}
    kept = {"data": data, "federation": {"clients": 5, "rounds": 1}, "epochs": 20, "lr": 0.003, "seed": 0}
    student = run(config("dense", "cnn", synthesis_batch=32, **kept))[1][-1].accuracy.global_
    assert student > run(config("local", "cnn", **kept))[1][-1].accuracy.balanced_mean + 0.05
