"""FML: a personal model of any architecture and a shared meme teach one another."""

import numpy as np
import pytest
import torch
from small import config, home, run

from clients.client import open_site
from fedkd import federation as federations
from fedkd import learn
from fedkd.errors import ConfigError
from fedkd.knowledge import Knowledge


def prepared(by_client=("linear", "mlp"), client=0, **method):
    here = open_site(federations.build(config("fml", "mlp", by_client, **method)))
    task, fml = here.federation.client_task(client), here.federation.config.method
    own = here.tensors(client, 1, fml.personal_init(task, 5, client))
    return here, task, fml, own, Knowledge(fml.server_init(here.federation.server_task, 5))


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.5), (0.2, 0.9)])
def test_a_step_of_mutual_learning_worked_out_by_hand(alpha, beta):
    _, task, fml, own, down = prepared(alpha=alpha, beta=beta, optimizer="sgd", batch=1000)
    assert task.model.name == "linear" and len(own.order) == 1
    local = {n: v.clone().requires_grad_() for n, v in own.personal.items()}
    meme = {n: v.clone().requires_grad_() for n, v in down.tensors.items()}
    a = torch.func.functional_call(task.model.net, local, own.x)
    b = torch.func.functional_call(task.models["mlp"].net, meme, own.x)
    ce, kl = torch.nn.functional.cross_entropy, torch.nn.KLDivLoss(reduction="batchmean")
    loss_local = alpha * ce(a, own.y) + (1 - alpha) * kl(a.log_softmax(1), b.detach().softmax(1))
    loss_meme = beta * ce(b, own.y) + (1 - beta) * kl(b.log_softmax(1), a.detach().softmax(1))
    loss_local.backward()
    loss_meme.backward()
    kept, said = fml.client_update(task, own, down)
    for got, leaves in ((kept, local), (said.tensors, meme)):
        assert got.keys() == leaves.keys()
        for name, value in got.items():
            torch.testing.assert_close(value, (leaves[name] - 0.01 * leaves[name].grad).detach(), rtol=1e-4, atol=1e-6)


def test_on_labels_only_both_models_are_trained_apart():
    _, task, fml, own, down = prepared(alpha=1.0, beta=1.0)
    kept, said = fml.client_update(task, own, down)
    alone = learn.fit(task, own.personal, own)
    for name, value in kept.items():
        torch.testing.assert_close(value, alone[name])
    assert said.tensors.keys() == task.models["mlp"].schema.keys()


def test_without_labels_models_that_agree_stay_where_they_are():
    _, task, fml, own, _ = prepared(("mlp",), alpha=0.0, beta=0.0, optimizer="sgd")
    kept, said = fml.client_update(task, own, Knowledge(own.personal))
    for name, value in own.personal.items():
        torch.testing.assert_close(kept[name], value, rtol=0, atol=1e-7)
        torch.testing.assert_close(said.tensors[name], value, rtol=0, atol=1e-7)


def test_the_memes_architecture_is_the_servers_whatever_the_clients_have():
    strategy, rounds, grid = run(config("fml", "mlp", ["linear", "cnn"]))
    here = open_site(strategy.federation)
    meme = 4 * (64 * 128 + 128 + 128 * 64 + 64 + 64 * 10 + 10)
    assert all((r.bytes_up, r.bytes_down) == (4 * meme, 4 * meme) for r in rounds)
    assert strategy.method.student(strategy.task, strategy.server).keys() == strategy.task.models["mlp"].schema.keys()
    assert home(here, grid, 1).keys() == strategy.task.models["cnn"].schema.keys()


def test_a_meme_of_nobodys_architecture_is_refused():
    _, task, fml, own, down = prepared()
    odd = Knowledge({name: value for name, value in down.tensors.items() if "bias" in name})
    with pytest.raises(ConfigError, match="fit none of the architectures linear, mlp"):
        fml.client_update(task, own, odd)


def test_memes_are_averaged_by_number_of_samples():
    cfg = config("fml", federation={"rounds": 1})
    strategy, _, _ = run(cfg)
    here, task = open_site(strategy.federation), strategy.task
    start = Knowledge(task.model.init(5))
    said = []
    for k in range(4):
        own = here.tensors(k, 1, task.model.init(5, k + 1))
        said.append(cfg.method.client_update(task, own, start)[1])
    sizes = [float(k.weight) for k in said]
    for name, value in strategy.server.items():
        expected = np.average([k.tensors[name].numpy() for k in said], axis=0, weights=sizes)
        np.testing.assert_allclose(value.numpy(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_the_shared_meme_beats_staying_alone():
    data = {"limit": None, "test": 300, "alpha": 0.3, "reserve": 300}
    kept = {"data": data, "federation": {"clients": 5, "rounds": 6, "evaluate_every": 6}, "lr": 0.003, "seed": 0}
    meme = run(config("fml", **kept))[1][-1].accuracy.global_
    assert meme > run(config("local", **kept))[1][-1].accuracy.balanced_mean + 0.1


def test_clients_with_one_class_take_part():
    data = {"partition": "pathological", "classes": 1, "alpha": None, "limit": 900}
    _, rounds, _ = run(config("fml", data=data, federation={"clients": 10}))
    assert rounds[-1].accuracy.personal_mean > 0.9
