"""Ditto: FedAvg's global model, and personal ones drawn towards it."""

import pytest
import torch
from small import config, home, run

from clients.client import open_site
from fedkd import federation as federations
from fedkd import learn
from fedkd.errors import ConfigError
from fedkd.knowledge import Knowledge, fingerprint


def answer(lam, personal=None, received=None, **method):
    here = open_site(federations.build(config("ditto", "linear", lam=lam, **method)))
    task, ditto = here.federation.client_task(0), here.federation.config.method
    w = received or ditto.server_init(task, 5)
    own = here.tensors(0, 1, personal or ditto.personal_init(task, 5, 0))
    v, said = ditto.client_update(task, own, Knowledge(w))
    return task, own, w, v, said


def test_the_global_model_is_fedavgs_bit_for_bit():
    ditto, rounds, _ = run(config("ditto", lam=0.7))
    fedavg, _, _ = run(config("fedavg"))
    assert fingerprint(ditto.server) == fingerprint(fedavg.server)
    whole = 4 * (64 * 128 + 128 + 128 * 64 + 64 + 64 * 10 + 10)
    assert all((r.bytes_up, r.bytes_down) == (4 * whole, 4 * whole) for r in rounds)
    assert rounds[-1].accuracy.global_ is not None


def test_without_the_pull_the_personal_model_is_trained_alone_bit_for_bit():
    strategy, _, grid = run(config("ditto", lam=0.0))
    here, task = open_site(strategy.federation), strategy.federation.server_task
    v = task.model.init(5)
    for t in (1, 2):
        v = learn.fit(task, v, here.tensors(2, t, {}))
    assert fingerprint(home(here, grid, 2)) == fingerprint(v)


def test_a_step_by_hand_pulls_towards_the_model_as_received():
    g = torch.Generator().manual_seed(0)
    v0 = {"head.weight": torch.randn((10, 64), generator=g), "head.bias": torch.randn(10, generator=g)}
    _, own, w, v, _ = answer(0.5, personal=v0, optimizer="sgd", batch=1000)
    assert len(own.order) == 1
    logits = own.x.flatten(1) @ v0["head.weight"].T + v0["head.bias"]
    error = (logits.softmax(-1) - torch.eye(10)[own.y]) / len(own.y)
    grads = {"head.weight": error.T @ own.x.flatten(1), "head.bias": error.sum(0)}
    for name, value in v.items():
        expected = v0[name] - 0.01 * (grads[name] + 0.5 * (v0[name] - w[name]))
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)


def test_the_pull_is_lambda_times_the_way_and_zero_at_the_global_model():
    g = torch.Generator().manual_seed(1)
    w = {"a": torch.randn((3, 2), generator=g), "b": torch.randn(4, generator=g)}
    v = {name: value + 1 for name, value in w.items()}
    pull = federations.build(config("ditto", lam=0.3)).config.method.pull(w)
    assert float(pull(v)) == pytest.approx(0.15 * 10, rel=1e-5)
    for name, grad in learn.gradient(pull, v).items():
        torch.testing.assert_close(grad, 0.3 * (v[name] - w[name]))
    assert not any(grad.any() for grad in learn.gradient(pull, w).values())


def test_a_stronger_pull_keeps_the_personal_model_nearer():
    ways = []
    for lam in (0.0, 1.0, 100.0):
        _, _, w, v, _ = answer(lam, epochs=3)
        ways.append(sum(float((v[name] - w[name]).square().sum()) for name in w))
    assert ways[0] > ways[1] > ways[2] > 0


def test_everybody_starts_at_the_global_model_and_absence_changes_nothing_at_home():
    strategy, rounds, grid = run(config("ditto", federation={"rounds": 2, "cohort": 1}))
    here, task = open_site(strategy.federation), strategy.federation.server_task
    seen = {line.client for r in rounds for line in r.lines}
    absent = next(k for k in range(4) if k not in seen)
    assert fingerprint(home(here, grid, absent)) == fingerprint(task.model.init(5))
    assert all(fingerprint(home(here, grid, k)) != fingerprint(task.model.init(5)) for k in seen)


def test_a_client_is_scored_on_its_personal_model():
    method = federations.build(config("ditto")).config.method
    personal = {"head.bias": torch.ones(2)}
    assert method.judged(Knowledge({"head.bias": torch.zeros(2)}), personal) is personal


@pytest.mark.slow
def test_personal_models_drawn_to_the_global_one_beat_staying_alone():
    data = {"limit": None, "test": 300, "alpha": 0.3, "reserve": 300}
    kept = {"data": data, "federation": {"clients": 5, "rounds": 6, "evaluate_every": 6}, "lr": 0.003, "seed": 0}
    ditto, alone = (run(config(name, **kept))[1][-1].accuracy for name in ("ditto", "local"))
    assert ditto.personal_mean > alone.personal_mean + 0.01
    assert ditto.balanced_mean > alone.balanced_mean + 0.03


def test_a_negative_lambda_is_refused():
    with pytest.raises(ConfigError, match="lam"):
        config("ditto", lam=-0.1)
