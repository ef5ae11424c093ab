"""FedProto: prototypes by hand, the pull's gradient, widths, nearest prototype as a head, bytes, absent classes."""

import numpy as np
import pytest
import torch
from small import SHAPE, K, make_client, make_task, on_digits, padded

from fedkd import learn
from fedkd.errors import ConfigError
from fedkd.knowledge import Knowledge, fingerprint
from fedkd.losses import cross_entropy
from fedkd.method import Peer
from fedkd.task import Client, Task
from privacy.gate import Pool, Released
from privacy.mechanism import Mechanism
from strategies.fedproto import FedProto, width


def said(task: Task, sums: list[list[float]], weights: list[float]) -> Knowledge:
    wide = torch.tensor(sums)[:, None].expand(K, width(task))
    return Knowledge({"sums": wide, "counts": torch.tensor(weights)})


def aggregate(server: dict, *knowledge: Knowledge) -> dict:
    pool = Pool([Released(Peer(k, "mlp"), 1, each, ()) for k, each in enumerate(knowledge)], Mechanism(), None)
    return FedProto().aggregate(make_task(), server, pool, 1, np.random.default_rng(1))


def test_the_prototype_of_a_class_is_the_mean_over_its_owners_and_stays_where_it_has_none():
    task = make_task()
    first = aggregate(
        {}, said(task, [6.0, 1.0, 0.0, 0.0], [3, 1, 0, 0]), said(task, [1.0, 0.0, 0.0, 8.0], [1, 0, 0, 4])
    )
    assert first["prototypes"].shape == (K, 64)
    assert first["prototypes"][:, 0].tolist() == [7 / 4, 1, 0, 2]
    assert (first["weights"] > 0).tolist() == [True, True, False, True]
    later = aggregate(first, said(task, [0.0, 9.0, 0.0, 0.0], [0, 3, 0, 0]))
    assert later["prototypes"][:, 0].tolist() == [7 / 4, 3, 0, 2]
    assert first["prototypes"][:, 0].tolist() == [7 / 4, 1, 0, 2]


@pytest.mark.parametrize("weighting", ["counts", "uniform"])
def test_two_clients_means_by_hand(weighting):
    task, method = make_task(), FedProto(lr=0.01, weighting=weighting)
    labels = [[0, 0, 0, 1, 3], [0, 1, 1, 1]]
    clients = [make_client(task, y, seed) for seed, y in enumerate(labels)]
    told, means = [], []
    for client in clients:
        w, knowledge = method.client_update(task, client, Knowledge({}))
        h = task.model.features(w, client.x, 2).numpy()
        means.append({c: h[client.y.numpy() == c].mean(0) for c in set(client.y.tolist())})
        told.append(knowledge)
        assert float(knowledge.weight) == 1
    server = aggregate({}, *told)
    for c in (0, 1, 3):
        share = [y.count(c) if weighting == "counts" else 1 for y, m in zip(labels, means, strict=True) if c in m]
        expected = np.average([m[c] for m in means if c in m], axis=0, weights=share)
        np.testing.assert_allclose(server["prototypes"][c].numpy(), expected, atol=1e-5)
    assert float(server["weights"][2]) == 0


def test_one_class_padding_and_what_the_shapes_tell():
    task = make_task()
    down = Knowledge({"prototypes": torch.ones((K, 64)), "weights": torch.tensor([1.0, 0, 2, 0])})
    shapes = set()
    for labels in ([2, 2, 2], [0, 1, 2, 3, 3]):
        client = make_client(task, labels)
        w, knowledge = FedProto().client_update(task, client, down)
        w2, knowledge2 = FedProto().client_update(task, padded(client), down)
        torch.testing.assert_close((w2, dict(knowledge2.tensors)), (w, dict(knowledge.tensors)))
        shapes.add(str({name: t.shape for name, t in knowledge.tensors.items()}))
        assert knowledge.tensors["counts"].tolist() == np.bincount(labels, minlength=K).tolist()
    assert len(shapes) == 1


def step(client: Client, task: Task, down: Knowledge, lam: float) -> dict:
    """One plain gradient step of FedProto, as the gradient that it took."""
    task = Task(
        task.model, task.models, K, task.public_x, 3, FedProto(optimizer="sgd", lr=1.0).descent(), learn.fit, learn.sums
    )
    client = client._replace(order=torch.arange(len(client.y))[None])
    w, _ = FedProto(lam=lam).client_update(task, client, down)
    return {name: client.personal[name] - w[name] for name in w}


def test_the_pull_moves_features_towards_their_prototype_by_hand_and_never_the_head():
    task = make_task()
    client = make_client(task, [0, 1, 1, 3])
    prototypes = torch.randn((K, 64), generator=torch.Generator().manual_seed(2))
    down = Knowledge({"prototypes": prototypes, "weights": torch.tensor([1.0, 0.0, 0.0, 2.0])})
    got = step(client, task, down, 3.0)
    plain = step(client, task, Knowledge({}), 3.0)

    w = {name: p.clone().requires_grad_() for name, p in client.personal.items()}
    h, y = task.model.features(w, client.x, 2), client.y
    pull = ((h - prototypes[y]) ** 2).mean(1) * torch.tensor([1.0, 0.0, 0.0, 1.0])
    (cross_entropy(task.model.apply(w, client.x), y) + 3.0 * pull).mean().backward()
    for name in w:
        torch.testing.assert_close(got[name], w[name].grad, atol=1e-6, rtol=1e-4)
    assert all(torch.equal(got[name], plain[name]) for name in ("head.weight", "head.bias"))
    assert not torch.allclose(got["block1.1.weight"], plain["block1.1.weight"])


def test_a_client_without_a_class_that_has_a_prototype_feels_no_pull():
    task = make_task()
    client = make_client(task, [1, 1, 2])
    down = Knowledge({"prototypes": torch.ones((K, 64)), "weights": torch.tensor([5.0, 0.0, 0.0, 5.0])})
    both = step(client, task, down, 100.0), step(client, task, Knowledge({}), 100.0)
    torch.testing.assert_close(*both)


def test_the_nearest_prototype_is_a_linear_head():
    task, g = make_task(), torch.Generator().manual_seed(0)
    prototypes = torch.randn((K, 64), generator=g)
    down = Knowledge({"prototypes": prototypes, "weights": torch.tensor([1.0, 2.0, 0.0, 4.0])})
    own, x = task.model.init(3), torch.randn((50, *SHAPE), generator=g)
    judged = FedProto(inference="prototype").judged(down, own)
    far = torch.cdist(task.model.features(own, x, 2), prototypes)
    far[:, 2] = torch.inf  # nobody ever held it
    assert torch.equal(task.model.apply(judged, x).argmax(1), far.argmin(1))
    assert FedProto().judged(down, own) is own
    assert FedProto(inference="prototype").judged(Knowledge({}), own) is own


def test_widths_that_differ_are_refused_and_equal_ones_are_not():
    tasks = {name: make_task(name) for name in ("linear", "mlp", "cnn", "resnet8")}
    assert {name: width(task) for name, task in tasks.items()} == {"linear": 16, "mlp": 64, "cnn": 256, "resnet8": 64}
    held = np.ones(K, dtype=bool)
    FedProto(inference="prototype").check({name: tasks[name] for name in ("mlp", "resnet8")}, held)
    with pytest.raises(ConfigError, match=r"one width, got mlp 64, cnn 256; choose client models of one width"):
        FedProto().check({name: tasks[name] for name in ("mlp", "cnn")}, held)


def test_a_model_without_features_is_refused_unless_prototypes_decide():
    tasks, held = {name: make_task(name) for name in ("linear",)}, np.ones(K, dtype=bool)
    with pytest.raises(ConfigError, match=r"below the head, 'linear' has none: it would train alone"):
        FedProto().check(tasks, held)
    FedProto(inference="prototype").check(tasks, held)


# --- Whole runs ------------------------------------------------------------------------------------------------------


def test_bytes():
    _, rounds, _ = on_digits("fedproto", rounds=3, model="mlp")
    each = 4 * (10 * 64 + 10)
    assert [r.bytes_up for r in rounds] == [5 * each] * 3
    assert [r.bytes_down for r in rounds] == [0, 5 * each, 5 * each]


@pytest.mark.slow
def test_without_the_pull_it_is_local_training():
    alone, own = on_digits("local", model="mlp")[2], on_digits("fedproto", model="mlp", lam=0.0)[2]
    assert all(torch.allclose(own[k][name], alone[k][name], atol=1e-5) for k in own for name in own[k])


def test_clients_of_one_class_that_take_turns_learn_all_classes_from_the_prototypes():
    strategy, rounds, _ = on_digits("fedproto", rounds=12, one_class=True, inference="prototype")
    assert all(torch.isfinite(value).all() for value in strategy.server.values())
    _, alone, _ = on_digits("local", rounds=12, one_class=True)
    assert rounds[-1].accuracy.balanced_mean > alone[-1].accuracy.balanced_mean + 0.3


def test_nearest_prototypes_beat_staying_alone():
    shared = on_digits("fedproto", inference="prototype")[1][-1].accuracy
    alone = on_digits("local")[1][-1].accuracy
    assert shared.balanced_mean > alone.balanced_mean + 0.3 and shared.personal_mean > alone.personal_mean


def test_the_same_seed_gives_the_same_prototypes():
    prints = [fingerprint(on_digits("fedproto", rounds=2, model="mlp")[0].server) for _ in range(2)]
    assert prints[0] == prints[1]


@pytest.mark.parametrize(("field", "value"), [("lam", -1.0), ("weighting", "size"), ("inference", "nearest")])
def test_bad_settings_are_named(field, value):
    with pytest.raises(ConfigError, match=f"method.{field}"):
        on_digits("fedproto", **{field: value})
