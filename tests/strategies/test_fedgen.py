"""FedGen: the generator's objective by hand, diversity, labels drawn, what clients train on, bytes, and its help."""

from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import torch
from small import K, make_client, make_task, on_digits, padded

from fedkd import learn
from fedkd.errors import ConfigError
from fedkd.knowledge import Knowledge, fingerprint, nest
from fedkd.losses import cross_entropy, kl
from fedkd.method import Peer
from fedkd.models import Model
from fedkd.optim import Adam
from fedkd.task import Task
from privacy.gate import Pool, Released
from privacy.mechanism import Mechanism
from strategies.fedgen import FedGen, diversity, draw, generate


def answers(task: Task, counts: list[list[float]]) -> list[Released]:
    return [
        Released(
            Peer(k, "mlp"),
            1,
            Knowledge({**task.model.init(k), "counts": torch.tensor(row)}, torch.tensor(sum(row))),
            None,
        )
        for k, row in enumerate(counts)
    ]


def aggregate(method: FedGen, task: Task, server: dict, counts: list[list[float]]) -> dict:
    pool = Pool(answers(task, counts), Mechanism(), None)
    return method.aggregate(task, server, pool, 1, np.random.default_rng(1))


def generator_of(method: FedGen, task: Task, seed: int = 0) -> dict:
    return {
        k.removeprefix("generator/"): v for k, v in method.server_init(task, seed).items() if k.startswith("generator/")
    }


def test_the_generator_is_a_hidden_layer_over_a_one_hot_label_and_noise():
    task, method = make_task(), FedGen(noise=3, hidden=8)
    g = generator_of(method, task)
    y, z = torch.tensor([2, 0]), torch.rand((2, 3), generator=torch.Generator().manual_seed(0))
    joined = torch.cat([torch.eye(K)[y], z], 1) @ torch.cat([g["label"], g["noise"]]) + g["bias"]
    normed = (joined - joined.mean(1, keepdim=True)) / (joined.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(generate(g, y, z), normed.clamp(min=0) @ g["out"] + g["out_bias"])


def test_the_diversity_term_by_hand():
    z, h = torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 3.0, 0.0], [3.0, 3.0, 3.0]])
    assert float(diversity(z, h)) == pytest.approx(np.exp(-(2 * 0.5 * 2.0) / 4), rel=1e-6)  # two of four pairs differ
    assert float(diversity(z, 0 * h)) == 1  # features that ignore the noise are the worst
    assert float(diversity(z, 2 * h)) < float(diversity(z, h))


def test_labels_are_drawn_evenly_among_those_anybody_holds():
    held = torch.tensor([False, True, False, True, True])
    u = (torch.arange(3000) + 0.5) / 3000
    assert torch.bincount(draw(held, u), minlength=5).tolist() == [0, 1000, 0, 1000, 1000]
    last = torch.tensor([1 - 2**-24])  # the largest float32 below 1
    assert draw(held, last).tolist() == [4] and draw(held, torch.zeros(1)).tolist() == [1]
    assert draw(torch.zeros(5, dtype=torch.bool), last).tolist() == [4]  # nothing to draw from: some label, no crash


def test_one_step_of_the_generator_follows_the_gradient_worked_out_by_hand():
    task, method = make_task(), FedGen(generator_steps=1, generator_batch=6, noise=3, hidden=8, eta=0.5)
    counts = [[3.0, 0, 1, 0], [1.0, 4, 0, 0]]  # nobody has class 3
    g = {name: p.requires_grad_() for name, p in generator_of(method, task).items()}
    rng = np.random.default_rng(1)
    y = torch.from_numpy(rng.choice([0, 1, 2], 6))
    z = torch.from_numpy(rng.random((6, 3), dtype=np.float32))
    h, value = generate(g, y, z), 0.0
    for i in range(6):
        for k in range(2):
            share = counts[k][y[i]] / (counts[0][y[i]] + counts[1][y[i]])
            value = (
                value + share * cross_entropy(task.model.head(task.model.init(k), h[i : i + 1], 2), y[i : i + 1])[0] / 6
            )
    grads = torch.autograd.grad(value + 0.5 * diversity(z, h), list(g.values()))
    start = {name: p.detach() for name, p in g.items()}
    adam = Adam(method.generator_lr)
    expected, _ = adam.step(start, dict(zip(g, grads, strict=True)), adam.start(start), 1)

    after = aggregate(method, task, method.server_init(task, 0), counts)
    for name, value in expected.items():
        torch.testing.assert_close(after[f"generator/{name}"], value)
    assert torch.equal(after["generator/label"][3], start["label"][3])  # a class nobody holds is never asked for


@pytest.mark.slow
def test_the_generator_learns_what_the_heads_take_for_a_label_and_diversity_spreads_it():
    task, y = make_task(), torch.arange(40) % K
    counts, z = [[5.0, 5, 0, 0], [0.0, 0, 5, 5]], torch.rand((40, 32), generator=torch.Generator().manual_seed(0))
    owners = [task.model.init(0), task.model.init(1)]  # each of two labels
    alike = {}
    for eta in (0.0, 1.0):
        method = FedGen(generator_steps=200, eta=eta, generator_lr=3e-3)
        after = aggregate(method, task, method.server_init(task, 0), counts)
        h = generate({name.removeprefix("generator/"): value for name, value in after.items()}, y, z)
        answered = torch.stack([task.model.head(owner, h, 2).argmax(1) for owner in owners])
        assert float((answered[y // 2, torch.arange(40)] == y).float().mean()) > 0.9
        alike[eta] = float(diversity(z, h)), *(float(diversity(z[y == k], h[y == k])) for k in range(K))
    assert alike[1.0][0] < 0.3 * alike[0.0][0]
    assert all(more < less for more, less in zip(alike[1.0][1:], alike[0.0][1:], strict=True))  # within a label too


def test_a_head_that_reads_a_map_is_refused_before_round_1():
    task = make_task("cnn")
    pooled = torch.nn.Sequential(
        OrderedDict(
            block1=torch.nn.Conv2d(1, 8, 3),
            head=torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, K)),
        )
    )
    with pytest.raises(ConfigError, match=r"expected a head that reads a vector, that of 'mine' reads \(8, 2, 2\)"):
        FedGen().check({"mine": replace(task, model=Model("mine", pooled))}, np.ones(K, dtype=bool))
    FedGen().check({"cnn": task}, np.ones(K, dtype=bool))


def test_weights_are_averaged_by_size_and_forgotten_classes_stay_known():
    task, method = make_task(), FedGen(generator_steps=1)
    first = aggregate(method, task, method.server_init(task, 0), [[3.0, 0, 1, 0], [1.0, 1, 0, 0]])
    for name in task.model.schema:
        mean = (4 * task.model.init(0)[name] + 2 * task.model.init(1)[name]) / 6
        torch.testing.assert_close(first[f"model/{name}"], mean)
    assert first["counts"].tolist() == [4, 1, 1, 0]
    later = aggregate(method, task, first, [[0.0, 0, 0, 7]])
    assert later["counts"].tolist() == [4, 1, 1, 7]


def told(method: FedGen, task: Task, t: int = 3, counts: tuple[float, ...] = (4, 1, 0, 2)) -> Knowledge:
    server = {**method.server_init(task, 0), "counts": torch.tensor(counts)}
    return method.send(task, server, t, Peer(0, "mlp"))


def test_one_step_of_a_client_by_hand():
    task, method = make_task(), FedGen(alpha=0.7, beta=0.4, decay=0.5, latents=5, noise=3, hidden=8)
    task = Task(
        task.model, task.models, K, task.public_x, 3, FedGen(optimizer="sgd", lr=1.0).descent(), learn.fit, learn.sums
    )
    client = make_client(task, [0, 1, 3, 3, 0, 1, 1])._replace(order=torch.arange(7)[None], personal={})
    client = client._replace(draws=nest("method", method.draws(np.random.default_rng(0), task, 0)))
    down = told(method, task)
    assert float(down.tensors["strength"]) == 0.25
    _, said = method.client_update(task, client, down)

    w = {name: p.clone().requires_grad_() for name, p in method.judged(down, {}).items()}
    g, model = generator_of(method, task), task.model
    draws, logits, value = client.draws["method/noise"], model.apply(w, client.x), 0.0
    for i, y in enumerate(client.y.tolist()):
        z, u = draws[i % 5, :3][None], float(draws[i % 5, 3])
        other = [0, 1, 3][int(3 * u)]
        own = model.head(w, generate(g, torch.tensor([y]), z), 2).detach()
        fake = model.head(w, generate(g, torch.tensor([other]), z), 2)
        value = value + cross_entropy(logits[i : i + 1], client.y[i : i + 1])[0]
        value = value + 0.25 * 0.7 * cross_entropy(fake, torch.tensor([other]))[0]
        value = value + 0.25 * 0.4 * kl(1.0)(logits[i : i + 1], own)[0]
    (value / 7).backward()
    for name, p in w.items():
        torch.testing.assert_close(said.tensors[name], (p - p.grad).detach(), atol=1e-5, rtol=1e-4)


def test_round_one_is_fedavgs_and_so_is_every_round_without_weights_on_the_generator():
    task, method = make_task(), FedGen(alpha=0.0, beta=0.0)
    client = make_client(task, [0, 1, 3, 3, 0])._replace(personal={})
    client = client._replace(draws=nest("method", method.draws(np.random.default_rng(0), task, 0)))
    first = FedGen().send(task, method.server_init(task, 0), 1, Peer(0, "mlp"))
    assert all(name.startswith("model/") for name in first.tensors)
    plain = learn.fit(task, method.judged(first, {}), client)
    for one, down in ((FedGen(), first), (method, told(method, task))):
        _, said = one.client_update(task, client, down)
        torch.testing.assert_close({name: said.tensors[name] for name in plain}, plain)


def test_one_class_padding_and_what_the_shapes_tell():
    task, method = make_task(), FedGen()
    shapes = set()
    for labels in ([2, 2, 2], [0, 1, 2, 3, 3]):
        client = make_client(task, labels)._replace(personal={})
        client = client._replace(draws=nest("method", method.draws(np.random.default_rng(0), task, 0)))
        _, said = method.client_update(task, client, told(method, task))
        _, wide = method.client_update(task, padded(client), told(method, task))
        torch.testing.assert_close(dict(wide.tensors), dict(said.tensors))
        assert said.tensors["counts"].tolist() == np.bincount(labels, minlength=K).tolist()
        assert float(said.weight) == len(labels)
        shapes.add(str({name: t.shape for name, t in said.tensors.items()}))
    assert len(shapes) == 1


def test_noise_differs_between_clients_and_rounds_and_is_uniform():
    rows = [FedGen(latents=500).draws(np.random.default_rng(seed), make_task(), 0)["noise"] for seed in (0, 1)]
    assert not torch.equal(*rows)
    z = rows[0]
    assert z.shape == (500, 33) and float(z.min()) >= 0 and float(z.max()) < 1
    assert float(z.mean()) == pytest.approx(0.5, abs=0.01) and float(z.var()) == pytest.approx(1 / 12, rel=0.05)


# --- Whole runs ------------------------------------------------------------------------------------------------------


def test_bytes():
    _, rounds, _ = on_digits("fedgen", rounds=3, noise=8, hidden=16)
    weights, generator = 64 * 10 + 10, (10 + 8) * 16 + 16 + 16 * 64 + 64
    assert [r.bytes_up for r in rounds] == [5 * 4 * (weights + 10)] * 3
    later = 5 * 4 * (weights + generator + 10 + 1)
    assert [r.bytes_down for r in rounds] == [5 * 4 * weights, later, later]


@pytest.mark.slow
def test_clients_of_one_class_that_take_turns():
    strategy, rounds, _ = on_digits("fedgen", rounds=6, one_class=True)
    assert all(torch.isfinite(value).all() for value in strategy.server.values())
    assert rounds[-1].accuracy.global_ is not None


@pytest.mark.slow
def test_generated_features_beat_staying_alone_and_plain_averaging():
    shared, average, alone = (on_digits(name, model="mlp")[1][-1].accuracy for name in ("fedgen", "fedavg", "local"))
    assert shared.balanced_mean > alone.balanced_mean + 0.2
    assert shared.balanced_mean > average.balanced_mean + 0.02


def test_the_same_seed_gives_the_same_server():
    prints = [fingerprint(on_digits("fedgen", rounds=2)[0].server) for _ in range(2)]
    assert prints[0] == prints[1]


@pytest.mark.parametrize(
    ("field", "value"), [("alpha", -1.0), ("decay", 1.5), ("generator_batch", 1), ("latents", 0), ("eta", -0.1)]
)
def test_bad_settings_are_named(field, value):
    with pytest.raises(ConfigError, match=f"method.{field}"):
        on_digits("fedgen", **{field: value})
