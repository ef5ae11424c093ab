"""FD: leave-one-out by hand, what is pulled and what is not, absent and one-class clients, bytes, and that it helps."""

import numpy as np
import pytest
import torch
from small import SHAPE, K, make_client, make_task, on_digits

from fedkd import learn
from fedkd.errors import ConfigError
from fedkd.knowledge import Knowledge, fingerprint
from fedkd.losses import cross_entropy
from fedkd.method import Peer
from privacy.gate import Pool, Released
from privacy.mechanism import Mechanism
from strategies.feddistill import FedDistill


def answers(counts: list[list[int]], clients: list[int] | None = None, seed: int = 0) -> list[Released]:
    rng, said = np.random.default_rng(seed), []
    for k, row in zip(clients or range(len(counts)), counts, strict=True):
        held = np.array(row)[:, None] > 0
        means = torch.from_numpy((rng.normal(size=(K, K)) * held).astype(np.float32))
        count = torch.tensor(row, dtype=torch.float32)
        knowledge = Knowledge({"sums": means * count[:, None], "counts": count})
        said.append(Released(Peer(k, "mlp"), 1, knowledge, ()))
    return said


def aggregate(server: dict, said: list[Released]) -> dict:
    pool = Pool(said, Mechanism(), np.random.default_rng(0))
    return FedDistill().aggregate(make_task(), server, pool, 1, np.random.default_rng(1))


def means_of(said: Released) -> torch.Tensor:
    sums, counts = said.knowledge.tensors["sums"], said.knowledge.tensors["counts"]
    return sums / counts.clamp(min=1)[:, None]


def told(server: dict, client: int) -> dict:
    return dict(FedDistill().send(make_task(), server, 2, Peer(client, "mlp")).tensors)


COUNTS = [[3, 1, 0, 0], [9, 0, 0, 0], [1, 2, 0, 5]]  # class 2 has no owner, class 3 one, class 1 two


def test_a_client_is_told_the_mean_of_the_other_owners():
    said = answers(COUNTS)
    server = aggregate({}, said)
    means = [means_of(a).numpy() for a in said]
    for client in range(4):  # 3 has not spoken yet, and so hears the mean of all
        down = told(server, client)
        for y in range(K):
            others = [means[j][y] for j in range(3) if j != client and COUNTS[j][y] > 0]
            assert float(down["held"][y]) == bool(others)
            expected = np.mean(others, axis=0) if others else np.zeros(K)
            np.testing.assert_allclose(down["logits"][y].numpy(), expected, atol=1e-6)
    assert [told(server, k)["held"].tolist() for k in range(3)] == [[1, 1, 0, 1], [1, 1, 0, 1], [1, 1, 0, 0]]


@pytest.mark.parametrize("who", range(3))
def test_ones_own_answer_never_comes_back(who):
    said = answers(COUNTS)
    loud = Knowledge({**said[who].knowledge.tensors, "sums": 1e3 * torch.ones((K, K))})
    changed = [*said[:who], Released(said[who].peer, 1, loud, ()), *said[who + 1 :]]
    before, after = aggregate({}, said), aggregate({}, changed)
    torch.testing.assert_close(told(after, who), told(before, who))
    assert all(not torch.equal(told(after, k)["logits"], told(before, k)["logits"]) for k in range(3) if k != who)


def test_an_absent_client_goes_on_teaching_and_a_later_answer_replaces_its_first():
    first = answers(COUNTS)
    server = aggregate({}, first)
    later = aggregate(server, answers([[0, 4, 0, 0]], [1], seed=7) + answers([[0, 0, 6, 0]], [6], seed=8))
    np.testing.assert_allclose(told(later, 5)["logits"][3], means_of(first[2])[3], atol=1e-6)
    assert told(later, 1)["held"].tolist() == [1, 1, 1, 1] and told(later, 6)["held"].tolist() == [1, 1, 0, 1]
    mean = (means_of(first[0])[0] + means_of(first[2])[0]) / 2
    torch.testing.assert_close(told(later, 5)["logits"][0], mean)  # client 1 no longer counts for class 0


def test_class_means_by_hand_also_of_one_class_and_under_padding():
    task = make_task()
    for labels in ([0, 1, 1, 3, 0, 0], [2, 2, 2]):
        client = make_client(task, labels)
        w, said = FedDistill(lr=0.01).client_update(task, client, Knowledge({}))
        logits, y = task.model.apply(w, client.x).numpy(), np.array(labels)
        for c in range(K):
            expected = logits[y == c].sum(0) if (y == c).any() else np.zeros(K)
            np.testing.assert_allclose(said.tensors["sums"][c].numpy(), expected, atol=1e-5)
        assert said.tensors["counts"].tolist() == np.bincount(y, minlength=K).tolist()
        assert {name: tuple(t.shape) for name, t in said.tensors.items()} == {"sums": (K, K), "counts": (K,)}
        assert float(said.weight) == 1  # the number of records stays at home

        wide = client._replace(
            x=torch.cat([client.x, torch.zeros((3, *SHAPE))]),
            y=torch.cat([client.y, torch.full((3,), -1)]),
            order=torch.cat([client.order, torch.full((2, client.order.shape[1]), -1)])[: len(client.order)],
        )
        _, padded = FedDistill(lr=0.01).client_update(task, wide, Knowledge({}))
        torch.testing.assert_close(dict(padded.tensors), dict(said.tensors))


@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_the_pull_by_hand_and_nothing_where_nobody_else_holds_the_class(kind):
    g = torch.Generator().manual_seed(3)
    table, held = torch.randn((K, K), generator=g), torch.tensor([1.0, 0.0, 1.0, 1.0])
    method = FedDistill(lam=0.7, loss=kind, temperature=2.0)
    loss = method.pulled(Knowledge({"logits": table, "held": held}))
    student, y = torch.randn((5, K), generator=g), torch.tensor([0, 1, 2, 3, 1])
    if kind == "mse":
        pull = (student - table[y]).square().mean(1)
    else:
        p, q = torch.softmax(table[y] / 2, 1), torch.softmax(student / 2, 1)
        pull = 4 * (p * (p / q).log()).sum(1)
    torch.testing.assert_close(loss(student, y), cross_entropy(student, y) + 0.7 * held[y] * pull)

    alone = torch.tensor([1, 1])
    both = [learn.gradient(lambda p: f(p["z"], alone).sum(), {"z": student[:2]})["z"] for f in (loss, cross_entropy)]  # noqa: B023
    assert torch.equal(*both)
    agreed = learn.gradient(lambda p: (loss(p["z"], y) - cross_entropy(p["z"], y)).sum(), {"z": table[y]})["z"]
    assert agreed.abs().max() < 1e-6


def test_the_teacher_is_a_distribution_whatever_the_scale_of_its_logits():
    table, y = torch.randn((K, K), generator=torch.Generator().manual_seed(1)), torch.arange(K)
    student, held = torch.zeros((K, K)), torch.ones(K)
    losses = [FedDistill().pulled(Knowledge({"logits": table + shift, "held": held}))(student, y) for shift in (0, 50)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)  # raw logits as targets would differ by 50 log K


# --- Whole runs ------------------------------------------------------------------------------------------------------


def test_bytes():
    _, rounds, _ = on_digits("feddistill", rounds=3)
    each = 4 * (10 * 10 + 10)
    assert [r.bytes_up for r in rounds] == [5 * each] * 3
    assert [r.bytes_down for r in rounds] == [0, 5 * each, 5 * each]


@pytest.mark.slow
def test_without_the_pull_it_is_local_training_bit_for_bit():
    free, alone = on_digits("feddistill", lam=0.0)[2], on_digits("local")[2]
    pulled = on_digits("feddistill")[2]
    prints = [fingerprint(*(h[k] for k in sorted(h))) for h in (free, alone, pulled)]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.slow
def test_clients_of_one_class_that_take_turns():
    strategy, rounds, _ = on_digits("feddistill", rounds=8, one_class=True)
    assert rounds[-1].accuracy is not None
    assert all(torch.isfinite(value).all() for value in strategy.server.values())


def test_others_class_means_beat_staying_alone():
    accuracy = [
        on_digits(name, **method)[1][-1].accuracy for name, method in (("feddistill", {"lam": 3.0}), ("local", {}))
    ]
    assert accuracy[0].balanced_mean > accuracy[1].balanced_mean + 0.05
    assert accuracy[0].personal_mean > accuracy[1].personal_mean + 0.02


@pytest.mark.parametrize(("field", "value"), [("lam", -1.0), ("temperature", 0.0), ("loss", "l1"), ("lamda", 1.0)])
def test_bad_settings_are_named(field, value):
    with pytest.raises(ConfigError, match=f"method.{field}"):
        on_digits("feddistill", **{field: value})
