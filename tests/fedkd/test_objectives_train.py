"""The loop that drives objectives: against `learn.imitate`, loops by hand, and itself in stacks and in parts."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fedkd import learn
from fedkd.errors import ConfigError
from fedkd.losses import kl
from fedkd.models import build
from fedkd.objectives import OBJECTIVES, distil, objective, train
from fedkd.objectives.train import epochs_of
from fedkd.optim import Adam, Sgd

N, K = 22, 4
MODEL = build("mlp", (1, 4, 4), K)
X = torch.rand((N, 1, 4, 4), generator=torch.Generator().manual_seed(0))
TEACHER = 3 * torch.randn((N, K), generator=torch.Generator().manual_seed(1))
Y = TEACHER.argmax(-1)
START = MODEL.init(0)


def order(epochs: int = 2, seed: int = 0, batch: int = 8, n: int = N) -> torch.Tensor:
    return learn.batches(np.random.default_rng(seed), n, batch, epochs)


def same(a, b) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def close(a, b, rtol=1e-4, atol=1e-5) -> None:
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=atol)


@pytest.mark.parametrize("optimizer", [Adam(1e-2), Sgd(0.1, 0.9)], ids=["adam", "momentum"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_with_kl_it_is_imitate_bit_for_bit(optimizer, temperature):
    rows = order(3)
    assert (rows < 0).any()  # a last batch is padded
    theirs = learn.imitate(MODEL, START, X, TEACHER, rows, kl(temperature), optimizer)
    ours = distil(MODEL, START, X, TEACHER, rows, objective("kl", temperature=temperature), optimizer)
    assert same(ours, theirs) and not same(ours, START)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_student_comes_nearer_to_the_teacher(name):
    obj, rows = objective(name), order(30)
    student = distil(MODEL, START, X, TEACHER, rows, obj, Adam(1e-2), Y)
    right = [(MODEL.apply(p, X).argmax(-1) == Y).double().mean() for p in (START, student)]
    assert right[1] > 0.9 > right[0]


def test_taid_by_hand():
    rows, taid = order(), objective("taid", alpha=0.9)
    net = build("mlp", (1, 4, 4), K).net
    net.load_state_dict(START)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    t, m, before = 0.4, 0.0, None
    for step, row in enumerate(rows):
        index = row[row >= 0]
        z = net(X[index])
        target = torch.softmax((1 - t) * z.detach() + t * TEACHER[index], -1)
        loss = F.cross_entropy(z, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if before is not None:
            m = 0.99 * m + 0.01 * (before - loss.item()) / (before + 1e-15)
            t = min(1.0, max(0.4 + 0.6 * step / len(rows), t + 0.9 / (1 + np.exp(-m)) * (1 - t)))
        before = loss.item()
    state = taid.start(TEACHER, len(rows), 2)
    trained, state = train(MODEL, START, X, TEACHER, rows, taid, Adam(1e-2), state)
    assert state["t"].item() == pytest.approx(t, rel=1e-5) and t > 0.95
    close(trained, {k: v.detach() for k, v in net.named_parameters()})
    assert same(trained, distil(MODEL, START, X, TEACHER, rows, taid, Adam(1e-2)))


def test_pskd_by_hand_and_whatever_the_teacher_says():
    rows, epochs = order(3), 3
    net = build("mlp", (1, 4, 4), K).net
    net.load_state_dict(START)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    said, truth = F.one_hot(Y, K).float(), F.one_hot(Y, K).float()
    for step, row in enumerate(rows):
        index, share = row[row >= 0], 0.8 * (step // 3 + 1) / epochs
        z = net(X[index])
        optimizer.zero_grad()
        F.cross_entropy(z, (1 - share) * truth[index] + share * said[index]).backward()
        optimizer.step()
        said[index] = torch.softmax(z, -1).detach()
    trained = distil(MODEL, START, X, TEACHER, rows, objective("pskd"), Adam(1e-2), Y)
    close(trained, {k: v.detach() for k, v in net.named_parameters()})
    assert same(trained, distil(MODEL, START, X, torch.zeros(N, K), rows, objective("pskd"), Adam(1e-2), Y))


def test_a_model_that_answers_stages_is_taught_at_each_by_ofa():
    class Staged:
        """A linear stage head on the input, and the model's own logits last."""

        def apply(self, params, x):
            own = {name: p for name, p in params.items() if name != "stage"}
            return torch.stack([x.flatten(1) @ params["stage"], MODEL.apply(own, x)], 1)

    stage = torch.zeros((16, K))
    start = {**START, "stage": stage}
    ofa, rows = objective("ofa", eps=1.2), order()
    trained = distil(Staged(), start, X, TEACHER, rows, ofa, Sgd(0.1), Y)
    plain = distil(MODEL, START, X, TEACHER, rows, ofa, Sgd(0.1), Y)
    close({name: trained[name] for name in plain}, plain)  # the stage's head is apart from the rest here
    assert trained["stage"].abs().max() > 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_in_parts_it_is_the_same_run(name):
    obj, rows = objective(name), order(4)
    state = obj.start(TEACHER, len(rows), 4)
    params = START
    for part in (rows[:5], rows[5:]):
        params, state = train(MODEL, params, X, TEACHER, part, obj, Sgd(0.1), state, Y)
    assert same(params, distil(MODEL, START, X, TEACHER, rows, obj, Sgd(0.1), Y))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_stacked_clients_learn_what_each_learns_alone(name):
    obj, optimizer = objective(name), Adam(1e-2)
    rows = [order(2, 0), order(1, 1, n=13)]  # the second has fewer rows, and fewer records
    alone = [distil(MODEL, MODEL.init(i), X, TEACHER, r, obj, optimizer, Y) for i, r in enumerate(rows)]
    stacked = {k: torch.stack([MODEL.init(i)[k] for i in range(2)]) for k in START}
    padded = torch.stack([F.pad(r, (0, 0, 0, len(rows[0]) - len(r)), value=-1) for r in rows])

    def one(params, row):
        return distil(MODEL, params, X, TEACHER, row, obj, optimizer, Y)

    together = torch.func.vmap(one)(stacked, padded)
    for i in range(2):
        close({k: v[i] for k, v in together.items()}, alone[i], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["kl", "taid", "pskd", "sinkd"])
def test_rows_of_padding_are_no_steps(name):
    obj, rows = objective(name), order()
    gaps = torch.cat([rows[:2], torch.full((2, rows.shape[1]), -1), rows[2:], torch.full((1, rows.shape[1]), -1)])

    def run(row):
        return distil(MODEL, START, X, TEACHER, row, obj, Sgd(0.05, 0.9), Y)

    assert same(run(gaps), run(rows))
    close({k: v[0] for k, v in torch.func.vmap(run)(gaps[None]).items()}, run(rows))


def test_nothing_to_learn_changes_nothing():
    assert same(distil(MODEL, START, X, TEACHER, order(0), objective("taid"), Adam(0.1)), START)
    nothing = distil(MODEL, START, X[:0], TEACHER[:0], order(1, n=0), objective("pskd"), Adam(0.1), Y[:0])
    assert same(nothing, START)


def test_epochs_are_counted_from_the_order():
    for epochs in (1, 3):
        assert epochs_of(order(epochs), N) == epochs
    assert epochs_of(torch.tensor([[3, -1], [-1, -1], [3, 1]]), 4) == 2
    assert epochs_of(torch.full((5, 3), -1), 4) == 0


def test_what_cannot_work_is_refused_before_the_first_step():
    several = torch.stack([TEACHER, TEACHER], 1)
    with pytest.raises(ConfigError, match=r"objective KL: .*\(n, K\) of one teacher, got \(22, 2, 4\); average"):
        distil(MODEL, START, X, several, order(), objective("kl"), Adam(0.1))
    with pytest.raises(ConfigError, match="objective PSKD: expected labels, got none"):
        distil(MODEL, START, X, TEACHER, order(), objective("pskd"), Adam(0.1))
    taught = distil(MODEL, START, X, several, order(), objective("meal_v2"), Sgd(0.1))
    assert same(taught, distil(MODEL, START, X, TEACHER, order(), objective("meal_v2"), Sgd(0.1)))
