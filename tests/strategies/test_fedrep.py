"""FedRep: the head first with the base fixed, then the base with the head fixed."""

import pytest
import torch
from small import config, run

from clients.client import open_site
from fedkd import federation as federations
from fedkd.config import Config
from fedkd.errors import ConfigError
from fedkd.knowledge import Knowledge
from privacy import mechanisms

HEAD, BASE = {"head.weight", "head.bias"}, {"block1.1.weight", "block1.1.bias", "block2.0.weight", "block2.0.bias"}


def prepared(**method):
    here = open_site(federations.build(config("fedrep", **method)))
    task, method = here.federation.client_task(0), here.federation.config.method
    own = here.tensors(0, 1, method.personal_init(task, 5, 0))
    return task, method, own, Knowledge(method.server_init(task, 5))


def phase(task, own, params, moving, order):
    """Plain torch: Adam on the parameters that move."""
    leaves = {n: v.clone().requires_grad_(n in moving) for n, v in params.items()}
    optimizer = torch.optim.Adam([leaves[n] for n in moving], lr=0.01)
    for row in order:
        index = row[row >= 0]
        optimizer.zero_grad()
        logits = torch.func.functional_call(task.model.net, leaves, own.x[index])
        torch.nn.functional.cross_entropy(logits, own.y[index]).backward()
        optimizer.step()
    return {n: v.detach() for n, v in leaves.items()}


@pytest.mark.parametrize(("epochs", "head_epochs"), [(2, 1), (3, 2)])
def test_a_round_of_a_client_is_two_phases_worked_out_by_hand(epochs, head_epochs):
    task, method, own, down = prepared(epochs=epochs, head_epochs=head_epochs)
    steps = len(own.order) // epochs
    start = {**down.tensors, **own.personal}
    after_head = phase(task, own, start, sorted(HEAD), own.order[: steps * head_epochs])
    after_base = phase(task, own, after_head, sorted(BASE), own.order[steps * head_epochs :])
    head, said = method.client_update(task, own, down)
    assert head.keys() == HEAD and said.tensors.keys() == BASE and float(said.weight) == len(own.y)
    for name, value in {**head, **said.tensors}.items():
        torch.testing.assert_close(value, after_base[name], rtol=1e-4, atol=1e-5)
    assert all(torch.equal(after_base[n], after_head[n]) for n in HEAD)  # the second phase leaves the head alone


def test_the_phases_share_out_the_minibatches_also_of_a_padded_client():
    _, method, own, _ = prepared(epochs=3, head_epochs=1)
    real = own.order
    first, rest = method.phases(real)
    assert torch.equal(torch.cat([first, rest]), real)
    padded = torch.cat([real, real.new_full((6, real.shape[1]), -1)])  # two steps an epoch more, as in a stack
    first_padded, rest_padded = torch.func.vmap(method.phases)(padded[None])
    for got, wanted in ((first_padded[0], first), (rest_padded[0], rest)):
        assert torch.equal(got[: len(wanted)], wanted)
        assert (got[len(wanted) :] == -1).all()
    assert len(first_padded[0]) + len(rest_padded[0]) == len(padded)


def test_what_travels_is_fedpers_base():
    _, rounds, _ = run(config("fedrep"))
    base = 4 * (64 * 128 + 128 + 128 * 64 + 64)
    assert all((r.bytes_up, r.bytes_down) == (4 * base, 4 * base) for r in rounds)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"epochs": 1}, "method.head_epochs=1: expected fewer than method.epochs=1"),
        ({"epochs": 2, "head_epochs": 2}, "method.head_epochs=2: expected fewer than method.epochs=2"),
        ({"model": "linear"}, "model.name=linear: expected parameters"),
    ],
)
def test_what_cannot_work_is_said_before_round_one(fields, complaint):
    with pytest.raises(ConfigError, match=complaint):
        federations.build(config("fedrep", **fields))


def test_two_trainings_a_round_are_refused_behind_an_ambassador():
    cfg = config("fedrep")
    private = Config.from_raw(
        {"model": {"name": "mlp"}, "method": {"name": "fedrep"}, "privacy": {"mechanism": "ambassador", "delta": 1e-3}}
    )
    mechanisms.refuse(cfg)
    with pytest.raises(ConfigError, match="fedrep reads records outside training"):
        mechanisms.refuse(private)


def test_a_client_with_one_class_takes_part():
    data = {"partition": "pathological", "classes": 1, "alpha": None, "limit": 900}
    _, rounds, _ = run(config("fedrep", data=data, federation={"clients": 10}))
    assert rounds[-1].accuracy.personal_mean > 0.9


@pytest.mark.slow
def test_a_head_trained_enough_on_few_records_beats_staying_alone():
    data = {"limit": 1000, "test": 300, "alpha": 0.5}
    kept = {"data": data, "federation": {"clients": 20, "rounds": 15, "evaluate_every": 15}, "lr": 0.003, "seed": 0}
    rep = run(config("fedrep", epochs=6, head_epochs=3, **kept))[1][-1].accuracy.personal_mean
    assert rep > run(config("local", epochs=3, **kept))[1][-1].accuracy.personal_mean + 0.01
