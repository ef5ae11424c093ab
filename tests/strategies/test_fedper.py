"""FedPer: the base travels and is averaged, heads never leave."""

import numpy as np
import pytest
import torch
from small import config, home, run

from clients.client import open_site
from fedkd import federation as federations
from fedkd import learn
from fedkd.errors import ConfigError
from fedkd.knowledge import Knowledge, fingerprint

HEAD, BASE = {"head.weight", "head.bias"}, {"block1.1.weight", "block1.1.bias", "block2.0.weight", "block2.0.bias"}
BASE_BYTES = 4 * (64 * 128 + 128 + 128 * 64 + 64)


def test_only_the_base_travels_and_only_the_head_stays():
    strategy, rounds, grid = run(config("fedper"))
    here = strategy.federation
    assert strategy.server.keys() == BASE
    lines = [line for r in rounds for line in r.lines]
    assert len(lines) == 16 and all(line.shapes.keys() == BASE for line in lines)
    assert all((r.bytes_up, r.bytes_down) == (4 * BASE_BYTES, 4 * BASE_BYTES) for r in rounds)
    heads = [home(open_site(here), grid, k) for k in range(4)]
    assert all(head.keys() == HEAD for head in heads)
    assert len({fingerprint(head) for head in heads}) == 4
    assert strategy.method.student(strategy.task, strategy.server) is None


def test_a_round_is_the_weighted_average_of_bases_worked_out_by_hand():
    cfg = config("fedper", federation={"rounds": 1})
    strategy, _, grid = run(cfg)
    here, task = open_site(strategy.federation), strategy.federation.server_task
    shared = task.model.init(5)
    bases, sizes = [], []
    for k in range(4):
        own = here.tensors(k, 1, {})
        start = {**shared, **{name: value for name, value in task.model.init(5, k + 1).items() if name in HEAD}}
        trained = learn.fit(task, start, own)
        bases.append(trained)
        sizes.append(len(own.y))
        kept = home(here, grid, k)
        assert all(torch.equal(kept[name], trained[name]) for name in HEAD)
    assert len(set(sizes)) > 1
    for name, value in strategy.server.items():
        expected = np.average([b[name].numpy() for b in bases], axis=0, weights=sizes)
        np.testing.assert_allclose(value.numpy(), expected, rtol=1e-4, atol=1e-6)


def test_a_client_is_scored_on_the_shared_base_under_its_own_head():
    strategy, _, grid = run(config("fedper"))
    here, task = open_site(strategy.federation), strategy.federation.server_task
    whole = strategy.method.judged(Knowledge(strategy.server), home(here, grid, 1))
    assert whole.keys() == task.model.schema.keys()
    assert task.model.apply(whole, strategy.federation.test_x).shape == (100, 10)


@pytest.mark.parametrize(("model", "blocks", "said"), [("mlp", 2, 1), ("cnn", 1, 3), ("resnet8", 3, 2)])
def test_how_many_blocks_stay_at_home_is_the_users_choice(model, blocks, said):
    federation = federations.build(config("fedper", model, head_blocks=blocks))
    task, method = federation.server_task, federation.config.method
    names = set(method.server_init(task, 5))
    assert names == {n for n in task.model.schema if n.split(".")[0] in task.model.blocks[:said]}
    assert names | set(method.personal_init(task, 5, 0)) == task.model.schema.keys()


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"model": "linear"}, "model.name=linear: expected parameters in its lowest 1 blocks"),
        ({"model": "mlp", "head_blocks": 3}, "method.head_blocks=3: expected fewer than the 3 blocks of 'mlp'"),
        ({"model": "mlp", "by_client": ["mlp", "cnn"]}, "every client must have model.name"),
    ],
)
def test_what_cannot_work_is_said_before_round_one(fields, complaint):
    with pytest.raises(ConfigError, match=complaint) as error:
        federations.build(config("fedper", **fields))
    assert "\n" not in str(error.value)


def test_an_absent_clients_head_does_not_move():
    strategy, rounds, grid = run(config("fedper", federation={"rounds": 3, "cohort": 1, "clients": 4}))
    here, task = open_site(strategy.federation), strategy.federation.server_task
    seen = {line.client for r in rounds for line in r.lines}
    assert 0 < len(seen) < 4
    for k in set(range(4)) - seen:
        assert fingerprint(home(here, grid, k)) == fingerprint(strategy.method.personal_init(task, 5, k))


def test_clients_with_one_class_take_part_and_names_do_not_tell_which():
    data = {"partition": "pathological", "classes": 1, "alpha": None, "limit": 900}
    _, rounds, _ = run(config("fedper", data=data, federation={"clients": 10}))
    assert len({tuple(sorted(line.shapes.items())) for r in rounds for line in r.lines}) == 1
    assert rounds[-1].accuracy.personal_mean > 0.9


@pytest.mark.slow
def test_shared_bases_beat_staying_alone_on_a_clients_own_data():
    data = {"limit": None, "test": 300, "alpha": 0.3, "reserve": 300}
    kept = {"data": data, "federation": {"clients": 10, "rounds": 15, "evaluate_every": 15}, "epochs": 2, "lr": 0.003}
    gains = []
    for seed in (0, 1):
        scores = [run(config(name, seed=seed, **kept))[1][-1].accuracy.personal_mean for name in ("fedper", "local")]
        gains.append(scores[0] - scores[1])
    assert np.mean(gains) > 0.01
